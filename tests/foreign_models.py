"""Small text tokenizers and folders as other models' checkpoints have them, made by the libraries that they use."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plait.tokenizers.text_foreign import QWEN_PATTERN

TEXTS = [
    "a red apple on a table, drawn in ink",
    "You are a helpful assistant. USER: What is this?. ASSISTANT: It is a red apple.",
    "two dogs and a cat look at the moon, masterpiece, film grained, best quality.",
    "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 * 90*90",
]
EMU3 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", *(f"<|extra_{i}|>" for i in range(1, 205))]
EMU3_MARKS = ["<|image token|>", "<|image start|>", "<|image end|>"]
EMU3_PARTS = {
    "bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>", "image_token": "<image>",
    "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>", "eol_token": "<|extra_200|>",
}  # fmt: skip
CHAMELEON_PARTS = {
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "<reserved08706>",
    "image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>",
}  # fmt: skip


def train_bpe(special: Sequence[str] = (), size: int = 320) -> Tokenizer:
    """A byte-level BPE that cuts as Qwen's does; ``special`` come first."""
    engine = Tokenizer(models.BPE())
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(special), initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    engine.train_from_iterator(TEXTS * 4, trainer)
    return engine


def visual_tokens(family: str, codes: int) -> list[str]:
    """What a family calls its image codes."""
    if family == "chameleon":
        return ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z" for code in range(codes)]
    return [f"<|visual token {code:06d}|>" for code in range(codes)]


def emu3_tokenizer(codes: int, special_first: bool = False) -> PreTrainedTokenizerFast:
    """As Emu3's on Hugging Face, with fewer pieces and codes."""
    engine = train_bpe([*EMU3, *EMU3_MARKS] if special_first else ())
    engine.add_special_tokens([*EMU3, *EMU3_MARKS])
    engine.add_tokens(visual_tokens("emu3", codes))
    return PreTrainedTokenizerFast(tokenizer_object=engine, **_split(EMU3_PARTS))


def chameleon_tokenizer(codes: int) -> PreTrainedTokenizerFast:
    """As Chameleon's: everything but text comes first, and only four tokens are special."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *visual_tokens("chameleon", codes), "<eoss>", "<racm3:break>"]
    names += ["<reserved08706>", "<image>", "<reserved08708>"]
    engine = train_bpe(names)
    return PreTrainedTokenizerFast(tokenizer_object=engine, **_split(CHAMELEON_PARTS))


def _split(parts: dict[str, str]) -> dict[str, Any]:
    own = {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token"}
    known = {key: name for key, name in parts.items() if key in own}
    return {**known, "extra_special_tokens": {key: name for key, name in parts.items() if key not in own}}


def write_config(folder: Path, **settings: Any) -> None:
    """Write the folder's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
