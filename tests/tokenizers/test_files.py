import math
import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes
from plait.tokenizers.files import SUFFIX, decode_files, encode_files
from plait.tokenizers.media import Video, read_image, to_image, to_pixels
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.video import read_video, write_video
from plait.tokenizers.visual import VisualConfig, VisualTokenizer
from plait.tokenizers.visual_files import TILE, _at_rate

SMALL = VisualConfig(
    patch=4, widths=(8, 16), encoder_blocks=1, decoder_blocks=1, quantizer=QuantizerConfig(levels=(5, 4, 3))
)


def made(config: VisualConfig, folder: Path, seed: int = 0) -> VisualTokenizer:
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(config).eval().requires_grad_(False)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def frame_wise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisualTokenizer]:
    folder = tmp_path_factory.mktemp("frame-wise")
    return folder, made(SMALL, folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisualTokenizer]:
    """Four frames a code."""
    folder = tmp_path_factory.mktemp("causal")
    return folder, made(replace(SMALL, temporal_factor=4), folder)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Coarse random colours ``[..., h, w, 3]``, which survive a codec."""
    generator = torch.Generator().manual_seed(seed)
    *lead, height, width = shape
    small = torch.rand(math.prod(lead), 3, height // 8 + 2, width // 8 + 2, generator=generator)
    large = F.interpolate(small, (height, width), mode="bilinear")
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).reshape(*shape, 3)


def floats(frames: Tensor) -> Tensor:
    """``[t, h, w, 3]`` uint8 → ``[1, 3, t, h, w]`` in [-1, 1]."""
    return (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(noise(21, 34).numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    write_video(Video(noise(21, 24, 40), 12.5), tmp_path / "film.mp4")
    return tmp_path / "film.mp4"


# --- the same as the Python API


def test_a_picture_there_and_back(tmp_path: Path, picture: Path, frame_wise: tuple[Path, VisualTokenizer]) -> None:
    name, tokenizer = frame_wise
    (written,) = encode_files([picture], tmp_path / "a" / "b", name)
    assert (written.source, written.file) == (str(picture), str(tmp_path / "a" / "b" / f"photo{SUFFIX}"))
    assert (written.modality, written.size, written.grid, written.fps) == ("image", (21, 34), (3, 5), None)
    codes, expected = Codes.load(written.file), tokenizer.encode(to_pixels(read_image(picture))[None])
    assert torch.equal(codes.codes, expected.codes)
    assert codes.codes.dtype == torch.int64
    assert (codes.size, codes.fingerprint, codes.modality) == ((21, 34), tokenizer.fingerprint, "image")
    (back,) = decode_files([Path(written.file)], tmp_path / "c", name)
    assert back.file == str(tmp_path / "c" / "photo.png")
    assert read_image(back.file).tobytes() == to_image(tokenizer.decode(expected)[0]).tobytes()


@pytest.mark.parametrize("kind", ["frame_wise", "causal"])
def test_a_film_there_and_back(tmp_path: Path, film: Path, kind: str, request: pytest.FixtureRequest) -> None:
    name, tokenizer = request.getfixturevalue(kind)
    (written,) = encode_files([film], tmp_path / "a", name)
    pixels = floats(read_video(film).frames)
    expected = tokenizer.encode(pixels)
    codes = Codes.load(written.file)
    assert torch.equal(codes.codes, expected.codes)
    assert (codes.size, codes.fps, codes.modality) == ((21, 24, 40), 12.5, "video")
    assert written.grid == (21 if kind == "frame_wise" else 6, 3, 5)
    (back,) = decode_files([Path(written.file)], tmp_path / "b", name, format="gif")
    found = read_video(back.file)
    assert found.frames.shape == (21, 24, 40, 3)
    assert found.fps == pytest.approx(12.5)
    decoded = [np.asarray(to_image(frame)) for frame in tokenizer.decode(expected)[0].unbind(1)]
    write_video(Video(torch.from_numpy(np.stack(decoded)), 12.5), tmp_path / "same.gif")
    assert Path(back.file).read_bytes() == (tmp_path / "same.gif").read_bytes()


def test_several_codebooks(tmp_path: Path, film: Path, picture: Path) -> None:
    quantizer = QuantizerConfig(kind="rvq", levels=(), codebook_size=16, dim=4, codebooks=3)
    tokenizer = made(replace(SMALL, temporal_factor=2, quantizer=quantizer), tmp_path / "tokenizer")
    written = encode_files([film, picture], tmp_path / "a", tmp_path / "tokenizer")
    assert [w.grid for w in written] == [(3, 11, 3, 5), (3, 3, 5)]
    assert torch.equal(Codes.load(written[0].file).codes, tokenizer.encode(floats(read_video(film).frames)).codes)
    back = decode_files([Path(w.file) for w in written], tmp_path / "b", tmp_path / "tokenizer")
    assert [Path(w.file).name for w in back] == ["film.mp4", "photo.png"]
    assert read_video(back[0].file).frames.shape == (21, 24, 40, 3)


def test_a_bundles_image_tokenizer_serves(tmp_path: Path, bundle: Path, picture: Path) -> None:
    (written,) = encode_files([picture], tmp_path / "a", bundle)
    (back,) = decode_files([Path(written.file)], tmp_path / "b", bundle)
    assert read_image(back.file).size == (34, 21)


# --- options


def test_the_short_side_is_scaled(tmp_path: Path, picture: Path, film: Path, frame_wise: tuple[Path, Any]) -> None:
    name, tokenizer = frame_wise
    for size, expected in ((16, (16, 26)), (40, (40, 65)), (21, (21, 34)), (1, (1, 2))):
        (written,) = encode_files([picture], tmp_path / str(size), name, size=size)
        assert written.size == expected
        pixels = to_pixels(read_image(picture))[None]
        if size != 21:
            # Pillow's bicubic filter works on bytes, ours on floats.
            resized = read_image(picture).resize(expected[::-1], Image.Resampling.BICUBIC)
            scaled = F.interpolate(pixels, expected, mode="bicubic", antialias=True).clamp(-1, 1)
            assert (to_pixels(resized) - scaled[0]).abs().max() < 0.03
            pixels = scaled
        assert torch.equal(Codes.load(written.file).codes, tokenizer.encode(pixels).codes)
    (written,) = encode_files([film], tmp_path / "film", name, size=12)
    assert written.size == (21, 12, 20)


def test_the_frame_rate_is_changed(tmp_path: Path, film: Path, frame_wise: tuple[Path, VisualTokenizer]) -> None:
    name, tokenizer = frame_wise
    frames = read_video(film).frames
    for fps, shown in ((12.5, range(21)), (25, [t // 2 for t in range(42)]), (5, [0, 2, 5, 7, 10, 12, 15, 17, 20])):
        (written,) = encode_files([film], tmp_path / str(fps), name, fps=fps)
        codes = Codes.load(written.file)
        assert codes.fps == fps
        assert torch.equal(codes.codes, tokenizer.encode(floats(frames[list(shown)])).codes)


@given(count=st.integers(1, 60), step=st.fractions(Fraction(1, 20), 20))
def test_samples_are_evenly_spaced(count: int, step: Fraction) -> None:
    found = list(_at_rate(range(count), step))  # type: ignore[arg-type]
    assert found == [math.floor(k * step) for k in range(math.ceil(count / step))]


def test_large_pictures_go_in_tiles(tmp_path: Path, frame_wise: tuple[Path, VisualTokenizer]) -> None:
    name, tokenizer = frame_wise
    Image.fromarray(noise(64, 200).numpy()).save(tmp_path / "wide.png")
    pixels = to_pixels(read_image(tmp_path / "wide.png"))[None]
    (whole,) = encode_files([tmp_path / "wide.png"], tmp_path / "a", name)
    (tiled,) = encode_files([tmp_path / "wide.png"], tmp_path / "b", name, tile=64)
    assert torch.equal(Codes.load(whole.file).codes, tokenizer.encode(pixels).codes)
    assert torch.equal(Codes.load(tiled.file).codes, tokenizer.encode(pixels, tile=64).codes)
    (back,) = decode_files([Path(tiled.file)], tmp_path / "c", name, tile=64)
    expected = tokenizer.decode(Codes.load(tiled.file), tile=64)
    assert read_image(back.file).tobytes() == to_image(expected[0]).tobytes()


def test_little_goes_through_at_once(
    tmp_path: Path, film: Path, frame_wise: tuple[Path, VisualTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = VisualTokenizer.encode_stream

    def watched(self: VisualTokenizer, chunks: Iterator[Tensor], **options: Any) -> Iterator[Tensor]:
        def counted() -> Iterator[Tensor]:
            for chunk in chunks:
                seen.append(chunk.shape[2])
                yield chunk

        return original(self, counted(), **options)

    monkeypatch.setattr(VisualTokenizer, "encode_stream", watched)
    encode_files([film], tmp_path / "a", frame_wise[0])
    assert seen == [16, 5]
    seen.clear()
    # Of larger frames fewer.
    monkeypatch.setattr("plait.tokenizers.visual_files.TILE", 64)
    (written,) = encode_files([film], tmp_path / "b", frame_wise[0])
    assert seen == [4] * 5 + [1]
    (back,) = decode_files([Path(written.file)], tmp_path / "c", frame_wise[0])
    assert len(read_video(back.file).frames) == 21


def test_progress_reaches_its_end(tmp_path: Path, picture: Path, film: Path, frame_wise: tuple[Path, Any]) -> None:
    told: list[tuple[int, int]] = []
    written = encode_files([film, picture], tmp_path, frame_wise[0], advance=lambda *at: told.append(at))
    assert told == [(16, 22), (21, 22), (22, 22)]
    told.clear()
    decode_files([Path(w.file) for w in written], tmp_path / "b", frame_wise[0], advance=lambda *at: told.append(at))
    assert told == [(16, 22), (21, 22), (22, 22)]


@pytest.mark.parametrize(
    ("modality", "format", "magic"),
    [
        ("image", "png", b"\x89PNG"),
        ("image", "jpg", b"\xff\xd8"),
        ("image", "webp", b"RIFF"),
        ("image", "gif", b"GIF8"),
        ("video", "mp4", b"ftyp"),
        ("video", "webm", b"\x1aE\xdf\xa3"),
        ("video", "webp", b"RIFF"),
        ("video", "gif", b"GIF8"),
    ],
)
def test_formats(
    tmp_path: Path, picture: Path, film: Path, frame_wise: tuple[Path, Any], modality: str, format: str, magic: bytes
) -> None:
    (written,) = encode_files([picture if modality == "image" else film], tmp_path, frame_wise[0])
    (back,) = decode_files([Path(written.file)], tmp_path / "b", frame_wise[0], format=format)
    assert Path(back.file).suffix == f".{format}"
    assert magic in Path(back.file).read_bytes()[:12]


def test_odd_sides_of_h264_are_doubled_at_the_end(tmp_path: Path, frame_wise: tuple[Path, Any]) -> None:
    write_video(Video(noise(3, 17, 33), 10), tmp_path / "a.webm")
    (written,) = encode_files([tmp_path / "a.webm"], tmp_path, frame_wise[0])
    assert written.size == (3, 17, 33)
    (back,) = decode_files([Path(written.file)], tmp_path / "b", frame_wise[0])
    assert back.size == (3, 17, 33)
    assert read_video(back.file).frames.shape == (3, 18, 34, 3)


# --- files of all sorts


def test_animations_are_video_and_stills_are_not(tmp_path: Path, frame_wise: tuple[Path, Any]) -> None:
    frames = [Image.fromarray(frame.numpy()) for frame in noise(3, 16, 16)]
    for format in ("GIF", "WEBP", "PNG"):
        frames[0].save(tmp_path / f"{format}.moving", format, save_all=True, append_images=frames[1:], duration=50)
        frames[0].save(tmp_path / f"{format}.still", format)
        moving, still = encode_files([tmp_path / f"{format}.moving"], tmp_path / "a", frame_wise[0]) + encode_files(
            [tmp_path / f"{format}.still"], tmp_path / "b", frame_wise[0]
        )
        assert (moving.modality, moving.size, moving.fps) == ("video", (3, 16, 16), 20)
        assert (still.modality, still.size) == ("image", (16, 16))


def test_the_content_counts_and_not_the_name(tmp_path: Path, picture: Path, film: Path, frame_wise: Any) -> None:
    picture.rename(tmp_path / "one.mp4")
    film.rename(tmp_path / "two.png")
    written = encode_files([tmp_path / "one.mp4", tmp_path / "two.png"], tmp_path / "a", frame_wise[0])
    assert [w.modality for w in written] == ["image", "video"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_kind(tmp_path: Path, frame_wise: tuple[Path, VisualTokenizer], mode: str) -> None:
    image = Image.fromarray(noise(13, 18).numpy())
    image = (
        Image.fromarray(noise(13, 18)[..., 0].to(torch.uint16).numpy() * 257) if mode == "I;16" else image.convert(mode)
    )
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    (written,) = encode_files([path], tmp_path, frame_wise[0])
    assert torch.equal(Codes.load(written.file).codes, frame_wise[1].encode(to_pixels(read_image(path))[None]).codes)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (65000, 1), (1, 65000)])
def test_extreme_shapes(tmp_path: Path, frame_wise: tuple[Path, Any], width: int, height: int) -> None:
    Image.new("RGB", (width, height), "red").save(tmp_path / "a.png")
    (written,) = encode_files([tmp_path / "a.png"], tmp_path, frame_wise[0])
    assert written.size == (height, width)
    (back,) = decode_files([Path(written.file)], tmp_path / "b", frame_wise[0])
    with Image.open(back.file) as image:
        assert image.size == (width, height)
    if width != height:
        with pytest.raises(PlaitError, match=r"a\.png: size: .* more than 89478485 pixels"):
            encode_files([tmp_path / "a.png"], tmp_path / "c", frame_wise[0], size=64)
        with pytest.raises(PlaitError, match=rf"a{SUFFIX}: .*cannot hold {width}×{height} pixels"):
            decode_files([Path(written.file)], tmp_path / "d", frame_wise[0], format="webp")


# --- refusals of encode


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(PlaitError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


BAD = {
    "empty.png": b"",
    "empty.mp4": b"",
    "words.png": b"words, not pixels\n" * 40,
    "words.mp4": b"words, not pixels\n" * 40,
    "cut.png": None,
    "cut.jpg": None,
    "cut.mp4": None,
    "cut.gif": None,
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_readable(tmp_path: Path, name: str, frame_wise: tuple[Path, Any]) -> None:
    content = BAD[name]
    if content is None:
        if name.endswith(("mp4", "gif")):
            write_video(Video(noise(6, 32, 32), 10), tmp_path / name)
        else:
            Image.fromarray(noise(60, 60).numpy()).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        content = data[: len(data) // 2]
    (tmp_path / name).write_bytes(content)
    assert name in refused(encode_files, [tmp_path / name], tmp_path / "out", frame_wise[0])
    assert list((tmp_path / "out").iterdir()) == []


def test_paths_that_are_no_files(tmp_path: Path, frame_wise: tuple[Path, Any]) -> None:
    for call in (encode_files, decode_files):
        assert "gone.png: no such file" in refused(call, [Path("gone.png")], tmp_path / "out", frame_wise[0])
        assert "is a folder" in refused(call, [tmp_path], tmp_path / "out", frame_wise[0])
        assert "n.png: " in refused(call, [Path("n" * 5000 + ".png")], tmp_path / "out", frame_wise[0])
    assert not (tmp_path / "out").exists()


def test_the_longest_names(tmp_path: Path, picture: Path, frame_wise: tuple[Path, Any]) -> None:
    # 255 bytes are what common file systems hold; an unfinished file's name is a little longer.
    for length, works in ((200, True), (251, False)):
        path = picture.rename(tmp_path / ("n" * length + ".png"))
        if works:
            encode_files([path], tmp_path / "out", frame_wise[0])
        else:
            assert "cannot be written" in refused(encode_files, [path], tmp_path / "out", frame_wise[0])
        picture = path
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_no_file_is_overwritten_unasked(
    tmp_path: Path, picture: Path, film: Path, frame_wise: tuple[Path, Any]
) -> None:
    name = frame_wise[0]
    (written,) = encode_files([picture], tmp_path, name)
    before = picture.read_bytes()
    # The original lies where the decoded picture would go.
    assert "photo.png: is there already" in refused(decode_files, [Path(written.file)], tmp_path, name)
    assert picture.read_bytes() == before
    assert "is there already" in refused(encode_files, [picture], tmp_path, name)
    decode_files([Path(written.file)], tmp_path, name, overwrite=True)
    assert picture.read_bytes() != before
    encode_files([picture], tmp_path, name, overwrite=True)


def test_files_of_one_stem_are_refused_before_any_work(tmp_path: Path, picture: Path, frame_wise: Any) -> None:
    (tmp_path / "b").mkdir()
    for other in ("photo.jpg", "b/photo.png", "PHOTO.gif"):
        read_image(picture).save(tmp_path / other)
        message = refused(encode_files, [picture, tmp_path / other], tmp_path / "out", frame_wise[0])
        assert f"{picture} and {tmp_path / other}: have one stem" in message
    assert "have one stem" in refused(encode_files, [picture, picture], tmp_path / "out", frame_wise[0])
    for name in ("photo.codes.safetensors", "photo.safetensors"):
        (tmp_path / name).touch()
    codes = [tmp_path / "photo.codes.safetensors", tmp_path / "photo.safetensors"]
    assert "have one stem" in refused(decode_files, codes, tmp_path / "out", frame_wise[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size: is 0"),
        ({"tile": -1}, "tile: is -1"),
        ({"tile": 20}, "tile: is 20, must be a whole number of at least 64"),
        ({"fps": 0}, "fps: is 0"),
        ({"fps": math.nan}, "fps: is nan"),
        ({"device": "no-such"}, "device: 'no-such' cannot be used"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"device": "meta:x"}, "device: 'meta:x'"),
        ({"tokenizer": "no-such"}, "no-such: no such path"),
    ],
)
def test_bad_options(tmp_path: Path, frame_wise: tuple[Path, Any], options: Any, words: str) -> None:
    Image.fromarray(noise(80, 80).numpy()).save(tmp_path / "a.png")
    assert words in refused(
        encode_files, [tmp_path / "a.png"], tmp_path / "out", **{"tokenizer": frame_wise[0]} | options
    )


def test_a_text_tokenizer_is_refused(tmp_path: Path, picture: Path, tokenizers: Path) -> None:
    assert "has no image" in refused(encode_files, [picture], tmp_path, tokenizers / "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path, picture: Path, frame_wise: tuple[Path, Any]) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert "may not be written to" in refused(encode_files, [picture], tmp_path / "out", frame_wise[0])


def test_a_file_in_the_folders_place(tmp_path: Path, picture: Path, frame_wise: tuple[Path, Any]) -> None:
    assert "cannot make this folder" in refused(encode_files, [picture], picture, frame_wise[0])


def test_a_failing_film_leaves_nothing(tmp_path: Path, film: Path, frame_wise: Any, monkeypatch: Any) -> None:
    (written,) = encode_files([film], tmp_path / "codes", frame_wise[0])

    def failing(*_: Any, **__: Any) -> Iterator[Tensor]:
        yield torch.zeros(1, 3, 4, 24, 40)
        raise KeyboardInterrupt

    monkeypatch.setattr(VisualTokenizer, "decode_stream", failing)
    with pytest.raises(KeyboardInterrupt):
        decode_files([Path(written.file)], tmp_path / "out", frame_wise[0])
    monkeypatch.setattr(VisualTokenizer, "encode_stream", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_files([film], tmp_path / "out", frame_wise[0])
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_memory_is_one_line(tmp_path: Path, picture: Path, frame_wise: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines")

    monkeypatch.setattr(VisualTokenizer, "encode", full)
    assert "give --tile 512 or --size" in refused(encode_files, [picture], tmp_path, frame_wise[0])


def test_broken_pixels_are_refused_by_the_streams(frame_wise: tuple[Path, VisualTokenizer]) -> None:
    for value in (math.nan, math.inf, 9.0):
        pixels = torch.zeros(1, 3, 4, 16, 16)
        pixels[0, 1, 2, 3, 4] = value
        for call in (
            lambda p: list(frame_wise[1].encode_stream([torch.zeros(1, 3, 4, 16, 16), p])),
            frame_wise[1].encode,
        ):
            assert "not finite or lie outside [-1, 1]" in refused(call, pixels)


# --- refusals of decode


@pytest.fixture
def codes(frame_wise: tuple[Path, VisualTokenizer]) -> Codes:
    return frame_wise[1].encode(floats(noise(3, 16, 24)))


CHANGES: dict[str, tuple[Any, str]] = {
    "out of range": (lambda c: replace(c, codes=c.codes + 60), "this tokenizer has codes 0..59"),
    "negative": (lambda c: replace(c, codes=c.codes - 60), "this tokenizer has codes 0..59"),
    "floats": (lambda c: replace(c, codes=c.codes.float()), "dtype is torch.float32"),
    "another tokenizer": (lambda c: replace(c, fingerprint="f" * 64), "made by another tokenizer"),
    "audio": (lambda c: replace(c, codes=c.codes[0, 0], modality="audio"), "holds audio codes"),
    "nonsense": (lambda c: replace(c, modality=7), "holds 7 codes"),
    "an image's shape": (lambda c: replace(c, codes=c.codes[0]), "are no video"),
    "a video's shape": (lambda c: replace(c, modality="image", size=(16, 24)), "are no image"),
    "nothing": (lambda c: replace(c, codes=c.codes[:, :0]), "are no video"),
    "a batch": (lambda c: replace(c, codes=c.codes.expand(2, -1, -1, -1)), "holds a batch of 2"),
    "too large": (lambda c: replace(c, size=(3, 17, 24)), "does not fit a grid of 3×2×3"),
    "too small": (lambda c: replace(c, size=(3, 8, 24)), "does not fit"),
    "too many frames": (lambda c: replace(c, size=(4, 16, 24)), "does not fit"),
    "no time": (lambda c: replace(c, size=(16, 24)), "does not fit"),
    "a size of words": (lambda c: replace(c, size=("3", "16", "24")), "does not fit"),
    "a size of parts": (lambda c: replace(c, size=(3, 16.0, 24)), "does not fit"),
    "fps of words": (lambda c: replace(c, fps="many"), "fps: is 'many'"),
    "fps below zero": (lambda c: replace(c, fps=-2.0), "fps: is -2.0"),
    "fps without end": (lambda c: replace(c, fps=math.inf), "fps: is inf"),
    "a billion pixels": (
        lambda c: replace(c, codes=torch.zeros(1, 1, 1200, 1200, dtype=torch.uint8), size=None),
        "make it smaller",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_broken_codes(tmp_path: Path, change: str, codes: Codes, frame_wise: tuple[Path, Any]) -> None:
    broken, words = CHANGES[change]
    path = tmp_path / f"a{SUFFIX}"
    broken(codes).save(path)
    message = refused(decode_files, [path], tmp_path / "out", frame_wise[0])
    assert message.startswith(f"{path}: ")
    assert words in message, message
    assert list((tmp_path / "out").iterdir()) == []


def test_broken_codes_files(tmp_path: Path, codes: Codes, frame_wise: tuple[Path, Any]) -> None:
    path = tmp_path / f"a{SUFFIX}"
    codes.save(path)
    data = path.read_bytes()
    for length in (0, 5, 60, len(data) - 1):
        path.write_bytes(data[:length])
        assert f"{path}: not a readable codes file" in refused(decode_files, [path], tmp_path / "out", frame_wise[0])
    path.write_bytes(b"words " * 50)
    assert "not a readable codes file" in refused(decode_files, [path], tmp_path / "out", frame_wise[0])
    weights = frame_wise[0] / "model.safetensors"
    assert "holds no plait codes" in refused(decode_files, [weights], tmp_path / "out", frame_wise[0])


def test_codes_that_say_little_are_decoded(tmp_path: Path, codes: Codes, frame_wise: tuple[Path, Any]) -> None:
    bare = Codes(codes.codes.to(torch.uint8), "video")
    bare.save(tmp_path / "a.safetensors")
    (back,) = decode_files([tmp_path / "a.safetensors"], tmp_path / "out", frame_wise[0])
    assert (back.file, back.size) == (str(tmp_path / "out" / "a.mp4"), (3, 16, 24))
    assert read_video(back.file).fps == 25


def test_a_format_of_the_other_kind_is_refused(tmp_path: Path, codes: Codes, frame_wise: tuple[Path, Any]) -> None:
    codes.save(tmp_path / f"a{SUFFIX}")
    message = refused(decode_files, [tmp_path / f"a{SUFFIX}"], tmp_path / "out", frame_wise[0], format="png")
    assert "is video, which is written as mp4, webm, gif, webp and not png" in message
    message = refused(decode_files, [tmp_path / f"a{SUFFIX}"], tmp_path / "out", frame_wise[0], format="avi")
    assert "format: 'avi' is none of png, jpg, webp, gif, mp4, webm" in message


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_damaged_codes_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, frame_wise: tuple[Path, VisualTokenizer], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a{SUFFIX}"
    frame_wise[1].encode(floats(noise(1, 16, 24))[:, :, 0]).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        (back,) = decode_files([path], folder, frame_wise[0])
    except PlaitError as error:
        refusal = str(error)
    else:
        refusal = f"{path}: "
        assert read_image(back.file).size == back.size[::-1]
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal


def test_the_default_tile_is_as_documented() -> None:
    assert TILE == 2048  # the help of the commands says so
