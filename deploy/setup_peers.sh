#!/usr/bin/env bash
# Make .venv-peers with the public routers that `python -m loadtests.bench compare` measures. They need other
# versions of packages that pd-serve needs too, so they get an environment of their own. Ray's LLM library runs in
# that of pd-serve, and finds what else it needs in .venv-peers/ray-llm. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv-peers LOCK=deploy/peers.lock RAY_LLM_LOCK=deploy/ray_llm.lock
export PIP_DISABLE_PIP_VERSION_CHECK=1

if cat "$LOCK" "$RAY_LLM_LOCK" | cmp -s - "$VENV/.locked-packages"; then exit; fi
echo "setup: installing vllm-router and sglang-router into $VENV"
"${PYTHON:-.venv/bin/python}" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install -qq --no-deps --progress-bar off -r "$LOCK"
"$VENV/bin/python" -m pip install -qq --no-deps --progress-bar off --target "$VENV/ray-llm" -r "$RAY_LLM_LOCK"
cat "$LOCK" "$RAY_LLM_LOCK" > "$VENV/.locked-packages"
