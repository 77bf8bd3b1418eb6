import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers import foreign
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.pixels import Cache
from plait.tokenizers.vidtok import LAYOUTS, VidTokConfig, VidTokTokenizer

diffusers = pytest.importorskip("diffusers")

MANIFESTS = Path(__file__).parent.parent / "data" / "manifests"
(LAYOUT,) = LAYOUTS
DIFFUSERS = {"_class_name": "AutoencoderVidTok"}
SMALL: dict[str, Any] = {"ch": 8, "ch_mult": [1, 2, 2, 3], "num_res_blocks": 1, "z_channels": 3}
# 4×8×8, then 4×4×4 halved early, 4×16×16 as released (encoder and decoder at other levels), 8×8×8, 2×4×4.
SIZES: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"ch_mult": [1, 2, 2], "tempo_ds": [0, 1], "tempo_us": [1, 2], "num_res_blocks": 2},
    SMALL | {"ch_mult": [1, 1, 2, 2, 1], "z_channels": 4},
    SMALL | {"tempo_ds": [0, 1, 2], "tempo_us": [1, 2, 3]},
    SMALL | {"ch_mult": [2, 1, 1], "tempo_ds": [1], "tempo_us": [2]},
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build_reference(version: str = "1.1", seed: int = 0, **sizes: Any) -> Any:
    """The diffusers class with random weights, norms and mixes included."""
    torch.manual_seed(seed)
    codebook = 8 ** sizes["z_channels"]
    model = diffusers.AutoencoderVidTok(regularizer="fsq", double_z=False, codebook_size=codebook, **sizes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(0.3 * torch.randn_like(weight) + name.endswith("weight"))
            elif "mix_factor" in name:
                weight.copy_(torch.randn_like(weight))
            elif name == "encoder.conv_out.conv.weight":
                weight.mul_(4)  # so that codes vary
    if version == "1.0":
        for module in model.modules():
            forward = VERSION_1_0.get(type(module).__name__.removeprefix("VidTok"))
            if forward is not None:
                module.forward = MethodType(forward, module)
    return model.eval().requires_grad_(False)


# VidTok 1.0's arithmetic, which diffusers does not have: zeros before the first frame, doubling by repetition.


def convolve_1d(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.pad(x, (self.time_pad, 0)))


def convolve_3d(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.pad(x, (*self.spatial_padding[:4], self.time_pad, 0)))


def downsample(self: Any, x: Tensor) -> Tensor:
    alpha = torch.sigmoid(self.mix_factor)
    return alpha * self.avg_pool(F.pad(x, (0, 0, 0, 0, 1, 0))) + (1 - alpha) * self.conv(x)


def upsample(self: Any, x: Tensor) -> Tensor:
    alpha = torch.sigmoid(self.mix_factor)
    x = F.interpolate(x, scale_factor=[2.0, 1.0, 1.0], mode="nearest")
    return alpha * x + (1 - alpha) * self.conv(x)


VERSION_1_0: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "CausalConv1d": convolve_1d,
    "CausalConv3d": convolve_3d,
    "Downsample3D": downsample,
    "Upsample3D": upsample,
}


def as_ours(reference: Any, version: str = "1.1") -> VidTokTokenizer:
    tokenizer = convert(reference.state_dict(), {"version": version}, LAYOUT, "reference")
    assert isinstance(tokenizer, VidTokTokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=["1.1", "1.0"])
def tokenizer(request: pytest.FixtureRequest) -> VidTokTokenizer:
    return as_ours(build_reference(**SMALL), request.param)


@pytest.fixture(scope="module")
def newer() -> VidTokTokenizer:
    return as_ours(build_reference(**SMALL))


def assert_same_codes(tokenizer: VidTokTokenizer, z: Tensor, codes: Tensor, expected: Tensor) -> None:
    """Equal, except where the latents lie on the edge between two codes."""
    margin = tokenizer.quantizer.margin(z.movedim(1, -1))
    assert (margin > 1e-5).float().mean() > 0.99
    assert codes.shape == expected.shape
    assert torch.equal(codes[margin > 1e-5], expected[margin > 1e-5].long())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes['ch_mult'])}-{sizes.get('tempo_ds')}")
def test_codes_and_pixels_are_vidtoks(sizes: dict[str, Any], version: str) -> None:
    reference = build_reference(version, **sizes)
    tokenizer = as_ours(reference, version)
    f = tokenizer.temporal_factor
    assert f == reference.temporal_compression_ratio
    found = set()
    for groups, height, width in ((0, 3, 1), (1, 1, 1), (2, 1, 2), (3, 1, 1)):
        video = noise(2, 3, 1 + f * groups, height * tokenizer.factor, width * tokenizer.factor, seed=groups)
        quantized, codes = reference(video, encoder_mode=True)
        z = tokenizer.to_latents(video)
        assert_same_codes(tokenizer, z, tokenizer.quantizer.codes(z.movedim(1, -1)), codes)
        found.update(codes.unique().tolist())
        assert torch.equal(tokenizer.quantizer.latents(codes.long()).movedim(-1, 1), quantized)
        pixels, expected = tokenizer.from_latents(quantized), reference.decode(quantized)
        torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.05
    assert len(found) > 8


