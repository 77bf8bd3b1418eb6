"""Sound at another rate and with fewer channels, by libswresample as FFmpeg's filter ``aresample`` offers it."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from plait.errors import PlaitError
from plait.tokenizers.video import av_errors

Array = np.ndarray[Any, np.dtype[np.float32]]


class Resampler:
    """PyAV's frames of one kind → float32 arrays ``[channels, n]``.

    n samples become ``ceil(n · new / old)``, and sample k lies at the time k / new: the filter's delay is taken out.
    Fewer channels are FFmpeg's down-mix, its weights scaled so that no sum of them exceeds 1; one channel becomes two
    equal ones.

    Args:
        sample_rate: Hz of the result; the frames' own if None.
        channels: of the result; the frames' own if None.
    """

    def __init__(self, sample_rate: int | None, channels: int | None) -> None:
        self._rate, self._channels = sample_rate, channels
        self._graph: Any = None
        self._first: Any = None
        self._taken = self._given = 0
        self._copies = 1

    def push(self, frame: Any) -> Iterator[Array]:
        """What comes of one frame more.

        Raises:
            PlaitError: its channels have no known places, so that they cannot be mixed.
        """
        if self._graph is None:
            self._open(frame)
        self._taken += frame.samples
        yield from self._run(frame)

    def finish(self) -> Iterator[Array]:
        """What is left, after one frame at least."""
        old = self._first.sample_rate
        new = self._rate or old
        wanted = -(-self._taken * new // old)
        # What the filter reaches for beyond the end is silence; libswresample by itself may leave out the last sample,
        # and gives none at all of a sound that is shorter than the filter.
        if new != old:
            yield from self._run(_silence(self._first, 64 * -(-old // new)), wanted)
        yield from self._run(None, wanted)

    def _open(self, frame: Any) -> None:
        from av.filter import Graph

        there = frame.layout.nb_channels
        wanted = self._channels or there
        # FFmpeg's own weights would make what stereo has in its middle louder by 3 dB.
        options = {"osf": "fltp", "osr": str(self._rate or frame.sample_rate), "rematrix_maxval": "1"}
        if wanted < there:
            options["ochl"] = layout_of(wanted)
        self._first, self._copies, graph = frame, 2 if wanted > there else 1, Graph()
        try:
            source = graph.add(
                "abuffer", sample_rate=str(frame.sample_rate), sample_fmt=frame.format.name,
                channel_layout=frame.layout.name, time_base=f"1/{frame.sample_rate}",
            )  # fmt: skip
            resampler, sink = graph.add("aresample", **options), graph.add("abuffersink")
            source.link_to(resampler)
            resampler.link_to(sink)
            graph.configure()
        except av_errors():
            raise PlaitError(f"its {there} channels have no places that are known; mix them down first") from None
        self._graph = graph

    def _run(self, frame: Any, most: int | None = None) -> Iterator[Array]:
        from av.error import BlockingIOError as NothingNow
        from av.error import EOFError as NothingMore

        if frame is not None:
            frame.pts = None  # gaps in time are no matter
        self._graph.push(frame)
        while True:
            try:
                array = self._graph.pull().to_ndarray()
            except (NothingNow, NothingMore):
                return
            if most is not None:
                array = array[:, : most - self._given]
            self._given += array.shape[1]
            if array.shape[1]:
                yield array.repeat(self._copies, 0)


def resample(frames: Iterable[Any], sample_rate: int | None, channels: int | None) -> Iterator[Array]:
    """Frames, one at least, in one go; as `Resampler`."""
    resampler = Resampler(sample_rate, channels)
    for frame in frames:
        yield from resampler.push(frame)
    yield from resampler.finish()


def frame_of(array: Array, sample_rate: int) -> Any:
    """Samples ``[channels, n]`` as a frame of PyAV."""
    from av import AudioFrame

    frame = AudioFrame.from_ndarray(np.ascontiguousarray(array), "fltp", layout_of(len(array)))
    frame.sample_rate = sample_rate
    return frame


def layout_of(channels: int) -> str:
    """FFmpeg's name of so many channels."""
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")


def _silence(like: Any, count: int) -> Any:
    from av import AudioFrame

    frame = AudioFrame(like.format.name, like.layout.name, count)
    for plane in frame.planes:
        zero = b"\x80" if like.format.name.startswith("u8") else b"\0"
        plane.update(zero * plane.buffer_size)
    frame.sample_rate = like.sample_rate
    return frame
