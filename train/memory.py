"""What training a decoder holds on each device, by formula, for every ZeRO stage (arXiv 1910.02054).

The model states are those that DeepSpeed really makes of `plait.train.engine`'s configuration: float32 masters and
moments with bfloat16, and from stage 1 on with float32 too, as copies. DeepSpeed's own estimates, such as
``estimate_zero2_model_states_mem_needs``, are these states and the float32 gradients of the update.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import nn

from plait.model.cost import Activations
from plait.model.decoder import Decoder
from plait.train.engine import REDUCE_BUCKET

LIVE = 1_000_000_000  # its stage3_max_live_parameters, and the size of its sub-groups
PERSISTENT = 100_000  # its stage3_param_persistence_threshold: smaller tensors stay whole on every device


@dataclass(frozen=True)
class ModelSize:
    """What the memory depends on: numbers of parameters.

    Attributes:
        parameters: all but the quantized ones.
        trained: those of them that are trained.
        small: those of them in tensors of at most `PERSISTENT`.
        largest: of the module with most of them, which stage 3 gathers as a whole: the embedding or a block.
        quantized_bytes: of quantized weights; they are no parameters, and whole on every device.
    """

    parameters: int
    trained: int
    small: int
    largest: int
    quantized_bytes: int = 0

    @classmethod
    def of(cls, decoder: Decoder, quantized: Iterable[nn.Parameter] = (), bits: int = 0) -> Self:
        """The size of a decoder, which may lie on the meta device.

        Args:
            decoder: with ``requires_grad`` as it is trained.
            quantized: those of its parameters that training will quantize.
            bits: what one then takes, its share of scales and zero points included.
        """
        apart = {id(parameter): parameter.numel() for parameter in quantized}
        counted = [p for p in decoder.parameters() if id(p) not in apart]
        modules = [decoder.embed_tokens, *decoder.layers]
        return cls(
            sum(p.numel() for p in counted),
            sum(p.numel() for p in counted if p.requires_grad),
            sum(p.numel() for p in counted if p.numel() <= PERSISTENT),
            max(sum(p.numel() for p in module.parameters() if id(p) not in apart) for module in modules),
            sum(apart.values()) * bits // 8,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; an estimate, without what CUDA itself and fragments take.

    Attributes:
        parameters: all of them, or stage 3's share; quantized ones in any case.
        gradients: of the trained ones, or the share of stages 2 and 3.
        optimizer: masters and moments of the trained ones, or the share of stages 1 to 3.
        activations: what the forward pass keeps, and what the loss or a block's backward pass needs besides.
        communication: while that is there: DeepSpeed's bucket, and what stage 3 has gathered.
        update: while the optimizer works, when activations and buckets are gone: float32 gradients, and Adam's
            intermediate results.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    update: float

    @property
    def states(self) -> float:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most that is there at a time."""
        return self.states + max(self.activations + self.communication, self.update)


def training_memory(model: ModelSize, activations: Activations, value_bytes: int, zero: int, world_size: int) -> Memory:
    """Memory of each of ``world_size`` processes.

    Args:
        model: its numbers of parameters.
        activations: of a micro-batch.
        value_bytes: of parameters and gradients: 2 for bfloat16, 4 for float32.
        zero: the ZeRO stage.
        world_size: number of processes.
    """
    mixed = value_bytes == 2
    parameters: float = model.parameters
    communication: float = min(REDUCE_BUCKET, model.trained) if zero else 0
    if zero == 3:
        parameters = model.parameters / world_size + (model.small if world_size > 1 else 0)
        # Parameters that come again soon stay gathered; the largest module's gradient is there beside them.
        communication += min(model.parameters, max(LIVE, model.largest)) + model.largest
    owned = model.trained / (world_size if zero else 1)  # whose optimizer states this process has
    updated = min(owned, LIVE) if zero == 3 else owned
    return Memory(
        parameters=value_bytes * parameters + model.quantized_bytes,
        gradients=value_bytes * model.trained / (world_size if zero >= 2 else 1),
        optimizer=(12 if mixed or zero else 8) * owned,
        activations=activations.kept + activations.working,
        communication=value_bytes * communication,
        update=(8 if mixed or zero in (1, 2) else 4) * updated,
    )
