#!/usr/bin/env python3
"""Measures hits over REST beside an axum handler that returns the same bytes, one core each.

    bench/scripts/rest.py [--seconds 5] [--rounds 5] [--connections 8] [--pipelined 8]

The server runs on core 0 and the load on core 1. Both servers are measured in turn, so that a busy
machine slows both. Prints a line for each round, and the median of the ratios.
"""

import argparse
import json
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = ROOT / "bench/peers"


def started(command):
    """Starts a server on core 0. Returns it and the address of its HTTP listener."""
    server = subprocess.Popen(
        ["taskset", "-c", "0", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True)
    for line in server.stdout:
        found = re.match(r"(?:gateway )?listening on (?:http://)?([\d.:]+)", line)
        if found:
            return server, found[1]
    raise SystemExit(f"{command[0]} did not start")


def load(address, args, seconds, *more):
    command = [PEERS / "target/release/http_load", f"{address}/v1/classify", args.connections,
               args.pipelined, seconds, *more]
    done = subprocess.run(
        ["taskset", "-c", "1", *map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--pipelined", type=int, default=8)
    args = parser.parse_args()
    build = ["cargo", "build", "--release", "--locked"]
    subprocess.run([*build, "--bin", "afterimage"], cwd=ROOT, check=True)
    subprocess.run([*build, "--bin", "rest_server", "--bin", "http_load"], cwd=PEERS, check=True)
    memo, of_memo = started([
        ROOT / "target/release/afterimage", "serve", "--listen", "127.0.0.1:0", "--http",
        "127.0.0.1:0", "--threads", "1", "--compute-threads", "1", "--model", "raw"])
    plain, of_plain = started([PEERS / "target/release/rest_server", "127.0.0.1:0"])
    try:
        # Until each image was answered, so that the rounds have hits only.
        load(of_memo, args, 0.1, "labels")
        ratios = []
        for number in range(1, args.rounds + 1):
            ours, theirs = load(of_memo, args, args.seconds), load(of_plain, args, args.seconds)
            for result in (ours, theirs):
                assert result["wrong"] == 0 and result["hits"] == result["count"], result
            ratios.append(ours["throughput_per_s"] / theirs["throughput_per_s"])
            print(f"round {number}: gateway {ours['throughput_per_s']:,.0f}/s, p99 {ours['p99_ns'] / 1000:.0f} µs; "
                  f"axum {theirs['throughput_per_s']:,.0f}/s, p99 {theirs['p99_ns'] / 1000:.0f} µs; "
                  f"ratio {ratios[-1]:.3f}", flush=True)
        print(f"median of the ratios: {statistics.median(ratios):.3f} (target: 0.9)")
    finally:
        memo.terminate()
        plain.terminate()


if __name__ == "__main__":
    main()
