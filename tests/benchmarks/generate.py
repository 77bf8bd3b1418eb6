"""What the generation engine saves, beside doing it plainly: the same requests, one run, in turns.

    python tests/benchmarks/generate.py [tiny|small] [cpu|cuda]

Prints times and ratios; above 1 means that it saves. The model has random weights, of 15 M (tiny) or 150 M parameters
(small), and picks among 32,768 codes (top-k 2048). Nothing is asserted. Not run on a GPU yet.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from clock import seconds

from plait.infer.generate import Request, generate
from plait.infer.sampling import Sampling, draw, guide, restrict
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder

TEXT, CODES = 1000, 32_768
CONFIGS = {
    "tiny": DecoderConfig(TEXT + CODES, width=256, layers=6, heads=4, kv_heads=2),
    "small": DecoderConfig(TEXT + CODES, width=896, layers=14, heads=14, kv_heads=2),
}
PROMPT, NEW = 512, 24
PICK = Sampling(top_k=2048)


@dataclass
class Codes:
    """A cursor that asks for so many codes."""

    budget: int
    done: bool = False
    open: None = None
    spans: list[Any] = field(default_factory=list)

    def allowed(self) -> list[range]:
        """All codes."""
        return [range(TEXT, TEXT + CODES)]

    def push(self, token: int) -> None:
        """Count one."""
        self.budget -= 1
        self.done = not self.budget


def request(prompt: list[int], seed: int, settings: Sampling = PICK, free: list[int] | None = None) -> Request:
    """A request for `NEW` codes."""
    cursor: Any = Codes(NEW)
    return Request(prompt, cursor, {}, torch.Generator().manual_seed(seed), free, between=settings)


def finish(decoder: Decoder, *requests: Request) -> None:
    """Generate all that is asked for."""
    for _ in generate(decoder, requests):
        pass


@torch.no_grad()
def guide_in_two_runs(decoder: Decoder, prompt: list[int], free: list[int]) -> None:
    """Each prompt with a cache of its own: two passes a step."""
    device = decoder.lm_head.weight.device
    settings, generator = Sampling(top_k=2048, guidance=3.0), torch.Generator().manual_seed(0)
    tokens, fed = [prompt, free], [0, 0]
    caches = [
        KVCache(decoder.config, 1, len(prompt) + NEW, device, decoder.embed_tokens.weight.dtype) for _ in range(2)
    ]
    for _ in range(NEW):
        logits = []
        for i, cache in enumerate(caches):
            ids = torch.tensor([tokens[i]], device=device)
            positions = torch.arange(fed[i], fed[i] + ids.shape[1], device=device)[None]
            last = torch.tensor([ids.shape[1] - 1], device=device)
            logits.append(decoder.next_logits(ids, positions, cache, last)[0])
            fed[i] += ids.shape[1]
        candidates, ids = restrict(guide(*logits, settings), [range(TEXT, TEXT + CODES)])
        tokens = [[int(ids[draw(candidates, settings, generator)])]] * 2


@torch.no_grad()
def main(size: str = "tiny", device: str = "cpu") -> None:
    """Print the comparisons."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS[size]).eval().to(device)
    count = sum(p.numel() for p in decoder.parameters()) / 1e6
    print(f"{count:.1f} M parameters, {torch.get_num_threads()} threads, {device}, {PROMPT} tokens + {NEW} codes")
    prompt, free = torch.randint(TEXT, (PROMPT,)).tolist(), [0, 1]
    others = [[i, *prompt[1:]] for i in range(8)]  # nothing in common
    guided = Sampling(top_k=2048, guidance=3.0)
    logits, generator = torch.randn(CODES, device=device), torch.Generator()
    cache = KVCache(decoder.config, 1, PROMPT + NEW, device)
    decoder(torch.tensor([prompt], device=device), torch.arange(PROMPT, device=device)[None], cache)
    one, place = torch.tensor([[TEXT]], device=device), torch.tensor([[PROMPT]], device=device)
    pairs = {
        "8 samples of one prompt / of 8 prompts": (
            lambda: finish(decoder, *(request(prompt, i) for i in range(8))),
            lambda: finish(decoder, *(request(other, i) for i, other in enumerate(others))),
        ),
        "8 samples in one batch / one by one": (
            lambda: finish(decoder, *(request(prompt, i) for i in range(8))),
            lambda: [finish(decoder, request(prompt, i)) for i in range(8)],
        ),
        "guided in one batch / in two runs": (
            lambda: finish(decoder, request(prompt, 0, guided, free)),
            lambda: guide_in_two_runs(decoder, prompt, free),
        ),
        "drawing a token / a step of the decoder": (
            lambda: draw(restrict(logits, [range(CODES)])[0], PICK, generator),
            lambda: decoder.next_logits(one, place, cache, torch.zeros(1, dtype=torch.int64, device=device)),
        ),
    }
    for name, pair in pairs.items():
        ours, plain = seconds(pair, 5, device)
        print(f"{name:40} {ours * 1e3:9.2f} ms {plain * 1e3:9.2f} ms   ratio {plain / ours:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
