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


def check_resumed(context: typer.Context, free: set[str]) -> None:
    """Refuses every option of the command line but --resume, --out and those in free: the checkpoint has them."""
    for key in context.params:
        source = context.get_parameter_source(key)
        if key not in {"resume", "out", *free} and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--resume takes this option from the checkpoint: {key}")
