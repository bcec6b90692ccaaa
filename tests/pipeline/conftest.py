"""Shared by the tests of the pipelines."""

from __future__ import annotations

import pytest

from tests.pipeline.outcomes import results  # noqa: F401, a fixture
from tests.tiny import pixels, tiny_sd


@pytest.fixture
def pipe():
    pipe = tiny_sd()
    pixels(pipe, steps=1)  # what libraries put in at a first call is not ours
    return pipe
