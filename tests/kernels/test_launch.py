"""A kernel that is launched again is the one that Triton would launch, with the same arguments, wherever it goes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

from bench import pretended_driver
from tests.kernels.test_ahead_of_time import environment

pytestmark = pytest.mark.skipif(
    not (TRITON_AVAILABLE and pretended_driver.compiler()), reason="Triton or a compiler of C is not installed"
)
SCRIPT = Path(__file__).with_name("kept_launches.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launches")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without(launch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in launch.items() if name != "through_python"}


def test_it_is_the_kernel_that_triton_chooses_with_the_same_arguments(found: dict[str, Any]):
    assert len(found["cases"]) > 15
    for name, case in found["cases"].items():
        for ours in case["ours"]:
            assert without(ours) == without(case["triton"]), name


def test_the_cases_are_several_kernels(found: dict[str, Any]):
    """Else there would be nothing to confuse."""
    cases = found["cases"]
    first = cases["as it is"]["triton"]["function"]
    same = {name for name, case in cases.items() if case["triton"]["function"] == first}
    assert same == {"as it is", "another number", "negative", "another factor", "a factor of one", "other memory"}
    assert cases["a parameter"]["triton"]["function"] == cases["a tensor in the place of None"]["triton"]["function"]
    assert len({case["triton"]["function"] for case in cases.values()}) == len(cases) - len(same)


def test_triton_is_asked_once_and_always_where_a_pointer_is_not_aligned(found: dict[str, Any]):
    if found["version"] not in found["known"]:
        pytest.skip("launches of this Triton are not known")
    for name, case in found["cases"].items():
        times = [ours["through_python"] for ours in case["ours"]]
        # An earlier case was of the same.
        known = name in ("another factor", "a factor of one", "other memory", "a parameter")
        assert times == ([1, 1, 1] if "not aligned" in name else [0, 0, 0] if known else [1, 0, 0]), name


def test_the_stream_and_the_device_of_now(found: dict[str, Any]):
    assert found["another stream"]["stream"] == 77
    first, again = found["another device"]
    assert first["through_python"] == 1
    assert first["function"] != found["cases"]["as it is"]["triton"]["function"]
    assert without(first) == without(again)


def test_who_watches_launches_sees_triton_s_own(found: dict[str, Any]):
    assert found["hooked"] == ["_copy_kernel", "the end"]
    for watched in ("a hook", "one hook", "debugging"):
        assert found[watched]["through_python"] == 1, watched
    assert [launch["through_python"] for launch in found["another in its place"]] == [1, 1]


def test_other_versions_take_triton_s_way(found: dict[str, Any]):
    assert [launch["through_python"] for launch in found["an unknown version"]] == [1, 1]


def test_what_is_kept_is_bounded(found: dict[str, Any]):
    assert found["kept"] <= 5
    first, again = found["after all"]
    assert without(first) == without(again)
    assert again["through_python"] == (found["version"] not in found["known"])
