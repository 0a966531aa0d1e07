"""Timing two ways of doing one thing against each other."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable

import torch

from torchbp import kernels


def header(threads: int, pairs: int) -> str:
    """What was measured with: versions, instruction set, threads."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"kernels {kernels.status()['isa']}, {threads} threads, median of {pairs} alternating pairs"
    )


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def paired(
    a: Callable[[], object], b: Callable[[], object], pairs: int = 9, seconds: float = 0.02
) -> tuple[float, float, float]:
    """Time ``a`` and ``b`` in alternation, so that a busy machine disturbs both alike.

    Args:
        a: The candidate.
        b: What it is compared with.
        pairs: How often each of them is measured.
        seconds: How long every measurement lasts at least.

    Returns:
        The median over pairs of ``time(b) / time(a)`` (above 1: ``a`` is faster), and the median
        milliseconds of one call of ``a`` and of ``b``.
    """
    repeats = []
    for call in (a, b):
        call()
        repeats.append(max(1, math.ceil(seconds / max(_seconds(call, 3), 1e-7))))
    times_a, times_b = [], []
    for pair in range(pairs):
        order = [(a, repeats[0], times_a), (b, repeats[1], times_b)]
        for call, count, times in order if pair % 2 == 0 else reversed(order):
            times.append(_seconds(call, count))
    ratio = statistics.median(tb / ta for ta, tb in zip(times_a, times_b, strict=True))
    return ratio, 1e3 * statistics.median(times_a), 1e3 * statistics.median(times_b)
