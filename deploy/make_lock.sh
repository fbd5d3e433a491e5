#!/usr/bin/env bash
# Write requirements.lock, requirements-cpu.txt (the same without the tools of development) and
# deploy/docker/requirements-cuda.lock anew from pyproject.toml. Versions already locked are kept as far as they
# still fit; give --upgrade to take the newest ones.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
echo "lock: uv in a throwaway environment"
python3 -m venv "$tools"
"$tools/bin/pip" install -qq uv

# uv does not read pip's configuration: hand over what matters of it.
index=$("$tools/bin/pip" config get global.index-url 2>/dev/null || true)
index=${PIP_INDEX_URL:-$index}
if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"
    torch_source=()
else
    torch_source=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi

echo "lock: resolving"
cp requirements.lock "$tools/requirements.lock"
"$tools/bin/uv" pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 \
    --no-annotate --no-header --quiet --output-file "$tools/requirements.lock" \
    ${torch_source[@]+"${torch_source[@]}"} "$@"

if ! grep -q '^torch==.*+cpu$' "$tools/requirements.lock"; then
    echo "lock: error: no CPU build of torch found; add a place that has one to PIP_FIND_LINKS, or unset it" >&2
    exit 1
fi
cp "$tools/requirements.lock" requirements.lock
{
    echo "# What pd-serve needs on a CPU, for: pip install --no-deps -r requirements-cpu.txt pd_serve-*.whl"
    echo "# With their dependencies, pip would add torchvision, torchaudio and torchcodec, whose CUDA builds break vLLM."
    echo "--extra-index-url https://download.pytorch.org/whl/cpu"
    "$tools/bin/uv" pip compile pyproject.toml --extra cpu --constraints requirements.lock --python-version 3.11 \
        --no-annotate --no-header --quiet ${torch_source[@]+"${torch_source[@]}"}
} >"$tools/requirements-cpu.txt"
cp "$tools/requirements-cpu.txt" requirements-cpu.txt

# --no-config: what [tool.uv] leaves out, the CUDA build needs. No places of wheels: they may have torch for a CPU.
echo "lock: resolving for CUDA"
cp deploy/docker/requirements-cuda.lock "$tools/requirements-cuda.lock"
env -u UV_FIND_LINKS "$tools/bin/uv" pip compile --no-config pyproject.toml --extra cuda --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet \
    --output-file "$tools/requirements-cuda.lock" "$@"
cp "$tools/requirements-cuda.lock" deploy/docker/requirements-cuda.lock
echo "lock: requirements.lock holds $(wc -l <requirements.lock) packages"
