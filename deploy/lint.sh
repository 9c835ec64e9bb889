#!/usr/bin/env bash
# Sets up if need be, then checks style, format and types.
#   ./deploy/lint.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./deploy/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/pyright
