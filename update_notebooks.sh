#!/usr/bin/env bash
# Stamps the shared cells and rebuilds the .ipynb files from the .py files; --check only looks, and exits 1 on drift.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
exec "${PYTHON:-$default}" tools/notebooks.py "$@"
