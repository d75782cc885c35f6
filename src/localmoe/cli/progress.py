"""Progress of long work on the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from localmoe.catalog.building import Progress as OnProgress


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """One bar per stage on standard error; where that is no terminal, one line per stage."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    # Stages follow one another; one without a known total is over when the next begins.
                    bars.update(task, completed=1, total=1)
                tasks[stage] = bars.add_task(stage, total=None)
                if not console.is_terminal:
                    console.print(stage, highlight=False)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield on_progress
        for task in tasks.values():
            bars.update(task, completed=1, total=1)
