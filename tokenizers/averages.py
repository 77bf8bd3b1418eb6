"""Codebooks that follow their vectors: nearest neighbours, k-means, and moving averages over all ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from plait.errors import PlaitError

# Distances that exist at one time while looking up neighbours: 64 MB of float32.
DISTANCES = 2**24
# k-means starts from this many vectors per code.
_VECTORS_PER_CODE = 10


def nearest(z: Tensor, table: Tensor) -> Tensor:
    """Number of the nearest row of the table ``[K, d]`` for each of ``[N, d]``: int64 ``[N]``, the first among equals.

    Distances are computed for a part of the N at a time.
    """
    squares = table.square().sum(-1)
    rows = max(1, DISTANCES // len(table))
    # An exported model would have as many parts as its example.
    parts = [z] if torch.compiler.is_exporting() else z.split(rows)
    # |z − c|² less |z|², which is the same for all c. On a CPU min takes a third of argmin's time, for the same number.
    return torch.cat([torch.addmm(squares, part, table.T, alpha=-2).min(-1).indices for part in parts])


class MovingAverages:
    """The training of codebooks that follow their vectors, and all that it remembers.

    A codebook starts from k-means over at least 10 vectors per code, gathered over as many training passes and from all
    ranks; one that was loaded is left as it is. Then each pass moves the running number and sum of every code's vectors
    (over all ranks) and sets the code to their mean. A code used less than ``dead_code`` times the mean use (tokens/K)
    becomes one of the pass's vectors, with the mean use to begin with (as in Mimi: Défossez et al., "Moshi", 2024,
    arXiv 2410.00037).

    All ranks hold the same codebooks to the last bit: sums are reduced, vectors gathered, random choices drawn by the
    number of the pass, and k-means is taken from the first rank. So one process with the whole batch, in the order of
    the ranks, gives the same up to rounding.

    It is a plain object, not a module: the state dict shall not hold it. The library works in our tensors.
    """

    def __init__(self, decay: float, dead_code: float) -> None:
        self.decay, self.dead_code = decay, dead_code
        self.trained = False
        self.sizes: Tensor | None = None  # [q, K]
        self.sums: Tensor | None = None  # [q, K, dim]
        self.pool: Tensor | None = None  # [n, dim], until there are enough
        self.passes = 0
        self._library: Any = None
        self._for: tuple[Any, ...] = ()

    def ready(self, codebooks: Tensor, z: Tensor) -> bool:
        """Start if that is possible now.

        Args:
            codebooks: ``[q, K, dim]``, changed in place.
            z: ``[N, dim]``, this rank's vectors.

        Raises:
            PlaitError: within a backward pass, which means that activations are being recomputed.
        """
        if torch._C._current_graph_task_id() != -1:
            raise PlaitError(
                "quantizer: runs again in the backward pass and would count its batch twice; "
                "leave it out of activation checkpointing"
            )
        self.passes += 1
        if self.sizes is not None and self.sums is not None:
            self.sizes, self.sums = self.sizes.to(z.device), self.sums.to(z.device)
            return True
        vectors = gather_vectors(z.detach())
        q, count, _ = codebooks.shape
        sizes = codebooks.new_full((q, count), len(vectors) / count)
        if not self.trained:
            self.pool = vectors if self.pool is None else torch.cat([self.pool.to(z.device), vectors])
            if len(self.pool) < _VECTORS_PER_CODE * count:
                return False
            residual = self.pool
            for i in range(q):
                codebooks[i], counts = k_means(residual, count)
                sizes[i] = counts * (len(vectors) / len(residual))
                residual = residual - codebooks[i][nearest(residual, codebooks[i])]
            if distributed():
                dist.broadcast(codebooks, 0)
                dist.broadcast(sizes, 0)
        self.pool, self.sizes, self.sums, self.trained = None, sizes, codebooks * sizes[..., None], True
        return True

    def restart(self) -> None:
        """Forget everything; the codebook is now one that was loaded and is not to be started anew."""
        self.sizes = self.sums = self.pool = None
        self.trained = True

    def step(self, codebooks: Tensor, i: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize with codebook i as it is, then move it.

        Args:
            codebooks: ``[q, K, dim]``, changed in place.
            i: which.
            z: ``[N, dim]``.

        Returns:
            quantized ``[N, dim]``, with the rotation trick's gradients if z has any, and codes int64 ``[N]``.
        """
        assert self.sizes is not None
        assert self.sums is not None
        library = self._vector_quantize(*codebooks.shape[1:])
        core = library._codebook
        core.embed, core.embed_avg, core.cluster_size = (t[i : i + 1] for t in (codebooks, self.sums, self.sizes))
        before = codebooks[i].clone()
        carrier, codes, _ = library(z[None])
        self._replace_dead(codebooks[i], self.sums[i], self.sizes[i], z.detach())
        return straight_through(carrier[0], before[codes[0]]), codes[0]

    def _vector_quantize(self, count: int, dim: int) -> Any:
        built_for = count, dim, distributed()
        if self._for != built_for:
            from vector_quantize_pytorch import VectorQuantize

            # It draws a codebook, which is never used: a resumed run must go on with the same random numbers.
            with torch.random.fork_rng(devices=[]):
                self._library = VectorQuantize(
                    dim, count, decay=self.decay, commitment_weight=0.0, sync_codebook=distributed()
                )
            self._for = built_for
        return self._library

    def _replace_dead(self, codebook: Tensor, sums: Tensor, sizes: Tensor, z: Tensor) -> None:
        mean = sizes.mean()
        dead = (sizes < self.dead_code * mean).nonzero().flatten()
        if not len(dead):
            return
        vectors = gather_vectors(z)
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(self.passes))[: len(dead)]
        dead = dead[: len(drawn)]
        codebook[dead] = vectors[drawn.to(z.device)]
        sizes[dead] = mean
        sums[dead] = codebook[dead] * mean

    def state(self) -> dict[str, Tensor]:
        """All it remembers, by name."""
        tensors = {"sizes": self.sizes, "sums": self.sums, "pool": self.pool}
        state = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        return state | {"passes": torch.tensor(self.passes), "trained": torch.tensor(self.trained)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a `state`.

        Raises:
            PlaitError: it is none.
        """
        if not {"passes", "trained"} <= set(state) <= {"passes", "trained", "pool", "sizes", "sums"}:
            raise PlaitError(f"quantizer: the training state has {sorted(state)}, which is not that of moving averages")
        self.sizes, self.sums, self.pool = (state.get(name) for name in ("sizes", "sums", "pool"))
        self.passes, self.trained = int(state["passes"]), bool(state["trained"])


def k_means(vectors: Tensor, count: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from a fixed random choice of the vectors.

    Args:
        vectors: ``[N, d]``, N ≥ count.
        count: of centroids.
        iterations: of assigning and averaging.

    Returns:
        centroids ``[count, d]`` and how many vectors each has, float32 ``[count]``.
    """
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:count]
    centroids = vectors[drawn.to(vectors.device)]
    sizes = vectors.new_zeros(count)
    for _ in range(iterations):
        codes = nearest(vectors, centroids)
        sizes = torch.zeros_like(sizes).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
        centroids = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centroids)
    return centroids, sizes


def distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """A tensor of the same shape on every rank, averaged."""
    if not distributed():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def gather_vectors(vectors: Tensor) -> Tensor:
    """The vectors ``[N, d]`` of all ranks, in their order; N may differ."""
    if not distributed():
        return vectors
    world = dist.get_world_size()
    count = torch.tensor([len(vectors)], device=vectors.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    most = max(int(n) for n in counts)
    padded = F.pad(vectors, (0, 0, 0, most - len(vectors))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def straight_through(carrier: Tensor, values: Tensor) -> Tensor:
    """Exactly these values, with the carrier's gradients (and the values' own are cut)."""
    return values.detach() + (carrier - carrier.detach())
