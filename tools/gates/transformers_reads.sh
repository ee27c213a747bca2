#!/usr/bin/env bash
# Checks that Transformers loads what `lnv quantize --to nf4|fp4|int8` writes, and that both quantise to the
# same weights. PYTHON names an interpreter that has Transformers, bitsandbytes and PyTorch; without it the
# gate is skipped.
source "$(dirname "$0")/common/gate.sh"
if [ -z "${PYTHON:-}" ]; then
    echo 'skipped: set PYTHON to an interpreter with transformers==4.53.3 torch==2.15.0 bitsandbytes==0.50.2' \
        'accelerate==1.15.0 (gigabytes that are not fetched on their own)'
    exit 0
fi
build_lnv
mkdir "$folder/out"
"$PYTHON" -B "$here/transformers_reads.py" "$LNV" "$root/testdata/bitsandbytes/base" "$folder/out"
