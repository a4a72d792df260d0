"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from srcfast.errors import printable


def table(title: str, rows: Sequence[Sequence[str]], header: bool = False) -> None:
    """Print cells as they are: markup in them stays text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), show_header=header)
    if header:
        for name in rows[0]:
            shown.add_column(Text(name))
    for row in rows[1:] if header else rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(shown)
