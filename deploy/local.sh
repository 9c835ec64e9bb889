#!/usr/bin/env bash
# Sets up if need be, then trains on this machine.
#   ./deploy/local.sh [CONFIG] [key=value ...]        CONFIG is quickstart by default
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$root/deploy/setup.sh"
if (($# == 0)) || [[ $1 == *=* ]]; then set -- quickstart "$@"; fi
exec "$root/.venv/bin/tora" run "$@"
