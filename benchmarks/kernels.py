"""Every kernel, forward and backward through autograd, against eager PyTorch.

    python benchmarks/kernels.py [--threads 2] [--pairs 7] [--only NAME] [--dtypes float32 ...]

Prints a markdown table for sizes from 64 x 64 to 4096 x 4096. ``eager / ours`` above 1 means that
ours is faster; ``of copy`` is how fast the bytes that have to be moved were moved, as a share of
what copying as many takes in the same run. A second table sets `torch.compile` beside ours, where
eager makes several passes.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator

import kernel_cases
import torch
import torch.nn.functional as F
from _paired import header, paired
from torch import Tensor

import torchbp.functional as B

SIZES = [(64, 64), (256, 256), (1024, 1024), (4096, 1024), (4096, 4096)]
CLASSES = [(1024, 32000)]
Step = Callable[[], object]


def step(function: Callable[..., Tensor], leaves: list[Tensor]) -> Step:
    """Forward and backward of ``function``, with an error of ones."""

    def call() -> object:
        output = function(*leaves)
        return torch.autograd.grad(output, [t for t in leaves if t.requires_grad], output)

    return call


def copy_of(n_bytes: int) -> Step:
    """A copy that reads and writes as many bytes in all."""
    source = torch.ones(max(1, n_bytes // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def families(only: str) -> Iterator[Callable[..., Iterator[tuple[str, str, Step, Step, int]]]]:
    for module in pkgutil.iter_modules(kernel_cases.__path__):
        if only in ("", module.name):
            yield importlib.import_module(f"kernel_cases.{module.name}").cases


def kernel_table(only: str, dtypes: list[torch.dtype], pairs: int) -> None:
    print("| kernel | size | dtype | ours ms | eager ms | eager / ours | of copy |")
    print("|---|---|---|--:|--:|--:|--:|")
    for cases in families(only):
        sizes = SIZES + (CLASSES if cases.__module__.endswith("cross_entropy") else [])
        for dtype in dtypes:
            for size in sizes:
                for name, label, ours, eager, n_bytes in cases(size, dtype):
                    ratio, ms, ms_eager = paired(ours, eager, pairs)
                    share = paired(ours, copy_of(n_bytes), pairs)[0]
                    print(
                        f"| {name} | {label.split()[0]} | {str(dtype).removeprefix('torch.')} "
                        f"| {ms:.4g} | {ms_eager:.4g} | {ratio:.2f} | {share:.2f} |",
                        flush=True,
                    )


def several_passes(
    rows: int, width: int
) -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """What eager composes: name, ours, eager's, and the arguments."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, requires_grad=True)

    x, y, w = leaf(rows, width), leaf(rows, width), leaf(width)
    target = torch.randint(width, (rows,))
    shape = (width,)
    yield (
        "RMSNorm",
        lambda x, w: B.rms_norm(x, shape, w),
        lambda x, w: F.rms_norm(x, shape, w),
        [x, w],
    )
    yield "bias + GELU", lambda x, w: B.bias_act(x, w, "gelu"), lambda x, w: F.gelu(x + w), [x, w]
    yield "SwiGLU", lambda x, y: B.gated(y, x, "silu"), lambda x, y: F.silu(x) * y, [x, y]
    yield (
        "cross-entropy",
        lambda x: B.cross_entropy(x, target),
        lambda x: F.cross_entropy(x, target),
        [x],
    )


def compiled_table(pairs: int) -> None:
    print("\n| kernel | size | ours ms | eager / ours | compiled / ours |\n|---|---|--:|--:|--:|")
    for rows, width in [(1024, 1024), (4096, 4096), (1024, 32000)]:
        for name, ours, eager, leaves in several_passes(rows, width):
            torch._dynamo.reset()
            compiled = step(torch.compile(eager, dynamic=False), leaves)
            ratio, ms, _ = paired(step(ours, leaves), step(eager, leaves), pairs)
            beside = paired(step(ours, leaves), compiled, pairs)[0]
            print(
                f"| {name} | {rows}x{width} | {ms:.4g} | {ratio:.2f} | {beside:.2f} |", flush=True
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", default="", help="a file of kernel_cases, or compiled")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(header(options.threads, options.pairs) + "\n")
    if options.only != "compiled":
        dtypes = [getattr(torch, name) for name in options.dtypes]
        kernel_table(options.only, dtypes, options.pairs)
    if options.only in ("", "compiled"):
        compiled_table(options.pairs)


if __name__ == "__main__":
    main()
