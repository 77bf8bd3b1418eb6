"""`plait export`: a bundle as a checkpoint that other software loads, tensor by tensor.

To transformers goes what it has an architecture for: the decoder, with the text tokenizer and, for Emu3 and Chameleon,
the image tokenizer. The original releases' layouts hold the decoder alone.
"""

import mmap
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from plait.errors import PlaitError
from plait.infer.bundle import check_tensors, read_description, replace_folder
from plait.infer.foreign_checkpoint import verify
from plait.infer.import_checkpoint import DTYPES, check_target, count_bytes
from plait.infer.shards import STATE, Advance, LazyFile, cast, check_finite, let_go, shard_files, shard_limit, write_set
from plait.model.checkpoints import EMBEDDING, EMU3_WHOLE, HEAD, LLAMA, Names, meta_name, meta_shards, split_meta
from plait.model.config import DecoderConfig
from plait.model.foreign_config import model_type, to_transformers
from plait.model.meta_config import to_params
from plait.tokenizers.base import make_folder, read_json, write_json
from plait.tokenizers.foreign import read_checkpoint
from plait.tokenizers.loading import find_weights, load_tokenizer
from plait.tokenizers.vocabulary import BOS, EOS, PAD, Vocabulary

_PART = 1 << 26  # bytes of a file that are mapped for writing at once
TARGETS = ("hf", "emu3", "emu3.5", "chameleon", "llama")


@dataclass
class _Source:
    """An open bundle."""

    folder: Path
    config: DecoderConfig
    vocabulary: Vocabulary
    context: int
    origin: dict[str, Any]
    files: list[LazyFile]
    dtype: torch.dtype | None
    where: dict[str, LazyFile] = field(default_factory=dict)

    def meta(self, name: str) -> Tensor:
        tensor = self.where[name].meta[name]
        return tensor.to(self.dtype) if self.dtype else tensor

    def read(self, name: str) -> Tensor:
        file = self.where[name]
        let_go(self.files, [file])
        tensor = file.read(name)
        check_finite(name, tensor, file.path)
        return cast(name, tensor, self.dtype, file.path) if self.dtype else tensor


