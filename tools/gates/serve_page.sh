#!/usr/bin/env bash
# Drives the page of `lnv serve` as a person would, in Chromium: files in, answers out, on a phone, with a
# keyboard. Needs python3 with pip and Chromium, which is installed where apt-get may. LNV names a binary to
# use instead of building one, SHOTS a folder for screenshots.
source "$(dirname "$0")/common/gate.sh"
if [ -z "${CHROMIUM:-}" ]; then
    if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo 'installing chromium'
        get=(env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium)
        "${get[@]}" >"$folder/apt.log" 2>&1 || { apt-get update && "${get[@]}"; } >"$folder/apt.log" 2>&1 \
            || { tail -n 20 "$folder/apt.log"; exit 1; }
    fi
    CHROMIUM=$(command -v chromium) || { echo 'install chromium, or name a binary in CHROMIUM'; exit 1; }
fi
pip_into "$folder/client" -r "$here/serve/page.txt"
make_smollm2
build_lnv
export CHROMIUM TMPDIR=$folder
PYTHONPATH="$folder/client" timeout 600 python3 -B "$here/serve/page.py" "$folder/smollm2"
