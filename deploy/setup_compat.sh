#!/usr/bin/env bash
# Make .venv-compat with the clients and test suites that `make compat` tries. They are apart from .venv because
# litellm wants other versions of openai and huggingface-hub. Without npm, compatcanary is left out.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv-compat CANARY=compatcanary@0.2.2
readonly PACKAGES="litellm==1.106.2 langchain-openai==1.7.3 schemathesis==4.32.5"
readonly WANTED="$PACKAGES $CANARY" STAMP=$VENV/.packages

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then exit; fi
echo "setup: installing $WANTED into $VENV (300 MB)"
.venv/bin/python -m venv --clear "$VENV"
# shellcheck disable=SC2086
"$VENV/bin/pip" install -qq --disable-pip-version-check $PACKAGES
if command -v npm >/dev/null; then
    npm install --silent --no-audit --no-fund --prefix "$VENV" "$CANARY"
else
    echo "setup: no npm here: compatcanary is left out"
fi
echo "$WANTED" >"$STAMP"
