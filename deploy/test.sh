#!/usr/bin/env bash
# Sets up if need be, then runs the tests, all of them in two processes.
#   ./deploy/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./deploy/setup.sh dev
if (($# == 0)); then set -- -n 2; fi
exec .venv/bin/python -m pytest "$@"
