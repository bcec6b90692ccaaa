"""Shared by all tests. The first lines decide, before anything imports Triton, whether its kernels are interpreted."""

import os

import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from sparsefeat_kernels import dispatch

from bench.interpreted import hasten

if dispatch.INTERPRETED and dispatch.TRITON_AVAILABLE:
    hasten()

# How long an example takes is the machine's, and says nothing of what is tested.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# The files that take longest, the longest in front. They are begun first: what is begun last decides how long one process of
# `make test` waits for the other.
LONGEST = (
    "kernels/test_ahead_of_time_sm_90.py",
    "test_docs.py",
    "pipeline/test_matrix_videos.py",
    "pipeline/test_matrix_unets.py",
    "pipeline/test_matrix_joint.py",
    "training/test_published.py",
    "test_training_guide.py",
    "training/test_drawing.py",
    "training/test_killed_training.py",
    "training/test_ranks.py",
    "test_packaging.py",
    "explore/test_page.py",
    "pipeline/test_matrix_cross.py",
    "bench/test_smoke.py",
    "test_demo.py",
    "bench/test_predict.py",
    "test_interrupted.py",
    "kernels/test_ahead_of_time_sm_80.py",
    "kernels/test_ahead_of_time_sm_100.py",
    "kernels/test_ahead_of_time_gfx942.py",
    "assets/test_embedded.py",
    "evaluation/test_evaluate_saes.py",
    "kernels/encode/test_threshold.py",
    "kernels/attention/test_map_gradient.py",
    "kernels/encode/gpu/test_topk_kernels.py",
    "pipeline/knowing/test_what_changes.py",
    "pipeline/knowing/test_waits.py",
    "kernels/encode/test_survivors.py",
    "assets/test_training_tools.py",
    "training/test_trainer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, or a large negative integer: reading it is then seen in the result."""

    def poison(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(torch.nan)
            return tensor.fill_(-(2**30)) if tensor.dtype in (torch.int32, torch.int64) else tensor

        return allocate_poisoned

    _device_constructors()  # torch keeps those of its first look, for every device that is a context
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
