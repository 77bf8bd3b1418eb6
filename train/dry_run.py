"""What a run would cost, before it runs: `plait train RECIPE --dry-run`.

Everything is computed from the recipe. The model exists in shape only (on PyTorch's meta device), so that 34 B
parameters need neither memory nor time; shards, tokenizers and the bundle to start from count if they are there.
"""

import dataclasses
from typing import Any

from plait.errors import PlaitError
from plait.infer.bundle import read_description
from plait.model.config import DecoderConfig
from plait.model.cost import (
    Learning,
    cache_bytes,
    count_activations,
    count_parameters,
    decode_bytes,
    forward_flops,
    training_flops,
)
from plait.model.decoder import Decoder
from plait.model.hollow import hollow
from plait.model.lora import LoRALinear
from plait.tokenizers.loading import find_weights
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.adapt import NEW, build_vocabulary, freeze
from plait.train.engine import divide_batch
from plait.train.memory import ModelSize, training_memory
from plait.train.recipe import DecoderRecipe

_WORLD_SIZES = (1, 2, 4, 8, 64, 512)


def dry_run(recipe: DecoderRecipe, world_size: int | None = None, tflops: float | None = None) -> dict[str, Any]:
    """The figures of a run, in parameters, tokens, FLOPs, bytes and seconds.

    Args:
        recipe: the run.
        world_size: number of processes; by default the largest of 1, 2, 4, 8, 64 and 512 that the streams allow.
        tflops: 10¹² FLOPs that each process sustains per second, for an estimate of the time.

    Raises:
        PlaitError: the vocabulary's size is not known, or the recipe freezes or trains what is not there.
    """
    notes: list[str] = []
    config, vocabulary, old_size = _find_architecture(recipe, notes)
    size, learning = _measure(recipe, config, vocabulary, old_size, notes)
    counted, length = count_parameters(config), recipe.sequence.length
    recompute, value_bytes = recipe.parallel.checkpoint_activations, 2 if recipe.parallel.dtype == "bfloat16" else 4
    forward = forward_flops(config, [length])
    training = training_flops(config, [length], recompute=recompute, learning=learning)
    tokens = recipe.global_batch * length
    facts: dict[str, Any] = {
        "model": dataclasses.asdict(config),
        "parameters": {
            "total": counted.total, "embedding": counted.embedding, "head": counted.head, "block": counted.block,
            "non_embedding": counted.non_embedding, "trained": size.trained,
        },
        "tokens": {"sequence": length, "step": tokens, "run": tokens * recipe.steps},
        "flops": {
            "forward_token": {**dataclasses.asdict(forward), "total": forward.total},
            "training_token": {**dataclasses.asdict(training), "total": training.total},
            "step": training.total * tokens,
            "run": training.total * tokens * recipe.steps,
        },
        "decoding": {
            "weights": 2 * counted.total, "cache_position": cache_bytes(config), "step": decode_bytes(config, length),
        },
        "start": (value_bytes if recipe.init else 4) * counted.total,
        "steps": recipe.steps,
        "parallel": dataclasses.asdict(recipe.parallel),
        "notes": notes,
        "runs": [],
    }  # fmt: skip
    for processes in [world_size] if world_size else [n for n in _WORLD_SIZES if recipe.streams % n == 0][-4:]:
        batch = _divide(recipe, processes)
        activations = count_activations(
            config, batch["micro_batch"] * length, value_bytes, recompute=recompute, learning=learning
        )
        memory = [training_memory(size, activations, value_bytes, zero, processes) for zero in range(4)]
        run = {"world_size": processes, **batch, "memory": [{**vars(m), "peak": m.peak} for m in memory]}
        if tflops:
            seconds = facts["flops"]["step"] / (processes * tflops * 1e12)
            run |= {"step_seconds": seconds, "run_days": seconds * recipe.steps / 86400}
        facts["runs"].append(run)
    return facts


def _find_architecture(recipe: DecoderRecipe, notes: list[str]) -> tuple[DecoderConfig, Vocabulary | None, int]:
    """The architecture with its vocabulary's size, the vocabulary if there is one, and the size of init's."""
    vocabulary, config, old_size = None, recipe.model, 0
    reason = ""
    if recipe.init:
        try:
            _, config, vocabulary = read_description(find_weights(recipe.init))
            old_size = vocabulary.size
        except PlaitError as error:
            reason = str(error)
            notes.append(f"the architecture is the recipe's, not init's ({reason})")
    try:
        vocabulary = build_vocabulary(recipe)
    except PlaitError as error:
        reason = reason or str(error)
        if not notes:
            notes.append(f"the vocabulary is {'init' if vocabulary else 'the recipe'}'s, not the data's ({reason})")
    size = vocabulary.size if vocabulary else recipe.model.vocabulary_size
    if not size:
        raise PlaitError(f"model.vocabulary_size: is not known ({reason}); add model.vocabulary_size=N")
    if recipe.model.vocabulary_size not in (0, size):
        notes.append(f"model.vocabulary_size is {recipe.model.vocabulary_size}, but the vocabulary of this run {size}")
    return dataclasses.replace(config, vocabulary_size=size), vocabulary, old_size


