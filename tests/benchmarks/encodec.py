"""EnCodec beside transformers': same random weights, same inputs, turn by turn in one run.

    python tests/benchmarks/encodec.py [--seconds 0.5 2 10] [--repeats 5] [--threads 1] [--rate 24000] [--device cpu]

Prints the least time of each side (on a CPU, processor time), their ratio (above 1 means plait is faster) and how far
the outputs are apart. Nothing is asserted. The network has the released size, and all of its codebooks are used.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from clock import seconds
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from plait.tokenizers.base import Codes
from plait.tokenizers.encodec import LAYOUTS, EnCodecTokenizer
from plait.tokenizers.foreign import convert

STEREO: dict[str, Any] = {
    "sampling_rate": 48000, "audio_channels": 2, "target_bandwidths": [3.0, 6.0, 12.0, 24.0], "normalize": True,
    "chunk_length_s": 1.0, "overlap": 0.01, "norm_type": "time_group_norm", "use_causal_conv": False,
}  # fmt: skip


def both(rate: int, device: str) -> tuple[EnCodecTokenizer, EncodecModel]:
    """Our tokenizer and transformers', of the released structure, with the same weights."""
    torch.manual_seed(0)
    theirs = EncodecModel(EncodecConfig(**(STEREO if rate == 48000 else {}))).eval().requires_grad_(False)
    # Codebooks as wide as what is left over for them, so that many codes are used.
    sound = torch.randn(1, theirs.config.audio_channels, rate) * 0.1
    latents = theirs.encoder(sound)
    for i, layer in enumerate(theirs.quantizer.layers):
        layer.codebook.embed.normal_().mul_(latents.std() * 0.8**i)
    ours = convert(theirs.state_dict(), theirs.config.to_dict(), LAYOUTS[1], "transformers")
    assert isinstance(ours, EnCodecTokenizer)
    return ours.to(device), theirs.to(device)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 2.0, 10.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=int, choices=(24000, 48000), default=24000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = both(args.rate, args.device)
    bandwidth = max(theirs.config.target_bandwidths)

    def encode_theirs(samples: Tensor) -> tuple[Tensor, list[Tensor | None], int]:
        given = theirs.encode(samples, bandwidth=bandwidth)
        return given.audio_codes, given.audio_scales, given.last_frame_pad_length

    def decode_theirs(codes: Tensor, scales: list[Tensor | None], padding: int) -> Tensor:
        samples: Tensor = theirs.decode(codes, scales, last_frame_pad_length=padding).audio_values
        return samples

    print(f"{args.rate} Hz, {torch.get_num_threads()} threads on {args.device}")
    for length in args.seconds:
        samples = 0.1 * torch.randn(1, ours.channels, round(length * args.rate), device=args.device)
        codes, (frames, scales, padding) = ours.encode(samples), encode_theirs(samples)
        expected = frames.movedim(0, 2).flatten(2, 3)[..., : codes.codes.shape[-1]]
        # A code that two vectors are equally near to may be either, and all after it follow.
        apart = f"codes {int((codes.codes != expected).sum())} of {expected.numel()} differ"
        runs: list[Callable[[], object]] = [partial(ours.encode, samples), partial(encode_theirs, samples)]
        report(f"encode {length} s", seconds(runs, args.repeats, args.device), apart)
        same = Codes(expected, "audio", codes.size, scale=codes.scale)
        decoded = decode_theirs(frames, scales, padding)[..., : samples.shape[-1]]
        apart = f"samples {float((ours.decode(same) - decoded).abs().max()):.1e} of {float(decoded.abs().max()):.1e}"
        runs = [partial(ours.decode, same), partial(decode_theirs, frames, scales, padding)]
        report(f"decode {length} s", seconds(runs, args.repeats, args.device), apart)


def report(name: str, times: list[float], apart: str) -> None:
    """One line of the table."""
    ours, theirs = (1e3 * second for second in times)
    print(f"{name:18} plait {ours:9.1f} ms   transformers {theirs:9.1f} ms   ratio {theirs / ours:5.2f}   {apart}")


if __name__ == "__main__":
    main()
