"""The command line: one function per verb, each a few lines that call the part that does the work.

Imports stay inside the functions, so ``--help`` answers at once. Exit codes: 0 done, 1 failure, 2 bad input.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.errors import PlaitError

app = typer.Typer(
    help="Text, images, video and audio as one braid of tokens.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
data = typer.Typer(help="Make and look at shards.", no_args_is_help=True, rich_markup_mode=None)
tokenizer = typer.Typer(help="Train and use tokenizers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")
app.add_typer(tokenizer, name="tokenizer")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A path or a shipped name, such as tiny/image or tiny/decoder.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
ModelName = Annotated[str, typer.Option("--model", help="Bundle: a path or a shipped name.")]
MediaFiles = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Told apart by content, not by name.")]
FilesTokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="A tokenizer's or bundle's folder, or a shipped name; tiny-vision, and tiny-audio of sound, by default.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or cuda with a number.")]
Tile = Annotated[int | None, typer.Option(min=1, help="Larger pictures in tiles of so many pixels; 2048 by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("out"),
    model: ModelName = "plait-tiny",
    as_json: Json = False,
) -> None:
    """Show what the shipped model does: writes OUT/gallery.png."""
    from plait.infer.demo import run_demo

    path = run_demo(model, out)
    report(as_json, {"gallery": str(path)}, f"wrote {path}")


@app.command()
def generate(
    parts: Annotated[
        list[str], typer.Argument(metavar="PART", help="Text, or the path of a media file; the order is the prompt.")
    ],
    to: Annotated[str, typer.Option(help="text, image, audio, video or interleaved.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write; text goes to stdout without it.")
    ] = None,
    model: ModelName = "plait-tiny",
    seed: Annotated[int | None, typer.Option(help="Same seed, same result.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many; files are numbered.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the tokens that reach this probability.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: smaller weights, made at load.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    as_json: Json = False,
) -> None:
    """Generate text or media from text and media."""
    from plait.infer.command import generate_files

    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "max_tokens": max_tokens,
    }
    written = generate_files(parts, to, out, model, seed, n, stream, settings, quantize)
    if to == "text" and out is None:
        report(as_json, {"text": written}, "" if stream and n is None else "\n".join(written))
    else:
        report(as_json, {"files": written}, "\n".join(f"wrote {path}" for path in written))


@app.command()
def train(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost: parameters, FLOPs, memory.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: on so many processes; a few numbers by default.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="With --dry-run: TFLOP/s that a process sustains, for the time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a decoder; alone, or under torchrun or deepspeed."""
    from plait.train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], kinds=["decoder"])
    if dry_run:
        from plait.train.dry_run import describe
        from plait.train.dry_run import dry_run as compute

        facts = compute(loaded, world_size, tflops)  # type: ignore[arg-type]
        report(as_json, facts, describe(facts))
        return
    refuse(context, ("world_size", "tflops"), "is for --dry-run; torchrun and deepspeed start processes")
    from plait.train.decoder_loop import train_decoder

    bundle = train_decoder(loaded)  # type: ignore[arg-type]
    if os.environ["RANK"] == "0":
        report(as_json, {"bundle": str(bundle)}, f"wrote {bundle}")


