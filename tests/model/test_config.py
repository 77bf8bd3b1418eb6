import pytest

from plait.errors import PlaitError
from plait.model.config import DecoderConfig


@pytest.mark.parametrize(("width", "ffn"), [(24, 64), (32, 128), (192, 512), (256, 704), (768, 2048)])
def test_default_ffn_is_eight_thirds_rounded_up_to_64(width: int, ffn: int) -> None:
    assert DecoderConfig(width=width).ffn_width == ffn


def test_given_ffn_stays() -> None:
    assert DecoderConfig(ffn_width=100).ffn_width == 100


def test_head_size() -> None:
    assert DecoderConfig(width=96, heads=6, kv_heads=3).head_size == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": -4}, "heads is -4"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"width": "32"}, "width is '32'"),
        ({"width": 32.0}, r"width is 32\.0"),
        ({"ffn_width": -1}, "ffn_width is -1"),
        ({"width": 36, "heads": 4}, "width 36 is not heads"),
        ({"width": 34, "heads": 4}, "width 34 is not heads"),
        ({"heads": 4, "kv_heads": 3}, "not a multiple of kv_heads"),
        ({"heads": 4, "kv_heads": 8}, "not a multiple of kv_heads"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_bad_values_name_their_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PlaitError, match=message) as raised:
        DecoderConfig(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
