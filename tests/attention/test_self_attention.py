"""Self-attention of the image against the whole matrices of all layers, and FINCH against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from sparsefeat.attention import HeatMaps, SelfAttention, self_attention
from sparsefeat.attention.clusters import merged, nearest, partition, tied
from sparsefeat.attention.self_attention import SelfAttentionRecording
from sparsefeat.pipeline import attach
from tests.families import families
from tests.tiny import pixels, tiny_sd


def eager(pipe, rows, grids, common, **call):
    """sum r/R resize(A) / sum r/R with every layer's whole [N, N] matrix at once, rows not yet normalised."""
    matrices, handles = [], []

    def keep(module, args, kwargs):
        q, k = (
            project(args[0]).unflatten(-1, (module.heads, -1)).transpose(1, 2) for project in (module.to_q, module.to_k)
        )
        matrices.append(((q @ k.transpose(2, 3)) * module.scale).softmax(-1).mean(1).detach())

    for path, module in pipe.unet.named_modules():
        if path.endswith("attn1"):
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    pixels(pipe, **call)
    for handle in handles:
        handle.remove()
    size = common[0] * common[1]
    total, weights = torch.zeros(len(rows), size, size), 0.0
    for matrix in matrices:
        h, w = grids[matrix.shape[1]]
        weight = math.sqrt(h * w / size)
        for image, row in enumerate(rows):
            four = matrix[row].reshape(h, w, h, w)  # queries, keys
            if (h, w) == common:
                large = four
            elif h < common[0]:
                keys = F.interpolate(four.reshape(h * w, 1, h, w), size=common, mode="bilinear").reshape(h, w, *common)
                large = keys.repeat_interleave(common[0] // h, 0).repeat_interleave(common[1] // w, 1)
            else:
                a, b = h // common[0], w // common[1]
                large = four.reshape(common[0], a, common[1], b, common[0], a, common[1], b).mean((1, 3, 5, 7))
            total[image] += weight * large.reshape(size, size)
        weights += weight
    return total / weights


@pytest.mark.parametrize("common", [(16, 24), (8, 12), (4, 6)])
@pytest.mark.parametrize("block", [1, 4 << 20])
def test_the_streamed_affinity_is_that_of_all_matrices_at_once(common, block, monkeypatch):
    monkeypatch.setattr(self_attention, "BLOCK_BYTES", 40_000 if block == 1 else block)
    pipe = tiny_sd()
    call = {"height": 64, "width": 96, "num_images_per_prompt": 2, "steps": 1}
    grids = {16 * 24: (16, 24), 8 * 12: (8, 12), 4 * 6: (4, 6)}
    wanted = eager(pipe, [2, 3], grids, common, **call)
    own = SelfAttention(grid=common)
    with attach(pipe, own) as run:
        pixels(pipe, **call)
    recording = run[own]
    assert recording.grid == common
    torch.testing.assert_close(recording.means, wanted, rtol=1e-4, atol=1e-6)
    for image in range(2):
        affinity = recording.affinity(image)
        torch.testing.assert_close(affinity, wanted[image] / wanted[image].sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(affinity.sum(1), torch.ones(len(affinity)))


def test_the_common_grid_is_halved_until_it_is_small_enough_and_steps_are_averaged(monkeypatch):
    monkeypatch.setattr(self_attention, "MOST_POSITIONS", 100)
    pipe = tiny_sd()
    found = []
    for steps in (1, 3):
        own = SelfAttention()
        with attach(pipe, own) as run:
            pixels(pipe, steps=steps)
        assert run[own].grid == (8, 8)
        found.append(run[own].means.sum())
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0)


def test_a_window_of_steps_reads_these_alone_and_one_that_no_step_is_in_says_so():
    pipe = tiny_sd()
    every, late, first, never = (SelfAttention(steps=steps) for steps in (None, (0.5, 1.0), [0], [7]))
    with attach(pipe, every, late, first) as run:
        pixels(pipe, steps=2)
    torch.testing.assert_close(run[every].means, (run[first].means + run[late].means) / 2, rtol=1e-4, atol=1e-6)
    assert (run[first].means - run[late].means).abs().max() > 1e-4
    with pytest.warns(UserWarning, match="SelfAttention"), attach(pipe, never) as run:
        pixels(pipe, steps=2)
    for asked in (
        (lambda own: own.affinity()),
        lambda own: own.propagate(torch.ones(4, 4)),
        lambda own: own.seed(0, 0),
    ):
        with pytest.raises(ValueError, match="no attention of the image to itself was seen in this call; name steps="):
            asked(run[never])


def test_propagation_is_a_product_with_the_affinity():
    g = torch.Generator().manual_seed(0)
    recording = SelfAttentionRecording(torch.rand(2, 12, 12, generator=g), (3, 4))
    maps = torch.rand(5, 3, 4, generator=g)
    rows = recording.means[1] / recording.means[1].sum(1, keepdim=True)
    wanted = torch.stack([rows @ (rows @ one.flatten()) for one in maps]).reshape(5, 3, 4)
    torch.testing.assert_close(recording.propagate(maps, image=1, times=2), wanted)
    torch.testing.assert_close(recording.propagate(maps[0], 1), (rows @ maps[0].flatten()).reshape(3, 4))
    first = recording.affinity(0)
    torch.testing.assert_close(recording.seed(0.99, 0.3), first[:, 2 * 4 + 1].reshape(3, 4))  # row 2, column 1
    torch.testing.assert_close(recording.seed(1, 1), first[:, 11].reshape(3, 4))
    coarse = recording.propagate(torch.ones(6, 8))
    torch.testing.assert_close(coarse, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"y=1\.5 must be a finite number from 0 to 1"):
        recording.seed(1.5, 0)
    with pytest.raises(ValueError, match=r"image=2 is out of range; the call made 2 image"):
        recording.affinity(2)
    with pytest.raises(ValueError, match=r"give \[height, width\] or \[n, height, width\]"):
        recording.propagate(torch.ones(4))


def test_the_affinity_of_a_joint_attention_is_that_of_the_image_alone():
    family = families()["sd3"]
    pipe = family.build()
    own, maps = SelfAttention(), HeatMaps()
    with attach(pipe, own, maps) as run:
        family.call(pipe, ["a fox"], guidance=True)
    rows = run[own].affinity().sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert run[own].grid == run[maps].grid
    assert repr(run[own]) == f"SelfAttentionRecording(1 images, {' x '.join(map(str, run[maps].grid))})"


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_what_refines_the_text_alone_is_no_part_of_it(name):
    family = families()[name]
    if not family.available:
        pytest.skip(f"this diffusers has no {family.pipeline}")
    pipe = family.build()
    every, images = SelfAttention(), SelfAttention(layers=["noise_refiner", "transformer.layers"])
    with attach(pipe, every, images) as run:
        family.call(pipe, ["a fox"], guidance=False)
    assert torch.equal(run[every].means, run[images].means)


@pytest.mark.parametrize("common", [None, (2, 3), (12, 20)])
def test_of_a_linear_attention_the_shares_are_those_that_its_values_are_averaged_with(common):
    tiny = families()["sana"]
    pipe, matrices = tiny.build(), []

    def shares(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        q, k = module.to_q(x), module.to_k(x)
        q, k = (t if norm is None else norm(t) for t, norm in ((q, module.norm_q), (k, module.norm_k)))
        q, k, v = (t.double().unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k, module.to_v(x)))
        products = q.clamp(min=0) @ k.clamp(min=0).mT
        p = products / products.sum(-1, keepdim=True).clamp(min=1e-30)
        written = module.to_out[0]((p @ v).transpose(1, 2).flatten(2).float())
        torch.testing.assert_close(written, output, rtol=1e-4, atol=1e-5)  # the model's own averages
        matrices.append(p.mean(1)[tiny.runs(True)[0].index("cond")])

    blocks = pipe.transformer.transformer_blocks
    handles = [block.attn1.register_forward_hook(shares, with_kwargs=True) for block in blocks]
    before = tiny.call(pipe, ["red fox"], guidance=True, size="wide")
    for handle in handles:
        handle.remove()
    own, maps = SelfAttention(grid=common), HeatMaps()
    with attach(pipe, own, maps) as run:
        after = tiny.call(pipe, ["red fox"], guidance=True, size="wide")
    assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    h, w = run[maps].grid
    expected, recording = torch.stack(matrices).mean(0), run[own]
    if common is None:
        common = (h, w)
    for larger, side in (("bilinear", 1), ("nearest-exact", 0)):  # keys, then queries
        moved = expected.movedim(side, -1).reshape(-1, 1, h, w)
        mode = "area" if h >= common[0] and w >= common[1] else larger
        moved = F.interpolate(moved, size=common, mode=mode).flatten(1)
        expected = moved.movedim(-1, side)
    expected = expected / expected.sum(1, keepdim=True)
    assert recording.grid == common
    torch.testing.assert_close(recording.affinity().double(), expected, rtol=1e-4, atol=1e-7)


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def distributions(n, d, seed=0):
    rows = torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 1e-3
    return rows / rows.sum(1, keepdim=True)


def finch_by_hand(rows):
    """Labels of the first grouping: connected by nearest neighbours."""
    plain = rows.tolist()
    n = len(plain)
    close = [min((j for j in range(n) if j != i), key=lambda j: divergence(plain[i], plain[j])) for i in range(n)]
    groups = [{i} for i in range(n)]
    for i, j in enumerate(close):
        a, b = (next(g for g in groups if x in g) for x in (i, j))
        if a is not b:
            groups.remove(b)
            a |= b
    return close, {frozenset(g) for g in groups}


def sets(labels):
    return {frozenset((labels == label).nonzero()[:, 0].tolist()) for label in labels.unique()}


@pytest.mark.parametrize("seed", range(3))
def test_first_neighbours_and_what_they_tie_together_are_those_of_the_definition(seed, monkeypatch):
    monkeypatch.setattr("sparsefeat.attention.clusters.ROWS", 7)
    rows = distributions(40, 9, seed)
    found, distances = nearest(rows)
    close, groups = finch_by_hand(rows)
    assert found.tolist() == close
    wanted = [divergence(rows[i].tolist(), rows[j].tolist()) for i, j in enumerate(close)]
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=1e-9)
    assert sets(tied(found)) == groups


