"""plait: text, images, video and audio as one braid of tokens.

The public names load on first use, so ``import plait`` is instant and ``plait.tokenizers`` alone pulls in neither
the decoder nor the training libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.errors import PlaitError as PlaitError
    from plait.infer.document import Document as Document
    from plait.infer.pipeline import Model as Model
    from plait.infer.pipeline import Score as Score
    from plait.infer.pipeline import load as load
    from plait.tokenizers.base import Codes as Codes
    from plait.tokenizers.loading import load_tokenizer as load_tokenizer
    from plait.tokenizers.media import Audio as Audio
    from plait.tokenizers.media import Video as Video

_HOME = {
    "Audio": "plait.tokenizers.media",
    "Codes": "plait.tokenizers.base",
    "Document": "plait.infer.document",
    "Model": "plait.infer.pipeline",
    "PlaitError": "plait.errors",
    "Score": "plait.infer.pipeline",
    "Video": "plait.tokenizers.media",
    "load": "plait.infer.pipeline",
    "load_tokenizer": "plait.tokenizers.loading",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
