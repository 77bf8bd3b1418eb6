"""Training step and batch-1 decoding beside transformers' Llama: same weights, same inputs, one run.

    python tests/benchmarks/decoder.py

Prints times and ratios; above 1 means plait is faster. Nothing is asserted.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.loss import LossSums, Targets

CONFIG = DecoderConfig(
    vocabulary_size=3056, width=256, layers=4, heads=4, kv_heads=2, qk_norm=False, tie_embeddings=True
)
ROWS, DOCUMENTS, LENGTH, NEW = 4, 6, 88, 80


def both() -> tuple[Decoder, LlamaForCausalLM]:
    """Our decoder and transformers' with the same weights."""
    torch.manual_seed(0)
    ours = Decoder(CONFIG)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocabulary_size,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            num_key_value_heads=CONFIG.kv_heads,
            intermediate_size=CONFIG.ffn_width,
            rope_theta=CONFIG.rope_theta,
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training_step(ours: Decoder, theirs: LlamaForCausalLM) -> tuple[float, float]:
    """Forward and backward over packed documents; transformers gets one document per row, its best case."""
    tokens = torch.randint(0, CONFIG.vocabulary_size, (ROWS, DOCUMENTS * LENGTH))
    positions = torch.arange(LENGTH).repeat(DOCUMENTS)[None].repeat(ROWS, 1)
    weights = (positions < LENGTH - 1).float()
    targets = Targets(tokens.roll(-1, 1), weights, torch.zeros_like(tokens), 1)
    documents = tokens.view(-1, LENGTH)

    def step_ours() -> float:
        ours.zero_grad()
        losses = ours(tokens, positions, targets=targets)
        assert isinstance(losses, LossSums)
        loss = losses.loss / weights.sum()
        loss.backward()
        return float(loss.detach())

    def step_theirs() -> float:
        theirs.zero_grad()
        logits = theirs(documents, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), documents[:, 1:].flatten())
        loss.backward()
        return float(loss.detach())

    assert abs(step_ours() - step_theirs()) < 1e-4
    return seconds(step_ours), seconds(step_theirs)


@torch.no_grad()
def decoding(ours: Decoder, theirs: LlamaForCausalLM) -> tuple[float, float]:
    """Greedy decoding of one row."""
    ours.eval()
    theirs.eval()
    prompt = torch.randint(0, CONFIG.vocabulary_size, (1, 10))

    def decode_ours() -> list[int]:
        cache = KVCache(CONFIG, 1, 10 + NEW)
        fed, tokens, out = 0, prompt, list[int]()
        while len(out) < NEW:
            positions = torch.arange(fed, fed + tokens.shape[1])[None]
            fed += tokens.shape[1]
            logits = ours.next_logits(tokens, positions, cache, torch.tensor([tokens.shape[1] - 1]))
            out.append(int(logits.argmax()))
            tokens = torch.tensor([out[-1:]])
        return out

    def decode_theirs() -> list[int]:
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, 10:].tolist()

    assert decode_ours() == decode_theirs()
    return seconds(decode_ours, 5), seconds(decode_theirs, 5)


def main() -> None:
    """Print both comparisons."""
    pair = both()
    print(f"{sum(p.numel() for p in pair[0].parameters()) / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    for name, measure in (("training step", training_step), (f"decoding {NEW} tokens", decoding)):
        ours, theirs = measure(*pair)
        print(f"{name:20} plait {ours * 1e3:8.1f} ms   transformers {theirs * 1e3:8.1f} ms   ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