def export_checkpoint(
    bundle: str | Path,
    out: Path,
    to: str = "hf",
    dtype: str | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Export a bundle.

    Args:
        bundle: a path or a shipped name.
        out: the folder to write; nothing may be there.
        to: "hf" for transformers; "emu3", "emu3.5", "chameleon" and "llama" for the original releases' layouts.
        dtype: of the decoder's stored weights; the bundle's own by default.
        advance: told of (bytes done, bytes in all).

    Returns:
        what was exported, for `--json`.

    Raises:
        PlaitError: the bundle is damaged or quantized, no architecture there computes what this decoder does, or there
            is no room or no right to write.
    """
    if to not in TARGETS:
        raise PlaitError(f"--to: is {to!r}, expected {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise PlaitError(f"--dtype: is {dtype!r}, expected {', '.join(DTYPES)}")
    folder = find_weights(bundle)
    content, config, vocabulary = read_description(folder)
    if content.get("quantization"):
        raise PlaitError(f"{folder}/config.json: the weights are quantized; export the bundle that they were made from")
    out = check_target(out, folder)
    paths = shard_files(folder)
    budget = max((path.stat().st_size for path in paths if path.is_file()), default=0) // 8
    files = [LazyFile(path, budget) for path in paths]
    where = {name: file for file in files for name in file.meta}
    check_tensors(folder, config, {name: (file.path, file.meta[name].shape) for name, file in where.items()})
    origin = _read_origin(content.get("origin") or {}, folder / "config.json")
    dtypes = DTYPES[dtype] if dtype else None
    source = _Source(folder, config, vocabulary, content["context"], origin, files, dtypes, where)
    sums: dict[str, Any] = content["sha256"] if isinstance(content.get("sha256"), dict) else {}
    to_read = sum(path.stat().st_size for path in paths if path.name in sums)
    to_write = sum(source.meta(name).nbytes for name in where)
    tell = count_bytes(advance, to_read + to_write)
    for path in paths:
        if path.name in sums:
            verify(path, str(sums[path.name]), folder / "config.json", tell)

    def written(done: int, total: int) -> None:
        advance(to_read + done * to_write // max(1, total), to_read + to_write)

    partial = out.with_name(f".{out.name}.partial")
    write = _write_meta if to in ("chameleon", "llama") else _write_transformers
    facts = write(source, partial, to, written)
    (partial / STATE).unlink(missing_ok=True)
    replace_folder(out, partial)
    return {"checkpoint": str(out), "to": to, "parameters": sum(source.meta(name).numel() for name in where), **facts}


def _read_origin(origin: Any, where: Path) -> dict[str, Any]:
    """What an import has noted for this."""
    if not isinstance(origin, dict):
        raise PlaitError(f"{where}: origin is {str(origin)[:60]!r}, must be an object; restore the file")
    kinds = {"family": str, "model_type": str, "token_ids": dict, "vocabulary_map": dict, "vq_config": dict}
    for name, kind in kinds.items():
        if not isinstance(origin.get(name, kind()), kind):
            expected = "text" if kind is str else "an object"
            raise PlaitError(
                f"{where}: origin.{name} is {str(origin[name])[:60]!r}, must be {expected}; restore the file"
            )
    return origin


# transformers


def _write_transformers(source: _Source, partial: Path, to: str, advance: Advance) -> dict[str, Any]:
    """Write transformers' layout, or the original one of Emu3 and Emu3.5, which differs in its config.json only."""
    config, family = source.config, source.origin.get("family", source.vocabulary.grammar)
    kind = "Emu3" if to != "hf" else model_type(config, family, source.origin.get("model_type", ""))
    if to != "hf":
        _check_original(config, to)
    names: Names = LLAMA
    extra: dict[str, Tensor] = {}
    dtypes = {str(source.meta(name).dtype).removeprefix("torch.") for name in source.where}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    roles = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ids = {k: source.vocabulary.special(name) for k, name in roles.items() if source.vocabulary.has_special(name)}
    fields = to_transformers(kind, config, source.context, dtype, ids | source.origin.get("token_ids", {}))
    note = ""
    if kind in ("emu3_text_model", "chameleon"):
        names, extra, fields, note = _with_images(source, kind, fields)
    meta = {names.of(name): source.meta(name) for name in source.where} | {n: t.to("meta") for n, t in extra.items()}
    ours = {names.of(name): name for name in source.where}
    sizes = [[file.path.name, file.path.stat().st_size, file.path.stat().st_mtime_ns] for file in source.files]
    write_set(
        partial,
        meta,
        lambda name: source.read(ours[name]) if name in ours else extra[name],
        limit=shard_limit(source.files, meta),
        identity={"source": sizes, "to": to, "names": sorted(meta)[:1], "dtype": dtype},
        advance=advance,
    )
    write_json(partial / "config.json", fields)
    _copy_text(source, partial, fields.get("text_config", fields))
    facts: dict[str, Any] = {"architecture": fields["architectures"][0]}
    return facts | ({"note": note} if note else {})


def _check_original(config: DecoderConfig, to: str) -> None:
    norm = "rms" if to == "emu3.5" else "none"
    wanted: dict[str, Any] = {"qk_norm": norm, "qkv_bias": False, "norm_placement": "pre", "sliding_window": 0}
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise PlaitError(f"--to: {to} has {name} {value!r}, this decoder {found!r}; use --to hf")
    if config.rope_scaling.kind not in ("none", "ntk", "linear", "dynamic"):
        raise PlaitError(f"--to: {to} has no rope_scaling of kind {config.rope_scaling.kind}; use --to hf")


def _with_images(
    source: _Source, kind: str, fields: dict[str, Any]
) -> tuple[Names, dict[str, Tensor], dict[str, Any], str]:
    """Names, tensors and config.json of an architecture that holds an image tokenizer, where the bundle has it."""
    entry = source.vocabulary.modalities.get("image")
    at = source.folder / "tokenizers" / (entry.tokenizer if entry else "visual")
    wanted = "emu3" if kind == "emu3_text_model" else "vqgan"
    tokens = source.origin.get("vocabulary_map") or vocabulary_map(source)
    if not at.is_dir() or read_json(at / "config.json").get("architecture") != wanted:
        if kind == "emu3_text_model":
            return LLAMA, {}, _nested(fields), ""
        note = "without an image tokenizer: transformers says that model.vqmodel is newly initialized; text is exact"
        return LLAMA, {}, fields | {"vocabulary_map": tokens}, note
    tokenizer = load_tokenizer(at)
    stored = read_checkpoint(at / "model.safetensors")
    if kind == "chameleon":
        from plait.tokenizers.vqgan import to_transformers as images

        side = source.origin.get("vq_config", {}).get("resolution")
        side = side or max(entry.grid if entry else (), default=32) * tokenizer.factor
        tensors, vq = images(stored, tokenizer.config, side)
        fields |= {"vq_config": vq, "vocabulary_map": tokens}
        return LLAMA, {f"model.vqmodel.{name}": tensor for name, tensor in tensors.items()}, fields, ""
    from plait.tokenizers.emu3 import to_transformers as emu3_images

    tensors, vq = emu3_images(stored, tokenizer.config)
    whole = _nested(fields) | {"architectures": ["Emu3ForConditionalGeneration"], "vq_config": vq}
    whole |= {"vocabulary_map": tokens}
    return EMU3_WHOLE, {f"vqmodel.{name}": tensor for name, tensor in tensors.items()}, whole, ""


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Emu3's config.json around that of its decoder; transformers' automatic classes know it by this one only."""
    outer = ("architectures", "dtype")
    return {
        **{k: fields[k] for k in outer},
        "model_type": "emu3",
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "text_config": {k: v for k, v in fields.items() if k not in outer},
    }


_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
# The token that stands for an image in transformers' prompts: the release's own that is free for it.
_PLACEHOLDERS = ("<|extra_0|>", "<reserved08707>")


def vocabulary_map(source: _Source) -> dict[str, int]:
    """Ids of all tokens by name, those of image codes as transformers looks for them."""
    from plait.tokenizers.text_files import find_text

    vocabulary = source.vocabulary
    tokens: dict[str, int] = {}
    place = source.folder / "tokenizers" / "text"
    if place.is_dir() and (text := find_text(place, "text", vocabulary.size, None)) is not None:
        tokens |= text.tokens
    tokens |= {name: block.start + i for block in vocabulary.blocks for i, name in enumerate(block.tokens)}
    if codes := next((block for block in vocabulary.blocks if block.name == "visual.0"), None):
        is_emu3 = vocabulary.grammar.startswith("emu3")
        for code, token in enumerate(codes.ids):
            tokens[f"<|visual token {code:06}|>" if is_emu3 else f"IMGIMG{str(code).translate(_LETTERS)}Z"] = token
    free = next((name for name in _PLACEHOLDERS if name in tokens), None)
    if "<image>" not in tokens and free:
        tokens["<image>"] = tokens.pop(free)
    return dict(sorted(tokens.items(), key=lambda pair: pair[1]))


def _copy_text(source: _Source, partial: Path, fields: dict[str, Any]) -> None:
    """The text tokenizer's own files, where its ids are the decoder's, and a tokenizer_config.json for it."""
    at = source.folder / "tokenizers" / "text"
    if source.vocabulary.grammar == "plait" or not at.is_dir():
        return
    for file in sorted(at.iterdir()):
        if file.name != "config.json" and file.is_file():
            shutil.copyfile(file, partial / file.name)
    if not (partial / "tokenizer.json").is_file():
        return
    definition = read_json(partial / "tokenizer.json")
    tokens = vocabulary_map(source)
    known = set(definition["model"].get("vocab") or ()) | {t["content"] for t in definition.get("added_tokens") or ()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": token, "content": name, **plain} for name, token in tokens.items() if name not in known]
    if added:
        definition["added_tokens"] = [*(definition.get("added_tokens") or ()), *added]
        write_json(partial / "tokenizer.json", definition)
    by_id = {token: name for name, token in tokens.items()}
    roles = {
        k: by_id[fields[f"{k}_id"]] for k in ("bos_token", "eos_token", "pad_token") if fields.get(f"{k}_id") in by_id
    }
    write_json(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})


# Meta's layout


def _write_meta(source: _Source, partial: Path, to: str, advance: Advance) -> dict[str, Any]:
    """params.json and consolidated files: one, or as many as the QK-norms of a tensor-parallel model need."""
    config = source.config
    if to == "llama" and (config.qk_norm != "none" or config.norm_placement != "pre"):
        raise PlaitError("--to: llama has no QK-norm and norms before each layer; use --to chameleon or hf")
    params = to_params(config, source.context)
    norms = {name: source.read(name).clone() for name in source.where if re.search(r"\.[qk]_norm\.", name)}
    shards = meta_shards(norms, config)
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    stored = {**{name: name for name in source.where}, HEAD: HEAD if HEAD in source.where else EMBEDDING}
    metas = {meta_name(name): split_meta(name, source.meta(ours), shards, config)[0] for name, ours in stored.items()}
    plural = [f"consolidated.{i:02}.pth" for i in range(shards)]
    for file in plural:
        _reserve(partial / file, metas)
    total, done = sum(t.nbytes for t in metas.values()) * shards, 0
    for name, ours in stored.items():
        parts = split_meta(name, source.read(ours), shards, config)
        for file, part in zip(plural, parts, strict=True):
            _fill(partial / file, meta_name(name), part)
            done += part.nbytes
        advance(done, total)
        del parts, part
    if to == "chameleon":
        write_json(partial / "params.json", {"model": params})
        write_json(partial / "consolidate_params.json", {"model_parallel_size": shards})
    else:
        write_json(partial / "params.json", params)
    return {"architecture": "Chameleon" if to == "chameleon" else "Llama", "shards": shards}


def _reserve(path: Path, metas: dict[str, Tensor]) -> None:
    """A PyTorch file of these tensors whose bytes are yet to be written; takes no memory for them.

    It takes its room on the disk: to write into mapped memory where there is none ends the process.
    """
    try:
        with skip_data():
            torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in metas.items()}, path)
        if hasattr(os, "posix_fallocate"):  # macOS has none
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except (OSError, RuntimeError) as error:
        raise PlaitError(f"{path}: cannot be written ({error}); make room and run it again") from None


def _fill(path: Path, name: str, tensor: Tensor) -> None:
    """Write a tensor into a reserved file, through memory that is mapped for a part of it at a time."""
    rows = len(tensor) if tensor.ndim > 1 else 1
    step = -(-rows * _PART // max(1, tensor.nbytes))
    for start in range(0, rows, step):
        part = slice(start, start + step) if tensor.ndim > 1 else slice(None)
        with set_default_mmap_options(mmap.MAP_SHARED):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name][part].copy_(tensor[part])
