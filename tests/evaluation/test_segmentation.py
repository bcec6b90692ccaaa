"""Segmentation scores against independent derivations, and the published protocols on folders made here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.evaluation.segmentation import (
    COCO_GEN,
    IMAGENET_SEGMENTATION,
    PASCAL_VOC,
    Segmentation,
    average_precision,
    downsampled_and_back,
)
from sparsefeat.evaluation.segmentation_folders import coco_gen, imagenet_segmentation, pascal_voc


def by_hand(pairs, threshold, both_classes=False):
    """Pixel by pixel, in plain Python: accuracy, mIoU, mAP, pointing."""
    right = total = 0
    sets = [set(), set(), set(), set()]  # found, true, not found, not true
    precisions, hits = [], []
    for number, (values, mask, ignored) in enumerate(pairs):
        low, high = min(map(min, values)), max(map(max, values))
        scaled = [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in values]
        mean = sum(map(sum, scaled)) / sum(map(len, scaled))
        limit = mean if threshold == "mean" else threshold
        scores, highest = [], []
        best = max(v for y, row in enumerate(scaled) for x, v in enumerate(row) if not ignored[y][x])
        for y, row in enumerate(scaled):
            for x, v in enumerate(row):
                if ignored[y][x]:
                    continue
                total += 1
                right += (v > limit) == mask[y][x]
                sets[0 if v > limit else 2].add((number, y, x))
                sets[1 if mask[y][x] else 3].add((number, y, x))
                scores.append((v, mask[y][x]))
                if both_classes:
                    scores.append((1 - v, not mask[y][x]))
                if v == best:
                    highest.append(mask[y][x])
        precisions.append(precision_by_hand(scores))
        hits.append(sum(highest) / len(highest))
    ious = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in ((0, 1), (2, 3))]
    n = len(pairs)
    return right / total, sum(ious) / 2, sum(precisions) / n, sum(hits) / n


def precision_by_hand(scores):
    """Sum over distinct scores of precision there times the recall that it adds."""
    total, area, before = sum(true for _, true in scores), 0.0, 0
    for limit in sorted({v for v, _ in scores}, reverse=True):
        kept = [true for v, true in scores if v >= limit]
        area += (sum(kept) - before) / total * sum(kept) / len(kept)
        before = sum(kept)
    return area


def problem(seed=0, n=3, h=5, w=7):
    g = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n):
        values = torch.randint(6, (h, w), generator=g).double()  # many equal values
        mask = torch.rand(h, w, generator=g) < 0.4
        ignored = torch.rand(h, w, generator=g) < 0.2
        mask[0, 0], ignored[0, 0] = True, False
        pairs.append((values, mask, ignored))
    return pairs


@pytest.mark.parametrize("both_classes", [False, True])
@pytest.mark.parametrize("threshold", ["mean", 0.3, 0.75])
def test_scores_are_those_counted_pixel_by_pixel(threshold, both_classes):
    pairs = problem()
    counted = Segmentation((0.5, threshold), both_classes)
    for pair in pairs:
        counted.add(*pair)
    scores = counted.scores(threshold)
    wanted = by_hand([tuple(t.tolist() for t in pair) for pair in pairs], threshold, both_classes)
    assert (scores.accuracy, scores.miou, scores.map, scores.pointing) == pytest.approx(wanted)
    assert scores.n == 3
    with pytest.raises(ValueError, match=r"threshold=0.9 was not counted; these were"):
        counted.scores(0.9)


def test_a_perfect_map_scores_one_and_its_inverse_zero():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    right, wrong = Segmentation(), Segmentation()
    right.add(mask.float() * 3 + 1, mask)
    wrong.add(-mask.float(), mask)
    assert right.scores() == pytest.approx(right.scores())
    assert [right.scores().accuracy, right.scores().miou, right.scores().map, right.scores().pointing] == [1, 1, 1, 1]
    assert [wrong.scores().accuracy, wrong.scores().miou, wrong.scores().pointing] == [0, 0, 0]


def test_a_constant_map_has_the_masks_share_as_precision():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, :3] = True
    counted = Segmentation()
    counted.add(torch.ones(4, 5), mask)
    assert counted.scores().map == pytest.approx(3 / 20)
    assert counted.scores().pointing == pytest.approx(3 / 20)  # every pixel is the highest
    assert counted.scores().accuracy == pytest.approx(17 / 20)  # nothing exceeds the mean


def test_average_precision_is_that_of_sweeping_every_score():
    g = torch.Generator().manual_seed(2)
    for levels in (2, 9, 1000):
        scores = torch.randint(levels, (60,), generator=g) / levels
        true = torch.rand(60, generator=g) < 0.3
        wanted = precision_by_hand(list(zip(scores.tolist(), true.tolist(), strict=True)))
        assert average_precision(scores, true) == pytest.approx(wanted)


def test_pointing_forgives_a_miss_within_its_tolerance():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 4] = True
    values = torch.zeros(9, 9)
    values[1, 0] = 1  # 3 rows and 4 columns away: 5 pixels
    for tolerance, hit in ((0, 0), (4.9, 0), (5, 1)):
        counted = Segmentation(tolerance=tolerance)
        counted.add(values, mask)
        assert counted.scores().pointing == hit


def test_the_best_threshold_is_the_one_with_the_highest_miou():
    pairs = problem(4)
    counted = Segmentation((0.1, 0.35, 0.5, 0.9, "mean"))
    for pair in pairs:
        counted.add(*pair)
    plain = [tuple(t.tolist() for t in pair) for pair in pairs]
    assert counted.best() == max(counted.thresholds, key=lambda one: by_hand(plain, one)[1])


def test_the_oracle_is_the_mask_averaged_to_the_grid_and_enlarged():
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1
    mask[:2, 4:6] = 1
    small = mask.unflatten(0, (2, 4)).unflatten(2, (2, 4)).mean((1, 3))  # averages of 4 x 4 pixels
    assert small.tolist() == [[1, 0.25], [0, 0]]
    wanted = torch.nn.functional.interpolate(small[None, None], size=(8, 8), mode="bicubic")[0, 0]
    torch.testing.assert_close(downsampled_and_back(mask, (2, 2)), wanted)
    torch.testing.assert_close(downsampled_and_back(mask, (8, 8)), mask)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": torch.zeros(3, 4)}, r"values \[3, 4\] and mask \[4, 4\] must be one \[h, w\]"),
        ({"mask": torch.ones(4, 4)}, "mask must be bool"),
        ({"values": torch.full((4, 4), torch.nan)}, "NaN or infinity"),
        ({"mask": torch.zeros(4, 4, dtype=torch.bool)}, "mask is nowhere true"),
        ({"ignored": torch.ones(4, 4, dtype=torch.bool)}, "mask is nowhere true"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, said):
    given = {"values": torch.rand(4, 4), "mask": torch.ones(4, 4, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=said):
        Segmentation().add(**given)
    with pytest.raises(ValueError, match='numbers from 0 to below 1, or "mean"'):
        Segmentation((1.5,))
    with pytest.raises(ValueError, match="no map was counted"):
        Segmentation().scores()


# ------------------------------------------------------------------------------------------------------- the folders


def labelled(seed, h, w, values):
    g = np.random.default_rng(seed)
    labels = g.choice(values, (h, w)).astype(np.uint8)
    labels[: h // 2, : w // 2] = values[1]
    return labels


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode == "P":
        picture = Image.fromarray(array, "L").convert("P")
        picture.putdata(array.flatten().tolist())
        picture.putpalette([(7 * i) % 256 for i in range(768)])
    picture.save(path)


def test_imagenet_segmentation_reads_pictures_masks_and_classes(tmp_path):
    masks = {"n01_a": labelled(0, 30, 40, [0, 1, 255]), "n02_b": labelled(1, 24, 20, [0, 1])}
    for name, labels in masks.items():
        save(tmp_path / "masks" / f"{name}.png", labels)
        save(tmp_path / "images" / f"{name}.jpg", np.full((*labels.shape, 3), 90, np.uint8))
    (tmp_path / "classes.txt").write_text("n01_a tabby cat\nn02_b owl\n")
    found = list(imagenet_segmentation(tmp_path))
    assert [(one.name, one.words, one.prompt) for one in found] == [
        ("n01_a", ("tabby cat",), "a tabby cat"),
        ("n02_b", ("owl",), "an owl"),
    ]
    for one, labels in zip(found, masks.values(), strict=True):
        assert one.masks[0].tolist() == (labels == 1).tolist()
        assert one.ignored.tolist() == (labels == 255).tolist()

    # 7 x 7 maps, nearest to 224 x 224, threshold their mean, precision over both classes.
    maps = {one.name: torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(len(one.name))) for one in found}
    scores, _ = IMAGENET_SEGMENTATION.evaluate(found, lambda one: maps[one.name])
    pairs = []
    for name, labels in masks.items():
        h, w = labels.shape
        rows, columns = (np.floor((np.arange(224) + 0.5) * n / 224).astype(int) for n in (h, w))
        truth = labels[rows][:, columns]
        large = maps[name][0].double().repeat_interleave(32, 0).repeat_interleave(32, 1)
        pairs.append((large.tolist(), (truth == 1).tolist(), (truth == 255).tolist()))
    accuracy, miou, precision, _ = by_hand_fast(pairs)
    assert (scores.accuracy, scores.miou, scores.map) == pytest.approx((accuracy, miou, precision))

    save(tmp_path / "masks" / "n02_b.png", labelled(1, 24, 20, [0, 255]))
    with pytest.raises(ValueError, match=r"masks/n02_b.png holds the values \[0, 255\]; write 0 for background, 1 for"):
        list(imagenet_segmentation(tmp_path))
    (tmp_path / "classes.txt").write_text("n01_a\n")
    with pytest.raises(ValueError, match="write `NAME class name`"):
        list(imagenet_segmentation(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"classes\.txt; it lists the set"):
        list(imagenet_segmentation(tmp_path / "elsewhere"))


def by_hand_fast(pairs):
    """As `by_hand`, at the mean and over both classes, with numpy's sorting for the precision."""
    right = total = 0
    both, either = np.zeros(2), np.zeros(2)
    precisions = []
    for values, mask, ignored in pairs:
        values, mask, counted = np.array(values), np.array(mask), ~np.array(ignored)
        scaled = (values - values.min()) / (values.max() - values.min())
        found = scaled > scaled.mean()
        right += (found == mask)[counted].sum()
        total += counted.sum()
        for which, (a, b) in enumerate(((found, mask), (~found, ~mask))):
            both[which] += (a & b)[counted].sum()
            either[which] += (a | b)[counted].sum()
        scores = np.concatenate([scaled[counted], 1 - scaled[counted]])
        true = np.concatenate([mask[counted], ~mask[counted]])
        precision, before, area = 0.0, 0, 0.0
        for limit in np.unique(scores)[::-1]:
            kept = true[scores >= limit]
            area += (kept.sum() - before) / true.sum() * kept.mean()
            before = kept.sum()
        precisions.append(area)
    return right / total, (both / either).mean(), np.mean(precisions), precision


