#!/usr/bin/env bash
# Builds the gRPC peer and runs it; it prints its address. Usage: run-grpc.sh [raw|shipped]
set -euo pipefail
cd "$(dirname "$0")"
cargo build --release --locked
exec target/release/grpc_server "$@"
