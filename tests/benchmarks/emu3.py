"""Emu3's vision tokenizer beside transformers': same random weights, same inputs, turn by turn in one run.

    python tests/benchmarks/emu3.py [--width 256] [--size 256] [--frames 8] [--repeats 5] [--device cpu]

Prints the least time of each side (on a CPU, processor time), their ratio (above 1 means plait is faster) and how far
the outputs are apart. Nothing is asserted. The released network has width 256, and takes minutes on a CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from clock import seconds
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from plait.tokenizers.emu3 import LAYOUTS
from plait.tokenizers.foreign import convert
from plait.tokenizers.pixels import PixelTokenizer


def both(width: int, device: str) -> tuple[PixelTokenizer, Emu3VQVAE]:
    """Our tokenizer and transformers', of the released structure, with the same weights."""
    torch.manual_seed(0)
    theirs = Emu3VQVAE(Emu3VQVAEConfig(base_channels=width, hidden_size=4 * width)).eval().requires_grad_(False)
    theirs.decoder.conv_out.weight.mul_(0.03)  # to pixels between -1 and 1, where most outputs would be clamped
    return convert(theirs.state_dict(), {}, LAYOUTS[1], "transformers").to(device), theirs.to(device)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    ours, theirs = both(args.width, args.device)
    still = torch.rand(1, 3, args.size, args.size, device=args.device) * 2 - 1
    video = torch.rand(1, 3, args.frames, args.size, args.size, device=args.device) * 2 - 1
    sizes = torch.tensor([[args.size, args.size]])

    def encode_theirs(pixels: Tensor) -> Tensor:
        pixels = pixels if pixels.ndim == 4 else pixels.transpose(1, 2)
        codes: Tensor = theirs.encode(pixels, sizes).image_tokens[0]
        return codes

    def decode_theirs(codes: Tensor) -> Tensor:
        pixels: Tensor = theirs.decode(codes[None])
        return pixels if codes.ndim == 2 else pixels.transpose(1, 2)

    print(f"width {args.width}, {args.size}² pixels, {torch.get_num_threads()} threads on {args.device}")
    for name, pixels in (("still", still), (f"{args.frames} frames", video)):
        codes = ours.encode(pixels)
        apart = f"codes {int((codes.codes[0] != encode_theirs(pixels)).sum())} of {codes.codes.numel()} differ"
        runs: list[Callable[[], object]] = [partial(ours.encode, pixels), partial(encode_theirs, pixels)]
        report(f"encode {name}", seconds(runs, args.repeats, args.device), apart)
        apart = f"pixels {float((ours.decode(codes) - decode_theirs(codes.codes[0]).clamp(-1, 1)).abs().max()):.1e}"
        runs = [partial(ours.decode, codes), partial(decode_theirs, codes.codes[0])]
        report(f"decode {name}", seconds(runs, args.repeats, args.device), apart)


def report(name: str, times: list[float], apart: str) -> None:
    """One line of the table."""
    ours, theirs = (1e3 * second for second in times)
    print(f"{name:18} plait {ours:9.1f} ms   transformers {theirs:9.1f} ms   ratio {theirs / ours:5.2f}   {apart}")


if __name__ == "__main__":
    main()
