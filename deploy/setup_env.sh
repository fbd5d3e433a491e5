#!/usr/bin/env bash
# Make .venv with everything in requirements.lock and this project in it. A second run finds its stamps and does
# nothing; a run after an interrupted one, or after a change of the lock file, installs what is missing.
# $PYTHON chooses the interpreter; pip reads its usual configuration (index, mirror, proxy).
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly STAMP=$VENV/.locked-packages PROJECT_STAMP=$VENV/.project
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE

say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 1; }
hash_of() { cat "$@" | sha256sum | cut -d ' ' -f 1; }
is_stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

is_python_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if is_python_311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 is needed and neither python3.11 nor python3 is one; install it or set PYTHON to its path"
}

# pip would take a package for installed although its files were cut short: INSTALLER is written after them.
forget_half_installed() {
    local info
    for info in "$1"/*.dist-info; do
        if [ -d "$info" ] && ! { [ -s "$info/INSTALLER" ] && [ -s "$info/RECORD" ]; }; then rm -rf "$info"; fi
    done
    rm -rf "$1"/~*
}

install_locked_packages() {
    local pip="$VENV/bin/python -m pip" torch sources=()
    torch=$(grep '^torch==' requirements.lock)
    if ! $pip install -qqq --dry-run --no-deps "$torch" 2>/dev/null; then
        sources=(--extra-index-url https://download.pytorch.org/whl/cpu)
        say "the configured package index has no $torch: adding PyTorch's own CPU index"
    fi
    say "installing $(wc -l <requirements.lock) locked packages (3 GB; some minutes the first time)"
    $pip install -qq --no-deps --no-compile --progress-bar off ${sources[@]+"${sources[@]}"} -r requirements.lock ||
        fail "pip could not install the packages; its message is above. Run again to go on from here"
}

# In one go on all cores. Without this, an environment that sets PYTHONDONTWRITEBYTECODE (many containers do)
# compiles vLLM and torch anew in every process: 16 s instead of 6 s to import.
compile_packages() {
    say "compiling them to bytecode"
    "$VENV/bin/python" -m compileall -qq -j 0 "$1" >/dev/null 2>&1 || true # some ship files for other Pythons
}

main() {
    local locked project site_packages
    locked=$(hash_of requirements.lock)
    project=$(hash_of requirements.lock pyproject.toml)
    if is_stamped "$STAMP" "$locked" && is_stamped "$PROJECT_STAMP" "$project"; then return; fi

    if ! is_python_311 "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV"
    fi
    if ! is_stamped "$STAMP" "$locked"; then
        site_packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        forget_half_installed "$site_packages"
        install_locked_packages
        compile_packages "$site_packages"
        echo "$locked" >"$STAMP"
    fi
    say "installing pd-serve itself, editable"
    "$VENV/bin/python" -m pip install -qq --no-deps --no-build-isolation -e .
    echo "$project" >"$PROJECT_STAMP"
    say "done"
}

main
