import contextlib
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from einops import rearrange
from safetensors.torch import save_file
from taming.modules.diffusionmodules import model as taming
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from plait.errors import PlaitError
from plait.tokenizers import vqgan
from plait.tokenizers.blocks import Downsample, GroupNorm, SpatialNorm, Upsample
from plait.tokenizers.foreign import Layout, convert, load_foreign
from plait.tokenizers.vqgan import LAYOUTS, VQGANConfig, VQGANTokenizer

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
TINY = VQGANConfig(
    width=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), z_channels=5, codebook_size=40, codebook_dim=4
)


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep the signal's size, so that no layer's error hides; norms with gains and offsets."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 1:
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
        else:
            tensor.normal_(0.0, 1.0 if "embedding" in name else tensor[0].numel() ** -0.5, generator=generator)


class Reference(nn.Module):
    """What a released VQGAN does, with networks of another project: `pixels → codes` and `codes → pixels`."""

    def __init__(self, network: nn.Module, normalized: bool = False) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.normalized = normalized

    @property
    def codebook(self) -> Tensor:
        weight: Tensor = self.network.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.normalized else weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Distances ``[B, h, w, codes]`` to each code vector."""
        z = self.network.quant_conv(self.network.encoder(pixels))
        z = rearrange(z, "b d h w -> b h w d")
        z = F.normalize(z, dim=-1) if self.normalized else z
        return (z[..., None, :] - self.codebook).square().sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        z = rearrange(self.codebook[codes], "b h w d -> b d h w")
        features = self.network.post_quant_conv(z)
        if isinstance(self.network, VQModel) and self.network.config.norm_type == "spatial":
            return self.network.decoder(features, z)
        return self.network.decoder(features)


class TamingModel(nn.Module):
    """taming's VQModel, whose own class needs pytorch_lightning."""

    def __init__(self, n_embed: int = 50, embed_dim: int = 6, **settings: Any) -> None:
        super().__init__()
        settings |= {"double_z": False, "in_channels": 3, "out_ch": 3}
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = taming.Encoder(**settings), taming.Decoder(**settings)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(settings["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, settings["z_channels"], 1)


def diffusers_model(norm_type: str, attention: int, widths: tuple[int, ...], **settings: Any) -> VQModel:
    """With attention on one level."""
    kinds = ["Attn" if i == attention else "" for i in range(len(widths))]
    return VQModel(
        down_block_types=tuple(kind + "DownEncoderBlock2D" for kind in kinds),
        up_block_types=tuple(kind + "UpDecoderBlock2D" for kind in reversed(kinds)),
        block_out_channels=widths,
        norm_type=norm_type,
        num_vq_embeddings=60,
        **settings,
    )


def taming_plain() -> Reference:
    settings = {"ch": 32, "ch_mult": (1, 2, 3), "num_res_blocks": 2, "z_channels": 7}
    return Reference(TamingModel(**settings, attn_resolutions=[16], resolution=64))


def taming_attention_everywhere() -> Reference:
    settings = {"ch": 32, "ch_mult": (2, 1), "num_res_blocks": 1, "z_channels": 4}
    return Reference(TamingModel(**settings, attn_resolutions=[32, 16], resolution=32))


def chameleon() -> Reference:
    """Attention in the middle only."""
    settings = {"ch": 32, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 2, "z_channels": 6}
    return Reference(TamingModel(**settings, attn_resolutions=[], resolution=512))


def janus(multipliers: tuple[int, ...] = (1, 1, 2)) -> Reference:
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=multipliers, latent_channels=9, embed_dim=8, num_embeddings=70
    )
    return Reference(JanusVQVAE(config), normalized=True)


def movqgan() -> Reference:
    return Reference(diffusers_model("spatial", 2, (32, 64, 96), layers_per_block=2, latent_channels=4))


def diffusers_plain() -> Reference:
    return Reference(diffusers_model("group", 0, (32, 32), layers_per_block=1, latent_channels=3))


REFERENCES = [taming_plain, taming_attention_everywhere, chameleon, janus, movqgan, diffusers_plain]


def recognised(tensors: dict[str, Tensor]) -> Layout:
    return next(layout for layout in LAYOUTS if layout.recognise(tensors, {}))


def converted(tensors: dict[str, Tensor]) -> VQGANTokenizer:
    tokenizer = convert(tensors, {}, recognised(tensors), "here")
    assert isinstance(tokenizer, VQGANTokenizer)
    return tokenizer


def assert_same_codes(codes: Tensor, distances: Tensor) -> None:
    """Equal, but where two code vectors are equally near."""
    lost = distances.gather(-1, codes[..., None])[..., 0] - distances.amin(-1)
    assert lost.max() < 1e-5
    assert codes.unique().numel() > 1


@pytest.mark.parametrize("build", REFERENCES)
@pytest.mark.parametrize(("height", "width"), [(40, 56), (16, 8)])
@torch.no_grad()
def test_codes_and_pixels_are_those_of_the_reference(build: Any, height: int, width: int) -> None:
    reference = build()
    randomise(reference)
    tokenizer = converted(reference.network.state_dict())
    pixels = picture(2, 3, height, width)
    distances = reference.encode(pixels)
    codes = tokenizer.encode(pixels).codes
    assert_same_codes(codes, distances)
    size = distances.shape[-1]
    codes = torch.randint(size, codes.shape, generator=torch.Generator().manual_seed(1))
    expected = reference.decode(codes)
    assert expected.std() > 0.1
    z = rearrange(tokenizer.quantizer.latents(codes), "b h w d -> b d 1 h w")
    torch.testing.assert_close(tokenizer.from_latents(z)[:, :, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(codes), expected.clamp(-1, 1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_chameleon_encodes_alike_and_says_that_it_cannot_decode(tmp_path: Path) -> None:
    config = ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1, 2], resolution=64, latent_channels=6, embed_dim=5, num_embeddings=50
    )
    network = ChameleonVQVAE(config).eval()
    randomise(network)
    pixels = picture(2, 3, 24, 40)
    # As in a whole Chameleon checkpoint.
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in network.state_dict().items()}
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    tokenizer = load_foreign(tmp_path)
    encoded = tokenizer.encode(pixels)
    assert torch.equal(encoded.codes.flatten(), network.encode(pixels).image_tokens)
    with pytest.raises(PlaitError, match=r"^decode: this checkpoint holds only an encoder .* vqgan\.ckpt"):
        tokenizer.decode(encoded)
    tokenizer.save_pretrained(tmp_path / "own")
    loaded = VQGANTokenizer.from_pretrained(tmp_path / "own")
    assert torch.equal(loaded.encode(pixels).codes, encoded.codes)


@torch.no_grad()
def test_codes_of_an_encoder_alone_decode_with_the_whole() -> None:
    reference = chameleon()
    randomise(reference)
    tensors = reference.network.state_dict()
    whole = converted(tensors)
    alone = converted({name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")})
    assert not alone.config.decoder
    assert whole.decode(alone.encode(picture(1, 3, 16, 16))).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("prefix", ["", "model.vqmodel.", "gen_vision_model."])
@pytest.mark.parametrize("build", [taming_plain, janus, movqgan])
def test_a_network_inside_a_larger_checkpoint_is_found(build: Any, prefix: str) -> None:
    tensors = build().network.state_dict()
    nested = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:
        nested["lm_head.weight"] = torch.zeros(2, 2)
    assert converted(nested).fingerprint == converted(tensors).fingerprint


def test_what_training_leaves_behind_is_dropped() -> None:
    tensors = taming_plain().network.state_dict()
    surplus = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.perceptual_loss.scaling_layer.shift": torch.zeros(1),
        "model_ema.decay": torch.zeros(()),
        "model_ema.encoderconv_inweight": torch.zeros(1),
        "ema_encoder.conv_inweight": torch.zeros(1),
        "ema_post_quant_conv.num_updates": torch.zeros(()),
    }
    assert converted(tensors | surplus).fingerprint == converted(tensors).fingerprint


def llamagen_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names for Janus → LlamaGen's for the same network."""
    named = {"quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down", "up"):
            parts[1] = "conv_blocks"
            parts[3] = {"block": "res"}.get(parts[3], parts[3])
        if parts[1] == "mid":
            parts[2] = {"block_1": "0", "attn_1": "1", "block_2": "2"}[parts[2]]
        named[".".join(parts)] = tensor
    return named


def movqgan_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names → those of the original release, for three levels."""
    replacements = {
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1", "down_blocks": "down",
        "up_blocks.0": "up.2", "up_blocks.1": "up.1", "up_blocks.2": "up.0",
        "resnets": "block", "attentions": "attn", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
        "to_out.0": "proj_out", "to_q": "q", "to_k": "k", "to_v": "v", "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out", "group_norm": "norm", "spatial_norm": "norm",
    }  # fmt: skip
    named = {}
    for name, tensor in tensors.items():
        for theirs, original in replacements.items():
            name = name.replace(theirs, original)
        named[name] = tensor[:, :, None, None] if tensor.ndim == 2 and "attn" in name else tensor
    return named


def test_both_names_of_a_network_give_the_same_tokenizer() -> None:
    for build, rename in ((janus, llamagen_names), (movqgan, movqgan_names)):
        tensors = build().network.state_dict()
        first, second = converted(tensors), converted(rename(tensors))
        assert first.config == second.config
        other = second.state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize(
    ("name", "layout", "millions", "config"),
    [
        (
            "vqgan-imagenet-f16-16384", "taming VQGAN", 76.07,
            VQGANConfig(codebook_dim=256, normalized=False),
        ),
        (
            "chameleon-vqgan", "taming VQGAN", 68.72,
            VQGANConfig(attention_levels=(), codebook_size=8192, codebook_dim=256, normalized=False),
        ),
        ("llamagen-vq-16", "LlamaGen", 71.88, VQGANConfig()),
        ("llamagen-vq-8", "LlamaGen", 70.11, VQGANConfig(multipliers=(1, 2, 2, 4), attention_levels=(3,))),
        (
            "movqgan-67m", "taming VQGAN", 67.83,
            VQGANConfig(128, (1, 2, 2, 4), 2, (3,), 4, 16384, 4, normalized=False, spatial_norm=True),
        ),
        (
            "movqgan-67m-diffusers", "diffusers VQModel", 67.83,
            VQGANConfig(128, (1, 2, 2, 4), 2, (3,), 4, 16384, 4, normalized=False, spatial_norm=True),
        ),
        (
            "movqgan-270m", "taming VQGAN", 270.67,
            VQGANConfig(256, (1, 2, 2, 4), 2, (3,), 4, 16384, 4, normalized=False, spatial_norm=True),
        ),
    ],
)  # fmt: skip
def test_released_checkpoints_have_exactly_our_tensors(
    name: str, layout: str, millions: float, config: VQGANConfig
) -> None:
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}
    found = recognised(tensors)
    assert found.name == layout
    assert found.configure(tensors, {}) == config
    with torch.device("meta"):
        tokenizer = VQGANTokenizer(config)
    renamed = {key: tensor.shape for key, tensor in found.rename(tensors, config).items()}
    assert renamed == {key: tensor.shape for key, tensor in tokenizer.state_dict().items()}
    assert round(sum(math.prod(shape) for shape in renamed.values()) / 1e6, 2) == millions


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    tensors = dict(taming_plain().network.state_dict())
    missing, wrong, unsized = dict(tensors), dict(tensors), dict(tensors)
    del missing["decoder.mid.attn_1.proj_out.bias"]
    wrong["encoder.down.1.block.0.conv2.weight"] = torch.zeros(3, 3)
    del unsized["quantize.embedding.weight"]
    for broken, message in (
        (missing, "'decoder.mid.attn_1.proj_out.bias' is missing"),
        (tensors | {"surplus": torch.zeros(1)}, "'surplus' is extra"),
        (wrong, r"'encoder.down.1.block.0.conv2.weight' has shape \(3, 3\), expected \(64, 64, 3, 3\)"),
        (unsized, "'quantizer.codebook' is missing"),
        (tensors | {"quant_conv.bias": torch.full((6,), math.nan)}, "'quant_conv.bias' holds values that are not fin"),
    ):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(PlaitError, match=message) as raised:
            load_foreign(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_gumbel_quantizer_is_refused() -> None:
    tensors = dict(taming_plain().network.state_dict())
    del tensors["quantize.embedding.weight"]
    tensors |= {
        "quantize.proj.weight": torch.zeros(50, 6, 1, 1),
        "quantize.proj.bias": torch.zeros(50),
        "quantize.embed.weight": torch.zeros(50, 6),
    }
    with pytest.raises(PlaitError, match="Gumbel"):
        converted(tensors)


class Payload:
    """Runs code when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_checkpoint_with_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    tensors = taming_plain().network.state_dict()
    content = {"state_dict": dict(tensors), "callbacks": Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(PlaitError, match=r"model\.ckpt: holds Python objects .* weights_only=False"):
        load_foreign(tmp_path)
    assert not (tmp_path / "ran").exists()
    # The file is what it claims to be: unpickling it does run the code.
    pickle.loads(pickle.dumps(content["callbacks"]))
    assert (tmp_path / "ran").exists()
    del content["callbacks"]
    torch.save(content | {"global_step": 3}, tmp_path / "model.ckpt")
    loaded = load_foreign(tmp_path)
    assert loaded is not None
    assert loaded.fingerprint == converted(dict(tensors)).fingerprint


@torch.no_grad()
def test_a_video_is_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(TINY).eval()
    randomise(tokenizer)
    video = picture(2, 3, 3, 10, 12)
    encoded = tokenizer.encode(video)
    decoded = tokenizer.decode(encoded)
    assert (encoded.modality, encoded.size, encoded.codes.shape) == ("video", (3, 10, 12), (2, 3, 5, 6))
    # However many frames pass at once.
    for pixels_at_once in (1, 2 * 10 * 12, 10**9):
        monkeypatch.setattr(vqgan, "PIXELS_AT_ONCE", pixels_at_once)
        z = tokenizer.to_latents(video)
        for t in range(3):
            torch.testing.assert_close(z[:, :, t : t + 1], tokenizer.to_latents(video[:, :, t : t + 1]))
            torch.testing.assert_close(decoded[:, :, t], tokenizer.decode(encoded.codes[:, t]))


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = VQGANTokenizer(TINY).eval()
    randomise(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = VQGANTokenizer.from_pretrained(tmp_path)
    assert loaded.config == TINY
    weight = loaded.encoder.down[0].block[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded.encode(picture(1, 3, 9, 14)).codes, tokenizer.encode(picture(1, 3, 9, 14)).codes)


def test_every_weight_is_reached() -> None:
    tokenizer = VQGANTokenizer(VQGANConfig(32, (1, 2), 1, (0,), 4, 30, 4, normalized=False, spatial_norm=True))
    z = tokenizer.to_latents(picture(1, 3, 1, 8, 12))
    tokenizer.from_latents(z).square().mean().backward()
    unreached = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    # Look-up has no gradient. A key's offset moves all scores of a query alike, and softmax takes that out.
    assert [name for name in unreached if not name.endswith((".k.bias", "codebook"))] == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 3)])
def test_enlarging_is_repeating_and_convolving(height: int, width: int) -> None:
    layer = Upsample(32)
    x = picture(2, 32, height, width)
    expected = F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.conv.weight, layer.conv.bias, padding=1
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 8), (6, 4)])
def test_halving_pads_at_the_bottom_and_right(height: int, width: int) -> None:
    layer = Downsample(32)
    x = picture(2, 32, height, width)
    padded = torch.zeros(2, 32, height + 1, width + 1)
    padded[:, :, :height, :width] = x
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias)[:, :, ::2, ::2]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_spatial_norm_scales_and_shifts_by_its_latents(layout: torch.memory_format) -> None:
    norm = SpatialNorm(32, 4)
    randomise(norm)
    x = picture(2, 32, 6, 12).contiguous(memory_format=layout).requires_grad_()
    z = picture(2, 4, 3, 3).contiguous(memory_format=layout).requires_grad_()
    repeated = z.repeat_interleave(2, 2).repeat_interleave(4, 3)
    expected = norm.norm_layer(x) * norm.conv_y(repeated) + norm.conv_b(repeated)
    found = norm(x, z)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = [x, z, *norm.parameters()]
    gradients = (torch.autograd.grad(y.pow(3).sum(), weights) for y in (found, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 48}, "width is 48, must be a multiple of 32"),
        ({"width": 0}, "width is 0"),
        ({"blocks": True}, "blocks is True"),
        ({"z_channels": "4"}, "z_channels is '4'"),
        ({"multipliers": ()}, "multipliers is empty"),
        ({"multipliers": (1, 0)}, "multipliers is"),
        ({"multipliers": 3}, "multipliers is 3"),
        ({"attention_levels": (2,)}, r"attention_levels is \(2,\), the levels are 0\.\.1"),
        ({"attention_levels": (-1,)}, "attention_levels is"),
        ({"normalized": 1}, "normalized is 1, must be true or false"),
        ({"spatial_norm": None}, "spatial_norm is None"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"codebook_dim": 2.0}, "dim is 2.0"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    settings = {"multipliers": (1, 2), "attention_levels": ()} | fields
    with pytest.raises(PlaitError, match=f"^(vqgan|quantizer): {message}"):
        VQGANConfig(**settings)


def test_one_value_in_each_group_is_normalised_too() -> None:
    """A narrow network has that of a picture of one cell; nn.functional refuses it."""
    norm = GroupNorm(32)
    assert norm(torch.randn(1, 32, 1, 1)).abs().max() < 1e-3
