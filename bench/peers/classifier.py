"""The classifier beside LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime, for bench/scripts/run.sh
classifier.

    classifier.py DATA_DIR TEMPORARY_FOLDER RECORDS_FOLDER

Every program gets the same models. Its answers are compared with ours before its time counts.

* raw: the ten linear machines on pixels, exported to each program's own format. LIBSVM lets pairs
  of classes vote, so each machine's weights become a "support vector" of a linear kernel: of two
  classes the one with the greater score wins, so the class with the greatest score wins all its
  votes.
* conv: the shipped model, its steps written as an ONNX graph.

All programs run on one core, in turn, in rounds; the least CPU time counts, since other processes
disturb it less than wall time. Ours runs from an image's bytes to its label. The others get
prepared inputs, floating-point numbers from 0 to 1 in their fastest form.
"""

import gzip
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import sklearn
from skl2onnx import to_onnx
from sklearn.svm import LinearSVC

import graphs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from measure import describe_machine, write_record

ROUNDS = 3
SECONDS = 0.4
IMAGES = 10_000
PASS = 200
CPU = "0"
BATCHES = (1, 64, 256, IMAGES)


def main(data, folder, records):
    machine = describe_machine()
    os.sched_setaffinity(0, {int(CPU)})
    images, model = read_images(data), graphs.read_model("classifier/models/raw-linear.safetensors")
    features = np.ascontiguousarray(images / np.float32(255), np.float32)
    times, labels = {}, {}

    def note(name, batch, micros):
        times.setdefault(name, {}).setdefault(batch, []).append(micros)

    programs = [
        *in_process(model, features, folder),
        *python_programs(model, features),
        *conv_program(features),
    ]
    for _ in range(ROUNDS):
        for name, ours in (("ours, raw", "raw"), ("ours, conv", "shipped")):
            scored = json.loads(run([program("score"), data, ours, SECONDS]))
            labels[name] = np.array(scored["labels"])
            for batch, micros in scored["us"].items():
                note(name, int(batch), micros)
        for name, measure in programs:
            for batch, micros, answers in measure():
                note(name, batch, micros)
                if answers is not None:
                    labels[name] = answers
    commands, command_labels = command_lines(model, features, folder)
    labels.update(command_labels)

    least = {name: {batch: min(all) for batch, all in batches.items()} for name, batches in times.items()}
    agreement = {}
    for name, answers in labels.items():
        ours = labels["ours, conv" if "conv" in name else "ours, raw"]
        agreement[name] = int((answers == ours).sum())
    speeds = {}
    for name, arguments in (("conv", []), ("raw", ["classifier/models/raw-linear.safetensors"])):
        os.sched_setaffinity(0, range(os.cpu_count()))
        speeds[name] = json.loads(run([program("speed"), data, *arguments, "--json"], pinned=False))
    text = table(least, agreement, commands) + speed_text(speeds)
    print("\n".join(text))
    keep(records, machine, least, agreement, commands, speeds, text)
    # A pixel's feature is an f32 here and a double in some of them: only ties may differ.
    wrong = {name: agreed for name, agreed in agreement.items() if agreed < IMAGES - 2}
    if wrong:
        sys.exit(f"answers that differ from ours: {wrong}")


