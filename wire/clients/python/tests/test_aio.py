"""The asyncio client against a scripted server, and against a live one."""

import asyncio
import os
import unittest

import afterimage
from afterimage import aio

from . import support


def serving(*scripts):
    return support.Server(*scripts)


def echo(server):
    """Answers each image with its first byte until the client closes."""
    try:
        while True:
            frame = server.take()
            server.send(support.label(frame, frame[4][0]))
    except EOFError:
        pass


class Aio(unittest.TestCase):
    def test_tasks_share_one_connection(self):
        async def main(port):
            async with await aio.connect("127.0.0.1", port) as client:
                labels = await asyncio.gather(*(client.classify(bytes([i]) * 784) for i in range(50)))
                self.assertEqual([label.label for label in labels], list(range(50)))
                many = await client.classify_many(bytes([i % 7]) * 784 for i in range(3000))
                self.assertEqual([label.label for label in many], [i % 7 for i in range(3000)])
                self.assertEqual(client.connects, 1)

        with serving(echo) as server:
            asyncio.run(main(server.port))

    def test_replies_in_any_order_and_one_failure_fails_one_call(self):
        def script(server):
            first, second, third = server.take(), server.take(), server.take()
            server.send(support.label(third, 3), support.reply(0x07, second[3], b"busy", 0, 5), support.label(first, 1))

        async def main(port):
            async with await aio.connect("127.0.0.1", port) as client:
                results = await asyncio.gather(*(client.classify(bytes(784)) for _ in range(3)), return_exceptions=True)
            self.assertEqual((results[0].label, results[2].label), (1, 3))
            self.assertEqual((results[1].name, results[1].retryable), ("overloaded", True))

        with serving(script) as server:
            asyncio.run(main(server.port))

    def test_a_lost_request_is_repeated_on_a_new_connection(self):
        def close(server):
            server.take()

        async def main(port):
            async with await aio.connect("127.0.0.1", port) as client:
                self.assertEqual((await client.classify(bytes([9]) * 784)).label, 9)
                self.assertEqual(client.connects, 2)

        with serving(close, echo) as server:
            asyncio.run(main(server.port))

    def test_a_client_is_open_after_a_bad_argument_and_a_timeout(self):
        def script(server):
            server.take()  # It is never answered.
            echo(server)

        async def main(port):
            async with await aio.connect("127.0.0.1", port, timeout=0.2) as client:
                with self.assertRaises(TypeError):
                    await client.classify("text")
                with self.assertRaises(afterimage.Lost):
                    await client.classify(bytes(784))
                self.assertEqual((await client.classify(bytes([4]) * 784)).label, 4)
                self.assertEqual(client.connects, 1)
            with self.assertRaises(afterimage.Lost):
                await client.classify(bytes(784))

        with serving(script) as server:
            asyncio.run(main(server.port))

    def test_infer_answers_each_row(self):
        def script(server):
            server.send(support.answers_to(server.take()))
            echo(server)

        async def main(port):
            async with await aio.connect("127.0.0.1", port) as client:
                inference = await client.infer("m", [b"row", bytearray(b"other"), memoryview(b"")])
                self.assertEqual([answer.value for answer in inference.answers], [0, 0, 0])
                with self.assertRaises(ValueError):
                    await client.infer("m", [])

        with serving(script) as server:
            asyncio.run(main(server.port))


@unittest.skipUnless("TEST_MEMO" in os.environ, "set TEST_MEMO=HOST:PORT")
class Live(unittest.TestCase):
    def test_a_running_server(self):
        async def main():
            host, port = os.environ["TEST_MEMO"].rsplit(":", 1)
            token = os.environ.get("TEST_TOKEN", "").encode()
            async with await aio.connect(host, int(port), token) as client:
                image = bytes([5]) * 784
                labels = await client.classify_many([image] * 1000)
                self.assertEqual({label.label for label in labels}, {labels[0].label})
                self.assertGreater(await client.ping(b"abc"), 0)
                self.assertIn("uptime_ms", await client.stats())

        asyncio.run(main())
