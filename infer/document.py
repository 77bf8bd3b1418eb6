"""Parts and documents: what people hand in and get back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder, write_file
from plait.tokenizers.media import Audio, Video, modality_of, to_rgb
from plait.tokenizers.modalities import MODALITIES

Part = str | Path | Image.Image | Audio | Video


@dataclass
class Document:
    """An ordered list of parts: text, images, sound and video in any interleaving."""

    parts: list[Any] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def save(self, folder: str | Path) -> Path:
        """Write ``document.md`` and its media into a folder; returns the Markdown file.

        Raises:
            PlaitError: the folder cannot be made or written to, or a part cannot be read.
        """
        folder = Path(folder)
        make_folder(folder)
        lines = []
        for number, (modality, medium) in enumerate(read_parts(self.parts), 1):
            if modality == "text":
                lines.append(medium)
                continue
            name = f"{number:03d}{MODALITIES[modality].extension}"
            write_file(folder / name, MODALITIES[modality].write(medium))
            lines.append(f"![{modality}]({name})")
        write_file(folder / "document.md", ("\n\n".join(lines) + "\n").encode())
        return folder / "document.md"


def read_parts(parts: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Parts → (modality, medium): strings are text, paths are read, documents are opened up.

    Images become RGB on white, as those from files.

    Raises:
        PlaitError: a file cannot be read or is of no known kind, or a part is of no known type.
    """
    for part in parts:
        if isinstance(part, str):
            yield "text", part
        elif isinstance(part, Path):
            yield read_file(part)
        elif isinstance(part, Image.Image):
            yield "image", to_rgb(part)
        elif isinstance(part, (Audio, Video)):
            yield type(part).__name__.lower(), part
        elif isinstance(part, Document):
            yield from read_parts(part.parts)
        else:
            kinds = "str, Path, PIL image, Audio, Video or Document; ids are an int64 tensor"
            raise PlaitError(f"part: {type(part).__name__} is no {kinds}")


def read_file(path: Path) -> tuple[str, Any]:
    """A media file → (modality, medium).

    Raises:
        PlaitError: missing, unreadable, or of a kind this version cannot read.
    """
    modality = modality_of(path)
    if modality is None:
        raise PlaitError(f"{path}: its extension names no known medium")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise PlaitError(f"{path}: no such file") from None
    except OSError as error:
        raise PlaitError(f"{path}: cannot be read ({error.strerror})") from None
    if modality not in MODALITIES:
        raise PlaitError(f"{path}: {modality} is not supported; supported are {', '.join(MODALITIES)}")
    return modality, MODALITIES[modality].read(data, str(path))
