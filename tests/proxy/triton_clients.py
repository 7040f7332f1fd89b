"""Triton's own clients through the proxy: every reply equals the direct one.

    python triton_clients.py AFTERIMAGE

Needs nvidia-pytriton (it holds `tritonserver`) and tritonclient[http].
"""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import pytriton
import tritonclient.http as http
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

from servers import Server, free_port, get, post, proxy, session

# Models run in a process of Triton's own, which does not know the packages of this one.
PATHS = f"import sys\nsys.path[:0] = {[path for path in sys.path if 'site-packages' in path]!r}\n"
SUM = '''
import json
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        replies = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "X").as_numpy()
            if (x == 666).any():
                replies.append(pb.InferenceResponse(error=pb.TritonError("planned failure")))
                continue
            scale = json.loads(request.parameters() or "{}").get("scale", 1)
            wanted = request.requested_output_names()
            outputs = {
                "SUM": x.sum(axis=1, keepdims=True) * np.float32(scale) + np.float32(OFFSET),
                "LEN": np.full((len(x), 1), x.shape[1], np.int32),
            }
            tensors = [pb.Tensor(name, outputs[name].astype(t))
                       for name, t in [("SUM", np.float32), ("LEN", np.int32)] if name in wanted]
            replies.append(pb.InferenceResponse(tensors))
        return replies
'''
SUM_CONFIG = '''
name: "sum" backend: "python" max_batch_size: 8
input [{ name: "X" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "SUM" data_type: TYPE_FP32 dims: [1] }, { name: "LEN" data_type: TYPE_INT32 dims: [1] }]
'''
ECHO = '''
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        copy = lambda r: pb.Tensor("OUT", pb.get_input_tensor_by_name(r, "IN").as_numpy())
        return [pb.InferenceResponse([copy(request)]) for request in requests]
'''
TYPES = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32",
         "FP64", "STRING"]
VALUES = {
    "BOOL": np.array([True, False, True]), "UINT64": np.array([0, 2**64 - 1, 2**53 + 1], np.uint64),
    "INT64": np.array([-(2**63), 2**63 - 1, 2**53 + 1], np.int64),
    "FP16": np.array([0.1, -0.0, 65504], np.float16),
    "FP32": np.array([0.1, -0.0, 3.4e38], np.float32),
    "FP64": np.array([0.1, np.nan, -np.inf]),
    "STRING": np.array(["a", "", "gr\u00fc\u00df"], dtype=object),
}


def write_models(folder):
    def model(name, code, config):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(PATHS + code)
        (folder / name / "config.pbtxt").write_text(config)

    model("sum", SUM.replace("OFFSET", "0"), SUM_CONFIG)
    for kind in TYPES:
        tensor = f'data_type: TYPE_{kind} dims: [-1]'
        model(f"echo_{kind.lower()}", ECHO,
              f'name: "echo_{kind.lower()}" backend: "python" '
              f'input [{{ name: "IN" {tensor} }}] output [{{ name: "OUT" {tensor} }}]')


def start_triton(folder, models):
    home = Path(pytriton.__file__).parent / "tritonserver"
    backend = folder / "backends/python"
    backend.mkdir(parents=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in [stub, *(home / "backends/python").iterdir()]:
        (backend / file.name).symlink_to(file)
    port, grpc, metrics = free_port(), free_port(), free_port()
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    command = [home / "bin/tritonserver", f"--model-repository={models}",
               f"--backend-directory={backend.parent}", f"--http-port={port}", "--http-address=127.0.0.1",
               f"--grpc-port={grpc}", "--grpc-address=127.0.0.1", f"--metrics-port={metrics}", "--model-control-mode=explicit",
               "--load-model=*", "--http-thread-count=4", "--disable-auto-complete-config"]
    server = Server(command, folder / "triton.log", env=environment)
    server.wait(f"http://127.0.0.1:{port}/v2/health/ready", 120)
    server.grpc = f"127.0.0.1:{grpc}"
    return server, f"127.0.0.1:{port}"


def tensor(x, binary=True):
    given = http.InferInput("X", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=binary)
    return [given]


def outcome(call):
    """The value of a call, or its error, in a form that can be compared."""
    try:
        result = call()
    except InferenceServerException as error:
        return ("error", error.status(), error.message())
    response = result.get_response()
    arrays = {o["name"]: result.as_numpy(o["name"]) for o in response["outputs"]}
    arrays = {name: (a.dtype.str, a.shape, a.tolist() if a.dtype == object else a.tobytes())
              for name, a in arrays.items()}
    return (response["model_name"], response["model_version"], response.get("id"), arrays)


def infer(address, x, binary=True, outputs=None, model="sum", **options):
    with http.InferenceServerClient(address) as client:
        wanted = None
        if outputs:
            wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in outputs]
        given = tensor(x, binary)
        return outcome(lambda: client.infer(model, given, outputs=wanted, **options))


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


