"""A training step beside transformers' Llama: same weights, batch and optimizer, turn about in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/training.py                  # 150 M parameters, float32
    OMP_NUM_THREADS=1 python tests/benchmarks/training.py --clock processor  # where other programs share the processor

A step is forward, backward and AdamW (``fused``, on both sides). Printed are both medians and the median
of the ratios of neighbouring steps; above 1 means plait is faster. Both losses must agree, or nothing is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from llama import build_both
from torch import Tensor, nn

from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.loss import LossSums, Targets

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 768), ("layers", 16), ("heads", 12), ("kv-heads", 4), ("vocabulary", 32_000), ("rows", 2),
        ("length", 512), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile plait's blocks")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    config = DecoderConfig(
        vocabulary_size=arguments.vocabulary, width=arguments.width, layers=arguments.layers, heads=arguments.heads,
        kv_heads=arguments.kv_heads, qk_norm="none", tie_embeddings=arguments.tied,
    )  # fmt: skip
    ours, theirs = (model.train() for model in build_both(config))
    if arguments.compile:
        for block in ours.layers:
            block.compile()
    tokens = torch.randint(config.vocabulary_size, (arguments.rows, arguments.length))
    steps = (step_of(ours, lambda: our_loss(ours, tokens)), step_of(theirs, lambda: their_loss(theirs, tokens)))
    first = [step() for step in steps]
    assert abs(first[0] - first[1]) < 1e-3 * first[1], first
    clock = CLOCKS[arguments.clock]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.repeats):
        for step, taken in zip(steps, times, strict=True):
            start = clock()
            step()
            taken.append(clock() - start)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    print(
        f"{millions:.0f} M parameters, {arguments.rows} × {arguments.length} tokens, {torch.get_num_threads()} threads"
    )
    print(f"plait {statistics.median(times[0]):.3f} s, transformers {statistics.median(times[1]):.3f} s: {ratio:.2f} ×")


def our_loss(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Mean loss of every token but each row's first."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    weights = (positions < tokens.shape[1] - 1).float()
    sums = decoder(tokens, positions, targets=Targets(tokens.roll(-1, 1), weights, torch.zeros_like(tokens), 1))
    assert isinstance(sums, LossSums)
    return sums.loss / weights.sum()


def their_loss(llama: nn.Module, tokens: Tensor) -> Tensor:
    """The same; transformers shifts the labels itself."""
    return llama(tokens, labels=tokens, use_cache=False).loss


def step_of(module: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """One optimizer step of a module; the call returns the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
