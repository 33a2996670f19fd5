"""The benchmarks: what they write, and that a wrong result is never timed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn_kernels import backends, cli, registry
from recattn_kernels.bench import environment, peers, report, runner, timing
from recattn_kernels.ops.indrnn import cpp
from recattn_kernels.spec import Sweep, Workload, tensors

needs_cpp = pytest.mark.skipif(
    isinstance(backends.extension("_cpu"), str), reason=f"no C++ backend: {backends.extension('_cpu')}"
)
KEYS = [
    "op", "workload", "device", "dtype", "pass", "impl",
    "median_ms", "p10_ms", "p90_ms", "bytes", "flops", "peak_bytes", "checked",
]  # fmt: skip
TINY = {"T": 5, "B": 3, "H": 4}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads and a sweep of a few elements, and this process's allocator left as it is."""
    workloads = (Workload("tiny", TINY, "a test"), Workload("larger", TINY | {"T": 50}, "a test"))
    sweeps = (Sweep("over-T", "T", {T: TINY | {"T": T} for T in (2, 3, 4, 6, 8)}),)
    spec = dataclasses.replace(registry.find("indrnn"), workloads=workloads, sweeps=sweeps)
    monkeypatch.setattr(registry, "OPS", (spec,))
    monkeypatch.setattr(timing, "keep_freed_memory", lambda reserve=0: True)
    monkeypatch.setattr(timing, "QUICK", timing.Effort(budget_s=0.01, max_repeats=5))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),  # of a virtual machine, whatever the processor
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_results_are_of_one_processor(tmp_path: Path, name: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    one = f"processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\n"
    cpuinfo.write_text(one + "flags\t\t: fpu vme\n\n" + one.replace("processor\t: 0", "processor\t: 1"))
    assert environment.cpu_model(cpuinfo) == expected
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 48.00\n")  # arm64 names no model
    assert environment.cpu_model(cpuinfo) == environment.cpu_model(tmp_path / "none")


@pytest.mark.usefixtures("tiny")
def test_what_is_measured_outlives_an_interrupted_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "PEERS", {})
    measure = runner.run_workload

    def interrupted(report: Any, progress: Any, spec: Any, work: Workload, *rest: Any) -> Any:
        if work.name == "larger":
            raise KeyboardInterrupt
        return measure(report, progress, spec, work, *rest)

    monkeypatch.setattr(runner, "run_workload", interrupted)
    monkeypatch.setattr(timing, "Effort", functools.partial(timing.Effort, budget_s=0.01, max_repeats=5))
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "--op", "indrnn", "--device", "cpu", "--json", str(path)])
    assert {row["workload"] for row in json.loads(path.read_text())["rows"]} == {"tiny"}


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


@needs_cpp
@pytest.mark.usefixtures("tiny")
def test_layers_run_on_the_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = backends.use_backend.__enter__

    def enter(self: backends.use_backend) -> None:
        asked.append(self.name)
        original(self)

    monkeypatch.setattr(backends.use_backend, "__enter__", enter)
    result = runner.run(device="cpu", quick=True, backend="cpp")
    assert set(asked) == {"cpp"}
    assert {"cpp", "layer:IndRNN"} <= {row["impl"] for row in result.rows}

    result = runner.run(device="cpu", quick=True, backend="cuda")
    assert not result.failures
    assert {row["impl"] for row in result.rows} == {"reference", "relu", "layer:nn.RNN(relu)", "layer:nn.LSTM"}
    assert any(note.startswith("indrnn tiny: layer:IndRNN is left out: indrnn: backend") for note in result.notes)


def test_backend_that_the_op_does_not_have() -> None:
    spec = registry.find("lstm_step")
    args, kwargs = spec.inputs(spec.workloads[0], torch.float32, "cpu", torch.Generator())
    case = peers.Case(spec, spec.workloads[0], torch.float32, "cpu", args, kwargs, compile=False)
    impls, refused = peers.build(case, "cuda")
    assert "cpp" not in {impl.name for impl in impls}
    assert refused == {"cuda": "the op has no such backend"}


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


@pytest.mark.parametrize("name", ["lstm_step", "gru_step"])
def test_least_bytes_of_a_step(name: str) -> None:
    """Forward every input is read and every output written, once; backward every input is read again, the gradients of
    the outputs are read, and those of the inputs written."""
    spec = registry.find(name)
    for work in spec.workloads:
        args, kwargs = spec.inputs(work, torch.float32, "cpu", torch.Generator().manual_seed(0))
        read = sum(t.nbytes for t in args)
        written = sum(t.nbytes for t in tensors(spec.function(*args, **kwargs, backend="reference")))
        assert spec.cost(work, torch.float32, False)[0] == read + written
        assert spec.cost(work, torch.float32, True)[0] == (read + written) + (read + written + read)
