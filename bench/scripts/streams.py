#!/usr/bin/env python3
"""Measures `afterimage stream run` beside jq, Python (json, orjson, ijson) and DuckDB.

    streams.py [--commit]

Takes about three minutes. One file of each kind, read from memory (the page cache), one thread,
the programs in turn, the best of three by processor time. All answers are compared. Needs jq, and a
Python with orjson, ijson and duckdb (PYTHON names it). Prints Markdown; --commit writes it into
docs/streams.md.
"""

import json
import math
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from measure import binary, finish, machine, say, table

ROUNDS = 3
PYTHON = os.environ.get("PYTHON", sys.executable)

# Each program prints the mean of the numbers in the file that it gets.
LINES_JSON = "import json,sys;n=s=0\nfor l in open(sys.argv[1],'rb'):s+=json.loads(l);n+=1\nprint(s/n)"
LINES_ORJSON = "import orjson,sys;n=s=0;f=orjson.loads\nfor l in open(sys.argv[1],'rb'):s+=f(l);n+=1\nprint(s/n)"
ARRAY_IJSON = (
    "import ijson,sys;n=s=0\nfor v in ijson.items(open(sys.argv[1],'rb'),'item',use_float=True):s+=v;n+=1\nprint(s/n)"
)
ARRAY_ORJSON = "import orjson,sys;a=orjson.loads(open(sys.argv[1],'rb').read());print(sum(a)/len(a))"
DUCK_LINES = (
    "import duckdb,sys;duckdb.sql('set threads=1');"
    "print(duckdb.sql(f\"select avg(x) from read_csv('{sys.argv[1]}',header=false,columns={{'x':'DOUBLE'}})\").fetchone()[0])"
)
DUCK_OBJECTS = (
    "import duckdb,sys;duckdb.sql('set threads=1');"
    "print(duckdb.sql(f\"select avg(price) from read_json('{sys.argv[1]}',format='newline_delimited',"
    "columns={{'price':'DOUBLE'}})\").fetchone()[0])"
)
OBJECTS_ORJSON = (
    "import orjson,sys;n=s=0;f=orjson.loads\nfor l in open(sys.argv[1],'rb'):s+=f(l)['price'];n+=1\nprint(s/n)"
)


def write(path, begin, between, end, record, size):
    count = 0
    with open(path, "w") as file:
        written = file.write(begin)
        while written < size:
            lines = [record() for _ in range(1000)]
            count += len(lines)
            written += file.write((between if count > 1000 else "") + between.join(lines))
        file.write(end)
    return count


def run(command):
    """Seconds of wall time, of processor time, MiB of memory, and the answer."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        sys.exit(f"{command[0]} failed")
    value = json.loads(out)
    answer = value["value"]["mean"] if isinstance(value, dict) else value
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, float(answer)


def main():
    program = binary()
    python = lambda code: [PYTHON, "-c", code]
    own = [program, "stream", "run", "mean", "--json"]
    jq = ["jq", "-n", "reduce inputs as $x ([0,0]; [.[0]+$x,.[1]+1]) | .[0]/.[1]"]
    jq_objects = ["jq", "-n", "reduce inputs as $x ([0,0]; [.[0]+$x.price,.[1]+1]) | .[0]/.[1]"]
    random.seed(1)
    short = lambda: str(random.getrandbits(20))
    long = lambda: repr(random.random())
    thing = lambda: json.dumps({"id": random.getrandbits(24), "name": "customer \"x\"", "price": random.getrandbits(20) / 100, "tags": ["a", "b, c"]})
    with tempfile.TemporaryDirectory() as folder:
        files = [
            ("short numbers, lines", "a.jsonl", ("", "\n", "\n", short), [(own, "Afterimage"), (python(DUCK_LINES), "DuckDB"), (python(LINES_ORJSON), "orjson"), (python(LINES_JSON), "json"), (jq, "jq")]),
            ("long numbers, lines", "b.jsonl", ("", "\n", "\n", long), [(own, "Afterimage"), (python(DUCK_LINES), "DuckDB"), (python(LINES_ORJSON), "orjson"), (jq, "jq")]),
            ("short numbers, one array", "c.json", ("[", ",", "]", short), [(own, "Afterimage"), (python(ARRAY_ORJSON), "orjson, all in memory"), (python(ARRAY_IJSON), "ijson")]),
            ("a member of objects, lines", "d.jsonl", ("", "\n", "\n", thing), [(own + ["--field", "price"], "Afterimage"), (python(DUCK_OBJECTS), "DuckDB"), (python(OBJECTS_ORJSON), "orjson"), (jq_objects, "jq")]),
        ]
        say(machine())
        say()
        rows = []
        for what, name, parts, programs in files:
            path = os.path.join(folder, name)
            begin, between, end, record = parts
            count = write(path, begin, between, end, record, 100 << 20)
            size = os.path.getsize(path)
            best = {}
            for _ in range(ROUNDS):
                for command, label in programs:
                    found = run(command + [path])
                    if label not in best or found[1] < best[label][1]:
                        best[label] = found
            exact = best["Afterimage"][3]
            for _, label in programs:
                seconds, cpu, memory, mean = best[label]
                assert math.isclose(mean, exact, rel_tol=1e-9), (label, mean, exact)
                rows.append((f"{what}: {label}", f"{size / 1e9 / cpu:.3f}", f"{count / 1e6 / cpu:.1f}", f"{memory:.0f}"))
        table(["input and program", "GB per second of CPU", "M records", "memory, MiB"], rows)
    finish("docs/streams.md")


main()
