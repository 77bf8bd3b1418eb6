"""The data loader: megatron-energon over folders of shards, the same batches on any number of processes.

The data is cut into ``streams`` logical workers, not into ranks: with 4 streams, one process runs 4 workers and two
processes run 2 each, and worker i yields the same batches in both. A process takes its workers' batches in turn, so
the batches of one optimizer step (one of each stream) are the same set whatever the number of processes. The loader's
state is saved and restored exactly.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from megatron.energon import (
    Cooker,
    SavableDataLoader,
    TaskEncoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.errors import FatalSampleError, reraise_exception

from plait.errors import PlaitError
from plait.train.shards import read_manifest


@stateless
def _cook(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


class SampleEncoder(TaskEncoder[Any, Any, Any, Any]):
    """The base of what turns samples into batches: `encode_sample` gets ``__key__`` and each member's raw bytes."""

    decoder = None
    cookers = [Cooker(_cook)]  # noqa: RUF012 (energon reads it from the class)


def batches(loader: SavableDataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, without end.

    Raises:
        PlaitError: the data gives no batch, and says why.
    """
    try:
        yield from loader
    except (FatalSampleError, PlaitError) as error:
        # The worker's traceback comes before its message.
        raise PlaitError(str(error).strip().splitlines()[-1].split("Error: ", 1)[-1]) from None


def open_loader(
    folders: Sequence[str | Path],
    encoder: SampleEncoder,
    *,
    kind: str,
    scratch: Path,
    batch_size: int,
    seed: int,
    streams: int = 1,
    rank: int = 0,
    world_size: int = 1,
    packing_buffer: int | None = None,
    shuffle_buffer: int = 1000,
) -> SavableDataLoader[Any]:
    """An endless, savable loader over all samples of the folders, mixed in proportion to their sizes.

    Args:
        folders: shard folders of one kind.
        encoder: turns samples into batches.
        kind: "raw" or "tokens".
        scratch: folder for the mixture's description.
        batch_size: items per batch.
        seed: of the order.
        streams: logical workers over all processes; a multiple of ``world_size``.
        rank: of this process.
        world_size: number of processes.
        packing_buffer: documents that the packer may choose from; None when the encoder does not pack.
        shuffle_buffer: samples that are held to be shuffled, all of them if there are fewer.

    Raises:
        PlaitError: a folder is missing or incomplete, or the streams cannot be divided.
    """
    if streams % world_size:
        raise PlaitError(
            f"streams: {streams} cannot be divided over {world_size} processes; set streams to a multiple of it"
        )
    manifests = [read_manifest(Path(folder), kind) for folder in folders]
    if not manifests:
        raise PlaitError("shards: names no folder")
    samples = sum(row["samples"] for manifest in manifests for row in manifest["shards"])
    scratch.mkdir(parents=True, exist_ok=True)
    mixture = scratch / f"mixture-{rank}.yaml"
    blend = [
        {"path": str(Path(folder).resolve()), "weight": sum(row["samples"] for row in manifest["shards"])}
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blend}}}
    mixture.write_text(yaml.safe_dump(content), "utf-8")
    dataset = get_train_dataset(
        mixture.resolve(),
        worker_config=WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=streams // world_size,
            seed_offset=seed,
            global_error_handler=reraise_exception,  # by default energon drops a sample that an error of ours hit
        ),
        batch_size=batch_size,
        packing_buffer_size=packing_buffer,
        shuffle_buffer_size=min(shuffle_buffer, samples),
        max_samples_per_sequence=100,
        task_encoder=encoder,
    )
    warnings.filterwarnings("ignore", message=".*pin_memory.*|.*worker processes in total.*")
    return get_savable_loader(dataset, checkpoint_every_sec=0)
