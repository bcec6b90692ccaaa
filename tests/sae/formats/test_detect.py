"""Which format a folder or file is of: every fixture is its own format's and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsefeat.sae.formats import FORMATS
from tests.sae.formats.expected import FIXTURES

EVERY = sorted(path.parent for path in FIXTURES.glob("*/*/expected.safetensors"))


def claimed(place: Path) -> set[str]:
    return {known.name for known in FORMATS if known.detect(place)}


@pytest.mark.parametrize("case", EVERY, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_one_format_alone_claims_a_fixture(case):
    places = [case, *case.glob("*.pt"), *case.glob("*.pth"), *case.glob("*.safetensors")]
    claims = {name for place in places for name in claimed(place)}
    assert claims == {case.parent.name}


def test_names_are_distinct_and_every_format_says_what_it_reads():
    assert len({known.name for known in FORMATS}) == len(FORMATS)
    assert all(known.title for known in FORMATS)


def test_a_folder_of_anything_else_is_nobodys(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert not claimed(tmp_path)
    assert not claimed(tmp_path / "weights.bin")
