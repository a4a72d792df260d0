"""Print tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from srcfast.errors import printable


def table(title: str, rows: Sequence[Sequence[str]], header: bool = False) -> None:
    """Print a table; markup in cells is printed, not interpreted.

    Args:
        header: the first row has the names of the columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    output = Table(title=Text(title), show_header=header)
    if header:
        for name in rows[0]:
            output.add_column(Text(name))
    for row in rows[1:] if header else rows:
        output.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(output)
