#!/usr/bin/env python3
"""Runs the micro-benchmarks of the crates on the second core and writes the record "micro".

    micro.py [--commit]

Covers codec, key, flights, label table, feature map and scoring. Takes about two minutes after the
build. Of each benchmark it keeps the fastest sample, since other processes can only slow a sample
down, and the median.
"""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from measure import ROOT, describe_machine, write_record

BENCHES = [("wire", "codec"), ("memo", "paths"), ("cache", "table"), ("classifier", "scoring")]
NANOSECONDS = {"ps": 1e-3, "ns": 1, "µs": 1e3, "ms": 1e6, "s": 1e9}


def nanoseconds(text):
    """The nanoseconds of a text such as "98.57 ns"; None for another text."""
    found = re.fullmatch(r"([0-9.]+) (ps|ns|µs|ms|s)", text.strip())
    return float(found[1]) * NANOSECONDS[found[2]] if found else None


def figures(lines):
    """The figures in divan's tree; a name consists of the names of its branches."""
    found, branches = {}, []
    for line in lines:
        found_name = re.match(r"^((?:│  |   )*)(?:├─|╰─) (\S+)(.*)$", line)
        if not found_name:
            continue
        indent, name, rest = found_name.groups()
        branches[len(indent) // 3 :] = [name]
        # Fastest, slowest, median; the other columns are not used.
        columns = [nanoseconds(column) for column in rest.split("│")]
        if len(columns) > 2 and columns[0] is not None and columns[2] is not None:
            found[f"{', '.join(branches)}: fastest ns"] = columns[0]
            found[f"{', '.join(branches)}: median ns"] = columns[2]
    return found


def main():
    machine, text, all_figures = describe_machine(), [], {}
    for package, bench in BENCHES:
        command = ["cargo", "bench", "--locked", "-p", f"afterimage-{package}", "--bench", bench]
        subprocess.run([*command, "--no-run"], cwd=ROOT, check=True)
        done = subprocess.run(["taskset", "-c", "1", *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        lines = done.stdout.splitlines()
        of_bench = {f"{bench}, {name}": value for name, value in figures(lines).items()}
        if not of_bench:
            sys.exit(f"{package}/{bench} printed no figures")
        all_figures |= of_bench
        text += [line.rstrip() for line in lines]
    path = write_record(ROOT / "target/bench", "micro", ["bench/scripts/micro.py"], machine, all_figures, text)
    if "--commit" in sys.argv:
        subprocess.run([ROOT / "bench/scripts/records.py", "keep", path], check=True)


if __name__ == "__main__":
    main()
