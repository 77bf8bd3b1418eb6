import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.visual import VisualConfig, VisualTokenizer

VQ = QuantizerConfig(kind="vq_ema", codebook_size=32, dim=4)


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def changed(tokenizer: VisualTokenizer, name: str) -> VisualTokenizer:
    """A copy with one number of one weight moved."""
    weights = copy.deepcopy(tokenizer.state_dict())
    weights[name].view(-1)[0] += 0.5
    other = VisualTokenizer(tokenizer.config).eval().requires_grad_(False)
    other.load_state_dict(weights)
    return other


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), batch=st.integers(1, 2))
def test_any_size_comes_back(visual_tokenizer: VisualTokenizer, height: int, width: int, batch: int) -> None:
    pixels = picture(batch, 3, height, width)
    encoded = visual_tokenizer.encode(pixels)
    assert visual_tokenizer.factor == 8
    assert encoded.codes.shape == (batch, math.ceil(height / 8), math.ceil(width / 8))
    assert encoded.codes.dtype == torch.int64
    assert encoded.size == (height, width)
    assert encoded.modality == "image"
    assert encoded.fingerprint == visual_tokenizer.fingerprint
    decoded = visual_tokenizer.decode(encoded)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert torch.equal(decoded, visual_tokenizer.decode(encoded.codes, size=(height, width)))
    assert torch.equal(decoded, visual_tokenizer.decode(encoded.codes)[..., :height, :width])


@settings(deadline=None, max_examples=15)
@given(frames=st.integers(1, 4), height=st.integers(1, 20), width=st.integers(1, 20), batch=st.integers(1, 2))
def test_video_is_its_frames(
    visual_tokenizer: VisualTokenizer, frames: int, height: int, width: int, batch: int
) -> None:
    pixels = picture(batch, 3, frames, height, width)
    encoded = visual_tokenizer.encode(pixels)
    decoded = visual_tokenizer.decode(encoded)
    assert encoded.codes.shape == (batch, frames, math.ceil(height / 8), math.ceil(width / 8))
    assert (encoded.modality, encoded.size) == ("video", (frames, height, width))
    assert decoded.shape == pixels.shape
    for t in range(frames):
        frame = visual_tokenizer.encode(pixels[:, :, t])
        assert torch.equal(encoded.codes[:, t], frame.codes)
        torch.testing.assert_close(decoded[:, :, t], visual_tokenizer.decode(frame))


def test_pictures_of_a_batch_do_not_see_each_other(visual_tokenizer: VisualTokenizer) -> None:
    pixels = picture(3, 3, 19, 30)
    alone = torch.cat([visual_tokenizer.encode(pixels[i : i + 1]).codes for i in range(3)])
    assert torch.equal(visual_tokenizer.encode(pixels).codes, alone)


def test_padding_repeats_the_edge(visual_tokenizer: VisualTokenizer) -> None:
    pixels = picture(1, 3, 13, 3)
    rows, columns = torch.arange(16).clamp(max=12), torch.arange(8).clamp(max=2)
    padded = pixels[:, :, rows][..., columns]
    assert torch.equal(visual_tokenizer.encode(pixels).codes, visual_tokenizer.encode(padded).codes)


def test_different_pictures_have_different_codes(visual_tokenizer: VisualTokenizer) -> None:
    black, noise = torch.full((1, 3, 32, 32), -1.0), picture(1, 3, 32, 32)
    assert not torch.equal(visual_tokenizer.encode(black).codes, visual_tokenizer.encode(noise).codes)
    assert len(visual_tokenizer.encode(noise).codes.unique()) > 1


def test_training_pass_agrees_with_encode_and_decode(visual_tokenizer: VisualTokenizer) -> None:
    pixels = picture(2, 3, 21, 10)
    reconstruction, quantized = visual_tokenizer(pixels)
    encoded = visual_tokenizer.encode(pixels)
    assert torch.equal(quantized.codes[:, 0], encoded.codes)
    torch.testing.assert_close(reconstruction.clamp(-1, 1), visual_tokenizer.decode(encoded))


