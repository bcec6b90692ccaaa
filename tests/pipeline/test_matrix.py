"""What the promises of `attach` (promises.py) are beside the cells of test_matrix_*.py: in loops that are not diffusers',
compiled; and the covering array itself (matrix.py).
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.pipeline import attach
from tests.families import Block
from tests.pipeline import promises
from tests.pipeline.instruments import push
from tests.pipeline.matrix import MODES, Cell, pairwise, product
from tests.pipeline.outcomes import FAMILIES, kind
from tests.pipeline.state import everything


def test_every_family_is_of_a_kind_that_has_a_file():
    """So that none is left out of the matrix."""
    files = {path.stem.removeprefix("test_matrix_") for path in Path(__file__).parent.glob("test_matrix_*.py")}
    assert {kind(family) for family in FAMILIES.values()} == files


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_loop_that_is_not_diffusers_the_conditions_are_right_or_unknown(name, results):
    """Nothing is believed there because of the pipeline's class: what is said is seen."""
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    plain = next((option for option, build in family.options.items() if not build), "")
    batch = "1" if family.alone else "2"
    run = promises.Run(Cell(name, plain, "plain", family.guidance == "cfg", batch, "square"))
    kind = type(run.pipe)
    spots = [spot for spot in run.spots() if spot.place.path.startswith(run.main + ".")]
    own = types.new_class("OwnLoop", (kind,), exec_body=lambda body: body.update(__call__=kind.__call__))
    try:
        run.pipe.__class__ = own
        with attach(run.pipe, *spots), promises.listening(run) as heard:
            run()
    finally:
        run.pipe.__class__ = kind
    unknown = [context for spot in spots for context in spot.contexts if "unknown" in context.condition]
    if not unknown:
        promises.conditions(run, spots, heard[run.main])
    for spot in spots:
        for context, visit in zip(spot.contexts, run.visits(spot.place.path), strict=True):
            if "unknown" not in context.condition:
                said = [(condition, image) for condition in visit.chunks for image in range(run.n_images)]
                assert list(context.entries) == said
    results[name]["own loop"].append("unknown" if unknown else "seen")


# torch.compile, for a UNet, for joint blocks, and for two passes over a video. The backend "eager" shows what capture,
# guards and graph breaks do; "inductor" generates code, for one block. Of the UNet one block of two, for the time it
# takes to capture: modules of one class sharing code is what loses hooks, and it has them.

COMPILED = {"sd": "unet.up_blocks.1", "flux": "transformer", "wan": "transformer"}


@pytest.fixture
def compiling() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _blocks(name: str) -> list[Block]:
    return [block for block in FAMILIES[name].blocks if not block.path.startswith("text_encoder")][-2:]


@pytest.mark.parametrize("name", COMPILED)
def test_a_model_compiled_before_attach_is_refused_and_left_alone(name, compiling, results):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = family.build()
    root = promises.denoisers(family)[0]
    setattr(pipe, root, torch.compile(getattr(pipe, root), backend="eager"))
    before = everything(pipe)
    for block in _blocks(name):
        with pytest.raises(RuntimeError, match=r"compiled before `attach`.*attach first"):
            attach(pipe, promises.Spot(block))
    assert everything(pipe) == before
    results[name]["compiled"].append(("torch.compile before attach: refused", None))


@pytest.mark.parametrize("name", COMPILED)
def test_a_model_compiled_after_attach_gives_what_eager_gives(name, compiling, results):
    _compiled_after(name, results, COMPILED[name], backend="eager")


def test_a_block_compiled_by_inductor_after_attach_gives_what_eager_gives(compiling, results):
    _compiled_after("wan", results, "transformer.blocks.1", backend="inductor")


def _compiled_after(name: str, results: Any, path: str, *, backend: str) -> None:
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = family.build()
    block = _blocks(name)[-1]

    def run() -> torch.Tensor:
        return family.call(pipe, ["a fox"], guidance=True, steps=2)

    plain = run()
    with attach(pipe, promises.Spot(block, rule=push(8.0))):
        edited = run()
    assert not torch.allclose(plain, edited, atol=1e-3)
    spot = promises.Spot(block, rule=push(8.0))
    with attach(pipe, spot):
        parent, _, last = path.rpartition(".")
        holder = functools.reduce(getattr, parent.split("."), pipe) if parent else pipe
        setattr(holder, last, torch.compile(getattr(holder, last), backend=backend))
        for _ in range(2):
            torch.testing.assert_close(run(), edited, rtol=1e-4, atol=1e-4)
            runs = len(family.runs(guidance=True))
            assert [context.step for context in spot.contexts] == [0] * runs + [1] * runs
            assert all(context.grid == block.square for context in spot.contexts)
    # The graph was made with the hooks in it and is not made again: what is left of them has to know that it is over.
    torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-4)
    results[name]["compiled"].append(("torch.compile after attach", None))


# The covering array

AXES = {
    "mode": MODES,
    "guidance": (True, False),
    "batch": ("1", "2", "3"),
    "size": ("square", "wide"),
    "one": ("only",),
}


def test_every_two_values_of_every_two_axes_meet_in_the_covering_array():
    rows = pairwise(AXES, seed=5)
    for (a, first), (b, second) in itertools.combinations(AXES.items(), 2):
        for x, y in itertools.product(first, second):
            assert any(row[a] == x and row[b] == y for row in rows), (a, x, b, y)


def test_the_covering_array_is_small_and_the_same_every_time():
    rows = pairwise(AXES, seed=5)
    assert rows == pairwise(AXES, seed=5)
    assert len(rows) <= 1.25 * len(MODES) * 3  # two axes alone need their product
    assert len(rows) < len(product(AXES)) / 3
    assert all(list(row) == list(AXES) for row in rows)
