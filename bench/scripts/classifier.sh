#!/usr/bin/env bash
# Measures the classifier, and the same models in LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime,
# on one core. Takes about four minutes. Prints tables and writes the record "classifier".
# Usage: bench/scripts/classifier.sh [--commit] [MNIST_DIR, default data/mnist]
#
# Needs python3, a C compiler, and Debian's liblinear-tools and libsvm-tools. The Python packages go
# into a temporary folder.
set -euo pipefail
here=$PWD
. "$(dirname "$0")/common.sh"
data=data/mnist
[ ${#args[@]} = 0 ] || data=$(cd "$here" && realpath "${args[0]}")

need python3 cc taskset liblinear-predict svm-predict
[ -e "$data/train-images-idx3-ubyte" ] || [ -e "$data/train-images-idx3-ubyte.gz" ] ||
    { echo "$data has no train-images-idx3-ubyte" >&2; exit 1; }
cargo build --release --locked -p afterimage-classifier-tools --bins

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --requirement bench/peers/requirements.txt
cc -O3 -march=native -o "$folder/in_process" bench/peers/in_process.c -l:liblinear.so.4 -l:libsvm.so.3
# A BLAS with several threads would use more than one core.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
"$folder/venv/bin/python" bench/peers/classifier.py "$data" "$folder" "$records"
keep_records
