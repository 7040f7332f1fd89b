#!/usr/bin/env bash
# Installs the FastAPI peer into a virtual environment and serves it on PORT, with a running Redis.
# Usage: run.sh FOLDER [PORT REDIS_URL]. Without a port it only installs. FOLDER can be used again.
set -euo pipefail
mkdir -p "$1"
venv=$(cd "$1" && pwd)
cd "$(dirname "$0")"
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
[ $# -gt 1 ] || exit 0
MODEL=../../../classifier/models/raw-linear.safetensors REDIS=$3 \
    exec "$venv/bin/python" -m uvicorn app:app --host 127.0.0.1 --port "$2" --no-access-log
