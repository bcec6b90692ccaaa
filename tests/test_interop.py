"""docs/interop.md says what was measured, of every format, with the packages that made the fixtures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsefeat.sae.formats import FORMATS
from tests.sae.formats.expected import TOLERANCE, cases, made_by

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "docs" / "interop.json").read_text())
FORMAT = {found["format"]: found for found in RESULTS["formats"]}


def test_the_page_is_what_the_json_says():
    run = subprocess.run(
        [sys.executable, "tools/write_interop.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_format_was_measured_and_remade():
    assert set(FORMAT) == {found.name for found in FORMATS} - {"sparsefeat"}
    for found in FORMATS[1:]:
        measured = FORMAT[found.name]
        assert measured["remade"], f"{found.name} was not made again: run `make interop`"
        assert measured["title"] == found.title
        assert (measured["written"] is not None) == (found.write is not None)


@pytest.mark.parametrize("name", FORMAT)
def test_the_measured_differences_are_within_the_promise(name):
    measured = FORMAT[name]
    assert 0 < measured["read_difference"] < TOLERANCE
    if measured["written"] is not None:
        assert measured["written"]["written"] > 0
        assert measured["written"]["largest_difference"] < TOLERANCE
        assert (measured["written"]["read_by"] == "the package") == (measured["package"] is not None)


@pytest.mark.parametrize("name", FORMAT)
def test_the_committed_fixtures_are_of_the_measured_cases_and_versions(name):
    committed = {case.name: made_by(case) for case in cases(name)}
    assert sorted(committed) == sorted(FORMAT[name]["cases"])
    versions = {(made["package"], made["version"]) for made in committed.values() if made["package"]}
    assert versions <= {(FORMAT[name]["package"], FORMAT[name]["version"])}
    for made in committed.values():
        assert (ROOT / made["script"]).is_file()
