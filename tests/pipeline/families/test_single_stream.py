"""Lumina 2 and Z-Image: texts of different lengths in one batch, before or after the image."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import Delta, attach
from tests.families import families
from tests.pipeline.families.test_transformer import at, patches
from tests.pipeline.instruments import Edit, Watch, same, zero

NAMES = [name for name in ("lumina2", "z_image") if families()[name].available]
PROMPTS = ["fox", "a red fox in the snow"]


@pytest.fixture(scope="module")
def pipes():
    return {name: families()[name].build() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("io", ["output", "input"])
def test_texts_of_different_lengths_do_not_move_the_image_rows(pipes, name, io):
    family, pipe = families()[name], pipes[name]
    made = {"guidance": False, "steps": 1, "size": "wide"}
    plain = family.call(pipe, PROMPTS, **made)
    for image in (0, 1):

        def one_row(activations, context, image=image):
            rows = torch.zeros_like(activations.rows).view(2, 4, 8, -1)
            rows[image, 3, 2] = torch.linspace(-30, 30, rows.shape[-1])
            return Delta(rows.flatten(0, 2))

        # Below the last block tokens still see each other: there the other image is the one that must not change.
        with attach(pipe, Edit(one_row, f"transformer.layers.1:{io}")):
            edited = family.call(pipe, PROMPTS, **made)
        changed = (patches(plain, (4, 8)) != patches(edited, (4, 8))).any(-1)
        if io == "output":
            assert changed.nonzero().tolist() == [[image, 3, 2]]
        else:
            assert changed[image].any()
            assert not changed[1 - image].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", [zero, same])
def test_neutral_edits_among_texts_of_different_lengths_are_bit_identical(pipes, name, rule):
    family, pipe = families()[name], pipes[name]
    plain = family.call(pipe, PROMPTS, guidance=True)
    with attach(pipe, Edit(rule, "transformer.layers.0", "transformer.layers.1:input", "transformer.noise_refiner.0")):
        assert torch.equal(family.call(pipe, PROMPTS, guidance=True), plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_common_layers_have_no_text_stream(pipes, name):
    with pytest.raises(ValueError, match=r"layers.0 has no text stream in this \w+, only image"):
        attach(pipes[name], at(Watch(), ("transformer.layers.0", "text")))
