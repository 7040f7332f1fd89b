#!/usr/bin/env bash
# Measures the wire codec alone, on the first core: frames per second and cycles per frame. Writes
# the record "codec". Usage: bench/scripts/codec.sh [--commit]
set -euo pipefail
. "$(dirname "$0")/common.sh"

cargo build --release --locked -p afterimage-bench --bin codec
target/release/codec "$records"
keep_records
