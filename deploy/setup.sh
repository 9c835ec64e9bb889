#!/usr/bin/env bash
# Makes .venv and installs Tora into it, unless that has been done already.
#   ./deploy/setup.sh [EXTRA ...]        for instance ./deploy/setup.sh dev
# PYTHON            the Python to use, python3 by default
# TORA_TORCH_INDEX  an index of PyTorch's CPU builds, if pip's own configuration names none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "$1" >&2
  exit 1
}

python=${PYTHON:-python3}
version=$("$python" --version 2>/dev/null) || fail "There is no $python here: set PYTHON to a Python from 3.11 to 3.13."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
  fail "$python is $version, and Tora needs Python 3.11 to 3.13: set PYTHON to one."

if [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1; then
  extras=(async_rl "$@")
else
  extras=(async_rl_cpu "$@")
fi

# A line for each extra, with a digest of what it was installed from: a later call for fewer extras changes nothing.
stamps=.venv/tora-installed
basis=$({ cat pyproject.toml && echo "$version"; } | sha256sum | cut -d' ' -f1)
missing=0
for extra in "${extras[@]}"; do
  grep -qsx "$basis $extra" "$stamps" || missing=1
done
if ((!missing)); then exit 0; fi

joined=$(IFS=, && echo "${extras[*]}")
echo "Installing tora[$joined] into $PWD/.venv with $version; the first time takes minutes."
if [[ $(.venv/bin/python --version 2>/dev/null) != "$version" ]]; then
  "$python" -m venv --clear .venv
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
  ${TORA_TORCH_INDEX:+--extra-index-url "$TORA_TORCH_INDEX"} -e ".[$joined]" >"$log" 2>&1; then
  if grep -Eq '(depends on|found for) torch==[0-9.]+\+cpu' "$log"; then
    fail "pip finds no CPU build of PyTorch: set TORA_TORCH_INDEX to PyTorch's CPU wheel index, as its Get Started page names it."
  fi
  grep -i error "$log" >&2 || tail "$log" >&2
  exit 1
fi
if grep -q 'tora-rl.* does not provide the extra' "$log"; then
  fail "pip ignored one of the extras $joined: ask for extras that pyproject.toml has."
fi
{ grep -s "^$basis " "$stamps" || true; printf '%s\n' "${extras[@]/#/$basis }"; } | sort -u >"$stamps.new"
mv "$stamps.new" "$stamps"
