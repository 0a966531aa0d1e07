"""linear_cross_entropy against ``F.cross_entropy(F.linear(...))``: time, and memory beyond inputs.

``python benchmarks/linear_cross_entropy.py [--threads 2] [--pairs 3] [--tokens 4096]
[--features 512] [--classes 32000]``

Prints a markdown table of forward and backward; a time ratio above 1 means that eager is slower.
Memory is the highest sum of what torch's CPU allocator has handed out during the call, by the
memory events of torch.profiler; it includes the gradients of input and weight.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _memory import peak_bytes
from _paired import header, paired

from torchbp import functional as TF


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(header(options.threads, options.pairs) + "\n")
    columns = ["dtype", "tokens x features x classes", "ours ms", "eager ms", "eager / ours"]
    columns += ["ours MiB", "eager MiB", "ours / eager"]
    print("| " + " | ".join(columns) + " |\n|---|---|" + "--:|" * 6, flush=True)
    for name in options.dtypes:
        dtype = getattr(torch, name)
        size = options.tokens, options.features, options.classes
        x = torch.randn(size[0], size[1]).to(dtype).requires_grad_()
        w = (0.05 * torch.randn(size[2], size[1])).to(dtype).requires_grad_()
        target = torch.randint(size[2], (size[0],))

        def ours(x=x, w=w, target=target) -> object:
            return torch.autograd.grad(TF.linear_cross_entropy(x, w, target), (x, w))

        def eager(x=x, w=w, target=target) -> object:
            return torch.autograd.grad(F.cross_entropy(F.linear(x, w), target), (x, w))

        memory = [peak_bytes(call) / 2**20 for call in (ours, eager)]
        ratio, mine, theirs = paired(ours, eager, options.pairs, seconds=0.0)
        cells = [name, " x ".join(map(str, size)), f"{mine:.4g}", f"{theirs:.4g}", f"{ratio:.2f}"]
        cells += [f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[0] / memory[1]:.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
