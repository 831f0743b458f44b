#!/bin/sh
# Creates .venv and installs requirements.lock and the project into it. Does nothing if nothing has changed since.
#   PYTHON=...           the interpreter to use (3.11 or 3.12 are tested)
#   TORCH_INDEX_URL=...  one more package index, for example one with CPU builds of torch
#   NO_UV=1              install with pip only
set -eu
cd "$(dirname "$0")"
venv=${VENV:-.venv}

began=$(date +%s)
say() { echo "setup: $*" >&2; }

# $venv/installed is a copy of the files that decide what is installed.
inputs="setup.sh requirements.lock pyproject.toml dmdr/rewards/torchvision_shim.py"
if [ -f "$venv/installed" ] && cat $inputs | cmp -s - "$venv/installed"; then
    exit 0
fi

if [ ! -x "$venv/bin/pip" ]; then
    for python in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$python" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
            interpreter=$python
            break
        fi
    done
    if [ -z "${interpreter:-}" ]; then
        say "no Python 3.11 or newer with the venv module was found; install one or set PYTHON"
        exit 1
    fi
    say "1 of 4, creating $venv with $interpreter"
    "$interpreter" -m venv "$venv"
fi
rm -f "$venv/installed"
bin=$PWD/$venv/bin
case $venv in /*) bin=$venv/bin ;; esac

# uv does not read pip's settings. Hand it the ones that say where packages lie.
setting() { "$bin/pip" config get ":env:.$1" 2>/dev/null || "$bin/pip" config get "global.$1" 2>/dev/null || true; }
links=$(setting find-links)
index=$(setting index-url)
extra="${TORCH_INDEX_URL:-} $(setting extra-index-url)"
if [ -n "$links" ]; then export UV_FIND_LINKS="$(echo $links | tr ' ' ',')"; fi
if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
if [ "$extra" != " " ]; then export UV_EXTRA_INDEX_URL="$extra" UV_INDEX_STRATEGY=unsafe-best-match; fi
if [ -n "${TORCH_INDEX_URL:-}" ]; then export PIP_EXTRA_INDEX_URL="$extra"; fi

# Compile bytecode now, as pip does. If .venv is read-only later, each process would else compile for ten seconds.
quiet=-q
if [ -t 2 ]; then quiet=; fi # a terminal gets the progress of the downloads
with_uv() { "$bin/uv" pip install $quiet -p "$bin/python" --system-certs --compile-bytecode "$@"; }
with_pip() { "$bin/pip" install $quiet --disable-pip-version-check "$@"; }
install() {
    if [ -z "${NO_UV:-}" ] && [ -x "$bin/uv" ] && with_uv "$@"; then return; fi
    with_pip "$@"
}

say "2 of 4, installing the $(grep -c '==' requirements.lock) packages of requirements.lock, 2 to 6 GB on disk"
if [ -z "${NO_UV:-}" ]; then
    with_pip -q "uv>=0.9" || say "uv is not available, pip does the work, which takes longer"
fi
install --no-deps -r requirements.lock
say "3 of 4, what this build of torch needs besides"
install "$(grep '^torch==' requirements.lock)" # a CUDA build brings CUDA libraries that the lock does not name
say "4 of 4, the project itself"
install --no-deps --no-build-isolation -e .
# Beside a CPU build of torch, torchvision breaks every import of diffusers, also in scripts that do not import dmdr.
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp dmdr/rewards/torchvision_shim.py "$packages/torchvision_shim.py"
echo 'import torchvision_shim; torchvision_shim.install()' >"$packages/torchvision_shim.pth"
cat $inputs >"$venv/installed"
say "done in $(($(date +%s) - began)) s"
