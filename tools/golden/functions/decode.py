"""Tokenizers: ids of texts, texts of ids, clean-up, streaming, stop strings."""

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation import TextStreamer
from transformers.generation.stopping_criteria import StopStringCriteria

from functions.store import write_json

FOLDERS = ["llama-default", "llama-gqa-linear-rope", "qwen2-windows", "longrope-layer-list", "siglip-full"]
TEXTS = [
    "", " ", "  two  spaces ", "USER: <image>\nWhat is shown in this image? ASSISTANT:", "<image><image><video>", "a<image>b <video> c",
    "漢字 and ♥ émigré ﬁ", "line\n\n\ttab\r\n", "</s><s><unk>", "the the  the", " leading", "It isn't , I 'm sure . They 've seen it !",
    "<|im_start|>user\nHi<|im_end|>\n", "1234567 3.14", "🙂👍🏽", "e\u0301 combining", "<placeholder>",
]
CLEANUP = ["a . b", "what ? yes ! no , well", "do n't", "I 'm he 's they 've we 're", "it ' s", " . . ,", "x ' y 's", "plain", "a  .b ' ' c"]


def encode_entries(tokenizer):
    for text in TEXTS:
        yield {"text": text, "ids": tokenizer(text)["input_ids"], "ids_plain": tokenizer(text, add_special_tokens=False)["input_ids"]}


def id_lists(tokenizer):
    rng = np.random.default_rng(43)
    size = len(tokenizer)
    yield []
    yield [size, size + 5, 3]
    for length in (1, 1, 1, 2, 3, 8, 20, 20):
        yield rng.integers(0, size + 3, length).tolist()
    for text in TEXTS[2:12]:
        yield tokenizer(text)["input_ids"]
    for text in ("漢♥", "é🙂"):
        yield tokenizer(text, add_special_tokens=False)["input_ids"][:-1]


def decode_entries(tokenizer):
    for ids in id_lists(tokenizer):
        yield {
            "ids": ids,
            "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "skip": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "skip_clean": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True),
            "default": tokenizer.decode(ids),
        }


class Pieces(TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


def streamed(tokenizer, prompt, new, skip_prompt):
    streamer = Pieces(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    streamer.pieces = []
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer.pieces


def stream_entries(tokenizer):
    texts = ["What is shown in this image?\nIt isn't a video.", "漢字 and 🙂 then  two\n\nlines", " spaced  out "]
    prompt = tokenizer("USER: hi ASSISTANT:")["input_ids"]
    for text in texts:
        new = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for skip in (True, False):
            yield {"prompt": prompt, "new": new, "skip_prompt": skip, "pieces": streamed(tokenizer, prompt, new, skip)}


def stop_entries(tokenizer):
    strings = [["image"], ["image?"], [" is"], ["?"], ["mage", "zzz"], ["shown in"], ["</s>"], ["n\n"]]
    ids = tokenizer("What is shown in this image? in\nthis")["input_ids"]
    for stop in strings:
        criteria = StopStringCriteria(tokenizer, stop)
        done = [bool(criteria(torch.tensor([ids[: n + 1]]), None)[0]) for n in range(len(ids))]
        yield {"stop_strings": stop, "ids": ids, "stops_after": done}


def tokenizer_section(folder_name):
    tokenizer = AutoTokenizer.from_pretrained(folder_name)
    return {
        "checkpoint": folder_name,
        "encode": list(encode_entries(tokenizer)),
        "decode": list(decode_entries(tokenizer)),
        "stream": list(stream_entries(tokenizer)),
        "stop_strings": list(stop_entries(tokenizer)),
    }


def make(folder):
    write_json(
        folder / "decode.json",
        "Tokenizers of the checkpoints. encode: `ids` with and `ids_plain` without special tokens. decode: `text` plain, `skip` without special "
        "tokens, `skip_clean` also cleaned up, `default` with the tokenizer's own clean-up setting. stream: TextStreamer's pieces (the last one "
        "is the flush). stop_strings: whether generation stops after each prefix of `ids` (index n: after n+1 ids). cleanup: in and out.",
        cleanup=[[text, PreTrainedTokenizerBase.clean_up_tokenization(text)] for text in CLEANUP],
        tokenizers=[tokenizer_section(name) for name in FOLDERS],
    )