@app.command("eval")
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A path or a shipped name.")],
    folder: Annotated[Path, typer.Argument(metavar="DATA", help="Images with a manifest.jsonl (path, caption).")],
    items: Annotated[int, typer.Option(min=1, help="Captions and images to generate from.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the choice and of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a bundle on captioned images: reconstruction, caption to image, image to caption."""
    from plait.infer.evaluate import captioned_images
    from plait.infer.evaluate import evaluate as measure
    from plait.infer.pipeline import load

    figures = measure(load(bundle), captioned_images(folder), items, seed)
    report(as_json, figures, "\n".join(f"{name:17} {value:.4g}" for name, value in figures.items()))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of another project's decoder checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="hf, emu3, emu3.5, chameleon, anole, llama, mistral or qwen; by what the checkpoint says, by default.",
        ),
    ] = None,
    visual: Annotated[
        Path | None, typer.Option(help="The image tokenizer, where it was released by itself: a folder or a file.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text tokenizer, where it is not with the checkpoint: a folder or a file.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is, by default.")] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of a released decoder; an interrupted import goes on where it was.

    The weights are read and written piece by piece. Checksums that came along are verified.
    """
    from plait.infer.import_checkpoint import import_checkpoint
    from plait.train.progress import progress_bar

    with progress_bar("bytes") as advance:
        facts = import_checkpoint(source, out, kind, visual, text, dtype, advance)
    holds = ", ".join(facts["modalities"]) or "bare ids: no text tokenizer was found"
    text_out = f"wrote {out} ({facts['family']}, {facts['parameters']} parameters in {facts['dtype']}; {holds})"
    report(as_json, facts, text_out)


@app.command()
def export(
    bundle: Annotated[str, typer.Argument(help="A path or a shipped name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it must not be there yet.")],
    to: Annotated[
        str, typer.Option(help="hf for transformers; emu3, emu3.5, chameleon or llama for the original layouts.")
    ] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is, by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write a bundle's decoder, with its text and image tokenizers where they fit, for other software."""
    from plait.infer.export_checkpoint import export_checkpoint
    from plait.train.progress import progress_bar

    with progress_bar("bytes") as advance:
        facts = export_checkpoint(bundle, out, to, dtype, advance)
    if "note" in facts:
        print(f"note: {facts['note']}", file=sys.stderr)
    report(as_json, facts, f"wrote {out} ({facts['architecture']}, {facts['parameters']} parameters)")


