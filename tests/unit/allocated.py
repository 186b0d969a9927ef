"""Memory as torch's own allocator counts it."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function):
    """The most bytes that were allocated at once by ``function``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