def test_the_partition_is_the_coarsest_with_enough_groups():
    rows = distributions(60, 6, 4)
    _, first = finch_by_hand(rows)
    levels = [first]
    while True:
        members = [sorted(group) for group in levels[-1]]
        members.sort(key=lambda group: group[0])
        means = torch.stack([rows[group].mean(0) for group in members])
        if len(members) < 2:
            break
        _, coarser = finch_by_hand(means / means.sum(1, keepdim=True))
        joined = {frozenset(i for g in group for i in members[g]) for group in coarser}
        if len(joined) == len(members):
            break
        levels.append(joined)
    assert len(levels) > 2
    for level, coarser in itertools.pairwise(levels):
        labels, _ = partition(rows, len(coarser) + 1)
        assert sets(labels) == level


def test_two_patches_and_a_background_are_found_without_labels():
    """A picture of three regions, each of which attends to itself."""
    grid = (8, 10)
    region = torch.zeros(grid, dtype=torch.long)
    region[1:4, 1:4], region[4:7, 5:9] = 1, 2
    flat = region.flatten()
    g = torch.Generator().manual_seed(1)
    means = (flat[:, None] == flat[None, :]).float() + 0.02 * torch.rand(80, 80, generator=g)
    recording = SelfAttentionRecording(means[None], grid)
    every = recording.concepts(fewest=3)
    assert {tuple(mask.flatten().tolist()) for mask in every} == {tuple((flat == k).tolist()) for k in range(3)}
    assert every.sum((1, 2)).tolist() == sorted(every.sum((1, 2)).tolist(), reverse=True)
    found = recording.concepts(foreground=(region > 0).float(), fewest=3)
    assert {tuple(mask.flatten().tolist()) for mask in found} == {tuple((flat == k).tolist()) for k in (1, 2)}
    assert not (found.sum(0) > 1).any()
    with pytest.raises(ValueError, match=r"give one map \[height, width\]"):
        recording.concepts(foreground=torch.ones(2, 3, 4))


def test_groups_are_merged_only_where_they_touch_and_are_alike():
    rows = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.6, 0.4]], dtype=torch.float64)
    groups = torch.eye(4, dtype=torch.bool)
    found = merged(rows, groups, (1, 4), torch.tensor(1e-6, dtype=torch.float64))
    assert sets_of(found) == {frozenset({0, 1}), frozenset({2}), frozenset({3})}


def sets_of(masks):
    return {frozenset(mask.nonzero()[:, 0].tolist()) for mask in masks}


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="condition='both' is not known"):
        SelfAttention(condition="both")
    with pytest.raises(ValueError, match=r"layers=\('nowhere',\) match no self-attention module; there are: unet."):
        attach(tiny_sd(), SelfAttention(layers="nowhere"))
    video = families()["sana_video"].build()
    with pytest.raises(ValueError, match="is a linear attention whose features are not known"):
        attach(video, SelfAttention())  # it rotates what is above the fraction and not what is below
    pipe = tiny_sd()
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"cannot be read: its AttnProcessor does not call .*AttnProcessor2_0"):
        attach(pipe, SelfAttention())
