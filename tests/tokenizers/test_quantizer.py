import copy
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from plait.errors import PlaitError
from plait.tokenizers.averages import k_means, nearest
from plait.tokenizers.quantizer import (
    FiniteScalarQuantizer,
    NearestCodebook,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
)

# Finite scalar quantization

LEVELS = [(3,), (4,), (3, 3, 3), (4, 6, 8), (5, 4, 3), (7, 6, 5), (8, 5, 5, 5), (16, 16), (8, 8, 8, 5, 5, 5)]


def latents(levels: tuple[int, ...], count: int = 4000, seed: int = 0) -> torch.Tensor:
    """Latents ``[count, d]`` from tiny to saturated: rounding boundaries and the squashing's ends both occur."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, len(levels), generator=generator) * 10 ** (
        4 * torch.rand(count, 1, generator=generator) - 2.5
    )
    z[0], z[1], z[2] = 0, 1e30, -1e30
    return z


def library(levels: tuple[int, ...], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        quantized, indices = FSQ(levels=list(levels))(z[None])
    return quantized[0], indices[0].long()


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_latents_are_the_librarys(levels: tuple[int, ...]) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels)
    quantized, indices = library(levels, z)
    codes = quantizer.codes(z)
    assert torch.equal(codes, indices)
    assert torch.equal(quantizer.latents(codes), quantized)
    assert codes.dtype == torch.int64
    assert quantizer.latents(codes).dtype == torch.float32


@pytest.mark.parametrize("levels", LEVELS[:-1])
def test_every_code_is_its_latents(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(quantizer.codebook_size)
    values = quantizer.latents(codes)
    assert torch.equal(values, FSQ(levels=list(levels)).indices_to_codes(codes[None])[0])
    assert len(values.unique(dim=0)) == quantizer.codebook_size
    assert values.abs().max() <= 1


@settings(deadline=None, max_examples=30)
@given(levels=st.lists(st.integers(3, 20), min_size=1, max_size=5).map(tuple), seed=st.integers(0, 1 << 30))
def test_any_levels_are_the_librarys(levels: tuple[int, ...], seed: int) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels, 300, seed)
    quantized, indices = library(levels, z)
    assert torch.equal(quantizer.codes(z), indices)
    assert torch.equal(quantizer.latents(indices), quantized)


@pytest.mark.parametrize("levels", LEVELS)
def test_training_pass_gives_the_same_codes(levels: tuple[int, ...]) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels, 600).reshape(2, 20, 15, -1)
    quantized, codes, losses = quantizer(z)
    assert not losses
    assert quantized.shape == z.shape
    assert codes.shape == z.shape[:-1]
    assert torch.equal(codes, quantizer.codes(z))
    assert torch.equal(quantized, quantizer.latents(codes))


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_are_computed_in_float32(levels: tuple[int, ...]) -> None:
    z = latents(levels)
    expected = FiniteScalarQuantizer(levels).codes(z)
    quantizer = FiniteScalarQuantizer(levels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes(z), expected)
        assert torch.equal(quantizer(z)[1], expected)
    quantizer.bfloat16()
    assert torch.equal(quantizer.codes(z), expected)
    assert torch.equal(quantizer.latents(expected), FiniteScalarQuantizer(levels).latents(expected))


def test_bfloat16_latents_have_the_codes_of_their_float32_copy() -> None:
    quantizer, z = FiniteScalarQuantizer((8, 5, 5, 5)), latents((8, 5, 5, 5)).bfloat16()
    assert torch.equal(quantizer.codes(z), library((8, 5, 5, 5), z.float())[1])
    assert torch.equal(quantizer(z)[1], quantizer.codes(z))


def test_gradients_go_straight_through_the_rounding() -> None:
    levels = (8, 5, 3)
    z = (latents(levels, 200).clamp(-1, 1)).requires_grad_()
    FiniteScalarQuantizer(levels)(z)[0].sum().backward()
    # Straight through means the derivative of the squashing alone: ½(L−1)(1+ε)·(1−tanh²), over ⌊L/2⌋.
    count = torch.tensor(levels, dtype=torch.float32)
    half = (count - 1) * 1.001 / 2
    shift = torch.atanh((count % 2 == 0) * 0.5 / half)
    expected = half * (1 - torch.tanh(z.detach() + shift) ** 2) / (count // 2)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected)


def test_nothing_of_it_is_stored() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    quantizer(torch.zeros(1, 2))
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("levels", [(), (2,), (8, 0), (8, -5), (1000, 1000, 1000, 1000), (8.0, 5)])
def test_impossible_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(PlaitError, match="quantizer: levels"):
        FiniteScalarQuantizer(levels)


# What holds for every kind

CONFIGS = {
    "fsq": QuantizerConfig(levels=(8, 5, 3), entropy=0.1, entropy_temperature=0.1),
    "vq_ema": QuantizerConfig("vq_ema", codebook_size=32, dim=4),
    "vq_grad": QuantizerConfig("vq_grad", codebook_size=32, dim=8),
    "lfq": QuantizerConfig("lfq", codebook_size=64, entropy=0.1),
    "bsq": QuantizerConfig("bsq", codebook_size=64, entropy=0.1),
    "simvq": QuantizerConfig("simvq", codebook_size=32, dim=4),
    "rvq": QuantizerConfig("rvq", codebook_size=32, dim=4, codebooks=3),
}
STATE = {
    "fsq": {}, "lfq": {}, "bsq": {}, "vq_ema": {"codebook": (32, 4)}, "vq_grad": {"codebook": (32, 8)},
    "simvq": {"codebook": (32, 4), "transform.weight": (4, 4)}, "rvq": {"codebooks": (3, 32, 4)},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def made(kind: str, seed: int = 0, **changes: Any) -> Quantizer:
    torch.manual_seed(seed)
    quantizer = build_quantizer(QuantizerConfig(**{**vars(CONFIGS[kind]), **changes}))
    for buffer in quantizer.buffers():
        if buffer.is_floating_point():
            buffer.normal_()
    return quantizer


def tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


@every_kind
def test_interface(kind: str) -> None:
    quantizer, z = made(kind), torch.randn(2, 5, 7, made(kind).dim, requires_grad=True)
    several = (3,) if kind == "rvq" else ()
    assert {name: tuple(tensor.shape) for name, tensor in tensors(quantizer).items()} == STATE[kind]
    codes = quantizer.codes(z)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 5, 7, *several)
    assert 0 <= codes.min() <= codes.max() < quantizer.codebook_size
    decoded = quantizer.latents(codes)
    assert decoded.dtype == torch.float32
    assert decoded.shape == z.shape
    margin = quantizer.margin(z)
    assert margin.shape == (2, 5, 7)
    assert margin.min() >= 0
    for training in (True, False):
        quantizer.train(training)
        z.grad = None
        before = codes
        out = quantizer(z)
        assert torch.equal(out.codes, before)
        assert bool(out.losses) == training
        if training and kind in ("vq_ema", "rvq"):
            continue  # k-means has not seen enough vectors: the latents pass as they are
        assert torch.equal(out.latents, decoded)
        assert {name: tuple(tensor.shape) for name, tensor in tensors(quantizer).items()} == STATE[kind]
        (out.latents.sum() + sum(out.losses.values())).backward()
        assert z.grad is not None
        assert z.grad.abs().sum() > 0


@every_kind
def test_codes_are_float32_under_autocast_and_in_bfloat16_modules(kind: str) -> None:
    quantizer = made(kind)
    z = torch.randn(4000, quantizer.dim)
    codes, decoded = quantizer.codes(z), quantizer.latents(quantizer.codes(z))
    trained, trained_in_autocast = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    out = trained(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes(z), codes)
        assert torch.equal(trained_in_autocast(z).codes, out.codes)
        assert torch.equal(quantizer.latents(codes), decoded)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(trained).values(), tensors(trained_in_autocast).values(), strict=True)
    )
    cast = copy.deepcopy(quantizer).bfloat16()
    assert all(buffer.dtype != torch.bfloat16 for buffer in cast.buffers())
    if not list(quantizer.parameters()):
        assert torch.equal(cast.codes(z), codes)
    rounded = copy.deepcopy(cast).float()
    assert torch.equal(cast.codes(z), rounded.codes(z))
    assert torch.equal(cast.latents(codes), rounded.latents(codes))


@every_kind
def test_loads_from_the_meta_device(kind: str) -> None:
    quantizer = made(kind).eval()
    with torch.device("meta"):
        empty = build_quantizer(CONFIGS[kind])
    empty.load_state_dict(quantizer.state_dict(), assign=True)
    empty = empty.to("cpu").eval()
    z = torch.randn(50, quantizer.dim)
    assert torch.equal(empty.codes(z), quantizer.codes(z))
    assert torch.equal(empty.latents(empty.codes(z)), quantizer(z).latents)


@every_kind
def test_codes_that_flip_have_a_small_margin(kind: str) -> None:
    quantizer = made(kind)
    z = torch.randn(20000, quantizer.dim)
    step = 1e-3
    shift = step * F.normalize(torch.randn_like(z), dim=-1)
    flipped = quantizer.codes(z) != quantizer.codes(z + shift)
    flipped = flipped.any(-1) if kind == "rvq" else flipped
    # How far one step moves a decision: two distances; half the levels per unit; the sphere's radius.
    slope = {"fsq": 3.51 * torch.ones(()), "lfq": torch.ones(()), "bsq": 1 / z.norm(dim=-1)}
    slope |= dict.fromkeys(("vq_ema", "simvq", "rvq"), 2 * torch.ones(())) | {"vq_grad": 2 / z.norm(dim=-1)}
    bound = (1.01 * step * slope[kind] + 1e-5).expand(len(z))
    margin = quantizer.margin(z)
    assert 5 < flipped.sum() < 0.1 * len(z)
    assert (margin <= bound)[flipped].all()
    assert (margin > bound).float().mean() > 0.5


@every_kind
def test_a_deep_copy_and_a_resumed_copy_train_alike(kind: str) -> None:
    quantizer = made(kind)
    batches = [torch.randn(2, 100, quantizer.dim) for _ in range(7)]
    for z in batches[:5]:
        quantizer(z)
    copied, resumed = copy.deepcopy(quantizer), made(kind, seed=1)
    resumed.load_state_dict(tensors(quantizer))
    resumed.load_training_state(quantizer.training_state())
    for z in batches[5:]:
        drawn = []
        for each in (quantizer, copied, resumed):
            torch.manual_seed(7)
            each(z)
            drawn.append(torch.rand(1).item())
        assert len(set(drawn)) == 1  # making the library's object takes no random numbers of the run
    for other in (copied, resumed):
        assert all(torch.equal(a, b) for a, b in zip(tensors(quantizer).values(), tensors(other).values(), strict=True))


@settings(deadline=None, max_examples=20)
@given(kind=st.sampled_from(["vq_ema", "vq_grad", "lfq", "bsq", "simvq"]), seed=st.integers(0, 1 << 30))
def test_codes_to_latents_to_codes_is_the_identity(kind: str, seed: int) -> None:
    quantizer = made(kind, seed)
    codes = torch.arange(quantizer.codebook_size)
    assert torch.equal(quantizer.codes(quantizer.latents(codes)), codes)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("kind", {"kind": "vq"}),
        ("levels", {"levels": (8, 2)}),
        ("levels", {"levels": 8}),
        ("levels", {"levels": (2048, 2048, 2048)}),
        ("codebook_size", {"codebook_size": 1024}),
        ("codebook_size", {"kind": "vq_ema", "dim": 4}),
        ("codebook_size", {"kind": "lfq", "codebook_size": 48}),
        ("codebook_size", {"kind": "simvq", "codebook_size": 64.0, "dim": 4}),
        ("dim", {"kind": "vq_ema", "codebook_size": 64}),
        ("dim", {"kind": "bsq", "codebook_size": 64, "dim": 5}),
        ("dim", {"dim": 3}),
        ("codebooks", {"kind": "rvq", "codebook_size": 64, "dim": 4}),
        ("codebooks", {"kind": "vq_ema", "codebook_size": 64, "dim": 4, "codebooks": 2}),
        ("decay", {"decay": 1.5}),
        ("dead_code", {"dead_code": -1}),
        ("commitment", {"commitment": "much"}),
        ("entropy", {"entropy": math.nan}),
        ("entropy", {"kind": "simvq", "codebook_size": 64, "dim": 4, "entropy": 0.1}),
        ("entropy", {"kind": "bsq", "codebook_size": 2**30, "entropy": 0.1}),
        ("entropy_temperature", {"entropy_temperature": 0}),
        ("entropy_gamma", {"entropy_gamma": math.inf}),
        ("dropout", {"dropout": 0.5}),
        ("dropout", {"dropout": 2}),
    ],
)
def test_impossible_configurations_are_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match=f"^quantizer: {field} "):
        QuantizerConfig(**fields)


# Entropy


@pytest.mark.parametrize("kind", ["fsq", "lfq", "bsq"])
def test_entropy_term_is_that_of_a_plain_loop(kind: str) -> None:
    quantizer = made(kind, entropy=0.3, entropy_gamma=0.7, entropy_temperature=0.2)
    z = torch.randn(9, quantizer.dim)
    if kind == "fsq":
        half = torch.tensor([3.5, 2.0, 1.0]) * 1.001
        offset = torch.tensor([0.5, 0.0, 0.0])
        width = torch.tensor([4.0, 2.0, 1.0])
        x = (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / width
        values = [[i / 4 for i in range(-4, 4)], [-1, -0.5, 0, 0.5, 1], [-1, 0, 1]]
    else:
        x = z / z.norm(dim=-1, keepdim=True) if kind == "bsq" else z
        values = [[-quantizer.latents(torch.tensor(63))[0].item(), quantizer.latents(torch.tensor(63))[0].item()]] * 6
    per_sample, marginal = 0.0, torch.zeros(quantizer.codebook_size, dtype=torch.float64)
    for row in x.tolist():
        weights = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(row, code, strict=True)) / 0.2) for code in product(*values)
        ]
        p = [weight / sum(weights) for weight in weights]
        per_sample -= sum(a * math.log(a) for a in p if a) / 9
        marginal += torch.tensor(p, dtype=torch.float64) / 9
    batch = -(marginal * marginal.log()).sum().item()
    assert quantizer(z).losses["entropy"].item() == pytest.approx(0.3 * (per_sample - 0.7 * batch), abs=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_binary_quantizers_are_the_librarys(spherical: bool) -> None:
    quantizer = made("bsq" if spherical else "lfq", codebook_size=256, entropy=0.1, entropy_temperature=0.5)
    library = LFQ(codebook_size=256, spherical=spherical, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    z = torch.randn(2, 300, 8)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = quantizer(ours)
    quantized, indices, loss = library(theirs, inv_temperature=2.0)
    assert torch.equal(out.codes, indices)
    torch.testing.assert_close(out.latents, quantized)
    torch.testing.assert_close(quantizer.latents(indices), library.indices_to_codes(indices))
    torch.testing.assert_close(sum(out.losses.values()), loss, atol=1e-4, rtol=0)
    weight = torch.randn_like(z)
    ((out.latents * weight).sum() + sum(out.losses.values())).backward()
    ((quantized * weight).sum() + loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_entropy_of_eighteen_bits_spreads_the_codes() -> None:
    torch.manual_seed(0)
    quantizer = made("lfq", codebook_size=2**18, entropy=1.0, commitment=0.0, entropy_temperature=1.0)
    z = (0.1 * torch.randn(256, 18) + 1).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.2)
    used = [len(quantizer.codes(z).unique())]
    for _ in range(30):
        optimizer.zero_grad()
        sum(quantizer(z).losses.values()).backward()
        optimizer.step()
    used.append(len(quantizer.codes(z).unique()))
    assert used[0] == 1
    assert used[1] > 200


# Vectors


def codebook_of(library: Any, values: Tensor) -> None:
    library._codebook.embed.copy_(values[None])


def test_vectors_are_the_librarys() -> None:
    z = torch.randn(2, 300, 4)
    quantizer = made("vq_ema")
    library = VectorQuantize(4, 32).eval()
    codebook_of(library, quantizer.codebook)
    quantized, indices, _ = library(z)
    assert torch.equal(quantizer.codes(z), indices)
    assert torch.equal(quantizer.latents(indices), quantized)

    quantizer = made("vq_grad")
    library = VectorQuantize(8, 32, use_cosine_sim=True).eval()
    codebook_of(library, F.normalize(quantizer.codebook.detach(), dim=-1))
    z = torch.randn(2, 300, 8)
    quantized, indices, _ = library(z)
    assert torch.equal(quantizer.codes(z), indices)
    torch.testing.assert_close(quantizer.latents(indices), quantized)
    plain = NearestCodebook(32, 8, normalized=True)
    plain.load_state_dict(tensors(quantizer))
    assert torch.equal(plain.codes(z), indices)
    assert torch.equal(plain(z).latents, quantizer.latents(indices))


@pytest.mark.parametrize("kind", ["vq_grad", "simvq"])
def test_gradient_codebooks_have_the_papers_losses(kind: str) -> None:
    quantizer = made(kind, commitment=0.5)
    z = torch.randn(2, 300, quantizer.dim, requires_grad=True)
    out = quantizer(z)
    if kind == "vq_grad":
        x, table = F.normalize(z, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    else:
        x, table = z, quantizer.codebook @ quantizer.transform.weight.T
    c = table[out.codes]
    expected = ((x.detach() - c) ** 2).mean() + 0.5 * ((x - c.detach()) ** 2).mean()
    torch.testing.assert_close(out.losses["codebook"], expected)
    (parameter,) = quantizer.parameters()
    wanted = torch.autograd.grad(expected, (z, parameter), retain_graph=True)
    got = torch.autograd.grad(out.losses["codebook"], (z, parameter), retain_graph=True)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.grad(out.latents.sum(), z)[0].abs().sum() > 0


def test_simvq_is_the_librarys() -> None:
    quantizer = made("simvq", commitment=0.25)
    library = SimVQ(4, 32)
    library.frozen_codebook.copy_(quantizer.codebook)
    library.code_transform.load_state_dict(quantizer.transform.state_dict())
    z = torch.randn(2, 300, 4)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out, (quantized, indices, loss) = quantizer(ours), library(theirs)
    assert torch.equal(out.codes, indices)
    torch.testing.assert_close(out.latents, quantized)
    torch.testing.assert_close(quantizer.latents(indices), library.indices_to_codes(indices))
    weight = torch.randn_like(z)
    ((out.latents * weight).sum() + out.losses["codebook"]).backward()
    ((quantized * weight).sum() + loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantizer.transform.weight.grad, library.code_transform.weight.grad)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), k=st.integers(2, 60), d=st.integers(1, 9), seed=st.integers(0, 1 << 30))
def test_nearest_is_the_nearest_up_to_rounding(n: int, k: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, table = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    quantizer = NearestCodebook(k, d)
    quantizer.codebook.copy_(table)
    distances = torch.cdist(z.double(), table.double())
    smallest = distances.sort(-1).values
    margin = quantizer.margin(z)
    torch.testing.assert_close(margin.double(), smallest[:, 1] - smallest[:, 0], atol=1e-5, rtol=0)
    clear = margin > 1e-5
    assert torch.equal(quantizer.codes(z)[clear], distances.argmin(-1)[clear])


def test_the_first_of_equals_and_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(10, 4).repeat(3, 1)
    z = torch.randn(500, 4)
    whole = nearest(z, table)
    assert whole.max() < 10
    monkeypatch.setattr("plait.tokenizers.averages.DISTANCES", 210)
    assert torch.equal(nearest(z, table), whole)


def test_looking_up_takes_little_memory_and_no_library() -> None:
    script = """
