#!/usr/bin/env bash
# Bears `lnv serve` down with 200 clients, a third of them vanishing and a tenth sending broken media, and ends
# it in the middle. Needs python3 only. LNV names a binary to use instead of building one, SECONDS_LONG how long.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
if [ -z "${LNV:-}" ]; then
    cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-cli
    LNV=$("$root/tools/setup/target_dir.sh")/debug/lnv
fi
export LNV
timeout 900 python3 -B "$here/serve/load.py" --seconds "${SECONDS_LONG:-120}"
