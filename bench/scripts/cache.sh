#!/usr/bin/env bash
# Compares the cache service with redis-server and memcached, each on the first core, with the load
# on the second. Takes about five minutes. Prints a table and writes the record "cache".
# Usage: bench/scripts/cache.sh [--commit]
set -euo pipefail
. "$(dirname "$0")/common.sh"

need redis-server memcached taskset
cargo build --release --locked
cargo build --release --locked -p afterimage-bench --bin cache_peers
cargo build --release --locked -p afterimage-cache --example hit_ratio
ratios=$(mktemp)
trap 'rm -f "$ratios"' EXIT
target/release/examples/hit_ratio >"$ratios"
target/release/cache_peers target/release/afterimage "$records" "$ratios"
keep_records
