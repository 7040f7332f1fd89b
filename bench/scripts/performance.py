#!/usr/bin/env python3
"""Writes docs/performance.md and the marked blocks of the READMEs from bench/records.

    performance.py            writes the documents
    performance.py --check    writes nothing; fails and names the documents that are stale

bench/targets.toml holds the targets, the sections and the blocks. Needs Python 3.11.
"""

import math
import re
import sys
import tomllib

import records
from records import ROOT

PAGE = "docs/performance.md"
INTRODUCTION = """\
# Performance

Made by `just performance` from the records in `bench/records`; do not edit. The machine is shared and virtual: quote \
ratios from one record, not absolute figures. `just bench-all` measures again. Older figures are in \
[`bench/records/history.csv`](../bench/records/history.csv). Two topics have their tables elsewhere: the memo's stores \
in [`docs/scaling.md`](scaling.md), threads and snapshots of the cache service in \
[`cache/README.md`](../cache/README.md).
"""
# The batch sizes in the record of the classifier.
BATCHES = ["1", "64", "256", "10000"]
BATCH = re.compile(rf"(.*), ({'|'.join(BATCHES)}) at once, µs per image")


# Numbers

def number(value):
    """A figure in three or four significant digits; "–" for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    zeros = -math.floor(math.log10(size)) if size > 0 else 0
    return f"{value:.{min(max(zeros + 2, 3), 12)}f}".rstrip("0").rstrip(".")


def limit(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def duration(ns):
    """A time in three digits, as bench/src/format.rs writes it."""
    if ns < 999.5:
        return f"{ns:.0f} ns"
    for size, unit in ((1e3, "µs"), (1e6, "ms"), (1e9, "s")):
        value = ns / size
        if value < 999.5 or unit == "s":
            places = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{places}f} {unit}"


def percent(share):
    return f"{100 * share:.0f} %"


def words(figure):
    """The name of a figure for people: p50 µs for p50_us."""
    if " " in figure:
        return figure
    return " ".join({"us": "µs", "mib": "MiB"}.get(word, word) for word in figure.split("_"))


# Tables

def table(head, rows, left=1):
    """A table in Markdown; the first `left` columns are aligned to the left."""
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    rules = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(line(cells) for cells in [head, rules, *rows])


def figures_table(record):
    return table(["figure", ""], [[words(name), number(value)] for name, value in record["figures"].items()])


def cores(report):
    return percent(sum(report["generator"]["cpu_share"]))


def runs_table(record):
    if not record["runs"]:
        return ""
    rows = []
    for run in records.median_runs(record["runs"]):
        report = run["report"]
        # In an open loop only the latency from due shows a delay before sending.
        is_open = report["settings"]["rate_per_s"] is not None
        latency = report["latency_from_due" if is_open else "latency_from_sent"]
        hits = "" if report["hit_ratio"] is None else f"{100 * report['hit_ratio']:.1f} %"
        rows.append([run["name"], number(report["throughput_per_s"]),
                     *(duration(latency[name]) for name in ("p50_ns", "p99_ns", "p999_ns")), hits, cores(report)])
    return table(["run", "requests/s", "p50", "p99", "p99.9", "hits", "generator's core"], rows)


def runs_section(record):
    parts = [runs_table(record), figures_table(record) if record.get("figures") else ""]
    return "\n".join(part for part in parts if part)


def text_section(record):
    text = "\n".join(record["text"]).rstrip()
    return f"```text\n{text}\n```\n\n" + figures_table(record)


def classifier_section(record):
    programs, commands, speeds = {}, [], {}
    for name, value in record["figures"].items():
        if batch := BATCH.fullmatch(name):
            programs.setdefault(batch[1], {})[batch[2]] = value
        elif name.endswith("command line, µs per image"):
            commands.append([name.removesuffix(", µs per image"), number(value), "", "", "", ""])
        elif speed := re.fullmatch(r"speed, (conv|raw), (.*)", name):
            speeds.setdefault(speed[2], {})[speed[1]] = value
    cell = lambda values, name: number(values[name]) if name in values else ""
    agreed = lambda program: cell(record["figures"], f"{program}, answers that are ours")
    # The raw model before the convolutional one, the fastest program first.
    order = sorted(programs, key=lambda name: ("conv" in name, programs[name].get("1", math.inf)))
    rows = [[name, *(cell(programs[name], batch) for batch in BATCHES), agreed(name)] for name in order]
    heads = ["µs per image", "one at a time", *(f"{int(batch):,} at once" for batch in BATCHES[1:]), "equal answers"]
    out = table(heads, rows + commands)
    if speeds:
        rows = [[what, cell(values, "conv"), cell(values, "raw")] for what, values in sorted(speeds.items())]
        out += "\n" + table(["ours in parts", "conv", "raw"], rows)
    return out


def micro_section(record):
    figures, rows = record["figures"], []
    for name, value in figures.items():
        if name.endswith(": fastest ns"):
            base = name.removesuffix(": fastest ns")
            rows.append([base, number(value), number(figures.get(f"{base}: median ns"))])
    return table(["ns", "fastest", "median"], rows)


def in_flight_block(record):
    rows = []
    for run in records.median_runs(record["runs"]):
        report, latency = run["report"], run["report"]["latency_from_sent"]
        rows.append([f"{report['settings']['depth']:,}", number(report["throughput_per_s"]),
                     duration(latency["p50_ns"]), duration(latency["p99_ns"])])
    return table(["requests in flight", "answers per second", "p50", "p99"], rows, left=0)


def generator_block(record):
    rows = []
    for run in records.median_runs(record["runs"]):
        report = run["report"]
        rows.append([run["name"], number(report["throughput_per_s"]), cores(report),
                     number(report["generator"]["cpu_ns_per_request"]) + " ns"])
    return table(["load", "requests/s", "generator's share of its core", "its CPU time per request"], rows)


def rows_block(block, record):
    rows = []
    for row in block["rows"]:
        reached = ""
        if "reached" in row:
            value = record["figures"].get(row["reached"])
            reached = number(value)
            if value is None or value < row.get("at_least", value) or value > row.get("at_most", value):
                reached += ", **missed**"
        figures = [number(record["figures"].get(name)) for name in row["figures"]]
        rows.append([row["what"], *figures, filled(row.get("target", ""), record), reached])
    out = table(["", *block["head"]], rows)
    # Target and result are texts.
    return out.replace("---: | ---: |\n", "--- | --- |\n", 1)


def filled(text, record):
    """The text with a figure in place of each {name}."""
    return re.sub(r"\{(.*?)\}", lambda name: number(record["figures"].get(name[1])), text)


SECTIONS = {"runs": runs_section, "text": text_section, "classifier": classifier_section, "micro": micro_section}
BLOCKS = {"in-flight": in_flight_block, "generator": generator_block}


# Targets

def fastest_peer_over(figures, ours, batches):
    """The least quotient, over these batches, of the fastest other program's time and ours."""
    quotients = []
    for batch in batches:
        times = {}
        for name, value in figures.items():
            found = BATCH.fullmatch(name)
            if found and found[2] == batch and ("conv" in name) == ("conv" in ours):
                times[found[1]] = value
        others = [value for name, value in times.items() if not name.startswith("ours")]
        if ours in times and others:
            quotients.append(min(others) / times[ours])
    return min(quotients, default=None)


