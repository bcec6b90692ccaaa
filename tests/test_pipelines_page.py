"""docs/pipelines.md says what the tests' results say, and every family of the tests is in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import families

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "docs" / "pipelines.json").read_text())


def test_the_page_is_what_the_results_file_says():
    run = subprocess.run(
        [sys.executable, "tools/write_pipelines.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("environment", ["newest", "floor"])
def test_every_family_of_the_tests_is_in_the_results(environment):
    assert RESULTS[environment]["families"].keys() == families().keys()


def test_the_two_environments_are_the_newest_and_the_oldest_supported():
    assert RESULTS["floor"]["versions"]["torch"].startswith("2.7.0")
    assert RESULTS["floor"]["versions"]["diffusers"] == "0.33.0"
    newest = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for package in ("torch", "diffusers", "transformers"):
        assert RESULTS["newest"]["versions"][package].startswith(newest[package])


def test_every_promise_was_kept_wherever_it_was_tried_and_each_family_was_tried_plain():
    for environment in RESULTS.values():
        for name, family in environment["families"].items():
            for promise, (kept, tried) in family["promises"].items():
                assert kept == tried > 0, (name, promise)
            if family["available"]:
                assert family["modes"]["plain"][0] > 0, name
                assert len(family["promises"]) >= 7, name
