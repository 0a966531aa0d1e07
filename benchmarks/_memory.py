"""How much memory a call takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The greatest running sum of the allocator's events during the call, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    running = greatest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        greatest = max(greatest, running)
    return greatest
