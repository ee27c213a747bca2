#!/usr/bin/env bash
# Lets schemathesis make up requests from /openapi.json, right ones and wrong ones: `lnv serve` must answer
# each in time, as its description says, and never with a 5xx. Needs python3 with pip. LNV names a binary to
# use instead of building one, SECONDS_LONG how long.
source "$(dirname "$0")/common/gate.sh"
pip_into "$folder/client" -r "$here/serve/schemathesis.txt"
build_lnv
export TMPDIR=$folder PYTHONPATH=$folder/client
cd "$folder"
timeout 600 python3 -B "$here/serve/made_up.py" "${SECONDS_LONG:-45}"
