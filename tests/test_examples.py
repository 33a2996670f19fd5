"""The examples run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_example(name: str, *args: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *args]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_adding_problem(tmp_path: Path) -> None:
    for package in ("typer", "rich", "matplotlib"):
        pytest.importorskip(package)
    args = ["-T", "20", "--steps", "6", "--hidden", "8", "--evaluate-every", "3", "--out", str(tmp_path / "out")]
    printed = run_example("adding_problem.py", "--model", "all", *args)
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [r["model"] for r in written["results"]] == ["indrnn", "irnn", "rnn", "lstm"]
    for result in written["results"]:
        assert [point["step"] for point in result["curve"]] == [3, 6]
        assert result["test_mse"] == result["curve"][-1]["test_mse"] > 0
        assert result["ms_per_step"] > 0
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    for title in ("IndRNN", "IRNN", "RNN (tanh)", "LSTM"):
        assert title in printed