def test_the_versions_differ() -> None:
    reference = build_reference(**SMALL)
    newer, older = as_ours(reference), as_ours(reference, "1.0")
    video = noise(1, 3, 9, 16, 16)
    assert (newer.to_latents(video) - older.to_latents(video)).abs().max() > 0.01
    z = noise(1, 3, 3, 2, 2)
    assert (newer.from_latents(z) - older.from_latents(z)).abs().max() > 0.01
    assert newer.fingerprint != older.fingerprint


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 13, 21), (3, 8, 9), (6, 17, 3)])
def test_odd_sizes_are_padded_as_the_reference_pads(frames: int, height: int, width: int) -> None:
    reference = build_reference(**SMALL)
    tokenizer = as_ours(reference)
    video = noise(1, 3, frames, height, width)
    encoded = tokenizer.encode(video)
    rows, columns = (torch.arange(math.ceil(side / 8) * 8).clamp(max=side - 1) for side in (height, width))
    padded = video[..., rows, :][..., columns]
    _, codes = reference(padded, encoder_mode=True)  # fills up the last group of frames by itself
    times = torch.arange(1 + math.ceil((frames - 1) / 4) * 4).clamp(max=frames - 1)
    assert_same_codes(tokenizer, tokenizer.to_latents(padded[:, :, times]), encoded.codes, codes)
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == video.shape
    expected = reference.decode(encoded.codes, decode_from_indices=True).clamp(-1, 1)
    torch.testing.assert_close(decoded, expected[:, :, :frames, :height, :width], atol=1e-4, rtol=0)


def test_an_image_is_a_video_of_one_frame(tokenizer: VidTokTokenizer) -> None:
    picture = noise(2, 3, 19, 30)
    image, video = tokenizer.encode(picture), tokenizer.encode(picture.unsqueeze(2))
    assert image.codes.shape == (2, 3, 4)
    assert torch.equal(image.codes, video.codes[:, 0])
    assert torch.equal(tokenizer.decode(image), tokenizer.decode(video)[:, :, 0])


def test_an_image_is_any_videos_first_frame(tokenizer: VidTokTokenizer) -> None:
    video = noise(1, 3, 9, 16, 16)
    encoded = tokenizer.encode(video)
    assert torch.equal(tokenizer.encode(video[:, :, 0]).codes, encoded.codes[:, 0])
    first = tokenizer.decode(encoded.codes[:, 0])
    torch.testing.assert_close(tokenizer.decode(encoded)[:, :, 0], first, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", [(1, 4, 4, 4), (1, 8, 4), (1, 12), (5, 8), (9, 4), (13,)], ids=str)
def test_pixels_in_chunks_give_the_latents_and_codes_of_one_pass(
    tokenizer: VidTokTokenizer, plan: tuple[int, ...]
) -> None:
    video = noise(2, 3, 13, 16, 8)
    cache: Cache = {}
    z = torch.cat([tokenizer.to_latents(chunk, cache) for chunk in video.split(plan, 2)], 2)
    expected = tokenizer.to_latents(video)
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=0)
    codes = torch.cat(list(tokenizer.encode_stream(video.split(plan, 2))), 1)
    assert_same_codes(tokenizer, expected, codes, tokenizer.quantizer.codes(expected.movedim(1, -1)))


