#!/usr/bin/env python3
"""Measures the cache service with 1 to 16 worker threads. Takes about two minutes.

    scaling.py [--commit]

Server and load share the machine's CPUs. The tables show whether a second thread helps on two CPUs,
and whether more threads than CPUs cost time: while a thread without a CPU holds a lock, all others
wait, and the CPU time per request grows with the threads. Prints Markdown; --commit writes it into
cache/README.md.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from measure import Service, binary, finish, load, machine, say, short, table, us

SECONDS = 4
KEYS = "1000000"


def run(program, threads, connections, depth):
    with Service(program, "cache", "--entries", "2000000", "--threads", str(threads)) as cache:
        asked = ["--population", KEYS, "--connections", str(connections), "--depth", str(depth)]
        load(program, cache.addr, *asked, "--prefill", "--duration", "500ms")
        cpu, waits = cache.cpu_s(), cache.waits()
        report = load(program, cache.addr, *asked, "--duration", f"{SECONDS}s", "--warmup", "1s")
        cpu, waits = cache.cpu_s() - cpu, cache.waits() - waits
    # The server's figures include the warm-up; the report's do not.
    requests = report["throughput_per_s"] * (report["measured_s"] + 1)
    latency = report["latency_from_due"]
    return [threads, short(report["throughput_per_s"]), us(latency["p50_ns"]), us(latency["p99_ns"]),
            f"{1e9 * cpu / requests:.0f} ns", f"{cpu / (report['measured_s'] + 1):.2f}", f"{waits / requests:.5f}"]


def main():
    program = binary()
    say(machine() + "\n")
    for depth, what in [(1, "One request at a time"), (64, "64 in flight"), (2048, "2,048 in flight")]:
        say(f"{what} on each of 16 connections:\n")
        table(["threads", "reads/s", "p50", "p99", "server's CPU time per read", "CPUs used", "waits per read"],
              (run(program, threads, 16, depth) for threads in (1, 2, 4, 16)))
    finish("cache/README.md")


main()
