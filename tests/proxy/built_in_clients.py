"""Triton's own client against the built-in model of `afterimage serve`.

    python built_in_clients.py AFTERIMAGE

Needs tritonclient[http,grpc].
"""

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
import grpc
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from servers import Checks, Server, free_port

checks = Checks()
folder = tempfile.TemporaryDirectory()
port = free_port()
command = [sys.argv[1], "serve", "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{port}"]
server = Server([*command, "--memory", "8MiB", "--model", "raw"], Path(folder.name) / "log")
server.wait(f"http://127.0.0.1:{port}/readyz")


def check(name, holds):
    checks.equal(bool(holds), True, name)


client = http.InferenceServerClient(f"127.0.0.1:{port}")
check("the server is live and ready", client.is_server_live() and client.is_server_ready())
check("the model is ready", client.is_model_ready("classifier"))
metadata = client.get_model_metadata("classifier")
check("the metadata has the shape", metadata["inputs"][0]["shape"] == [-1, 28, 28])
check("the server has a name", client.get_server_metadata()["name"] == "afterimage")

images = np.random.default_rng(1).integers(0, 255, (5, 28, 28), dtype=np.uint8)
images[4] = images[0]


def infer(binary_input, binary_output, names=("LABEL", "SCORES"), **options):
    tensor = http.InferInput("INPUT", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary_input)
    outputs = [http.InferRequestedOutput(name, binary_data=binary_output) for name in names]
    return client.infer("classifier", [tensor], outputs=outputs or None, **options)


first = infer(True, True, request_id="one")
labels, scores = first.as_numpy("LABEL"), first.as_numpy("SCORES")
check("five labels and ten scores each", labels.shape == (5,) and scores.shape == (5, 10))
check("each label has the highest score", (scores.argmax(axis=1) == labels).all())
check("equal rows get equal answers", labels[4] == labels[0])
check("the id comes back", first.get_response()["id"] == "one")
for binary_input in [True, False]:
    for binary_output in [True, False]:
        for compression in [None, "gzip", "deflate"]:
            again = infer(binary_input, binary_output, request_compression_algorithm=compression)
            equal = (again.as_numpy("LABEL") == labels).all() and np.array_equal(
                again.as_numpy("SCORES"), scores)
            check(f"equal answers: binary {binary_input}, {binary_output}, {compression}", equal)
only = infer(True, True, names=["LABEL"], model_version="1")
check("one requested output", len(only.get_response()["outputs"]) == 1)
check("without requested outputs, all come", len(infer(True, True, names=[]).get_response()["outputs"]) == 2)
for name, shape, datatype in [("INPUT", [1, 3], "UINT8"), ("OTHER", [1, 784], "UINT8")]:
    wrong = http.InferInput(name, shape, datatype)
    wrong.set_data_from_numpy(np.zeros(shape, np.uint8))
    try:
        client.infer("classifier", [wrong])
        status = "200"
    except InferenceServerException as error:
        status = error.status()
    checks.equal(status, "400", f"input {name} {shape} is refused")
try:
    client.get_model_metadata("other")
    status = "200"
except InferenceServerException as error:
    status = error.status()
checks.equal(status, "404", "an unknown model is refused")

# The same over gRPC, at the same address.
address = f"127.0.0.1:{port}"
caller = triton_grpc.InferenceServerClient(address)
check("gRPC: live and ready", caller.is_server_live() and caller.is_server_ready())
check("gRPC: the model is ready", caller.is_model_ready("classifier", "1"))
check("gRPC: the server has a name", caller.get_server_metadata().name == "afterimage")
described = caller.get_model_metadata("classifier")
check("gRPC: the metadata has the shape", list(described.inputs[0].shape) == [-1, 28, 28])
checks.equal(
    [(each.name, each.datatype, list(each.shape)) for each in described.outputs],
    [("LABEL", "UINT16", [-1]), ("SCORES", "FP32", [-1, 10])],
    "gRPC: the outputs of the model",
)


def grpc_input(module):
    tensor = module.InferInput("INPUT", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor


def same(answer):
    return (answer.as_numpy("LABEL") == labels).all() and np.array_equal(
        answer.as_numpy("SCORES"), scores)


for compression in [None, "gzip", "deflate"]:
    answer = caller.infer(
        "classifier", [grpc_input(triton_grpc)], request_id="two", compression_algorithm=compression,
        client_timeout=20)
    check(f"gRPC: equal answers: {compression}", same(answer))
    checks.equal(answer.get_response().id, "two", "gRPC: the id comes back")
requested = [triton_grpc.InferRequestedOutput("LABEL")]
answer = caller.infer("classifier", [grpc_input(triton_grpc)], outputs=requested)
check("gRPC: one requested output", len(answer.get_response().outputs) == 1)


def refused(call, *args, **options):
    try:
        call(*args, **options)
    except InferenceServerException as error:
        return error.status()
    return "OK"


wrong = triton_grpc.InferInput("INPUT", [1, 3], "UINT8")
wrong.set_data_from_numpy(np.zeros([1, 3], np.uint8))
checks.equal(refused(caller.infer, "classifier", [wrong]), "StatusCode.INVALID_ARGUMENT", "gRPC: a wrong shape")
checks.equal(refused(caller.get_model_metadata, "other"), "StatusCode.NOT_FOUND", "gRPC: an unknown model")
checks.equal(refused(caller.get_inference_statistics), "StatusCode.UNIMPLEMENTED", "gRPC: another method")


async def with_aio():
    client = triton_grpc_aio.InferenceServerClient(address)
    answer = await client.infer("classifier", [grpc_input(triton_grpc_aio)])
    await client.close()
    return answer


check("gRPC: equal answers with asyncio", same(asyncio.run(with_aio())))
with grpc.insecure_channel(address) as channel:
    def health(service):
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        return call(b"\x0a" + bytes([len(service)]) + service)

    checks.equal(health(b""), b"\x08\x01", "gRPC: health of the server")
    checks.equal(health(b"inference.GRPCInferenceService"), b"\x08\x01", "gRPC: health of the service")
    try:
        health(b"other")
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    checks.equal(code, grpc.StatusCode.NOT_FOUND, "gRPC: health of an unknown service")
caller.close()
server.end()

# With a token, the calls need it, and the probes do not.
port = free_port()
(Path(folder.name) / "token").write_text("secret\n")
command[command.index("--http") + 1] = f"127.0.0.1:{port}"
server = Server([*command, "--memory", "8MiB", "--model", "raw", "--token-file", str(Path(folder.name) / "token")],
                Path(folder.name) / "log2")
server.wait(f"http://127.0.0.1:{port}/readyz")
caller = triton_grpc.InferenceServerClient(f"127.0.0.1:{port}")
check("gRPC: ready without a token", caller.is_server_ready())
checks.equal(refused(caller.infer, "classifier", [grpc_input(triton_grpc)]), "StatusCode.UNAUTHENTICATED",
             "gRPC: a call without the token")
answer = caller.infer("classifier", [grpc_input(triton_grpc)], headers={"authorization": "Bearer secret"})
check("gRPC: a call with the token", same(answer))
caller.close()
server.end()
checks.done()
