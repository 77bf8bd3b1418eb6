"""Meta's params.json, of Llama's and Chameleon's own releases, ↔ `DecoderConfig`."""

from plait.errors import PlaitError
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.foreign_config import build_config, refuse_unknown
from plait.model.foreign_rope import Fields

_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "multiple_of", "norm_eps",
    "rope_theta", "qk_normalization", "swin_norm", "use_scaled_rope", "model_parallel_size", "dropout",
}  # fmt: skip
# What Meta's files hold besides: how the model was trained and run.
_PARAMS_HARMLESS = {"model", "max_batch_size", "max_seq_len", "attn_dropout", "consolidate", "dtype", "seed"}


def params_of(content: Fields) -> Fields:
    """The model's fields of a params.json: Chameleon's nests them."""
    inner = content.get("model")
    return {**content, **inner} if isinstance(inner, dict) else content


def from_params(params: Fields, rows: int, ffn_width: int, chameleon: bool) -> tuple[DecoderConfig, int]:
    """The decoder of Meta's params.json, and its context in tokens.

    Args:
        params: the model's fields.
        rows: of the output layer, over all shards.
        ffn_width: inner size of the feed-forward layers, over all shards.
        chameleon: whether it is one, by its tensors.

    Raises:
        PlaitError: a field is missing, unknown or has a value that no decoder here has.
    """
    inner = params.get("model", params)
    if not isinstance(inner, dict):
        raise PlaitError(f"params.json: model is {inner!r}, must be an object")
    refuse_unknown(inner, _PARAMS | _PARAMS_HARMLESS, "params.json")
    for name in ("dim", "n_layers", "n_heads"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise PlaitError(f"params.json: {name} is {params.get(name)!r}, must be a whole number of at least 1")
    stated = params.get("vocab_size", -1)
    if stated not in (-1, rows):
        raise PlaitError(f"params.json: vocab_size is {stated}, output.weight has {rows} rows")
    if bool(params.get("qk_normalization", chameleon)) != chameleon:
        raise PlaitError(
            f"params.json: qk_normalization is {params['qk_normalization']!r}, the tensors say the opposite"
        )
    scaled = bool(params.get("use_scaled_rope"))
    # Llama 3.1 states neither its scaling's numbers nor its context.
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0) if scaled else RopeScaling()
    theta = params.get("rope_theta") or 10000.0
    config = build_config(
        "params.json",
        vocabulary_size=rows,
        width=params["dim"],
        layers=params["n_layers"],
        heads=params["n_heads"],
        kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn_width=ffn_width,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=params.get("norm_eps", 1e-5),
        norm_placement="post" if params.get("swin_norm") else "pre",
        qk_norm="layer" if chameleon else "none",
        tie_embeddings=False,
    )
    # A wrong theta has been refused by now.
    context = 131072 if scaled else params.get("max_seq_len") or (16384 if chameleon and theta > 10000 else 4096)
    if type(context) is not int or context < 1:
        raise PlaitError(f"params.json: max_seq_len is {context!r}, must be a whole number of at least 1")
    return config, context


def to_params(config: DecoderConfig, context: int) -> Fields:
    """The fields of Meta's params.json.

    Raises:
        PlaitError: that format has no such decoder.
    """
    plain = RopeScaling()
    llama3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    if config.qk_norm == "rms" or config.qkv_bias or config.sliding_window:
        raise PlaitError("export: Meta's layout has neither biases, nor sliding windows, nor RMSNorm on queries")
    if config.head_size * config.heads != config.width or config.rope_scaling not in (plain, llama3):
        raise PlaitError("export: Meta's layout has heads of width / heads only, and RoPE plain or as in Llama 3.1")
    inner = int(8 * config.width / 3)
    common = 256 * -(-inner // 256) == config.ffn_width
    return {
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocabulary_size,
        "multiple_of": 256 if common else config.ffn_width,
        "ffn_dim_multiplier": None if common else config.ffn_width / inner,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": context,
        **({"use_scaled_rope": True} if config.rope_scaling == llama3 else {}),
        **({"qk_normalization": True} if config.qk_norm == "layer" else {}),
        **({"swin_norm": True} if config.norm_placement == "post" else {}),
    }