def check_encodings(checks, direct, through):
    """One entry for JSON, binary, gzip and deflate; each reply in its own encoding."""
    x = np.array([[0.1, 0.2, 0.3]], np.float32)
    body = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 3], "data": x.tolist()}]}
    path = "/v2/models/sum/infer"
    status, headers, first = post(through, path, body)
    checks.equal(status, 200, "JSON")
    checks.status(headers, "fwd=miss; stored", "JSON")
    flat = {"id": "7", "inputs": [{"shape": [1, 3], "data": [1e-1, 0.2, 3e-1], "datatype": "FP32", "name": "X"}]}
    for encoding, encode in [(None, bytes), ("gzip", gzip.compress), ("deflate", zlib.compress)]:
        packed = encode(json.dumps(flat).encode())
        given = {"content-encoding": encoding} if encoding else {}
        status, headers, reply = post(through, path, packed, given)
        checks.status(headers, "hit", f"JSON, {encoding}")
        expected = json.loads(post(direct, path, packed, given)[2])
        checks.equal(json.loads(reply), expected, f"JSON, {encoding}")
        checks.equal(headers["content-type"], "application/json", f"JSON, {encoding}")
    for compression in [None, "gzip", "deflate"]:
        for binary in [True, False]:
            options = dict(binary=binary, request_compression_algorithm=compression,
                           response_compression_algorithm=compression, request_id="a-7")
            about = f"tritonclient, binary {binary}, {compression}"
            checks.equal(infer(through, x, **options), infer(direct, x, **options), about)
    before = inference_count(direct, "sum")
    checks.equal(infer(through, x)[3].keys(), {"SUM", "LEN"}, "all outputs")
    checks.equal(inference_count(direct, "sum"), before, "no call was made for a hit")


def inference_count(direct, model):
    # Triton counts a call some time after its response.
    time.sleep(0.2)
    stats = json.loads(get(direct, f"/v2/models/{model}/stats")[2])
    return sum(int(version["inference_count"]) for version in stats["model_stats"])


def check_types(checks, direct, through):
    for kind in TYPES:
        name = "BYTES" if kind == "STRING" else kind
        values = VALUES.get(kind)
        if values is None:
            values = np.array([0, 1, 100], getattr(np, kind.lower()))
        for binary in [True, False]:
            if kind in ("FP16",) and not binary or kind == "FP64" and not binary:
                continue
            def call(address):
                given = http.InferInput("IN", list(values.shape), name)
                given.set_data_from_numpy(values, binary_data=binary)
                wanted = [http.InferRequestedOutput("OUT", binary_data=binary)]
                with http.InferenceServerClient(address) as client:
                    return outcome(lambda: client.infer(f"echo_{kind.lower()}", [given], outputs=wanted))
            expected = call(direct)
            for around in range(2):
                checks.equal(call(through), expected, f"{kind}, binary {binary}, round {around}")


def check_errors(checks, direct, through):
    x = np.ones((1, 2), np.float32)
    for about, call in {
        "an unknown model": dict(x=x, model="none"),
        "an unknown version": dict(x=x, model_version="9"),
        "a batch that is too large": dict(x=np.ones((9, 2), np.float32)),
        "an unknown output": dict(x=x, outputs=["NONE"]),
        "a failure of the model": dict(x=np.full((1, 2), 666, np.float32)),
    }.items():
        for _ in range(2):
            checks.equal(infer(through, **call), infer(direct, **call), about)
    for about, body in {
        "no JSON": b"{", "an empty body": b"", "no inputs": b"{}",
        "bytes after the tensors": b'{"inputs":[]}xyz',
        "a wrong type": b'{"inputs":[{"name":"X","datatype":"INT8","shape":[1,1],"data":[1]}]}',
    }.items():
        found, expected = [post(address, "/v2/models/sum/infer", body) for address in (through, direct)]
        checks.equal((found[0], found[2]), (expected[0], expected[2]), about)
        checks.equal(found[1]["content-type"], expected[1]["content-type"], about)


