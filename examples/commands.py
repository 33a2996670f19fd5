"""What the commands of all examples share: an error of the user is one line and not a traceback, and JSON is strict."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from recattn_kernels.backends import NAMES, BackendUnavailableError

Main = TypeVar("Main", bound=Callable[..., None])


def command(main: Main) -> Main:
    """main, where a backend that cannot run on this machine is an error of its option."""

    @functools.wraps(main)
    def told(*args: Any, **options: Any) -> None:
        try:
            main(*args, **options)
        except BackendUnavailableError as error:
            raise typer.BadParameter(str(error)) from None

    return told  # type: ignore[return-value]


def known_backend(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise typer.BadParameter(f"must be one of {', '.join(NAMES)}, got {name}")
    return name


def make_folder(out: Path) -> None:
    """Of the results, before there are any: after a long training is too late to find that it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out: {out} cannot be a folder: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise typer.BadParameter(f"--out: {out} cannot be written to")


def diverged(step: int) -> typer.BadParameter:
    return typer.BadParameter(f"the training diverged at step {step}: a smaller --lr may help")


def strict(value: Any) -> Any:
    """value, where None stands for every number that JSON does not have."""
    if isinstance(value, dict):
        return {name: strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(strict(value), indent=1, allow_nan=False) + "\n")
