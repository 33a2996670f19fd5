"""Sweeps: their lines, where these end, and that a wrong one is not timed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import TINY, exit_code, needs_cpp, shrink
from torch import Tensor

from recattn_kernels import backends, registry
from recattn_kernels.bench import peers, runner, sweep, timing
from recattn_kernels.ops.indrnn import cpp, reference
from recattn_kernels.spec import Sweep


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of the tiny op alone, without the peers, each call timed a few times."""
    shrink(monkeypatch)
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
def test_sweep_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ("bench", "--op", "indrnn", "--device", "cpu", "--workload", "over-T")
    assert exit_code(*options) == 2  # it is run for plots alone
    assert "workload must be one of" in capsys.readouterr().err
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
