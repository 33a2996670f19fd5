"""The character language model, run as a user runs it, and its parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_examples import invoke, load_example, run_example

import recattn_kernels

CHAR_LM_PACKAGES = ("typer", "rich", "matplotlib")
RHYME = "row, row, row your boat, gently down the stream. merrily, merrily, merrily, merrily, life is but a dream.\n"


@pytest.mark.slow
def test_char_lm(tmp_path: Path) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    (tmp_path / "rhyme").write_text(20 * RHYME)
    out = tmp_path / "out"
    args = ["--text", str(tmp_path / "rhyme"), "--hidden", "8", "--layers", "2", "--steps", "50", "--batch", "8"]
    training = ["--model", "indrnn", "--epochs", "2", "--sample", "9", *args]
    printed = run_example("char_lm.py", *training, "--out", str(out))
    written = json.loads((out / "curve.json").read_text())
    assert [(point["epoch"], point["step"]) for point in written["curve"]] == [(1.0, 5), (2.0, 10)]
    assert written["test_bits"] > 0 and written["characters_per_second"] > 0 and not written["diverged"]
    assert 0 < written["baselines"]["bigram"] < written["baselines"]["unigram"] < 5
    assert written["sample"].startswith("row,") and len(written["sample"]) == 4 + 9
    assert written["sample"] in printed and "IndRNN, 2 x 8" in printed
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    invoke("char_lm.py", "--resume", "--epochs", "3", "--sample", "0", "--out", str(out))
    resumed = json.loads((out / "curve.json").read_text())
    assert resumed["curve"][:2] == written["curve"] and resumed["curve"][2]["step"] == 15
    assert "hidden" in invoke("char_lm.py", "--resume", "--hidden", "16", "--out", str(out), exit_code=2)


def test_char_lm_spells() -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    assert run_example("char_lm.py", "--toy", "--torch").split()[-1] == "hello"


def char_lm_options(example: ModuleType, text: Path, **changes: Any) -> Any:
    options = {
        "model": "gru", "text": str(text), "torch": True, "hidden": 8, "layers": 2, "steps": 50, "batch": 8,
        "epochs": 2, "minutes": float("inf"), "lr": 1e-2, "clip": 1.0, "dropout": 0.5, "zoneout": 0.0,
        "layer_norm": False, "evaluate_every": 3, "seed": 0, "backend": None,
    }  # fmt: skip
    return example.Options(**{**options, **changes})


@pytest.mark.parametrize("model", ["indrnn", "gru", "lstm"])
def test_char_lm_resumes_exactly(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    from rich.console import Console

    example = load_example("char_lm.py")
    (tmp_path / "rhyme").write_text(20 * RHYME)
    text = load_example("char_lm_text.py").read_text(str(tmp_path / "rhyme"))
    console = Console(quiet=True)
    options = char_lm_options(example, tmp_path / "rhyme", model=model)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    example.train(options, text, None, whole, console)

    class Interrupted(Exception):
        pass

    save = example.save

    def interrupt(checkpoint: dict[str, Any], path: Path) -> None:
        save(checkpoint, path)
        if checkpoint["step"] == 6 and path.name == "last.pt":  # in the middle of an epoch of 5 steps
            raise Interrupted

    monkeypatch.setattr(example, "save", interrupt)
    with pytest.raises(Interrupted):
        example.train(options, text, None, broken, console)
    monkeypatch.undo()
    checkpoint = torch.load(broken / "last.pt", weights_only=True)
    assert example.Options(**checkpoint["options"]) == options and checkpoint["vocabulary"] == text.vocabulary
    example.train(options, text, checkpoint, broken, console)

    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, broken))
    for checkpoint in first, second:
        for point in checkpoint["curve"]:
            del point["minutes"]
    assert [point["step"] for point in second["curve"]] == [3, 6, 9, 10]
    for key in ("step", "curve"):
        assert first[key] == second[key]
    for key in ("network", "optimizer", "random_state", "state"):
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def test_char_lm_limits_the_time_of_a_run(tmp_path: Path) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(load_example("char_lm.py").main)
    (tmp_path / "rhyme").write_text(20 * RHYME)
    resume = ["--resume", "--sample", "0", "--out", str(tmp_path / "out")]
    sizes = ["--hidden", "8", "--batch", "8", "--epochs", "100000", "--evaluate-every", "1000000"]
    taken = [0]
    for args in ["--text", str(tmp_path / "rhyme"), *sizes, *resume[1:]], resume:
        result = CliRunner().invoke(app, [*args, "--minutes", "0.01"])
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "out" / "curve.json").read_text())
        assert written["steps"] > taken[-1] and written["minutes"] >= 0.01 * len(taken)
        taken.append(written["steps"])
    result = CliRunner().invoke(app, [*resume, "--epochs", "1"])
    assert result.exit_code == 2 and "have been taken" in result.output


def test_char_lm_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    reading, example = load_example("char_lm_text.py"), load_example("char_lm_model.py")
    # "aab": of 3 + 2 counts a has 3; of the pairs (a, .) 2 + 2, each has 2; of (b, .) each has 1 of 2.
    train, ids = torch.tensor([0, 0, 1]), torch.tensor([[0], [1], [0]])
    baselines = reading.count_baselines(train, ids, 2)
    assert baselines["unigram"] == pytest.approx(-(math.log2(2 / 5) + math.log2(3 / 5)) / 2)
    assert baselines["bigram"] == pytest.approx(1.0)

    (tmp_path / "rhyme").write_text(20 * RHYME)
    text = reading.read_text(str(tmp_path / "rhyme"))
    assert torch.cat((text.train, text.validation, text.test)).equal(reading.encode(20 * RHYME, text.vocabulary))
    columns = reading.streams(text.validation, 3)
    assert columns.t().flatten().equal(text.validation[: columns.numel()])
    # In pieces, with the state carried over, as in one.
    torch.manual_seed(0)
    options = char_lm_options(example, tmp_path / "rhyme", dropout=0.0)
    network = example.CharacterModel(options, len(text.vocabulary), 100)
    expected = example.loss_in_bits(network(columns[:-1])[0], columns[1:]).item()
    monkeypatch.setattr(example, "EVALUATION_STEPS", 7)
    assert example.bits_per_character(network, columns) == pytest.approx(expected, rel=1e-5)
    assert example.sample(network, text.vocabulary, "row", 5, 0.0, 0) == example.sample(
        network, text.vocabulary, "row", 5, 0.0, 1
    )


def test_char_lm_options_of_the_layers(tmp_path: Path) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    example = load_example("char_lm_model.py")
    for model, name in example.GATED.items():
        if not hasattr(recattn_kernels, name):
            pytest.skip(f"recattn_kernels has no {name}")
        options = char_lm_options(
            example, tmp_path, model=model, torch=False, zoneout=0.1, layer_norm=True, backend="reference"
        )
        network = example.CharacterModel(options, 4, 100)
        assert isinstance(network.rnn, getattr(recattn_kernels, name))
        logits, _ = network(torch.tensor([[0], [3]]))
        assert logits.shape == (2, 1, 4) and logits.isfinite().all()
