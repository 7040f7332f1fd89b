"""A scripted server and the golden vectors."""

import contextlib
import json
import pathlib
import socket
import struct
import threading

import afterimage
from afterimage.protocol import HEADER

WIRE = pathlib.Path(__file__).resolve().parents[3]


def vectors(table):
    for line in (WIRE / f"vectors/{table}.jsonl").read_text("utf-8").splitlines():
        vector = json.loads(line)
        yield vector["name"], vector, bytes.fromhex(vector["hex"])


WELCOME = next(data for name, _, data in vectors("valid") if name == "welcome_memo")


def reply(kind, request_id, body=b"", flags=0, status=0):
    return HEADER.pack(len(body), kind, flags, status, request_id) + body


def label(frame, value=3, flags=0):
    """A ClassifyResp to the received `frame`."""
    return reply(0x21, frame[3], bytes([value, 0]), flags)


def answers_to(frame):
    """An InferResp to the received `frame`: label 0 for each row."""
    body = frame[4]
    version_at = 1 + body[0]
    count, = struct.unpack_from("<I", body, version_at + 1 + body[version_at] + 8)
    return reply(0x23, frame[3], bytes(32) + struct.pack("<I", count) + bytes(8) * count)


GO_AWAY = reply(0x08, 0, b"restarting", 0, 10)


class Server:
    """A listener on a thread. It serves one connection after the other, each with the next
    script."""

    def __init__(self, *scripts, welcome=WELCOME):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.port = self.listener.getsockname()[1]
        self.scripts, self.welcome, self.error, self.hello = scripts, welcome, None, None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            for script in self.scripts:
                self.socket, _ = self.listener.accept()
                self.socket.settimeout(10)
                with self.socket:
                    self.hello = self.take()
                    self.send(self.welcome)
                    script(self)
        except BaseException as error:
            self.error = error

    def read(self, length):
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def take(self):
        """The next frame: kind, flags, status, id, body and all its bytes."""
        header = self.read(16)
        length, kind, flags, status, request_id = HEADER.unpack(header)
        body = self.read(length)
        return kind, flags, status, request_id, body, header + body

    def send(self, *frames):
        self.socket.sendall(b"".join(frames))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.thread.join(15)
        self.listener.close()
        if kind is None and self.error is not None:
            raise self.error


@contextlib.contextmanager
def talking(*scripts, welcome=WELCOME, **options):
    with Server(*scripts, welcome=welcome) as server:
        with afterimage.Client("127.0.0.1", server.port, **options) as client:
            yield client
