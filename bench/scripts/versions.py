#!/usr/bin/env python3
"""Compares two binaries of Afterimage: rate and CPU time, or the instructions of each request.

    bench/scripts/versions.py OLD NEW                      all kinds, depths 1, 64 and 1024
    bench/scripts/versions.py OLD NEW --kinds remote --depths 64 --rounds 9
    bench/scripts/versions.py OLD NEW --instructions       user instructions, under callgrind
    bench/scripts/versions.py OLD NEW --instructions --functions 20 --kinds embedded --depths 64

Kinds: `embedded` are hits of a memo with its own table, `remote` hits of a memo with a cache
service as its store, `cache` reads of a cache service, `miss` requests of new images to a memo with
its classifier in another process. The server that is measured has one thread on the first CPU; the
load is on the second.

Rates and CPU times are medians of rounds in which the binaries take turns, and the last column is
the median of the rounds' quotients. On a shared machine these quotients vary by 10 % and more.
Instructions hardly vary: a quotient above 1.03 is a change of the code. They leave out the kernel,
waits and memory. The load generator is NEW unless --load names another binary. Needs Python 3.9,
and valgrind for --instructions.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile

from measure import Process, describe_machine, machine, write_record

KINDS = ("embedded", "remote", "cache", "miss")
# Inputs of the hits that are counted: few, because the classifier is slow under valgrind.
POPULATION = 500
LISTEN = ["--threads", "1", "--listen", "127.0.0.1:0"]


class Server(Process):
    """A service, and the address that it reports."""

    def __init__(self, binary, arguments, wrapper=()):
        super().__init__(["taskset", "-c", "0", *wrapper, binary, *arguments])
        words = self.child.stdout.readline().decode().split()
        if not words:
            log = pathlib.Path(self.folder, "log").read_text()
            raise SystemExit(f"{binary} {arguments[0]} did not start: {log.strip()}")
        self.address = words[-1]


@contextlib.contextmanager
def measured(binary, kind, wrapper=()):
    """The server of this kind that is measured; the servers that it needs run beside it."""
    with contextlib.ExitStack() as stack:
        if kind == "cache":
            arguments = ["cache", *LISTEN]
        else:
            arguments = ["memo", "--compute-threads", "1", *LISTEN]
            if kind == "remote":
                # `--cache` is the old name of `--store`, which every version takes.
                cache = stack.enter_context(Server(binary, ["cache", *LISTEN]))
                arguments += ["--cache", cache.address]
                if wrapper:
                    # Under valgrind the memo is too slow for the usual budget.
                    arguments += ["--lookup-budget", "10s"]
            if kind == "miss":
                classifier = Server(binary, ["classifier", "--compute-threads", "1", *LISTEN])
                arguments += ["--classifier", stack.enter_context(classifier).address]
            if "--http" in subprocess.run([binary, "memo", "--help"], capture_output=True, text=True).stdout:
                arguments += ["--http", "off"]
        yield stack.enter_context(Server(binary, arguments, wrapper))


def load(generator, address, kind, depth, population, *amount):
    """Runs the load generator and returns its report."""
    choice = ["--hit-ratio", "0"] if kind == "miss" else ["--prefill"]
    command = ["taskset", "-c", "1", generator, "bench", address, "--pin", "1", "--depth", str(depth), "--timeout",
               "60s", "--json", "--population", str(population), *choice, *amount]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {result.stderr.strip()}")
    report = json.loads(result.stdout)["runs"][0]["report"]
    hit_ratio = report.get("hit_ratio")
    if hit_ratio is not None and abs(hit_ratio - (kind != "miss")) > 0.02:
        raise SystemExit(f"{kind}: the hit ratio is {hit_ratio}")
    return report


def speeds(options, kind, depth):
    """Prints rates and CPU times. Yields the name and the quotient of each."""
    figures = {"old": [], "new": []}
    with measured(options.old, kind) as old, measured(options.new, kind) as new:
        for turn in range(options.rounds):
            pair = [("old", old), ("new", new)]
            for name, server in pair if turn % 2 == 0 else reversed(pair):
                before = server.cpu_s()
                report = load(options.load, server.address, kind, depth, 10_000, "--warm-up", "300ms", "--duration",
                              f"{options.seconds}s")
                rate = report["throughput_per_s"]
                # The warm-up has the same rate; `prefill` is a small part.
                cpu_ns = (server.cpu_s() - before) / (rate * (options.seconds + 0.3)) * 1e9
                figures[name].append((rate, cpu_ns))
    for place, what in enumerate(("requests/s", "CPU ns")):
        old, new = ([figure[place] for figure in figures[name]] for name in ("old", "new"))
        quotient = statistics.median(b / max(a, 1e-9) for a, b in zip(old, new))
        row(kind, depth, what, statistics.median(old), statistics.median(new), quotient)
        yield f"{kind} {depth} {what}", quotient


def instructions(options, kind, depth):
    """Prints user instructions for each request. Yields the name and the quotient."""
    totals, functions = {}, {}
    for name, binary in (("old", options.old), ("new", options.new)):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out"
            wrapper = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
            with measured(binary, kind, wrapper) as server:
                control = ["callgrind_control"]
                # The same load before, so that the hits are stored and the buffers have grown.
                amount = ["--warm-up", "0s", "--count", str(options.count)]
                load(options.load, server.address, kind, depth, POPULATION, *amount)
                pid = str(server.child.pid)
                subprocess.run([*control, "-z", pid], check=True, capture_output=True)
                requests = options.count + (0 if kind == "miss" else POPULATION)
                load(options.load, server.address, kind, depth, POPULATION, *amount)
                subprocess.run([*control, "-d", pid], check=True, capture_output=True)
            functions[name] = self_costs(f"{out}.1", requests)
            totals[name] = sum(functions[name].values())
    quotient = totals["new"] / totals["old"]
    row(kind, depth, "instructions", totals["old"], totals["new"], quotient)
    both = sorted(set(functions["old"]) | set(functions["new"]),
                  key=lambda function: -max(functions["old"][function], functions["new"][function]))
    for function in both[:options.functions]:
        print(f"    {functions['old'][function]:8.1f} {functions['new'][function]:8.1f}  {function[:120]}")
    yield f"{kind} {depth} instructions", quotient


def self_costs(path, requests):
    """The instructions of each function, without those that it calls, for each request."""
    names, costs, function, skips = {}, collections.Counter(), None, False
    for line in open(path, errors="replace"):
        named = re.match(r"(c?fn)=\((\d+)\)(?: (.*))?$", line.rstrip("\n"))
        if named:
            kind, number, text = named.groups()
            if text:
                names[number] = re.sub(r"'\d+|::h[0-9a-f]{16}", "", text)
            if kind == "fn":
                function = number
        elif line.startswith("calls="):
            # The next line has the cost of the callee.
            skips = True
        elif re.match(r"[+\-*\d]", line):
            parts = line.split()
            if not skips and function and len(parts) > 1:
                costs[function] += int(parts[1])
            skips = False
    by_name = collections.Counter()
    for number, cost in costs.items():
        by_name[names.get(number, number)] += cost / requests
    return by_name


# The printed lines, for the record.
LINES = []


def say(line):
    print(line, flush=True)
    LINES.append(line)


def row(kind, depth, what, old, new, quotient):
    say(f"{kind:9} {depth:5} {what:13} {old:12,.0f} {new:12,.0f} {quotient:7.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="binary to compare with")
    parser.add_argument("new", help="binary to judge")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s")
    parser.add_argument("--depths", default="1,64,1024", help="requests in flight [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of rates and CPU times [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round [default: %(default)s]")
    parser.add_argument("--instructions", action="store_true", help="count instructions instead")
    parser.add_argument("--count", type=int, default=20_000, help="requests to count in [default: %(default)s]")
    parser.add_argument("--functions", type=int, default=0, help="also show so many functions")
    parser.add_argument("--load", help="binary of the load generator [default: NEW]")
    parser.add_argument("--record", metavar="FOLDER", help="also write a record with the quotients")
    options = parser.parse_args()
    options.load = options.load or options.new
    for kind in options.kinds.split(","):
        if kind not in KINDS:
            parser.error(f"{kind!r} is not one of {', '.join(KINDS)}")
    described, headline = describe_machine(), machine()
    print(headline)
    say(f"{'kind':9} {'depth':>5} {'':13} {'old':>12} {'new':>12} {'new/old':>7}")
    compare = instructions if options.instructions else speeds
    figures = {}
    for kind in options.kinds.split(","):
        for depth in options.depths.split(","):
            figures.update(compare(options, kind, int(depth)))
    if options.record:
        what = "instructions" if options.instructions else "speeds"
        command = shlex.join(["bench/scripts/versions.py", *sys.argv[1:]])
        write_record(options.record, f"versions-{what}", [command], described, figures, LINES)


if __name__ == "__main__":
    main()
