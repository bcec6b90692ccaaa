"""How often knowing waits for the device: once a call for each distinct pattern of runs in a step, and never a step.

The pipelines are on a GPU that is pretended (pretended_gpu.py), whose waits are counted with a session and without one.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import attach
from tests.families import families
from tests.kernels.pretended_gpu import OnGpu, place, pretended
from tests.pipeline.instruments import Watch
from tests.pipeline.knowing.loops import BLOCK, Own, build

# Of each the patterns: the runs of a step that differ in their texts or batch. Lumina 2 reads its mask once for each.
PATTERNS = {
    "sd": 1,
    "sdxl": 1,
    "sd3": 1,
    "pag": 1,
    "controlnet": 1,
    "kandinsky": 1,
    "kandinsky5": 2,
    "latte": 1,
    "ltx": 1,
    "cogview4": 2,
    "cosmos": 2,
    "hunyuan_video": 2,
    "qwen_image": 2,
    "sana": 1,
    "wan": 2,
    "wan_animate": 2,
}
READS = {"lumina2": 4}
"""The same with what a family reads of a tensor that is given again in every step."""


def move(pipe):
    place(*(part for part in pipe.components.values() if isinstance(part, nn.Module)))
    return pipe


def waited(run):
    """How often `run(steps)` made the host wait, in 2 steps and in 3."""
    found = []
    for steps in (2, 3):
        with torch.no_grad(), pretended() as waits:
            run(steps)
        found.append(len(waits))
    return found


@pytest.mark.parametrize(("name", "expected"), (PATTERNS | READS).items())
def test_texts_are_compared_with_one_wait_for_each_pattern_of_runs(name, expected):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = move(family.build())
    block = next(block for block in family.blocks if not block.path.startswith("text_encoder"))

    def run(steps):
        family.call(pipe, ["a fox"], guidance=family.guidance == "cfg", steps=steps)

    alone = waited(run)
    watch = Watch(block.path)
    with attach(pipe, watch):
        attached = waited(run)
    assert [with_it - without for with_it, without in zip(attached, alone, strict=True)] == [expected] * 2
    assert {condition for context in watch.contexts for condition in context.condition} >= {"cond"}


RUNS = {
    "one run on both": ((("uncond", "cond"),), 1),
    "the conditional half alone as well": ((("uncond", "cond"), ("cond",)), 2),
    "a refinement with batched guidance": ((("uncond", "cond"), ("uncond", "cond"), ("cond",)), 3),
    "one after the other, three times": ((("cond",), ("uncond",), ("cond",)), 3),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_several_runs_a_step_have_a_wait_each_and_none_in_later_steps(name, inference, monkeypatch):
    """`torch.cat` makes the texts anew in every step; under inference mode nothing counts what is written to them."""
    monkeypatch.setattr(OnGpu, "is_inference", lambda self: inference)
    runs, patterns = RUNS[name]
    pipe = move(build(Own))

    def run(steps):
        pipe(["a fox"], ["cat"], runs=runs, steps=steps)

    alone = waited(run)
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        attached = waited(run)
    # and one at the end of a call with texts that were taken for those of its first step
    assert attached[1] - alone[1] <= patterns + 1
    assert attached[1] - alone[1] == attached[0] - alone[0]
    assert [context.condition for context in watch.contexts[-len(runs) :]] == list(runs)
