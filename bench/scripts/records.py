#!/usr/bin/env python3
"""The committed records of measurements, and the history of their figures.

    records.py keep FILE...    commit these records: the newest of each name replaces the one in
                               bench/records, and the figures of all of them go into history.csv

A benchmark writes its records into target/bench; with --commit it calls this program. A committed
record has no timelines and no histograms, and of several runs with one name only the one with the
median throughput. Afterwards the documents are written anew (performance.py).
"""

import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "bench/records"
HISTORY = RECORDS / "history.csv"
COLUMNS = ["date", "name", "commit", "figure", "value", "unit"]

# The unit of a figure, found in its name. The first match counts.
UNITS = [(r"M/s", "M/s"), (r"requests/s|_per_s", "1/s"), (r"\bns\b", "ns"),
         (r"_us\b|_us_|µs|microseconds", "µs"), (r"_mib_", "MiB"), (r"GHz", "GHz"),
         (r"cycles", "cycles"), (r"bytes an entry", "bytes")]


def load():
    """The committed records by name."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(RECORDS.glob("*.json"))]
    return {record["name"]: record for record in records}


def median_runs(runs):
    """Of the runs of each name the one with the median throughput, in order of appearance."""
    names = {}
    for run in runs:
        names.setdefault(run["name"], []).append(run)
    rate = lambda run: run["report"]["throughput_per_s"]
    return [sorted(repeats, key=rate)[len(repeats) // 2] for repeats in names.values()]


def unit(figure):
    return next((unit for pattern, unit in UNITS if re.search(pattern, figure)), "")


def rows(record):
    """The lines of the history for one record: its figures, or those of its runs without any."""
    figures = dict(record.get("figures", {}))
    if not figures:
        for run in median_runs(record["runs"]):
            report, latency = run["report"], run["report"]["latency_from_due"]
            figures[f"{run['name']}, requests/s"] = report["throughput_per_s"]
            figures[f"{run['name']}, p50 µs"] = latency["p50_ns"] / 1000
            figures[f"{run['name']}, p99 µs"] = latency["p99_ns"] / 1000
    commit = (record["commit"]["hash"] or "")[:12]
    for figure, value in figures.items():
        yield [record["date"], record["name"], commit, figure, f"{value:.6g}", unit(figure)]


def history():
    if not HISTORY.exists():
        return []
    with HISTORY.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def trimmed(record):
    """The record without the parts that no document shows."""
    runs = median_runs(record["runs"])
    for run in runs:
        run["report"].pop("timeline", None)
        run["report"].pop("histograms", None)
    return record | {"runs": runs, "figures": dict(sorted(record.get("figures", {}).items()))}


def keep(paths):
    RECORDS.mkdir(parents=True, exist_ok=True)
    lines, committed = history(), load()
    for path in paths:
        record = json.loads(Path(path).read_text("utf-8"))
        name = record["name"]
        if not re.fullmatch(r"[a-z0-9-]+", name):
            sys.exit(f"{path}: the name {name!r} must consist of a-z, 0-9 and hyphens")
        lines += rows(record)
        if name not in committed or committed[name]["date"] <= record["date"]:
            committed[name] = record
            text = json.dumps(trimmed(record), indent=1, ensure_ascii=False)
            (RECORDS / f"{name}.json").write_text(text + "\n", "utf-8")
    # A record that is committed twice is in the history once.
    lines = sorted({tuple(line) for line in lines})
    with HISTORY.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)


def main():
    if len(sys.argv) < 3 or sys.argv[1] != "keep":
        sys.exit(__doc__)
    keep(sys.argv[2:])
    import performance
    performance.write()


if __name__ == "__main__":
    main()
