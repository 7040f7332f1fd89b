"""The client against the golden vectors, and against a server that is scripted here.

    python3 -m unittest                        # in this folder
    AFTERIMAGE_MEMO=localhost:7400 python3 -m unittest      # and against a memo or classifier that runs
    AFTERIMAGE_TLS=localhost:7400 AFTERIMAGE_CA=ca.pem python3 -m unittest      # and one that speaks TLS
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import ssl
import struct
import threading
import unittest

import afterimage
from afterimage import HEADER, Failed, Label, Lost, Malformed

WIRE = pathlib.Path(__file__).resolve().parents[2]
REPLIES = {"Welcome", "Pong", "StatsResp", "SnapshotResp", "Error", "GoAway", "CacheResp", "ClassifyResp", "Unknown"}


def vectors(table):
    for line in (WIRE / f"vectors/{table}.jsonl").read_text("utf-8").splitlines():
        vector = json.loads(line)
        yield vector["name"], vector, bytes.fromhex(vector["hex"])


WELCOME = next(data for name, _, data in vectors("valid") if name == "welcome_memo")


def reply(kind, request_id, body=b"", flags=0, status=0):
    return HEADER.pack(len(body), kind, flags, status, request_id) + body


def fields(message, result):
    """What `decode` gave, as the vectors write it."""
    if message == "Welcome":
        return {**result._asdict(), "digest": result.digest.hex(), "shape": list(result.shape)}
    if message == "Pong":
        return {"bytes": result.hex()}
    if message == "StatsResp":
        def value(kind, given):
            if kind == 4:
                return [[str(bound), str(count)] for bound, count in given]
            return str(given) if kind in (1, 2) else given if kind == 3 else given.hex()
        return {"entries": [{"name": n, "type": t, "value": value(t, v)} for n, t, v in result]}
    if message == "Error":
        return {"text": result.text, "connection": result.connection}
    if message == "GoAway":
        return {"text": result}
    if message == "CacheResp":
        return {"value": None if result is None else str(result)}
    if message == "SnapshotResp":
        return {k: v if k == "joined" else str(v) for k, v in result._asdict().items()}
    return result._asdict()


class Server:
    """A listener whose one connection is served by `script(server)` on a thread."""

    def __init__(self, script, welcome=WELCOME):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.script, self.welcome, self.error, self.hello = script, welcome, None, None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.socket, _ = self.listener.accept()
            self.socket.settimeout(10)
            with self.socket:
                self.hello = self.take()
                self.send(self.welcome)
                self.script(self)
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
        self.thread.join(10)
        self.listener.close()
        if kind is None and self.error is not None:
            raise self.error


@contextlib.contextmanager
def talking(script, welcome=WELCOME, **options):
    with Server(script, welcome) as server:
        with afterimage.Client("127.0.0.1", server.port, **options) as client:
            yield client


class Vectors(unittest.TestCase):
    def test_every_reply_decodes_to_its_fields(self):
        seen = set()
        for name, vector, data in vectors("valid"):
            if vector["message"] not in REPLIES:
                continue
            with self.subTest(name, comment=vector["comment"]):
                seen.add(vector["message"])
                length, kind, flags, status, request_id = HEADER.unpack_from(data)
                header = {"body_len": length, "kind": kind, "flags": flags, "status": status, "id": str(request_id)}
                self.assertEqual(header, vector["header"])
                result = afterimage.decode(kind, flags, status, data[16:])
                if vector["message"] == "Unknown":
                    self.assertIsNone(result)
                else:
                    self.assertEqual(fields(vector["message"], result), vector["fields"])
        self.assertEqual(seen, REPLIES)

    def test_every_malformed_reply_is_refused(self):
        seen = 0
        for name, vector, data in vectors("invalid"):
            if vector["error"] in ("need_more", "frame_too_large"):
                continue
            _, kind, flags, status, _ = HEADER.unpack_from(data)
            if kind in (0x02, 0x04, 0x06, 0x07, 0x08, 0x0A, 0x11, 0x21):
                seen += 1
                with self.subTest(name, comment=vector["comment"]), self.assertRaises(Malformed):
                    afterimage.decode(kind, flags, status, data[16:])
        self.assertGreater(seen, 40)

    def test_every_request_is_sent_byte_for_byte(self):
        answers = {
            0x03: lambda f: reply(0x04, f[3], f[4]), 0x05: lambda f: reply(0x06, f[3]),
            0x09: lambda f: reply(0x0A, f[3], bytes(24)),
            0x10: lambda f: b"" if f[1] else reply(0x11, f[3]), 0x20: lambda f: reply(0x21, f[3], b"\0\0"),
        }
        calls = {
            "Ping": lambda c, f: c.ping(bytes.fromhex(f["bytes"])),
            "StatsReq": lambda c, f: c.stats(),
            "SnapshotReq": lambda c, f: c.snapshot(),
            "CacheReq": lambda c, f: c.set(int(f["key"]), int(f["value"])) if f["write"]
            else c.get(int(f["key"]), f["budget_ms"]),
            "ClassifyReq": lambda c, f: c.classify(bytes.fromhex(f["image"]), f["budget_ms"]),
        }
        wanted = [(v, d) for _, v, d in vectors("valid") if v["canonical"] and v["message"] in calls]
        self.assertGreater(len(wanted), 15)
        received = []

        def script(server):
            for _ in wanted:
                frame = server.take()
                received.append(frame[5])
                server.send(answers[frame[0]](frame))

        with talking(script) as client:
            for vector, _ in wanted:
                client.next_id = int(vector["header"]["id"])
                calls[vector["message"]](client, vector["fields"])
        for (vector, data), sent in zip(wanted, received):
            self.assertEqual(sent, data, vector["comment"])

    def test_a_hello_is_sent_byte_for_byte(self):
        for name, vector, data in vectors("valid"):
            if name in ("hello", "hello_with_token", "hello_longest_token"):
                with Server(lambda server: None) as server:
                    afterimage.Client("127.0.0.1", server.port, bytes.fromhex(vector["fields"]["token"])).close()
                self.assertEqual(server.hello[:3] + server.hello[4:5], (1, 0, 0, data[16:]), name)


class Sessions(unittest.TestCase):
    def test_tells_what_the_welcome_says(self):
        with talking(lambda server: None) as client:
            self.assertEqual((client.welcome.service, client.welcome.shape, client.welcome.classes), (1, (28, 28), 10))

    def test_replies_in_reverse_order_find_their_images(self):
        images = [struct.pack("<H", i) for i in range(1000)]

        def script(server):
            asked = [server.take() for _ in images]
            server.send(*(reply(0x21, f[3], f[4], f[4][0] & 1) for f in reversed(asked)))

        with talking(script) as client:
            labels = client.classify_many(iter(images))
        self.assertEqual(labels, [Label(i, "hit" if i & 1 else "miss") for i in range(1000)])

    def test_no_more_than_a_window_is_in_flight(self):
        def script(server):
            for _ in range(5):
                asked = [server.take() for _ in range(2)]
                server.socket.settimeout(0.05)
                with self.assertRaises(TimeoutError):
                    server.take()
                server.socket.settimeout(10)
                server.send(*(reply(0x21, f[3], b"\1\0") for f in asked))

        small = bytearray(WELCOME)
        struct.pack_into("<I", small, 16 + 20, 2)
        with talking(script, bytes(small)) as client:
            self.assertEqual(len(client.classify_many([b"x"] * 10)), 10)

    def test_reads_while_it_writes(self):
        # More than all buffers on the way can hold, in both directions, from a server that reads
        # nothing while its replies are not taken.
        count, image = 20_000, bytes(784)

        def script(server):
            for _ in range(count):
                server.send(reply(0x07, server.take()[3], b"x" * 1000, 0, 5))

        with talking(script) as client:
            results = client.classify_many([image] * count, return_exceptions=True)
        self.assertEqual({(r.name, r.retryable, len(r.text)) for r in results}, {("overloaded", True, 1000)})

    def test_replies_that_come_byte_by_byte_are_put_together(self):
        def script(server):
            server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in reply(0x04, server.take()[3], b"abc"):
                server.send(bytes([byte]))

        with talking(script) as client:
            self.assertGreaterEqual(client.ping(b"abc"), 0)

    def test_a_write_needs_no_reply_and_its_error_is_dropped(self):
        def script(server):
            write, read = server.take(), server.take()
            server.send(reply(0x07, write[3], b"no", 0, 4), reply(0x99, read[3]), reply(0x11, read[3], b"\xff" * 8, 1))

        with talking(script) as client:
            client.set(2**64 - 1, -1)
            self.assertEqual(client.get(2**64 - 1), -1)
            self.assertEqual(client.dropped, 2)

    def test_an_error_fails_its_request_and_the_connection_goes_on(self):
        def script(server):
            server.send(reply(0x07, server.take()[3], "wrong size".encode(), 0, 4))
            server.send(reply(0x11, server.take()[3]))
            server.send(reply(0x07, server.take()[3], b"", 0, 999))

        with talking(script) as client:
            with self.assertRaises(Failed) as caught:
                client.classify(b"")
            self.assertEqual((caught.exception.name, caught.exception.retryable), ("bad_argument", False))
            self.assertIsNone(client.get(1))
            with self.assertRaises(Failed) as caught:
                client.get(2)
            self.assertEqual((caught.exception.status, caught.exception.retryable), (999, False))

    def test_a_refused_hello_raises_what_the_server_said(self):
        refusal = reply(0x07, 0, b"the token is wrong", 1, 7)
        with Server(lambda server: None, refusal) as server, self.assertRaises(Failed) as caught:
            afterimage.Client("127.0.0.1", server.port, b"guess")
        self.assertEqual((caught.exception.name, caught.exception.connection), ("unauthenticated", True))

    def test_another_version_or_another_protocol_is_refused(self):
        other = bytearray(WELCOME)
        other[16 + 8] = 2
        for welcome in (bytes(other), b"HTTP/1.1 400 Bad Request\r\n\r\n"):
            with Server(lambda server: None, welcome) as server, self.assertRaises(Malformed):
                afterimage.Client("127.0.0.1", server.port)

    def test_a_connection_that_ends_is_lost_and_worth_a_retry(self):
        def script(server):
            frame = server.take()
            server.send(reply(0x08, 0, b"restarting", 0, 10), reply(0x21, frame[3], b"\3\0"))
            server.take()

        with talking(script) as client:
            self.assertEqual(client.classify(b"x").label, 3)
            self.assertTrue(client.going_away)
            for _ in range(2):
                with self.assertRaises(Lost) as caught:
                    client.classify(b"x")
                self.assertTrue(caught.exception.retryable)

    def test_a_silent_server_times_out(self):
        with talking(lambda server: server.take() and server.socket.recv(1), timeout=0.1) as client:
            with self.assertRaises(Lost):
                client.ping()

    def test_senseless_replies_are_refused(self):
        for answer in (
            lambda f: reply(0x11, f[3]), lambda f: reply(0x21, f[3], b"\1"), lambda f: reply(0x21, f[3], b"\1\0\0"),
            lambda f: HEADER.pack((1 << 20) + 1, 0x21, 0, 0, f[3]), lambda f: reply(0x21, f[3] + 1, b"\1\0"),
        ):
            with talking(lambda server: server.send(answer(server.take()))) as client:
                with self.assertRaises(Malformed):
                    client.classify(b"x")

    def test_stats_are_read_by_name(self):
        data = next(d for name, _, d in vectors("valid") if name == "stats_resp_same_name_twice")
        with talking(lambda server: server.send(reply(0x06, server.take()[3], data[16:]))) as client:
            self.assertEqual(client.stats(), {"hits": 1})


class Document(unittest.TestCase):
    def test_the_client_in_the_document_runs(self):
        text = (WIRE / "PROTOCOL.md").read_text("utf-8")
        source, = re.findall(r"```python\n(.*?)```", text, re.S)
        self.assertLess(len(source.splitlines()), 60)
        module = {}
        exec(source, module)

        def script(server):
            server.send(reply(0x21, server.take()[3], b"\7\0", 1))
            write, read = server.take(), server.take()
            self.assertEqual((write[1], write[4]), (1, struct.pack("<Qq", 5, -6)))
            server.send(reply(0x08, 0, b"soon", 0, 10), reply(0x11, read[3], struct.pack("<q", -6), 1))
            server.send(reply(0x07, server.take()[3], b"too small", 0, 4))

        with Server(script) as server:
            client = module["Afterimage"]("127.0.0.1", server.port, b"secret")
            self.assertEqual((client.service, client.classify(bytes(784))), (1, 7))
            client.set(5, -6)
            self.assertEqual(client.get(5), -6)
            with self.assertRaisesRegex(RuntimeError, "status 4: too small"):
                client.classify(b"")
            client.socket.close()


@unittest.skipUnless("AFTERIMAGE_TLS" in os.environ, "AFTERIMAGE_TLS=localhost:port names one with TLS, and "
                     "AFTERIMAGE_CA=FILE the authority of its certificate")
class Tls(unittest.TestCase):
    def connect(self, context):
        host, port = os.environ["AFTERIMAGE_TLS"].rsplit(":", 1)
        return afterimage.Client(host, int(port), ssl=context)

    def test_a_server_with_a_certificate_answers(self):
        context = ssl.create_default_context(cafile=os.environ["AFTERIMAGE_CA"])
        context.set_alpn_protocols(["afterimage"])
        with self.connect(context) as client:
            self.assertEqual(client.socket.version(), "TLSv1.3")
            # More than all buffers on the way hold, in both directions.
            images = [struct.pack("<I", i) + bytes(780) for i in range(10_000)]
            self.assertEqual([r.label for r in client.classify_many(images)], [i % 256 % 10 for i in range(10_000)])

    def test_a_server_whose_authority_nobody_trusts_is_refused(self):
        with self.assertRaises(ssl.SSLCertVerificationError):
            self.connect(ssl.create_default_context())


@unittest.skipUnless("AFTERIMAGE_MEMO" in os.environ, "AFTERIMAGE_MEMO=host:port names a running memo or classifier")
class Live(unittest.TestCase):
    def test_a_running_server_answers(self):
        host, port = os.environ["AFTERIMAGE_MEMO"].rsplit(":", 1)
        with afterimage.Client(host, int(port), os.environ.get("AFTERIMAGE_TOKEN", "").encode()) as client:
            client.ping(bytes(64))
            size = 1
            for extent in client.welcome.shape:
                size *= extent
            images = [bytes((i * 7 + j) % 256 for j in range(size)) for i in range(20)] * 50
            first = [label.label for label in client.classify_many(images)]
            self.assertEqual(first, [label.label for label in client.classify_many(images)])
            self.assertEqual(first[0], client.classify(images[0]).label)
            with self.assertRaises(Failed):
                client.classify(bytes(size + 1))
            self.assertTrue(client.stats())


if __name__ == "__main__":
    unittest.main()
