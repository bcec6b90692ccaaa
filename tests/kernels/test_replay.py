"""A call that is made again launches what the op would, on the memory of its own arguments, and nothing else is made again."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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
    assert all(sum(size for _, size in of) <= 64 << 20 for of in parts.values())
    for name, of in parts.items():
        for (first, size), (after, _) in itertools.pairwise(of):
            assert first + size <= after, name


def test_what_computes_or_asks_is_run(found: dict[str, Any]):
    answers, ran, kept = found["rest"]["another op"]
    assert answers == [[2.0 * i] * 4 for i in range(4)]
    assert ran == 4
    assert kept == [replay.TRIES]
    assert found["rest"]["a number"] == [[0], [4], [8], [12]]


def test_a_call_that_cannot_be_recorded_holds_no_more_memory(found: dict[str, Any]):
    assert len(found["rest"]["alive"]) == 3 * 8
    assert max(found["rest"]["alive"]) <= 2


def test_in_inference_mode_too(found: dict[str, Any]):
    assert found["rest"]["in inference mode"] == 1


def test_without_a_kernel_no_driver_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """Making Triton's needs a compiler of C, which plain torch does not."""

    class Triton:
        launched, unwatched = False, staticmethod(lambda: True)

        @property
        def driver(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(replay, "known_triton", Triton)
    run = replay.Replayed(lambda x: x + 1, tuple)
    assert [run(torch.ones(1)).item() for _ in range(4)] == [2.0] * 4


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    def asked() -> None:
        raise AssertionError("Triton is asked")

    monkeypatch.setattr(replay, "known_triton", asked)
    monkeypatch.setattr(replay, "REPLAYS", False)
    run = replay.Replayed(lambda x: x + 1, tuple)
    assert [run(torch.ones(1)).item() for _ in range(4)] == [2.0] * 4
    assert not run.kept


def test_what_was_recorded_can_be_dropped():
    run = replay.Replayed(lambda x: x, tuple)
    run.kept["a kind"] = 1
    replay.forget()
    assert not run.kept


def test_who_watches_launches_sees_them(found: dict[str, Any]):
    assert found["rest"]["a hook"] == ["_sparse_decode_sum_kernel"]
    assert found["rest"]["another stream"] == [77]
    assert found["rest"]["views"] == [1, 1, 1, 1]


def test_no_memory_is_kept_and_kinds_are_bounded(found: dict[str, Any]):
    assert not found["rest"]["memory is kept"]
    assert found["rest"]["kept"] <= 3
