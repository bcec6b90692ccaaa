"""A call as a CUDA graph, whose replays take what the device takes, whatever the host does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured"]


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of one call. Raises where a call cannot be captured, as one that waits for the device."""
    here = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # what libraries set up at a stream's first call is no part of the graph
        run()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        torch.cuda.set_stream(here)  # where a capture failed, torch leaves its own
    return graph