def test_training_pass_reaches_every_weight(visual_tokenizer: VisualTokenizer) -> None:
    tokenizer = copy.deepcopy(visual_tokenizer).requires_grad_(True)
    tokenizer(picture(1, 3, 16, 16))[0].square().mean().backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_computed_in_float32(visual_tokenizer: VisualTokenizer, dtype: torch.dtype) -> None:
    pixels = picture(1, 3, 16, 16).to(dtype)
    assert torch.equal(visual_tokenizer.encode(pixels).codes, visual_tokenizer.encode(pixels.float()).codes)


def test_autocast_moves_neither_codes_nor_pixels(visual_tokenizer: VisualTokenizer) -> None:
    pixels = picture(8, 3, 64, 64)
    encoded = visual_tokenizer.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        codes, decoded = visual_tokenizer.encode(pixels).codes, visual_tokenizer.decode(encoded)
    assert torch.equal(codes, encoded.codes)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, visual_tokenizer.decode(encoded))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((1, 3, 8, 8), math.nan), "not finite"),
        (torch.full((1, 3, 8, 8), math.inf), "not finite"),
        (torch.full((1, 3, 8, 8), -math.inf), "not finite"),
        (torch.cat([torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), math.nan)]), "not finite"),
        (picture(1, 3, 8, 8) * 127.5 + 127.5, "outside"),
        (torch.full((1, 3, 8, 8), -2.0), "outside"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "dtype is torch.uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "dtype is torch.int64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.bool), "dtype is torch.bool"),
        (torch.zeros(3, 8, 8), "shape is"),
        (torch.zeros(1, 4, 8, 8), "shape is"),
        (torch.zeros(1, 8, 8, 3), "shape is"),
        (torch.zeros(1, 3, 2, 8, 8, 1), "shape is"),
        (torch.zeros(1, 3, 0, 8), "shape is"),
        (torch.zeros(0, 3, 8, 8), "shape is"),
        (torch.zeros(1, 3, 0, 8, 8), "shape is"),
    ],
)
def test_bad_pixels_are_refused(visual_tokenizer: VisualTokenizer, pixels: Tensor, message: str) -> None:
    with pytest.raises(PlaitError, match=f"^pixels: .*{message}"):
        visual_tokenizer.encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[[60]]]), r"0\.\.59"),
        (torch.tensor([[[-1]]]), r"0\.\.59"),
        (torch.zeros(1, 2, 2), "dtype"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "dtype"),
        (torch.zeros(2, 2, dtype=torch.int64), "shape"),
        (torch.zeros(1, 1, 1, 2, 2, dtype=torch.int64), "shape"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), "shape"),
        (torch.zeros(0, 2, 2, dtype=torch.int64), "shape"),
    ],
)
def test_bad_codes_are_refused(visual_tokenizer: VisualTokenizer, codes: Tensor, message: str) -> None:
    for given_codes in (codes, Codes(codes, "image")):
        with pytest.raises(PlaitError, match=f"^codes: .*{message}"):
            visual_tokenizer.decode(given_codes)


@pytest.mark.parametrize("size", [(8, 16), (17, 16), (16, 8), (16, 17), (0, 0), (-1, 16), (16,), (1, 16, 16), (2, 16)])
def test_a_size_that_the_grid_cannot_hold_is_refused(visual_tokenizer: VisualTokenizer, size: tuple[int, ...]) -> None:
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    message = "does not fit a grid of 2×2 codes" if min(size) > 0 else "must be whole numbers"
    with pytest.raises(PlaitError, match=rf"^size: .* {message}"):
        visual_tokenizer.decode(codes, size=size)
    with pytest.raises(PlaitError, match=r"^size: "):
        visual_tokenizer.decode(Codes(codes, "image", size=size))


