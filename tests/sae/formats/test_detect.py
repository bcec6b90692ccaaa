"""Which format a folder or file is of: every fixture is its own format's and nobody else's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import FORMATS
from tests.sae.formats.expected import FIXTURES

EVERY = sorted(path.parent for path in FIXTURES.glob("*/*/expected.safetensors"))


def claimed(place: Path) -> set[str]:
    return {known.name for known in FORMATS if known.detect(place)}


@pytest.mark.parametrize("case", EVERY, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_one_format_alone_claims_a_fixture(case):
    places = [case, *(path for path in case.rglob("*") if "tree" not in path.parts)]
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


def test_a_folder_around_an_sae_that_is_one_file_names_the_file(tmp_path):
    copied = tmp_path / "sae.pt"
    shutil.copyfile(FIXTURES / "overcomplete" / "jumprelu" / "sae.pt", copied)
    (tmp_path / "notes.txt").write_text("of a run")
    with pytest.raises(FileNotFoundError, match=f"is a single file: pass the file, {copied}$"):
        load_sae(tmp_path)
    assert load_sae(copied).config.activation == "jumprelu"
