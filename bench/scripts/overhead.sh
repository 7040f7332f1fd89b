#!/usr/bin/env bash
# Measures the overhead of a memo that only misses, against its classifier asked directly. Takes
# about three minutes. Prints a table and writes the record "memo-overhead".
# Usage: bench/scripts/overhead.sh [--commit]
set -euo pipefail
. "$(dirname "$0")/common.sh"

need taskset
cargo build --release --locked
cargo build --release --locked -p afterimage-bench --bin memo_cost
target/release/memo_cost overhead target/release/afterimage "$records"
keep_records
