"""What the examples that can be resumed share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from torch import nn

Options = TypeVar("Options")


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Whole or not at all: an interrupted write leaves the old file."""
    part = path.with_suffix(".part")
    torch.save(checkpoint, part)
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at path, on the CPU: load_state_dict takes it to where the network is."""
    if not path.is_file():
        raise typer.BadParameter(f"--resume: there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises on a file that is not torch's depends on the file's first bytes
        raise typer.BadParameter(f"--resume: {path} cannot be read as a checkpoint: {_line(error)}") from None
    if not isinstance(checkpoint, dict):
        raise typer.BadParameter(f"--resume: {path} is not a checkpoint of this example")
    return checkpoint


def restore(network: nn.Module, path: Path) -> None:
    """Puts the weights of the checkpoint at path into the network, which an earlier run may have left there."""
    checkpoint = load(path)
    with restoring():
        network.load_state_dict(checkpoint["network"])


@contextlib.contextmanager
def restoring() -> Iterator[None]:
    """What is taken from a checkpoint inside: another version or another example may have written it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"--resume: the checkpoint is not one of this example: {_line(error)}") from None


def options_of(checkpoint: dict[str, Any], make: Callable[..., Options]) -> Options:
    """make(...), the options that the checkpoint was trained with."""
    with restoring():
        return make(**checkpoint["options"])


def _line(error: Exception) -> str:
    """The first line of what it says; of a KeyError that is the key alone."""
    said = str(error).strip().partition("\n")[0]
    return f"it has no {said}" if isinstance(error, KeyError) else said or type(error).__name__


def check_left(step: int, total: int, option: str) -> None:
    """Refuses to go on where nothing is left to do. A time limit is of one run alone, and no reason to end the next."""
    if step >= total:
        raise typer.BadParameter(f"--resume: all {total} steps have been taken: give it more with {option}")


def check_resumed(context: typer.Context, free: set[str]) -> None:
    """Refuses every option of the command line but --resume, --out and those in free: the checkpoint has them."""
    for key in context.params:
        source = context.get_parameter_source(key)
        if key not in {"resume", "out", *free} and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--resume takes this option from the checkpoint: {key}")
