"""Trains scikit-learn's SVMs on images, and writes them as ONNX with ONNX Runtime's predictions.

Argument: a folder with `train`, `train.labels`, `test` and `test.labels`: bytes, 784 to an image.
Called by original_tools.rs.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC, NuSVC

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])


def read(name):
    images = np.frombuffer((folder / name).read_bytes(), np.uint8).reshape(-1, 784)
    labels = np.frombuffer((folder / f"{name}.labels").read_bytes(), np.uint8)
    return images, labels.astype(np.int64)


(train, labels), (test, _) = read("train"), read("test")
few = slice(0, 2000)


def in_raw_bytes(onnx):
    """The numbers of all constants as little-endian bytes."""
    for constant in onnx.graph.initializer:
        constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant), constant.name))


def in_nodes(onnx):
    """Constant nodes instead of initializers."""
    nodes = [helper.make_node("Constant", [], [it.name], value=it) for it in onnx.graph.initializer]
    del onnx.graph.initializer[:]
    nodes += onnx.graph.node
    del onnx.graph.node[:]
    onnx.graph.node.extend(nodes)


def in_half_floats(onnx):
    """The scaler's constants as 16-bit floats and a cast."""
    nodes = []
    for constant in onnx.graph.initializer:
        if not constant.name.startswith(("Su_", "Di_", "Mu_", "Ad_")):
            continue
        values = numpy_helper.to_array(constant)
        name, code = constant.name, constant.data_type
        bits = values.astype(np.float16).view(np.uint16).tolist()
        constant.CopyFrom(
            TensorProto(name=f"{name}_half", data_type=TensorProto.FLOAT16, dims=values.shape, int32_data=bits))
        nodes.append(helper.make_node("Cast", [f"{name}_half"], [name], to=code))
    nodes += onnx.graph.node
    del onnx.graph.node[:]
    onnx.graph.node.extend(nodes)


def model(name, machine, divisor=255, images=train[few], labels=labels[few], test=test, options=None, dtype=np.float32,
          encode=None):
    x = (images / divisor).astype(dtype)
    machine.fit(x, labels)
    onnx = to_onnx(machine, x[:1], options=options)
    if encode:
        encode(onnx)
    onnx = onnx.SerializeToString()
    (folder / f"{name}.onnx").write_bytes(onnx)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    predictions = []
    for start in range(0, len(test), 500):
        block = (test[start : start + 500] / divisor).astype(dtype)
        predictions.extend(session.run(None, {session.get_inputs()[0].name: block})[0])
    (folder / f"{name}.txt").write_text("".join(f"{label}\n" for label in predictions))


model("svc_linear", SVC(kernel="linear", C=0.1))
model("svc_poly", SVC(kernel="poly", coef0=1, gamma=0.01))
model("svc_rbf", SVC(C=10))
model("svc_rbf_bytes", SVC(C=10), divisor=1)
model("svc_rbf_ovo", SVC(decision_function_shape="ovo"), options={"zipmap": False})
model("svc_sigmoid", SVC(kernel="sigmoid", gamma=0.002))
model("svc_names", SVC(), labels=np.array([f"d{label}" for label in labels[few]]))
model("nusvc", NuSVC(nu=0.1))
model("svc_standard_bytes", make_pipeline(StandardScaler(), SVC()), divisor=1)
model("svc_minmax", make_pipeline(MinMaxScaler(), SVC()))
model("svc_probabilities", SVC(C=10, probability=True))
# Scalers in 64-bit floats, as skl2onnx recommends them: double_data, and casts around them.
double = {"dtype": np.float64, "options": {SVC: {"zipmap": False}}}
cast = {StandardScaler: {"div": "div_cast"}}
model("svc_standard_double", make_pipeline(StandardScaler(), SVC()), **double)
model("svc_standard_cast", make_pipeline(StandardScaler(), SVC()), options=cast)
model("svc_standard_cast_raw", make_pipeline(StandardScaler(), SVC()), options=cast, encode=in_raw_bytes)
model("svc_standard_cast_nodes", make_pipeline(StandardScaler(), SVC()), options=cast, encode=in_nodes)
model("svc_standard_half", make_pipeline(StandardScaler(), SVC()), options=cast, encode=in_half_floats)
model("svc_minmax_double", make_pipeline(MinMaxScaler(), SVC()), **double)
model("svc_minmax_nodes", make_pipeline(MinMaxScaler(), SVC()), encode=in_nodes)
model("linear_svc", LinearSVC(C=0.01))
model("logistic", LogisticRegression(C=0.1))
model("logistic_standard", make_pipeline(StandardScaler(), LogisticRegression(C=0.01)))
# A model of two classes gives every image one of two labels.
keep = (labels == 3) | (labels == 8)
two = {"images": train[keep][few], "labels": labels[keep][few]}
model("two_svc", SVC(), **two)
model("two_linear_svc", LinearSVC(C=0.01), **two)
model("two_logistic_bytes", LogisticRegression(C=1e-6), divisor=1, **two)
