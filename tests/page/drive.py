"""Drives the page in a headless Chromium as a person would. Usage: drive.py CHROMIUM URL IMAGE
[AXE]

IMAGE is a picture of a seven, or `foreign` if the page belongs to a proxy. AXE is the file
axe.min.js of axe-core, for checks of accessibility.

Prints one line for each check. Exits with 1 at the first one that fails.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM, URL, IMAGE = sys.argv[1:4]
AXE = Path(sys.argv[4]).read_text() if len(sys.argv) > 4 else None
CHROMIUM = shutil.which(CHROMIUM) or CHROMIUM


def check(name, holds):
    print(("ok   " if holds else "FAIL ") + name, flush=True)
    if not holds:
        sys.exit(1)


def draw_seven(page):
    box = page.locator("#canvas").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"] / 280, box["y"] + y * box["height"] / 280)
    page.mouse.move(*at(75, 70))
    page.mouse.down()
    page.mouse.move(*at(205, 70), steps=5)
    page.mouse.move(*at(125, 225), steps=5)
    page.mouse.up()


def answer(page, label, word):
    page.wait_for_function(
        "([label, word]) => { const a = document.getElementById('answer').textContent;"
        " return a.includes(label) && a.includes(word); }",
        arg=[label, word],
        timeout=20_000,
    )


def accessible(page, name):
    """Checks that axe-core finds nothing serious."""
    if AXE is None:
        return
    page.evaluate(AXE)
    found = page.evaluate("axe.run().then(result => result.violations)")
    serious = [
        f"{rule['id']} at {rule['nodes'][0]['target']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    check(f"axe-core finds nothing serious on {name}: {serious}", not serious)


def foreign(page):
    """The page of a proxy has the numbers and no drawing."""
    page.goto(URL)
    page.wait_for_function("document.getElementById('t-ratio').textContent != '–'")
    check("there is nothing to draw on", page.locator("#try").is_hidden())
    check("nor a list of inputs", page.locator("#recent-card").is_hidden())
    check("the servers are named", "http://" in page.locator("#m-digest").text_content())
    check("the hit ratio is shown", page.locator("#t-ratio").text_content().endswith(" %"))
    accessible(page, "the page of a proxy")


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    faults = []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    strange = []
    page.on("request", lambda request: request.url.startswith((URL, "blob:", "data:")) or strange.append(request.url))
    if IMAGE == "foreign":
        foreign(page)
        check(f"no script error: {faults}", not faults)
        check(f"no foreign request: {strange}", not strange)
        browser.close()
        sys.exit()
    page.goto(URL)
    page.wait_for_function("document.getElementById('live-text').textContent == 'Serving'")
    check("without a request, the page shows one to copy", page.locator("#curl").is_visible())

    draw_seven(page)
    answer(page, "7", "")
    page.wait_for_timeout(500)
    page.click("#again")
    answer(page, "7", "from the store")
    check("a drawn seven is a 7, and comes from the store the second time", True)
    check("ten scores are shown", page.locator("#scores > div").count() == 10)
    page.wait_for_function("document.getElementById('t-ratio').textContent != '–'")
    check("the hit ratio is live", True)

    page.set_input_files("#file", IMAGE)
    answer(page, "7", "")
    check("an image that is opened is answered", page.locator("#recent li").count() >= 2)

    page.click("#clear")
    page.focus("#canvas")
    for key in ["Space"] + ["ArrowDown"] * 9:
        page.keyboard.press(key)
    answer(page, "1", "")
    check("a one is drawn with the keyboard", True)

    accessible(page, "the page with answers")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    check("the theme changes", before != after)
    accessible(page, "the page in the other theme")

    page.set_viewport_size({"width": 390, "height": 800})
    width = page.evaluate("document.documentElement.scrollWidth")
    check(f"a narrow window needs no scrolling sideways ({width} px)", width <= 390)
    accessible(page, "a narrow page")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, canvas, svg')].filter(e =>"
        " !e.hidden && !(e.textContent.trim() || e.getAttribute('aria-label') ||"
        " e.getAttribute('aria-labelledby') || e.getAttribute('aria-hidden') || e.labels?.length)).length"
    )
    check("each control has a name for screen readers", unnamed == 0)

    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#flush")
    page.wait_for_timeout(300)
    page.click("#again")
    answer(page, "1", "computed")
    check("flush deletes the answers", True)
    page.goto(URL + "docs")
    page.wait_for_selector("#operations section")
    check("the description has nine operations", page.locator("#operations section").count() == 9)
    page.locator("section:has(> h2:text-is('GET /v1/models')) button").click()
    page.wait_for_selector("pre:has-text('200')")
    check("a request can be sent from it", True)
    accessible(page, "the description of the API")
    check(f"no script error: {faults}", not faults)
    check(f"no foreign request: {strange}", not strange)
    browser.close()
