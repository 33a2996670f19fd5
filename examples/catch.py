"""Catch: an agent that sees little at a time learns to catch a ball (Mnih et al., NIPS 2014, section 4.2).

On a screen of 24x24 black and white pixels a ball of one pixel falls, and bounces off the sides; a paddle of two pixels
at the bottom moves left, right or stays. The reward is 1 at the end if the ball is caught, else 0, and nothing before.
The agent sees a retina of 6x6 cells at three scales: the whole screen in blocks of 4x4, and single pixels only where it
looks. After every glimpse an LSTM of 256 decides how to move, and where to look next: nobody tells it what a ball is,
or that following it pays. A paddle that does not move catches one ball in twelve, the agent four of five after 2,000
steps of training, and nine of ten after 2,500: that is five minutes on a core of its own.

    python examples/catch.py                      trains for 3,500 steps, measures, and draws a game
    python examples/catch.py --resume --steps N   goes on where the last run, or its last checkpoint, ended
    python examples/catch.py --quick              the first few minutes of it

It needs typer, rich and matplotlib: pip install "recattn_kernels[examples]".

Both policies are trained by REINFORCE through time, against a baseline that is learned from the same LSTM; advantages
are those of Schulman et al. (arXiv:1506.02438), lambda 0.95, which is REINFORCE for 1. Gradients of the moves and of
the baseline go through the LSTM and the glimpse network, those of the locations only into the network that proposes
them: they are seven times as large, and noise at first. Not in the paper is the help at the start: a ball counts as
caught some pixels beside the paddle, and one pixel less whenever CAUGHT of them are; the paddle starts anywhere. What
is measured, and drawn, is the game itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from checkpoints import check_left, check_resumed, load, options_of, restoring, save
from commands import command, diverged, known_backend, make_folder, write_json
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from recattn_kernels import GlimpseNetwork, GlimpseSensor, LSTMCell

SIDE, PADDLE = 24, 2
MOVES = 3  # left, stay, right
CELLS, SCALES = 6, 3
CONTRAST = 8
CAUGHT, REACH = 0.8, 5
TEST_GAMES, TEST_SEED = 2000, 1


@dataclass(frozen=True)
class Options:
    """What a training depends on: a checkpoint holds it."""

    games: int
    steps: int
    minutes: float
    hidden: int
    std: float
    lr: float
    discount: float
    entropy: float
    seed: int
    backend: str | None


class Catch:
    """Games side by side, all at the same step: the ball is in row t, and they end when it is in the last."""

    def __init__(self, games: int, generator: torch.Generator) -> None:
        self.rows = torch.arange(games)
        self.t = 0
        self.start = SIDE * torch.rand(games, generator=generator)
        self.speed = 2 * torch.rand(games, generator=generator) - 1  # pixels a step
        self.paddle = torch.randint(SIDE - PADDLE + 1, (games,), generator=generator)  # its left pixel

    @property
    def over(self) -> bool:
        return self.t == SIDE - 1

    @property
    def ball(self) -> Tensor:
        """Its column (games,), reflected off the sides."""
        x = (self.start + self.t * self.speed).remainder(2 * SIDE)
        return torch.minimum(x, 2 * SIDE - x).long().clamp(max=SIDE - 1)

    def screen(self) -> Tensor:
        """(games, 1, 24, 24) uint8."""
        screen = torch.zeros(len(self.rows), 1, SIDE, SIDE, dtype=torch.uint8)
        screen[self.rows, 0, self.t, self.ball] = 1
        for i in range(PADDLE):
            screen[self.rows, 0, SIDE - 1, self.paddle + i] = 1
        return screen

    def move(self, move: Tensor) -> None:
        """move (games,): 0 left, 1 stay, 2 right."""
        self.paddle = (self.paddle + move - 1).clamp(0, SIDE - PADDLE)
        self.t += 1

    def caught(self, reach: int = 0) -> Tensor:
        """(games,) bool, at the end."""
        distance = self.ball - self.paddle
        return (distance >= -reach) & (distance < PADDLE + reach)


class Decision(NamedTuple):
    """Of every game at one step: what was decided, and what was expected."""

    location: Tensor
    location_log_prob: Tensor
    before: Tensor  # the baseline when the location was chosen
    move_log_prob: Tensor
    after: Tensor  # the baseline when the move was
    entropy: Tensor


class Agent(nn.Module):
    """Sensor, glimpse network and LSTM, and on its state: the next location, a move, a baseline."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.hidden, self.std = options.hidden, options.std
        self.sensor = GlimpseSensor(CELLS, SCALES, backend=options.backend)
        self.glimpse_network = GlimpseNetwork(1, CELLS, SCALES, options.hidden)
        self.core = LSTMCell(options.hidden, options.hidden, backend=options.backend)
        self.locator = nn.Linear(options.hidden, 2)
        self.mover = nn.Linear(options.hidden, MOVES)
        self.baseline = nn.Linear(options.hidden, 1)
        nn.init.normal_(self.locator.weight, std=0.01)  # it starts by looking around the middle
        nn.init.zeros_(self.locator.bias)
        # From a cell's mean to the count of its pixels, times CONTRAST: of hundred inputs three are not 0, and at the
        # coarsest scale they are 1/16.
        self.register_buffer("gain", CONTRAST * 4.0 ** torch.arange(SCALES).view(-1, 1, 1, 1), persistent=False)

    def play(self, game: Catch, generator: torch.Generator | None = None) -> list[Decision]:
        """Plays to the end. Without a generator nothing is drawn: the mean location, the likeliest move."""
        h = c = torch.zeros(len(game.rows), self.hidden)
        decisions = []
        while not game.over:
            mean, before = self.locator(h.detach()), self.baseline(h).squeeze(1)
            location = mean.detach()
            if generator is not None:
                location = location + self.std * torch.randn(location.shape, generator=generator)
            location_log_prob = -((location - mean) / self.std).square().sum(1) / 2  # but for a constant
            seen = self.sensor(game.screen(), location) * self.gain
            h, c = self.core(self.glimpse_network(seen, location), (h, c))
            log_p = self.mover(h).log_softmax(1)
            if generator is None:
                move = log_p.argmax(1)
            else:
                # Of what diverged any move is drawn: its loss tells.
                move = torch.multinomial(log_p.detach().nan_to_num().exp(), 1, generator=generator).squeeze(1)
            decisions.append(
                Decision(
                    location, location_log_prob, before, log_p[game.rows, move], self.baseline(h).squeeze(1),
                    -(log_p.exp() * log_p).sum(1),
                )
            )  # fmt: skip
            game.move(move)
        return decisions


