#!/usr/bin/env python3
"""Measures the memo's stores: embedded label table, cache service, Redis, Redis Cluster. Takes
about two minutes.

    stores.py [--commit]

All servers run on this machine, so the figures contain no network latency. The model is the raw
one, which is fast: the figures are those of the stores, not of the classifier. Prints Markdown;
--commit writes it into docs/scaling.md.
"""

import os
import pathlib
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from measure import Redis, Service, binary, finish, load, machine, say, short, stats, table, us

HOT, MANY = "10000", 100_000
BUDGET = "20ms"  # For lookups: long, so that a busy machine does not end them.


class Embedded:
    name, servers, place = "embedded", [], "embedded"

    def memory(self, memo, program):
        return table_bytes(stats(program, memo.addr), "store_")

    def end(self):
        pass


class Cache:
    name = "Afterimage cache"

    def __init__(self, program):
        self.program = program
        self.servers = [Service(program, "cache", "--memory", "64MiB", "--threads", "1", "--snapshot", "snapshot")]
        self.place = self.servers[0].addr

    def memory(self, memo, program):
        return table_bytes(stats(self.program, self.place), "")


class OneRedis:
    name = "Redis"

    def __init__(self):
        self.servers = [Redis()]
        self.place = "redis://" + self.servers[0].addr
        self.before = self.used()

    def used(self):
        return sum(int(server.info("used_memory")) for server in self.servers)

    def memory(self, memo, program):
        keys = sum(int(server.cli("dbsize")) for server in self.servers)
        return (self.used() - self.before) / keys


class Cluster(OneRedis):
    name = "Redis cluster of 3"

    def __init__(self):
        flags = ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
        self.servers = [Redis(*flags) for _ in range(3)]
        addrs = [server.addr for server in self.servers]
        self.servers[0].cli("--cluster", "create", *addrs, "--cluster-yes")
        patience = time.monotonic() + 60
        while time.monotonic() < patience and not all("cluster_state:ok" in server.cli("cluster", "info") for server in self.servers):
            time.sleep(0.05)
        self.place = "redis+cluster://" + ",".join(addrs)
        self.before = self.used()


def table_bytes(values, prefix):
    """Bytes per entry of a full table, whose memory is allocated once."""
    return values[prefix + "memory_bytes"] / values[prefix + "capacity"]


def memo_of(program, store, secret):
    return Service(program, "memo", "--model", "raw", "--threads", "1", "--compute-threads", "1", "--memory", "64MiB",
                   "--store", store.place, "--lookup-budget", BUDGET, "--secret-file", secret)


def speed(program, memo):
    hot = ["--population", HOT]
    load(program, memo.addr, *hot, "--prefill", "--duration", "500ms", "--depth", "64")
    one = load(program, memo.addr, *hot, "--duration", "2s", "--depth", "1")
    deep = load(program, memo.addr, *hot, "--duration", "2s", "--depth", "256")
    return one, deep


def shared(program, store, folder):
    """Hit ratio of a second memo, with the same secret and with another one."""
    found = []
    for secret in ("secret", "another"):
        with memo_of(program, store, os.path.join(folder, secret)) as second:
            found.append(load(program, second.addr, "--population", HOT, "--count", "2000", "--depth", "16",
                              "--warmup", "0s")["hit_ratio"])
    return found


def death(program, store, memo):
    """Kills the store under an open loop, and starts it again afterwards."""
    report = []
    open_loop = ["--population", HOT, "--rate", "2000", "--poisson", "--duration", "5s", "--depth", "64"]
    loading = threading.Thread(target=lambda: report.append(load(program, memo.addr, *open_loop)))
    if isinstance(store, Cache):
        # As `--snapshot-every` would have done shortly before.
        os.system(f"{program} snapshot {store.place} >{os.devnull}")
    loading.start()
    time.sleep(3)
    for server in store.servers:
        server.kill()
    loading.join()
    for server in store.servers:
        if isinstance(server, Service):
            server.restart()
        else:
            server.start()
            server.ready()
    again = time.monotonic()
    while time.monotonic() < again + 30 and stats(program, memo.addr)["store_breaker"] != "closed":
        load(program, memo.addr, "--population", HOT, "--count", "20", "--warmup", "0s")
    back = time.monotonic() - again
    warm = load(program, memo.addr, "--population", HOT, "--count", "2000", "--warmup", "0s", "--depth", "16")
    return report[0], back, warm["hit_ratio"]


def main():
    program = binary()
    say(machine() + "\n")
    folder = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"afterimage-stores-{os.getpid()}")
    os.mkdir(folder)
    for name in ("secret", "another"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(os.urandom(32))
    figures, sharing, deaths = [], [], []
    for make in (Embedded, lambda: Cache(program), OneRedis, Cluster):
        store = make()
        try:
            with memo_of(program, store, os.path.join(folder, "secret")) as memo:
                one, deep = speed(program, memo)
                latency = one["latency_from_due"]
                if not figures:
                    base = latency["p50_ns"]
                load(program, memo.addr, "--population", str(MANY), "--prefill", "--count", "1", "--depth", "256")
                bytes_each = store.memory(memo, program)
                figures.append([store.name, us(latency["p50_ns"]), us(latency["p99_ns"]), us(latency["p50_ns"] - base),
                                short(deep["throughput_per_s"]), f"{bytes_each:.1f}"])
                if store.servers:
                    with_secret, without = shared(program, store, folder)
                    sharing.append([store.name, f"{100 * with_secret:.1f} %", f"{100 * without:.1f} %"])
                    report, back, warm = death(program, store, memo)
                    slow = report["latency_from_due"]
                    deaths.append([store.name, f"{report['failed']} of {report['sent']}", us(slow["p99_ns"]),
                                   us(slow["max_ns"]), f"{1000 * back:.0f} ms", f"{100 * warm:.1f} %"])
        finally:
            for server in store.servers:
                server.__exit__()
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    os.rmdir(folder)
    say("Hits:\n")
    table(["store", "one at a time, p50", "p99", "added to p50", "answers/s, 256 in flight", "bytes per entry"], figures)
    say("Hit ratio of a second memo on the answers of the first:\n")
    table(["store", "same secret", "another secret"], sharing)
    say("The store is killed under 2,000 requests per second, and started again:\n")
    table(["store", "failed requests", "p99", "max", "used again after", "hits then"], deaths)
    finish("docs/scaling.md")


main()
