"""A pytest plugin: a test that hangs ends its process, with the stack, before it takes the time of the others."""

import faulthandler
import os
from collections.abc import Iterator

import pytest

TEST_S = 60.0
UNCAPTURED = os.dup(2)  # what pytest captures is lost with the process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    faulthandler.dump_traceback_later(TEST_S, exit=True, file=UNCAPTURED)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
