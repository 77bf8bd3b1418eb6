"""`plait generate`: command-line parts in, files or printed text out."""

from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.infer.document import Document
from plait.infer.pipeline import Finished, Model, TextDelta, load
from plait.tokenizers.base import write_file
from plait.tokenizers.media import EXTENSIONS, modality_of
from plait.tokenizers.modalities import MODALITIES


def parse_part(argument: str) -> str | Path:
    """A command-line part: an existing file is media, everything else is text.

    Raises:
        PlaitError: it is empty or a folder, or ends in a media extension and does not exist.
    """
    if not argument:
        raise PlaitError("PART: is empty; give text or a file")
    path = Path(argument)
    try:
        file, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # too long or with a NUL byte: no path
        return argument
    if file:
        return path
    if folder:
        raise PlaitError(f"{argument}: is a folder; name a file")
    if modality_of(path) is not None:
        raise PlaitError(f"{argument}: no such file (a part that ends in {path.suffix} is a file)")
    return argument


def generate_files(
    arguments: list[str],
    to: str,
    out: Path | None,
    bundle: str,
    seed: int | None,
    n: int | None,
    stream: bool,
    settings: dict[str, Any],
    quantize: str | None = None,
) -> list[str]:
    """Generate and write.

    Returns:
        the texts when they go to stdout, else the files written.

    Raises:
        PlaitError: a bad part, target, setting or output path.
    """
    parts = [parse_part(argument) for argument in arguments]
    if to not in (*EXTENSIONS, "interleaved"):
        raise PlaitError(f"--to {to}: expected {', '.join(EXTENSIONS)} or interleaved")
    model = load(bundle, quantize=quantize)
    if to != "interleaved" and model.modalities and to not in model.modalities:
        raise PlaitError(f"--to {to}: {bundle} has no {to}; it has {', '.join(model.modalities)}")
    paths = output_paths(out, to, n)
    if stream and to in ("text", "interleaved") and n is None:
        results = [_streamed(model, parts, to, seed, settings)]
    else:
        results = model.generate(*parts, to=to, n=1 if n is None else n, seed=seed, **settings)
    if paths is None:
        return results
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Document):
            result.save(path)
        else:
            write_file(path, MODALITIES[to].write(result))
    return [str(path) for path in paths]


def output_paths(out: Path | None, to: str, n: int | None) -> list[Path] | None:
    """The files to write, numbered with ``n``; None where text goes to stdout.

    Raises:
        PlaitError: the extension or the folder is wrong; said before anything is generated.
    """
    if to == "text" and out is None:
        return None
    extension = "" if to == "interleaved" else MODALITIES[to].extension
    out = out or Path(f"out{extension}")
    if out.suffix.lower() != extension:
        raise PlaitError(
            f"{out}: {to} is written as {extension or 'a folder'}; give a name that ends so"
            if extension
            else f"{out}: interleaved output is a folder; give a name without extension"
        )
    if not out.parent.is_dir():
        raise PlaitError(f"{out}: the folder {out.parent} does not exist; make it first")
    return [out] if n is None else [out.with_name(f"{out.stem}-{i}{extension}") for i in range(1, n + 1)]


def _streamed(model: Model, parts: list[Any], to: str, seed: int | None, settings: dict[str, Any]) -> Any:
    for event in model.stream(*parts, to=to, seed=seed, **settings):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            print()
            return event.document.parts[0] if to == "text" else event.document
    raise AssertionError("a stream ends with Finished")
