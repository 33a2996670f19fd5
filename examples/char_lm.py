"""A character language model: a recurrent network reads a text and predicts each next character.

It is trained by truncated back-propagation: the text is cut into parallel streams, which are read in chunks of 100
steps, and a chunk starts from the states that the last one ended in, without gradient. Of the text, the first 90 % are
trained on, 5 % choose the best moment of the training, and on the last 5 % the result is measured, in bits a character:
what an ideal compressor would need. Beside it stand a unigram and a bigram model, which count the training text.
The text is pydoc_data.topics of the standard library, 465 kB about Python in English, or any file. There unigrams need
4.60 bits and bigrams 3.27; a network is at about 2 after a minute on one core, and spells most words.

    python examples/char_lm.py                         GRU, one layer of 512
    python examples/char_lm.py --model indrnn          IndRNN of 6 layers; indrnn-21: of 21 residual layers; lstm; rnn
    python examples/char_lm.py --text FILE --torch     on another text; torch.nn's layers, to compare the speed
    python examples/char_lm.py --resume --epochs 20    goes on where the last run, or its last checkpoint, ended
    python examples/char_lm.py --quick                 GRU of 256, for a minute
    python examples/char_lm.py --toy                   learns to spell "hello", in seconds

It needs typer, rich and matplotlib: pip install "recattn_kernels[examples]".

IndRNN is that of the language models of Li et al. (2018, section 5.3; arXiv:1910.06251): ReLU with BatchNorm before
it, |u| <= 2^(1/T). T is here the length of a stream, as states are carried to its end: with the 100 steps of a chunk a
unit could grow by 2^83 on the way. And u starts in U(0, 1/2): in the paper's U(0, 1) are units that add up a whole
stream, and they drown the others; after two epochs six layers did no better than the unigram model. Gradients are
clipped to norm 1, and the rate of Adam falls to 0 along a cosine, from more than the paper's 2e-4, as there are far
fewer steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from char_lm_model import (
    GATED,
    CharacterModel,
    Options,
    State,
    bits_per_character,
    detach,
    evaluate,
    loss_in_bits,
    sample,
)
from char_lm_text import Text, count_baselines, encode, read_text, streams
from checkpoints import check_left, check_resumed, load, options_of, restore, restoring, save
from commands import command, diverged, known_backend, make_folder, write_json
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

EVALUATION_STREAMS = 10


class Model(str, Enum):
    indrnn = "indrnn"
    indrnn_21 = "indrnn-21"
    lstm = "lstm"
    gru = "gru"
    rnn = "rnn"


@dataclass(frozen=True)
class Recipe:
    title: str
    layers: int
    lr: float


RECIPES = {
    "indrnn": Recipe("IndRNN", 6, 2e-3),
    "indrnn-21": Recipe("Residual IndRNN", 21, 1e-3),
    "lstm": Recipe("LSTM", 1, 5e-3),
    "gru": Recipe("GRU", 1, 5e-3),
    "rnn": Recipe("RNN (tanh)", 1, 2e-3),
}


def train(
    options: Options, text: Text, checkpoint: dict[str, Any] | None, out: Path, console: Console
) -> tuple[CharacterModel, dict[str, Any]]:
    """Trains one network, or goes on from checkpoint. Leaves last.pt and best.pt in the folder out."""
    torch.manual_seed(options.seed)
    data = streams(text.train, options.batch)
    validation = streams(text.validation, EVALUATION_STREAMS)
    settling = streams(text.train, EVALUATION_STREAMS)
    per_epoch = math.ceil((len(data) - 1) / options.steps)
    total = options.epochs * per_epoch
    evaluate_every = options.evaluate_every or per_epoch

    network = CharacterModel(options, len(text.vocabulary), len(data))
    optimizer = torch.optim.Adam(network.parameters(), options.lr)
    state: State = None
    step, seconds, earlier = 0, 0.0, 0.0  # seconds of training steps; those of everything in earlier runs
    curve: list[dict[str, float]] = []
    if checkpoint is not None:
        with restoring():
            network.load_state_dict(checkpoint["network"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            state, curve = checkpoint["state"], checkpoint["curve"]
            step, seconds, earlier = checkpoint["step"], checkpoint["seconds"], checkpoint["elapsed"]
            torch.set_rng_state(checkpoint["random_state"])
        check_left(step, total, "--epochs")
        load(out / "best.pt")  # what is wrong with it is better said now than at the end
    started = time.perf_counter()
    losses: list[float] = []
    finite = True

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.3f} bits/character"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(RECIPES[options.model].title, total=total, completed=step, bits=math.nan)
        while finite:
            # Of the steps or of this run's time, whichever ends first: so that the rate comes down to 0 in either.
            done = max(step / total, (time.perf_counter() - started) / (60 * options.minutes))
            if losses and (done >= 1 or step % evaluate_every == 0):
                bits = evaluate(network, settling, validation)
                elapsed = earlier + time.perf_counter() - started
                point = {
                    "epoch": step / per_epoch, "step": step, "minutes": elapsed / 60,
                    "train_bits": sum(losses) / len(losses), "validation_bits": bits,
                }  # fmt: skip
                losses.clear()
                curve.append(point)
                checkpoint = {
                    "options": asdict(options), "vocabulary": text.vocabulary, "digest": text.digest, "step": step,
                    "network": network.state_dict(), "optimizer": optimizer.state_dict(), "state": state,
                    "random_state": torch.get_rng_state(), "curve": curve, "seconds": seconds, "elapsed": elapsed,
                }  # fmt: skip
                if bits <= min(p["validation_bits"] for p in curve):
                    save(checkpoint, out / "best.pt")
                save(checkpoint, out / "last.pt")  # after the best, which it is resumed with
                progress.console.print(
                    f"epoch {point['epoch']:6.2f}  {point['minutes']:6.2f} minutes"
                    f"  training {point['train_bits']:.3f}  validation {bits:.3f} bits/character"
                )
            if done >= 1:
                break
            begin = time.perf_counter()
            i = step % per_epoch * options.steps
            chunk = data[i : i + options.steps + 1]
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (1 + math.cos(math.pi * done)) / 2
            logits, state = network(chunk[:-1], detach(state) if i > 0 else None)
            loss = loss_in_bits(logits, chunk[1:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), options.clip)
            optimizer.step()
            network.after_step()
            losses.append(loss.item())
            finite = math.isfinite(losses[-1])
            step += 1
            seconds += time.perf_counter() - begin
            progress.update(task, advance=1, bits=losses[-1])
        progress.update(task, total=step)
    if not curve:
        raise diverged(step)
    restore(network, out / "best.pt")
    epochs, rest = divmod(step, per_epoch)
    characters = (epochs * (len(data) - 1) + rest * options.steps) * options.batch
    return network, {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": step,
        "diverged": not finite,
        "minutes": (earlier + time.perf_counter() - started) / 60,
        "characters_per_second": characters / seconds,
        "curve": curve,
    }


def plot(result: dict[str, Any], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    epochs = [point["epoch"] for point in result["curve"]]
    for key in ("train_bits", "validation_bits"):
        axes.plot(epochs, [point[key] for point in result["curve"]], marker=".", label=key.removesuffix("_bits"))
    axes.plot(epochs[-1:], [result["test_bits"]], "k*", label="test, at the best validation")
    for (name, bits), style in zip(result["baselines"].items(), (":", "--"), strict=True):
        axes.axhline(bits, color="gray", linestyle=style, label=f"{name}, test")
    axes.set(title=title, xlabel="epoch", ylabel="bits a character")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(result: dict[str, Any], title: str, console: Console) -> None:
    table = Table(title="Test, bits a character")
    for column in ("model", "bits", "parameters", "minutes", "characters/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, bits in result["baselines"].items():
        table.add_row(name, f"{bits:.3f}")
    table.add_row(
        title, f"{result['test_bits']:.3f}", f"{result['parameters']:,}", f"{result['minutes']:.1f}",
        f"{result['characters_per_second']:,.0f}",
    )  # fmt: skip
    console.print(table)


def toy(options: Options, console: Console) -> None:
    """The four steps of "hello": h is followed by e, e by l, but l by l or o, which takes a memory to tell apart."""
    torch.manual_seed(options.seed)
    word, vocabulary = "hello", "ehlo"
    ids = encode(word, vocabulary).unsqueeze(1)
    network = CharacterModel(replace(options, hidden=16), len(vocabulary), len(ids))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(101):
        if step % 20 == 0:
            bits = evaluate(network, ids, ids)
            spelled = sample(network, vocabulary, word[0], len(word) - 1, 0.0, options.seed)
            network.train()
            console.print(f"step {step:4}  {bits:.3f} bits/character  {spelled}")
        loss = loss_in_bits(network(ids[:-1])[0], ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.after_step()


@command
def main(
    context: typer.Context,
    model: Annotated[Model | None, typer.Option(help="Which to train; gru by default, rnn under --toy.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file; by default pydoc_data.topics.")] = None,
    use_torch: Annotated[bool, typer.Option("--torch", help="torch.nn's layers, not recattn_kernels'.")] = False,
    hidden: Annotated[int | None, typer.Option(min=1, help="512 by default.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="6 or 21 of IndRNN, 1 of others by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of a chunk, through which gradients flow.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Parallel streams.")] = 50,
    epochs: Annotated[int | None, typer.Option(min=1, help="10 by default.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Ends this run, if epochs do not.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's, at the start; by default what suits the model.")] = None,
    clip: Annotated[float, typer.Option(help="The largest norm of all gradients together.")] = 1.0,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Between layers.")] = 0.0,
    zoneout: Annotated[float, typer.Option(min=0, max=1, help="Not in IndRNN nor in torch.nn.")] = 0.0,
    layer_norm: Annotated[bool, typer.Option("--layer-norm", help="Not in IndRNN nor in torch.nn.")] = False,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps; by default an epoch.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, dropout and sampling.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Of recattn_kernels: auto, reference, cpp, ...", callback=known_backend)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and the learning curve.")] = Path("char-lm-results"),
    resume: Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoint in --out.")] = False,
    characters: Annotated[int, typer.Option("--sample", min=0, help="Characters to sample at the end.")] = 500,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest character.")] = 0.7,
    prime: Annotated[str | None, typer.Option(help="What the sample goes on from; the text's start.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A GRU of 256, for a minute.")] = False,
    spell: Annotated[bool, typer.Option("--toy", help='Learns to spell "hello".')] = False,
) -> None:
    """Trains a recurrent network on the characters of a text, measures it, and lets it write."""
    console = Console(highlight=False)
    name = model.value if model is not None else "rnn" if spell else "gru"
    if (use_torch or name not in GATED) and (zoneout > 0 or layer_norm):
        raise typer.BadParameter(f"{'torch.nn' if use_torch else name} knows no --zoneout and no --layer-norm")
    if use_torch and (name not in GATED or backend is not None):
        raise typer.BadParameter("--torch has no IndRNN and takes no --backend")
    options = Options(
        model=name, text=None if text is None else str(text), torch=use_torch,
        hidden=hidden or (256 if quick else 512), layers=layers or (1 if spell else RECIPES[name].layers),
        steps=steps, batch=batch, epochs=epochs or 10, minutes=minutes or (1.0 if quick else math.inf),
        lr=RECIPES[name].lr if lr is None else lr, clip=clip, dropout=dropout, zoneout=zoneout, layer_norm=layer_norm,
        evaluate_every=evaluate_every or (25 if quick else None), seed=seed, backend=backend,
    )  # fmt: skip
    if spell:
        toy(options, console)
        return

    checkpoint = None
    if resume:
        check_resumed(context, {"epochs", "minutes", "characters", "temperature", "prime"})
        checkpoint = load(out / "last.pt")
        options = options_of(checkpoint, Options)
        options = replace(options, epochs=epochs or options.epochs, minutes=minutes or math.inf)
    data = read_text(options.text)
    if checkpoint is not None and checkpoint.get("digest") != data.digest:
        raise typer.BadParameter("--resume: the text is not the one that the checkpoint was trained on")
    prime = prime or "".join(data.vocabulary[i] for i in data.train[:4])
    if not set(prime) <= set(data.vocabulary):
        raise typer.BadParameter(f"--prime: the text has no {sorted(set(prime) - set(data.vocabulary))}")

    make_folder(out)
    network, result = train(options, data, checkpoint, out, console)
    test = streams(data.test, EVALUATION_STREAMS)
    network.eval()
    result["test_bits"] = bits_per_character(network, test)
    result["baselines"] = count_baselines(data.train, test, len(data.vocabulary))
    result["sample"] = sample(network, data.vocabulary, prime, characters, temperature, options.seed)

    title = f"{RECIPES[options.model].title}, {options.layers} x {options.hidden}{', torch.nn' * options.torch}"
    write_json(out / "curve.json", {"options": asdict(options), **result})
    plot(result, title, out / "curve.png")
    console.print(result["sample"], markup=False, soft_wrap=True)
    report(result, title, console)
    console.print(f"Checkpoints: {out / 'best.pt'}, {out / 'last.pt'}", soft_wrap=True)
    console.print(f"Learning curve: {out / 'curve.png'}, {out / 'curve.json'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
