#!/usr/bin/env bash
# Installs the packages of the FastAPI peer into a virtual environment. Usage: install.sh FOLDER
set -euo pipefail
[ -x "$1/bin/pip" ] || python3 -m venv "$1"
"$1/bin/pip" install --quiet --disable-pip-version-check -r "$(dirname "$0")/requirements.txt"
