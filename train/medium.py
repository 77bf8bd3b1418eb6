"""Raw samples → batches of one medium, read and augmented: what the encoders of all tokenizers' loops share."""

import hashlib
import random
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from megatron.energon import SkipSample, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError
from torch import Tensor

from plait.errors import PlaitError
from plait.train.loader import SampleEncoder

# So many samples in a row without a medium that can be read mean that there is none.
_HOPELESS = 1000


class MediumEncoder(SampleEncoder):
    """Raw samples → batches of tensors; samples without a readable medium are skipped.

    Every random choice is drawn from the seed, the sample and how often the stream has come by.

    Args:
        seed: of the run.
    """

    medium: ClassVar[str]

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.broken: set[str] = set()  # what was named already
        self.skipped_in_a_row = 0

    @abstractmethod
    def read(self, sample: dict[str, Any], draw: random.Random) -> tuple[Tensor, ...] | None:
        """A sample's tensors, augmented; None when it has none of the medium.

        Raises:
            PlaitError: the medium is broken.
        """

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> Any:
        """Read the sample.

        Raises:
            FatalSampleError: nothing could be read for so long that there seems to be nothing.
        """
        worker = WorkerConfig.active_worker_config
        # Counted within the logical worker, so that it does not depend on the number of processes.
        turn = self.current_sample_index // max(1, worker.num_workers if worker else 1)
        draw = random.Random(hashlib.sha256(f"{self.seed}/{sample['__key__']}/{turn}".encode()).digest())
        try:
            tensors = self.read(sample, draw)
        except PlaitError as error:
            if str(error) not in self.broken:
                self.broken.add(str(error))
                print(f"skipped {error}", flush=True)
            tensors = None
        if tensors is None:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == _HOPELESS:
                raise FatalSampleError(f"shards: {_HOPELESS} samples in a row hold no {self.medium} that can be read")
            raise SkipSample
        self.skipped_in_a_row = 0
        return {**{k: v for k, v in sample.items() if k.startswith("__")}, "tensors": tensors}

    @stateless
    def batch(self, samples: list[Any]) -> Tensor | tuple[Tensor, ...]:
        """Stack each of the tensors; a single one is the batch itself."""
        stacked = tuple(torch.stack(tensors) for tensors in zip(*(s["tensors"] for s in samples), strict=True))
        return stacked[0] if len(stacked) == 1 else stacked
