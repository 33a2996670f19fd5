"""The command line: info, check and what they exit with; the generated sections of README.md."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recattn_kernels import backends, cli, registry
from recattn_kernels.bench import console, report, runner
from recattn_kernels.ops.indrnn import cpp

ROOT = Path(__file__).parents[1]

needs_cpp = pytest.mark.skipif(
    isinstance(backends.extension("_cpu"), str), reason=f"no C++ backend: {backends.extension('_cpu')}"
)

BLOCKED = """
import sys
for name in ("typer", "rich", "matplotlib", "mlxtend", "numpy"):
    sys.modules[name] = None
sys.argv = ["recattn", *sys.argv[1:]]
from recattn_kernels.cli import main
main()
"""


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    return error.value.code or 0


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", BLOCKED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_info_needs_no_extras() -> None:
    done = without_extras("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    for spec in registry.OPS:
        for backend in ("reference", *spec.backends):
            assert [spec.name, backend] in rows


def test_missing_extra_is_named() -> None:
    done = without_extras("bench", "--quick", "--op", "indrnn", "--plot", "nowhere")
    assert done.returncode == 1
    assert "pip install recattn_kernels[bench]" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("info", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["environment"]["torch"] == torch.__version__
    by_backend = {row["backend"]: row for row in told["ops"] if row["op"] == "indrnn"}
    assert "cpu" in by_backend["reference"]["usable_on"]
    for row in told["ops"]:
        assert bool(row["usable_on"]) == (row["reason"] is None)
    if not torch.cuda.is_available():
        assert by_backend["cuda"]["reason"]


def test_info_names_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def extension(name: str) -> str:
        return "no C++ compiler was found"

    monkeypatch.setattr(backends, "extension", extension)
    assert exit_code("info") == 0
    assert "no C++ compiler was found" in capsys.readouterr().out


@needs_cpp
def test_info_says_when_a_backend_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def forward(call: Any) -> Any:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(cpp, "forward", forward)
    assert exit_code("info") == 0
    assert "it fails: illegal instruction" in capsys.readouterr().out


@needs_cpp
def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("check", "--quick", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "pass" in out
    assert "not run" in out  # the GPU backends, with their reason


def forward_off(call: Any, forward: Any = cpp.forward) -> Any:
    output, h_n = forward(call)
    return output + 1e-2, h_n


def forward_without_nan(call: Any, forward: Any = cpp.forward) -> Any:
    output, h_n = forward(call)
    return output.nan_to_num(), h_n


def forward_of_wrong_dtype(call: Any, forward: Any = cpp.forward) -> Any:
    output, h_n = forward(call)
    return output, h_n.double() if h_n.dtype != torch.float64 else h_n.float()


def forward_that_raises(call: Any) -> Any:
    raise RuntimeError("the kernel did not start")


def backward_without_weight(grad_output: Any, grad_h_n: Any, call: Any, backward: Any = cpp.backward) -> Any:
    dx, du, dh0, db = backward(grad_output, grad_h_n, call)
    return dx, du * 0, dh0, db


@needs_cpp
@pytest.mark.parametrize(
    ("name", "broken", "complaint"),
    [
        ("forward", forward_off, "output 0: err"),
        ("forward", forward_without_nan, "where nan is right"),
        ("forward", forward_of_wrong_dtype, "output 1: dtype must be"),
        ("forward", forward_that_raises, "RuntimeError: the kernel did not start"),
        ("backward", backward_without_weight, "grad weight_hh: err"),
    ],
)
def test_check_finds_a_broken_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, broken: Any, complaint: str
) -> None:
    monkeypatch.setattr(cpp, name, broken)
    assert exit_code("check", "--op", "indrnn", "--backend", "cpp", "--device", "cpu") == 1
    assert complaint in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("check", "--op", "lstn"), ("bench", "--backend", "fortran"), ("bench", "--dtype", "int8"), ()]
)
def test_wrong_arguments(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert "usage: recattn" in capsys.readouterr().err


def test_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "--workload", "lunch", "--op", "indrnn", "--device", "cpu") == 2
    assert "recattn: workload must be one of adding-5000, ptb-char" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("check", "--device", "cuda") == 2
    assert capsys.readouterr().err == "recattn: --device cuda: torch finds no GPU\n"


@pytest.mark.parametrize("command", ["check", "bench"])
def test_backend_that_the_op_does_not_have(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--op", "lstm_step", "--backend", "cuda") == 2
    assert capsys.readouterr().err == f"recattn: lstm_step has no backend cuda: nothing to {command}\n"


def test_check_says_which_ops_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "OPS", tuple(map(registry.find, ("lstm_step", "indrnn"))))
    assert exit_code("check", "--backend", "cuda", "--device", "cpu") == 0
    assert "left out: the op has no such backend" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_that_cannot_be_written(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "results"
    # A workload that does not exist would be complained about too, had the work begun.
    assert exit_code("bench", "--workload", "lunch", "--device", "cpu", option, str(path)) == 2
    assert capsys.readouterr().err.startswith(f"recattn: {option}: {path}")


def test_where_results_go(tmp_path: Path) -> None:
    def name(path: str) -> str:
        file = report.results_file(f"{tmp_path}/{path}", {"cpu": "A CPU", "gpus": []}, "cpu")
        return file.relative_to(tmp_path).as_posix()

    (tmp_path / "old.json").mkdir()
    (tmp_path / "file").touch()
    paths = ("", "old.json", "new/", "new.json/", "new", "new.json", "file", "new/new.json")
    folder = "a-cpu.json"
    assert [name(path) for path in paths] == [
        folder, f"old.json/{folder}", f"new/{folder}", f"new.json/{folder}", f"new/{folder}", "new.json", "file",
        "new/new.json",
    ]  # fmt: skip


def test_a_run_without_rows_leaves_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row: Any = {"op": "indrnn"}
    assert report.write_json(runner.Report({}), path) == f"wrote {path}"
    assert report.write_json(runner.Report({}, [row]), path) == f"wrote {path}"
    assert report.write_json(runner.Report({}, sweeps=[row]), path) == f"left {path} as it was: this run made no rows"
    assert json.loads(path.read_text()) == {"environment": {}, "rows": [row]}


def test_plain_table() -> None:
    lines = console.plain_table(
        "times", ("row", "ms"), [["cpp", "1.5"], ["reference", "20"]], right=["ms"]
    ).splitlines()
    assert lines[1:] == ["times", "row         ms", "---------  ---", "cpp        1.5", "reference   20"]


# README.md


def test_support_table_waits_for_a_gpu() -> None:
    def cell(results: list[dict[str, Any]], backend: str) -> str:
        head, _, *lines = report.support_markdown(results).splitlines()
        (line,) = (line for line in lines if "`indrnn`" in line)
        return line.split("|")[head.split("|").index(f" `{backend}` ")].strip()

    assert cell([], "cpp") == "CPU: f64 f32 bf16 f16"
    assert cell([], "triton") == "GPU: f32 bf16 f16; compiled, not yet run"
    rows = [{"op": "indrnn", "impl": "triton", "device": "cuda"}]
    assert cell([{"rows": rows}], "triton") == "GPU: f32 bf16 f16"
    assert cell([{"rows": rows}], "cuda").endswith("compiled, not yet run")


def test_sections_are_replaced() -> None:
    text = "<!-- bench:begin -->\n<!-- bench:end -->\n<!-- support:begin -->\nold\n<!-- support:end -->\nafter\n"
    new = report.generated(text, [])
    assert new.startswith("<!-- bench:begin -->\n<!-- bench:end -->\n<!-- support:begin -->\n\n| op |")
    assert new.endswith("|\n\n<!-- support:end -->\nafter\n")
    assert report.generated(new, []) == new
    assert report.generated("no markers", []) == "no markers"


@pytest.mark.parametrize("name", ["README.md", "benchmarks/results/README.md"])
def test_generated_sections_are_up_to_date(name: str) -> None:
    file = ROOT / name
    text = file.read_text() if file.exists() else ""
    if ":begin -->" not in text:
        pytest.skip(f"{name} has no generated sections")
    assert report.generated(text, report.load_results()) == text, "make docs"


def test_report_of_an_installed_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside site-packages there is no README.md."""
    monkeypatch.setattr(sys, "argv", ["report", "nowhere/README.md"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert capsys.readouterr().err.startswith("report: no nowhere/README.md")


def test_summary_is_the_geometric_mean_over_workloads() -> None:
    def row(workload: str, pass_: str, impl: str, ms: float | None) -> dict[str, Any]:
        return {"op": "indrnn", "workload": workload, "device": "cpu", "dtype": "float32", "pass": pass_, "impl": impl,
                "median_ms": ms}  # fmt: skip

    environment = {"cpu": "a CPU", "gpus": [], "threads": 2, "capability": "avx2", "torch": "2", "date": "2026-01-01 0"}
    rows = [
        row("a", "fwd", "cpp", 1.0), row("a", "fwd", "compile/28", 2.0),
        row("b", "fwd", "cpp", 2.0), row("b", "fwd", "compile", 16.0), row("b", "fwd", "wrong", None),
        row("b", "fwd+bwd", "cpp", 1.0), row("b", "fwd+bwd", "compile", 0.5),
        row("b", "fwd", "layer:ours", 1.0), row("b", "fwd", "layer:theirs", 3.0),
    ]  # fmt: skip
    text = report.summary_markdown([{"environment": environment, "rows": rows}])
    lines = text.splitlines()
    assert lines[0] == "a CPU, 2 threads, avx2; torch 2; 2026-01-01."
    assert lines[4:] == [
        "| indrnn | float32 | `cpp` | `compile` | 4.00x | 0.50x | 2 |",
        "| indrnn | float32 | `layer:ours` | `layer:theirs` | 3.00x |  | 1 |",
    ]
    other = {"environment": environment | {"cpu": "another"}, "rows": rows[:2]}
    lines = report.summary_markdown([{"environment": environment, "rows": rows}, other]).splitlines()
    assert lines[4] == "| op | dtype | row | beside | a CPU: fwd | a CPU: fwd+bwd | another: fwd | workloads |"
    assert lines[6:] == [
        "| indrnn | float32 | `cpp` | `compile` | 4.00x | 0.50x | 2.00x | 2 |",
        "| indrnn | float32 | `layer:ours` | `layer:theirs` | 3.00x |  |  | 1 |",
    ]


def test_quick_samples_of_an_op_with_few() -> None:
    (sample,) = (s for s in registry.OPS[0].samples if s.name == "plain")
    for samples in ((), (sample,)):
        assert tuple(cli.quick_samples(dataclasses.replace(registry.OPS[0], samples=samples))) == samples