def run(command, pinned=True):
    prefix = ["taskset", "-c", CPU] if pinned else []
    done = subprocess.run(prefix + [str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


def program(name):
    return f"target/release/classifier-{name}"


def read_images(data):
    """The first images to train on, a row of bytes each."""
    path = Path(data) / "train-images-idx3-ubyte"
    content = path.read_bytes() if path.exists() else gzip.open(f"{path}.gz").read()
    return np.frombuffer(content, np.uint8, IMAGES * 784, offset=16).reshape(IMAGES, 784)


# ---- The programs. Each gives, when called, (batch, microseconds per image, labels or None). ----


def in_process(model, features, folder):
    """LIBLINEAR's and LIBSVM's libraries, called from C."""
    write_liblinear(f"{folder}/linear.model", model)
    write_libsvm(f"{folder}/svm.model", model)
    with open(f"{folder}/features", "wb") as file:
        file.write(struct.pack("<qq", *features.shape))
        file.write(features.astype("<f8").tobytes())

    def measure(kind, file):
        out = run([f"{folder}/in_process", kind, f"{folder}/{file}", f"{folder}/features", SECONDS])
        first, answers = out.split("\n", 1)
        # They score one image at a time: a batch takes as long as its images one by one.
        answers = np.array(answers.split(), int)
        return [(batch, float(first), answers) for batch in BATCHES]

    return [
        ("LIBLINEAR's library, from C", lambda: measure("linear", "linear.model")),
        ("LIBSVM's library, from C", lambda: measure("svm", "svm.model")),
    ]


def write_liblinear(path, model, classes=10):
    weights, intercepts = model["svm.weights"][:classes], model["svm.intercepts"][:classes]
    columns = np.vstack([weights.T, intercepts[None, :]])
    # Of two classes LIBLINEAR keeps the weights of the first only.
    columns = columns[:, :1] if classes == 2 else columns
    lines = [
        "solver_type L2R_L2LOSS_SVC_DUAL",
        f"nr_class {classes}",
        "label " + " ".join(map(str, range(classes))),
        "nr_feature 784",
        "bias 1",
        "w",
        *(" ".join(f"{value:.17g}" for value in row) for row in columns),
    ]
    Path(path).write_text("\n".join(lines) + "\n")


def write_libsvm(path, model):
    """Ten vectors, one for each class; the pair (i, j) weighs that of i by 1 and that of j by
    -1."""
    weights, intercepts = model["svm.weights"], model["svm.intercepts"].astype(float)
    rho = [-(intercepts[i] - intercepts[j]) for i in range(10) for j in range(i + 1, 10)]
    lines = [
        "svm_type c_svc",
        "kernel_type linear",
        "nr_class 10",
        "total_sv 10",
        "rho " + " ".join(f"{value:.17g}" for value in rho),
        "label 0 1 2 3 4 5 6 7 8 9",
        "nr_sv" + " 1" * 10,
        "SV",
    ]
    for i, row in enumerate(weights):
        # A class is the second of its pairs with classes before it, and the first of the others.
        coefficients = ["-1"] * i + ["1"] * (9 - i)
        vector = [f"{j + 1}:{value:.17g}" for j, value in enumerate(row) if value != 0]
        lines.append(" ".join(coefficients + vector))
    Path(path).write_text("\n".join(lines) + "\n")


def timed(predict, inputs):
    """The least CPU time of a pass in which `predict` is called for each of `inputs`."""
    least, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.process_time()
        for x in inputs:
            predict(x)
        least = min(least, time.process_time() - start)
    return least


def passes(predict, features, batches=BATCHES):
    """Times of `predict` on batches of every size, and its labels."""
    for batch in batches:
        count = max(PASS // batch, 1)
        inputs = [features[i * batch : (i + 1) * batch] for i in range(count)]
        answers = np.asarray(predict(features)).ravel() if batch == 1 else None
        yield batch, timed(predict, inputs) / (count * batch) * 1e6, answers


def python_programs(model, features):
    sklearn.set_config(assume_finite=True)
    machine = LinearSVC()
    machine.coef_, machine.intercept_ = model["svm.weights"], model["svm.intercepts"]
    machine.classes_, machine.n_features_in_ = np.arange(10), 784
    of_skl2onnx = session(to_onnx(machine, features[:1], target_opset=17))
    name = of_skl2onnx.get_inputs()[0].name
    label = of_skl2onnx.get_outputs()[0].name
    product = session(graphs.linear(model))
    return [
        ("scikit-learn", lambda: passes(machine.predict, features)),
        (
            "ONNX Runtime, by skl2onnx",
            lambda: passes(lambda x: of_skl2onnx.run([label], {name: x})[0], features),
        ),
        (
            "ONNX Runtime, Gemm and ArgMax",
            lambda: passes(lambda x: product.run(None, {"x": x})[0], features),
        ),
        ("ONNX Runtime, Gemm, bound buffers", lambda: bound(product, features)),
    ]


def bound(session, features):
    """Without copies of inputs and outputs: the same buffers in every call."""
    for batch in BATCHES:
        binding = session.io_binding()
        # An OrtValue may point into its array, which has to stay.
        inputs, outputs = features[:batch].copy(), np.zeros(batch, np.int64)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(inputs)
        binding.bind_ortvalue_input("x", value)
        answers = onnxruntime.OrtValue.ortvalue_from_numpy(outputs)
        binding.bind_ortvalue_output(session.get_outputs()[0].name, answers)
        count = max(PASS // batch, 1)
        seconds = timed(lambda _: session.run_with_iobinding(binding), range(count))
        yield batch, seconds / (count * batch) * 1e6, answers.numpy().copy() if batch == IMAGES else None


def conv_program(features):
    graph = session(graphs.convolutional(graphs.read_model("classifier/models/conv.safetensors")))
    planes = features.reshape(-1, 1, 28, 28)

    def predict(x):
        # All 10,000 at once would need gigabytes for intermediate results.
        if len(x) > 256:
            return np.concatenate([predict(x[i : i + 250]) for i in range(0, len(x), 250)])
        return graph.run(None, {"x": x})[0]

    return [("ONNX Runtime, conv graph", lambda: passes(predict, planes, (1, 64, 256)))]


def session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])


def command_lines(model, features, folder):
    """`predict` and `svm-predict` on a file of all images: CPU time of the whole command, and of
    its scoring alone.

    The latter of `predict` is found by running it with two classes as well, of which LIBLINEAR
    keeps the weights of one: what the other nine take more is nine tenths of the scoring.
    `svm-predict` gets no such figure.
    """
    lines = ["0 " + " ".join(f"{j + 1}:{row[j]:.9g}" for j in np.flatnonzero(row)) for row in features]
    Path(f"{folder}/images.txt").write_text("\n".join(lines) + "\n")
    write_liblinear(f"{folder}/two.model", model, classes=2)
    least, labels = {}, {}
    for _ in range(ROUNDS):
        for name, program, file in (
            ("predict", "liblinear-predict", "linear.model"),
            ("predict, one machine", "liblinear-predict", "two.model"),
            ("svm-predict", "svm-predict", "svm.model"),
        ):
            before = spent_by_children()
            run([program, f"{folder}/images.txt", f"{folder}/{file}", f"{folder}/out"])
            micros = (spent_by_children() - before) / IMAGES * 1e6
            least[name] = min(least.get(name, 1e9), micros)
            labels[name] = np.loadtxt(f"{folder}/out").astype(int)
    one = least.pop("predict, one machine")
    del labels["predict, one machine"]
    least["predict, scoring alone"] = (least["predict"] - one) * 10 / 9
    return least, labels


def spent_by_children():
    """CPU time of the processes that have ended, to the microsecond."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# ---- Results ----


def table(least, agreement, commands):
    lines = ["µs per image on one core", f"{'':<36}{'one':>9}{'64':>9}{'256':>9}{'10,000':>9}   agreement"]
    for name, batches in least.items():
        cells = "".join(f"{batches[batch]:9.3f}" if batch in batches else " " * 9 for batch in BATCHES)
        lines.append(f"{name:<36}{cells}   {agreement[name]}")
    lines += [f"{name + ', command line':<36}{micros:9.3f}" for name, micros in commands.items()]
    for ours in ("ours, raw", "ours, conv"):
        peers = [name for name in least if name != ours and ("conv" in name) == ("conv" in ours)]
        for batch in BATCHES:
            others = [(least[name][batch], name) for name in peers if batch in least[name]]
            if others:
                best, name = min(others)
                lines.append(f"{ours}, {batch:>6} at once: {best / least[ours][batch]:6.2f} times as fast as {name}")
    return lines


def speed_text(speeds):
    lines = []
    for name, figures in speeds.items():
        lines.append(f"speed, {name}")
        lines += [f"  {key:<62}{value:10.3f}" for key, value in flat(figures)]
    return lines


def flat(figures, prefix=""):
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}, ")
        elif not isinstance(value, str):
            yield prefix + name, value


def versions():
    modules = (np, sklearn, onnxruntime)
    return [", ".join(f"{module.__name__} {module.__version__}" for module in modules)]


def keep(folder, machine, least, agreement, commands, speeds, text):
    """Writes the record."""
    figures = {}
    for name, batches in least.items():
        figures |= {f"{name}, {batch} at once, µs per image": us for batch, us in batches.items()}
    figures |= {f"{name}, answers that are ours": float(agreed) for name, agreed in agreement.items()}
    figures |= {f"{name}, command line, µs per image": micros for name, micros in commands.items()}
    for name, speed in speeds.items():
        figures |= {f"speed, {name}, {key}": float(value) for key, value in flat(speed)}
    text = [*text, *versions(), f"load average at the end: {os.getloadavg()[0]:.1f}"]
    write_record(folder, "classifier", ["bench/scripts/run.sh", "classifier"], machine, figures, text)


if __name__ == "__main__":
    main(*sys.argv[1:])
