"""docs/presets.md: what its tables name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sparsefeat as sf

ROOT = Path(__file__).resolve().parents[2]


def rows(title):
    """The cells of every row of a section's table."""
    section = (ROOT / "docs" / "presets.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


CORE, OTHERS = rows("The twenty core systems"), rows("Others that are here")


def test_there_are_twenty_core_systems_with_their_constants():
    assert len(CORE) == 20
    assert all(len(cells) == 5 and all(cells) for cells in CORE)


@pytest.mark.parametrize("cells", [*CORE, *OTHERS], ids=lambda cells: cells[0].split(" (")[0])
def test_the_test_and_the_names_of_a_row_exist(cells):
    path, _, name = re.fullmatch(r"`(tests/[\w/]+\.py)((?:::\w+)?)`", cells[-1]).expand(r"\1 \2").partition(" ")
    tree = ast.parse((ROOT / path).read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert tests
    assert not name or name.removeprefix("::") in tests
    named = re.findall(r"\bsf\.([\w.]+)|\b(presets\.[\w.]+)", cells[2])
    assert named or "`sparsefeat " in cells[2]
    for own, preset in named:
        found = sf
        for part in (own or preset).split("."):
            found = getattr(found, part)
