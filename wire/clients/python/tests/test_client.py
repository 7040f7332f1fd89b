"""The client against a scripted server."""

import socket
import struct
import unittest

import afterimage
from afterimage import Failed, Label, Lost, Malformed
from afterimage.protocol import HEADER

from .support import WELCOME, Server, reply, talking, vectors


class Sessions(unittest.TestCase):
    def test_the_welcome_is_available(self):
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
                with self.assertRaises(socket.timeout):
                    server.take()
                server.socket.settimeout(10)
                server.send(*(reply(0x21, f[3], b"\1\0") for f in asked))

        small = bytearray(WELCOME)
        struct.pack_into("<I", small, 16 + 20, 2)
        with talking(script, welcome=bytes(small)) as client:
            self.assertEqual(len(client.classify_many([b"x"] * 10)), 10)

    def test_reads_while_it_writes(self):
        # Requests and replies exceed all buffers between client and server, and the server stops
        # reading until its replies are read.
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

    def test_a_refused_hello_raises_the_servers_error(self):
        refusal = reply(0x07, 0, b"the token is wrong", 1, 7)
        with Server(lambda server: None, welcome=refusal) as server, self.assertRaises(Failed) as caught:
            afterimage.Client("127.0.0.1", server.port, b"guess")
        self.assertEqual((caught.exception.name, caught.exception.connection), ("unauthenticated", True))

    def test_another_version_or_another_protocol_is_refused(self):
        other = bytearray(WELCOME)
        other[16 + 8] = 3
        for welcome in (bytes(other), b"HTTP/1.1 400 Bad Request\r\n\r\n"):
            with Server(lambda server: None, welcome=welcome) as server, self.assertRaises(Malformed):
                afterimage.Client("127.0.0.1", server.port)

    def test_a_silent_server_times_out(self):
        with talking(lambda server: server.take() and server.socket.recv(1), timeout=0.1) as client:
            with self.assertRaises(Lost):
                client.ping()

    def test_invalid_replies_raise_malformed(self):
        for answer in (
            lambda f: reply(0x11, f[3]), lambda f: reply(0x21, f[3], b"\1"), lambda f: reply(0x21, f[3], b"\1\0\0"),
            lambda f: HEADER.pack((1 << 20) + 1, 0x21, 0, 0, f[3]), lambda f: reply(0x21, f[3] + 1, b"\1\0"),
        ):
            with talking(lambda server: server.send(answer(server.take()))) as client:
                with self.assertRaises(Malformed):
                    client.classify(b"x")

    def test_stats_keep_the_servers_order(self):
        names = ["uptime_s", "requests", "hits", "abc"]
        entries = b"".join(struct.pack("<BB", 1, len(n)) + n.encode() + struct.pack("<IQ", 8, i)
                           for i, n in enumerate(names))
        with talking(lambda server: server.send(reply(0x06, server.take()[3], entries))) as client:
            self.assertEqual(list(client.stats().items()), [(n, i) for i, n in enumerate(names)])

    def test_the_first_of_two_stats_with_one_name_counts(self):
        data = next(d for name, _, d in vectors("valid") if name == "stats_resp_same_name_twice")
        with talking(lambda server: server.send(reply(0x06, server.take()[3], data[16:]))) as client:
            self.assertEqual(client.stats(), {"hits": 1})

    def test_control_characters_of_the_server_are_escaped_in_errors(self):
        text = "bad\x1b[2J\nimage \u202e"
        with talking(lambda server: server.send(reply(0x07, server.take()[3], text.encode(), 0, 4))) as client:
            with self.assertRaises(Failed) as caught:
                client.classify(b"")
        self.assertEqual(caught.exception.text, text)
        self.assertEqual(str(caught.exception), "bad_argument: bad\\x1b[2J\\nimage \\u202e")

    def test_a_window_of_0_counts_as_1(self):
        zero = bytearray(WELCOME)
        struct.pack_into("<I", zero, 16 + 20, 0)

        def script(server):
            for _ in range(3):
                server.send(reply(0x21, server.take()[3], b"\1\0"))

        with talking(script, welcome=bytes(zero)) as client:
            self.assertEqual(len(client.classify_many([b"x"] * 3)), 3)

    def test_a_closed_port_raises_an_os_error(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with self.assertRaises(ConnectionRefusedError):
            afterimage.Client("127.0.0.1", port)
