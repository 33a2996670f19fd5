"""What the examples that can be resumed share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Whole or not at all: an interrupted write leaves the old file."""
    part = path.with_suffix(".part")
    torch.save(checkpoint, part)
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at path, on the CPU: load_state_dict takes it to where the network is."""
    if not path.is_file():
        raise typer.BadParameter(f"--resume: there is no checkpoint {path}")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


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
