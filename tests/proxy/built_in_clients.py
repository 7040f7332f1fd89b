"""Triton's own client against the built-in model of `afterimage serve`.

    python built_in_clients.py AFTERIMAGE

Needs tritonclient[http].
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
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
server.end()
checks.done()
