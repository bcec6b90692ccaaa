"""A call that is made again launches what the op would, on the memory of its own arguments, and nothing else is made again."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparsefeat_kernels import launch, replay
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE, triton_version

from bench import pretended_driver
from tests.kernels.test_ahead_of_time import environment

pytestmark = pytest.mark.skipif(
    not (TRITON_AVAILABLE and pretended_driver.compiler()) or triton_version() not in launch.KNOWN,
    reason="Triton of a known version or a compiler of C is not installed",
)
SCRIPT = Path(__file__).with_name("replayed_calls.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calls")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment(folder)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_launches_on_the_memory_of_their_own_arguments(found: dict[str, Any]):
    assert len(found["cases"]) > 10
    for name, case in found["cases"].items():
        assert "_Recorded" in case["recorded"], name
        assert case["replayed"] == case["plain"], name
        assert any("argument" in json.dumps(launch) for launch in case["plain"]["launches"]), name


def test_parts_of_the_scratch_do_not_overlap(found: dict[str, Any]):
    parts = {name: sorted(case["scratch"]) for name, case in found["cases"].items()}
    assert max(map(len, parts.values())) > 3
    for name, of in parts.items():
        for (first, size), (after, _) in itertools.pairwise(of):
            assert first + size <= after, name


def test_what_computes_or_asks_is_run(found: dict[str, Any]):
    answers, ran, kept = found["rest"]["another op"]
    assert answers == [[2.0 * i] * 4 for i in range(4)]
    assert ran == 4
    assert kept == [replay.TRIES]
    assert found["rest"]["a number"] == [[0], [4], [8], [12]]


def test_who_watches_launches_sees_them(found: dict[str, Any]):
    assert found["rest"]["a hook"] == ["_sparse_decode_sum_kernel"]
    assert found["rest"]["another stream"] == [77]
    assert found["rest"]["views"] == [1, 1, 1, 1]


def test_no_memory_is_kept_and_kinds_are_bounded(found: dict[str, Any]):
    assert not found["rest"]["memory is kept"]
    assert found["rest"]["kept"] <= 3
