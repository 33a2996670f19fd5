"""Timing takes turns, and memory is measured."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from recattn_kernels.bench import memory, timing


class Clock:
    """A stopwatch of known times, which notes what it was asked for."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.asked = seconds, list[str]()

    def __call__(self, call: timing.Call) -> float:
        name = str(call())
        self.asked.append(name)
        return self.seconds[name[0]]


def test_timing_takes_turns() -> None:
    clock = Clock({"a": 0.1, "b": 0.1, "c": 0.1})
    effort = timing.Effort(budget_s=0.4)
    found = timing.measure([[lambda: "a"], [lambda: "b"], [lambda: "c"]], clock, effort)
    asked = "".join(clock.asked)
    assert asked[:6] == "aabbcc"  # warm-up and estimate
    rounds = [asked[i : i + 3] for i in range(6, len(asked), 3)]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] * 4
    assert len(set(rounds)) > 1  # none always follows the same other
    assert found == [timing.Timing(*[pytest.approx(100)] * 3)] * 3


def test_repeats_spread_over_the_run() -> None:
    order = timing.schedule([3, 30])
    assert [i // 11 for i, which in enumerate(order) if which == 0] == [0, 1, 2]  # 33 calls, in three parts
    assert order == timing.schedule([3, 30])


def test_slow_calls_run_once() -> None:
    clock = Clock({"a": 10.0, "b": 0.5})
    timing.measure([[lambda: "a"], [lambda: "b"]], clock, timing.Effort(budget_s=1.0, slow_s=5.0))
    assert clock.asked == ["a", *["b"] * 5]  # the least is three repeats


def test_copies_rotate() -> None:
    clock = Clock({"a": 1.0})
    timing.measure([[lambda: "a0", lambda: "a1", lambda: "a2"]], clock, timing.Effort(budget_s=6.0))
    assert clock.asked == ["a0", "a1", "a2", "a0", *["a0", "a1", "a2"] * 2]  # each warmed up, then in turn


def test_failing_call_is_returned() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    failed, timed = timing.measure([[fails], [lambda: None]], timing.cpu_stopwatch, timing.QUICK)
    assert isinstance(failed, RuntimeError)
    assert isinstance(timed, timing.Timing)


def test_quantiles() -> None:
    found = timing.summary([i / 1e3 for i in range(1, 12)])
    assert (found.p10_ms, found.median_ms, found.p90_ms) == pytest.approx((2, 6, 10))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_freed_memory_is_kept() -> None:
    program = """
import resource, torch
from recattn_kernels.bench import timing

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(64 << 20, dtype=torch.uint8)[:: 4096].fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
print(timing.keep_freed_memory(reserve=1 << 28))
[faults() for _ in range(6)]  # a heap of kept blocks settles after a few rounds
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(faults) < 1000  # each of the four blocks, mapped afresh, has up to 16,384


def test_peak_of_memory() -> None:
    x = torch.zeros(1000)

    def call() -> Tensor:
        held = x + 1
        held = held * 2  # two at a time
        return held[:1].clone()

    assert memory.peak_bytes(call, "cpu") == pytest.approx(8000, abs=100)  # the numbers 1 and 2 are tensors too
