"""Our models as ONNX graphs, step by step as classifier/README.md has them."""

import json

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
SIDE, MIDDLE, PLACES, POOLS = 28, 13.5, 24, 4


def read_model(path):
    """The tensors of a safetensors file by name."""
    content = open(path, "rb").read()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = np.frombuffer(content[8 + length + start : 8 + length + end], "<f4")
        tensors[name] = values.reshape(entry["shape"]).copy()
    return tensors


class Builder:
    """Nodes and constants of a graph; every step's output is its name."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, values, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def __call__(self, operator, *inputs, **attributes):
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def model(self, shape, output):
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.INT64, ["n"])]
        graph = helper.make_graph(self.nodes, "afterimage", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def linear(model):
    """Features to labels: one matrix product."""
    b = Builder()
    scores = b("Gemm", "x", model["svm.weights"].T, model["svm.intercepts"])
    return b.model(["n", 784], b("ArgMax", scores, axis=1, keepdims=0))


def convolutional(model):
    """Pixels from 0 to 1, [n, 1, 28, 28], to labels."""
    b = Builder()
    integers = lambda values: b.constant(values, np.int64)
    upright = deskew(b, integers)

    filters = model["conv.filters"].reshape(32, 1, 5, 5)
    average = np.full((1, 1, 5, 5), 1 / 25, np.float32)
    answers = b("Conv", upright, filters)
    mean = b("Conv", upright, average)
    square = b("Conv", b("Mul", upright, upright), average)
    variance = b("Max", b("Sub", square, b("Mul", mean, mean)), 0.0)
    sums = filters.sum(axis=(1, 2, 3)).reshape(1, 32, 1, 1)
    centred = b("Sub", answers, b("Mul", mean, sums))
    answers = b("Div", centred, b("Sqrt", b("Add", variance, 0.01)))
    positive = b("Relu", b("Sub", answers, 1.0))
    negative = b("Relu", b("Sub", b("Neg", answers), 1.0))
    channels = b("Concat", positive, negative, axis=1)

    places, centres = np.arange(PLACES), 6 * (np.arange(POOLS) + 0.5) - 0.5
    triangles = np.maximum(0, 1 - np.abs(places[None, :] - centres[:, None]) / 6)
    pooled = b("MatMul", b("MatMul", triangles, channels), triangles.T)
    pooled = b("Flatten", b("Transpose", b("Sqrt", pooled), perm=[0, 2, 3, 1]))

    z = b("Gemm", pooled, model["conv.projection"], model["conv.offset"])
    label = b("ArgMax", quadratic_scores(b, integers, model, z), axis=1, keepdims=0)
    return b.model(["n", 1, SIDE, SIDE], label)


def deskew(b, integers):
    y, x = np.mgrid[:SIDE, :SIDE] - MIDDLE
    # The moments of an image: one matrix product.
    weights = np.stack([np.ones_like(y), y, x, y * y, x * y], -1).reshape(784, 5)
    moments = b("MatMul", b("Flatten", "x"), weights)
    part = lambda i: b("Slice", moments, integers([i]), integers([i + 1]), integers([1]))
    mass = part(0)
    row, column, by_row, both = (b("Div", part(i), mass) for i in (1, 2, 3, 4))
    slope = b("Div", b("Sub", both, b("Mul", row, column)), b("Sub", by_row, b("Mul", row, row)))
    wide = lambda v: b("Reshape", v, integers([-1, 1, 1]))
    # Where each pixel comes from, in rows and columns from the middle, then from -1 to 1.
    down = b("Add", wide(row), y[None])
    right = b("Add", b("Add", b("Mul", wide(slope), y[None]), wide(column)), x[None])
    scaled = [b("Unsqueeze", b("Div", v, MIDDLE), integers([3])) for v in (right, down)]
    grid = b("Concat", *scaled, axis=3)
    return b("GridSample", "x", grid, mode="bilinear" if OPSET < 20 else "linear", align_corners=1)


def quadratic_scores(b, integers, model, z):
    """Σ w_ab·z_a·z_b + Σ w_a·z_a + b, the products taken as z·(W·z): no 5150 features in
    between."""
    weights, count = model["svm.weights"], model["conv.offset"].size
    upper = np.triu_indices(count)
    quadratic = np.zeros((10, count, count), np.float32)
    scale = np.where(upper[0] == upper[1], 1, np.sqrt(2)).astype(np.float32)
    quadratic[:, upper[0], upper[1]] = weights[:, : len(scale)] * scale
    linear = weights[:, len(scale) :]
    # [b, class · a]
    sums = b("MatMul", z, quadratic.transpose(2, 0, 1).reshape(count, -1))
    sums = b("Reshape", sums, integers([-1, 10, count]))
    sums = b("MatMul", sums, b("Unsqueeze", z, integers([2])))
    sums = b("Squeeze", sums, integers([2]))
    return b("Add", sums, b("Gemm", z, linear.T, model["svm.intercepts"]))
