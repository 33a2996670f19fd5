"""Timing calls in rounds, A B C, C A B, so that what the machine does meanwhile is shared by all of them."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


@dataclass(frozen=True)
class Timing:
    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Effort:
    """How long to measure: about budget_s a call, within the limits on repeats."""

    budget_s: float = 1.0
    min_repeats: int = 3
    max_repeats: int = 200
    slow_s: float = 3.0  # a call that takes longer than this is timed once: repeating it would say nothing new


QUICK = Effort(budget_s=0.15, max_repeats=20, slow_s=1.0)


def keep_freed_memory(reserve: int = 0) -> bool:
    """Has the C allocator keep what is freed, starting with `reserve` bytes. False where it cannot be told to.

    glibc maps a block over 32 MB afresh and unmaps it when it is freed, so that every large output pays the page
    faults of its first touch, about 0.3 ms a MB, which hides the kernels. Every call timed here gains alike.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    # The mmap threshold itself cannot be set above 32 MB, so: no blocks by mmap at all, and nothing given back.
    m_trim_threshold, m_mmap_max = -1, -4
    kept = bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, -1))
    # An aligned block needs a free one a little larger than itself, so blocks do not simply take each other's place:
    # they need room, and a few rounds to settle in. A quarter of the memory is enough to take from a machine at once.
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    torch.empty(min(reserve, limit), dtype=torch.uint8).fill_(0)
    return kept


def cpu_stopwatch(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def cuda_stopwatch(call: Call) -> float:
    """Seconds between two events around the call.

    The GPU spins first while the host queues the call, so a short kernel is timed by itself and not by how fast the
    host launches it; a call of many launches outlasts the spin and is timed as its user sees it.
    """
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # cycles, about half a millisecond
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return float(start.elapsed_time(stop)) / 1e3


def stopwatch(device: str) -> Stopwatch:
    return cuda_stopwatch if device == "cuda" else cpu_stopwatch


def rotation(device: str, bytes_per_call: int) -> int:
    """How many copies of the inputs calls must rotate over so that none finds its own still in a GPU's L2 cache."""
    if device != "cuda":
        return 1
    l2 = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return min(8, 1 + 2 * l2 // max(bytes_per_call, 1))


def schedule(repeats: Sequence[int]) -> list[int]:
    """The order of calls: each one spread over the whole run, once in each of its rounds; the same one every time.

    At random within a round: in one order a call would always follow the same other. After one that runs the same
    kernels on the same inputs it finds both in the caches, which is 10 % of a call of 2 ms.
    """
    chance = random.Random(0)
    turns = [((k + chance.random()) / n, i) for i, n in enumerate(repeats) for k in range(n)]
    return [i for _, i in sorted(turns)]


def measure(
    calls: Sequence[Sequence[Call]], watch: Stopwatch, effort: Effort, tick: Callable[[], None] = lambda: None
) -> list[Timing | Exception]:
    """Times each call, interleaved with the others; the error of one that fails at its first run.

    A call is given in one or more copies, taken in rotation. tick is called now and then, between two calls.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    errors: dict[int, Exception] = {}
    repeats = [0] * len(calls)
    for i, copies in enumerate(calls):
        tick()
        try:
            estimate = watch(copies[0])  # the warm-up
        except Exception as error:
            errors[i] = error
            continue
        if estimate > effort.slow_s:
            seconds[i].append(estimate)
            continue
        for copy in (*copies[1:], copies[0]):
            estimate = watch(copy)
        repeats[i] = max(effort.min_repeats, min(effort.max_repeats, int(effort.budget_s / max(estimate, 1e-9))))
    # Garbage collections would fall on whichever call allocates the most objects.
    gc.collect()
    gc.disable()
    try:
        last = time.perf_counter()
        for i in schedule(repeats):
            seconds[i].append(watch(calls[i][len(seconds[i]) % len(calls[i])]))
            if time.perf_counter() - last > 0.5:
                tick()
                last = time.perf_counter()
    finally:
        gc.enable()
    return [errors[i] if i in errors else summary(s) for i, s in enumerate(seconds)]


def summary(seconds: Sequence[float]) -> Timing:
    ms = sorted(1e3 * s for s in seconds)
    if len(ms) == 1:
        return Timing(ms[0], ms[0], ms[0])
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    return Timing(statistics.median(ms), deciles[0], deciles[-1])
