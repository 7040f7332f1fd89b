#!/usr/bin/env python3
"""Builds the book of the documentation: docs/build.py [--out DIR]

The chapters are files of the repository, listed in SUMMARY.md. They keep their places, so that
links among them hold. A link to a file that is no chapter becomes one to the repository. Needs
mdbook (`cargo install mdbook`). The book is in target/book/html.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/afterimage-cache/afterimage/blob/main/"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def place(folder, target):
    """The path of a link's target in the repository."""
    return os.path.normpath(os.path.join(folder, target))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "target/book", help="folder of the book")
    out = parser.parse_args().out
    if not shutil.which("mdbook"):
        sys.exit("mdbook is not installed; install it with: cargo install mdbook")
    source = out / "src"
    shutil.rmtree(out, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copy(ROOT / "docs/book.toml", out)
    summary = (ROOT / "docs/SUMMARY.md").read_text()
    chapters = {place("docs", target) for target, _ in LINK.findall(summary)}
    missing = [chapter for chapter in sorted(chapters) if not (ROOT / chapter).is_file()]
    if missing:
        sys.exit(f"docs/SUMMARY.md lists files that do not exist: {', '.join(missing)}")
    (source / "SUMMARY.md").write_text(LINK.sub(lambda link: place("docs", link[1]), summary))
    broken = []
    for chapter in sorted(chapters):
        folder = os.path.dirname(chapter)

        def rewritten(link):
            target, anchor = link[1], link[2] or ""
            if "://" in target or target.startswith("mailto:"):
                return link[0]
            path = place(folder, target)
            if not (ROOT / path).exists():
                broken.append(f"{chapter}: {target}")
            return link[0] if path in chapters else REPOSITORY + path + anchor

        copy = source / chapter
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(LINK.sub(rewritten, (ROOT / chapter).read_text()))
    if broken:
        sys.exit("links to files that do not exist:\n" + "\n".join(broken))
    subprocess.run(["mdbook", "build", "-d", str(out / "html"), str(out)], check=True)
    print(f"{len(chapters)} chapters in {out}/html/index.html")


if __name__ == "__main__":
    main()
