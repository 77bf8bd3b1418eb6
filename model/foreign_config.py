"""transformers' config.json ↔ `DecoderConfig`.

Every field is used, known to change nothing, or refused by name: a setting that is passed over is a model that is
silently another one.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from plait.errors import PlaitError
from plait.model.config import DecoderConfig
from plait.model.foreign_rope import PARTIAL, Fields, older_rope, read_rope, write_rope

# What config.json leaves out where it is the class's default; nested configurations do so in released files.
_COMMON: Fields = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
    "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": None,
}  # fmt: skip
_EMU3 = {
    "vocab_size": 184622, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "max_position_embeddings": 9216, "attention_dropout": 0.1,
}  # fmt: skip
_QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_DEFAULTS: dict[str, Fields] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096, "layer_types": None,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "emu3_text_model": _EMU3,
    "Emu3": _EMU3,
    "chameleon": {
        "vocab_size": 65536, "intermediate_size": 11008, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "swin_norm": False,
    },
}  # fmt: skip
MODEL_TYPES = (*_DEFAULTS, "emu3")

# Fields of config.json that do not change what the decoder computes. Token ids are kept for a later export.
_HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
    "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "image_area", "initializer_range", "label2id",
    "model_parallel_size", "model_type", "original_max_position_embeddings", "pretraining_tp", "problem_type",
    "return_dict", "rope_parameters", "rope_scaling", "task_specific_params", "text_config", "tokenizer_class",
    "torch_dtype", "transformers_version", "unsloth_version", "use_cache", "vocabulary_map", "vq_config",
}  # fmt: skip
_SLIDING = "sliding_attention"
_WHY = {
    "quantization_config": "the weights are quantized, which is not read; import the unquantized release",
    "mlp_bias": "biases in the feed-forward layers are not supported",
    "partial_rotary_factor": PARTIAL,
}


def is_token_id(name: str) -> bool:
    """Whether a field names a token, which matters to generation only."""
    return name.endswith(("_token_id", "_token_index"))


def from_transformers(content: Fields, tensors: Collection[str]) -> tuple[DecoderConfig, int]:
    """The decoder of a config.json, and its context in tokens.

    Args:
        content: the file.
        tensors: names of the checkpoint's tensors: Emu3 and Emu3.5 differ only there.

    Raises:
        PlaitError: an unknown architecture, a field that is not known, or a value that no decoder here has.
    """
    content = text_config(content)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise PlaitError(f"config.json: model_type is {kind!r}, known are {', '.join(MODEL_TYPES)}")
    known = {**_COMMON, **_DEFAULTS[kind]}
    refuse_unknown(content, {*known, *_HARMLESS}, "config.json")
    for name in filter(is_token_id, content):
        ids = content[name] if isinstance(content[name], list) else [content[name]]
        if any(i is not None and type(i) is not int for i in ids):
            raise PlaitError(f"config.json: {name} is {repr(content[name])[:60]}, must be a whole number")
    # A null stands for the default of these.
    f = known | {k: v for k, v in content.items() if v is not None or known.get(k) is None}
    f["sliding_window"] = content.get("sliding_window", known.get("sliding_window"))
    for name in ("attention_bias", "mlp_bias"):
        if f[name]:
            reason = _WHY.get(name, "a bias in the output projection of attention is not supported")
            raise PlaitError(f"config.json: {name} is {f[name]!r}; {reason}")
    if f["hidden_act"] not in ("silu", "swish"):
        raise PlaitError(f"config.json: hidden_act is {f['hidden_act']!r}, expected 'silu'")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings")  # fmt: skip
    for name in sizes:
        if type(f[name]) is not int or f[name] < 1:
            raise PlaitError(f"config.json: {name} is {f[name]!r}, must be a whole number of at least 1")
    is_emu3 = kind in ("Emu3", "emu3_text_model")
    rms = kind == "qwen3" or (is_emu3 and any(name.endswith("self_attn.q_norm.weight") for name in tensors))
    theta, scaling = read_rope(f, content)
    config = build_config(
        "config.json",
        vocabulary_size=f["vocab_size"],
        width=f["hidden_size"],
        layers=f["num_hidden_layers"],
        heads=f["num_attention_heads"],
        kv_heads=f["num_key_value_heads"] or f["num_attention_heads"],
        # Chameleon's heads share the width, whatever a field says.
        head_size=0 if kind == "chameleon" else f["head_dim"] or 0,
        ffn_width=f["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=f["rms_norm_eps"],
        norm_placement="post" if f.get("swin_norm") else "pre",
        qk_norm="layer" if kind == "chameleon" else "rms" if rms else "none",
        qkv_bias=kind == "qwen2",
        tie_embeddings=f["tie_word_embeddings"],
        sliding_window=_read_window(kind, f),
        dropout=f["attention_dropout"] if is_emu3 else 0.0,
        attention_dropout=f["attention_dropout"],
    )
    return config, f["max_position_embeddings"]


def text_config(content: Fields) -> Fields:
    """The part of a config.json that describes the decoder: Emu3's is nested."""
    if content.get("model_type") != "emu3":
        return content
    outer = _HARMLESS | {"tie_word_embeddings"}
    refuse_unknown(content, outer, "config.json")
    inner = content.get("text_config")
    if not isinstance(inner, dict):
        raise PlaitError("config.json: text_config is missing; copy the checkpoint again")
    tied = {"tie_word_embeddings": content["tie_word_embeddings"]} if "tie_word_embeddings" in content else {}
    return {"model_type": "emu3_text_model", **inner, **tied}


