"""The formulas of model states, against tensors that DeepSpeed really holds and against its own estimates."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from plait.model.config import DecoderConfig
from plait.model.cost import Activations
from plait.model.decoder import Decoder
from plait.model.loss import Targets
from plait.train.engine import REDUCE_BUCKET, Engine, start_distributed
from plait.train.memory import PERSISTENT, ModelSize, training_memory
from plait.train.optimizer import build_optimizer
from plait.train.recipe import DecoderRecipe, ParallelConfig

# Matrices above and below the size that stage 3 leaves whole.
CONFIG = DecoderConfig(vocabulary_size=1000, width=128, layers=2, heads=4, kv_heads=2, ffn_width=800)
NOTHING = Activations(0, 0)


def frozen_embedding() -> Decoder:
    decoder = Decoder(CONFIG)
    decoder.embed_tokens.weight.requires_grad_(False)  # also the head: it is the same
    return decoder


def measure(zero: int, dtype: str, processes: int) -> dict[str, int]:
    """Bytes of the tensors that a step leaves."""
    parallel = ParallelConfig(zero, dtype)
    recipe = DecoderRecipe(["s"], "t", "o", global_batch=processes, micro_batch=1, streams=processes, parallel=parallel)
    module = frozen_embedding()
    engine = Engine(module, build_optimizer(module, recipe.optimizer), recipe, processes)
    tokens, positions = torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None]
    targets = Targets(tokens, torch.ones(1, 8), torch.zeros_like(tokens), 1)
    engine.backward(engine.forward(tokens, positions, targets=targets)[0], 8.0)
    engine.step(1e-3)
    inner = engine._engine.optimizer
    whole = {p.data_ptr(): p.nbytes for p in module.parameters()}
    shares = [p.ds_tensor.nbytes for p in module.parameters()] if zero == 3 else []
    masters = [p for group in inner.param_groups for p in group["params"]]
    if zero == 3:  # whose groups are the model's
        masters = inner.fp32_partitioned_groups_flat
    moments = [t.nbytes for state in inner.state.values() for t in state.values() if t.ndim]
    figures = {
        "parameters": sum(whole.values()) + sum(shares),
        "optimizer": sum(moments) + sum(p.nbytes for p in masters if p.data_ptr() not in whole),
        "gradients": inner.grad_partitions_flat_buffer.nbytes if zero == 3 else 0,
    }
    engine._engine.destroy()
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_what_deepspeed_holds(
    dtype: str, tmp_path: Path, fork: Callable[[int, Path, Callable[[int], None]], list[int]]
) -> None:
    def work(rank: int) -> None:
        start_distributed()
        (tmp_path / f"{rank}.json").write_text(json.dumps([measure(zero, dtype, 2) for zero in range(4)]))

    assert fork(2, tmp_path / "log", work) == [0, 0], (tmp_path / "log-0").read_text()
    size = ModelSize.of(frozen_embedding())
    assert 0 < size.small < size.trained < size.parameters
    for zero, found in enumerate(json.loads((tmp_path / "0.json").read_text())):
        expected = training_memory(size, NOTHING, 2 if dtype == "bfloat16" else 4, zero, 2)
        for name, number in found.items():
            if number:
                assert number == pytest.approx(getattr(expected, name), rel=0.02), (zero, name)


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_states_agree_with_deepspeed_s_estimates(processes: int) -> None:
    parameters, largest = 7_000_000_000, 800_000_000
    size = ModelSize(parameters, parameters, 0, largest)
    _, theirs = estimate_zero2_model_states_mem_needs(parameters, processes, cpu_offload=False)
    ours = training_memory(size, NOTHING, 2, 2, processes)
    gradients = 4 * parameters / processes  # of the update, in float32
    assert ours.states + gradients == pytest.approx(theirs)
    assert ours.update == 2 * gradients
    _, theirs, gathered = estimate_zero3_model_states_mem_needs(parameters, largest, processes, cpu_offload=False)
    ours = training_memory(size, NOTHING, 2, 3, processes)
    # It leaves out the bfloat16 gradients, or half of the float32 ones, which come a sub-group at a time.
    assert ours.states < theirs - gathered < ours.states + gradients
    assert ours.states + gradients / 2 + gathered == pytest.approx(theirs)


def test_stages_trade_memory_for_communication() -> None:
    size = ModelSize(10**9, 10**9, 10**6, 10**8)
    for value_bytes in (2, 4):
        stages = [training_memory(size, NOTHING, value_bytes, zero, 8) for zero in range(4)]
        assert sorted(stages, key=lambda memory: -memory.states) == stages
        assert [m.communication > 0 for m in stages] == [False, True, True, True]
        assert stages[1].communication == REDUCE_BUCKET * value_bytes
        assert stages[0].states == 16 * 10**9


def test_peak_is_the_higher_of_both_phases() -> None:
    size = ModelSize(1000, 1000, 0, 100)
    few, many = (training_memory(size, Activations(n, 1), 2, 0, 1) for n in (10, 10**6))
    assert few.peak == few.states + few.update
    assert many.peak == many.states + 10**6 + 1


def test_quantized_weights_are_no_parameters() -> None:
    decoder = Decoder(CONFIG)
    quantized = [decoder.layers[0].mlp.up_proj.weight.requires_grad_(False)]
    plain, small = ModelSize.of(decoder), ModelSize.of(decoder, quantized, 4)
    assert plain.parameters - small.parameters == quantized[0].numel() == 2 * small.quantized_bytes
    assert plain.trained == small.trained
    a, b = (training_memory(size, NOTHING, 2, 3, 4) for size in (plain, small))
    assert a.parameters - b.parameters == 2 * quantized[0].numel() / 4 - small.quantized_bytes
    assert quantized[0].numel() > PERSISTENT
