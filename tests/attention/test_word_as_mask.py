"""`run[maps]["cat"]`: a word's map of every image, as a mask of an edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.attention import HeatMaps
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import Steer
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"


def test_it_is_the_scaled_map_of_every_image_and_zero_where_the_prompt_lacks_the_word():
    pipe, maps = tiny_sd(), HeatMaps()
    with attach(pipe, maps) as run:
        pixels(pipe, ["a cat", "a fox"], num_images_per_prompt=2)
    found = run[maps]["cat"]
    assert found.shape == (4, 16, 16)
    for image in range(2):
        values = run[maps].word("cat", image).values
        torch.testing.assert_close(found[image], (values - values.min()) / (values.max() - values.min()))
    assert (found[2:] == 0).all()
    with pytest.raises(ValueError, match="word='dog' is in none of the 2 prompts"):
        run[maps]["dog"]
    with attach(pipe, maps) as run:
        pixels(pipe, "a cat")
    with pytest.raises(ValueError, match="its words are: a, cat"):
        run[maps]["dog"]


def test_zeros_are_for_prompts_without_the_word_alone():
    pipe, maps = tiny_sd(), HeatMaps(words=["fox"])
    torch.manual_seed(1)
    sae = SAE(SAEConfig(d_model=32, n_latents=64, k=4, hookpoint=AT)).requires_grad_(False).eval()
    with attach(pipe, maps) as run:
        pixels(pipe, ["cat", "a fox"], steps=1)
    with pytest.raises(ValueError, match="position 1 has no map, as words= named others"):
        run[maps]["cat"]
    steer = Steer(sae, add={3: 9.0}, mask=maps.mask("cat"))
    with attach(pipe, maps, steer), pytest.raises(ValueError, match="position 1 has no map, as words= named others"):
        pixels(pipe, ["cat", "a fox"], steps=2)


def test_an_edit_takes_it_for_its_mask():
    pipe, maps = tiny_sd(), HeatMaps()
    torch.manual_seed(1)
    sae = SAE(SAEConfig(d_model=32, n_latents=64, k=4, hookpoint=AT)).requires_grad_(False).eval()
    with attach(pipe, maps) as run:
        plain = pixels(pipe, "a cat and a fox")
    mask = run[maps]["cat"]
    with attach(pipe, Steer(sae, add={3: 9.0}, mask=mask)):
        edited = pixels(pipe, "a cat and a fox")
    assert not np.array_equal(plain, edited)
    with attach(pipe, Steer(sae, add={3: 9.0}, mask=torch.zeros_like(mask))):
        assert np.array_equal(plain, pixels(pipe, "a cat and a fox"))