def test_pascal_voc_reads_its_own_layout_and_leaves_border_pixels_out(tmp_path):
    masks = {
        "one": labelled(0, 20, 30, [0, 8, 255]),  # a cat
        "two": labelled(1, 20, 30, [0, 12, 15]),  # a dog and a person
        "none": np.full((20, 30), 255, np.uint8),
    }
    for name, labels in masks.items():
        save(tmp_path / "SegmentationClass" / f"{name}.png", labels, "P")
        save(tmp_path / "JPEGImages" / f"{name}.jpg", np.full((20, 30, 3), 120, np.uint8))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("one\ntwo\nnone\n")
    single = list(pascal_voc(tmp_path))
    assert [(one.name, one.words, one.prompt) for one in single] == [("one", ("cat",), "a cat")]
    assert single[0].masks[0].tolist() == (masks["one"] == 8).tolist()
    assert single[0].ignored.tolist() == (masks["one"] == 255).tolist()
    every = list(pascal_voc(tmp_path, single_class=False))
    assert [one.words for one in every] == [("cat",), ("dog", "person")]
    assert every[1].masks[1].tolist() == (masks["two"] == 15).tolist()
    assert every[1].prompt == "a dog and a person"

    perfect, _ = PASCAL_VOC.evaluate(every, lambda one: one.masks.float())
    assert (perfect.accuracy, perfect.miou, perfect.map) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"maps_of gave \[1, 4, 4\] for two; give one map for each of dog, person"):
        PASCAL_VOC.evaluate(every[1:], lambda one: torch.zeros(1, 4, 4))
    save(tmp_path / "SegmentationClass" / "one.png", labelled(0, 10, 30, [0, 8]), "P")
    with pytest.raises(ValueError, match="the picture is 30 x 20 and its mask 30 x 10"):
        list(pascal_voc(tmp_path))
    save(tmp_path / "SegmentationClass" / "one.png", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="mode RGB; a mask has one value a pixel"):
        list(pascal_voc(tmp_path))


