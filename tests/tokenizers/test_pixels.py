"""What visual tokenizers share, on a toy whose codes are plain formulas and on small real networks."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import Codes
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.pixels import CHUNK, Cache, PixelTokenizer, _ramp, _regroup, _tiles, with_past
from plait.tokenizers.quantizer import QuantizerConfig, build_quantizer
from plait.tokenizers.visual import VisualConfig, VisualTokenizer

RVQ = QuantizerConfig(kind="rvq", codebook_size=16, dim=4, codebooks=3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def network(seed: int = 0, **config: Any) -> VisualTokenizer:
    """Untrained, but with no weight at its quiet start."""
    torch.manual_seed(seed)
    defaults = {"patch": 2, "widths": (8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
    tokenizer = VisualTokenizer(VisualConfig(**(defaults | config))).eval().requires_grad_(False)
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tokenizer


def smooth(*size: int) -> Tensor:
    """A picture or clip of slow waves, ``[1, 3, *size]``."""
    axes = torch.meshgrid(*(torch.linspace(0, 3, n) for n in size), indexing="ij")
    return torch.stack([torch.sin(sum(axes) + c) * 0.8 for c in range(3)])[None]


@dataclass(frozen=True)
class ToyConfig:
    group: int = 4


class Toy(PixelTokenizer):
    """Grey means of blocks of group × 4 × 4 pixels, in 8 steps; groups of equal rank, as in Emu3."""

    architecture: ClassVar[str] = "toy"
    config_class: ClassVar[type] = ToyConfig
    first_alone: ClassVar[bool] = False
    factor = 4

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.config = ToyConfig(group)
        self.quantizer = build_quantizer(QuantizerConfig(levels=(9,)))
        self.nothing = nn.Parameter(torch.zeros(1))

    @property
    def temporal_factor(self) -> int:
        return self.config.group

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        return F.avg_pool3d(pixels.mean(1, keepdim=True), (self.config.group, 4, 4)) * 3

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        return F.interpolate(z, scale_factor=(self.config.group, 4, 4)).expand(-1, 3, -1, -1, -1)


# Chunks of a stream


@settings(deadline=None, max_examples=80)
@given(
    plan=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    later=st.sampled_from([1, 2, 3, 4, 8, 32]),
    alone=st.booleans(),
)
def test_chunks_are_regrouped_into_whole_groups(plan: list[int], later: int, alone: bool) -> None:
    first = 1 if alone else later
    video = torch.arange(float(sum(plan))).reshape(1, 1, -1, 1, 1)
    given_so_far = []

    def chunks() -> Iterator[Tensor]:
        for chunk in video.split(plan, 2):
            given_so_far.append(chunk.shape[2])
            yield chunk

    taken = []
    for chunk in _regroup(chunks(), (first, later)):
        least = later if taken else first
        assert chunk.shape[2] >= least
        assert (chunk.shape[2] - least) % later == 0
        assert chunk.shape[2] <= max(CHUNK, later)
        taken.append(chunk)
        # No group is held back: what was given before this chunk's last input frame was already taken.
        assert sum(t.shape[2] for t in taken) + later > sum(given_so_far[:-1])
    together = torch.cat(taken, 2).flatten().tolist()
    padding = -max(0, sum(plan) - first) % later + max(0, first - sum(plan))
    assert together == [*range(sum(plan)), *[sum(plan) - 1] * padding]


def test_the_past_by_hand() -> None:
    layer, cache = nn.Identity(), {}
    x = torch.arange(1.0, 7.0).reshape(1, 1, 6, 1, 1)
    assert with_past(x, 2, layer, None).flatten().tolist() == [1, 1, 1, 2, 3, 4, 5, 6]
    assert with_past(x, 2, layer, None, "zeros").flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    parts = [with_past(part, 2, layer, cache) for part in x.split([1, 2, 3], 2)]
    assert [part.flatten().tolist() for part in parts] == [[1, 1, 1], [1, 1, 2, 3], [2, 3, 4, 5, 6]]


@pytest.mark.parametrize("temporal_factor", [1, 2, 4, 8])
@pytest.mark.parametrize(("quantizer", "tile"), [(QuantizerConfig(levels=(5, 4, 3)), None), (RVQ, 32)])
def test_any_chunks_give_the_same_video(temporal_factor: int, quantizer: QuantizerConfig, tile: int | None) -> None:
    tokenizer = network(temporal_factor=temporal_factor, quantizer=quantizer, decoder_norm="spatial")
    frames = 2 * temporal_factor + 18
    video = noise(2, 3, frames, 10, 45 if tile else 9)
    encoded = tokenizer.encode(video, tile=tile)
    whole = tokenizer.decode(encoded, tile=tile)
    assert encoded.codes.shape[-3] == 1 + math.ceil((frames - 1) / temporal_factor)
    assert whole.shape == video.shape
    sure = None
    if tile is None:
        padded = F.pad(video, (0, 3, 0, 2, 0, -(frames - 1) % temporal_factor), mode="replicate")
        latents = tokenizer.to_latents(padded).movedim(1, -1)
        sure = tokenizer.quantizer.margin(latents) > 1e-5
        assert torch.equal(encoded.codes[sure], tokenizer.quantizer.codes(latents)[sure])
    random = torch.Generator().manual_seed(temporal_factor)
    for _ in range(3):
        plan: list[int] = []
        while (left := frames - sum(plan)) > 0:
            plan.append(min(left, int(torch.randint(1, 21, (), generator=random))))
        codes = torch.cat(list(tokenizer.encode_stream(video.split(plan, 2), tile=tile)), -3)
        same = codes == encoded.codes
        assert same[sure].all() if sure is not None else same.float().mean() > 0.999
        cut = [1, encoded.codes.shape[-3] - 1]
        parts = tokenizer.decode_stream(encoded.codes.split(cut, -3), size=encoded.size, tile=tile)
        torch.testing.assert_close(torch.cat(list(parts), 2), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [13], [2, 3, 8], [1] * 13])
def test_cutting_where_groups_end_and_elsewhere(plan: list[int]) -> None:
    tokenizer = network(temporal_factor=4, stem="haar", widths=(8, 32), attention=(1,))
    video = noise(1, 3, 13, 8, 12)
    latents = tokenizer.to_latents(video).movedim(1, -1)
    sure = tokenizer.quantizer.margin(latents) > 1e-5
    codes = torch.cat(list(tokenizer.encode_stream(video.split(plan, 2))), 1)
    assert codes.shape == (1, 4, 2, 3)
    assert torch.equal(codes[sure], tokenizer.quantizer.codes(latents)[sure])


def test_each_group_comes_as_soon_as_it_is_whole() -> None:
    tokenizer, seen = network(temporal_factor=4), 0

    def camera() -> Iterator[Tensor]:
        nonlocal seen
        for _ in range(10):
            seen += 1
            yield noise(1, 3, 1, 8, 8, seed=seen)

    arrived = [(seen, codes.shape[1]) for codes in tokenizer.encode_stream(camera())]
    assert arrived == [(1, 1), (5, 1), (9, 1), (10, 1)]


def test_an_empty_stream_is_empty() -> None:
    tokenizer = network()
    assert list(tokenizer.encode_stream([])) == []
    assert list(tokenizer.decode_stream([])) == []


def test_the_consumer_of_a_stream_keeps_its_autocast() -> None:
    tokenizer = network(temporal_factor=2)
    encoded = tokenizer.encode(noise(1, 3, 40, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in tokenizer.encode_stream([noise(1, 3, 40, 8, 8)]):
            assert torch.is_autocast_enabled("cpu")
        for _ in tokenizer.decode_stream([encoded.codes]):
            assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_streams_may_run_side_by_side() -> None:
    tokenizer = network(temporal_factor=2)
    a, b = noise(1, 3, 9, 8, 8), noise(2, 3, 9, 12, 8, seed=1)
    pairs = zip(tokenizer.encode_stream(a.split(1, 2)), tokenizer.encode_stream(b.split(1, 2)), strict=True)
    first, second = (torch.cat(codes, 1) for codes in zip(*pairs, strict=True))
    assert (first == tokenizer.encode(a).codes).float().mean() > 0.99
    assert (second == tokenizer.encode(b).codes).float().mean() > 0.99


def test_chunks_that_do_not_belong_together_are_refused() -> None:
    tokenizer = network(temporal_factor=2)
    for other in (noise(2, 3, 2, 8, 8), noise(1, 3, 2, 12, 8), noise(1, 3, 2, 8, 4)):
        with pytest.raises(PlaitError, match=r"^pixels: a chunk is .* differ in more than T"):
            list(tokenizer.encode_stream([noise(1, 3, 1, 8, 8), other]))
    codes = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    for shape in ((2, 1, 2, 2), (1, 1, 3, 2), (1, 1, 2, 1)):
        with pytest.raises(PlaitError, match=r"^codes: a chunk is .* differ in more than t"):
            list(tokenizer.decode_stream([codes, torch.zeros(shape, dtype=torch.int64)]))
    with pytest.raises(PlaitError, match="^codes: shape is"):
        list(tokenizer.decode_stream([codes[0]]))
    with pytest.raises(PlaitError, match="^pixels: shape is"):
        list(tokenizer.encode_stream([noise(1, 3, 8, 8)]))
    for size in ((9, 9), (1, 8, 12), (4, 8)):
        with pytest.raises(PlaitError, match="^size: .* does not fit a grid of 2×2"):
            list(tokenizer.decode_stream([codes], size=size))


# Groups of equal rank


def test_a_group_that_is_not_whole_repeats_its_last_frame() -> None:
    toy = Toy()
    assert [toy.frames_of(t) for t in (1, 2, 3)] == [4, 8, 12]
    assert [toy.grid_frames_of(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    ramp = torch.linspace(-1, 1, 6).reshape(1, 1, 6, 1, 1).expand(1, 3, 6, 4, 4)
    encoded = toy.encode(ramp)
    assert encoded.size == (6, 4, 4)
    whole = toy.encode(F.pad(ramp, (0, 0, 0, 0, 0, 2), mode="replicate"))
    assert torch.equal(encoded.codes, whole.codes)
    assert toy.decode(encoded).shape == (1, 3, 6, 4, 4)
    assert toy.decode(whole).shape == (1, 3, 8, 4, 4)


def test_a_still_is_a_group_of_equal_frames() -> None:
    toy, still = Toy(), noise(2, 3, 7, 9)
    encoded = toy.encode(still)
    assert encoded.codes.shape == (2, 2, 3)
    assert torch.equal(encoded.codes, toy.encode(still[:, :, None].expand(-1, -1, 4, -1, -1)).codes[:, 0])
    assert toy.decode(encoded).shape == (2, 3, 7, 9)
    assert toy.decode(encoded.codes).shape == (2, 3, 8, 12)


# Frames and codes there and back


@settings(deadline=None, max_examples=30)
@given(
    frames=st.integers(1, 21),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    factor=st.sampled_from([1, 2, 4, 8]),
    alone=st.booleans(),
)
def test_any_clip_comes_back_in_its_size(frames: int, height: int, width: int, factor: int, alone: bool) -> None:
    tokenizer = NETWORKS[factor] if alone else Toy(factor)
    video = noise(1, 3, frames, height, width)
    encoded = tokenizer.encode(video)
    first = 1 if alone else factor
    grid = 1 + math.ceil(max(0, frames - first) / factor), math.ceil(height / 4), math.ceil(width / 4)
    assert encoded.codes.shape == (1, *grid)
    assert (encoded.modality, encoded.size) == ("video", (frames, height, width))
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    # A size with fewer frames than the grid can hold crops, and the codes alone give all.
    everything = tokenizer.decode(encoded.codes)
    assert everything.shape == (1, 3, tokenizer.frames_of(grid[0]), grid[1] * 4, grid[2] * 4)
    torch.testing.assert_close(decoded, everything[:, :, :frames, :height, :width], atol=1e-5, rtol=0)


NETWORKS = {factor: network(temporal_factor=factor, widths=(4, 4)) for factor in (1, 2, 4, 8)}


def test_frames_in_any_memory_layout() -> None:
    tokenizer = NETWORKS[2]
    video = noise(2, 3, 5, 9, 7)
    expected = tokenizer.encode(video).codes
    strided = noise(2, 3, 10, 18, 14)
    strided[:, :, ::2, ::2, ::2] = video
    for layout in (
        strided[:, :, ::2, ::2, ::2],
        video.transpose(3, 4).contiguous().transpose(3, 4),
        video.movedim(1, -1).contiguous().movedim(-1, 1),
        video.double(),
    ):
        assert torch.equal(tokenizer.encode(layout).codes, expected)
    repeated = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert torch.equal(tokenizer.encode(repeated).codes, tokenizer.encode(repeated.contiguous()).codes)


def test_pixels_and_codes_that_went_in_are_left_alone() -> None:
    tokenizer, video = NETWORKS[4], noise(1, 3, 6, 9, 7)
    before = video.clone()
    encoded = tokenizer.encode(video, tile=32)
    codes = encoded.codes.clone()
    tokenizer.decode(encoded)
    assert torch.equal(video, before)
    assert torch.equal(encoded.codes, codes)


def test_inference_mode_changes_nothing() -> None:
    tokenizer, video = NETWORKS[4], noise(1, 3, 6, 9, 7)
    encoded = tokenizer.encode(video)
    decoded = tokenizer.decode(encoded)
    with torch.inference_mode():
        again = tokenizer.encode(video.clone())
        assert torch.equal(again.codes, encoded.codes)
        assert torch.equal(tokenizer.decode(again), decoded)
    assert torch.equal(tokenizer.decode(again), decoded)


def test_encoding_keeps_no_graph() -> None:
    tokenizer = network(temporal_factor=2).requires_grad_(True)
    encoded = tokenizer.encode(noise(1, 3, 3, 8, 8).requires_grad_())
    assert not tokenizer.decode(encoded).requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize(
    "quantizer", [QuantizerConfig(levels=(5, 4)), QuantizerConfig(kind="vq_ema", codebook_size=16, dim=4), RVQ]
)
def test_codes_of_any_integer_type_decode(dtype: torch.dtype, quantizer: QuantizerConfig) -> None:
    tokenizer = network(quantizer=quantizer)
    codes = tokenizer.encode(noise(1, 3, 8, 12)).codes
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


# Several codebooks


def test_a_residual_quantizers_codes() -> None:
    tokenizer = network(temporal_factor=2, quantizer=RVQ)
    image, video = noise(2, 3, 8, 12), noise(2, 3, 5, 8, 12)
    for pixels, grid in ((image, (2, 3)), (video, (3, 2, 3))):
        encoded = tokenizer.encode(pixels)
        assert encoded.codes.shape == (2, 3, *grid)
        z = tokenizer.to_latents(pixels if pixels.ndim == 5 else pixels[:, :, None]).movedim(1, -1)
        expected = tokenizer.quantizer.codes(z).movedim(-1, 1)
        assert torch.equal(encoded.codes, expected if pixels.ndim == 5 else expected[:, :, 0])
        for n in (1, 2, 3):
            fewer = tokenizer.encode(pixels, n_codebooks=n)
            assert torch.equal(fewer.codes, encoded.codes[:, :n])
            decoded = tokenizer.decode(fewer)
            assert decoded.shape == pixels.shape
            assert torch.equal(decoded, tokenizer.decode(encoded)) == (n == 3)
    streamed = torch.cat(list(tokenizer.encode_stream(video.split(1, 2), n_codebooks=2)), 2)
    assert torch.equal(streamed, tokenizer.encode(video, n_codebooks=2).codes)


@pytest.mark.parametrize("n", [0, 4, -1, True, 1.0, "2"])
def test_a_wrong_number_of_codebooks_is_refused(n: Any) -> None:
    with pytest.raises(PlaitError, match=rf"^n_codebooks: is {n!r}, this tokenizer has 3"):
        network(quantizer=RVQ).encode(noise(1, 3, 8, 8), n_codebooks=n)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 2), r"expected \[B, q, h, w\] or \[B, q, t, h, w\]"),
        ((1, 4, 2, 2), "has 4 codebooks, this tokenizer has 3"),
        ((1, 0, 2, 2), "shape is"),
        ((1, 1, 1, 1, 2, 2), "shape is"),
    ],
)
def test_a_residual_quantizers_bad_codes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlaitError, match=f"^codes: .*{message}"):
        network(quantizer=RVQ).decode(torch.zeros(shape, dtype=torch.int64))


# Tiles


@settings(deadline=None, max_examples=150)
@given(h=st.integers(1, 80), w=st.integers(1, 80), tile=st.integers(8, 40), factor=st.sampled_from([1, 4, 8, 16]))
def test_tiles_cover_a_picture(h: int, w: int, tile: int, factor: int) -> None:
    height, width, side = h * factor, w * factor, tile * factor
    owned, weights = torch.zeros(height, width), torch.zeros(height, width)
    for rows, columns, own_rows, own_columns in _tiles(height, width, side, factor):
        owned[own_rows, own_columns] += 1
        weights[rows, columns] += _ramp(rows, height, weights)[:, None] * _ramp(columns, width, weights)
        for span, own, length in ((rows, own_rows, height), (columns, own_columns, width)):
            assert all(n % factor == 0 for n in (span.start, span.stop, own.start, own.stop))
            assert span.stop - span.start == min(side, length)
            assert 0 <= span.start <= own.start < own.stop <= span.stop <= length
            # Next to every cut inside the picture there is context, at least an eighth of the tile less rounding.
            for inside, gap in ((own.start, own.start - span.start), (own.stop, span.stop - own.stop)):
                assert inside in (0, length) or gap >= side // 8 - factor
    assert (owned == 1).all()
    assert weights.min() > 0


def test_a_tile_that_holds_the_picture_changes_nothing() -> None:
    tokenizer = network(widths=(8, 32), attention=(1,))
    picture = noise(1, 3, 61, 64)
    encoded = tokenizer.encode(picture)
    for tile in (64, 67, 1000):
        assert torch.equal(tokenizer.encode(picture, tile=tile).codes, encoded.codes)
        assert torch.equal(tokenizer.decode(encoded, tile=tile), tokenizer.decode(encoded))


def test_tiled_is_close_to_whole() -> None:
    tokenizer, picture = load_tokenizer("plait-tiny", "image"), smooth(300, 500)
    whole, tiled = tokenizer.encode(picture), tokenizer.encode(picture, tile=128)
    assert tiled.codes.shape == whole.codes.shape
    assert tiled.size == (300, 500)
    # Every norm sees one tile instead of the whole picture: close, not equal.
    assert (tiled.codes == whole.codes).float().mean() > 0.6
    decoded = tokenizer.decode(whole)
    error = (tokenizer.decode(whole, tile=128) - decoded).abs()
    assert error.shape == picture.shape
    assert error.mean() < 0.07
    assert error.max() < 0.4
    errors = [(made - picture).square().mean() for made in (tokenizer.decode(tiled, tile=128), decoded)]
    assert errors[0] < 1.2 * errors[1]


def test_tiles_of_several_codebooks() -> None:
    tokenizer, picture = network(quantizer=RVQ), noise(2, 3, 43, 70)
    encoded = tokenizer.encode(picture, tile=32)
    assert encoded.codes.shape == (2, 3, 11, 18)
    assert torch.equal(tokenizer.encode(picture, n_codebooks=2, tile=32).codes, encoded.codes[:, :2])
    assert tokenizer.decode(encoded, tile=32).shape == picture.shape
    assert tokenizer.decode(encoded.codes[:, :1], tile=32).shape == (2, 3, 44, 72)


def test_blending_leaves_no_seam() -> None:
    # Every tile decodes constant codes to the same constants, up to its border.
    toy = Toy(1)
    codes = torch.full((1, 40, 70), 6)
    torch.testing.assert_close(toy.decode(codes, tile=40), toy.decode(codes))
    picture = noise(1, 3, 157, 281)
    assert torch.equal(toy.encode(picture, tile=41).codes, toy.encode(picture).codes)
    encoded = toy.encode(picture)
    torch.testing.assert_close(toy.decode(encoded, tile=41), toy.decode(encoded))


def test_tiles_of_a_video_keep_their_pasts_apart() -> None:
    tokenizer, video = network(temporal_factor=4, decoder_norm="spatial"), noise(1, 3, 30, 41, 67)
    tiled = tokenizer.encode(video, tile=32)
    # The first tile is a video of its own.
    alone = tokenizer.encode(video[..., :32, :32])
    same = tiled.codes[..., :5, :7] == alone.codes[..., :5, :7]
    assert same.float().mean() > 0.999
    decoded = tokenizer.decode(tiled, tile=32)
    assert decoded.shape == video.shape
    own = tokenizer.decode(tiled.codes[..., :8, :8], size=(30, 32, 32))
    torch.testing.assert_close(decoded[..., :8, :8], own[..., :8, :8], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [0, -64, 31, 64.0, True, "64"])
def test_a_wrong_tile_is_refused(tile: Any) -> None:
    tokenizer = network()
    encoded = tokenizer.encode(noise(1, 3, 8, 8))
    for run in (lambda: tokenizer.encode(noise(1, 3, 8, 8), tile=tile), lambda: tokenizer.decode(encoded, tile=tile)):
        with pytest.raises(PlaitError, match="^tile: is .* at least 32 pixels"):
            run()


# Codes of others, and of another size


def test_codes_with_their_size_and_maker() -> None:
    tokenizer = NETWORKS[4]
    encoded = tokenizer.encode(noise(1, 3, 6, 9, 7))
    with pytest.raises(PlaitError, match="^codes: made by another tokenizer"):
        tokenizer.decode(replace(encoded, fingerprint="0" * 64))
    for size in ((10, 9, 7), (1, 9, 7), (6, 13, 7), (6, 9)):
        with pytest.raises(PlaitError, match="^size: .* does not fit a grid of 3×3×2"):
            tokenizer.decode(encoded, size=size)
    assert tokenizer.decode(encoded, size=(7, 9, 8)).shape == (1, 3, 7, 9, 8)
    assert tokenizer.decode(replace(encoded, size=None)).shape == (1, 3, 9, 12, 8)
    assert tokenizer.decode(Codes(encoded.codes, "video"), size=(9, 5)).shape == (1, 3, 9, 9, 5)


# Memory


MEASURE = """
import json, resource, sys
import torch
from plait.tokenizers.visual import VisualConfig, VisualTokenizer
tokenizer = VisualTokenizer(VisualConfig(widths=(16, 16), temporal_factor=4)).eval()
frames = torch.rand(1, 3, 1, 128, 128).expand(-1, -1, int(sys.argv[1]), -1, -1)
codes = tokenizer.encode(frames).codes
for _ in tokenizer.decode_stream([codes]):
    pass
print(json.dumps([list(codes.shape), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_a_long_video_takes_no_more_memory_than_a_short_one() -> None:
    used = {}
    for count in (33, 257):
        command = [sys.executable, "-c", MEASURE, str(count)]
        shape, used[count] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert shape == [1, 1 + (count - 1) // 4, 16, 16]
    assert used[257] < 1.2 * used[33]
