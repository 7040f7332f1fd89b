"""The client against the golden vectors and the example in PROTOCOL.md."""

import re
import struct
import unittest

import afterimage
from afterimage import Malformed, protocol
from afterimage.protocol import HEADER

from .support import WIRE, Server, answers_to, reply, talking, vectors

REPLIES = {"Welcome", "Pong", "StatsResp", "SnapshotResp", "Error", "GoAway", "CacheResp", "ClassifyResp", "Unknown",
           "BytesResp", "InferResp", "ForgetResp", "FlushResp"}


def fields(message, result):
    """The content of a reply in the form of the vectors."""
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
    if message == "BytesResp":
        return {"value": None if result is None else result.hex()}
    if message == "InferResp":
        def content(value):
            return {"label": value} if isinstance(value, int) else {"bytes": value.hex()}
        return {"digest": result.digest.hex(),
                "answers": [{"origin": a.origin, "age_s": a.age_s, **content(a.value)} for a in result.answers]}
    if message == "ForgetResp":
        return {"count": str(result)}
    if message == "FlushResp":
        return {}
    if message == "SnapshotResp":
        return {k: v if k == "joined" else str(v) for k, v in result._asdict().items()}
    return result._asdict()


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
                result = protocol.decode(kind, flags, status, data[16:])
                if vector["message"] == "Unknown":
                    self.assertIsNone(result)
                else:
                    self.assertEqual(fields(vector["message"], result), vector["fields"])
        self.assertEqual(seen, REPLIES)

    def test_every_malformed_reply_raises(self):
        seen = 0
        for name, vector, data in vectors("invalid"):
            if vector["error"] in ("need_more", "frame_too_large"):
                continue
            _, kind, flags, status, _ = HEADER.unpack_from(data)
            if kind in (0x02, 0x04, 0x06, 0x07, 0x08, 0x0A, 0x11, 0x13, 0x21, 0x23, 0x31, 0x33):
                seen += 1
                with self.subTest(name, comment=vector["comment"]), self.assertRaises(Malformed):
                    protocol.decode(kind, flags, status, data[16:])
        self.assertGreater(seen, 40)

    def test_every_request_is_sent_byte_for_byte(self):
        answers = {
            0x03: lambda f: reply(0x04, f[3], f[4]), 0x05: lambda f: reply(0x06, f[3]),
            0x09: lambda f: reply(0x0A, f[3], bytes(24)),
            0x10: lambda f: b"" if f[1] else reply(0x11, f[3]), 0x20: lambda f: reply(0x21, f[3], b"\0\0"),
            0x12: lambda f: reply(0x13, f[3]), 0x30: lambda f: reply(0x31, f[3], bytes(8)),
            0x32: lambda f: reply(0x33, f[3]),
            0x22: answers_to,
        }
        calls = {
            "Ping": lambda c, f: c.ping(bytes.fromhex(f["bytes"])),
            "StatsReq": lambda c, f: c.stats(),
            "SnapshotReq": lambda c, f: c.snapshot(),
            "CacheReq": lambda c, f: c.set(int(f["key"]), int(f["value"])) if f["write"]
            else c.get(int(f["key"]), f["budget_ms"]),
            "BytesReq": lambda c, f: c.write_bytes(bytes.fromhex(f["key"]), bytes.fromhex(f["value"]), f["ttl_s"])
            if f["write"] else c.read_bytes(bytes.fromhex(f["key"]), f["budget_ms"]),
            "InferReq": lambda c, f: c.infer(
                f["model"], map(bytes.fromhex, f["rows"]), version=f["version"], refresh=f["refresh"],
                no_store=f["no_store"], ttl_s=f["ttl_s"], budget_ms=f["budget_ms"]),
            "ForgetReq": lambda c, f: c.forget(f["model"], bytes.fromhex(f["row"]), f["version"]),
            "FlushReq": lambda c, f: c.flush(f["model"]),
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
                client._next_id = int(vector["header"]["id"])
                calls[vector["message"]](client, vector["fields"])
        for (vector, data), sent in zip(wanted, received):
            self.assertEqual(sent, data, vector["comment"])

    def test_a_hello_is_sent_byte_for_byte(self):
        for name, vector, data in vectors("valid"):
            if name in ("hello", "hello_with_token", "hello_longest_token"):
                with Server(lambda server: None) as server:
                    afterimage.Client("127.0.0.1", server.port, bytes.fromhex(vector["fields"]["token"])).close()
                self.assertEqual(server.hello[:3] + server.hello[4:5], (1, 0, 0, data[16:]), name)


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
