"""Servers, loads, costs and tables for the Python scripts of this folder.

Needs Python 3.9 only. The environment variable AFTERIMAGE names the binary; without it the release
binary is built. With --commit a script also writes its output into the document that shows it,
between two comments that name the script.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TICKS = os.sysconf("SC_CLK_TCK")

# SIGTERM runs the exit handlers, so the servers end with the script.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def binary():
    if "AFTERIMAGE" not in os.environ:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
    return os.environ.get("AFTERIMAGE", str(ROOT / "target/release/afterimage"))


def machine():
    """A sentence with processor, kernel, commit, date and load."""
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    load = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (f"{model}, {os.cpu_count()} CPUs, Linux {os.uname().release}, commit {commit.strip()}, "
            f"{time.strftime('%Y-%m-%d')}; load average at the start {load:.1f}.")


def describe_machine():
    """The machine as records describe it."""

    def read(path, name):
        lines = [line for line in open(path) if line.startswith(name)]
        return lines[0].split(":", 1)[1].strip() if lines else None

    memory = read("/proc/meminfo", "MemTotal")
    return {
        "cpu": read("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": int(memory.split()[0]) * 1024 if memory else None,
        "kernel": f"linux {os.uname().release}",
        "load_before": os.getloadavg()[0],
    }


def write_record(folder, name, command, machine, figures, text):
    """Writes a record without runs into a new file (schema: bench/schema/record.json)."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    now = time.gmtime()
    record = {
        "format": 1,
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        "command": command,
        "commit": {
            "hash": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        },
        "machine": machine,
        "runs": [],
        "figures": figures,
        "text": text,
    }
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    number, path = 1, None
    while path is None or path.exists():
        suffix = f"-{number}" if number > 1 else ""
        path = pathlib.Path(folder) / f"{time.strftime('%Y-%m-%d', now)}-{name}{suffix}.json"
        number += 1
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"recorded in {path}")
    return path


def free_port():
    """A free port, low enough for the bus port of a Redis cluster, which is 10,000 higher."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port < 55_000:
            return port


class Process:
    """A server process that ends with its `with` block."""

    def __init__(self, command):
        self.command = command
        self.folder = tempfile.mkdtemp(prefix="afterimage-bench-")
        self.start()

    def start(self):
        self.log = open(os.path.join(self.folder, "log"), "ab")
        self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log,
                                      cwd=self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self):
        self.child.kill()
        self.child.wait()

    def end(self):
        self.child.terminate()
        self.child.wait()

    def cpu_s(self):
        """User and system CPU time of all threads so far, in seconds."""
        fields = open(f"/proc/{self.child.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def waits(self):
        """Voluntary context switches of all threads so far."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.child.pid}/task").iterdir():
            for line in open(task / "status"):
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
        return total

    def resident(self):
        """Resident memory in bytes."""
        for line in open(f"/proc/{self.child.pid}/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        return 0


class Service(Process):
    """A service of the afterimage binary, listening on `addr`."""

    def __init__(self, program, *args, listen="127.0.0.1:0"):
        super().__init__([program, *args, "--listen", listen, "--log", "warn"])
        self.ready()

    def ready(self):
        line = self.child.stdout.readline().decode()
        if " listening on " not in line:
            sys.exit(f"{self.command} did not start:\n" + open(os.path.join(self.folder, "log")).read())
        self.addr = line.rsplit(" ", 1)[1].strip()

    def restart(self):
        self.command[self.command.index("--listen") + 1] = self.addr
        self.start()
        self.ready()


class Redis(Process):
    """A redis-server without persistence."""

    def __init__(self, *args):
        self.port = free_port()
        super().__init__(["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                          "--loglevel", "warning", *args])
        self.ready()

    def ready(self):
        self.addr = f"127.0.0.1:{self.port}"
        while self.cli("ping") != "PONG":
            if self.child.poll() is not None:
                sys.exit(f"{self.command} ended: " + self.child.stdout.read().decode())
            time.sleep(0.05)

    def cli(self, *args):
        done = subprocess.run(["redis-cli", "-p", str(self.port), *args], capture_output=True, text=True)
        return done.stdout.strip()

    def info(self, name):
        lines = self.cli("info", "all").splitlines()
        return next(line.split(":")[1] for line in lines if line.startswith(name + ":"))


def load(program, addr, *args):
    """The report of a run of `afterimage bench`, also with failed requests."""
    command = [program, "bench", addr, "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        sys.exit(f"{command} failed: {done.stderr}")
    return json.loads(done.stdout)["runs"][-1]["report"]


def stats(program, addr):
    done = subprocess.run([program, "stats", "--json", "--over", "0s", addr], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["values"]


SAID = []


def say(text=""):
    """Prints a line and keeps it for `finish`."""
    print(text, flush=True)
    SAID.append(text)


def table(head, rows):
    """Prints a table in Markdown, each row as soon as it is known."""
    say("| " + " | ".join(head) + " |")
    say("| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |")
    for row in rows:
        say("| " + " | ".join(str(cell) for cell in row) + " |")
    say()


def finish(document):
    """With --commit: writes the output into `document`."""
    if "--commit" not in sys.argv:
        return
    name = pathlib.Path(sys.argv[0]).stem
    opens, closes = f"<!-- bench/{name} -->\n", f"<!-- end of bench/{name} -->"
    path = ROOT / document
    before, rest = path.read_text("utf-8").split(opens)
    after = rest.split(closes)[1]
    path.write_text(before + opens + "\n" + "\n".join(SAID).rstrip() + "\n\n" + closes + after, "utf-8")


def short(number):
    for size, name in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.3g}"


def us(ns):
    return f"{ns / 1000:.1f} µs"