def value_of(target, record):
    figures = record.get("figures", {})
    if "best_rate_at_depth" in target:
        depth = target["best_rate_at_depth"]
        reports = [run["report"] for run in record["runs"]]
        rates = [report["throughput_per_s"] for report in reports if depth in (0, report["settings"]["depth"])]
        return max(rates, default=None)
    if "fastest_peer_over" in target:
        batches = [str(target["batch"])] if "batch" in target else BATCHES
        return fastest_peer_over(figures, target["fastest_peer_over"], batches)
    value = figures.get(target["figure"])
    if value is not None and "over" in target:
        value /= figures[target["over"]]
    return value


def judged(target, value, record):
    """The target as a text, and whether the value reaches it."""
    if "at_least" in target:
        return f"≥ {limit(target['at_least'])}", value >= target["at_least"]
    if "at_most" in target:
        return f"≤ {limit(target['at_most'])}", value <= target["at_most"]
    most = record["figures"][target["at_most_figure"]]
    return f"≤ {number(most)}", value <= most


def link(name):
    return f"[`{name}`](../bench/records/{name}.json)"


def targets(spec, known):
    rows, reasons, why = [], [], ""
    for target in spec["target"]:
        why = why if target.get("same_why") else target.get("why", "")
        record = known.get(target["record"])
        value = record and value_of(target, record)
        if value is None:
            continue
        aim, is_reached = judged(target, value, record)
        if not is_reached and why and why not in reasons:
            reasons.append(why)
        note = f" ({reasons.index(why) + 1})" if why in reasons else ""
        figures = record.get("figures", {})
        beside = [f"{words(name)} {number(figures[name])}" for name in target.get("beside", []) if name in figures]
        rows.append([target["what"], number(value), aim, "yes" if is_reached else f"**no**{note}",
                     ", ".join(beside), link(target["record"])])
    out = "\n## Targets\n\n| | measured | target | reached | related figures | record |\n"
    out += "| --- | ---: | ---: | --- | --- | --- |\n"
    out += "".join("| " + " | ".join(cells) + " |\n" for cells in rows)
    if reasons:
        out += "\nReasons for missed targets:\n\n"
    return out + "".join(f"{place}. {why}\n" for place, why in enumerate(reasons, 1))


