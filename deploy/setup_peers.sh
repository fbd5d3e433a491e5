#!/usr/bin/env bash
# Make .venv-peers with the routers that `pd-serve bench compare` measures ours against: theirs are other versions of
# packages that we need too, so they get an environment of their own. A second run finds its stamp and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv-peers LOCK=deploy/peers.lock
export PIP_DISABLE_PIP_VERSION_CHECK=1

if cmp -s "$LOCK" "$VENV/.locked-packages"; then exit; fi
echo "setup: installing vllm-router and sglang-router into $VENV"
"${PYTHON:-.venv/bin/python}" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install -qq --no-deps --progress-bar off -r "$LOCK"
cp "$LOCK" "$VENV/.locked-packages"
