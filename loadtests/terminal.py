"""Output of load tests, benchmarks and experiments on the terminal."""

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def new_console() -> rich.console.Console:
    """A console on standard error for tables and progress."""
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # of tables in a log file
    return console


def new_progress(console: rich.console.Console, *, auto_refresh: bool = False) -> Progress:
    """A progress bar, drawn on request only or, with `auto_refresh`, twice a second."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, console=console, auto_refresh=auto_refresh, refresh_per_second=2, transient=True
    )


def numbers_table(title: str, *columns: str, labels: int = 0) -> Table:
    """A table with columns aligned to the right, after a number of columns with labels."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < labels else "right")
    return table


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)
