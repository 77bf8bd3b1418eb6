"""More modalities for a bundle: a larger vocabulary, a larger decoder and more tokenizers, not yet trained."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.infer.bundle import load_bundle, read_description, save_bundle
from plait.infer.shards import LazyFile, shard_files
from plait.model.grow import grow_decoder
from plait.tokenizers.loading import find_weights, load_tokenizers
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import Vocabulary


def grow_bundle(
    bundle: str | Path,
    tokenizers: str | Path,
    modalities: Iterable[str],
    out: str | Path,
    layouts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Write a copy of a bundle that has further modalities, ready to be trained on them.

    Old ids keep their places, embeddings and logits; the new ones' rows are set by `plait.model.grow.grow_rows`. The
    weights keep their dtype.

    Args:
        bundle: folder or shipped name, of a model of text alone for instance.
        tokenizers: a bundle, or a folder with one subfolder per tokenizer, that has those of the new modalities. Those
            of the bundle stay.
        modalities: the new ones, such as "audio", in the order of their blocks.
        out: folder of the new bundle; it may be the old one's.
        layouts: of several codebooks, by modality, as in `Vocabulary.grow`.
        seed: of the new rows.

    Raises:
        PlaitError: a modality is there already, is unknown or lacks its tokenizer, or a file is missing or broken.
    """
    folder = find_weights(bundle)
    dtype = stored_dtype(folder)
    old = load_bundle(folder, dtype=dtype)
    known = load_tokenizers(tokenizers) | old.tokenizers
    vocabulary = grow_vocabulary(old.vocabulary, known, modalities, layouts)
    decoder = grow_decoder(old.decoder, vocabulary.size, seed)
    with tokenizer_folder(vocabulary, [bundle, tokenizers]) as gathered:
        save_bundle(
            Path(out), decoder.config, decoder.state_dict(), vocabulary, gathered, old.generation, old.context,
            dtype,
        )  # fmt: skip


def grow_vocabulary(
    vocabulary: Vocabulary,
    tokenizers: Mapping[str, Any],
    modalities: Iterable[str],
    layouts: Mapping[str, str] | None = None,
) -> Vocabulary:
    """A vocabulary with further modalities; no id moves.

    Args:
        vocabulary: the old one.
        tokenizers: by the name of their folder.
        modalities: the new ones, in the order of their blocks.
        layouts: by modality, as in `Vocabulary.grow`.

    Raises:
        PlaitError: a modality is there already or unknown, a layout is of none of them, or a tokenizer is missing.
    """
    modalities, layouts = list(modalities), layouts or {}
    if strangers := sorted(set(layouts) - set(modalities)):
        raise PlaitError(f"layouts: names {strangers[0]!r}, the new modalities are {', '.join(modalities) or '(none)'}")
    for name in modalities:
        if name not in MODALITIES:
            raise PlaitError(f"vocabulary: no modality is called {name!r}; there are {', '.join(MODALITIES)}")
        tokenizer = MODALITIES[name].tokenizer
        if tokenizer not in tokenizers:
            raise PlaitError(f"vocabulary: {name} needs a tokenizer called {tokenizer!r}; add it")
        vocabulary = vocabulary.grow(name, tokenizer, tokenizers[tokenizer], layouts.get(name))
    return vocabulary


@contextmanager
def tokenizer_folder(vocabulary: Vocabulary, sources: Iterable[str | Path]) -> Iterator[Path]:
    """One folder with all tokenizers of a vocabulary, each a link to the first source that has it, for so long.

    Args:
        vocabulary: which tokenizers are needed.
        sources: bundles, or folders with one subfolder per tokenizer.

    Raises:
        PlaitError: none of them has one of the tokenizers.
    """
    folders = [find_weights(source).resolve() for source in sources]
    folders = [folder / "tokenizers" if (folder / "tokenizers").is_dir() else folder for folder in folders]
    with tempfile.TemporaryDirectory() as temporary:
        for name in vocabulary.tokenizers:
            found = [folder / name for folder in folders if (folder / name).is_dir()]
            if not found:
                raise PlaitError(f"{folders[-1] / name}: no such tokenizer; add it")
            (Path(temporary) / name).symlink_to(found[0])
        yield Path(temporary)


def stored_dtype(bundle: Path) -> torch.dtype:
    """The dtype that a bundle's weights are stored in.

    Raises:
        PlaitError: they are quantized, and cannot be changed.
    """
    content, _, _ = read_description(bundle)
    if content.get("quantization"):
        raise PlaitError(f"{bundle}: the weights are quantized; start from the bundle that they were made from")
    return next(iter(LazyFile(shard_files(bundle)[0], 0).meta.values())).dtype