def check_other_requests(checks, direct, through):
    for path in ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/sum", "/v2/models/sum/config",
                 "/v2/models/sum/versions/1/ready", "/v2/models/sum/ready", "/v2/models/none", "/nothing",
                 "/v2/models/sum/versions/1", "/v2/logging", "/v2/systemsharedmemory/status"]:
        found, expected = get(through, path), get(direct, path)
        checks.equal((found[0], found[2]), (expected[0], expected[2]), path)
        drop = {"date", "connection", "keep-alive"}
        fields = [sorted((name.lower(), value) for name, value in reply[1].items()
                         if name.lower() not in drop) for reply in (found, expected)]
        checks.equal(fields[0], fields[1], f"header fields of {path}")
    with http.InferenceServerClient(through) as proxied, http.InferenceServerClient(direct) as server:
        for name in ["is_server_live", "is_server_ready", "get_server_metadata", "get_model_repository_index",
                     "get_trace_settings", "get_log_settings"]:
            checks.equal(getattr(proxied, name)(), getattr(server, name)(), name)
        checks.equal(proxied.is_model_ready("none"), False, "is_model_ready")


async def check_aio(checks, direct, through):
    x = np.random.default_rng(1).random((4, 5), np.float32)
    async with aio.InferenceServerClient(through) as proxied, aio.InferenceServerClient(direct) as server:
        async def call(client):
            result = await client.infer("sum", tensor(x), request_id="aio")
            return outcome(lambda: result)
        expected = await call(server)
        together = await asyncio.gather(*[call(proxied) for _ in range(20)])
        for found in together:
            checks.equal(found, expected, "aio")
        checks.equal(await proxied.get_model_metadata("sum"), await server.get_model_metadata("sum"), "aio")


def check_rows(checks, direct, through):
    """Batches of a model that passes the probes: only unknown rows are computed."""
    rows = np.random.default_rng(3).random((200, 3), np.float32)

    def body(batch):
        tensor = {"name": "X", "datatype": "FP32", "shape": list(batch.shape), "data": batch.tolist()}
        return {"inputs": [tensor]}

    def compare(batch, about):
        found, expected = [post(address, "/v2/models/sum/infer", body(batch)) for address in (through, direct)]
        checks.equal(json.loads(found[2])["outputs"], json.loads(expected[2])["outputs"], about)
        return found[1]

    for at in range(30):
        compare(rows[100 + 2 * at:102 + 2 * at], "while the proxy examines the model")
        time.sleep(0.02)
    headers = compare(rows[:4], "new rows")
    checks.status(headers, "fwd=miss; stored", "new rows")
    # Each comparison adds the rows of the direct call.
    before = inference_count(direct, "sum")
    headers = compare(rows[[3, 4, 0, 5, 4]], "known and new rows, one of them twice")
    checks.status(headers, 'fwd=partial; stored; detail="2 of 5 rows"', "known and new rows")
    checks.equal(inference_count(direct, "sum") - before, 2 + 5, "two rows are computed")
    before = inference_count(direct, "sum")
    checks.status(compare(rows[[5, 4, 3, 2, 1, 0]], "known rows"), "hit", "known rows")
    checks.equal(inference_count(direct, "sum") - before, 6, "no row is computed")
    with http.InferenceServerClient(through) as proxied, http.InferenceServerClient(direct) as server:
        for binary in [True, False]:
            given = tensor(rows[[2, 60, 1]], binary)
            calls = [outcome(lambda c=c: c.infer("sum", given, request_id="9")) for c in (proxied, server)]
            checks.equal(calls[0], calls[1], f"tritonclient, binary {binary}")
    too_many = post(through, "/v2/models/sum/infer", body(rows[:9]))
    checks.equal(too_many[0], 400, "a batch that the server refuses is refused, also when it is known")


def check_replacement(checks, direct, through, models):
    """A model that is replaced under the same version number."""
    x = np.array([[1, 2]], np.float32)

    def replace(offset, address):
        (models / "sum/1/model.py").write_text(PATHS + SUM.replace("OFFSET", str(offset)))
        with http.InferenceServerClient(address) as client:
            client.load_model("sum")

    def value():
        return np.frombuffer(infer(through, x)[3]["SUM"][2], np.float32)[0]

    checks.equal((value(), value()), (3, 3), "before")
    replace(100, through)
    checks.equal(value(), 103, "after a load through the proxy, at once")
    time.sleep(2.5)
    checks.equal(value(), 103, "a hit")
    replace(200, direct)
    time.sleep(2.5)
    checks.equal(value(), 203, "after a load behind the proxy, within the interval")
    with http.InferenceServerClient(direct) as client:
        client.unload_model("sum")
    time.sleep(3)
    checks.equal(infer(through, x), infer(direct, x), "after an unload behind the proxy")


