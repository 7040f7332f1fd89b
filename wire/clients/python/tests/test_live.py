"""The client against running servers. Environment variables name them."""

import asyncio
import os
import ssl
import struct
import time
import unittest

import afterimage
from afterimage import Failed


@unittest.skipUnless("TEST_TLS" in os.environ, "set TEST_TLS=localhost:PORT to a server with TLS and "
                     "TEST_CA=FILE to its authority")
class Tls(unittest.TestCase):
    def connect(self, context):
        host, port = os.environ["TEST_TLS"].rsplit(":", 1)
        return afterimage.Client(host, int(port), ssl=context)

    def test_a_server_with_tls_answers(self):
        context = ssl.create_default_context(cafile=os.environ["TEST_CA"])
        context.set_alpn_protocols(["afterimage"])
        with self.connect(context) as client:
            self.assertEqual(client._connection.socket.version(), "TLSv1.3")
            # More bytes than all buffers between client and server hold.
            images = [struct.pack("<I", i) + bytes(780) for i in range(10_000)]
            self.assertEqual([r.label for r in client.classify_many(images)], [i % 256 % 10 for i in range(10_000)])

    def test_the_asyncio_client_speaks_tls(self):
        async def main():
            host, port = os.environ["TEST_TLS"].rsplit(":", 1)
            context = ssl.create_default_context(cafile=os.environ["TEST_CA"])
            async with await afterimage.aio.connect(host, int(port), ssl=context) as client:
                labels = await client.classify_many(bytes([i % 10]) * 784 for i in range(5000))
                self.assertEqual([label.label for label in labels], [i % 10 for i in range(5000)])

        asyncio.run(main())

    def test_an_unknown_authority_is_refused(self):
        with self.assertRaises(ssl.SSLCertVerificationError):
            self.connect(ssl.create_default_context())


@unittest.skipUnless("TEST_MEMO" in os.environ, "set TEST_MEMO=HOST:PORT to a running memo or classifier")
class Live(unittest.TestCase):
    def test_a_running_server_answers(self):
        host, port = os.environ["TEST_MEMO"].rsplit(":", 1)
        with afterimage.Client(host, int(port), os.environ.get("TEST_TOKEN", "").encode()) as client:
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


@unittest.skipUnless("TEST_IDLE" in os.environ, "set TEST_IDLE=HOST:PORT to a memo or classifier that closes "
                     "idle connections within seconds")
class Idle(unittest.TestCase):
    def test_an_idle_close_costs_no_call(self):
        host, port = os.environ["TEST_IDLE"].rsplit(":", 1)
        with afterimage.Client(host, int(port)) as client:
            size = 1
            for extent in client.welcome.shape:
                size *= extent
            first = client.classify(bytes(size)).label
            for _ in range(3):
                connects, end = client.connects, time.monotonic() + 30
                while not client.going_away:
                    self.assertLess(time.monotonic(), end, "the server keeps the idle connection")
                    time.sleep(0.01)
                self.assertEqual(client.classify(bytes(size)).label, first)
                self.assertEqual(client.connects, connects + 1)
