"""MLServer through the proxy: every reply equals the direct one.

    python mlserver_clients.py AFTERIMAGE

Needs mlserver, which brings tritonclient[http.aio].
"""

import asyncio
import json
import os
import sys
from pathlib import Path


import tritonclient.http.aio as aio
import numpy as np

from servers import Server, free_port, get, post, proxy, session

RUNTIME = '''
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse

class Sum(MLModel):
    async def load(self):
        self.calls = 0
        return True

    async def predict(self, payload):
        self.calls += 1
        x = NumpyCodec.decode_input(payload.inputs[0])
        if (x == 666).any():
            raise InferenceError("planned failure")
        offset = self.settings.parameters.extra["offset"]
        outputs = [NumpyCodec.encode_output("SUM", x.sum(axis=1, keepdims=True) + offset),
                   NumpyCodec.encode_output("CALLS", np.full((len(x), 1), self.calls))]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
'''


def start_mlserver(folder):
    port = free_port()
    for name, offset in [("a", 0), ("b", 100)]:
        (folder / name).mkdir()
        parameters = {"version": "v1", "extra": {"offset": offset}}
        settings = {"name": name, "implementation": "runtime.Sum", "parameters": parameters}
        (folder / name / "model-settings.json").write_text(json.dumps(settings))
    (folder / "runtime.py").write_text("import numpy as np\n" + RUNTIME)
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(),
                "metrics_port": free_port(), "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = dict(os.environ, PYTHONPATH=str(folder))
    command = [Path(sys.executable).parent / "mlserver", "start", str(folder)]
    server = Server(command, folder / "mlserver.log", env=environment)
    server.wait(f"http://127.0.0.1:{port}/v2/health/ready", 120)
    server.wait(f"http://127.0.0.1:{port}/v2/models/b/ready", 60)
    return server, f"127.0.0.1:{port}"


def request(x, **more):
    x = np.asarray(x, np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.flatten().tolist()}
    return {"inputs": [tensor], **more}


def sums(reply):
    return [o["data"] for o in json.loads(reply)["outputs"] if o["name"] == "SUM"]


def value(reply):
    """A reply as a value. MLServer writes empty parameters, which mean none."""
    return {name: part for name, part in json.loads(reply).items() if part != {}}


def check_calls(checks, direct, through):
    body = request([[1, 2], [3, 4]], id="seven")
    status, headers, first = post(through, "/v2/models/a/infer", body)
    checks.equal((status, sums(first)), (200, [[3, 7]]), "the first call")
    checks.status(headers, "fwd=miss; stored", "the first call")
    status, headers, again = post(through, "/v2/models/a/infer", body)
    checks.status(headers, "hit", "the second call")
    checks.equal(value(again), value(first), "the hit is the first reply by value")
    checks.equal(json.loads(again)["id"], "seven", "the id of the request")
    other = post(through, "/v2/models/a/infer", request([[1, 2], [3, 4]], id="eight"))
    checks.status(other[1], "hit", "another id")
    checks.equal(json.loads(other[2])["id"], "eight", "another id")
    # MLServer's own cache gives one model's answer for another's.
    of_b = post(through, "/v2/models/b/infer", body)
    checks.equal((sums(of_b[2]), json.loads(of_b[2])["model_name"]), ([[103, 107]], "b"), "model b")
    checks.status(of_b[1], "fwd=miss; stored", "model b")
    versioned = post(through, "/v2/models/a/versions/v1/infer", body)
    checks.equal(sums(versioned[2]), [[3, 7]], "with a version")
    meant = post(through, "/v2/models/a/infer", request([[1, 2], [3, 4]], parameters={"content_type": "np"}))
    checks.status(meant[1], "fwd=miss", "a parameter is part of the key")


def check_policies(checks, direct, through):
    body, path = request([[5, 5]]), "/v2/models/a/infer"
    for _ in range(2):
        status, headers, reply = post(through, path, body, {"authorization": "Bearer a"})
        checks.equal((status, sums(reply)), (200, [[10]]), "with credentials")
        checks.status(headers, "fwd=bypass; detail=credentials", "with credentials")
    checks.status(post(through, path, body, {"cache-control": "no-store"})[1], "fwd=bypass; detail=no-store", "")
    checks.status(post(through, path, body)[1], "fwd=miss; stored", "nothing was stored before")
    checks.status(post(through, path, body)[1], "hit", "now it is")
    refreshed = post(through, path, body, {"cache-control": "no-cache"})
    checks.status(refreshed[1], "fwd=request; stored", "no-cache")
    newer = post(through, path, body)
    checks.equal(json.loads(newer[2])["outputs"], json.loads(refreshed[2])["outputs"], "the newer answer")
    checks.status(post(through, path + "?x=1", body)[1], "fwd=bypass; detail=query", "a query")


def check_errors(checks, direct, through):
    for about, path, body in [
        ("a failure of the model", "/v2/models/a/infer", request([[666]])),
        ("an unknown model", "/v2/models/none/infer", request([[1]])),
        ("no JSON", "/v2/models/a/infer", b"{"),
        ("no inputs", "/v2/models/a/infer", {}),
    ]:
        for _ in range(2):
            found, expected = [post(address, path, body) for address in (through, direct)]
            checks.equal((found[0], found[2]), (expected[0], expected[2]), about)


def check_other_requests(checks, direct, through):
    for path in ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/a", "/v2/models/a/ready",
                 "/v2/models/none", "/v2/docs/dataplane.json", "/nothing"]:
        found, expected = get(through, path), get(direct, path)
        checks.equal((found[0], found[2]), (expected[0], expected[2]), path)
    found, expected = [post(address, "/v2/repository/index", {}) for address in (through, direct)]
    checks.equal((found[0], found[2]), (expected[0], expected[2]), "repository index")
    loaded = post(through, "/v2/repository/models/a/load", {})
    checks.equal(loaded[0], 200, "load")
    status = post(through, "/v2/models/a/infer", request([[5, 5]]))[1]
    checks.status(status, "fwd=miss", "after a load, answers are computed again")


async def check_aio(checks, direct, through):
    x = np.random.default_rng(1).random((4, 5), np.float32)
    given = aio.InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=False)
    wanted = [aio.InferRequestedOutput("SUM", binary_data=False)]
    # MLServer refuses the type that this client sends by itself.
    headers = {"content-type": "application/json"}
    async with aio.InferenceServerClient(through) as proxied, aio.InferenceServerClient(direct) as server:
        expected = await server.infer("a", [given], outputs=wanted, request_id="aio", headers=headers)
        for _ in range(2):
            found = await proxied.infer("a", [given], outputs=wanted, request_id="aio", headers=headers)
            checks.equal(found.as_numpy("SUM").tolist(), expected.as_numpy("SUM").tolist(), "aio")
            checks.equal(found.get_response()["id"], "aio", "aio")


def main():
    program = sys.argv[1]
    with session() as (folder, keep, checks):
        _, direct = keep(start_mlserver(folder))
        _, through = keep(proxy(program, f"http://{direct}", folder, "--canaries", "0"))
        check_calls(checks, direct, through)
        check_policies(checks, direct, through)
        check_errors(checks, direct, through)
        check_other_requests(checks, direct, through)
        asyncio.run(check_aio(checks, direct, through))


if __name__ == "__main__":
    main()
