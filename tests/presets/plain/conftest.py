"""The tiny pipelines of these tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import flux as flux_family
from tests.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def flux_pipe() -> Any:
    return flux_family.build(embedded=False)
