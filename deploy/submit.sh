#!/usr/bin/env bash
# Sends this folder to a Ray cluster, runs a config there and follows it. Ctrl-C stops following it; the run goes on.
#   ./deploy/submit.sh [CONFIG] [key=value ...]        CONFIG is quickstart by default
# RAY_API_SERVER_ADDRESS  the cluster's dashboard, http://127.0.0.1:8265 by default: the local end of a tunnel
# RAY_AUTH_MODE           `token` by default, with RAY_AUTH_TOKEN or ~/.ray/auth_token; or `disabled`
# TORA_OUTPUT_ROOT        where a relative output_dir starts, on storage that the cluster's nodes share
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# == 0)) || [[ $1 == *=* ]]; then set -- quickstart "$@"; fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

# Ray kills a job 3 s after `ray job stop` unless told otherwise; a run ends its step and writes a checkpoint first.
variables='"RAY_JOB_STOP_WAIT_TIME_S": "600", "RAY_USAGE_STATS_ENABLED": "0"'
if [[ -n ${TORA_OUTPUT_ROOT:-} ]]; then variables+=", \"TORA_OUTPUT_ROOT\": \"$TORA_OUTPUT_ROOT\""; fi

ray=ray
if [[ -x .venv/bin/ray ]]; then ray=.venv/bin/ray; fi
exec "$ray" job submit --working-dir . \
  --runtime-env-json "{\"env_vars\": {$variables}, \"excludes\": [\"/tests\", \"/docs\"]}" \
  -- tora run "$@" async_rl=true