def check_statistics(checks, direct, through):
    """The server's statistics show the hits of the proxy, and nothing else differs."""
    path = "/v2/models/sum/stats"
    x = np.array([[77, 1]], np.float32)
    infer(through, x)
    before, server_before = (json.loads(get(address, path)[2]) for address in (through, direct))
    for _ in range(5):
        infer(through, x)
    found, expected = (json.loads(get(address, path)[2]) for address in (through, direct))
    hit = lambda stats: stats["model_stats"][0]["inference_stats"]["cache_hit"]
    checks.equal(int(hit(found)["count"]) - int(hit(before)["count"]), 5, "hits in the statistics")
    checks.equal(int(hit(found)["ns"]) > int(hit(before)["ns"]), True, "the time of the hits")
    checks.equal(hit(expected), hit(server_before), "the server's own counter stays")
    found["model_stats"][0]["inference_stats"]["cache_hit"] = hit(expected)
    checks.equal(found, expected, "the rest of the statistics")
    with http.InferenceServerClient(through) as proxied:
        stats = proxied.get_inference_statistics()["model_stats"]
        of_sum = [model for model in stats if model["name"] == "sum"]
        checks.equal(int(of_sum[0]["inference_stats"]["cache_hit"]["count"]) >= 5, True, "all models")


def check_swap_under_load(checks, direct, through, models):
    """Clients ask while the model is replaced under the same version number, behind the proxy."""
    rows = [np.array([[5, number]], np.float32) for number in range(8)]
    offset = lambda row: np.frombuffer(infer(through, row)[3]["SUM"][2], np.float32)[0] - row.sum()
    (models / "sum/1/model.py").write_text(PATHS + SUM.replace("OFFSET", "0"))
    with http.InferenceServerClient(through) as client:
        client.load_model("sum")
    [offset(row) for row in rows]
    seen, stop = [], threading.Event()

    def ask(number):
        while not stop.is_set():
            began = time.monotonic()
            try:
                seen.append((began, offset(rows[number])))
            except IndexError:
                # Triton answers 400 while it loads the model.
                continue

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    [client.start() for client in clients]
    time.sleep(1)
    (models / "sum/1/model.py").write_text(PATHS + SUM.replace("OFFSET", "500"))
    with http.InferenceServerClient(direct) as client:
        client.load_model("sum")
    loaded = time.monotonic()
    time.sleep(3)
    stop.set()
    [client.join() for client in clients]
    old = [began for began, value in seen if value == 0]
    new = [began for began, value in seen if value == 500]
    checks.equal(len(old) + len(new), len(seen), "each answer is of one of the models")
    first = min(new)
    late = sum(began > loaded + 2 for began in old)
    checks.equal(late, 0, "old answers later than one poll interval")
    checks.equal(len(new) > 50, True, f"{len(new)} answers of the new model")
    print(f"swap: {len(seen)} calls, noticed {first - loaded:+.2f} s after the load, "
          f"{late} old answers after 2 s")


def check_models(checks, program, page):
    """`afterimage models` shows what the proxy knows."""
    command = [program, "models", f"http://{page}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in ["sum", "epoch", "since", "canaries", "hits"]:
        checks.equal(part in text, True, f"{part} in {text}")
    found = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)
    of_sum = next(model for model in found if model["name"] == "sum")
    checks.equal(of_sum["epoch"] > 1 and of_sum["hits"] > 0, True, f"{of_sum}")


def main():
    program = sys.argv[1]
    with session() as (folder, keep, checks):
        models = folder / "models"
        write_models(models)
        _, direct = keep(start_triton(folder, models))
        # The server's counters are compared: the proxy must ask no questions of its own.
        _, through = keep(proxy(program, f"http://{direct}", folder, "--canaries", "0"))
        check_the_six_calls(checks, direct, through)
        check_encodings(checks, direct, through)
        check_types(checks, direct, through)
        check_errors(checks, direct, through)
        check_other_requests(checks, direct, through)
        asyncio.run(check_aio(checks, direct, through))
        check_statistics(checks, direct, through)
        _, by_rows = keep(proxy(program, f"http://{direct}", folder, "--rows", "auto", "--canaries", "0"))
        check_rows(checks, direct, by_rows)
        check_replacement(checks, direct, through, models)
        page = f"127.0.0.1:{free_port()}"
        _, asking = keep(proxy(program, f"http://{direct}", folder, "--http", page))
        check_swap_under_load(checks, direct, asking, models)
        check_models(checks, program, page)


if __name__ == "__main__":
    main()
