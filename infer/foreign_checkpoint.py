"""Open another project's decoder checkpoint: which it is, its configuration, and where each of our tensors comes from.

Names and shapes are checked from the files' headers, before anything is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.bundle import build_decoder
from plait.infer.shards import LazyFile, check_finite, file_hash, let_go
from plait.model.checkpoints import EMBEDDING, HEAD, find_names, is_surplus, join_meta, meta_name
from plait.model.config import DecoderConfig
from plait.model.foreign_config import from_transformers, is_token_id, text_config
from plait.model.meta_config import from_params, params_of
from plait.tokenizers.base import read_json

# --from → the family of its sequences and the model_types that such a checkpoint may have; a Meta layout has none.
_TEXT = ("llama", "mistral", "qwen2", "qwen3")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf": ("", ()),
    "llama": ("text", ("llama",)),
    "mistral": ("text", ("mistral",)),
    "qwen": ("text", ("qwen2", "qwen3")),
    "emu3": ("emu3", ("Emu3", "emu3", "emu3_text_model", "llama", "mistral")),
    "emu3.5": ("emu3.5", ("Emu3", "qwen3")),
    "chameleon": ("chameleon", ("chameleon",)),
    "anole": ("chameleon", ("chameleon",)),
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Checkpoint:
    """An open checkpoint.

    Attributes:
        folder: where it is.
        family: of its sequences: "text", "emu3", "emu3.5" or "chameleon".
        config: the decoder's architecture.
        context: longest sequence in tokens.
        files: its weights.
        sources: our name → where its parts are, one for each tensor-parallel shard.
        join: our name and the parts → our tensor.
        rest: tensors that are not the decoder's, the vision tokenizer's, by their names.
        settings: its config.json; empty for Meta's layout.
        kept: token ids, for an export.
    """

    folder: Path
    family: str
    config: DecoderConfig
    context: int
    files: list[LazyFile]
    sources: dict[str, list[tuple[LazyFile, str]]]
    join: Callable[[str, Sequence[Tensor]], Tensor]
    rest: dict[str, LazyFile] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One of our tensors, perhaps in mapped memory.

        Raises:
            PlaitError: it holds values that are not finite.
        """
        let_go(self.files, [file for file, _ in self.sources[name]])
        parts = [(file.read(theirs), file, theirs) for file, theirs in self.sources[name]]
        for part, file, theirs in parts:
            check_finite(theirs, part, file.path)
        return self.join(name, [part for part, *_ in parts])

    def meta(self) -> dict[str, Tensor]:
        """Our tensors on the meta device, in the order in which the files hold them."""
        order = {file.path: {name: i for i, name in enumerate(file.meta)} for file in self.files}
        ranks = {file.path: i for i, file in enumerate(self.files)}
        firsts = {name: parts[0] for name, parts in self.sources.items()}
        names = sorted(firsts, key=lambda n: (ranks[firsts[n][0].path], order[firsts[n][0].path][firsts[n][1]]))
        return {name: self.join(name, [file.meta[theirs] for file, theirs in self.sources[name]]) for name in names}


def open_checkpoint(folder: Path, kind: str | None = None) -> Checkpoint:
    """Open a checkpoint's folder.

    Args:
        folder: transformers' (config.json), the original release's of Emu3 or Emu3.5, or one in Meta's layout
            (params.json beside consolidated files), also in a download's models/NAME.
        kind: one of `KINDS`, where the checkpoint does not say what it is.

    Raises:
        PlaitError: nothing that is known, or a file or tensor that is broken, missing, extra or of another shape.
    """
    if kind is not None and kind not in KINDS:
        raise PlaitError(f"--from: is {kind!r}, known are {', '.join(KINDS)}")
    folder = _find_folder(folder)
    if not (folder / "config.json").is_file() and any(folder.glob("consolidated*.*")):
        return _open_meta(folder, kind)
    return _open_transformers(folder, kind)


def _find_folder(folder: Path) -> Path:
    if not folder.exists():
        raise PlaitError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise PlaitError(f"{folder}: is a file; name the folder that holds the weights and their config.json")
    if (folder / "config.json").is_file() or (folder / "params.json").is_file():
        return folder
    found = sorted(path.parent for pattern in ("models/*", "*") for path in folder.glob(f"{pattern}/params.json"))
    if len(found) > 1:
        raise PlaitError(f"{folder}: holds {found[0].name} and {found[1].name}; name the folder of one")
    if not found:
        raise PlaitError(f"{folder}: holds neither config.json nor params.json; name a decoder checkpoint's folder")
    return found[0]


