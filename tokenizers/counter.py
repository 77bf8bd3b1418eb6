"""Progress over files whose length is known only once they are opened."""

from collections.abc import Callable

# Called with the frames done and, as far as known, those in all.
Advance = Callable[[int, int], None]


class Counter:
    """Frames done and to do, of which a file's are known when it is opened; until then it counts as one.

    A frame is a picture, a frame of a clip or a step of sound's codes.
    """

    def __init__(self, files: int, advance: Advance) -> None:
        self._done, self._total, self._advance = 0, files, advance

    def expect(self, frames: int) -> None:
        """The file that is open now has so many."""
        self._total += max(0, frames - 1)

    def add(self, frames: int) -> None:
        """So many more are done."""
        self._done += frames
        self._total = max(self._total, self._done)
        self._advance(self._done, self._total)
