"""Decoding beside transformers' Llama: the same weights, greedily the same tokens, one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/decoder.py [--device cuda]

For a tiny model, one of 15 M parameters and one of 150 M, in float32 and with int8 and int4 weights, at batch 1 and
8: milliseconds a step; how many times as fast as transformers, by its `generate` and by a plain loop over its forward
pass, whichever cache of its own is faster; and the share of the limit, the time that reading the step's weights once
takes at the machine's bandwidth. That is measured in the same run as the fastest of some ways to read as many bytes.
All take turns every few tokens, so that a busy machine slows them alike. The times are medians, the limit is the least.
Nothing is asserted but that float32 gives the same tokens.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from llama import build_both
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.quantize import pack_, quantize_

MODELS = {
    "tiny": DecoderConfig(3056, width=256, layers=4, heads=4, kv_heads=2, qk_norm="none"),
    "15M": DecoderConfig(4096, width=384, layers=8, heads=6, kv_heads=2, qk_norm="none"),
    "150M": DecoderConfig(32_000, width=768, layers=20, heads=12, kv_heads=4, qk_norm="none"),
}
PROMPT = 10
BLOCK = 8  # tokens in a row of the same kind


def main() -> None:
    """Print a block for each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=40, help="steps that are timed, each a token in every row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for name in arguments.models:
        ours, theirs = build_both(MODELS[name], arguments.device)
        for model in (ours, theirs):
            model.eval().requires_grad_(False)
        for rows in arguments.batches:
            compare(name, ours, theirs, rows, arguments.tokens, arguments.rounds)


def compare(name: str, ours: Decoder, theirs: LlamaForCausalLM, rows: int, tokens: int, rounds: int) -> None:
    """Time all ways to decode, and print."""
    device = ours.embed_tokens.weight.device
    prompt = torch.randint(ours.config.vocabulary_size, (rows, PROMPT), device=device)
    decoders = {"float32": ours}
    for kind in ("int8", "int4"):
        decoders[kind] = copy.deepcopy(ours)
        quantize_(decoders[kind], kind)
        pack_(decoders[kind])
    length = PROMPT + tokens + 1
    caches: dict[str, Callable[[], DynamicCache | StaticCache]] = {
        "dynamic": lambda: DynamicCache(config=theirs.config),
        "static": lambda: StaticCache(config=theirs.config, max_cache_len=length),
    }
    runs: dict[str, Callable[[], Iterator[Tensor]]] = {
        **{f"plait {kind}": lambda d=d: decode(d, prompt, length) for kind, d in decoders.items()},
        **{f"loop, {kind} cache": lambda c=c: decode_theirs(theirs, prompt, c()) for kind, c in caches.items()},
    }
    reads = ways_to_read(ours)
    times: dict[str, list[float]] = {key: [] for key in [*runs, "generate", *reads]}
    for _ in range(rounds):
        found: dict[str, list[Tensor]] = {key: [] for key in runs}
        loops = {key: run() for key, run in runs.items()}
        for start in range(0, tokens, BLOCK):
            for key, loop in loops.items():
                for index in range(start, min(tokens, start + BLOCK)):
                    begin = time.perf_counter()
                    found[key].append(next(loop))
                    if index % BLOCK:  # the first reads the prompt, or finds the processor's caches full of the others
                        times[key].append(since(begin, device))
            for key, read in reads.items():
                read()
                begin = time.perf_counter()
                read()
                times[key].append(since(begin, device))
        begin = time.perf_counter()
        answer = generate(theirs, prompt, tokens)
        times["generate"].append(since(begin, device) / tokens)
        expected = torch.stack(found["plait float32"], 1)
        assert torch.equal(answer, expected)
        for key in ("loop, dynamic cache", "loop, static cache"):
            assert torch.equal(torch.stack(found[key], 1), expected), key
    report(name, rows, ours, times, list(reads))


def report(name: str, rows: int, ours: Decoder, times: dict[str, list[float]], reads: list[str]) -> None:
    """Print milliseconds a step, ratios to transformers, and the share of the limit."""
    limit = min(min(times[key]) for key in reads)
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"\n{name}, {count / 1e6:.1f} M parameters, batch {rows}, {torch.get_num_threads()} threads: ", end="")
    print(f"reading the weights takes {limit * 1e3:.2f} ms ({count * 4 / limit / 1e9:.1f} GB/s)")
    median = {key: statistics.median(taken) for key, taken in times.items() if key not in reads}
    loop = min(median[key] for key in median if key.startswith("loop"))
    for key, taken in median.items():
        print(
            f"  {key:20} {taken * 1e3:8.2f} ms (least {min(times[key]) * 1e3:.2f}) {rows / taken:8.0f} tokens/s", end=""
        )
        print(f"   {median['generate'] / taken:5.2f} × generate   {loop / taken:5.2f} × its loop", end="")
        print(f"   {limit / taken:4.0%} of the limit" if "int" not in key else "")


def decode(decoder: Decoder, prompt: Tensor, length: int) -> Iterator[Tensor]:
    """Yield the next token of every row, greedily."""
    rows = len(prompt)
    cache = KVCache(decoder.config, rows, length, prompt.device)
    fed, tokens, first = 0, prompt, torch.zeros(rows, dtype=torch.int64, device=prompt.device)
    while True:
        positions = torch.arange(fed, fed + tokens.shape[1], device=prompt.device).expand(rows, -1)
        fed += tokens.shape[1]
        logits = decoder.next_logits(tokens, positions, cache, first + tokens.shape[1] - 1)
        tokens = logits.argmax(-1, keepdim=True)
        yield tokens[:, 0]


def decode_theirs(model: LlamaForCausalLM, prompt: Tensor, cache: DynamicCache | StaticCache) -> Iterator[Tensor]:
    """The same with transformers, with nothing around its forward pass."""
    tokens = prompt
    while True:
        with torch.inference_mode():
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
        yield tokens[:, 0]


def generate(model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> Tensor:
    """The same with transformers' `generate`."""
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, PROMPT:]


def ways_to_read(decoder: Decoder) -> dict[str, Callable[[], object]]:
    """Some ways to read as many bytes as the decoder's weights have, and do little with them."""
    device = decoder.embed_tokens.weight.device
    buffer = torch.ones(sum(parameter.numel() for parameter in decoder.parameters()), device=device)
    matrix = buffer[: len(buffer) // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096, device=device)
    return {
        "sum": buffer.sum,
        "maximum": buffer.amax,
        "product": lambda: torch.mv(matrix, vector),
        "weights": lambda: [torch.mv(p, vector[: p.shape[1]]) for p in decoder.parameters() if p.ndim == 2],
    }


def since(begin: float, device: torch.device) -> float:
    """Seconds since then, with all that was asked for done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