def test_wrong_types_are_refused(visual_tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    for pixels in (None, [[0.0]], torch.zeros(1, 3, 8, 8).numpy()):
        with pytest.raises(PlaitError, match=r"^pixels: is a \w+, expected a tensor"):
            visual_tokenizer.encode(pixels)
    with pytest.raises(PlaitError, match="^codes: is a list"):
        visual_tokenizer.decode([[1]])
    for size in (37, 16.0, "ab", (16.0, 16.0)):
        with pytest.raises(PlaitError, match="^size: .* must be whole numbers"):
            visual_tokenizer.decode(codes, size=size)
    for dtype in (torch.float16, torch.int8, "bf16"):
        with pytest.raises(PlaitError, match="^dtype: .* must be torch.float32 or torch.bfloat16"):
            visual_tokenizer.save_pretrained(tmp_path / "new", dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [(2, 16, 16), (4, 16, 16), (3, 17, 16), (16,), (1, 3, 16, 16)])
def test_a_wrong_video_size_is_refused(visual_tokenizer: VisualTokenizer, size: tuple[int, ...]) -> None:
    with pytest.raises(PlaitError, match=r"^size: "):
        visual_tokenizer.decode(torch.zeros(1, 3, 2, 2, dtype=torch.int64), size=size)


def test_a_video_can_be_cropped_by_frame_size(visual_tokenizer: VisualTokenizer) -> None:
    codes = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    assert visual_tokenizer.decode(codes, size=(9, 12)).shape == (1, 3, 3, 9, 12)
    assert visual_tokenizer.decode(codes, size=(3, 9, 12)).shape == (1, 3, 3, 9, 12)


def test_codes_of_another_tokenizer_are_refused(visual_tokenizer: VisualTokenizer) -> None:
    encoded = visual_tokenizer.encode(picture(1, 3, 8, 8))
    other = changed(visual_tokenizer, "encoder.head.bias")
    with pytest.raises(PlaitError, match=r"^codes: made by another tokenizer"):
        other.decode(encoded)
    other.decode(replace(encoded, fingerprint=None))


def test_the_fingerprint_is_of_what_makes_codes(visual_tokenizer: VisualTokenizer) -> None:
    for name in visual_tokenizer.state_dict():
        same = changed(visual_tokenizer, name).fingerprint == visual_tokenizer.fingerprint
        assert same == name.startswith("decoder."), name


def test_the_fingerprint_sees_settings_that_leave_the_weights_alone() -> None:
    def with_zero_weights(**settings: Any) -> str:
        defaults = {"widths": (4,), "encoder_blocks": 0, "decoder_blocks": 0}
        tokenizer = VisualTokenizer(VisualConfig(**(defaults | settings)))
        for tensor in tokenizer.state_dict().values():
            tensor.zero_()
        return tokenizer.fingerprint

    quantizers = [
        QuantizerConfig(levels=(5, 4)),
        QuantizerConfig(levels=(4, 5)),
        QuantizerConfig(kind="lfq", codebook_size=4),
        QuantizerConfig(kind="bsq", codebook_size=4),
        QuantizerConfig(kind="vq_ema", codebook_size=8, dim=2),
        QuantizerConfig(kind="vq_grad", codebook_size=8, dim=2),
    ]
    settings = [{"quantizer": quantizer} for quantizer in quantizers]
    settings += [{"stem": "haar"}, {"temporal_factor": 4}, {"temporal_factor": 2}, {"widths": (4, 4), "patch": 2}]
    assert len({with_zero_weights(**one) for one in settings}) == len(settings)
    # What only the decoder or training uses leaves it as it is.
    same = QuantizerConfig(kind="lfq", codebook_size=4, commitment=1.0, entropy=0.1)
    assert with_zero_weights(quantizer=same) == with_zero_weights(quantizer=quantizers[2])
    for decoder in ({"decoder_norm": "spatial"}, {"decoder_blocks": 2}):
        assert with_zero_weights(**decoder) == with_zero_weights()


def test_the_shipped_tokenizer_keeps_its_fingerprint() -> None:
    # Codes that were stored with it stay valid only as long as this number stays.
    shipped = load_tokenizer("plait-tiny", "image")
    assert shipped.fingerprint == "c0c11ba3e50163b2b0b2cbc5c58ff74c249855f163d7e78e0ae4693bd5879ab6"
    # And as long as the network computes the same: its first version's codes of a picture of waves.
    rows, columns = torch.arange(64.0)[:, None] / 10, torch.arange(64.0) / 7
    waves = torch.stack([torch.sin(rows + c) * torch.cos(columns - c) for c in range(3)])[None]
    assert shipped.encode(waves).codes[0, 0].tolist() == [629, 892, 534, 103, 39, 630, 852, 725]


def test_a_better_decoder_still_reads_old_codes(visual_tokenizer: VisualTokenizer) -> None:
    larger = VisualTokenizer(replace(visual_tokenizer.config, decoder_blocks=2)).eval()
    larger.encoder.load_state_dict(visual_tokenizer.encoder.state_dict())
    assert larger.fingerprint == visual_tokenizer.fingerprint
    larger.decode(visual_tokenizer.encode(picture(1, 3, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(visual_tokenizer: VisualTokenizer, tmp_path: Path, dtype: torch.dtype) -> None:
    visual_tokenizer.save_pretrained(tmp_path, dtype=dtype)
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert not loaded.training
    assert loaded.config == visual_tokenizer.config
    assert json.loads((tmp_path / "config.json").read_text())["fingerprint"] == loaded.fingerprint
    assert (loaded.fingerprint == visual_tokenizer.fingerprint) == (dtype == torch.float32)
    for name, tensor in visual_tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name
    assert not any(p.requires_grad for p in loaded.parameters())
    if dtype == torch.float32:
        pixels = picture(1, 3, 30, 41)
        encoded = visual_tokenizer.encode(pixels)
        assert torch.equal(loaded.encode(pixels).codes, encoded.codes)
        assert torch.equal(loaded.decode(encoded), visual_tokenizer.decode(encoded))
    # Once rounded, saving again loses nothing.
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_tokenizer_that_has_trained_is_saved_without_surplus(
    visual_tokenizer: VisualTokenizer, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(visual_tokenizer).train().requires_grad_(True)
    tokenizer(picture(1, 3, 8, 8))
    tokenizer.save_pretrained(tmp_path)
    assert VisualTokenizer.from_pretrained(tmp_path).fingerprint == visual_tokenizer.fingerprint


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def flip_byte(folder: Path) -> None:
    """Flip the lowest bit of one number of the encoder."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])["encoder.head.weight"]["data_offsets"][0]
    content[8 + size + start] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
        (truncate, r"model\.safetensors: not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors: not a readable"),
        (lambda folder: (folder / "model.safetensors").write_text("git-lfs pointer"), r"model\.safetensors: not a"),
        (
            lambda folder: edit_tensors(folder, lambda t: t.update(surplus=torch.zeros(1))),
            r"model\.safetensors: tensor 'surplus' is extra",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: t.pop("decoder.norm.weight")),
            r"model\.safetensors: tensor 'decoder\.norm\.weight' is missing",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: t.update({"encoder.head.bias": torch.zeros(4)})),
            r"model\.safetensors: tensor 'encoder\.head\.bias' has shape \(4,\), config\.json says \(3,\)",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: t.update({"encoder.head.bias": torch.zeros(())})),
            r"tensor 'encoder\.head\.bias' has shape \(\)",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: t["encoder.head.bias"].fill_(math.nan)),
            "do not give the stored fingerprint",
        ),
        (flip_byte, "do not give the stored fingerprint"),
    ],
)
def test_a_damaged_folder_is_refused(
    visual_tokenizer: VisualTokenizer, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    visual_tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(PlaitError, match=message) as raised:
        VisualTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": "blue"}, r"config\.json: unknown field 'colour'; known fields: attention"),
        ({"format_version": 2}, r"config\.json: format_version is 2"),
        ({"format_version": None}, "format_version is None"),
        ({"tokenizer": "text"}, "not a plait visual tokenizer"),
        ({"tokenizer": ["visual"]}, "not a plait visual tokenizer"),
        ({"architecture": "emu3"}, "not a plait visual tokenizer"),
        ({"fingerprint": "0" * 64}, "do not give the stored fingerprint"),
        ({"fingerprint": None}, "do not give the stored fingerprint"),
        ({"quantizer": {"levels": [4, 5, 3]}}, "do not give the stored fingerprint"),
        ({"quantizer": {"levels": [5, 4]}}, "has shape"),
        ({"quantizer": {"levels": [2, 3]}}, "levels is"),
        ({"quantizer": {"levels": None}}, "levels is None"),
        ({"quantizer": {"kind": "vq_ema", "codebook_size": 60, "dim": 3}}, "tensor 'quantizer.codebook' is missing"),
        ({"quantizer": {"colour": "blue"}}, r"config\.json: unknown field 'colour'"),
        ({"quantizer": "fsq"}, r"config\.json: quantizer is 'fsq', expected an object"),
        ({"quantizer": None}, "levels is None"),
        ({"levels": [5, 4, 3]}, "unknown field 'levels'"),
        ({"encoder_blocks": 2}, "is missing"),
        ({"decoder_blocks": 0}, "do not belong to this config"),
        ({"temporal_factor": 2}, "is missing"),
        ({"temporal_factor": 3}, "temporal_factor is 3, must be 1, 2, 4 or 8"),
        ({"temporal_factor": 2.0}, "temporal_factor is 2.0"),
        ({"temporal_factor": True}, "temporal_factor is True"),
        ({"stem": "dct"}, "stem is 'dct', must be 'unshuffle' or 'haar'"),
        ({"stem": "haar"}, "do not give the stored fingerprint"),
        ({"stem": "haar", "patch": 6}, "patch is 6, the haar stem needs a power of two"),
        ({"decoder_norm": "batch"}, "decoder_norm is 'batch'"),
        ({"attention": [0]}, "attention at level 0"),
        ({"attention": [2]}, "attention at level 2"),
        ({"attention": [-1]}, "attention is"),
        ({"attention": None}, "attention is None"),
        ({"attention": 0}, "attention is 0"),
        ({"patch": 0}, "patch is 0"),
        ({"patch": "4"}, "patch is '4'"),
        ({"patch": 4.0}, "patch is 4.0"),
        ({"widths": []}, "widths is"),
        ({"widths": 8}, "widths is 8"),
        ({"widths": [8.0, 16.0]}, "widths is"),
        ({"encoder_blocks": -1}, "encoder_blocks is -1"),
        ({"decoder_blocks": True}, "decoder_blocks is True"),
    ],
    ids=str,
)
def test_a_changed_config_is_refused(
    visual_tokenizer: VisualTokenizer, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    visual_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(PlaitError, match=message):
        VisualTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("patch", "widths"), [(1, (4,)), (2, (4, 4, 4)), (8, (4,)), (3, (4, 4))])
def test_every_factor_works(patch: int, widths: tuple[int, ...]) -> None:
    tokenizer = VisualTokenizer(VisualConfig(patch=patch, widths=widths, encoder_blocks=0, decoder_blocks=0))
    factor = patch * 2 ** (len(widths) - 1)
    encoded = tokenizer.encode(picture(1, 3, 2 * factor + 1, 5))
    assert tokenizer.factor == factor
    assert encoded.codes.shape == (1, 3, math.ceil(5 / factor))
    assert tokenizer.decode(encoded).shape == (1, 3, 2 * factor + 1, 5)


def test_the_first_config_files_still_load(visual_tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    visual_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for later in ("quantizer", "architecture", "stem", "attention", "decoder_norm"):
        config.pop(later)
    (tmp_path / "config.json").write_text(json.dumps(config | {"levels": [5, 4, 3]}))
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    assert loaded.config == visual_tokenizer.config
    assert loaded.fingerprint == visual_tokenizer.fingerprint


# Every architecture


def built(seed: int = 0, **config: Any) -> VisualTokenizer:
    """Untrained, but with no weight at its quiet start."""
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(VisualConfig(**config)).eval().requires_grad_(False)
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tokenizer


SPACE = {4: (4, (32,)), 8: (2, (4, 4, 32)), 16: (4, (4, 4, 32))}
ARCHITECTURES = [
    {"patch": SPACE[factor][0], "widths": SPACE[factor][1], "temporal_factor": time, "encoder_blocks": 1,
     "decoder_blocks": 1, "stem": stem, "decoder_norm": norm, "attention": attention, "quantizer": quantizer}
    for i, (factor, time, (stem, norm), with_attention) in enumerate(
        product((4, 8, 16), (1, 2, 4, 8), (("unshuffle", "spatial"), ("haar", "frame")), (False, True))
    )
    for attention in [(len(SPACE[factor][1]) - 1,) if with_attention else ()]
    for quantizer in [(QuantizerConfig(levels=(5, 4, 3)), VQ)[i % 2 ^ i // 4 % 2]]
]  # fmt: skip


@pytest.mark.parametrize("config", ARCHITECTURES, ids=str)
def test_every_architecture(config: dict[str, Any]) -> None:
    tokenizer = built(**config)
    space, time = tokenizer.factor, tokenizer.temporal_factor
    assert space == config["patch"] * 2 ** (len(config["widths"]) - 1)
    frames, height, width = time + 3, space + 3, 2 * space - 1
    video = picture(2, 3, frames, height, width)
    encoded = tokenizer.encode(video)
    assert encoded.codes.shape == (2, 1 + math.ceil((frames - 1) / time), 2, 2)
    assert encoded.codes.max() < tokenizer.codebook_sizes[0]
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == video.shape

    def sure(pixels: Tensor) -> Tensor:
        return tokenizer.quantizer.margin(tokenizer.to_latents(tokenizer._pad(pixels)).movedim(1, -1)) > 1e-5

    # A still is the first frame.
    still = tokenizer.encode(video[:, :, 0])
    certain = sure(video[:, :, :1])[:, 0]
    assert certain.float().mean() > 0.9
    assert torch.equal(still.codes[certain], encoded.codes[:, 0][certain])
    torch.testing.assert_close(
        tokenizer.decode(encoded.codes[:, 0], size=(height, width)), decoded[:, :, 0], atol=1e-5, rtol=0
    )
    # Later frames change nothing before them, earlier ones do change what follows them if there is anything along time.
    groups = [1 if i == 0 else time for i in range(encoded.codes.shape[1])]
    start = sum(groups[:-1])
    changed_late = torch.cat([video[:, :, :start], -video[:, :, start:]], 2)
    late = tokenizer.encode(changed_late).codes
    assert torch.equal(late[:, :-1], encoded.codes[:, :-1])
    assert not torch.equal(late[:, -1], encoded.codes[:, -1])
    moved = encoded.codes.clone()
    moved[:, -1] = (moved[:, -1] + 7) % tokenizer.codebook_sizes[0]
    again = tokenizer.decode(moved, size=encoded.size)
    torch.testing.assert_close(again[:, :, :start], decoded[:, :, :start], atol=1e-6, rtol=0)
    assert not torch.equal(again[:, :, start:], decoded[:, :, start:])
    moved = encoded.codes.clone()
    moved[:, 0] = (moved[:, 0] + 7) % tokenizer.codebook_sizes[0]
    reached = (tokenizer.decode(moved, size=encoded.size) - decoded).abs().amax((0, 1, 3, 4)) > 1e-6
    assert reached[0]
    assert reached[1] == (time > 1)


@settings(deadline=None, max_examples=25)
@given(
    config=st.sampled_from(ARCHITECTURES),
    frames=st.integers(1, 12),
    height=st.integers(1, 35),
    width=st.integers(1, 35),
)
def test_every_architecture_gives_back_any_size(config: dict[str, Any], frames: int, height: int, width: int) -> None:
    tokenizer = built(**config)
    for pixels in (picture(1, 3, frames, height, width), picture(1, 3, height, width)):
        assert tokenizer.decode(tokenizer.encode(pixels)).shape == pixels.shape


def test_training_reaches_every_weight_of_a_video_network() -> None:
    tokenizer = built(**ARCHITECTURES[5]).requires_grad_(True)
    video = picture(2, 3, 1 + 2 * tokenizer.temporal_factor, 13, 9)
    reconstruction, quantized = tokenizer.train()(video)
    assert reconstruction.shape == video.shape
    assert quantized.codes.shape == (2, 3, 2, 2) if tokenizer.factor == 8 else (2, 3, 4, 3)
    reconstruction.square().mean().backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


# From an image tokenizer to a video tokenizer


@pytest.mark.parametrize("time", [2, 4, 8])
@pytest.mark.parametrize("config", [ARCHITECTURES[0], ARCHITECTURES[3], ARCHITECTURES[18]], ids=str)
def test_an_inflated_tokenizer_begins_as_the_image_tokenizer(config: dict[str, Any], time: int) -> None:
    image = built(**(config | {"temporal_factor": 1}))
    video = VisualTokenizer(replace(image.config, temporal_factor=time)).eval().requires_grad_(False)
    before = video.fingerprint
    video.inflate(image)
    assert video.fingerprint != before
    still = picture(1, 3, 18, 21)
    codes, decoded = image.encode(still).codes, image.decode(image.encode(still))
    latents = image.to_latents(image._pad(still[:, :, None])).movedim(1, -1)[:, 0]
    sure = image.quantizer.margin(latents) > 1e-5
    assert torch.equal(video.encode(still).codes[sure], codes[sure])
    resting = still[:, :, None].expand(-1, -1, 1 + 2 * time, -1, -1)
    for frame in video.encode(resting).codes.unbind(1):
        assert torch.equal(frame[sure], codes[sure])
    for frame in video.decode(codes[:, None].expand(-1, 3, -1, -1), size=(18, 21)).unbind(2):
        torch.testing.assert_close(frame, decoded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"widths": (8, 12)}, {"patch": 2}, {"encoder_blocks": 2}, {"decoder_blocks": 0}, {"decoder_norm": "spatial"},
        {"attention": (1,), "widths": (8, 32)}, {"quantizer": QuantizerConfig(levels=(5, 4))}, {"widths": (8,)},
        {"quantizer": QuantizerConfig(kind="vq_ema", codebook_size=60, dim=3)}, {"stem": "haar"},
        {"quantizer": QuantizerConfig(levels=(4, 5, 3))},
    ],
    ids=str,
)  # fmt: skip
def test_only_a_tokenizer_of_the_same_architecture_inflates(
    visual_tokenizer: VisualTokenizer, other: dict[str, Any]
) -> None:
    video = VisualTokenizer(replace(visual_tokenizer.config, temporal_factor=4, **other))
    weights = copy.deepcopy(video.state_dict())
    with pytest.raises(PlaitError, match=r"^init: the tokenizer has another architecture, \w+ .* instead of"):
        video.inflate(visual_tokenizer)
    assert all(torch.equal(weights[name], tensor) for name, tensor in video.state_dict().items())


def test_settings_of_training_do_not_keep_from_inflating() -> None:
    image = built(patch=4, widths=(4,), quantizer=QuantizerConfig(levels=(5, 4)))
    video = built(patch=4, widths=[4], temporal_factor=2, quantizer=QuantizerConfig(levels=[5, 4], entropy=0.1))
    video.inflate(image)
    assert video.config.widths == (4,)
    assert torch.equal(video.encoder.head.weight, image.encoder.head.weight)


# Copies and casts


def test_a_copy_is_independent(visual_tokenizer: VisualTokenizer) -> None:
    pixels = picture(1, 3, 16, 16)
    expected = visual_tokenizer.encode(pixels)
    twin = copy.deepcopy(visual_tokenizer)
    assert torch.equal(twin.encode(pixels).codes, expected.codes)
    with torch.no_grad():
        twin.encoder.head.bias.add_(1)
    assert not torch.equal(twin.encode(pixels).codes, expected.codes)
    assert torch.equal(visual_tokenizer.encode(pixels).codes, expected.codes)


def test_a_haar_stem_is_there_after_loading(tmp_path: Path) -> None:
    tokenizer = VisualTokenizer(VisualConfig(stem="haar", widths=(8, 8))).eval()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    pixels = picture(1, 3, 16, 16)
    encoded = tokenizer.encode(pixels)
    assert torch.equal(loaded.encode(pixels).codes, encoded.codes)
    assert torch.equal(loaded.decode(encoded.codes), tokenizer.decode(encoded.codes))
