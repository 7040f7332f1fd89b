"""Requests of version 2: rows of any buffer, values of bytes, and servers of version 1."""

import array
import importlib.util
import struct
import unittest

from afterimage import Answer, Malformed, Unsupported

from .support import answers_to, reply, talking, vectors

NUMPY = importlib.util.find_spec("numpy") is not None
VERSION_1 = next(data for name, _, data in vectors("valid") if name == "welcome_version_1")


def rows_of(frame):
    """The rows of a received InferReq for a model of one letter."""
    body, rows = frame[4][2 + 1 + 8:], []
    count, = struct.unpack_from("<I", body)
    at = 4
    for _ in range(count):
        length, = struct.unpack_from("<I", body, at)
        rows.append(body[at + 4:at + 4 + length])
        at += 4 + length
    return rows


def sent_rows(rows):
    """The rows that a server receives when a client sends `rows`."""
    received = []

    def script(server):
        frame = server.take()
        received.extend(rows_of(frame))
        server.send(answers_to(frame))

    with talking(script) as client:
        client.infer("m", rows)
    return received


class Rows(unittest.TestCase):
    def test_any_buffer_is_a_row(self):
        rows = [b"bytes", bytearray(b"array"), memoryview(b"abcdef")[::2], array.array("f", [1.5])]
        self.assertEqual(sent_rows(rows), [b"bytes", b"array", b"ace", struct.pack("f", 1.5)])

    @unittest.skipUnless(NUMPY, "numpy is not installed")
    def test_the_rows_of_an_array_are_sent_in_c_order(self):
        import numpy
        images = numpy.arange(24, dtype=numpy.float32).reshape(2, 3, 4)
        self.assertEqual(sent_rows(images), [image.tobytes() for image in images])
        turned = images.transpose(0, 2, 1)
        self.assertEqual(sent_rows(turned), [image.tobytes("C") for image in turned])
        days = numpy.array([["2026-01-01"]], dtype="datetime64[D]")
        self.assertEqual(sent_rows(days), [days[0].tobytes()])

    def test_bad_arguments_leave_the_connection_open(self):
        with talking(lambda server: server.send(answers_to(server.take()))) as client:
            for arguments, error in [
                (("m", []), ValueError), (("m", ["text"]), TypeError), (("m" * 256, [b"r"]), ValueError),
                ((b"m", [b"r"]), TypeError),
            ]:
                with self.assertRaises(error):
                    client.infer(*arguments)
            with self.assertRaises(ValueError):
                client.infer("m", [b"r"], budget_ms=1 << 32)
            with self.assertRaises(ValueError):
                client.read_bytes(b"short")
            self.assertEqual(client.infer("m", [b"r"]).answers, [Answer(0, "miss", 0)])
            self.assertEqual(client.connects, 1)

    def test_a_reply_with_another_number_of_answers_is_malformed(self):
        def script(server):
            server.send(reply(0x23, server.take()[3], bytes(32) + struct.pack("<I", 1) + bytes(8)))

        with talking(script) as client, self.assertRaises(Malformed):
            client.infer("m", [b"a", b"b"])


class Versions(unittest.TestCase):
    def test_a_server_of_version_1_gets_no_new_request(self):
        with talking(lambda server: server.send(reply(0x21, server.take()[3], b"\7\0")), welcome=VERSION_1) as client:
            for call in (lambda: client.infer("m", [b"r"]), lambda: client.read_bytes(bytes(16)), client.flush,
                         lambda: client.write_bytes(bytes(16), b"v"), lambda: client.forget("m", b"r")):
                with self.assertRaises(Unsupported):
                    call()
            self.assertEqual(client.classify(b"i").label, 7)

    def test_bytes_of_more_than_1_mib_arrive(self):
        value = bytes(3 << 20)
        with talking(lambda server: server.send(reply(0x13, server.take()[3], value, 1))) as client:
            self.assertEqual(client.read_bytes(bytes(16)), value)
