"""Servers for the tests of the proxy: a model server, and `afterimage proxy` in front of it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process that listens, and is ended with the test."""

    def __init__(self, command, log, **options):
        self.log = open(log, "w+b")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, **options)

    def wait(self, url, seconds=60):
        """Waits until GET of `url` gives 200."""
        late = time.monotonic() + seconds
        while time.monotonic() < late:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.end()
        raise SystemExit(f"{url} is not ready: {self.text()[-3000:]}")

    def text(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def session():
    """A test: a folder, a function that keeps a server and its address for the end, and the checks.

    Servers are ended in the order in which they depend on each other. After a failure their logs
    are shown.
    """
    folder, started, checks = Path(tempfile.mkdtemp()), [], Checks()

    def keep(server_and_address):
        started.append(server_and_address[0])
        return server_and_address

    try:
        yield folder, keep, checks
        checks.done()
    except BaseException:
        for server in started:
            print(server.text()[-3000:], file=sys.stderr)
        raise
    finally:
        for server in reversed(started):
            server.end()
        shutil.rmtree(folder, ignore_errors=True)


def proxy(program, server_url, folder, *flags, ready="/v2"):
    """Starts the proxy in front of a server; returns it and its address."""
    port = free_port()
    command = [program, "proxy", server_url, "--listen", f"127.0.0.1:{port}", *flags]
    server = Server(command, os.path.join(folder, f"proxy-{port}.log"))
    server.wait(f"http://127.0.0.1:{port}{ready}")
    return server, f"127.0.0.1:{port}"


def post(address, path, body, headers=None):
    """Sends a POST; returns status, headers and body."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data=body, method="POST")
    request.add_header("content-type", "application/json")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    return exchange(request)


def get(address, path):
    return exchange(urllib.request.Request(f"http://{address}{path}"))


def exchange(request):
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


class Checks:
    """Counts checks, and ends the test at the first one that fails."""

    def __init__(self):
        self.count = 0

    def equal(self, found, expected, about):
        self.count += 1
        if found != expected:
            raise AssertionError(f"{about}: found {found!r}, expected {expected!r}")

    def status(self, headers, expected, about):
        """Checks the beginning of `Cache-Status`."""
        found = headers.get("cache-status") or ""
        self.count += 1
        if not found.startswith(f"afterimage; {expected}"):
            raise AssertionError(f"{about}: Cache-Status is {found!r}, expected {expected!r}")

    def done(self):
        print(f"{self.count} checks passed")
        sys.stdout.flush()
