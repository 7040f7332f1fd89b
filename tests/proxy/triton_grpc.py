"""Triton's gRPC clients through the proxy: every reply equals the direct one.

    python triton_grpc.py AFTERIMAGE

Needs nvidia-pytriton (it holds `tritonserver`) and tritonclient[http,grpc].
"""

import asyncio
import json
import sys
import time

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from servers import free_port, post, proxy, session
from triton_clients import PATHS, SUM, TYPES, VALUES, inference_count, start_triton, write_models

DECOUPLED = '''
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb.get_input_tensor_by_name(request, "N").as_numpy()[0])
            for number in range(count):
                sender.send(pb.InferenceResponse([pb.Tensor("OUT", np.array([number], np.int32))]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''
DECOUPLED_CONFIG = '''
name: "repeat" backend: "python" model_transaction_policy { decoupled: true }
input [{ name: "N" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "OUT" data_type: TYPE_INT32 dims: [1] }]
'''


def given(x, name="X", kind="FP32"):
    tensor = triton.InferInput(name, list(x.shape), kind)
    tensor.set_data_from_numpy(x)
    return [tensor]


def value(result):
    response = result.get_response()
    arrays = {o.name: result.as_numpy(o.name) for o in response.outputs}
    arrays = {name: (a.dtype.str, a.shape, a.tolist() if a.dtype == object else a.tobytes())
              for name, a in arrays.items()}
    parameters = {name: str(p) for name, p in response.parameters.items()}
    return (response.model_name, response.model_version, response.id, parameters, arrays)


def outcome(call):
    """The value of a call, or its error, in a form that can be compared."""
    try:
        return value(call())
    except InferenceServerException as error:
        return ("error", error.status(), error.message())


def infer(address, x, outputs=None, model="sum", **options):
    with triton.InferenceServerClient(address) as client:
        wanted = [triton.InferRequestedOutput(name) for name in outputs or []] or None
        return outcome(lambda: client.infer(model, given(x), outputs=wanted, **options))


def cache_status(address, x, metadata=()):
    """The reply of a call with its `cache-status`."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=x.shape)
    request = service_pb2.ModelInferRequest(
        model_name="sum", inputs=[tensor], raw_input_contents=[x.tobytes()])
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        reply, call = stub.ModelInfer.with_call(request, metadata=metadata)
        fields = dict(call.initial_metadata())
        return reply, {"cache-status": fields.get("cache-status", "")}


def check_one_memory(checks, direct, through, http_direct, http_through):
    x = np.array([[0.5, 0.25, 8]], np.float32)
    body = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 3], "data": x.tolist()}]}
    path = "/v2/models/sum/infer"
    checks.status(post(http_through, path, body)[1], "fwd=miss; stored", "JSON stores")
    reply, fields = cache_status(through, x)
    checks.status(fields, "hit", "gRPC finds what JSON has stored")
    checks.equal(reply, cache_status(direct, x)[0], "the whole message")
    y = x + 1
    checks.status(cache_status(through, y)[1], "fwd=miss; stored", "gRPC stores")
    body["inputs"][0]["data"] = y.tolist()
    status, fields, found = post(http_through, path, body)
    checks.status(fields, "hit", "JSON finds what gRPC has stored")
    expected = json.loads(post(http_direct, path, body)[2])
    checks.equal(json.loads(found), expected, "JSON from gRPC")
    for compression in [None, "gzip", "deflate"]:
        options = dict(compression_algorithm=compression, request_id="a-7")
        checks.equal(infer(through, x, **options), infer(direct, x, **options), f"{compression}")
    before = inference_count(http_direct, "sum")
    for compression in [None, "gzip", "deflate"]:
        infer(through, x, compression_algorithm=compression)
    checks.equal(inference_count(http_direct, "sum"), before, "no call was made for hits")


def check_the_six_calls(checks, direct, through):
    six = np.arange(6, dtype=np.float32)
    other = np.array([[9, 8, 7]], np.float32)
    calls = [
        dict(x=six.reshape(1, 6)), dict(x=six.reshape(2, 3)),
        dict(x=six.reshape(1, 6), parameters={"scale": 10}),
        dict(x=other, outputs=["LEN"]), dict(x=other), dict(x=other, outputs=["SUM"]),
    ]
    for around in range(3):
        for at, call in enumerate(calls):
            expected = infer(direct, **call)
            checks.equal(infer(through, **call), expected, f"call {'ABCDEF'[at]}, round {around}")


def check_types(checks, direct, through):
    for kind in TYPES:
        name = "BYTES" if kind == "STRING" else kind
        values = VALUES.get(kind)
        if values is None:
            values = np.array([0, 1, 100], getattr(np, kind.lower()))

        def call(address):
            with triton.InferenceServerClient(address) as client:
                model = f"echo_{kind.lower()}"
                return outcome(lambda: client.infer(model, given(values, "IN", name)))
        expected = call(direct)
        for around in range(2):
            checks.equal(call(through), expected, f"{kind}, round {around}")


def typed_request():
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([0.5, 70])
    return service_pb2.ModelInferRequest(model_name="sum", inputs=[tensor])


def check_typed_contents(checks, direct, through):
    """Typed contents share the entry of raw contents; the reply has the server's form."""
    x = np.array([[0.5, 70]], np.float32)
    checks.status(cache_status(through, x)[1], "fwd=miss; stored", "raw")
    with grpc.insecure_channel(direct) as one, grpc.insecure_channel(through) as other:
        server, proxied = [service_pb2_grpc.GRPCInferenceServiceStub(c) for c in (one, other)]
        expected = server.ModelInfer(typed_request())
        for around in range(3):
            reply, call = proxied.ModelInfer.with_call(typed_request())
            checks.equal(reply, expected, f"typed contents, round {around}")
        checks.status(dict(call.initial_metadata()), "hit", "typed contents")


def check_errors(checks, direct, through):
    x = np.ones((1, 2), np.float32)
    for about, call in {
        "an unknown model": dict(x=x, model="none"),
        "an odd model name": dict(x=x, model="a/b c"),
        "an unknown version": dict(x=x, model_version="9"),
        "a batch that is too large": dict(x=np.ones((9, 2), np.float32)),
        "an unknown output": dict(x=x, outputs=["NONE"]),
        "a failure of the model": dict(x=np.full((1, 2), 666, np.float32)),
        "a sequence": dict(x=x, sequence_id=5, sequence_start=True),
    }.items():
        for _ in range(2):
            checks.equal(infer(through, **call), infer(direct, **call), about)
    for path in ["/inference.GRPCInferenceService/Nothing", "/some.Service/Call"]:
        codes = []
        for address in (through, direct):
            with grpc.insecure_channel(address) as channel:
                try:
                    channel.unary_unary(path)(b"abc")
                except grpc.RpcError as error:
                    codes.append((error.code(), error.details()))
        checks.equal(codes[0], codes[1], path)


def check_policies(checks, direct, through):
    x = np.array([[3, 1]], np.float32)
    for _ in range(2):
        fields = cache_status(through, x, [("authorization", "Bearer a")])[1]
        checks.status(fields, "fwd=bypass; detail=credentials", "credentials")
    checks.status(cache_status(through, x, [("cache-control", "no-store")])[1], "fwd=bypass; detail=no-store", "")
    checks.status(cache_status(through, x)[1], "fwd=miss; stored", "nothing was stored before")
    checks.status(cache_status(through, x)[1], "hit", "now it is")
    checks.status(cache_status(through, x, [("cache-control", "no-cache")])[1], "fwd=request; stored", "")


def check_other_calls(checks, direct, through):
    with triton.InferenceServerClient(through) as proxied, triton.InferenceServerClient(direct) as server:
        for name, arguments in [
            ("is_server_live", []), ("is_server_ready", []), ("is_model_ready", ["sum"]),
            ("is_model_ready", ["none"]), ("get_server_metadata", []), ("get_model_metadata", ["sum"]),
            ("get_model_config", ["sum"]), ("get_model_repository_index", []), ("get_trace_settings", []),
            ("get_log_settings", []), ("get_system_shared_memory_status", []),
        ]:
            expected = getattr(server, name)(*arguments)
            checks.equal(getattr(proxied, name)(*arguments), expected, name)


def check_streams(checks, direct, through):
    """ModelStreamInfer, with several responses for a request."""
    def ask(address, count):
        replies = []
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: replies.append((result, error)))
            given_count = given(np.array([count], np.int32), "N", "INT32")
            client.async_stream_infer("repeat", given_count, request_id="s")
            late = time.monotonic() + 30
            while len(replies) < count and time.monotonic() < late:
                time.sleep(0.01)
            client.stop_stream()
        return [(value(result) if result else None, str(error)) for result, error in replies]
    for count in [1, 50]:
        checks.equal(ask(through, count), ask(direct, count), f"{count} responses")
    x = given(np.array([1], np.int32), "N", "INT32")
    for _ in range(2):
        found = []
        for address in (through, direct):
            with triton.InferenceServerClient(address) as client:
                found.append(outcome(lambda: client.infer("repeat", x)))
        checks.equal(found[0], found[1], "a unary call to a decoupled model")


def check_large(checks, direct, through):
    x = np.random.default_rng(5).random((2, 1_000_000), np.float32)
    for around in range(2):
        checks.equal(infer(through, x), infer(direct, x), f"8 MB, round {around}")


async def check_aio(checks, direct, through):
    x = np.random.default_rng(1).random((4, 5), np.float32)
    async with aio.InferenceServerClient(through) as proxied, aio.InferenceServerClient(direct) as server:
        async def call(client):
            return value(await client.infer("sum", given(x), request_id="aio"))
        expected = await call(server)
        for found in await asyncio.gather(*[call(proxied) for _ in range(50)]):
            checks.equal(found, expected, "aio")
        metadata = await server.get_model_metadata("sum")
        checks.equal(await proxied.get_model_metadata("sum"), metadata, "aio")


def check_deadline(checks, through):
    with triton.InferenceServerClient(through) as client:
        x = np.full((1, 2), 0.125, np.float32)
        error = outcome(lambda: client.infer("sum", given(x), client_timeout=0.000001))
        checks.equal(error[:2], ("error", "StatusCode.DEADLINE_EXCEEDED"), "a deadline")
        checks.equal(outcome(lambda: client.infer("sum", given(x)))[0], "sum", "after a deadline")


def check_replacement(checks, direct, through, models):
    """A model that is replaced under the same version number."""
    x = np.array([[1, 2]], np.float32)

    def replace(offset, address):
        (models / "sum/1/model.py").write_text(PATHS + SUM.replace("OFFSET", str(offset)))
        with triton.InferenceServerClient(address) as client:
            client.load_model("sum")

    def total():
        return np.frombuffer(infer(through, x)[4]["SUM"][2], np.float32)[0]

    checks.equal((total(), total()), (3, 3), "before")
    replace(100, through)
    checks.equal(total(), 103, "after a load through the proxy, at once")
    time.sleep(2.5)
    checks.equal(total(), 103, "a hit")
    replace(200, direct)
    time.sleep(2.5)
    checks.equal(total(), 203, "after a load behind the proxy, within the interval")
    with triton.InferenceServerClient(through) as client:
        client.unload_model("sum")
    time.sleep(1)
    checks.equal(infer(through, x), infer(direct, x), "after an unload through the proxy")


def check_statistics(checks, direct, through):
    """The server's statistics show the hits of the proxy, and nothing else differs."""
    x = np.array([[77, 3]], np.float32)
    infer(through, x)

    def statistics(address):
        with triton.InferenceServerClient(address) as client:
            return client.get_inference_statistics("sum")

    before = statistics(through)
    for _ in range(5):
        infer(through, x)
    found, expected = statistics(through), statistics(direct)
    hit = lambda stats: stats.model_stats[0].inference_stats.cache_hit
    checks.equal(hit(found).count - hit(before).count, 5, "hits in the statistics")
    checks.equal(hit(found).ns > hit(before).ns, True, "the time of the hits")
    hit(found).CopyFrom(hit(expected))
    checks.equal(found, expected, "the rest of the statistics")


def main():
    program = sys.argv[1]
    with session() as (folder, keep, checks):
        models = folder / "models"
        write_models(models)
        (models / "repeat/1").mkdir(parents=True)
        (models / "repeat/1/model.py").write_text(PATHS + DECOUPLED)
        (models / "repeat/config.pbtxt").write_text(DECOUPLED_CONFIG)
        server, http_direct = keep(start_triton(folder, models))
        direct, through = server.grpc, f"127.0.0.1:{free_port()}"
        _, http_through = keep(proxy(
            program, f"http://{http_direct}", folder, f"grpc://{direct}", "--grpc-listen", through,
            "--canaries", "0"))
        check_one_memory(checks, direct, through, http_direct, http_through)
        check_the_six_calls(checks, direct, through)
        check_types(checks, direct, through)
        check_typed_contents(checks, direct, through)
        check_errors(checks, direct, through)
        check_policies(checks, direct, through)
        check_other_calls(checks, direct, through)
        check_statistics(checks, direct, through)
        check_streams(checks, direct, through)
        check_large(checks, direct, through)
        asyncio.run(check_aio(checks, direct, through))
        check_deadline(checks, through)
        check_replacement(checks, direct, through, models)


if __name__ == "__main__":
    main()
