import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from plait.errors import PlaitError
from plait.tokenizers.media import contact_sheet, modality_of, read_image, to_image, to_pixels, write_image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def close(found: tuple[int, ...], expected: tuple[int, ...], room: int = 12) -> bool:
    return all(abs(x - y) <= room for x, y in zip(found, expected, strict=True))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size without holding the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_lossless_files_are_read_exactly(tmp_path: Path) -> None:
    image = noise(7, 5)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data)):
        assert same(read_image(source), image)
    assert same(read_image(encoded(image, "WEBP", lossless=True)), image)


def test_one_pixel_is_an_image() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    assert same(read_image(encoded(image)), image)


def test_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 257 * 128, 257 * 128 + 200, 65400, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        pixels = np.asarray(read_image(encoded(Image.fromarray(values), format)))
        assert pixels[0].tolist() == [[grey] * 3 for grey in (0, 1, 128, 129, 254, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = noise(9, 9).convert(mode)
    assert same(read_image(encoded(image)), image.convert("RGB"))


def test_cmyk_jpeg_has_its_colours() -> None:
    for colour in ((255, 0, 0), (0, 128, 255), (255, 255, 255), (0, 0, 0)):
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        data = encoded(image, "JPEG", quality=100)
        with Image.open(io.BytesIO(data)) as stored:
            assert stored.mode == "CMYK"
        assert close(read_image(data).getpixel((8, 8)), colour)


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 100, 255), (200, 0, 100, 0), (0, 0, 0, 128)])
    for data in (encoded(image), encoded(image, "WEBP", lossless=True, exact=True)):
        found = read_image(data)
        assert [found.getpixel((x, 0)) for x in range(3)] == [(200, 0, 100), (255, 255, 255), (127, 127, 127)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(40, 255), (40, 0)])
    assert [read_image(encoded(grey)).getpixel((x, 0)) for x in range(2)] == [(40, 40, 40), (255, 255, 255)]


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    for data in (encoded(image, transparency=0), encoded(image, "GIF", transparency=0)):
        found = read_image(data)
        assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_a_transparent_colour_is_white() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (8, 8, 8))
    found = read_image(encoded(image, transparency=(9, 9, 9)))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (8, 8, 8)]


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(5, 3)
    expected = Image.fromarray(np.ascontiguousarray(TURNS[orientation](np.asarray(image))))
    assert same(read_image(encoded(image, exif=exif)), expected)
    blocks = image.resize((80, 48), Image.Resampling.NEAREST)
    jpeg = read_image(encoded(blocks, "JPEG", quality=100, subsampling=0, exif=exif))
    assert jpeg.size == (expected.width * 16, expected.height * 16)
    for x in range(expected.width):
        for y in range(expected.height):
            assert close(jpeg.getpixel((16 * x + 8, 16 * y + 8)), expected.getpixel((x, y)), 16)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert same(read_image(data), frames[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.png", encoded(noise(40, 40))[:500], "broken image"),
        ("header.png", encoded(noise(40, 40))[:20], ""),
        ("cut.jpg", encoded(noise(40, 40), "JPEG")[:900], "broken image"),
        ("cut.webp", encoded(noise(40, 40), "WEBP")[:300], ""),
        ("cut.gif", encoded(noise(40, 40), "GIF")[:-600], ""),
        ("empty.png", b"", "not an image"),
        ("text.png", b"these are words, not pixels\n" * 9, "not an image"),
        ("signature.png", b"\x89PNG\r\n\x1a\n", ""),
        ("bomb.png", png_of_size(30000, 30000), "too large"),
        ("large.png", png_of_size(12000, 9000), "too large"),
        ("hollow.png", png_of_size(500, 500), "broken image"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for source, given in (
        (tmp_path / name, None),
        (content, f"shard 3/{name}"),
        (io.BytesIO(content), f"shard 3/{name}"),
    ):
        with pytest.raises(PlaitError, match=f"{name}: .*{message}") as raised:
            read_image(source, given)
        assert "\n" not in str(raised.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(PlaitError, match=rf"{tmp_path.name}: cannot be read \(Is a directory\)"):
        read_image(tmp_path)
    with pytest.raises(PlaitError, match=r"nn: cannot be read \(File name too long\)"):
        read_image(tmp_path / ("n" * 5000))


@pytest.mark.filterwarnings("error")
def test_pillow_keeps_its_warnings_to_itself() -> None:
    # The file's own EXIF is nonsense, which does not touch the picture; an animation without its frames does.
    image = noise(8, 8)
    assert same(read_image(encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0" + bytes(30))), image)
    data = encoded(image, save_all=True, append_images=[noise(8, 8, 1)])
    where = data.index(b"acTL")
    empty = b"acTL" + struct.pack(">II", 0, 0)
    broken = data[:where] + empty + struct.pack(">I", zlib.crc32(empty)) + data[where + 16 :]
    with pytest.raises(PlaitError, match="Invalid APNG"):
        read_image(broken)


@pytest.mark.parametrize(
    ("name", "format"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.gif", "GIF")]
)
def test_pictures_are_written_as_named(tmp_path: Path, name: str, format: str) -> None:
    smooth = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    write_image(smooth, tmp_path / name)
    with Image.open(tmp_path / name) as found:
        assert (found.format, found.size) == (format, (40, 30))
    difference = ImageChops.difference(read_image(tmp_path / name), smooth)
    assert max(high for _, high in difference.getextrema()) <= (0 if format == "PNG" else 4)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_pictures_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"a\.bmp: a picture is written as \.png, \.jpg"):
        write_image(noise(3, 3), tmp_path / "a.bmp")
    for name in ("a.jpg", "a.webp", "a.gif"):
        with pytest.raises(PlaitError, match=rf"{name}: cannot hold 70000×1 pixels .* write a \.png"):
            write_image(Image.new("RGB", (70000, 1)), tmp_path / name)
    with pytest.raises(PlaitError, match=r"a\.png: cannot be written"):
        write_image(noise(3, 3), tmp_path / "gone" / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_never_raise_anything_else(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "a camera"
    data = encoded(noise(20, 24), format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP") else {}))
    draw, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(min(len(data), draw.choice([64, 300, 10**6])))] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        try:
            assert read_image(bytes(damaged), "file").mode == "RGB"
        except PlaitError:
            refused += 1
    assert refused > 10


def test_pixels_and_images_are_exact_on_bytes() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([every, every.T, 255 - every], -1))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert pixels[0, 0, 1].item() == pytest.approx(1 / 127.5 - 1)
    assert same(to_image(pixels), image)


def test_to_image_rounds_and_clamps() -> None:
    pixels = torch.tensor([-9.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 9.0]).expand(3, 1, 6)
    image = to_image(pixels.bfloat16().float().requires_grad_())
    assert [image.getpixel((x, 0))[0] for x in (0, 1, 4, 5)] == [0, 0, 255, 255]
    assert [to_image(pixels).getpixel((x, 0)) for x in (2, 3)] == [(0, 0, 0), (1, 1, 1)]


def test_to_pixels_takes_any_mode() -> None:
    assert to_pixels(Image.new("L", (3, 2), 255)).tolist() == torch.ones(3, 2, 3).tolist()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20])
def test_contact_sheets_have_a_row_per_eight(count: int) -> None:
    images = [Image.new("RGB", (16, 16), (255, 0, i)) for i in range(count)]
    sheet = contact_sheet(images, columns=8, cell=32)
    rows = max(1, -(-count // 8))
    assert sheet.size == (8 * 38 + 6, rows * 38 + 6)
    for i in range(rows * 8):
        found = sheet.getpixel((6 + 38 * (i % 8) + 16, 6 + 38 * (i // 8) + 16))
        assert found == ((255, 0, i) if i < count else (255, 255, 255))


def test_contact_sheets_fit_odd_shapes_and_captions() -> None:
    images = [Image.new("RGB", (1, 500), "red"), Image.new("L", (500, 1)), Image.new("RGBA", (300, 200), "blue")]
    plain = contact_sheet(images, columns=2, cell=40)
    assert plain.size == (2 * 46 + 6, 2 * 46 + 6)
    captioned = contact_sheet(images, 2, ["", "a long caption " * 20, "日本 😀 é"], 40)
    assert captioned.width == plain.width
    # Three lines of 12 pixels under each row.
    assert captioned.height == plain.height + 2 * 36
    assert captioned.crop((52, 46, 98, 82)).convert("L").getextrema()[0] < 128


@pytest.mark.parametrize(
    ("path", "modality"),
    [
        ("a.png", "image"),
        ("a/b.JPEG", "image"),
        ("a.txt", "text"),
        ("a.mp4", "video"),
        ("a.flac", "audio"),
        ("a.png.exe", None),
        ("png", None),
        ("", None),
    ],
)
def test_the_extension_names_the_modality(path: str, modality: str | None) -> None:
    assert modality_of(path) == modality
    assert modality_of(Path(path)) == modality


def test_the_fixture_pictures_are_read(emoji: Path) -> None:
    files = sorted(emoji.glob("*/*.png"))
    assert len(files) == 60
    assert {read_image(file).mode for file in files} == {"RGB"}
