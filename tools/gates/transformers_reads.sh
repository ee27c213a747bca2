#!/usr/bin/env bash
# Checks that Transformers loads what `lnv quantize --to nf4|fp4|int8` writes, and that both quantise to the
# same weights. Transformers, bitsandbytes and PyTorch (its CPU build where pip finds one) go into a
# temporary folder; nothing is kept. Needs python3 with pip. PYTHON names an interpreter that has them all.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    PYTHON=$folder/venv/bin/python
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        transformers==4.53.3 torch==2.15.0 torchvision==0.29.2 pillow==11.3.0 bitsandbytes==0.50.2 accelerate==1.15.0
fi
cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-cli
target=$("$root/tools/setup/target_dir.sh")
mkdir "$folder/out"
"$PYTHON" -B "$here/transformers_reads.py" "$target/debug/lnv" "$root/testdata/bitsandbytes/base" "$folder/out"