def policy_loss(decisions: list[Decision], reward: Tensor, options: Options, entropy: float) -> Tensor:
    """A location and a move are decided in turn, each against the baseline of the state that it was decided in."""
    log_probs = torch.stack([part for d in decisions for part in (d.location_log_prob, d.move_log_prob)])
    baselines = torch.stack([part for d in decisions for part in (d.before, d.after)])  # (2T, games)
    expected = torch.cat((baselines.detach(), reward.unsqueeze(0)))
    surprise = expected[1:] - expected[:-1]
    advantages = torch.empty_like(surprise)
    advantage = torch.zeros_like(reward)
    for i in reversed(range(len(surprise))):
        advantage = surprise[i] + options.discount * advantage
        advantages[i] = advantage
    loss = -(log_probs * advantages) + (baselines - (expected[:-1] + advantages)).square() / 2
    return loss.sum(0).mean() - entropy * torch.stack([d.entropy for d in decisions]).sum(0).mean()


@torch.no_grad()
def catch_rate(agent: Agent) -> float:
    game = Catch(TEST_GAMES, torch.Generator().manual_seed(TEST_SEED))
    agent.play(game)
    return game.caught().float().mean().item()


def train(
    options: Options, evaluate_every: int, checkpoint: dict[str, Any] | None, path: Path, console: Console
) -> tuple[Agent, dict[str, Any]]:
    """Trains the agent, from checkpoint if there is one, and saves one to path after every evaluation."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    agent = Agent(options)
    optimizer = torch.optim.Adam(agent.parameters(), options.lr)
    curve: list[dict[str, float]] = []
    step, reach, recent, earlier = 0, REACH, 0.0, 0.0
    if checkpoint is not None:
        with restoring():
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            generator.set_state(checkpoint["random_state"])
            curve, step, reach = checkpoint["curve"], checkpoint["step"], checkpoint["reach"]
            recent, earlier = checkpoint["recent"], checkpoint["elapsed"]
        check_left(step, options.steps, "--steps")
    started = time.perf_counter()
    rewards: list[float] = []

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("caught {task.fields[caught]:.2f}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Catch", total=options.steps, completed=step, caught=math.nan)
        while True:
            # Of the steps or of this run's time, whichever ends first: so that the rate comes down to 0 in either.
            done = max(step / options.steps, (time.perf_counter() - started) / (60 * options.minutes))
            if rewards and (done >= 1 or step % evaluate_every == 0):
                elapsed = earlier + time.perf_counter() - started
                point = {
                    "step": step, "minutes": elapsed / 60, "reach": reach, "trained": sum(rewards) / len(rewards),
                    "caught": catch_rate(agent),
                }  # fmt: skip
                rewards.clear()
                curve.append(point)
                save(
                    {
                        "options": asdict(options), "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
                        "random_state": generator.get_state(), "curve": curve, "step": step, "reach": reach,
                        "recent": recent, "elapsed": elapsed,
                    },
                    path,
                )  # fmt: skip
                progress.console.print(
                    f"step {step:6}  {point['minutes']:6.1f} minutes  caught {100 * point['caught']:5.1f} %"
                    f"  in training, {reach} pixels beside: {100 * point['trained']:5.1f} %"
                )
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (1 - done)
            game = Catch(options.games, generator)
            decisions = agent.play(game, generator)
            reward = game.caught(reach).float()
            loss = policy_loss(decisions, reward, options, options.entropy * (1 - done))
            optimizer.zero_grad()
            loss.backward()
            if not nn.utils.clip_grad_norm_(agent.parameters(), 1.0).isfinite():
                raise diverged(step)
            optimizer.step()
            step += 1
            rewards.append(reward.mean().item())
            recent += 0.05 * (rewards[-1] - recent)
            if recent > CAUGHT and reach > 0:
                reach, recent = reach - 1, 0.0
            progress.update(bar, advance=1, caught=rewards[-1])
        progress.update(bar, total=step)
    return agent, {
        "parameters": sum(p.numel() for p in agent.parameters()),
        "steps": step,
        "games": step * options.games,
        "minutes": (earlier + time.perf_counter() - started) / 60,
        "caught": curve[-1]["caught"],
        "curve": curve,
    }


# Pictures


def draw(axes: Axes, screen: Tensor, location: Tensor) -> None:
    axes.clear()
    axes.imshow(screen[0], cmap="gray", vmin=0, vmax=1)
    x, y = ((location + 1) / 2 * SIDE - 0.5).tolist()  # in imshow's coordinates
    for s, color in zip(range(SCALES), ("red", "orange", "yellow"), strict=True):
        side = CELLS * 2**s
        axes.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=color))
    axes.set(xticks=[], yticks=[], xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))


@torch.no_grad()
def film(agent: Agent, games: int, out: Path) -> None:
    """Some games as an animation, and the first as a strip: the screen, and the three windows of the retina."""

    class Recorded(Catch):
        def screen(self) -> Tensor:
            frames.append(super().screen())
            return frames[-1]

    frames: list[Tensor] = []
    game = Recorded(games, torch.Generator().manual_seed(TEST_SEED))
    locations = [decision.location for decision in agent.play(game)]
    game.screen()
    locations.append(locations[-1])

    figure = Figure(figsize=(2.2 * games, 2.2))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, wspace=0.04)
    panels = figure.subplots(1, games, squeeze=False)[0]
    writer = PillowWriter(fps=6)
    with writer.saving(figure, str(out / "catch.gif"), 80):
        for screens, where in zip(frames, locations, strict=True):
            for i, axes in enumerate(panels):
                draw(axes, screens[i], where[i])
            writer.grab_frame()
    strip = Figure(figsize=(12, 1.7), layout="constrained")
    every = range(2, SIDE, 3)
    for t, axes in zip(every, strip.subplots(1, len(every)), strict=True):
        draw(axes, frames[t][0], locations[t][0])
    strip.savefig(out / "strip.png", dpi=100)


def plot(curve: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [point["step"] for point in curve]
    axes.plot(steps, [100 * point["caught"] for point in curve], marker=".", label="the game, nothing drawn")
    axes.plot(steps, [100 * point["trained"] for point in curve], linestyle=":", label="in training, with help")
    axes.set(title="Catch", xlabel="step", ylabel="caught, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main(
    context: typer.Context,
    games: Annotated[int, typer.Option(min=1, help="Played side by side, for one step of Adam.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="3500 by default.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Ends this run, if steps do not.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Of the LSTM and of a glimpse's vector.")] = 256,
    std: Annotated[float, typer.Option(min=1e-6, help="Of the locations, in units of half the screen.")] = 0.15,
    lr: Annotated[float, typer.Option(help="Adam's, at the start.")] = 1e-3,
    discount: Annotated[float, typer.Option("--lambda", min=0, max=1, help="1: plain REINFORCE.")] = 0.95,
    entropy: Annotated[float, typer.Option(help="What a move's entropy is worth, at the start.")] = 0.01,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, games and decisions.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Of the glimpses and the LSTM: auto, reference, cpp.", callback=known_backend)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, the curve and films.")] = Path("catch-results"),
    resume: Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoint in --out.")] = False,
    film_games: Annotated[int, typer.Option("--film", min=1, help="Games in the animation.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="For five minutes.")] = False,
) -> None:
    """Trains an agent to catch a ball by glimpses, measures it, and films it."""
    console = Console(highlight=False)
    options = Options(
        games=games, steps=steps or 3500, minutes=minutes or (5.0 if quick else math.inf), hidden=hidden, std=std,
        lr=lr, discount=discount, entropy=entropy, seed=seed, backend=backend,
    )  # fmt: skip
    checkpoint = None
    if resume:
        check_resumed(context, {"steps", "minutes", "evaluate_every", "film_games"})
        checkpoint = load(out / "last.pt")
        options = options_of(checkpoint, Options)
        options = replace(options, steps=steps or options.steps, minutes=minutes or math.inf)
    make_folder(out)
    agent, result = train(options, evaluate_every, checkpoint, out / "last.pt", console)
    film(agent, film_games, out)
    plot(result["curve"], out / "curve.png")
    write_json(out / "curve.json", {"options": asdict(options), **result})
    console.print(
        f"{100 * result['caught']:.1f} % of {TEST_GAMES} games caught after {result['games']:,} games in"
        f" {result['minutes']:.1f} minutes; a paddle that stays: {100 * PADDLE / SIDE:.1f} %"
    )
    console.print(f"Films: {out / 'catch.gif'}, {out / 'strip.png'}; curve: {out / 'curve.png'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
