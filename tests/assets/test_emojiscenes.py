"""Scenes: exact masks, captions that are true, and pairs that are kept apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.assets.emojiscenes import HELD_OUT, Placed, Scene, draw, scenes


def test_a_drawing_that_fills_the_canvas_is_the_drawing_of_emojicanvas():
    canvas = emojicanvas.load()
    for style, name in ((0, 3), (2, 17), (3, 49)):
        drawn = draw(Scene(style, (Placed(name, 64, 0, 0),)))
        # 8-bit colours are multiplied by alpha and rounded once on the way: one level.
        assert np.abs(drawn.image.astype(int) - canvas.on_white()[style, name].astype(int)).max() <= 1
        assert np.abs(drawn.masks[0] - canvas.masks()[style, name]).max() <= 1e-6


def test_masks_are_what_is_seen_of_each_drawing():
    """The mask of a drawing is how much of its own colour a pixel has: found by composing the scene in fp64 from the
    drawings alone, the front one over the back one."""
    for scene in scenes(20, seed=5, n_objects=(2,)):
        back, front = (draw(Scene(scene.style, (part,))) for part in scene.placed)
        drawn = draw(scene)
        assert np.allclose(drawn.masks[1], front.masks[0], atol=1e-6)
        assert np.allclose(drawn.masks[0], back.masks[0] * (1 - front.masks[0]), atol=1e-6)
        white = 255 * (1 - front.masks[0].astype(float))[..., None]
        expected = front.image - white + back.image * (1 - front.masks[0].astype(float))[..., None]
        assert np.abs(drawn.image - expected).max() <= 1.6  # two images rounded to 8 bits and one more rounding


def test_overlapping_drawings_hide_each_other_and_nothing_is_counted_twice():
    drawn = [draw(scene) for scene in scenes(200, seed=1)]
    total = np.concatenate([one.masks.sum(0).ravel() for one in drawn])
    assert total.min() >= 0
    assert total.max() <= 1 + 1e-6
    together = draw(Scene(0, (Placed(3, 40, 10, 10), Placed(5, 40, 12, 12))))
    assert together.masks[0].sum() < draw(Scene(0, (Placed(3, 40, 10, 10),))).masks[0].sum() / 2
    untouched = together.masks.sum(0) == 0
    assert untouched.any()
    assert (together.image[untouched] == 255).all()


def test_training_scenes_and_held_out_ones_share_no_pair_and_miss_no_object():
    train = {tuple(sorted(pair)) for scene in scenes(3000) for pair in combinations(scene.objects, 2)}
    held = {tuple(sorted(scene.objects)) for scene in scenes(1500, split=HELD_OUT)}
    assert not train & held
    everything = set(range(len(emojicanvas.OBJECTS)))
    assert {i for pair in train for i in pair} == {i for pair in held for i in pair} == everything
    n_held = sum(emojiscenes.held_out_pair(a, b) for a, b in combinations(everything, 2))
    assert 0.08 < n_held / 1225 < 0.15
    assert all(
        emojiscenes.held_out_pair(a, b) == emojiscenes.held_out_pair(b, a) for a, b in combinations(range(50), 2)
    )


def test_a_caption_says_where_the_first_object_is():
    said = scenes(400, seed=2, n_objects=(2,), related=1.0)
    assert {scene.relation for scene in said} == set(emojiscenes.RELATIONS)
    for scene in said:
        first, second = scene.placed
        right = first.left + first.size / 2 - second.left - second.size / 2
        down = first.top + first.size / 2 - second.top - second.size / 2
        true = {"to the left of": right < 0, "to the right of": right > 0, "above": down < 0, "below": down > 0}
        assert true[str(scene.relation)], scene
        assert f" {scene.relation} " in scene.caption


def test_captions_list_the_objects():
    fox, owl, key = (emojicanvas.OBJECTS.index(name) for name in ("fox", "owl", "key"))
    assert emojiscenes.caption((fox,), 0) == "a noto emoji of a fox"
    assert emojiscenes.caption((fox, owl), 3) == "a mono emoji of a fox and an owl"
    assert emojiscenes.caption((fox, owl, key)) == "an emoji of a fox, an owl and a key"
    assert emojiscenes.caption((key, owl), 1, "above") == "a twemoji emoji of a key above an owl"
    with pytest.raises(ValueError, match="relation"):
        emojiscenes.caption((fox, owl, key), 0, "above")


def test_the_same_seed_gives_the_same_scenes_and_another_gives_others():
    assert scenes(30, seed=3) == scenes(30, seed=3)
    assert scenes(30, seed=3) != scenes(30, seed=4)
    assert scenes(10, seed=3) == scenes(30, seed=3)[:10]
    with pytest.raises(ValueError, match="split"):
        scenes(1, split="test")
    with pytest.raises(ValueError, match="n_objects"):
        scenes(1, n_objects=(5,))
