"""Maps of other packages, where they are installed, as they give them: daam's and attention-map-diffusers'.

Neither has a map of a word of several images by itself; which tokens are a word's is told as DAAM does (`spelled_at`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.evaluation.eager_daam import spelled_at
from sparsefeat.evaluation.scenes import Maps, Method, Picture


def daam_package() -> Method:
    """castorini/daam 0.2: one prompt a call, one picture a prompt, squares; of the batch's second half, whether that is the
    prompt's or, without guidance, half of its heads."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        trace = importlib.import_module("daam").trace(pipe)
        for hook in trace.module:
            if hasattr(hook, "context_size"):  # 77 whatever the tokenizer is; attentions to another number are left out
                hook.context_size = pipe.tokenizer.model_max_length
        with trace:

            def read(image: int, picture: Picture) -> Tensor:
                # `factors` of grids that are not those of 512, 768 or 1,024 pixels are left out unless they are named.
                maps = trace.compute_global_heat_map(picture.prompt, factors=range(97)).heat_maps
                return torch.stack([maps[spelled_at(pipe.tokenizer, picture.prompt, w)].mean(0) for w in picture.words])

            yield read

    return Method("daam (the package)", opened, batch=1, alone=True)


def attention_map_diffusers() -> Method:
    """attention-map-diffusers 1.0 with its defaults: of the last step, the mean over heads; layers enlarged linearly to the
    largest grid and averaged, as its pictures are."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        found: list[Tensor] = []
        with importlib.import_module("attention_map_diffusers").AttentionCapture(pipe) as capture:

            def read(image: int, picture: Picture) -> Tensor:
                if not found:
                    found.append(_averaged(capture.compute().records, guidance))
                every = found[0][image]
                return torch.stack(
                    [every[spelled_at(pipe.tokenizer, picture.prompt, w)].mean(0) for w in picture.words]
                )

            yield read

    return Method("attention-map-diffusers (the package)", opened, alone=True)


def _averaged(records: Sequence[Any], guidance: bool) -> Tensor:
    """[images, tokens, h, w] of records [batch, 1, positions, tokens]."""
    grids = [(int(record.q_shape.height), int(record.q_shape.width)) for record in records]
    largest = max(grids, key=lambda grid: grid[0] * grid[1])
    maps = []
    for record, grid in zip(records, grids, strict=True):
        data = record.data.float().mean(1).transpose(1, 2).unflatten(-1, grid)
        data = data[len(data) // 2 :] if guidance else data
        maps.append(F.interpolate(data, size=largest, mode="bilinear", align_corners=False))
    return torch.stack(maps).mean(0)


PEERS = {"daam": daam_package, "attention_map_diffusers": attention_map_diffusers}
"""The methods, by the name of the package that each needs."""


def installed() -> tuple[list[Method], list[str]]:
    """The methods whose packages are there, and the names of the packages that are not."""
    there = {name: importlib.util.find_spec(name) is not None for name in PEERS}
    return [make() for name, make in PEERS.items() if there[name]], [
        name for name, is_there in there.items() if not is_there
    ]
