#!/usr/bin/env bash
# Measures the load generator: one thread on the first core, a server that only answers on the
# second. Writes the record "generator". Usage: bench/scripts/generator.sh [--commit]
set -euo pipefail
. "$(dirname "$0")/common.sh"

cargo build --release --locked -p afterimage-bench --bin null_server
target/release/null_server all "$records"
keep_records
