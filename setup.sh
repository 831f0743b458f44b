#!/bin/sh
# Creates .venv and installs requirements.lock and the project into it. Does nothing if nothing has changed since.
#   PYTHON=...           the interpreter to use (3.11 or 3.12 are tested)
#   TORCH_INDEX_URL=...  one more package index, for example one with CPU builds of torch, whose hashes no lock knows
#   NO_UV=1              install with pip only
set -eu
cd "$(dirname "$0")"
venv=${VENV:-.venv}

began=$(date +%s)
say() { echo "setup: $*" >&2; }

# $venv/installed is a copy of the files that decide what is installed.
inputs="setup.sh requirements.lock images/cuda.lock pyproject.toml dmdr/rewards/torchvision_shim.py"
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

# Every package is checked against the hash in the lock. awk: the entries of a lock whose names match, or do not.
entries() { awk -v names="^($2)\$" -v wanted="$1" '/^[^ ]/ { split($0, part, "=="); found = (part[1] ~ names) } found == wanted' requirements.lock; }
checked() { install --no-deps --require-hashes "$@"; }
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

say "2 of 4, installing the $(grep -c '==' requirements.lock) packages of requirements.lock, 2 to 6 GB on disk"
if [ -z "${NO_UV:-}" ]; then
    entries 1 uv >"$work/uv.txt"
    with_pip -q --no-deps --require-hashes -r "$work/uv.txt" || say "uv is not available, pip does the work, which takes longer"
fi
if [ -n "${TORCH_INDEX_URL:-}" ]; then # a build of torch that the user names
    entries 0 'torch|torchvision' >"$work/rest.txt"
    checked -r "$work/rest.txt"
    install $(entries 1 'torch|torchvision' | sed -n 's/^\([^ ]*==[^ ]*\).*/\1/p')
else
    entries 0 torch >"$work/rest.txt"
    entries 1 torch >"$work/torch.txt"
    checked -r "$work/rest.txt"
    sed 's/^\(torch==[^ ]*\)/\1+cpu/' "$work/torch.txt" >"$work/cpu.txt" # pip's settings may name a place that has it
    checked -r "$work/cpu.txt" 2>/dev/null || checked -r "$work/torch.txt"
    say "3 of 4, what this build of torch needs besides"
    if "$bin/python" images/needs_cuda.py; then checked -r images/cuda.lock; fi
fi
say "4 of 4, the project itself"
install --no-deps --no-build-isolation -e .
# Beside a CPU build of torch, torchvision breaks every import of diffusers, also in scripts that do not import dmdr.
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp dmdr/rewards/torchvision_shim.py "$packages/torchvision_shim.py"
echo 'import torchvision_shim; torchvision_shim.install()' >"$packages/torchvision_shim.pth"
cat $inputs >"$venv/installed"
say "done in $(($(date +%s) - began)) s"
