#!/bin/sh
# Builds dmdr-flow, dmdr-train and dmdr-evaluate with the first of podman, buildah and docker that works here.
#   BASE_IMAGE=...         a Debian with python3 and its venv module (the default is in the Containerfiles); NAME@sha256:...
#                          is the same image tomorrow
#   TAG=...                their tag (default: the project's version)
#   TORCH_INDEX_URL=...    one more package index, for example one with CPU builds of torch, of those that the lock knows
#   PIP_INDEX_URL=... PIP_EXTRA_INDEX_URL=... PIP_FIND_LINKS=...    where packages lie, as pip reads them
#   BUILD_FLAGS=...        further flags of the builder, for example --volume=/wheels:/wheels:ro
set -eu
cd "$(dirname "$0")/.."

for each in podman buildah docker; do
    if "$each" info >/dev/null 2>&1; then
        builder=$each
        break
    fi
done
if [ -z "${builder:-}" ]; then
    echo "images: none of podman, buildah and docker works here; install one (docker needs its engine running)" >&2
    exit 1
fi

if [ "$builder" = buildah ]; then layers=--layers; fi # the other two keep unchanged layers by default

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)
tag=${TAG:-$version}
if [ -n "${TORCH_INDEX_URL:-}" ]; then PIP_EXTRA_INDEX_URL="$TORCH_INDEX_URL ${PIP_EXTRA_INDEX_URL:-}"; fi

case ${BASE_IMAGE:-} in
*@sha256:*) ;;
*) echo "images: the base image is named by a tag, which may be another image tomorrow; BASE_IMAGE=NAME@sha256:... pins it" >&2 ;;
esac

# build FILE TARGET; an argument that is not set keeps the Containerfile's default.
build() {
    echo "images: dmdr-$2:$tag with $builder" >&2
    set -- "$builder" build ${layers:-} ${BUILD_FLAGS:-} --file "images/$1.Containerfile" --target "$2" \
        --tag "dmdr-$2:$tag" \
        --build-arg VERSION="$version" --build-arg REVISION="$revision" \
        ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} \
        ${PIP_INDEX_URL:+--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"} \
        ${PIP_EXTRA_INDEX_URL:+--build-arg "PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL"} \
        ${PIP_FIND_LINKS:+--build-arg "PIP_FIND_LINKS=$PIP_FIND_LINKS"} .
    "$@"
}
build flow flow
build stages train
build stages evaluate
"$builder" images | grep -E '^(REPOSITORY|[^ ]*dmdr-(flow|train|evaluate) )'
