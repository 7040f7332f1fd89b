#!/usr/bin/env bash
# Scores an RBF model of LIBSVM with more than 9,000 support vectors, with svm-predict and with
# Afterimage, on the second core in turn. Trains the model first, unless MODEL is given; it contains
# MNIST images and is deleted. Writes the record "kernel-svm".
# Usage: bench/scripts/kernel-svm.sh [--commit] MNIST_DIR [MODEL]
set -euo pipefail
here=$PWD
. "$(dirname "$0")/common.sh"

[ ${#args[@]} -gt 0 ] || { echo "usage: bench/scripts/kernel-svm.sh [--commit] MNIST_DIR [MODEL]" >&2; exit 2; }
paths=()
for path in "${args[@]}"; do paths+=("$(cd "$here" && realpath "$path")"); done
need svm-train svm-predict taskset
cargo build --release --locked --example kernel_svm
taskset -c 1 target/release/examples/kernel_svm "${paths[0]}" "$records" "${paths[@]:1}"
keep_records
