"""One blocking client in several threads."""

import threading
import time
import unittest

from afterimage import Label, Lost

from .support import label, talking


def in_threads(count, target):
    """Runs `target` in threads, and returns what they returned or raised."""
    results = []

    def run():
        try:
            results.append(target())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


class Threads(unittest.TestCase):
    def test_threads_share_a_client_and_get_their_own_answers(self):
        def echo(server):
            # The label is the first byte of the image.
            for _ in range(8 * 50):
                request = server.take()
                server.send(label(request, request[4][0]))

        with talking(echo) as client:
            numbers = iter(range(8))

            def calls():
                own = next(numbers)
                return all(client.classify(bytes([own])) == Label(own, "miss") for _ in range(50))

            self.assertEqual(in_threads(8, calls), [True] * 8)
            self.assertEqual(client.connects, 1)

    def test_a_close_ends_the_call_of_another_thread(self):
        taken = threading.Event()

        def silent(server):
            server.take()
            taken.set()
            with self.assertRaises(EOFError):
                server.take()

        with talking(silent, timeout=60.0) as client:
            def close():
                taken.wait(10)
                client.close()

            closer = threading.Thread(target=close)
            closer.start()
            began = time.monotonic()
            with self.assertRaisesRegex(Lost, "the client is closed"):
                client.classify(b"x")
            closer.join(10)
            self.assertLess(time.monotonic() - began, 30)
            self.assertTrue(client.closed)

    def test_an_iterator_that_uses_its_own_client_is_refused(self):
        def answer(server):
            server.send(label(server.take()))

        with talking(answer) as client:
            with self.assertRaisesRegex(RuntimeError, "must not use it"):
                client.classify_many(client.classify(b"x") for _ in range(2))
            self.assertEqual(client.classify(b"x"), Label(3, "miss"))
