"""What a file with sound in it is, by its first bytes, and whether all of it is there."""

import io
from typing import IO

from plait.tokenizers.video import container_of, is_whole


def reader_of(file: IO[bytes]) -> str | None:
    """FFmpeg's reader for a file with sound, by how it begins; the file is then at its beginning."""
    head = file.read(10)
    if head[:3] == b"ID3":  # before other formats than MP3 too
        file.seek(_id3_size(head))
        head = b""
    head += file.read(16 - len(head))
    file.seek(0)
    if head[:4] in (b"RIFF", b"RF64"):
        return "wav" if head[8:12] == b"WAVE" else None
    if head[:4] == b"FORM":
        return "aiff" if head[8:12] in (b"AIFF", b"AIFC") else None
    if kind := {b"fLaC": "flac", b"OggS": "ogg", b".snd": "au"}.get(head[:4]) or container_of(head[:12]):
        return kind
    # The sync word of an MPEG frame, with a bit rate and a sample rate that exist; layer 0 is AAC.
    if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[2] >> 4 != 15 and head[2] & 12 != 12:
        return "mp3" if head[1] & 6 else "aac"
    return None


def is_complete(file: IO[bytes], kind: str) -> bool:
    """Whether a file reaches as far as it says; of a shorter one FFmpeg gives the beginning as if that were all.

    Args:
        file: at its beginning, and so it is afterwards.
        kind: what `reader_of` says.
    """
    if kind in ("mov", "matroska"):
        return is_whole(file)
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        ends = {"wav": _wav_end, "ogg": _ogg_end, "mp3": _mp3_end}
        return kind not in ends or ends[kind](file) <= end
    finally:
        file.seek(0)


def _wav_end(file: IO[bytes]) -> int:
    """Where the samples of a RIFF or RF64 file (EBU Tech 3306) end, 0 if it does not say."""
    position, long_size = 12, 0
    file.seek(position)
    while len(head := file.read(8)) == 8:
        name, size = head[:4], int.from_bytes(head[4:], "little")
        if name == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            if size == 0xFFFFFFFF:
                size = long_size
            # Programs that write into a pipe put something huge there, such as 0x7FFFF000.
            return 0 if 0x7FFF0000 <= size < 2**32 else position + 8 + size
        position += 8 + size + size % 2
        file.seek(position)
    return 0


def _ogg_end(file: IO[bytes]) -> int:
    """Where the last page of an Ogg file (RFC 3533) ends; what follows it is no matter."""
    position = 0
    while head := file.read(27):
        if not head.startswith(b"OggS"[: len(head)]):
            break
        sizes = file.read(head[26]) if len(head) == 27 else b""
        position += 27 + (head[26] if len(head) == 27 else 0) + sum(sizes)
        file.seek(position)
    return position


def _mp3_end(file: IO[bytes]) -> int:
    """Where the frames of an MP3 end by the Xing or Info header in its first frame, 0 if there is none."""
    start = _id3_size(head) if (head := file.read(10))[:3] == b"ID3" else 0
    file.seek(start)
    frame = file.read(64)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0:
        return 0
    flags = int.from_bytes(frame[at + 4 : at + 8])
    at += 8 + 4 * (flags & 1)
    return start + int.from_bytes(frame[at : at + 4]) if flags & 2 else 0


def _id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins with these 10."""
    return 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
