#!/usr/bin/env bash
# Installs the FastAPI peer into a temporary folder and serves it on PORT, with a running Redis.
# Usage: run.sh PORT REDIS_URL
set -euo pipefail
cd "$(dirname "$0")"
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
./install.sh "$venv"
MODEL=../../../classifier/models/raw-linear.safetensors REDIS=$2 \
    "$venv/bin/python" -m uvicorn app:app --host 127.0.0.1 --port "$1" --no-access-log
