#!/bin/bash
# make lock: requirements/*.in -> *.txt with hashes, one file for every Python and platform that we support.
set -eu -o pipefail
cd "$(dirname "$0")/../requirements"
uv="$PWD/../.pd/uv/bin/uv"
[ -x "$uv" ] || { python3 -m venv ../.pd/uv && ../.pd/uv/bin/python -m pip install -q uv; }
for name in controller dev router-sglang-router supervisor pdbench pdbench-emulate tiny-model; do
  "$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-header "$name.in" -o "$name.txt"
done
