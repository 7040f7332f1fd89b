#!/usr/bin/env python3
"""Measures reads of the cache service while it writes snapshots of ten million entries. Takes half
a minute.

    snapshot.py [--commit]

The load is an open loop. The snapshots follow each other without a pause, so that every measured
read meets one. Prints Markdown; --commit writes it into cache/README.md.
"""

import pathlib
import subprocess
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from measure import Service, binary, finish, load, machine, say, table, us

ENTRIES, RATE, SECONDS = "10000000", "20000", "6"


def main():
    program = binary()
    say(machine() + "\n")
    with Service(program, "cache", "--entries", "20000000", "--threads", "1", "--snapshot", "snapshot") as cache:
        asked = ["--population", ENTRIES, "--connections", "4", "--depth", "64"]
        load(program, cache.addr, *asked, "--prefill", "--count", "100000")
        reads = [*asked, "--rate", RATE, "--poisson", "--duration", SECONDS + "s"]
        without = load(program, cache.addr, *reads)
        stop, said = threading.Event(), []

        def snapshots():
            while not stop.is_set():
                done = subprocess.run([program, "snapshot", cache.addr], capture_output=True, text=True, check=True)
                said.append(done.stdout.strip())

        writer = threading.Thread(target=snapshots)
        writer.start()
        during = load(program, cache.addr, *reads)
        stop.set()
        writer.join()
    say(f"{int(RATE):,} reads per second over four connections, uniform over {int(ENTRIES):,} keys; {len(said)} snapshots, "
        f"the last: {said[-1]}.\n")
    rows = []
    for name, report in (("without", without), ("during snapshots", during)):
        latency = report["latency_from_due"]
        columns = [us(latency[key]) for key in ("p50_ns", "p99_ns", "p999_ns", "max_ns")]
        rows.append([name, *columns, f"{report['answered']} of {report['sent']}"])
    table(["", "p50", "p99", "p99.9", "max", "answered"], rows)
    ratio = during["latency_from_due"]["p99_ns"] / without["latency_from_due"]["p99_ns"]
    say(f"The 99th percentile during snapshots is {ratio:.2f} times the one without.")
    finish("cache/README.md")


main()
