#!/usr/bin/env bash
# Lets schemathesis make up requests from /openapi.json, right ones and wrong ones: `lnv serve` must answer
# each in time, as its description says, and never with a 5xx. Needs python3 with pip. LNV names a binary to
# use instead of building one, SECONDS_LONG how long.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps \
    --target "$folder/client" -r "$here/serve/schemathesis.txt"
if [ -z "${LNV:-}" ]; then
    cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-cli
    LNV=$("$root/tools/setup/target_dir.sh")/debug/lnv
fi
export LNV TMPDIR=$folder PYTHONPATH=$folder/client
cd "$folder"
timeout 600 python3 -B "$here/serve/made_up.py" "${SECONDS_LONG:-90}"
