"""transformers' settings of rotary frequencies ↔ `RopeScaling`."""

import math
from typing import Any

from plait.errors import PlaitError
from plait.model.config import DecoderConfig, RopeScaling

Fields = dict[str, Any]

PARTIAL = "rotating only a part of each head is not supported"
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
        "mscale", "mscale_all_dim",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def read_rope(f: Fields, content: Fields) -> tuple[float, RopeScaling]:
    """Base and scaling, from the two fields of transformers 4 or, where the second is off, ``rope_parameters`` of 5."""
    name = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = content.get(name) or {}
    if not isinstance(rope, dict):
        raise PlaitError(f"config.json: {name} is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise PlaitError(f"config.json: {name}.rope_type is {kind!r}, known are {', '.join(_ROPE_FIELDS)}")
    partial = rope.get("partial_rotary_factor", f["partial_rotary_factor"])
    if partial not in (None, 1):
        raise PlaitError(f"config.json: partial_rotary_factor is {partial!r}; {PARTIAL}")
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind]}
    for field, value in rope.items():
        if field not in read and value is not None and (field, value) != ("factor", 1):
            raise PlaitError(f"config.json: {name}.{field} is {value!r}; this field is not known with {kind!r}")
    theta = rope.get("rope_theta") or f["rope_theta"]
    if kind == "default":
        return theta, RopeScaling()
    context = f["max_position_embeddings"]
    trained = content.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    trained = context if kind == "dynamic" else trained or context
    optional = {k: rope[k] for k in ("low_freq_factor", "high_freq_factor", "truncate") if rope.get(k) is not None}
    optional |= {k: rope[k] for k in ("beta_fast", "beta_slow") if rope.get(k)}
    try:
        factor = rope.get("factor") or (context / trained if kind == "yarn" else None)
        if kind == "yarn":
            optional["attention_factor"] = _attention_factor(rope, float(factor or 0))
        return theta, RopeScaling(kind, factor, 0 if kind == "linear" else trained, **optional)  # type: ignore[arg-type]
    except (PlaitError, TypeError, ValueError) as error:
        raise PlaitError(f"config.json: {name}: {error}") from None


def _attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's factor on queries and keys; 0 where it follows from ``factor`` alone."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return 0.0


def write_rope(config: DecoderConfig) -> Fields:
    """``rope_parameters`` of a decoder."""
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling.kind == "ntk":  # a change of the base, and nothing else
        theta *= scaling.factor ** (config.head_size / max(1, config.head_size - 2))
    kind = "default" if scaling.kind in ("none", "ntk") else scaling.kind
    rope: Fields = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = scaling.factor
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = scaling.original_context
    if kind == "llama3":
        rope |= {k: getattr(scaling, k) for k in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        rope |= {k: getattr(scaling, k) for k in ("beta_fast", "beta_slow", "truncate")}
        if scaling.attention_factor:
            rope["attention_factor"] = scaling.attention_factor
    return rope


def older_rope(rope: Fields) -> Fields | None:
    """``rope_scaling`` of earlier versions."""
    if rope["rope_type"] == "default":
        return None
    return {"type": rope["rope_type"], **rope}
