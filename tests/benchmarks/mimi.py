"""Mimi beside transformers': same random weights of the released sizes, same sound, turn by turn in one run.

    python tests/benchmarks/mimi.py [--seconds 10] [--repeats 5] [--threads 1] [--device cpu]

Prints the least time of each side (on a CPU, processor time), their ratio (above 1 means plait is faster) and how far
the outputs are apart. Nothing is asserted. It takes 2 GB.
"""

import argparse
from functools import partial

import torch
from clock import seconds
from torch import Tensor
from transformers import MimiConfig, MimiModel

from plait.tokenizers.foreign import convert
from plait.tokenizers.mimi import LAYOUTS
from plait.tokenizers.network import NetworkTokenizer
from plait.tokenizers.streaming import whole


def both(device: str) -> tuple[NetworkTokenizer, MimiModel]:
    """Our tokenizer and transformers', of the released structure, with the same weights."""
    torch.manual_seed(0)
    theirs = MimiModel(MimiConfig()).eval().requires_grad_(False)
    latents = theirs.encoder(torch.randn(1, 1, 48000) * 0.1).latents
    quantizer = theirs.quantizer
    for chain in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        left = chain.input_proj(latents)
        for layer in chain.layers:
            # Residuals shrink as those of trained codebooks do.
            layer.codebook.embed_sum.normal_().mul_(left.std() / 2)
            left = left * 0.87
    decoded = theirs.decode(torch.randint(2048, (1, 32, 13))).audio_values
    theirs.decoder.decoder_seanet.layers[-1].conv.weight.mul_(0.1 / decoded.std())
    return convert(theirs.state_dict(), {}, LAYOUTS[1], "transformers").to(device), theirs.to(device)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = both(args.device)
    samples = torch.randn(1, 1, round(24000 * args.seconds), device=args.device) * 0.1

    def encode_theirs() -> Tensor:
        codes: Tensor = theirs.encode(samples).audio_codes
        return codes

    def decode_theirs() -> Tensor:
        decoded: Tensor = theirs.decode(codes).audio_values
        return decoded

    print(f"{args.seconds:g} s, 32 codebooks, {torch.get_num_threads()} threads on {args.device}")
    codes = encode_theirs()
    differ = (ours.encode(samples).codes != codes).any(1)
    ties = ours.quantizer.margin(ours.to_latents(samples, whole()).movedim(1, -1)) < 1e-5
    apart = f"{int(differ.sum())} of {differ.numel()} steps differ, {int((differ & ~ties).sum())} of them no ties"
    times = seconds([partial(ours.encode, samples), encode_theirs], args.repeats, args.device)
    report("encode", times, args.seconds, apart)
    apart = f"samples {float((ours.decode(codes) - decode_theirs()).abs().max()):.1e}"
    times = seconds([partial(ours.decode, codes), decode_theirs], args.repeats, args.device)
    report("decode", times, args.seconds, apart)


def report(name: str, times: list[float], length: float, apart: str) -> None:
    """One line of the table."""
    ours, theirs = times
    print(
        f"{name} plait {1e3 * ours:7.1f} ms ({length / ours:4.1f}× real time)   transformers {1e3 * theirs:7.1f} ms   "
        f"ratio {theirs / ours:5.2f}   {apart}"
    )


if __name__ == "__main__":
    main()
