"""Models with weights from PyPI behind a small server: are their rows independent of each other?

    python onnx_models.py AFTERIMAGE

Needs nudenet, magika and onnxruntime.
"""

import http.server
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime

from servers import free_port, get, post, proxy, session

TYPES = {"tensor(float)": ("FP32", np.float32), "tensor(int32)": ("INT32", np.int32)}


class OnnxServer:
    """The Open Inference Protocol for ONNX models, with binary tensors as outputs in JSON."""

    def __init__(self, models):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {name: onnxruntime.InferenceSession(path, options) for name, path in models.items()}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                name = self.path.removeprefix("/v2/models/")
                if self.path == "/v2":
                    return self.reply(200, {"name": "onnx", "version": "1", "extensions": []})
                known = name in server.sessions
                self.reply(200 if known else 404, {"name": name} if known else {"error": "unknown"})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                name = self.path.removeprefix("/v2/models/").removesuffix("/infer")
                if name not in server.sessions:
                    return self.reply(404, {"error": "unknown"})
                self.reply(200, server.infer(name, json.loads(body)))

            def reply(self, status, value):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def infer(self, name, body):
        session, given = self.sessions[name], body["inputs"][0]
        kind = TYPES[session.get_inputs()[0].type][1]
        x = np.array(given["data"], kind).reshape(given["shape"])
        outputs = session.run(None, {session.get_inputs()[0].name: x})
        outputs = [{"name": o.name, "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}
                   for o, y in zip(session.get_outputs(), outputs)]
        return {"model_name": name, "outputs": outputs}

    def text(self):
        return ""

    def end(self):
        self.http.shutdown()


def package(name, *path):
    return str(Path(importlib.util.find_spec(name).origin).parent.joinpath(*path))


def batch(name, rng, rows):
    """Different rows of the kind that the model takes."""
    if name == "nudenet":
        return "FP32", rng.random((rows, 3, 320, 320), np.float32).round(2)
    # Text in part, and the filling that magika puts between beginning and end.
    x = np.full((rows, 2048), 256, np.int32)
    for row in x:
        length = rng.integers(100, 1000)
        row[:length] = rng.integers(32, 127, length)
    return "INT32", x


def ask(address, name, x, kind):
    body = {"inputs": [{"name": "x", "datatype": kind, "shape": list(x.shape), "data": x.ravel().tolist()}]}
    status, headers, reply = post(address, f"/v2/models/{name}/infer", body)
    assert status == 200, reply
    return headers, [np.array(o["data"], np.float32).reshape(o["shape"]) for o in json.loads(reply)["outputs"]]


def verdict(page, address, name, rng, rows):
    """Sends new batches until the proxy has a verdict."""
    seen = 0
    for _ in range(60):
        kind, x = batch(name, rng, rows)
        ask(address, name, x, kind)
        for _ in range(40):
            time.sleep(0.05)
            models = json.loads(get(page, "/v1/models")[2])["proxied"]
            found = next(model for model in models if model["name"] == name)["rows"]
            if found["verdict"] != "unknown":
                return found
            if found["probes"] > seen:
                seen = found["probes"]
                break
    raise AssertionError(f"{name}: no verdict, {found}")


def main():
    program = sys.argv[1]
    models = {"nudenet": package("nudenet", "320n.onnx"),
              "magika": package("magika", "models", "standard_v3_3", "model.onnx")}
    with session() as (folder, keep, checks):
        server = OnnxServer(models)
        _, direct = keep((server, f"127.0.0.1:{server.http.server_port}"))
        rng = np.random.default_rng(3)
        page = f"127.0.0.1:{free_port()}"
        _, auto = keep(proxy(program, f"http://{direct}", folder, "--rows", "auto", "--http", page,
                             "--canaries", "0"))
        found = verdict(page, auto, "nudenet", rng, 2)
        print(f"nudenet: {found}")
        checks.equal((found["verdict"], found["disagreements"]), ("rows", 0), "nudenet")
        kind, x = batch("nudenet", rng, 2)
        ask(auto, "nudenet", x, kind)
        headers, known = ask(auto, "nudenet", x[::-1], kind)
        checks.status(headers, "hit", "rows of nudenet in another order")
        expected = ask(direct, "nudenet", x[::-1], kind)[1]
        checks.equal([y.tobytes() for y in known], [y.tobytes() for y in expected], "nudenet: the values")

        found = verdict(page, auto, "magika", rng, 4)
        print(f"magika: {found}")
        checks.equal(found["verdict"], "within offered", "magika")
        checks.equal(0 < found["greatest_difference"] < 1e-3, True, "magika: rounding")

        page = f"127.0.0.1:{free_port()}"
        _, within = keep(proxy(program, f"http://{direct}", folder, "--rows-of", "magika:within=1e-3",
                               "--http", page, "--canaries", "0"))
        found = verdict(page, within, "magika", rng, 4)
        print(f"magika within 1e-3: {found}")
        checks.equal(found["verdict"], "within", "magika with a limit")
        kind, x = batch("magika", rng, 4)
        ask(within, "magika", x[:2], kind)
        headers, some = ask(within, "magika", x[[0, 2, 1]], kind)
        checks.status(headers, 'fwd=partial; stored; detail="2 of 3 rows"', "magika")
        expected = ask(direct, "magika", x[[0, 2, 1]], kind)[1]
        apart = max(np.abs(a - b).max() for a, b in zip(some, expected))
        checks.equal(apart <= 1e-3, True, f"magika: {apart}")


if __name__ == "__main__":
    main()
