"""The captions from pictures, run as a user runs it, and its parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import invoke, load_example, run_example

CAPTIONING_PACKAGES = ("typer", "rich", "matplotlib", "numpy", "sacrebleu")


@pytest.mark.slow
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
        invoke("captioning.py", "--resume", "--steps", "6", *measured)
        resumed = json.loads((out / "result.json").read_text())
        assert resumed["curve"][:2] == written["curve"] and resumed["curve"][2]["step"] == 6


def test_captioning_scenes() -> None:
    for package in CAPTIONING_PACKAGES:
        pytest.importorskip(package)
    example = load_example("captioning_scenes.py")
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
    example, model, drawn = (load_example(f"captioning{part}.py") for part in ("", "_model", "_scenes"))
    options = model.Options("soft", 8, 8, 8, 4, 4, 1.0, 1e-3, 1.0, 0.0, 2, 0, None)
    torch.manual_seed(0)
    network = model.Captioner(options).eval()
    with torch.no_grad():
        network.readout.weight *= 8  # sure of its words, and never of where to end at once
    scenes = drawn.draw_scenes((0, 2), 6, False)
    image = drawn.images(scenes)
    (greedy,) = ([c.words for c in model.beam_search(network, image, 1)],)

    def follow(caption: list[int]) -> tuple[Any, list[int]]:
        """The mean log-likelihood of a caption's words, and at each the likeliest, by teacher forcing."""
        words = torch.tensor([[drawn.INDEX[drawn.START], *caption]])
        with torch.no_grad():
            logits, _, _ = network(image[row : row + 1], words[:, :-1], None)
        logits[..., [drawn.INDEX[drawn.PAD], drawn.INDEX[drawn.START]]] = -math.inf
        found = logits.log_softmax(2)[0]
        return found.gather(1, words[0, 1:, None]).mean(), found.argmax(1).tolist()

    wide = model.beam_search(network, image, 4)
    for row in range(len(scenes)):
        assert follow(greedy[row])[1] == greedy[row]
        assert follow(wide[row].words)[0] >= follow(greedy[row])[0] - 1e-5
        assert wide[row].weights.shape == (len(wide[row].words), model.GRID**2)
        torch.testing.assert_close(wide[row].weights.sum(1), torch.ones(len(wide[row].words)))

    caption = [model.Caption(drawn.encode([scene.captions[-1]])[0, 1:].tolist(), None) for scene in scenes]
    perfect = example.measure(caption, scenes)
    assert perfect == {**{f"bleu_{n}": pytest.approx(1.0) for n in range(1, 5)}, "right": 1.0}
    caption[0] = model.Caption(drawn.encode(["a a a a a a"])[0, 1:].tolist(), None)
    assert example.measure(caption, scenes)["bleu_4"] < perfect["bleu_4"]
