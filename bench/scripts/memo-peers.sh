#!/usr/bin/env bash
# Compares the memo with the classifier asked directly, with gRPC (tonic) and with FastAPI +
# scikit-learn + Redis: servers on the first core, the load on the second. Takes about four minutes
# after the build. Writes the record "memo-peers". Usage: bench/scripts/memo-peers.sh [--commit]
#
# The Python packages of FastAPI go into a temporary folder, or into PEERS_VENV, which is kept.
set -euo pipefail
. "$(dirname "$0")/common.sh"

need redis-server taskset python3
cargo build --release --locked
cargo build --release --locked -p afterimage-bench --bin memo_peers --bin null_server
cargo build --release --locked --manifest-path bench/peers/Cargo.toml
venv=${PEERS_VENV:-$(mktemp -d)}
[ -n "${PEERS_VENV:-}" ] || trap 'rm -rf "$venv"' EXIT
bench/peers/fastapi/run.sh "$venv"
target/release/memo_peers target/release/afterimage "$records" \
    bench/peers/target/release "$venv/bin/python" target/release/null_server
keep_records
