#!/usr/bin/env bash
# Offers a memo ten times its capacity and measures its memory and its hits meanwhile. Prints the
# figures and writes the record "memo-overload".
# Usage: bench/scripts/overload.sh [--commit] [SECONDS, default 60]
set -euo pipefail
. "$(dirname "$0")/common.sh"

need taskset
cargo build --release --locked
cargo build --release --locked -p afterimage-bench --bin memo_cost
target/release/memo_cost overload target/release/afterimage "$records" "${args[0]:-60}"
keep_records