def _measure(
    recipe: DecoderRecipe, config: DecoderConfig, vocabulary: Vocabulary | None, old_size: int, notes: list[str]
) -> tuple[ModelSize, Learning]:
    """Numbers of parameters, and what of them learns."""
    # Quantizing needs weights; what would be quantized is counted apart instead.
    plan = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, quantize=""))
    if recipe.rows and not vocabulary:
        notes.append("how many rows learn is not known, all are counted")
        matrices = ["embed_tokens.weight", "lm_head.weight"]
        named = any(name in recipe.train for name in matrices)
        plan = dataclasses.replace(plan, rows=[], train=recipe.train if named else [*recipe.train, *matrices])
    elif vocabulary and NEW in recipe.rows and vocabulary.size == old_size:
        notes.append("how many rows are new is not known, none are counted")
        plan = dataclasses.replace(plan, rows=[name for name in recipe.rows if name != NEW])
    with hollow():
        decoder = Decoder(config)
        if recipe.init:
            if not (plan.train or plan.rows or plan.lora.rank) and recipe.rows:
                decoder.requires_grad_(False)
            freeze(decoder, plan, vocabulary or Vocabulary(), old_size)
    bits = {"": 0, "int8": 8, "int4": 5}[recipe.lora.quantize]  # 4, and 32 of scale and zero point for every 32
    quantized: list[Any] = [
        module.base.weight for module in decoder.modules() if isinstance(module, LoRALinear) and bits
    ]
    return ModelSize.of(decoder, quantized, bits), _find_learning(decoder)


def _find_learning(decoder: Decoder) -> Learning:
    """What learns, by ``requires_grad``."""
    config = decoder.config
    learns = [any(p.requires_grad for p in module.parameters()) for module in (decoder.embed_tokens, *decoder.layers)]
    first = learns.index(True) if True in learns else config.layers + 1
    matrices = sum(p.numel() for p in decoder.layers.parameters() if p.requires_grad and p.ndim == 2)
    return Learning(
        depth=min(config.layers, config.layers - first + 1),
        weights=matrices / (config.layers * count_parameters(config).projections),
        head=any(p.requires_grad for p in decoder.lm_head.parameters()),
    )


def _divide(recipe: DecoderRecipe, world_size: int) -> dict[str, Any]:
    """How a process works through its share of the batch, or why it cannot."""
    try:
        micro_batch, passes = divide_batch(recipe, world_size)
    except PlaitError as error:
        return {"micro_batch": min(recipe.micro_batch, recipe.global_batch), "passes": 0, "problem": str(error)}
    return {"micro_batch": micro_batch, "passes": passes, "problem": ""}


def describe(facts: dict[str, Any]) -> str:
    """The figures as text."""
    model, parameters, tokens, flops = (facts[name] for name in ("model", "parameters", "tokens", "flops"))
    forward, decoding = flops["forward_token"], facts["decoding"]
    shares = ", ".join(f"{n} {100 * forward[n] / forward['total']:.0f} %" for n in ("projections", "attention", "head"))
    head = _short(parameters["head"]) if parameters["head"] else "the embedding"
    rows = {
        "model": f"{model['layers']} blocks of width {model['width']:,}; {model['heads']} query and "
        f"{model['kv_heads']} key/value heads of {model['head_size']}; feed-forward {model['ffn_width']:,}; "
        f"vocabulary {model['vocabulary_size']:,}",
        "parameters": f"{parameters['total']:,}: embedding {_short(parameters['embedding'])}, each block "
        f"{_short(parameters['block'])}, head {head}; {_short(parameters['trained'])} learn",
        "a step": f"{tokens['step']:,} tokens, {_short(flops['step'])}FLOP; {facts['steps']:,} steps: "
        f"{_short(tokens['run'])} tokens, {flops['run']:.3g} FLOP",
        "a token": f"{_short(flops['training_token']['total'])}FLOP in training, {_short(forward['total'])}FLOP in a "
        f"forward pass ({shares})",
        "decoding": f"weights {_gib(decoding['weights'])} GiB in bfloat16, cache "
        f"{decoding['cache_position'] / 1024:.4g} KiB a position; the step at position {tokens['sequence']:,} reads "
        f"{_gib(decoding['step'])} GiB",
        "start": f"each process first holds the whole model in host memory: {_gib(facts['start'])} GiB",
    }
    lines = [f"{name:<11} {text}" for name, text in rows.items()]
    lines += [f"note        {text}" for text in facts["notes"]]
    return "\n".join([*lines, "", *_memory_table(facts["runs"], facts["parallel"])])


def _memory_table(runs: list[dict[str, Any]], parallel: dict[str, Any]) -> list[str]:
    recompute = "with" if parallel["checkpoint_activations"] else "without"
    about = f"an estimate; {parallel['dtype']}, {recompute} activation checkpointing; * marks the recipe's ZeRO stage"
    lines = [f"GiB on each device: {about}"]
    names = ("parameters", "gradients", "optimizer", "activations", "communication", "update", "peak")
    lines.append(f"{'processes':>9}  {'batch':>9}  ZeRO  " + "  ".join(f"{name:>{_column(name)}}" for name in names))
    for run in runs:
        for zero, memory in enumerate(run["memory"]):
            batch = f"{run['passes']} × {run['micro_batch']}" if run["passes"] else "-"
            start = f"{run['world_size']:>9}  {batch:>9}" if zero == 0 else " " * 20
            numbers = "  ".join(f"{_gib(memory[name]):>{_column(name)}}" for name in names)
            lines.append(f"{start}  {'*' if zero == parallel['zero'] else ' '} {zero}   {numbers}")
        if run["problem"]:
            lines.append(f"           cannot run: {run['problem']}")
        if "step_seconds" in run:
            lines.append(f"           {run['step_seconds']:.3g} s a step, {run['run_days']:.3g} days in all")
    return lines


def _column(name: str) -> int:
    return max(8, len(name))


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f}"


def _short(number: float) -> str:
    """As in "8.49 G"; the unit follows."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g} "
