"""Arguments of the client: buffers and integers."""

import array
import ctypes
import sys
import unittest

import afterimage

from .support import Server, label, reply, talking

try:
    import numpy
except ImportError:
    numpy = None
    print("SKIPPED: the tests with NumPy arrays pass without running; numpy is missing", file=sys.stderr)

IMAGE = bytes(range(16))


def echo(count):
    """A script that checks `count` images and answers them."""
    def script(server):
        for _ in range(count):
            frame = server.take()
            assert frame[4] == IMAGE, frame[4]
            server.send(label(frame))
    return script


class Buffers(unittest.TestCase):
    def check_accepted(self, images):
        with talking(echo(2 * len(images))) as client:
            for image in images:
                self.assertEqual(client.classify(image).label, 3)
            self.assertEqual(len(client.classify_many(images)), len(images))

    def check_rejected(self, cases):
        """Each argument raises its error, and the same connection answers afterwards."""
        with talking(echo(2 * len(cases))) as client:
            for image, error, text in cases:
                with self.subTest(repr(image)[:40]):
                    with self.assertRaisesRegex(error, text):
                        client.classify(image)
                    with self.assertRaisesRegex(error, text):
                        client.classify_many([image])
                    self.assertEqual(client.classify(IMAGE).label, 3)
                    self.assertEqual(client.classify_many([IMAGE])[0].label, 3)
            self.assertEqual(client.connects, 1)

    def test_every_contiguous_buffer_of_uint8_is_accepted(self):
        self.check_accepted([
            IMAGE, bytearray(IMAGE), memoryview(IMAGE), memoryview(b"--" + IMAGE)[2:],
            memoryview(IMAGE).cast("B", (4, 4)), memoryview(IMAGE).cast("c"), array.array("B", IMAGE),
            (ctypes.c_ubyte * 16)(*IMAGE), ctypes.create_string_buffer(IMAGE, 16),
        ])

    def test_everything_else_is_rejected_and_the_client_stays_open(self):
        self.check_rejected([
            ("text", TypeError, "an image must be bytes.* not str"), (None, TypeError, "not NoneType"),
            (7, TypeError, "not int"), ([1, 2], TypeError, "not list"),
            (array.array("f", [1.0]), TypeError, "format 'f'; convert it to uint8"),
            (array.array("b", [1]), TypeError, "format 'b'; convert it to uint8"),
            (memoryview(IMAGE)[::2], ValueError, "not C-contiguous"),
            (bytes((1 << 20) + 1), ValueError, "1048577 bytes; the server takes at most 1048576"),
        ])

    @unittest.skipIf(numpy is None, "numpy is missing")
    def test_numpy_arrays_of_uint8_are_accepted(self):
        square = numpy.frombuffer(IMAGE, numpy.uint8).reshape(4, 4)
        self.check_accepted([square, square.reshape(16), square.reshape(1, 2, 2, 4), square.copy().view(numpy.uint8)])

    @unittest.skipIf(numpy is None, "numpy is missing")
    def test_other_numpy_arrays_are_rejected(self):
        square = numpy.frombuffer(IMAGE, numpy.uint8).reshape(4, 4)
        self.check_rejected([
            (square.astype(numpy.float32), TypeError, "convert it to uint8"),
            (square.astype(numpy.int8), TypeError, "convert it to uint8"),
            (square.astype(bool), TypeError, "convert it to uint8"),
            (square.astype(">u2"), TypeError, "convert it to uint8"),
            (square.astype("datetime64[s]"), TypeError, "an image is an array that has no buffer"),
            (square.astype(object), TypeError, "convert it to uint8"),
            (square.T, ValueError, "not C-contiguous"), (square[:, ::2], ValueError, "not C-contiguous"),
        ])

    def test_an_error_in_the_iterator_keeps_the_connection(self):
        def images():
            yield IMAGE
            yield IMAGE
            raise KeyError("the caller's own error")

        with talking(echo(5)) as client:
            with self.assertRaisesRegex(KeyError, "the caller's own error"):
                client.classify_many(images())
            with self.assertRaisesRegex(TypeError, "not str"):
                client.classify_many([IMAGE, IMAGE, "text"])
            self.assertEqual(client.classify(IMAGE).label, 3)
            self.assertEqual((client.connects, client.dropped), (1, 4))

    def test_a_buffer_may_change_after_it_was_taken(self):
        image = bytearray(IMAGE)

        def images():
            for _ in range(3):
                image[:] = IMAGE
                yield image
                image[:] = bytes(16)

        with talking(echo(3)) as client:
            self.assertEqual(len(client.classify_many(images())), 3)

    def test_token_and_ping_take_buffers_too(self):
        def pong(server):
            frame = server.take()
            server.send(reply(0x04, frame[3], frame[4]))

        with Server(pong) as server:
            with afterimage.Client("127.0.0.1", server.port, bytearray(b"secret")) as client:
                client.ping(memoryview(b"abc"))
            self.assertTrue(server.hello[4].endswith(b"\6\0secret"))
        for token, error in (("secret", TypeError), (bytes(1025), ValueError)):
            with self.assertRaisesRegex(error, "the token"):
                afterimage.Client("127.0.0.1", 1, token)


class Integers(unittest.TestCase):
    def test_rejects_integers_out_of_range_and_stays_open(self):
        def script(server):
            server.send(reply(0x11, server.take()[3]))

        with talking(script) as client:
            for call, error in (
                (lambda: client.get(-1), ValueError), (lambda: client.get(1 << 64), ValueError),
                (lambda: client.get(1.5), TypeError), (lambda: client.get("1"), TypeError),
                (lambda: client.set(1, 1 << 63), ValueError), (lambda: client.set(1, -(1 << 63) - 1), ValueError),
                (lambda: client.classify(IMAGE, -1), ValueError), (lambda: client.classify(IMAGE, 65536), ValueError),
                (lambda: client.classify_many([IMAGE], 65536), ValueError), (lambda: client.ping(bytes(65)), ValueError),
                (lambda: client.get(1, budget_ms=0.5), TypeError),
            ):
                with self.assertRaises(error):
                    call()
            self.assertIsNone(client.get(1))
            self.assertEqual(client.connects, 1)