# transformers' layout


def _open_transformers(folder: Path, kind: str | None) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise PlaitError(f"{folder / 'config.json'}: no such file; copy it from where the weights came")
    settings = read_json(folder / "config.json")
    for name in ("vocabulary_map", "vq_config"):
        if not isinstance(settings.get(name) or {}, dict):
            raise PlaitError(f"{folder}/config.json: {name} is {str(settings[name])[:60]!r}, must be an object")
    stated = _weight_files(folder)
    files = _open_files(list(stated), shards_of_all=1)
    for file in files:
        if absent := sorted(name for name in stated[file.path] - set(file.meta) if not is_surplus(name)):
            raise PlaitError(
                f"{file.path}: tensor {absent[0]!r} is missing, which its index says is here; copy the folder again"
            )
    found = {name: file for file in files for name in file.meta}
    names = find_names(found)
    try:
        config, context = from_transformers(settings, found)
    except PlaitError as error:
        raise PlaitError(f"{folder}/{error}") from None
    if names is None:
        raise PlaitError(f"{folder}: tensor 'model.{EMBEDDING}' is missing; not a decoder's checkpoint")
    head = names.of(HEAD)
    if config.tie_embeddings and head in found:
        config = replace(config, tie_embeddings=_is_equal(found, head, names.of(EMBEDDING)))
    ours = {name.removeprefix(names.prefix) for name in found}
    decoder = build_decoder(config, ours, folder / "config.json").state_dict()
    tied = {HEAD} if config.tie_embeddings else set()
    sources = {name: [(found.get(names.of(name), files[0]), names.of(name))] for name in decoder if name not in tied}
    rest = {
        name: file
        for name, file in found.items()
        if name.startswith(("model.vqmodel.", "vqmodel.")) and settings["model_type"] in ("emu3", "chameleon")
    }
    used = {theirs for parts in sources.values() for _, theirs in parts} | set(rest) | ({head} if tied else set())
    if extra := sorted(name for name in set(found) - used if not is_surplus(name)):
        raise PlaitError(f"{found[extra[0]].path}: tensor {extra[0]!r} is extra; config.json describes another model")
    ids = {k: v for k, v in text_config(settings).items() if is_token_id(k)}
    family = _family(str(settings["model_type"]), config, kind, folder)
    opened = Checkpoint(
        folder, family, config, context, files, sources, lambda name, parts: parts[0], rest, settings, ids
    )
    _check_shapes(opened, decoder)
    return opened


def _family(model_type: str, config: DecoderConfig, kind: str | None, folder: Path) -> str:
    own = "text" if model_type in _TEXT else "emu3" if model_type.lower().startswith("emu3") else model_type
    if own == "emu3" and config.qk_norm == "rms":
        own = "emu3.5"
    if kind in (None, "hf"):
        return own
    family, types = KINDS[str(kind)]
    rms = config.qk_norm == "rms"
    if model_type not in types or (family in ("emu3", "emu3.5") and rms != (family == "emu3.5")):
        raise PlaitError(f"--from: is {kind}, and {folder}/config.json describes {own} ({model_type}); leave it out")
    return family


def _is_equal(found: Mapping[str, LazyFile], a: str, b: str) -> bool:
    """Whether two tensors are one: transformers unties a head that is stored and differs."""
    first, second = found[a], found[b]
    same = first.meta[a].shape == second.meta[b].shape and torch.equal(first.read(a), second.read(b))
    first.close()
    second.close()
    return same


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files of the one set of weights there is, safetensors before PyTorch's, and what an index says is in each."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (index := folder / f"{stem}{suffix}.index.json").is_file():
            return _indexed(index)
        if (file := folder / f"{stem}{suffix}").is_file():
            return {file: set()}
    others = sorted(folder.glob("*.safetensors.index.json"))
    if len(others) == 1:
        return _indexed(others[0])
    for suffix in (".safetensors", ".bin", ".pth", ".pt"):
        if len(files := sorted(folder.glob(f"*{suffix}"))) == 1:
            return {files[0]: set()}
        if files:
            numbered = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})" + re.escape(suffix), files[0].name)
            missing = f"{numbered[1]}{suffix}.index.json" if numbered else f"model{suffix}"
            raise PlaitError(f"{folder / missing}: no such file, and there are {len(files)} files of weights; copy it")
    raise PlaitError(f"{folder}: holds no weights, such as model.safetensors; copy the checkpoint again")


