"""The modality registry: one entry per modality, and nothing else lists them.

An entry says which tokenizer serves the modality, how its span is declared, and how a file becomes codes and codes
become a file. To add one, write its entry; vocabulary, grammar, shards and generation follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.errors import PlaitError


@dataclass(frozen=True)
class Axis:
    """One axis of a code grid.

    Attributes:
        name: for messages.
        mark: the special token after each step along it; the innermost axis has none.
        digits: number tokens in the header that give its size, the highest first, base 1,024.
    """

    name: str
    mark: str | None = None
    digits: int = 1


@dataclass(frozen=True)
class SpanGrammar:
    """A modality's span: begin, the axes' sizes as number tokens, codes with marks, end. No axes: codes of any length.

    Where a step of the innermost axis has codes of several codebooks, a layout puts them in order.
    """

    modality: str
    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.axes and self.axes[-1].mark), "the innermost axis has no mark"

    @property
    def begin(self) -> str:
        """The token that begins the span."""
        return f"<{self.modality}>"

    @property
    def end(self) -> str:
        """The token that ends the span."""
        return f"</{self.modality}>"

    @property
    def tokens(self) -> tuple[str, ...]:
        """All special tokens of the span."""
        return (self.begin, *(axis.mark for axis in self.axes if axis.mark), self.end)


@dataclass(frozen=True)
class Modality:
    """One kind of medium.

    Attributes:
        tokenizer: name of the tokenizer (its folder in a bundle); modalities may share one.
        grammar: the span's declaration.
        extension: of the files that `plait generate` writes.
        read: a file's bytes and its name (for errors) → the medium.
        encode: tokenizer, medium → codes, int64, one dimension per axis, after that of codebooks if there are several.
        decode: tokenizer, codes → the medium.
        write: medium → a file's bytes.
    """

    tokenizer: str
    grammar: SpanGrammar
    extension: str
    read: Callable[[bytes, str], Any]
    encode: Callable[[Any, Any], Tensor]
    decode: Callable[[Any, Tensor], Any]
    write: Callable[[Any], bytes]


def _read_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlaitError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _read_image(data: bytes, name: str) -> Any:
    from plait.tokenizers.media import read_image

    return read_image(data, name)


def _encode_image(tokenizer: Any, image: Any) -> Tensor:
    from plait.tokenizers.media import to_pixels

    codes: Tensor = tokenizer.encode(to_pixels(image)[None]).codes[0]
    return codes


def _decode_image(tokenizer: Any, codes: Tensor) -> Any:
    from plait.tokenizers.media import to_image

    return to_image(tokenizer.decode(codes[None])[0])


def _write_image(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _read_audio(data: bytes, name: str) -> Any:
    from plait.tokenizers.sound import read_sound

    return read_sound(data, name)


def _encode_audio(tokenizer: Any, audio: Any) -> Tensor:
    from plait.tokenizers.sound import to_samples

    codes: Tensor = tokenizer.encode(to_samples(audio, tokenizer.sample_rate, tokenizer.channels)).codes[0]
    return codes


def _decode_audio(tokenizer: Any, codes: Tensor) -> Any:
    from plait.tokenizers.media import Audio

    return Audio(tokenizer.decode(codes[None])[0].clamp(-1, 1).cpu(), tokenizer.sample_rate)


def _write_audio(audio: Any) -> bytes:
    from plait.tokenizers.sound import write_sound_bytes

    return write_sound_bytes(audio)


MODALITIES: dict[str, Modality] = {
    "text": Modality(
        tokenizer="text",
        grammar=SpanGrammar("text"),
        extension=".txt",
        read=_read_text,
        encode=lambda tokenizer, text: tokenizer.encode(text),
        decode=lambda tokenizer, codes: tokenizer.decode(codes),
        write=lambda text: text.encode(),
    ),
    "image": Modality(
        tokenizer="visual",
        grammar=SpanGrammar("image", axes=(Axis("height", mark="<row>"), Axis("width"))),
        extension=".png",
        read=_read_image,
        encode=_encode_image,
        decode=_decode_image,
        write=_write_image,
    ),
    "audio": Modality(
        tokenizer="audio",
        # Two digits: a minute has more than 1,023 steps. Steps and not seconds, as those need not be whole numbers.
        grammar=SpanGrammar("audio", axes=(Axis("steps", digits=2),)),
        extension=".wav",
        read=_read_audio,
        encode=_encode_audio,
        decode=_decode_audio,
        write=_write_audio,
    ),
}