@settings(deadline=None, max_examples=8)
@given(plan=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_codes_in_any_chunks_give_the_pixels_of_one_pass(tokenizer: VidTokTokenizer, plan: list[int]) -> None:
    codes = torch.randint(512, (1, sum(plan), 1, 1), generator=torch.Generator().manual_seed(0))
    z = tokenizer.quantizer.latents(codes).movedim(-1, 1)
    pixels = torch.cat(list(tokenizer.decode_stream(codes.split(plan, 1))), 2)
    torch.testing.assert_close(pixels, tokenizer.from_latents(z).clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [17, 38])
def test_a_long_video_is_encoded_as_in_one_pass(tokenizer: VidTokTokenizer, frames: int) -> None:
    video = noise(1, 3, frames, 16, 16)
    times = torch.arange(1 + math.ceil((frames - 1) / 4) * 4).clamp(max=frames - 1)
    z = tokenizer.to_latents(video[:, :, times])
    encoded = tokenizer.encode(video)
    assert_same_codes(tokenizer, z, encoded.codes, tokenizer.quantizer.codes(z.movedim(1, -1)))
    assert tokenizer.decode(encoded).shape == video.shape


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes['ch_mult'])}-{sizes.get('tempo_ds')}")
def test_every_size_decodes_in_a_stream(sizes: dict[str, Any]) -> None:
    tokenizer = as_ours(build_reference(**sizes))
    codes = torch.randint(512, (1, 5, 1, 1), generator=torch.Generator().manual_seed(1))
    whole = tokenizer.from_latents(tokenizer.quantizer.latents(codes).movedim(-1, 1)).clamp(-1, 1)
    assert whole.shape[2] == tokenizer.frames_of(5)
    for plan in ([1] * 5, [2, 3]):
        pixels = torch.cat(list(tokenizer.decode_stream(codes.split(plan, 1))), 2)
        torch.testing.assert_close(pixels, whole, atol=1e-5, rtol=0)


def test_tiles_are_streamed_alike(tokenizer: VidTokTokenizer) -> None:
    codes = torch.randint(512, (1, 3, 1, 10), generator=torch.Generator().manual_seed(0))
    whole = tokenizer.decode(codes, tile=64)
    streamed = torch.cat(list(tokenizer.decode_stream(codes.split([1, 2], 1), tile=64)), 2)
    assert whole.shape == (1, 3, 9, 8, 80)
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=0)


def test_a_stream_of_codes_is_decoded_as_it_comes(tokenizer: VidTokTokenizer) -> None:
    read = []

    def source() -> Any:
        for i in range(5):
            read.append(i)
            yield torch.full((1, 1, 1, 1), i)

    stream = tokenizer.decode_stream(source())
    next(stream)
    assert len(read) == 1 + tokenizer.lookahead
    assert 1 + sum(chunk.shape[2] for chunk in stream) == 17


def test_later_frames_move_no_code(tokenizer: VidTokTokenizer) -> None:
    video = noise(1, 3, 13, 8, 8)
    changed = torch.cat([video[:, :, :5], noise(1, 3, 8, 8, 8, seed=1)], 2)
    before, after = tokenizer.to_latents(video), tokenizer.to_latents(changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, :, 2], after[:, :, 2])


def test_pixels_look_ahead_as_far_as_said(tokenizer: VidTokTokenizer) -> None:
    z = noise(1, 3, 4, 1, 1)
    changed = torch.cat([z[:, :, :2], noise(1, 3, 2, 1, 1, seed=1)], 2)
    moved = (tokenizer.from_latents(z) - tokenizer.from_latents(changed)).abs().amax((0, 1, 3, 4)) > 1e-6
    # Latent frame 1 stands for pixels 1 to 4: all but the first of them know latent frame 2.
    first = {"1.0": 5, "1.1": 2}[tokenizer.config.version]
    assert moved.nonzero()[0].item() == first
    assert tokenizer.lookahead == (first < 5)


def test_only_what_moves_codes_is_in_the_fingerprint(newer: VidTokTokenizer) -> None:
    other = VidTokTokenizer(replace(newer.config, temporal_up=(2, 3)))
    other.encoder.load_state_dict(newer.encoder.state_dict())
    assert other.fingerprint == newer.fingerprint
    nn.init.zeros_(other.encoder.downs[1].mix)
    del other.fingerprint
    assert other.fingerprint != newer.fingerprint


