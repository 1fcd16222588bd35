"""The imports between the rooms of the package are those of docs/architecture.md."""

import ast
import re
from pathlib import Path

import pytest

import autolr_fast

PACKAGE = Path(autolr_fast.__file__).parent
SHARED = {"_arguments", "_optimizers", "_state", "_version"}  # anyone may use them
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def rooms_of(cell):
    return {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", cell)}


MAY_IMPORT = {  # from the page's table
    room: rooms_of(others)
    for rooms, others in re.findall(r"^\| (`.*`) \| (`.*`|none) \|$", PAGE, flags=re.MULTILINE)
    for room in rooms_of(rooms)
}


def rooms_imported(path):
    """The rooms that a file imports from, less its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms |= {(*base, *name.split("."))[0] for name in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.startswith("autolr_fast") for name in names), f"{path}: import relatively"
    return rooms - {parts[0]}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_knows_no_more_than_it_may(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).glob("*.py"))
    assert files
    for path in files:
        more = rooms_imported(path) - MAY_IMPORT[room] - SHARED
        assert not more, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(more))}"


def test_every_room_is_in_the_table():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - set(MAY_IMPORT) == {
        "__init__",
        "__main__",
        "_arguments",
        "_optimizers",
        "_state",
        "_version",
        "plotting",
        "demo",
    }
