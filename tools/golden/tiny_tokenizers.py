"""Small tokenizers of the published families, trained on corpus.LINES."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast

from corpus import LINES

BYTES = [f"<0x{i:02X}>" for i in range(256)]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MEDIA_TOKENS = ["<video>", "<image>"]


def special(text):
    return AddedToken(text, special=True, normalized=False)


def trained_pieces(extra):
    """Merges over `▁`-joined words, and the vocabulary: control tokens, bytes, letters, merged pieces."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    letters = sorted({c for line in LINES for c in line if c != " "} | {"▁"})
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=len(letters) + extra, initial_alphabet=letters, show_progress=False))
    pieces = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    return [piece for piece, _ in pieces], [tuple(m) for m in parsed_merges(raw)]


def parsed_merges(tokenizer):
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


def sentencepiece_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def llama_backend(style, extra=30):
    """style: "prepend" (legacy normalizer), "metaspace" (non-legacy pre-tokenizer)."""
    pieces, merges = trained_pieces(extra)
    vocab = {}
    for piece in ["<unk>", "<s>", "</s>", *BYTES, *pieces]:
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = sentencepiece_decoder()
    backend.add_special_tokens([special(t) for t in ("<unk>", "<s>", "</s>")])
    return backend


def llama(style="prepend", pad="<unk>", media_attributes=False, extra=30):
    backend = llama_backend(style, extra)
    more = {"image_token": "<image>", "video_token": "<video>"} if media_attributes else {}
    tokenizer = LlamaTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        padding_side="left",
        legacy=style == "prepend",
        model_max_length=4096,
        extra_special_tokens=more,
    )
    tokenizer.add_tokens([special(t) for t in MEDIA_TOKENS], special_tokens=True)
    return tokenizer


def chatml_llama(style="metaspace"):
    """A LLaMA-like tokenizer with the ChatML marks as added tokens (as Nous-Hermes-2-Yi), without bos at the front."""
    backend = llama_backend(style)
    tokenizer = LlamaTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        add_bos_token=False,
        padding_side="left",
        legacy=False,
    )
    marks = [special("<|im_start|>"), special("<|im_end|>")] + [special(t) for t in MEDIA_TOKENS]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


def qwen2(extra=50):
    """ByteLevel BPE with the Qwen2 split expression and NFC."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + extra, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA_TOKENS]
    backend.add_special_tokens([special(t) for t in names])
    return Qwen2TokenizerFast(
        tokenizer_object=backend,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *MEDIA_TOKENS],
    )


def unigram(extra=40):
    """Unigram with byte fallback, as a generic fast tokenizer. The scores are made up (unigram training is not repeatable)."""
    pieces, _ = trained_pieces(extra)
    letters = len(pieces) - extra
    scored = [(p, -6.0 - 0.01 * i if i < letters else -3.0 - 0.05 * (i - letters)) for i, p in enumerate(pieces)]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(b, -12.0) for b in BYTES] + scored
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")])
    names = ["<unk>", "<s>", "</s>", *MEDIA_TOKENS]
    backend.add_special_tokens([special(t) for t in names])
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=True, model_input_names=["input_ids", "attention_mask"],
    )


KINDS = {
    "llama-prepend": lambda: llama("prepend"),
    "llama-metaspace": lambda: llama("metaspace"),
    "llama-metaspace-media": lambda: llama("metaspace", media_attributes=True),
    "chatml-llama": chatml_llama,
    "qwen2": qwen2,
    "unigram": unigram,
}
