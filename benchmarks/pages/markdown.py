"""Tables in Markdown: read from a page of results, and filled into a page of the docs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "TOGETHER", "Table", "fill", "lines", "read"]

ROOT = Path(__file__).parent.parent.parent
TOGETHER = "\N{NO-BREAK SPACE}"
"""Between the parts of a figure."""
_MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        section: the nearest heading before it, without its marks.
        heads: of the columns.
        rows: of cells.
    """

    section: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def read(path: str) -> list[Table]:
    """Return the tables of a page, in their order.

    Args:
        path: from the root of the repository.
    """
    section, found, block = "", [], []
    for line in [*(ROOT / path).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
        elif block:
            found.append(Table(section, block[0], block[2:]))
            block = []
    return found


def lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    written = [f"| {' | '.join(row)} |".replace(" ± ", f"{TOGETHER}±{TOGETHER}") for row in (heads, *rows)]
    return "\n".join([written[0], "|---" * len(heads) + "|", *written[1:]])


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with each table between its marks made anew.

    Args:
        text: of the page; a mark is ``<!-- table: NAME -->``, and ``<!-- end of table -->``.
        tables: name -> what returns the table.

    Raises:
        KeyError: if a mark names a table that is unknown.
    """
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{tables[mark[2]]()}\n\n{mark[3]}", text)
