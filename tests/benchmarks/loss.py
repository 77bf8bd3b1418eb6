"""Memory and time of the loss and its gradients beside the plain formula, ``F.cross_entropy(h @ W.T, t)``.

    python tests/benchmarks/loss.py --vocabulary 184622 --width 1024 --tokens 4096

Each side runs in a process of its own. Counted as memory is what the process's largest resident size (VmHWM) grows by
from when the inputs stand to the end of the backward pass: logits, their gradients, and the gradients of both inputs.
The time is the least wall time of a forward and backward pass among all that are run, and the least time on the
processor, which says more on a busy machine if there is one thread (``OMP_NUM_THREADS=1``). The plain formula needs
about 10 GB at these sizes.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from plait.model.loss import Head, Targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=184_622)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=["plain", "plait"], help="run this one alone")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for side in ("plain", "plait"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(f"{side:6}", *(f"{name} {value:.3f}" for name, value in found[side].items()), sep="  ")
    ratio = {name: found["plait"][name] / found["plain"][name] for name in ("gigabytes", "seconds", "processor")}
    times = f"{ratio['seconds']:.2f} × the wall time, {ratio['processor']:.2f} × the processor's"
    print(f"plait needs 1/{1 / ratio['gigabytes']:.2f} of the memory; {times}")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side; returns peak memory in GB, seconds on the wall and on the processor, and the loss."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    head = Head(arguments.width, arguments.vocabulary).to(dtype)
    hidden = torch.randn(1, arguments.tokens, arguments.width, dtype=dtype, requires_grad=True)
    tokens = torch.randint(arguments.vocabulary, (1, arguments.tokens))
    targets = Targets(tokens, torch.ones(1, arguments.tokens), torch.zeros_like(tokens), 1)

    def step() -> float:
        head.weight.grad = hidden.grad = None
        if arguments.side == "plait":
            loss = head(hidden, targets).loss / arguments.tokens
        else:
            loss = F.cross_entropy((hidden[0] @ head.weight.T).float(), tokens[0])
        loss.backward()
        return loss.item()

    before, least = resident(), {"seconds": math.inf, "processor": math.inf}
    for _ in range(arguments.repeats):
        wall, processor = time.perf_counter(), time.process_time()
        loss = step()
        for name, taken in (("seconds", time.perf_counter() - wall), ("processor", time.process_time() - processor)):
            least[name] = min(least[name], taken)
    memory = largest() - before
    return {"gigabytes": memory / 1e9, **least, "loss": loss}


def resident() -> int:
    """The process's resident bytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def largest() -> int:
    """The largest that they have been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
