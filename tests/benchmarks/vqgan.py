"""Encoding and decoding one 256×256 picture beside transformers' JanusVQVAE: LlamaGen's VQ-16, same weights, one run.

    python tests/benchmarks/vqgan.py [rounds]

Prints times, ratios (above 1 means plait is faster) and the largest difference of the outputs. Nothing is asserted.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import JanusVQVAE, JanusVQVAEConfig

from plait.tokenizers.foreign import convert
from plait.tokenizers.vqgan import LAYOUTS, VQGANTokenizer

SIDE = 256


def both() -> tuple[VQGANTokenizer, JanusVQVAE]:
    """Our network and transformers' with the same weights, gains and offsets of the norms among them."""
    torch.manual_seed(0)
    theirs = JanusVQVAE(JanusVQVAEConfig(num_patches=SIDE // 16)).eval().requires_grad_(False)
    for name, tensor in theirs.state_dict().items():
        if ".norm" in name:
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        elif tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="linear")
    theirs.quantize.embedding.weight.normal_()
    tensors = theirs.state_dict()
    layout = next(layout for layout in LAYOUTS if layout.recognise(tensors, {}))
    ours = convert(tensors, {}, layout, "the benchmark's weights")
    assert isinstance(ours, VQGANTokenizer)
    return ours, theirs


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> None:
    """Time two functions in turn and print both times, their ratio and how far their results lie apart."""
    apart = (ours() - theirs()).abs().max().item()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for taken, run in zip(times, (ours, theirs), strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    for kind, pick in (("least", min), ("median", statistics.median)):
        mine, other = (pick(taken) * 1000 for taken in times)
        print(f"{name} {kind:>6}: plait {mine:7.1f} ms, transformers {other:7.1f} ms, ratio {other / mine:.2f}")
    print(f"{name} largest difference: {apart:.1e}")


@torch.no_grad()
def main() -> None:
    """Measure both directions."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    ours, theirs = both()
    millions = sum(p.numel() for p in theirs.parameters()) / 1e6
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {millions:.2f} M weights")
    pixels = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    codes = torch.randint(16384, (1, SIDE // 16, SIDE // 16))
    z = ours.quantizer.latents(codes).movedim(-1, 1)
    compare(
        "encode",
        lambda: ours.to_latents(pixels[:, :, None])[:, :, 0],
        lambda: theirs.quant_conv(theirs.encoder(pixels)),
        rounds,
    )
    compare(
        "decode", lambda: ours.from_latents(z[:, :, None])[:, :, 0], lambda: theirs.decode(codes.flatten(1)), rounds
    )


if __name__ == "__main__":
    main()
