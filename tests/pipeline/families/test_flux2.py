"""FLUX.2: single blocks over one sequence [text; image; reference images]."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sparsefeat.pipeline import Delta, attach
from tests.families import families
from tests.pipeline.families.test_transformer import at
from tests.pipeline.instruments import Edit, Watch, WatchAttention, zero

FAMILY = families()["flux2"]
pytestmark = pytest.mark.skipif(not FAMILY.available, reason=f"this diffusers has no {FAMILY.pipeline}")

DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.1"
TEXT_TOKENS = 16


@pytest.fixture(scope="module")
def pipe():
    return FAMILY.build()


def call(pipe, **arguments):
    # Of 64 x 128 pixels come 16 x 32 latents, so 8 x 16 tokens; a picture becomes as many tokens again, of its own size.
    made = {"height": 64, "width": 128, "image": Image.new("RGB", (256, 64), "red"), **arguments}
    return FAMILY.call(pipe, ["red fox"], **{"guidance": True, "steps": 1, **made})


@pytest.mark.parametrize("path", [DOUBLE, SINGLE, f"{SINGLE}.attn"])
def test_reference_images_are_not_part_of_the_image_that_is_being_made(pipe, path):
    image, text, tap = at(Watch(), (path, "image")), at(Watch(), (path, "text")), WatchAttention(f"{SINGLE}.attn")
    plain = call(pipe)
    with attach(pipe, image, text, tap, at(Edit(zero), (path, "image"), (path, "text"))):
        assert torch.equal(call(pipe), plain)
    seen, _ = tap.seen[0]
    assert seen.query.shape[2] > TEXT_TOKENS + 8 * 16  # the reference is in the sequence
    assert seen.streams == {"image": (TEXT_TOKENS, TEXT_TOKENS + 8 * 16), "text": (0, TEXT_TOKENS)}
    assert (image.contexts[0].grid, image.contexts[0].positions) == ((8, 16), 128)
    assert text.contexts[0].positions == TEXT_TOKENS


def test_a_row_of_the_image_is_its_patch_beside_reference_images(pipe):
    def one_row(activations, context):
        rows = torch.zeros_like(activations.rows).view(1, 8, 16, -1)
        rows[0, 6, 11] = torch.linspace(-30, 30, rows.shape[-1])
        return Delta(rows.flatten(0, 2))

    plain = call(pipe)
    with attach(pipe, Edit(one_row, SINGLE)):
        edited = call(pipe)
    changed = (plain != edited).flatten(2).any(1) if plain.ndim == 4 else (plain != edited).any(-1)
    assert changed.sum() > 0
    rows = changed.nonzero()[:, 1].tolist()
    if plain.ndim == 4:  # unpacked: 2 x 2 latents of a 16 x 32 map, one token of an 8 x 16 grid
        height, width = plain.shape[-2:]
        rows = sorted({(row // width * 8 // height) * 16 + row % width * 16 // width for row in rows})
    assert rows == [6 * 16 + 11]