@tokenizer.command("train")
def tokenizer_train(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train a text, visual or audio tokenizer; the latter two alone, or under torchrun or deepspeed."""
    from plait.train.recipe import AudioTokenizerRecipe, TextTokenizerRecipe
    from plait.train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], kinds=["text-tokenizer", "visual-tokenizer", "audio-tokenizer"])
    if isinstance(loaded, TextTokenizerRecipe):
        from plait.train.text_loop import train_text

        train_text(loaded)
        written = Path(loaded.out)
    elif isinstance(loaded, AudioTokenizerRecipe):
        from plait.train.audio_loop import train_audio

        written = train_audio(loaded)
    else:
        from plait.train.visual_loop import train_visual

        written = train_visual(loaded)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":
        report(as_json, {"tokenizer": str(written)}, f"wrote {written}")


@tokenizer.command("info")
def tokenizer_info(
    name: Annotated[str, typer.Argument(help="A tokenizer's or bundle's folder, or a shipped name.")],
    as_json: Json = False,
) -> None:
    """Say what a tokenizer is."""
    from plait.tokenizers.loading import describe_tokenizers

    rows = describe_tokenizers(name)
    lines = [f"{row['name']}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "name") for row in rows]
    report(as_json, {"tokenizers": rows}, "\n".join(lines))


@tokenizer.command("eval")
def tokenizer_eval(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="TOK", help="A tokenizer's or bundle's folder, a checkpoint, or a shipped name.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of media, or with a manifest.jsonl (path).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report and the sheets.")] = Path(
        "out/tokenizer-eval"
    ),
    modality: Annotated[
        str | None, typer.Option(help="Which of a bundle's tokenizers: image or audio; image by default.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Scale the short side to so many pixels; native size by default.")
    ] = None,
    crop: Annotated[bool, typer.Option(help="With --size: crop the middle square.")] = True,
    frames: Annotated[int, typer.Option(help="Frames of a clip, from its start.")] = 9,
    fps: Annotated[float, typer.Option(help="Frames per second of clips, at most their own.")] = 12.0,
    perceptual: Annotated[
        str | None, typer.Option(help="Weights of a perceptual distance; stlpips-vgg if it is installed.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Learned heads for --perceptual, which make it LPIPS.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Classifier for a Fréchet distance; efflite0 if it is installed.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Sound: seconds of a file, from its start.")] = 20.0,
    codebooks: Annotated[int | None, typer.Option(help="Sound: the first so many codebooks only.")] = None,
    visqol: Annotated[int, typer.Option(help="Sound: ViSQOL, which is slow, on so many files; 0 is none.")] = 8,
    opus: Annotated[
        float | None, typer.Option(metavar="KBPS", help="Sound: Opus at so many kb/s beside it, as a yardstick.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Sound: write the reconstructions as WAV.")] = False,
    limit: Annotated[int | None, typer.Option(help="The first so many files of each kind only.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure what a tokenizer keeps of images and clips, or of sound."""
    from plait.tokenizers.audio_evaluate import evaluate_audio_folder
    from plait.tokenizers.evaluate import evaluate_folder, load_measured
    from plait.tokenizers.protocol import AudioProtocol, Protocol
    from plait.train.progress import progress_bar

    measured = load_measured(name, modality)
    of_sound = measured.kind == "audio"
    refuse(
        context,
        ("size", "crop", "frames", "fps", "perceptual", "heads", "features") if of_sound
        else ("seconds", "codebooks", "visqol", "opus", "keep"),
        f"is for {'images and clips' if of_sound else 'sound'}, and {name} is of {'sound' if of_sound else 'images'}",
    )  # fmt: skip
    with progress_bar("files") as advance:
        if of_sound:
            facts, text = evaluate_audio_folder(
                measured, name, folder, out, AudioProtocol(seconds), codebooks=codebooks, visqol=visqol, opus=opus,
                limit=limit, keep=keep, device=device, advance=advance,
            )  # fmt: skip
        else:
            facts, text = evaluate_folder(
                measured, name, folder, out, Protocol(size, crop, frames, fps), perceptual=perceptual, heads=heads,
                features=features, limit=limit, device=device, advance=advance,
            )  # fmt: skip
    for line in facts["data"]["skipped"]:
        print(f"skipped {line}", file=sys.stderr)
    report(as_json, facts, text)


@tokenizer.command("export")
def tokenizer_export(
    name: Annotated[str, typer.Argument(metavar="TOK", help="A tokenizer's or bundle's folder, or a shipped name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for encoder.onnx, decoder.onnx and export.json.")],
    modality: Annotated[str, typer.Option(help="Which of a bundle's tokenizers: image or audio.")] = "image",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Pictures: fix the models to this size, or to a square.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Models of clips of so many frames, not of images.")] = None,
    as_json: Json = False,
) -> None:
    """Write a tokenizer as ONNX models: pixels or samples to codes, and codes back to them. Any size by default."""
    from plait.tokenizers.export import export_onnx, export_sound, parse_size
    from plait.tokenizers.loading import find_weights, load_tokenizer

    is_bundle = (find_weights(name) / "vocabulary.json").is_file()
    loaded = load_tokenizer(name, modality if is_bundle else None)
    if loaded.kind == "audio":
        if size or frames is not None:
            raise PlaitError("export: --size and --frames are for pictures; sound of any length goes in")
        facts = export_sound(loaded, out)
    else:
        loaded = load_tokenizer(name, "image")
        facts = export_onnx(loaded, out, parse_size(size) if size else None, frames)
    report(as_json, facts, f"wrote {out}/encoder.onnx, {out}/decoder.onnx and {out}/export.json")


@tokenizer.command("encode")
def tokenizer_encode(
    files: MediaFiles,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for NAME.codes.safetensors.")],
    name: FilesTokenizer = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Scale the short side to so many pixels; native size by default.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of videos; their own by default.")] = None,
    tile: Tile = None,
    n_codebooks: Annotated[
        int | None, typer.Option(min=1, help="Of sound: the first so many codebooks; all by default.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of sound: as many codebooks as fit into so many kbit/s.")
    ] = None,
    loudness: Annotated[
        float | None, typer.Option(help="Of sound: bring it to this RMS level in dB first; decoding takes it back.")
    ] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Encode pictures, videos (MP4, WebM, animations) and sounds (WAV, FLAC, MP3, Ogg) into files of codes.

    Of a video, a tokenizer of sound takes the sound track.
    """
    from plait.tokenizers.files import encode_files
    from plait.train.progress import progress_bar

    with progress_bar("frames") as advance:
        written = encode_files(
            files, out, name, size=size, fps=fps, tile=tile, n_codebooks=n_codebooks, bandwidth=bandwidth,
            loudness=loudness, device=device, overwrite=overwrite, advance=advance,
        )  # fmt: skip
    report_files(as_json, name, written)


@tokenizer.command("decode")
def tokenizer_decode(
    files: MediaFiles,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for pictures, videos and sounds.")],
    name: FilesTokenizer = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="png, jpg, webp or gif; videos: mp4, webm, gif or webp; sounds: wav, flac, mp3 or ogg. The first of "
            "each by default."
        ),
    ] = None,
    tile: Tile = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Decode files of codes into pictures, videos and sounds.

    H.264 has even sides: an odd side of an mp4 grows by a pixel. Samples beyond ±1 are clipped, and counted.
    """
    from plait.tokenizers.files import decode_files
    from plait.train.progress import progress_bar

    with progress_bar("frames") as advance:
        written = decode_files(
            files, out, name, format=format, tile=tile, device=device, overwrite=overwrite, advance=advance
        )
    report_files(as_json, name, written)


@data.command("pack")
def data_pack(
    folder: Annotated[Path, typer.Argument(help="Files that share a stem, or a manifest.jsonl.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the shards.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard at most.")] = 2000,
    as_json: Json = False,
) -> None:
    """Pack a folder of files into WebDataset shards."""
    from plait.train.pack import pack

    packed = pack(folder, out, per_shard)
    for line in packed.skipped:
        print(f"skipped {line}", file=sys.stderr)
    text = f"packed {packed.samples} samples into {packed.shards} shards in {out}, skipped {len(packed.skipped)}"
    report(as_json, vars(packed), text)


@data.command("tokenize")
def data_tokenize(
    shards: Annotated[Path, typer.Argument(help="Folder of raw shards.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the token shards.")],
    tokenizers: Annotated[str, typer.Option(help="A bundle, or a folder with one subfolder per tokenizer.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as CPUs by default.")] = None,
    as_json: Json = False,
) -> None:
    """Turn raw shards into token shards; a restart skips finished shards."""
    from plait.train.progress import progress_bar
    from plait.train.tokenize import tokenize

    with progress_bar("shards") as advance:
        made = tokenize(shards, out, tokenizers, workers, advance)
    for line in made.skipped:
        print(f"skipped {line}", file=sys.stderr)
    codes = ", ".join(f"{count} {modality} codes" for modality, count in made.codes.items())
    text = f"tokenized {made.samples} samples ({codes}) in {made.shards} shards, skipped {len(made.skipped)}"
    text += f"; {made.reused} shards were done before" if made.reused else ""
    report(as_json, vars(made), text)


@data.command("inspect")
def data_inspect(
    shards: Annotated[Path, typer.Argument(help="Folder of raw or token shards.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Contact sheet to write.")] = Path("out/inspect.png"),
    tokenizers: Annotated[str | None, typer.Option(help="For token shards: what they were made with.")] = None,
    as_json: Json = False,
) -> None:
    """Print counts, sizes and captions, and write a contact sheet."""
    from plait.train.inspect import inspect

    facts, text = inspect(shards, out, tokenizers)
    report(as_json, facts, text)


def refuse(context: typer.Context, options: tuple[str, ...], reason: str) -> None:
    """Refuse options that were given and would do nothing.

    Raises:
        PlaitError: the first of them, and why.
    """
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise PlaitError(f"--{option.replace('_', '-')}: {reason}")


def report_files(as_json: bool, tokenizer: str | None, written: list[Any]) -> None:
    """End a command that turned files into files."""

    def facts(row: Any) -> str:
        if row.modality != "audio":
            return f"{'×'.join(map(str, row.size))}, {row.seconds:.1f} s"
        clipped = f", {row.clipped} samples clipped" if row.clipped else ""
        return f"{row.size[0] / row.sample_rate:.2f} s of sound, {row.real_time_factor:.3f} × real time{clipped}"

    lines = [f"wrote {row.file} ({facts(row)})" for row in written]
    report(as_json, {"tokenizer": tokenizer, "files": [vars(row) for row in written]}, "\n".join(lines))


def report(as_json: bool, facts: dict[str, Any], text: str) -> None:
    """End a command: one line of JSON, or the text."""
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    elif text:
        print(text)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit code 2."""
    # The deepspeed launcher adds its own argument in front of ours.
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    try:
        sys.exit(app(standalone_mode=False))  # commands return None, --help and an interruption their exit code
    except PlaitError as error:
        message = f"plait: {error}"
    except typer.TyperException as error:  # wrong usage
        message = error.format_message()
        if not message.startswith("Usage:"):  # without arguments it is the help
            message = "plait: " + " ".join(message.split())
    except ModuleNotFoundError as error:
        missing = (error.name or "plait").partition(".")[0]
        if missing == "plait":
            raise
        extra = "onnx" if missing.startswith("onnx") else "train"
        message = f"plait: this needs '{missing}'; run: pip install 'plait[{extra}]'"
    except (KeyboardInterrupt, typer.Abort):
        print("plait: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
