"""Adapting a model that is there: what a run starts from, what of it trains, and the bundle that comes out.

A run with ``init`` starts from that bundle, grown by the modalities that the shards hold and it lacks. What is frozen
is in no optimizer and no checkpoint, and is read from ``init`` again for the bundle: it cannot change.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.adapter import attach, merge, save_adapter
from plait.infer.bundle import load_bundle, load_decoder, read_description, save_bundle
from plait.infer.grow import grow_vocabulary, stored_dtype, tokenizer_folder
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.grow import grow_decoder
from plait.model.lora import add_lora, matching
from plait.model.rows import row_ids, split_rows
from plait.tokenizers.loading import find_weights, load_tokenizers
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.recipe import DecoderRecipe
from plait.train.shards import read_manifest

NEW = "new"  # in a recipe's `rows`: what the vocabulary was grown by


def build_vocabulary(recipe: DecoderRecipe) -> Vocabulary:
    """The vocabulary of the recipe's tokenizers, or of what it starts from, with the modalities that the shards hold.

    Raises:
        PlaitError: shards were made with different tokenizers, or with others than the run has.
    """
    tokenizers = load_tokenizers(recipe.tokenizers) if recipe.tokenizers else {}
    where, origin = dict.fromkeys(tokenizers, recipe.tokenizers), None
    if recipe.init:
        _, _, origin = read_description(find_weights(recipe.init))
        own = load_tokenizers(recipe.init) if origin.tokenizers else {}
        tokenizers, where = tokenizers | own, where | dict.fromkeys(own, recipe.init)
    present: set[str] = set()
    for folder in recipe.shards:
        manifest = read_manifest(Path(folder), "tokens")
        for row in manifest["shards"]:
            present |= set(row["codes"])
        for name, fingerprint in manifest["tokenizers"].items():
            if name not in tokenizers or tokenizers[name].fingerprint != fingerprint:
                ours = f"{where.get(name, recipe.tokenizers or recipe.init)}/{name}"
                raise PlaitError(
                    f"{folder}: was made with another {name} tokenizer than {ours} (fingerprints differ); "
                    "tokenize the data again or name the tokenizers it was made with"
                )
    wanted = [name for name in MODALITIES if name in present]
    if origin is None:
        return Vocabulary.build(tokenizers, wanted, recipe.layouts)
    return grow_vocabulary(origin, tokenizers, [m for m in wanted if m not in origin.modalities], recipe.layouts)


def build_decoder(recipe: DecoderRecipe, vocabulary: Vocabulary) -> Decoder:
    """The decoder that a run trains: new, or of ``init``, grown and with what the recipe freezes frozen.

    Raises:
        PlaitError: ``model`` is not that of ``init``, or a pattern or block matches nothing.
    """
    if recipe.init:
        folder = find_weights(recipe.init)
        _, config, _ = read_description(folder)
        check_model(recipe.model, config, folder)
        stored_dtype(folder)  # refuses quantized weights
        origin = load_decoder(folder, config, "cpu", getattr(torch, recipe.parallel.dtype))
        decoder = grow_decoder(origin, vocabulary.size, recipe.seed).requires_grad_(True).train()
        freeze(decoder, recipe, vocabulary, config.vocabulary_size)
    else:
        for name in ("train", "rows"):
            if getattr(recipe, name):
                raise PlaitError(f"{name}: needs init, a trained model of which the rest is kept; leave it out")
        if recipe.lora.rank:
            raise PlaitError("lora.rank: needs init, a trained model to learn beside; leave it out")
        decoder = Decoder(dataclasses.replace(recipe.model, vocabulary_size=vocabulary.size))
    decoder.checkpoint_activations = recipe.parallel.checkpoint_activations
    if recipe.parallel.compile:
        for block in decoder.layers:
            block.compile()
    return decoder


def check_model(wanted: DecoderConfig, found: DecoderConfig, folder: Path) -> None:
    """See that what a recipe says of the architecture is what the bundle has.

    Raises:
        PlaitError: a setting differs that is not left at its default.
    """
    default = DecoderConfig()
    for field in dataclasses.fields(DecoderConfig):
        there, here = getattr(found, field.name), getattr(wanted, field.name)
        if here not in (there, getattr(default, field.name)):
            raise PlaitError(
                f"model.{field.name}: is {here}, {folder} has {there}; leave model out, it comes from init"
            )


def freeze(decoder: Decoder, recipe: DecoderRecipe, vocabulary: Vocabulary, old_size: int) -> None:
    """Freeze what a recipe does not train, in place, and put LoRA's matrices and trained rows beside it.

    Args:
        decoder: of ``init``, grown.
        recipe: its ``train``, ``rows`` and ``lora``; with none of them everything trains.
        vocabulary: the grown one.
        old_size: ids that ``init`` has.

    Raises:
        PlaitError: a pattern or block matches nothing.
    """
    if recipe.lora.rank:
        add_lora(decoder, recipe.lora)
    elif recipe.train or recipe.rows:
        decoder.requires_grad_(False)
    named = {
        name.replace(".base.", "."): parameter
        for name, parameter in decoder.named_parameters(remove_duplicate=False) if ".lora_" not in name
    }  # fmt: skip
    chosen = matching(named, recipe.train, "train")
    for name in chosen:
        named[name].requires_grad_(True)
    if recipe.rows:
        matrices = {"embed_tokens.weight", "lm_head.weight"}
        matrices = matrices & set(chosen) or matrices
        ids = find_rows(recipe.rows, vocabulary, old_size)
        split_rows(decoder, ids, "embed_tokens.weight" in matrices, "lm_head.weight" in matrices)


def find_rows(rows: list[str], vocabulary: Vocabulary, old_size: int) -> Tensor:
    """The ids of these blocks, ascending, int64 ``[n]``; "new" is every id that ``init`` has not.

    Raises:
        PlaitError: a pattern matches no block, or nothing is new.
    """
    blocks = {block.name: block.ids for block in vocabulary.blocks}
    if vocabulary.size > old_size:
        blocks[NEW] = range(old_size, vocabulary.size)
    elif NEW in rows:
        raise PlaitError("rows: nothing is new, init has all modalities of the shards; name blocks such as visual.0")
    return torch.tensor(sorted({i for name in matching(blocks, rows, "rows") for i in blocks[name]}))


def write_bundle(recipe: DecoderRecipe, vocabulary: Vocabulary, module: Decoder, trained: dict[str, Tensor]) -> None:
    """Write what a run made: ``out/bundle``, and ``out/adapter`` if something was frozen.

    Args:
        recipe: the run.
        vocabulary: of the bundle.
        module: what was trained; only its structure is read.
        trained: the parameters that trained, by name, on the CPU.
    """
    out, sources = Path(recipe.out), [recipe.init, recipe.tokenizers]
    generation, context = recipe.generation, recipe.sequence.length
    config, dtype = module.config, getattr(torch, recipe.store or "bfloat16")
    if recipe.init:
        folder = find_weights(recipe.init)
        dtype = getattr(torch, recipe.store) if recipe.store else stored_dtype(folder)
        origin = load_bundle(folder, dtype=dtype)
        decoder = grow_decoder(origin.decoder, vocabulary.size, recipe.seed)
        if any(not parameter.requires_grad for parameter in module.parameters()):
            trained = trained | {name: ids.cpu() for name, ids in row_ids(module).items()}
            save_adapter(out / "adapter", trained, recipe.lora)
        attach(decoder, trained, recipe.lora)
        merge(decoder)
        trained, context = decoder.state_dict(), max(context, origin.context)
        names = [*origin.generation, *generation]
        generation = {name: origin.generation.get(name, {}) | generation.get(name, {}) for name in names}
    with tokenizer_folder(vocabulary, [source for source in sources if source]) as tokenizers:
        save_bundle(out / "bundle", config, trained, vocabulary, tokenizers, generation, context, dtype)
