"""KServe and its two clients, directly and through the proxy: every reply is equal.

    python kserve_clients.py AFTERIMAGE

Needs kserve, which brings httpx and grpcio.
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

from servers import Server, free_port, get, post, proxy, session

MODEL = '''
import sys
import kserve
import numpy as np
from kserve import InferOutput, InferResponse

class Sum(kserve.Model):
    def __init__(self, name, offset):
        super().__init__(name)
        self.offset, self.ready = offset, True

    def predict(self, request, headers=None, response_headers=None):
        x = request.inputs[0].as_numpy()
        if (x == 666).any():
            raise kserve.errors.InvalidInput("planned failure")
        total = (x.sum(axis=1, keepdims=True) + self.offset).astype(np.float32)
        output = InferOutput("SUM", list(total.shape), "FP32")
        output.set_data_from_numpy(total, binary_data=False)
        return InferResponse(request.id, self.name, [output])

port, grpc_port = sys.argv[1:]
server = kserve.ModelServer(http_port=int(port), grpc_port=int(grpc_port), workers=1)
server.start([Sum("a", 0), Sum("b", 100)])
'''


def start_kserve(folder):
    port, grpc_port = free_port(), free_port()
    (folder / "model.py").write_text(MODEL)
    server = Server([sys.executable, folder / "model.py", str(port), str(grpc_port)], folder / "kserve.log")
    server.wait(f"http://127.0.0.1:{port}/v2/models/b/ready", 120)
    server.grpc = f"127.0.0.1:{grpc_port}"
    return server, f"127.0.0.1:{port}"


def request(model, x, binary=False):
    given = InferInput("X", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[given])


def value(reply):
    """Name and outputs of a reply. The id differs from call to call: the server makes one up."""
    return reply.model_name, [(o.name, o.datatype, o.shape, o.as_numpy().tolist()) for o in reply.outputs]


async def outcome(call):
    """The value of a call, or its error."""
    try:
        return value(await call)
    except Exception as error:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code, response.text
        return type(error).__name__, str(error.code()), error.details()


async def check_rest(checks, direct, through):
    rng = np.random.default_rng(1)
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    ask = lambda address, model, x, binary: outcome(
        client.infer(f"http://{address}", request(model, x, binary), model_name=model))
    for model in ["a", "b"]:
        for binary in [False, True]:
            x = rng.random((3, 4), np.float32)
            expected = await ask(direct, model, x, binary)
            for about in ["first", "again"]:
                checks.equal(await ask(through, model, x, binary), expected, f"{about}, {model}, binary {binary}")
    wrong = np.full((1, 2), 666, np.float32)
    expected = await ask(direct, "a", wrong, False)
    checks.equal(expected[0], 400, "the planned failure")
    for _ in range(2):
        checks.equal(await ask(through, "a", wrong, False), expected, "an error")
    checks.equal(await ask(through, "none", wrong, False), await ask(direct, "none", wrong, False), "no such model")
    for about in ["is_server_live", "is_server_ready"]:
        for address in [direct, through]:
            checks.equal(await getattr(client, about)(f"http://{address}"), True, about)
    for model in ["a", "b"]:
        for address in [direct, through]:
            checks.equal(await client.is_model_ready(f"http://{address}", model), True, "model ready")
    await client.close()


async def check_grpc(checks, direct, through):
    x = np.random.default_rng(2).random((2, 3), np.float32)
    async with InferenceGRPCClient(direct) as server, InferenceGRPCClient(through) as proxied:
        for model in ["a", "b"]:
            for binary in [False, True]:
                expected = await outcome(server.infer(request(model, x, binary)))
                for about in ["first", "again"]:
                    found = await outcome(proxied.infer(request(model, x, binary)))
                    checks.equal(found, expected, f"gRPC, {about}, {model}, binary {binary}")
        wrong = request("a", np.full((1, 2), 666, np.float32))
        checks.equal(await outcome(proxied.infer(wrong)), await outcome(server.infer(wrong)), "gRPC: an error")
        for client in [server, proxied]:
            checks.equal(await client.is_server_live(), True, "gRPC: live")
            checks.equal(await client.is_server_ready(), True, "gRPC: ready")
            checks.equal(await client.is_model_ready("a"), True, "gRPC: model ready")


def plain(value):
    """A reply without empty members, which mean the same as none."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if item not in (None, {})}
    return value


def check_other_requests(checks, direct, through):
    for path in ["/v2", "/v2/models", "/v2/models/a", "/v2/models/none", "/v2/health/live", "/v2/health/ready",
                 "/v2/models/a/ready", "/v2/models/a/versions/1", "/none"]:
        found, expected = get(through, path), get(direct, path)
        checks.equal((found[0], found[2]), (expected[0], expected[2]), path)
    body = {"id": "7", "inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [3, 4]}]}
    expected = json.loads(post(direct, "/v2/models/a/infer", body)[2])
    for about in ["fwd=miss; stored", "hit"]:
        status, headers, found = post(through, "/v2/models/a/infer", body)
        checks.status(headers, about, "the id is not part of the key")
        checks.equal((status, plain(json.loads(found))), (200, plain(expected)), about)


def main():
    program = sys.argv[1]
    with session() as (folder, keep, checks):
        server, direct = keep(start_kserve(folder))
        through_grpc = f"127.0.0.1:{free_port()}"
        _, through = keep(proxy(program, f"http://{direct}", folder, f"grpc://{server.grpc}",
                                "--grpc-listen", through_grpc))
        check_other_requests(checks, direct, through)
        asyncio.run(check_rest(checks, direct, through))
        asyncio.run(check_grpc(checks, server.grpc, through_grpc))


if __name__ == "__main__":
    main()