import resource, sys, torch
from plait.tokenizers.quantizer import NearestCodebook
quantizer, z = NearestCodebook(32768, 8), torch.randn(8192, 8)
quantizer.codes(z[:8])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
quantizer.codes(z)
print(peak() - before, "vector_quantize_pytorch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    megabytes, library = done.stdout.split()
    assert int(megabytes) < 300
    assert library == "False"


# Moving averages


def started(kind: str = "vq_ema", **changes: Any) -> Quantizer:
    """A quantizer whose averages run, from a codebook that was loaded."""
    quantizer = made(kind, **changes)
    quantizer.load_state_dict(tensors(quantizer))
    return quantizer


def test_averages_are_those_of_a_plain_loop() -> None:
    quantizer = started(decay=0.9, dead_code=0.0)
    codebook = quantizer.codebook.clone()
    sizes = torch.full((32,), 200 / 32)
    sums = codebook * sizes[:, None]
    for _ in range(5):
        z = torch.randn(2, 100, 4, requires_grad=True)
        codes = torch.cdist(z.reshape(-1, 4), codebook).argmin(-1)
        out = quantizer(z)
        assert torch.equal(out.codes.flatten(), codes)
        torch.testing.assert_close(out.latents.reshape(-1, 4), codebook[codes], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.losses["commitment"], 0.25 * F.mse_loss(z.reshape(-1, 4), codebook[codes]))
        for k in range(32):
            members = z.reshape(-1, 4)[codes == k].detach()
            sizes[k] = 0.9 * sizes[k] + 0.1 * len(members)
            sums[k] = 0.9 * sums[k] + 0.1 * members.sum(0)
        codebook = sums / sizes[:, None]
        torch.testing.assert_close(quantizer.codebook, codebook, atol=1e-5, rtol=1e-4)


def test_averages_rest_in_eval_mode() -> None:
    quantizer = started().eval()
    before, state = tensors(quantizer), quantizer.training_state()
    assert not quantizer(torch.randn(2, 50, 4)).losses
    assert torch.equal(quantizer.codebook, before["codebook"])
    assert {name: t.tolist() for name, t in state.items()} == {
        n: t.tolist() for n, t in quantizer.training_state().items()
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_refused(reentrant: bool) -> None:
    quantizer = started()
    z = torch.randn(2, 50, 4, requires_grad=True)
    out = checkpoint(lambda x: quantizer(x).latents ** 2, z, use_reentrant=reentrant)
    codebook = quantizer.codebook.clone()
    with pytest.raises(PlaitError, match="activation checkpointing"):
        out.sum().backward()
    assert torch.equal(quantizer.codebook, codebook)


def test_dead_codes_become_vectors_of_the_batch() -> None:
    quantizer = started(dead_code=0.5, decay=0.5)
    quantizer.codebook[:4] += 100
    z = torch.randn(2, 200, 4)
    alive = quantizer.codebook.clone()
    for _ in range(3):
        quantizer(z)
    # Never used: the share falls by half at each pass, under a half of the mean at the second.
    distance = torch.cdist(quantizer.codebook[:4], z.reshape(-1, 4)).amin(-1)
    assert (alive[:4] > 50).all()
    assert (quantizer.codebook[:4].abs() < 10).all()
    assert distance.max() < 1
    state = quantizer.training_state()
    torch.testing.assert_close(
        state["sums"] / state["sizes"][..., None], quantizer.codebook[None], atol=1e-3, rtol=1e-3
    )


def test_more_dead_codes_than_vectors() -> None:
    quantizer = started(dead_code=1.0)
    z = torch.randn(5, 4)
    for _ in range(3):
        quantizer(z)
    assert quantizer.codebook.isfinite().all()


def test_k_means_waits_for_enough_vectors_and_lowers_the_error() -> None:
    quantizer = made("vq_ema")
    first = quantizer.codebook.clone()
    batches = torch.randn(4, 100, 4)
    for z in batches[:3]:
        assert torch.equal(quantizer(z).latents, z)
        assert torch.equal(quantizer.codebook, first)
    quantizer(batches[3])
    centroids, sizes = k_means(batches.reshape(-1, 4), 32)
    assert sizes.sum() == 400
    error = [torch.cdist(batches.reshape(-1, 4), c).amin(-1).square().mean() for c in (batches[0, :32], centroids)]
    assert error[1] < 0.9 * error[0]
    assert torch.cdist(quantizer.codebook, centroids).amin(-1).max() < 0.2


@pytest.mark.parametrize("running", [False, True])
def test_a_loaded_codebook_is_not_started_anew(running: bool) -> None:
    quantizer = started() if running else made("vq_ema")
    if running:
        quantizer(torch.randn(5, 100, 4))
    quantizer.load_state_dict({"codebook": torch.randn(32, 4)})
    before = quantizer.codebook.clone()
    quantizer(torch.randn(5, 100, 4))
    assert torch.cdist(quantizer.codebook, before).diagonal().max() < 0.2


def test_a_collapsed_codebook_recovers() -> None:
    torch.manual_seed(0)
    used = []
    for share in (0.0, 0.1):
        quantizer = build_quantizer(QuantizerConfig("vq_ema", codebook_size=64, dim=4, decay=0.9, dead_code=share))
        quantizer.load_state_dict({"codebook": 100 + torch.rand(64, 4)})
        for _ in range(50):
            out = quantizer(torch.randn(600, 4))
        used.append(len(out.codes.unique()))
    assert used[0] < 32
    assert used[1] > 60


def test_almost_all_codes_are_used() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(QuantizerConfig("vq_ema", codebook_size=512, dim=4))
    z = torch.randn(3000, 4)
    for _ in range(200):
        out = quantizer(z)
    used = len(out.codes.unique())
    assert used >= 0.98 * 512
    assert (out.latents - z).square().mean() < 0.06


@pytest.mark.parametrize("kind", ["fsq", "vq_ema"])
def test_another_training_state_is_refused(kind: str) -> None:
    with pytest.raises(PlaitError, match="quantizer: the training state has"):
        made(kind).load_training_state({"weight": torch.zeros(1)})


def distributed_run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results: dict[str, Tensor] = {}
    for kind in ("vq_ema", "rvq"):
        quantizer, unreplaced = (made(kind, seed=rank, dead_code=share, decay=0.8) for share in (0.7, 0.0))
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            z = torch.randn(80, 4, generator=generator).chunk(world)[rank]
            quantizer(z)
            unreplaced(z)
        state = quantizer.training_state()
        assert (state["sizes"] - unreplaced.training_state()["sizes"]).abs().max() > 0.1
        results |= {f"{kind}.{name}": tensor.clone() for name, tensor in tensors(quantizer).items()}
        results |= {f"{kind}.{name}": tensor for name, tensor in state.items()}
    quantizer = made("lfq", entropy=1.0, commitment=0.0, entropy_temperature=1.0)
    z = torch.randn(80, 6, generator=torch.Generator().manual_seed(1)).chunk(world)[rank].requires_grad_()
    loss = quantizer(z).losses["entropy"]
    loss.backward()
    results |= {"loss": loss.detach(), "grad": z.grad / world}
    torch.save(results, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    distributed_run(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(distributed_run, (2, str(tmp_path)), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name in set(one) - {"loss", "grad"}:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"])
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]]), one["grad"], atol=1e-6, rtol=1e-4)


# Residual


def test_residual_codes_are_the_librarys() -> None:
    quantizer = made("rvq")
    quantizer.codebooks.mul_(torch.tensor([1, 0.5, 0.2])[:, None, None])
    library = ResidualVQ(dim=4, num_quantizers=3, codebook_size=32).eval()
    for layer, values in zip(library.layers, quantizer.codebooks, strict=True):
        codebook_of(layer, values)
    z = torch.randn(2, 300, 4)
    quantized, indices, _ = library(z)
    assert torch.equal(quantizer.codes(z), indices)
    torch.testing.assert_close(quantizer.latents(indices), quantized)
    assert torch.equal(quantizer.codes(z, n_codebooks=2), indices[..., :2])
    fewer = quantizer.latents(indices[..., :2])
    torch.testing.assert_close(fewer, quantizer.codebooks[0][indices[..., 0]] + quantizer.codebooks[1][indices[..., 1]])


def test_dropout_is_drawn_per_sample() -> None:
    quantizer = started("rvq", dropout=0.6, decay=1.0, dead_code=0.0, commitment=1.0)
    z = torch.randn(300, 2, 4, requires_grad=True)
    out = quantizer(z)
    codes = quantizer.codes(z)
    assert torch.equal(out.codes, codes)
    prefixes = torch.stack([quantizer.latents(codes[..., :q]) for q in (1, 2, 3)])
    is_prefix = ((prefixes - out.latents).abs() < 1e-6).flatten(2).all(-1)
    assert is_prefix.any(0).all()
    share = is_prefix.float().mean(1)
    assert (share[:2] - 0.2).abs().max() < 0.1
    assert abs(share[2] - 0.6) < 0.1
    errors = ((prefixes - z) ** 2).mean((2, 3)).cumsum(0)
    torch.testing.assert_close(out.losses["commitment"], errors[is_prefix.float().argmax(0), torch.arange(300)].mean())
    (gradient,) = torch.autograd.grad(out.latents.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


def test_residual_codebooks_learn_to_refine() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(QuantizerConfig("rvq", codebook_size=32, dim=4, codebooks=3, dropout=0.5, decay=0.9))
    for _ in range(40):
        quantizer(torch.randn(4, 100, 4))
    z = torch.randn(1000, 4)
    codes = quantizer.codes(z)
    errors = [(quantizer.latents(codes[:, :q]) - z).square().mean().item() for q in (1, 2, 3)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
