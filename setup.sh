#!/bin/sh
# Creates .venv and installs requirements.lock and the project into it. Does nothing if nothing has changed since.
#   PYTHON=...           the interpreter to use (3.11 or 3.12 are tested)
#   TORCH_INDEX_URL=...  one more package index, for example one with CPU builds of torch
#   NO_UV=1              install with pip only
set -eu
cd "$(dirname "$0")"
venv=${VENV:-.venv}

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
        echo "setup: no Python 3.11 or newer with the venv module was found; install one or set PYTHON" >&2
        exit 1
    fi
    echo "setup: creating $venv with $interpreter" >&2
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
with_uv() { "$bin/uv" pip install -q -p "$bin/python" --system-certs --compile-bytecode "$@"; }
with_pip() { "$bin/pip" install -q --disable-pip-version-check "$@"; }
install() {
    if [ -z "${NO_UV:-}" ] && [ -x "$bin/uv" ] && with_uv "$@"; then return; fi
    with_pip "$@"
}

echo "setup: installing requirements.lock" >&2
if [ -z "${NO_UV:-}" ]; then
    with_pip -q "uv>=0.9" || echo "setup: uv is not available, pip does the work" >&2
fi
install --no-deps -r requirements.lock
install "$(grep '^torch==' requirements.lock)" # a CUDA build brings CUDA libraries that the lock does not name
install --no-deps --no-build-isolation -e .
# Beside a CPU build of torch, torchvision breaks every import of diffusers, also in scripts that do not import dmdr.
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp dmdr/rewards/torchvision_shim.py "$packages/torchvision_shim.py"
echo 'import torchvision_shim; torchvision_shim.install()' >"$packages/torchvision_shim.pth"
cat $inputs >"$venv/installed"
