"""The kernels of live blame against eager PyTorch.

``python benchmarks/blame_kernels.py [--threads 2] [--pairs 9]``

Prints a markdown table; a ratio above 1 means that the kernel is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from _paired import header, paired
from torch import Tensor

from torchbp import kernels
from torchbp.blame.definitions import log_odds_blame, squared_error_blame

Case = tuple[str, str, Callable[[], object], Callable[[], object]]


def _label(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"


def _eager_reduce(a: Tensor, delta: Tensor, unit_dim: int) -> tuple[Tensor, ...]:
    other = [d for d in range(a.dim()) if d != unit_dim % a.dim()]
    product = a * delta
    return (
        product.sum(other[1:]) if len(other) > 1 else product,
        (a == 0).sum(other),
        a.square().sum(other),
        delta.square().sum(other),
    )


def reduce_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The sums of `blame_reduce`, composed of PyTorch calls."""
    for name, shape, unit_dim, channels_last in (
        ("blame_reduce", (256, 1024), -1, False),
        ("blame_reduce", (4096, 4096), -1, False),
        ("blame_reduce tokens", (8, 512, 768), -1, False),
        ("blame_reduce images", (32, 64, 56, 56), 1, False),
        ("blame_reduce channels_last", (32, 64, 56, 56), 1, True),
        ("blame_reduce small images", (64, 512, 7, 7), 1, False),
    ):
        a, delta = torch.randn(shape, dtype=dtype).relu(), torch.randn(shape, dtype=dtype)
        if channels_last:
            a, delta = (t.to(memory_format=torch.channels_last) for t in (a, delta))
        yield (
            name,
            _label(a),
            lambda a=a, d=delta, u=unit_dim: kernels.blame_reduce(a, d, u),
            lambda a=a, d=delta, u=unit_dim: _eager_reduce(a, d, u),
        )


def _eager_settle(
    contribution: Tensor, losses: Tensor, labels: Tensor, kind: str, sizes: list[int]
) -> tuple[Tensor, ...]:
    blame = contribution / 0.01
    if kind == "log_odds":
        blame = log_odds_blame(blame, losses)
    elif kind == "squared":
        blame = squared_error_blame(blame, losses)
    one_hot = (torch.arange(10)[:, None] == labels).to(blame.dtype)
    per_sample = torch.stack([part.sum(1) for part in blame.split(sizes, 1)], 1)
    return blame.sum(0), blame.abs().sum(0), (blame * blame).sum(0), one_hot @ blame, per_sample


def settle_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The sums of `blame_settle` for ten classes, composed of PyTorch calls; none in half."""
    if dtype.itemsize < 4:
        return
    for samples, sizes in ((256, [4096, 1024, 1024, 10]), (64, [64, 64, 10])):
        contribution = torch.randn(samples, sum(sizes), dtype=dtype) * 1e-3
        losses = torch.rand(samples, dtype=dtype) * 4
        labels = torch.randint(10, (samples,))
        layers = (
            contribution.split(sizes, 1),
            torch.ones(3, sum(sizes), dtype=dtype).split(sizes, 1),
        )
        for kind in ("taylor", "log_odds", "squared"):
            arguments, of_layers = (contribution, losses, labels), (*layers, losses, labels)
            yield (
                f"blame_settle {kind}",
                _label(contribution),
                lambda a=of_layers, k=(kind,): kernels.blame_settle(*a, 10, 0.01, k * len(a[0])),
                lambda a=arguments, k=kind, s=sizes: _eager_settle(*a, k, s),
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(header(options.threads, options.pairs) + "\n")
    print("| operation | size | kernel ms | eager ms | eager / kernel |\n|---|---|--:|--:|--:|")
    for dtype in (torch.float32, torch.bfloat16):
        for cases in (
            reduce_cases(dtype),
            settle_cases(dtype),
        ):
            for name, size, kernel, eager in cases:
                ratio, ours, theirs = paired(kernel, eager, options.pairs)
                print(f"| {name} | {size} | {ours:.4g} | {theirs:.4g} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
