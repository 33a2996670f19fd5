"""Tables and a progress bar: rich where it is installed, plain text where it is not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO


def rich_installed() -> bool:
    return importlib.util.find_spec("rich") is not None


def _console(stream: TextIO) -> Any:
    from rich.console import Console

    # A pipe has no width of its own: rich would cut tables at 80 columns.
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 140)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints rows under columns; those named in `right` are aligned to the right."""
    if not rich_installed():
        print(plain_table(title, columns, rows, right))
        return
    from rich.table import Table
    from rich.text import Text

    view = Table(show_header=any(columns))
    for column in columns:
        view.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))
    console = _console(sys.stdout)
    console.print(Text(f"\n{title}", style="bold"), view)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        return "  ".join(cells).rstrip()

    header = [line(columns), line(["-" * width for width in widths])] if any(columns) else []
    return "\n".join(["", title, *header, *map(line, rows)])


class Progress:
    """A progress bar on standard error, drawn only when it is told to.

    rich's own refresh thread would take a share of the cores that are being timed.
    """

    def __init__(self, total: float) -> None:
        self.bar: Any = None
        self.last = ""
        if rich_installed() and sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
            self.bar = Bar(
                *columns, TextColumn("{task.description}"), console=_console(sys.stderr), auto_refresh=False,
                transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, description: str) -> None:
        """Says what starts now."""
        if self.bar is not None:
            self.bar.update(self.task, description=description, refresh=True)
        elif description != self.last:
            print(description, file=sys.stderr, flush=True)
        self.last = description

    def advance(self, amount: float = 0.0) -> None:
        """Adds to what is done, and moves the clock on."""
        if self.bar is not None:
            self.bar.update(self.task, advance=amount, refresh=True)
