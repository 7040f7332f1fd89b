"""The client when the server closes connections."""

import socket
import struct
import time
import unittest

import afterimage
from afterimage import Failed, Label, Lost

from .support import GO_AWAY, WELCOME, Server, label, reply, talking


def wait_until(condition):
    """Waits for bytes that are already on the way through the loopback interface."""
    end = time.monotonic() + 10
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition did not come true within 10 s")
        time.sleep(0.002)


def answer(count):
    """A script that answers `count` requests and closes."""
    def script(server):
        for _ in range(count):
            server.send(label(server.take()))
    return script


def answer_and_go_away(server):
    server.send(label(server.take()))
    server.send(GO_AWAY)


class Reconnect(unittest.TestCase):
    def test_an_idle_close_is_noticed_and_the_next_call_reconnects(self):
        with talking(answer_and_go_away, answer(1)) as client:
            self.assertFalse(client.going_away)
            self.assertEqual(client.classify(b"x"), Label(3, "miss"))
            wait_until(lambda: client.going_away)
            self.assertEqual(client.classify(b"x"), Label(3, "miss"))
            self.assertEqual((client.connects, client.closed), (2, False))

    def test_a_close_without_go_away_is_noticed(self):
        with talking(answer(1), answer(1)) as client:
            client.classify(b"x")
            wait_until(lambda: client.going_away)
            self.assertEqual(client.classify(b"x").label, 3)

    def test_a_write_after_an_idle_close_is_not_lost(self):
        def read_write(server):
            write, read = server.take(), server.take()
            self.assertEqual((write[1], write[4]), (1, struct.pack("<Qq", 7, 8)))
            server.send(reply(0x11, read[3], bytes(8), 1))

        with talking(answer_and_go_away, read_write) as client:
            client.classify(b"x")
            wait_until(lambda: client.going_away)
            client.set(7, 8)
            self.assertEqual(client.get(7), 0)

    def test_a_loss_during_a_call_repeats_its_requests(self):
        def take_two_answer_one(server):
            server.send(label(server.take(), 1))
            server.take()

        def serve(server):
            for _ in range(2):
                frame = server.take()
                server.send(label(frame, frame[4][0]))

        with talking(take_two_answer_one, serve) as client:
            labels = client.classify_many([bytes([value]) for value in (1, 2, 3)])
            self.assertEqual([result.label for result in labels], [1, 2, 3])

    def test_a_reset_during_a_call_repeats_its_requests(self):
        def reset(server):
            server.take()
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        with talking(reset, answer(1)) as client:
            self.assertEqual(client.classify(b"x").label, 3)

    def test_two_losses_without_a_reply_raise_lost(self):
        def take(server):
            server.take()

        with talking(take, take, answer(1)) as client:
            with self.assertRaises(Lost) as caught:
                client.classify(b"x")
            self.assertTrue(caught.exception.retryable)
            self.assertEqual(client.classify(b"x").label, 3)

    def test_a_reconnect_to_a_closed_port_raises_lost(self):
        with Server(answer(1)) as server, afterimage.Client("127.0.0.1", server.port) as client:
            client.classify(b"x")
            wait_until(lambda: client.going_away)
            server.listener.close()
            with self.assertRaisesRegex(Lost, "cannot connect again to 127.0.0.1:"):
                client.classify(b"x")

    def test_go_away_during_a_call_moves_the_rest(self):
        def first(server):
            frames = [server.take() for _ in range(2)]
            server.send(GO_AWAY, label(frames[0], 1), reply(0x07, frames[1][3], b"later", 0, 10))
            with self.assertRaises(EOFError):
                server.take()

        def second(server):
            for _ in range(2):
                frame = server.take()
                server.send(label(frame, frame[4][0]))

        two = bytearray(WELCOME)
        struct.pack_into("<I", two, 16 + 20, 2)
        with talking(first, second, welcome=bytes(two)) as client:
            labels = client.classify_many([b"\1", b"\2", b"\3"])
            self.assertEqual([result.label for result in labels], [1, 2, 3])
            self.assertEqual(client.connects, 2)

    def test_a_request_that_two_servers_do_not_start_fails(self):
        def refuse(server):
            server.send(reply(0x07, server.take()[3], b"later", 0, 10))

        with talking(refuse, refuse) as client:
            with self.assertRaises(Failed) as caught:
                client.classify(b"x")
            self.assertEqual(caught.exception.name, "shutting_down")

    def test_a_connection_level_shutdown_is_repeated(self):
        def refuse(server):
            server.take()
            server.send(reply(0x07, 0, b"the time is over", 1, 10))

        with talking(refuse, answer(1)) as client:
            self.assertEqual(client.classify(b"x").label, 3)

    def test_another_connection_level_error_is_raised(self):
        def refuse(server):
            server.send(reply(0x07, server.take()[3], b"too large", 1, 8))

        with talking(refuse, answer(1)) as client:
            with self.assertRaises(Failed) as caught:
                client.classify(b"x")
            self.assertEqual((caught.exception.name, caught.exception.connection), ("too_large", True))
            self.assertEqual(client.classify(b"x").label, 3)

    def test_a_closed_client_does_not_reconnect(self):
        with Server(answer(0)) as server:
            client = afterimage.Client("127.0.0.1", server.port)
            client.close()
            with self.assertRaisesRegex(Lost, "the client is closed"):
                client.ping()
            self.assertTrue(client.closed and client.going_away)
            client.close()
