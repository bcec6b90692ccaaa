"""The clicks of bench.explore, on a tiny pipeline: each is done, and what was drawn before is not drawn again."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

from bench.explore import measured
from sparsefeat.explore import Asked, Explorer, Source
from sparsefeat.explore.page import Page
from tests.explore.test_explorer import OF_SD, make_sae
from tests.tiny import tiny_sd

STEPS = 2


def test_every_click_is_done_and_the_denoiser_runs_only_where_a_picture_is_new():
    asked = Asked("a fox", 0, STEPS, 3.0)
    explorer = Explorer(tiny_sd(), [make_sae(OF_SD), make_sae(OF_SD, seed=1)], Source((), "pipe", ("sae", "sae_1")))
    hooks = dict(explorer.pipe.unet._forward_pre_hooks)
    runs = {row["click"]: row["denoiser_runs"] for row in measured(Page(explorer, asked), asked)}
    assert runs["draw, with features and maps of the words"] == STEPS
    assert runs["steer it with the slider"] == runs["steer it with the slider, further"] == STEPS
    assert runs["steer it where it was painted, in the first half"] == STEPS
    assert runs["draw another prompt, with that edit at work"] == 2 * STEPS  # without the edit and with it
    nothing_new = ("draw the same again", "choose", "find", "features of", "bring the slider back", "take")
    assert all(n == 0 for click, n in runs.items() if click.startswith(nothing_new))
    assert all(n > 0 for click, n in runs.items() if click.startswith("erase"))
    assert explorer.pipe.unet._forward_pre_hooks == hooks
