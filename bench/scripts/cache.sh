#!/usr/bin/env bash
# Compares the cache service with redis-server and memcached, each on the first core, with the load
# on the second. Takes about five minutes. Prints a table and writes the record "cache".
# Usage: bench/scripts/cache.sh [--commit]
set -euo pipefail
. "$(dirname "$0")/common.sh"

need redis-server memcached taskset
cargo build --release --locked
cargo build --release --locked -p afterimage-bench --bin cache_peers
ratios=$(mktemp)
trap 'rm -f "$ratios"' EXIT
cargo bench --locked -p afterimage-cache --bench hit_ratio >"$ratios"
target/release/cache_peers target/release/afterimage "$records" "$ratios"
keep_records
