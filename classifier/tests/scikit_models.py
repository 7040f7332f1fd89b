"""Trains scikit-learn's SVMs on the images in a folder, writes them as ONNX, and what ONNX Runtime predicts of others.

The folder holds `train`, `train.labels`, `test` and `test.labels`: bytes, 784 to an image. Called by original_tools.rs.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
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


def model(name, machine, divisor=255, images=train[few], labels=labels[few], test=test, options=None):
    x = (images / divisor).astype(np.float32)
    machine.fit(x, labels)
    onnx = to_onnx(machine, x[:1], options=options).SerializeToString()
    (folder / f"{name}.onnx").write_bytes(onnx)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    predictions = []
    for start in range(0, len(test), 500):
        block = (test[start : start + 500] / divisor).astype(np.float32)
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
model("linear_svc", LinearSVC(C=0.01))
model("logistic", LogisticRegression(C=0.1))
model("logistic_standard", make_pipeline(StandardScaler(), LogisticRegression(C=0.01)))
# Whatever an image shows, a model of two classes gives it one of two labels.
keep = (labels == 3) | (labels == 8)
two = {"images": train[keep][few], "labels": labels[keep][few]}
model("two_svc", SVC(), **two)
model("two_linear_svc", LinearSVC(C=0.01), **two)
model("two_logistic_bytes", LogisticRegression(C=1e-6), divisor=1, **two)