# Documents

def source(record):
    """Date, commit and machine of a record."""
    commit, machine = record["commit"], record["machine"]
    changed = " with local changes" if commit["changed"] else ""
    load = machine["load_before"]
    load = "" if load is None else f"; load before: {load:.1f}"
    return (f"{record['date']} · commit {(commit['hash'] or 'unknown')[:12]}{changed} · "
            f"{machine['cpu'] or 'unknown processor'}, {machine['cpus']} CPUs{load} · {link(record['name'])}")


def page(spec, known):
    out = INTRODUCTION + targets(spec, known)
    for section in spec["section"]:
        if record := known.get(section["record"]):
            out += f"\n## {section['heading']}\n\n{section['text']}\n\n"
            out += f"{SECTIONS[section['table']](record)}\n{source(record)}\n"
    return out


def with_block(text, block, known):
    """The text of a document with this block filled in, if its marker is there."""
    marker = block["marker"]
    opens, closes = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    if opens not in text:
        return text
    if text.count(opens) != 1 or text.count(closes) != 1:
        sys.exit(f"{block['document']}: expected one <!-- {marker} --> and one {closes}")
    record = known.get(block["record"])
    if record is None:
        sys.exit(f"bench/records has no record {block['record']} for the block {marker}")
    if "text" in block:
        content = filled(block["text"], record) + "\n"
    elif "rows" in block:
        content = rows_block(block, record)
    else:
        content = BLOCKS[block["table"]](record)
    before, rest = text.split(opens)
    after = rest.split(closes)[1]
    return f"{before}{opens}\n{content}\n`bench/records/{block['record']}.json`\n\n{closes}{after}"


def documents():
    """Path and new text of each document."""
    spec = tomllib.loads((ROOT / "bench/targets.toml").read_text("utf-8"))
    known = records.load()
    texts = {PAGE: page(spec, known)}
    for block in spec["block"]:
        name = block["document"]
        text = texts.get(name) or (ROOT / name).read_text("utf-8")
        texts[name] = with_block(text, block, known)
    return texts


def stale():
    """The documents whose text is not the new one."""
    read = lambda path: path.read_text("utf-8") if path.exists() else ""
    return {name: text for name, text in documents().items() if read(ROOT / name) != text}


def write():
    for name, text in stale().items():
        (ROOT / name).write_text(text, "utf-8")
        print(f"wrote {name}")


def main():
    match sys.argv[1:]:
        case []:
            write()
        case ["--check"]:
            if names := stale():
                sys.exit(f"stale: {', '.join(names)}; run: just performance")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
