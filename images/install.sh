#!/bin/sh
# Installs what an image is made of; the build stages of the Containerfiles call it:
#   install.sh compiler         g++ and Python's headers, for execution.compile, unless the base has them
#   install.sh packages LOCK    /opt/venv with the packages of a lock, each checked against its hash
#   install.sh project          /opt/project with the project itself, to be copied over /opt/venv
# Two steps, because packages are gigabytes and seldom change: a new commit is then a layer of 20 MB.
set -eu
into_venv() { /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir "$@"; }

case $1 in
compiler)
    include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
    wanted=
    if ! command -v g++ >/dev/null; then wanted="g++ libc6-dev"; fi
    if [ ! -f "$include/Python.h" ]; then wanted="$wanted libpython3-dev"; fi # of Debian's own Python
    if [ -n "$wanted" ]; then
        apt-get update -q
        apt-get install -q -y --no-install-recommends $wanted
        rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
    fi
    ;;
packages)
    lock=$2
    python3 -m venv /opt/pip
    python3 -m venv --without-pip /opt/venv
    awk '/^[^ ]/ { found = /^torch==/ } !found' "$lock" >rest.txt
    awk '/^[^ ]/ { found = /^torch==/ } found' "$lock" >torch.txt
    into_venv --no-deps --require-hashes -r rest.txt
    if [ -s torch.txt ]; then
        sed 's/^\(torch==[^ ]*\)/\1+cpu/' torch.txt >cpu.txt # an index that was given may have it
        into_venv --no-deps --require-hashes -r cpu.txt 2>/dev/null || into_venv --no-deps --require-hashes -r torch.txt
        if /opt/venv/bin/python needs_cuda.py; then # what a CUDA build of torch needs besides
            into_venv --no-deps --require-hashes -r cuda.lock
        fi
    fi
    cd /opt/venv/lib/python3.*/site-packages
    # Remove what nothing here imports: tests, the asynchronous half of the Kubernetes client, and the services of AWS
    # but S3 and those that give out credentials.
    find . -type d -name tests -prune -exec rm -r {} +
    rm -rf kubernetes/aio
    find botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -r {} +
    if [ -d kubernetes ]; then # 20 MB of bytecode of all APIs and models, of which DMDR uses a few
        rm -r kubernetes/client/api/__pycache__ kubernetes/client/models/__pycache__
        /opt/venv/bin/python -c "from kubernetes.client import BatchV1Api, CoreV1Api, CustomObjectsApi"
    fi
    ;;
project)
    awk '/^[^ ]/ { found = /^setuptools==/ } found' requirements.lock >setuptools.txt
    /opt/pip/bin/pip install --no-cache-dir --no-deps --require-hashes -r setuptools.txt
    /opt/pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel .
    into_venv --no-deps --prefix /opt/project /opt/wheel/*.whl
    ;;
esac
