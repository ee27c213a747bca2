#!/usr/bin/env bash
# Bears `lnv serve` down with 200 clients, a third of them vanishing and a tenth sending broken media, and ends
# it in the middle. Needs python3 only. LNV names a binary to use instead of building one, SECONDS_LONG how long.
source "$(dirname "$0")/common/gate.sh"
build_lnv
timeout 900 python3 -B "$here/serve/load.py" --seconds "${SECONDS_LONG:-60}"