def test_saved_and_loaded_it_is_the_same(tokenizer: VidTokTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = VidTokTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    video = noise(1, 3, 5, 11, 8)
    encoded = tokenizer.encode(video)
    assert torch.equal(loaded.encode(video).codes, encoded.codes)
    assert torch.equal(loaded.decode(encoded), tokenizer.decode(encoded))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": "128"}, "width is '128'"),
        ({"blocks": 1.0}, "blocks is 1.0"),
        ({"multipliers": ()}, "multipliers is"),
        ({"multipliers": (1, 0)}, "multipliers is"),
        ({"multipliers": 3}, "multipliers is 3"),
        ({"levels": (8, 2)}, "levels is"),
        ({"temporal_down": (3,)}, r"temporal_down is \(3,\), must list different ones of \[0, 1, 2\]"),
        ({"temporal_up": (0,)}, r"temporal_up is \(0,\), must list different ones of \[1, 2, 3\]"),
        ({"temporal_down": (1, 1)}, "temporal_down is"),
        ({"temporal_down": (-1, 2)}, "temporal_down is"),
        ({"temporal_down": ("1",)}, "temporal_down is"),
        ({"temporal_down": None}, "temporal_down is None"),
        ({"temporal_down": (1,)}, "must be equally many"),
        (
            {"multipliers": (1,) * 5, "temporal_down": (0, 1, 2, 3), "temporal_up": (1, 2, 3, 4)},
            "at most 3 levels",
        ),
        ({"version": "1.2"}, r"version is '1.2', must be one of 1\.0, 1\.1"),
        ({"version": 1.1}, "version is 1.1"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=f"^vidtok: .*{message}"):
        VidTokConfig(**fields)


# Released files


def manifest(name: str) -> dict[str, Tensor]:
    shapes = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "version"),
    [("vidtok-fsq-causal-488-32768", "1.0"), ("vidtok-fsq-causal-488-32768-diffusers", "1.1")],
)
def test_released_tensors_are_ours_renamed(name: str, version: str) -> None:
    tensors = manifest(name)
    beside = DIFFUSERS if "diffusers" in name else {"_name_or_path": "vidtok_fsq_causal_488_32768"}
    assert LAYOUT.recognise(tensors, beside)
    config = LAYOUT.configure(tensors, beside)
    assert config == VidTokConfig(version=version)
    with torch.device("meta"):
        expected = VidTokTokenizer(config).state_dict()
    renamed = LAYOUT.rename(dict(tensors), config)
    assert {key: tensor.shape for key, tensor in renamed.items()} == {k: v.shape for k, v in expected.items()}
    assert 150e6 < sum(tensor.numel() for tensor in expected.values()) < 165e6  # the paper's 157 M


@pytest.fixture
def only_vidtok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "known_layouts", lambda: list(LAYOUTS))


@pytest.mark.parametrize(
    ("file", "beside", "version"),
    [
        ("vidtok_fsq_causal_488_4096.ckpt", None, "1.0"),
        ("vidtok_fsq_causal_488_32768_v1_1.ckpt", None, "1.1"),
        ("vidtok_fsq_causal_888_32768_v1_1.safetensors", None, "1.1"),
        ("model.safetensors", {"version": "1.0"}, "1.0"),
        ("vidtok_fsq_causal_488_4096.ckpt", {"version": "1.1"}, "1.1"),
        ("diffusion_pytorch_model.safetensors", DIFFUSERS | {"_name_or_path": "somewhere"}, "1.1"),
    ],
)
def test_a_checkpoint_is_loaded(
    only_vidtok: None, tmp_path: Path, file: str, beside: dict[str, Any] | None, version: str
) -> None:
    reference = build_reference(version, **SMALL)
    leftovers = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.full((4, 3, 4, 4), math.nan)}
    tensors = reference.state_dict() | leftovers
    if file.endswith(".ckpt"):
        torch.save({"state_dict": tensors, "global_step": 3, "callbacks": {}}, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    if beside is not None:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    video = noise(1, 3, 5, 8, 8)
    _, codes = reference(video, encoder_mode=True)
    for path in (tmp_path, tmp_path / file):
        tokenizer = load_foreign(path)
        assert isinstance(tokenizer, VidTokTokenizer)
        assert tokenizer.config.version == version
        assert not tokenizer.training
        assert_same_codes(tokenizer, tokenizer.to_latents(video), tokenizer.encode(video).codes, codes)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: None, "may be VidTok 1.0 or 1.1, which differ only in arithmetic; write"),
        (
            without("decoder.up.0.block.0.norm1.norm.weight"),
            r"tensor 'decoder.stages.0.spatial.0.norm1.weight' is miss",
        ),
        (without("encoder.conv_out.conv.weight"), "tensor 'encoder.conv_out.conv.weight' is missing"),
        (lambda t: t.update({"encoder.quant.weight": torch.zeros(1)}), "tensor 'encoder.quant.weight' is extra"),
        (
            lambda t: t.update({"encoder.conv_out.conv.weight": torch.zeros(6, 24, 3, 3, 3)}),
            "is a continuous VidTok; only those with codes",
        ),
        (
            lambda t: t.update({"encoder.conv_in.weight": t.pop("encoder.conv_in.conv.weight")}),
            "is a non-causal VidTok; only causal ones",
        ),
        (
            lambda t: t.update({"decoder.norm_out.norm.bias": torch.zeros(9)}),
            r"tensor 'decoder.norm_out.bias' has shape \(9,\), expected \(8,\)",
        ),
        (lambda t: t.update({"encoder.conv_out.conv.weight": torch.zeros(())}), "not a VidTok checkpoint after all"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    only_vidtok: None, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tensors = dict(build_reference(**SMALL).state_dict())
    edit(tensors)
    if "may be" not in message:
        (tmp_path / "config.json").write_text(json.dumps({"version": "1.1"}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PlaitError, match=message) as raised:
        load_foreign(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)
