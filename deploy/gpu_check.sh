#!/usr/bin/env bash
# Sets up if need be, then checks and measures Tora on this machine's GPU, step by step.
#   ./deploy/gpu_check.sh [--dry-run] [--model FOLDER] [--big-model FOLDER] [--only STEP] [--again STEP] [--fresh]
# Call it again to continue. The figures end in outputs/gpu_check/report.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./deploy/setup.sh dev
exec .venv/bin/python -m tora.bench.gpu_check "$@"
