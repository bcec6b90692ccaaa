"""Damaged files of every format are read or refused; `python -m tests.sae.fuzzing` tries as many as one has time for."""

from __future__ import annotations

import itertools
import sys

import pytest

from tests.sae.fuzzing import cases, try_one, variants, warm_up

EACH = 6  # variants of every fixture


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_damaged_files_are_read_or_refused_in_one_sentence_within_their_memory():
    warm_up()
    tried = itertools.islice(variants(seed=0), EACH * len(cases()))
    assert not [problem for problem in (try_one(*variant) for variant in tried) if problem]
