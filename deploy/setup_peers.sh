#!/usr/bin/env bash
# Make .venv-peers with the public routers that `python -m loadtests.bench compare` measures. They need other
# versions of packages that pd-serve needs too, so they get an environment of their own. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv-peers LOCK=deploy/peers.lock
export PIP_DISABLE_PIP_VERSION_CHECK=1

if cmp -s "$LOCK" "$VENV/.locked-packages"; then exit; fi
echo "setup: installing vllm-router and sglang-router into $VENV"
"${PYTHON:-.venv/bin/python}" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install -qq --no-deps --progress-bar off -r "$LOCK"
cp "$LOCK" "$VENV/.locked-packages"
