"""docs/attention.md says what the tests of maps did, for every family they are of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.attention import test_concepts, test_families

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_results_file_says():
    run = subprocess.run(
        [sys.executable, "tools/write_attention.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_family_of_the_tests_is_in_the_results():
    passed = json.loads((ROOT / "docs" / "attention.json").read_text())["passed"]
    assert set(passed["joint"]) == {*test_families.PLACES, *test_families.QUOTING}
    assert set(passed["cross"]) == set(test_families.CROSS)
    assert set(passed["concept"]) == set(test_concepts.CASES)
