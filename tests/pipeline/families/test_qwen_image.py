"""Qwen-Image: the grid from the shapes of the images' tokens, reference images after the one that is being made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Delta, attach
from sparsefeat.pipeline.families.qwen_image import QwenImage
from tests.families import families
from tests.pipeline.families.test_transformer import at
from tests.pipeline.instruments import Edit, Watch, WatchAttention

FAMILY = families()["qwen_image"]
BLOCK = "transformer.transformer_blocks.1"


@pytest.mark.parametrize(
    ("shapes", "grid"),
    [
        ([(1, 4, 8)], (4, 8)),  # one entry for each batch entry, as in diffusers 0.35
        ([(1, 4, 8), (1, 4, 8)], (4, 8)),
        ([[(1, 4, 8)], [(1, 4, 8)]], (4, 8)),  # a list for each: the image that is being made, then its references
        ([[(1, 4, 8), (1, 6, 2)]], (4, 8)),
        ([[(3, 4, 8)]], (3, 4, 8)),
        ([], None),
        (None, None),
    ],
)
def test_the_grid_is_that_of_the_first_shape(shapes, grid):
    assert QwenImage().image_grid(nn.Identity(), {"img_shapes": shapes}) == grid


def test_layers_that_are_made_together_are_the_frames_of_one_grid_and_the_last_image_is_given():
    layered = nn.Identity()
    layered.config = SimpleNamespace(use_layer3d_rope=True)
    assert QwenImage().image_grid(layered, {"img_shapes": [[(1, 4, 8)] * 4]}) == (3, 4, 8)


@pytest.mark.skipif(not FAMILY.available, reason=f"this diffusers has no {FAMILY.pipeline}")
def test_the_tokens_of_a_reference_image_are_not_part_of_the_image():
    # The model as the editing pipeline calls it: [image that is being made; reference], the shapes of both.
    pipe = FAMILY.build()
    torch.manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, 2 * 3 + 2 * 2, 16),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
        "timestep": torch.ones(2),
        "img_shapes": [[(1, 2, 3), (1, 2, 2)]] * 2,
    }

    def one_row(activations, context):
        rows = torch.zeros_like(activations.rows).view(2, 2, 3, -1)
        rows[1, 1, 2] = torch.linspace(-30, 30, rows.shape[-1])
        return Delta(rows.flatten(0, 2))

    image, text = at(Watch(), (BLOCK, "image")), at(Watch(), (BLOCK, "text"))
    tap = WatchAttention(f"{BLOCK}.attn")
    with torch.no_grad():
        plain = pipe.transformer(**given).sample
        with attach(pipe, image, text, tap, Edit(one_row, BLOCK)) as run, run.call(["fox", "cat"]):
            edited = pipe.transformer(**given).sample
    assert (image.contexts[0].grid, image.contexts[0].positions, text.contexts[0].positions) == ((2, 3), 6, 5)
    assert tap.seen[0][0].streams == {"image": (5, 11), "text": (0, 5)}
    assert (plain != edited).any(-1).nonzero().tolist() == [[1, 1 * 3 + 2]]