def _indexed(index: Path) -> dict[Path, set[str]]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise PlaitError(f"{index}: has no weight_map; copy the folder again")
    stated: dict[Path, set[str]] = {}
    for tensor, name in sorted(where.items(), key=lambda pair: pair[1]):
        if Path(name).name != name or "\0" in name:
            raise PlaitError(f"{index}: names {name!r}, which is outside its folder; copy the folder again")
        if not (index.parent / name).is_file():
            raise PlaitError(f"{index.parent / name}: no such file, and {index.name} names it; copy the folder again")
        stated.setdefault(index.parent / name, set()).add(tensor)
    return stated


# Meta's layout


def _open_meta(folder: Path, kind: str | None) -> Checkpoint:
    params = params_of(read_json(folder / "params.json"))
    beside = folder / "consolidate_params.json"
    parallel = {**params, **(read_json(beside) if beside.is_file() else {})}.get("model_parallel_size")
    paths = _consolidated(folder)
    if parallel is not None and (type(parallel) is not int or parallel < 1):
        raise PlaitError(f"{folder}: model_parallel_size is {parallel!r}, must be a whole number of at least 1")
    if parallel not in (None, len(paths)):
        raise PlaitError(f"{folder}: holds {len(paths)} of {parallel} consolidated files; copy the folder again")
    files = _open_files(paths, shards_of_all=len(paths))
    first = files[0]
    for name in (meta_name(HEAD), "layers.0.feed_forward.w1.weight"):
        if name not in first.meta or first.meta[name].ndim != 2:
            raise PlaitError(f"{first.path}: tensor {name!r} is missing; not a checkpoint in Meta's layout")
    rows, ffn = (first.meta[n].shape[0] * len(files) for n in (meta_name(HEAD), "layers.0.feed_forward.w1.weight"))
    chameleon = any("q_normalization" in name for name in first.meta)
    try:
        config, context = from_params(params, rows, ffn, chameleon)
    except PlaitError as error:
        raise PlaitError(f"{folder}/{error}") from None
    own = "chameleon" if chameleon else "text"
    if kind is not None and KINDS[kind][0] != own:
        raise PlaitError(f"--from: is {kind}, and {folder} holds {own}; leave it out")
    decoder = build_decoder(config, first.meta, folder / "params.json").state_dict()
    sources = {name: [(file, meta_name(name)) for file in files] for name in decoder}
    expected = {meta_name(name) for name in decoder}
    for file in files:
        if extra := sorted(name for name in set(file.meta) - expected if not is_surplus(name)):
            raise PlaitError(f"{file.path}: tensor {extra[0]!r} is extra; params.json describes another model")
    opened = Checkpoint(
        folder, own, config, context, files, sources, lambda name, parts: join_meta(name, parts, config)
    )
    _check_shapes(opened, decoder)
    return opened


def _consolidated(folder: Path) -> list[Path]:
    """Meta's files in the order of their ranks."""
    for suffix in (".pth", ".safetensors"):
        if (whole := folder / f"consolidated{suffix}").is_file():
            return [whole]
        if files := sorted(folder.glob(f"consolidated.*{suffix}")):
            for i, file in enumerate(files):
                if file.name != f"consolidated.{i:02}{suffix}":
                    raise PlaitError(f"{folder / f'consolidated.{i:02}{suffix}'}: no such file; copy the folder again")
            return files
    raise PlaitError(f"{folder}: holds no consolidated.00.pth; copy the folder again")


# Checks


def _open_files(paths: list[Path], shards_of_all: int) -> list[LazyFile]:
    """The files, each mapped again after an eighth of the largest, so that little of them stays in memory."""
    budget = max((path.stat().st_size for path in paths), default=0) // (8 * shards_of_all)
    files = [LazyFile(path, budget) for path in paths]
    seen: dict[str, LazyFile] = {}
    for file in files:
        file.close()
        if shards_of_all == 1:
            for name in file.meta:
                if name in seen:
                    raise PlaitError(f"{file.path}: tensor {name!r} is in {seen[name].path.name} too; copy it again")
                seen[name] = file
    return files