def test_coco_gen_reads_cut_outs_and_reports_the_mean_iou_with_its_interval(tmp_path):
    truths = {}
    for number, words in enumerate((("dog", "red ball"), ("cat",))):
        here = tmp_path / str(number)
        here.mkdir()
        (here / "prompt.txt").write_text(f"a photo of {words[0]}\n")
        save(here / "output.png", np.full((16, 12, 3), 50, np.uint8))
        for word in words:
            cut = np.zeros((16, 12, 4), np.uint8)
            cut[number : number + 6, 2:9, 3] = 200
            truths[number, word] = cut[..., 3] > 0
            save(here / f"{word}.gt.png", cut)
        save(here / "nowhere.gt.png", np.zeros((16, 12, 4), np.uint8))
    found = list(coco_gen(tmp_path))
    assert [(one.name, one.words, one.prompt) for one in found] == [
        ("0", ("dog", "red ball"), "a photo of dog"),
        ("1", ("cat",), "a photo of cat"),
    ]
    maps = {one.name: torch.rand(len(one.words), 16, 12, generator=torch.Generator().manual_seed(5)) for one in found}
    _, (mean, interval) = COCO_GEN.evaluate(found, lambda one: maps[one.name])
    ious = []
    for one in found:
        for values, word in zip(maps[one.name].numpy(), one.words, strict=True):
            prediction = (values - values.min()) / (values.max() - values.min()) > 0.4
            truth = truths[int(one.name), word]
            ious.append((prediction & truth).sum() / (prediction | truth).sum())
    assert mean == pytest.approx(np.mean(ious))
    assert interval == pytest.approx(1.96 * np.std(ious, ddof=1) / math.sqrt(len(ious)))
    save(tmp_path / "0" / "dog.gt.png", np.zeros((16, 12, 3), np.uint8))
    with pytest.raises(ValueError, match="has no alpha channel"):
        list(coco_gen(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no prompt\.txt"):
        list(coco_gen(tmp_path / "1" / "none"))
