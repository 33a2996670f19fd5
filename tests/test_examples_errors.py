"""What a user can get wrong in the examples is one line, and of exit code 2: no traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import invoke, load_example

PACKAGES = ("typer", "rich", "matplotlib", "numpy", "scipy", "mlxtend", "sacrebleu")
EXAMPLES = (
    "adding_problem", "captioning", "catch", "char_lm", "ram_mnist", "sequential_mnist", "slot_discovery",
    "slot_set_prediction",
)  # fmt: skip
HARD = ("--attention", "hard")
RESUMABLE = tuple(name for name in EXAMPLES if name not in ("adding_problem", "sequential_mnist"))


def refusal(name: str, *args: str) -> str:
    for package in PACKAGES:
        pytest.importorskip(package)
    return invoke(f"{name}.py", *args, exit_code=2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_refuses(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be a folder" in refusal(name, "--out", str(tmp_path / "file"))
    assert "cannot be a folder" in refusal(name, "--out", str(tmp_path / "file" / "below"))
    out = ("--out", str(tmp_path / "out"))
    assert "nosuch" in refusal(name, *out, "--backend", "nosuch")
    assert "--seed" in refusal(name, *out, "--seed", "-1")
    assert not (tmp_path / "out").exists()
    if name in RESUMABLE:
        assert "there is no checkpoint" in refusal(name, *out, "--resume")


@pytest.mark.parametrize("name", RESUMABLE)
def test_refuses_a_checkpoint_that_is_not_its_own(name: str, tmp_path: Path) -> None:
    args = ("--out", str(tmp_path), "--resume", *(("--model", "fc") if name == "ram_mnist" else ()))
    file = tmp_path / ("fc.pt" if name == "ram_mnist" else "last.pt")
    file.write_bytes(b"")
    assert "cannot be read as a checkpoint" in refusal(name, *args)
    torch.save({"step": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])  # as an interrupted copy leaves it
    assert "cannot be read as a checkpoint" in refusal(name, *args)
    for checkpoint, message in (
        (torch.zeros(1), "not a checkpoint of this example"),
        ({"step": 1}, "has no 'options'"),
        ({"options": {"nosuch": 1}, "step": 1}, "nosuch"),
    ):
        torch.save(checkpoint, file)
        assert message in refusal(name, *args)


def test_refuses_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    """Its options fit, and the parameters of its network do not."""
    options = {
        "games": 2, "steps": 1, "minutes": 1.0, "hidden": 8, "std": 0.1, "lr": 1e-3, "discount": 0.9, "entropy": 0.0,
        "seed": 0, "backend": None,
    }  # fmt: skip
    torch.save({"options": options, "agent": {"nosuch": torch.zeros(1)}, "step": 1}, tmp_path / "last.pt")
    said = refusal("catch", "--out", str(tmp_path), "--resume", "--steps", "2")
    assert "the checkpoint is not one of this example: Error(s) in loading state_dict" in said


@pytest.mark.parametrize(
    ("name", "training", "longer"),
    [
        ("char_lm", ("--hidden", "4", "--steps", "9", "--batch", "4", "--epochs", "1", "--sample", "0"), "--epochs"),
        (
            "captioning",
            ("--features", "8", "--hidden", "8", "--width", "8", "--batch", "4", "--steps", "1", "--test", "2"),
            "--steps",
        ),
    ],
)
def test_refuses_a_broken_best_checkpoint(name: str, training: tuple[str, ...], longer: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    if name == "char_lm":
        (tmp_path / "text").write_text(20 * "an eye for an eye makes the whole world blind\n")
        training += ("--text", str(tmp_path / "text"))
    best, resume = tmp_path / "out" / "best.pt", ("--out", str(tmp_path / "out"), "--resume", longer, "2")
    invoke(f"{name}.py", *training, *resume[:2])
    best.write_bytes(b"")
    assert "best.pt cannot be read as a checkpoint" in refusal(name, *resume)
    torch.save({"network": {}}, best)
    checkpoints = load_example("checkpoints.py")
    with pytest.raises(checkpoints.typer.BadParameter, match="not one of this example: Error"):
        checkpoints.restore(torch.nn.Linear(1, 1), best)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adding_problem", ("-T", "20", "--steps", "1", "--backend", "cuda"), "cannot run this call"),
        ("char_lm", ("--text", "nosuch.txt"), "nosuch.txt"),
        (
            "char_lm",
            ("--model", "indrnn", "--hidden", "8", "--batch", "2", "--steps", "5", "--lr", "1e30"),
            "diverged at step",
        ),
        ("ram_mnist", ("--core", "nosuch"), "--core"),
        ("catch", ("--std", "0"), "--std"),
        ("catch", ("--games", "2", "--hidden", "8", "--lr", "1e30"), "diverged at step"),
        ("captioning", ("--features", "8", "--hidden", "8", "--width", "8", *HARD, "--lr", "1e30"), "diverged at step"),
        ("slot_discovery", ("--device", "nosuch"), "nosuch"),
        ("slot_discovery", ("--device", "cuda:99"), "cuda:99"),
        ("slot_discovery", ("--batch", "2", "--dim", "8", "--channels", "4", "--lr", "1e30"), "diverged at step"),
    ],
)
def test_refuses_what_one_example_has(name: str, args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refusal(name, *args, "--out", str(tmp_path / "out"))


def test_json_has_no_nan(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    value: dict[str, Any] = {"a": math.nan, "b": [1.5, math.inf, (2, "c", None)], "d": True}
    load_example("commands.py").write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, None, [2, "c", None]], "d": True}
