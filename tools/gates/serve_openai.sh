#!/usr/bin/env bash
# Checks `lnv serve` with the official OpenAI client and with curl, unchanged: what they are promised they
# get. The built-in model answers about its clips; JSON and long answers come from SmolLM2 (see accuracy.sh).
# Needs python3 with pip, and curl. LNV names a binary to use instead of building one.
source "$(dirname "$0")/common/gate.sh"
pip_into "$folder/client" -r "$here/serve/openai.txt"
make_smollm2
build_lnv
export TMPDIR=$folder
PYTHONPATH="$folder/client" timeout 600 python3 -B "$here/serve/openai_client.py" "$folder/smollm2"
timeout 120 python3 -B "$here/serve/curl.py"
