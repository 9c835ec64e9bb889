#!/usr/bin/env bash
# Sets up if need be, then runs the tests.
#   ./deploy/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./deploy/setup.sh dev
exec .venv/bin/python -m pytest "$@"