def refuse_unknown(content: Fields, known: Iterable[str], where: str) -> None:
    """Refuse fields that are neither known nor off.

    Raises:
        PlaitError: names the first.
    """
    known = set(known)
    for name, value in content.items():
        is_off = value is None or value is False or value in (0, "", [], {})
        is_noise = name.startswith(("output_", "is_encoder_decoder", "use_bfloat16", "torchscript"))
        if name in known or is_token_id(name) or is_off or is_noise:
            continue
        reason = _WHY.get(name, "this field is not known, and the model may be another one than is supported")
        raise PlaitError(f"{where}: {name} is {repr(value)[:60]}; {reason}")


def _read_window(kind: str, f: Fields) -> int:
    """Tokens in the sliding window, 0 without one; the same in every layer."""
    window, types, layers = f["sliding_window"] or 0, f.get("layer_types") or [], f["num_hidden_layers"]
    if type(window) is not int or window < 0:
        raise PlaitError(f"config.json: sliding_window is {window!r}, must be a whole number of at least 0")
    if not isinstance(types, list) or (strange := [t for t in types if t not in ("full_attention", _SLIDING)]):
        found = strange[0] if isinstance(types, list) else types
        raise PlaitError(f"config.json: layer_types has {found!r}, which is not supported")
    if kind.startswith("qwen"):
        window = window if f["use_sliding_window"] else 0
        first = f["max_window_layers"]
        if window and not types:
            if type(first) is not int or first < 0:
                raise PlaitError(f"config.json: max_window_layers is {first!r}, must be a whole number of at least 0")
            types = ["full_attention"] * min(first, layers) + [_SLIDING] * (layers > first)
    if not types:
        return window
    if len(set(types)) > 1 or (_SLIDING in types and not window):
        raise PlaitError("config.json: layer_types mixes full and sliding attention, which is not supported")
    return window if _SLIDING in types else 0


# Export to transformers

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "emu3_text_model": "Emu3ForCausalLM",
    "Emu3": "Emu3ForCausalLM",
    "chameleon": "ChameleonForConditionalGeneration",
}


def model_type(config: DecoderConfig, family: str, was: str = "") -> str:
    """The architecture of transformers that computes what this decoder does.

    Args:
        config: the decoder's.
        family: "emu3" keeps an Emu3 one where it can be.
        was: the model_type that it was imported with; "mistral" is kept where it can be.

    Raises:
        PlaitError: there is none.
    """
    if config.qk_norm == "layer":
        _need(config, "qk_norm 'layer'", qkv_bias=False, sliding_window=0, head_size=config.width // config.heads)
        return "chameleon"
    _need(config, f"qk_norm {config.qk_norm!r}", norm_placement="pre")
    if config.qk_norm == "rms":
        _need(config, "qk_norm 'rms'", qkv_bias=False)
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    if config.sliding_window:
        return "mistral"
    if family == "emu3":
        return "emu3_text_model"
    # transformers' Llama wants a width that the heads divide; its Mistral is the same decoder and does not.
    return "mistral" if was == "mistral" or config.width % config.heads else "llama"


def _need(config: DecoderConfig, having: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise PlaitError(
                f"export: no architecture of transformers has {name} {found!r} together with {having}; "
                "this decoder can only be used here"
            )


def to_transformers(kind: str, config: DecoderConfig, context: int, dtype: str, kept: Mapping[str, Any]) -> Fields:
    """The config.json of a decoder.

    Args:
        kind: as `model_type` chose it, or "Emu3" for the original release's.
        config: the decoder's.
        context: longest sequence in tokens.
        dtype: of the stored weights, as transformers names it.
        kept: token ids, as the model was imported with them.
    """
    scaling = config.rope_scaling
    rope = write_rope(config)
    fields: Fields = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        # There the dynamic scaling begins where the context ends.
        "max_position_embeddings": scaling.original_context if scaling.kind == "dynamic" else context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "Emu3":
        fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": older_rope(rope)}
    else:
        fields["rope_parameters"] = rope
    if kind == "chameleon":
        fields["swin_norm"] = config.norm_placement == "post"
    elif kind in ("qwen3", "mistral") or config.head_size * config.heads != config.width:
        fields["head_dim"] = config.head_size
    if kind == "mistral":
        fields["sliding_window"] = config.sliding_window or None
    if kind in ("qwen2", "qwen3") and config.sliding_window:
        fields |= {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": 0}
    # transformers refuses ids that the vocabulary has not; Emu3's padding may not be null.
    fields |= {k: v for k, v in kept.items() if not isinstance(v, int) or v < config.vocabulary_size}
    if kind == "emu3_text_model":
        for name in ("pad_token_id", "bos_token_id"):
            fields[name] = fields[name] if fields[name] is not None else 0
    return fields


def build_config(where: str, **fields: Any) -> DecoderConfig:
    """A configuration whose errors name the file.

    Raises:
        PlaitError: a value that cannot be.
    """
    try:
        return DecoderConfig(**fields)
    except PlaitError as error:
        raise PlaitError(f"{where}: {error}") from None