def _check_shapes(opened: Checkpoint, decoder: Mapping[str, Tensor]) -> None:
    for name, parts in opened.sources.items():
        for file, theirs in parts:
            if theirs not in file.meta:
                raise PlaitError(f"{file.path}: tensor {theirs!r} is missing; the checkpoint is not whole")
            if (dtype := file.meta[theirs].dtype) not in _FLOATS:
                raise PlaitError(f"{file.path}: tensor {theirs!r} is {dtype}, expected float32, float16 or bfloat16")
        file, theirs = parts[0]
        metas = [file.meta[theirs] for file, theirs in parts]
        try:
            joined = opened.join(name, metas)
        except (RuntimeError, IndexError, ZeroDivisionError):
            joined = None
        if len(kinds := {str(m.dtype).removeprefix("torch.") for m in metas}) > 1:
            raise PlaitError(f"{file.path}: tensor {theirs!r} is {' and '.join(sorted(kinds))} in different shards")
        if joined is None or joined.shape != decoder[name].shape:
            shapes = " and ".join(sorted({str(tuple(m.shape)) for m in metas}))
            of = f" in each of {len(parts)} files" if len(parts) > 1 else ""
            raise PlaitError(
                f"{file.path}: tensor {theirs!r} has shape {shapes}{of}, "
                f"which does not give the {tuple(decoder[name].shape)} of the configuration"
            )


_SUMS = re.compile(r"(sha256|md5)-?_?sums?(\.txt)?|checklist\.chk|.+\.(sha256|md5)(sums?)?", re.IGNORECASE)
_SUM = r"([0-9a-f]{64}|[0-9a-f]{32})"
_SUM_LINES = (
    re.compile(_SUM + r"(?:[ *]+(.*\S))?", re.IGNORECASE),
    re.compile(rf"\w+ \((.+)\) = {_SUM}", re.IGNORECASE),
)
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack")


def find_checksums(opened: Checkpoint, *others: Path | None) -> list[tuple[Path, str, Path]]:
    """Checksums of what is read that came along: (file, hexadecimal SHA-256 or MD5, where it is stated).

    Args:
        opened: the checkpoint.
        others: files or folders of its tokenizers, where they are elsewhere.

    Raises:
        PlaitError: they cannot be read.
    """
    unused = {path for path in opened.folder.iterdir() if path.suffix in _WEIGHTS} - {
        file.path for file in opened.files
    }
    folders = [opened.folder, *(path if path.is_dir() else path.parent for path in others if path is not None)]
    sums = []
    for folder in dict.fromkeys(folders):
        there = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path not in unused}
        for listing in (path for name, path in there.items() if _SUMS.fullmatch(name)):
            for name, value in _read_sums(listing):
                # With a folder before it, it is another file, perhaps of the same name.
                path = there.get(Path(name).name if name.startswith("/") else name.removeprefix("./"))
                if path not in (None, listing):
                    sums.append((path, value, listing))
    return sums


def _read_sums(listing: Path) -> Iterator[tuple[str, str]]:
    """The names and checksums in a list of them, as md5sum, sha256sum and BSD's tools write it."""
    try:
        lines = listing.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlaitError(f"{listing}: cannot be read ({error}); delete it or copy it again") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        plain, tagged = (pattern.fullmatch(line) for pattern in _SUM_LINES)
        if plain:
            yield plain[2] or listing.stem, plain[1].lower()
        elif tagged:
            yield tagged[1], tagged[2].lower()
        elif line and line[0] not in "#;":
            raise PlaitError(f"{listing}: line {number} is not a checksum and a name; delete it or copy it again")


def verify(path: Path, expected: str, stated_in: Path, advance: Callable[[int], None]) -> None:
    """Compare a file with its checksum.

    Raises:
        PlaitError: it is another.
    """
    kind = "md5" if len(expected) == 32 else "sha256"
    if file_hash(path, advance, kind) != expected:
        raise PlaitError(f"{path}: its {kind} is not the one in {stated_in.name}; it is damaged, copy it again")


def identity_of(opened: Checkpoint) -> list[list[Any]]:
    """What tells a checkpoint from a later one in the same place, without reading it.

    Raises:
        PlaitError: a file is gone.
    """
    identity = []
    for file in opened.files:
        try:
            stat = file.path.stat()
        except OSError as error:
            raise PlaitError(f"{file.path}: cannot be read ({error.strerror}); copy it again") from None
        tensors = hash_of({name: [str(m.dtype), list(m.shape)] for name, m in file.meta.items()})
        identity.append([file.path.name, stat.st_size, stat.st_mtime_ns, tensors])
    return identity


def hash_of(content: Any) -> str:
    """A short hash of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
