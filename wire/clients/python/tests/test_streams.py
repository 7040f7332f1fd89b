"""Streams: the rules against golden vectors and a scripted server, and both clients against a
running server.

The running server has the streams `echo`, `count` (progress, then the number of bytes), `pour` (as
many bytes as the header says) and `idle` (never reads, never writes).
"""

import asyncio
import os
import struct
import unittest

import afterimage
from afterimage import Failed, Lost, Malformed, aio, protocol
from afterimage.protocol import HEADER, Frame
from afterimage.stream import FIRST_CREDIT, WINDOW, Flow, Flows, open_body

from .support import Server, label, reply, talking, vectors

OPEN, DATA, CREDIT, PROGRESS, RESET = range(0x40, 0x45)
LIVE = unittest.skipUnless("TEST_STREAMS" in os.environ, "set TEST_STREAMS=HOST:PORT to a server with test streams")


def address():
    host, port = os.environ["TEST_STREAMS"].rsplit(":", 1)
    return host, int(port), os.environ.get("TEST_TOKEN", "").encode()


def received(kind, data=b"", flags=0, status=0, stream_id=1):
    return Frame(kind, stream_id, protocol.decode(kind, flags, status, data))


def pattern(length):
    return (bytes(range(251)) * (length // 251 + 1))[:length]


class Vectors(unittest.TestCase):
    def test_frames_of_the_server_have_their_effect(self):
        seen = set()
        for name, vector, data in vectors("valid"):
            message, fields = vector["message"], vector["fields"]
            if message not in ("StreamData", "StreamCredit", "StreamProgress", "StreamReset"):
                continue
            seen.add(message)
            _, kind, flags, status, stream_id = HEADER.unpack_from(data)
            flow = Flow(stream_id, 1 << 20)
            with self.subTest(name):
                self.assertEqual(flow.receive(received(kind, data[16:], flags, status, stream_id)), b"")
                if message == "StreamData":
                    self.assertEqual((flow.read() or b"").hex(), fields["bytes"])
                    self.assertEqual(flow.has_ended, fields["end"])
                elif message == "StreamCredit":
                    self.assertEqual(flow.credit, max(int(fields["credit"]), FIRST_CREDIT))
                elif message == "StreamProgress":
                    self.assertEqual(flow.take_progress().hex(), fields["bytes"])
                else:
                    self.assertEqual((flow.error.status, flow.error.text), (status, fields["text"]))
        self.assertEqual(len(seen), 4)

    def test_bad_frames_end_the_stream_with_a_reset(self):
        seen = 0
        for name, vector, data in vectors("invalid"):
            if vector["error"] in ("need_more", "frame_too_large"):
                continue
            _, kind, flags, status, stream_id = HEADER.unpack_from(data)
            if kind not in (DATA, CREDIT, PROGRESS, RESET):
                continue
            seen += 1
            flow = Flow(stream_id, 1 << 20)
            with self.subTest(name):
                answer = flow.receive(received(kind, data[16:], flags, status, stream_id))
                self.assertEqual(answer[4], RESET)
                name = protocol.STATUSES[HEADER.unpack_from(answer)[3]]
                self.assertEqual(f"reset {name}", vector["answer"])
                self.assertIsInstance(flow.error, Malformed)
        self.assertGreater(seen, 8)

    def test_frames_of_the_client_equal_the_vectors(self):
        by_name = {name: data for name, _, data in vectors("valid")}
        self.assertEqual(protocol.frame(OPEN, 0, 0, 1, open_body("fold/mean", b"{}")), by_name["stream_open"])
        flow = Flow(1, 1 << 20)
        self.assertEqual(flow.data(b"some bytes"), by_name["stream_data"])
        self.assertEqual(flow.report(b"\7\0"), by_name["stream_progress"])
        self.assertEqual(flow.finish(), by_name["stream_data_end_alone"])
        self.assertEqual(flow.cancel(), by_name["stream_reset_cancel"])


class Rules(unittest.TestCase):
    def test_more_bytes_than_the_credit_are_refused(self):
        flow = Flow(1, 1 << 20)
        for _ in range(WINDOW >> 16):
            self.assertEqual(flow.receive(received(DATA, bytes(1 << 16))), b"")
        answer = flow.receive(received(DATA, b"x"))
        self.assertEqual((answer[4], HEADER.unpack_from(answer)[3]), (RESET, 4))

    def test_data_after_the_end_are_refused(self):
        flow = Flow(1, 1 << 20)
        flow.receive(received(DATA, b"last", 1))
        self.assertEqual(flow.receive(received(DATA, b""))[4], RESET)
        self.assertEqual(flow.read(), b"last")

    def test_a_credit_follows_the_reader(self):
        flow = Flow(1, 1 << 20)
        credits = []
        for _ in range(8):
            flow.receive(received(DATA, bytes(1 << 16)))
            self.assertEqual(len(flow.read()), 1 << 16)
            if credit := flow.release():
                credits.append(struct.unpack_from("<Q", credit, 16)[0])
        self.assertEqual(credits, [WINDOW + (n << 16) for n in (2, 4, 6, 8)])

    def test_a_lower_credit_changes_nothing(self):
        flow = Flow(1, 100)
        self.assertEqual(flow.room(), 100)
        flow.receive(received(CREDIT, struct.pack("<Q", 5)))
        self.assertEqual(flow.credit, FIRST_CREDIT)
        flow.receive(received(CREDIT, struct.pack("<Q", (1 << 64) - 1)))
        self.assertEqual(flow.credit, (1 << 64) - 1)

    def test_late_frames_are_dropped_and_unknown_ones_refused(self):
        flows = Flows()
        flow = flows.open(5, 1 << 20)
        flow.cancel()
        flows.settle(flow)
        self.assertEqual(flows.receive(received(DATA, b"late", stream_id=5)), b"")
        with self.assertRaisesRegex(Malformed, "6, which was never opened"):
            flows.receive(received(DATA, b"", stream_id=6))


def answering(server):
    """Refuses the stream `no`, answers images, and echoes all other streams without giving
    credit."""
    try:
        while True:
            kind, flags, _, request_id, body, _ = frame = server.take()
            if kind == 0x20:
                server.send(label(frame, body[0]))
            elif kind == OPEN and body[9:11] == b"no":
                server.send(reply(RESET, request_id, b"no such stream", 0, 9))
            elif kind == DATA:
                server.send(reply(DATA, request_id, body, flags))
    except EOFError:
        pass


class Scripted(unittest.TestCase):
    def test_a_refusal_is_a_failed_stream(self):
        with talking(answering) as client:
            stream = client.open("no")
            with self.assertRaisesRegex(Failed, "unsupported: no such stream"):
                stream.read()
            self.assertEqual(client.classify(b"\5" * 784).label, 5)
            self.assertEqual(client.connects, 1)

    def test_a_write_without_credit_is_lost_and_the_client_stays(self):
        with talking(answering, timeout=0.2) as client:
            with client.open("echo") as stream:
                with self.assertRaises(Lost):
                    stream.write(bytes(FIRST_CREDIT + 1))
                self.assertEqual(client.classify(b"\6" * 784).label, 6)
                self.assertEqual(stream.read(), bytes(FIRST_CREDIT))
            self.assertEqual(client.connects, 1)

    def test_streams_end_with_their_connection(self):
        def close(server):
            server.take()

        with talking(close, answering) as client:
            stream = client.open("echo")
            with self.assertRaises(Lost):
                stream.read()
            with self.assertRaises(Lost):
                stream.write(b"x")
            self.assertEqual(client.classify(b"\7" * 784).label, 7)
            with client.open("echo") as second:
                second.write(b"abc")
                self.assertEqual(second.read(), b"abc")
                with self.assertRaises(Lost):
                    stream.write(b"x")

    def test_a_server_of_version_1_has_no_streams(self):
        old = next(data for name, _, data in vectors("valid") if name == "welcome_memo")
        old = old[:24] + b"\1\0" + old[26:]
        with talking(answering, welcome=old) as client:
            with self.assertRaises(afterimage.Unsupported):
                client.open("echo")

    def test_a_bad_argument_leaves_the_stream_open(self):
        with talking(answering) as client, client.open("echo") as stream:
            for call in (lambda: client.open("x" * 256), lambda: client.open("x", bytes(65537)),
                         lambda: stream.progress(bytes(1025))):
                with self.assertRaises(ValueError):
                    call()
            with self.assertRaises(TypeError):
                stream.write("text")
            stream.write(b"still open")
            self.assertEqual(stream.read(), b"still open")
            stream.finish()
            with self.assertRaisesRegex(ValueError, "after finish"):
                stream.write(b"x")
            self.assertEqual(list(stream), [])

    def test_the_asyncio_stream_keeps_the_rules(self):
        async def main(port):
            async with await aio.connect("127.0.0.1", port, timeout=0.2) as client:
                refused = await client.open("no")
                with self.assertRaisesRegex(Failed, "no such stream"):
                    await refused.read()
                async with await client.open("echo") as stream:
                    with self.assertRaises(Lost):
                        await stream.write(bytes(FIRST_CREDIT + 1))
                    self.assertEqual(await stream.read(), bytes(FIRST_CREDIT))
                    with self.assertRaises(TypeError):
                        await stream.write("text")
                    reading = asyncio.ensure_future(stream.read(10))
                    await asyncio.sleep(0)
                    await stream.cancel()
                    with self.assertRaisesRegex(Lost, "cancelled"):
                        await reading
                self.assertEqual((await client.classify(b"\3" * 784)).label, 3)
                self.assertEqual((client.connects, client._link.changes, client._link.flows.by_id), (1, {}, {}))

        with Server(answering) as server:
            asyncio.run(main(server.port))


@LIVE
class Live(unittest.TestCase):
    LENGTHS = [0, 1, 4095, 4096, 4097, 65_536, 65_537, 3_000_000]

    def test_an_echo_returns_the_same_bytes(self):
        with afterimage.Client(*address()) as client:
            for length in self.LENGTHS:
                sent = pattern(length)
                with client.open("echo") as stream:
                    self.assertEqual(b"".join(stream.exchange([sent])), sent)
            with client.open("echo") as stream:
                numbers = (struct.pack("<I", n) for n in range(5000))
                back = b"".join(stream.exchange(numbers))
            self.assertEqual([n for n, in struct.iter_unpack("<I", back)], list(range(5000)))
            self.assertEqual(client.connects, 1)

    def test_requests_go_on_beside_a_stream(self):
        with afterimage.Client(*address()) as client:
            with client.open("pour", b"2000000") as stream:
                first = stream.read()
                self.assertEqual(client.classify(bytes([8]) * 784).label, 8)
                rest = b"".join(stream)
                self.assertEqual(first + rest, pattern_of_pour(2_000_000))

    def test_progress_arrives_and_a_count_is_right(self):
        with afterimage.Client(*address()) as client, client.open("count") as stream:
            stream.write(bytes(1000))
            self.assertEqual(stream.read_progress(), b"1000")
            stream.write(bytearray(1_000_000))
            stream.finish()
            self.assertEqual(b"".join(stream), b"1001000")
            while stream.read_progress() is not None:
                pass

    def test_a_cancelled_stream_frees_the_connection(self):
        with afterimage.Client(*address(), timeout=20) as client:
            for _ in range(50):
                with client.open("pour", b"100000000") as stream:
                    self.assertTrue(stream.read())
            idle = client.open("idle")
            with self.assertRaises(Lost):
                idle.read(timeout=0.05)
            idle.cancel()
            with self.assertRaisesRegex(Failed, "there is no stream"):
                client.open("unknown").read()
            self.assertEqual(client.classify(bytes([3]) * 784).label, 3)
            self.assertEqual(client.connects, 1)

    def test_asyncio_streams_share_a_connection(self):
        async def main():
            async def one(client, length):
                async with await client.open("echo") as stream:
                    received = [chunk async for chunk in stream.exchange([pattern(length)])]
                return b"".join(received) == pattern(length)

            async def counted(client):
                async with await client.open("count") as stream:
                    await stream.write(bytes(1000))
                    progress = await stream.read_progress()
                    await stream.write(bytes(500_000))
                    await stream.finish()
                    return progress, b"".join([chunk async for chunk in stream])

            async with await aio.connect(*address(), timeout=60) as client:
                calls = [one(client, length) for length in self.LENGTHS * 5]
                images = client.classify_many(bytes([i % 10]) * 784 for i in range(300))
                *right, labels, count = await asyncio.gather(*calls, images, counted(client))
                self.assertEqual(right, [True] * len(calls))
                self.assertEqual([label.label for label in labels], [i % 10 for i in range(300)])
                self.assertEqual(count, (b"1000", b"501000"))
                with self.assertRaises(Failed):
                    await (await client.open("unknown")).read()
                self.assertEqual(client.connects, 1)

        asyncio.run(main())


def pattern_of_pour(length):
    """The bytes of `pour`: chunks of 256 KiB that each start the pattern again."""
    return (pattern(256 << 10) * (length // (256 << 10) + 1))[:length]
