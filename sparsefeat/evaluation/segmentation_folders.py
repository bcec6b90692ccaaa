"""Annotated images from folders that a user has: ImageNet-Segmentation, PASCAL VOC and COCO-Gen.

    from sparsefeat.evaluation.segmentation import PASCAL_VOC
    scores, (iou, interval) = PASCAL_VOC.evaluate(pascal_voc("VOCdevkit/VOC2012"), maps_of)

`maps_of(annotated)` gives a map for each of its words [words, h, w], from whatever made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsefeat.evaluation.segmentation import Annotated

IGNORED = 255
"""The value of a pixel that does not count, in the masks of PASCAL VOC and ImageNet-Segmentation."""

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse",
    "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
"""As a prompt says them, in the order of their values in the masks, from 1."""


def imagenet_segmentation(folder: Path | str) -> Iterator[Annotated]:
    """ImageNet-Segmentation, written out of its `gtsegs_ijcv.mat` as files: one object a picture.

    `classes.txt` has a line `NAME class name` for every picture `images/NAME.jpg` (or .jpeg, .png) and its mask
    `masks/NAME.png`: 0 for the background, 1 for the object, 255 for what does not count. Prompts are "a class name".
    """
    folder = Path(folder)
    for line in _lines(folder / "classes.txt", "one `NAME class name` a picture"):
        name, _, word = line.partition(" ")
        if not word.strip():
            raise ValueError(f"{folder / 'classes.txt'} has the line {line!r}; write `NAME class name`")
        labels = _labels(folder / "masks" / f"{name}.png")
        values = set(labels.unique().tolist())
        if 1 not in values or not values <= {0, 1, IGNORED}:
            raise ValueError(
                f"masks/{name}.png holds the values {sorted(values)}; write 0 for background, 1 for the object and 255 for "
                "what does not count"
            )
        image = _image(folder / "images", name)
        yield _annotated(name, image, (word.strip(),), labels[None] == 1, labels == IGNORED)


def pascal_voc(folder: Path | str, split: str = "val", single_class: bool = True) -> Iterator[Annotated]:
    """PASCAL VOC's segmentation set (a folder such as `VOCdevkit/VOC2012`), a mask a class.

    single_class: only pictures with one class, which ConceptAttention's table is of; otherwise every picture, with each
    of its classes as a word. Prompts name the classes: "a dog", "a dog and a person".
    """
    folder = Path(folder)
    for name in _lines(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "a picture's name a line"):
        labels = _labels(folder / "SegmentationClass" / f"{name}.png")
        present = [value for value in labels.unique().tolist() if value not in (0, IGNORED)]
        if present and max(present) > len(VOC_CLASSES):
            raise ValueError(
                f"SegmentationClass/{name}.png holds the value {max(present)}; there are {len(VOC_CLASSES)} classes"
            )
        if not present or (single_class and len(present) > 1):
            continue
        masks = torch.stack([labels == value for value in present])
        words = tuple(VOC_CLASSES[value - 1] for value in present)
        yield _annotated(name, _image(folder / "JPEGImages", name), words, masks, labels == IGNORED)


def coco_gen(folder: Path | str) -> Iterator[Annotated]:
    """COCO-Gen and Unreal-Gen (DAAM): generated pictures whose nouns were cut out by hand.

    Every folder below `folder` with a `prompt.txt` is one picture, `output.png`; `WORD.gt.png` beside it is the noun's
    mask, opaque where the noun is. Words without a file have no mask and are not counted.
    """
    folder = Path(folder)
    found = sorted(folder.rglob("prompt.txt"))
    if not found:
        raise FileNotFoundError(f"no prompt.txt in or below {folder}; give the folder that COCO-Gen was unpacked to")
    for prompt in found:
        here = prompt.parent
        image = _image(here, "output")
        words, masks = [], []
        for file in sorted(here.glob("*.gt.png")):
            cut = Image.open(file)
            if "A" not in cut.getbands():
                raise ValueError(f"{file} has no alpha channel (mode {cut.mode}); a noun's mask is where it is opaque")
            mask = torch.from_numpy(np.array(cut.getchannel("A")) > 0)
            if mask.any():
                words.append(file.name.removesuffix(".gt.png"))
                masks.append(mask)
        if words:
            name = str(here.relative_to(folder))
            nothing = torch.zeros_like(masks[0])
            text = prompt.read_text(encoding="utf-8-sig").strip()
            yield Annotated(name, image, tuple(words), torch.stack(masks), nothing, text)


def _annotated(name: str, image: Image.Image, words: tuple[str, ...], masks: Tensor, ignored: Tensor) -> Annotated:
    if (image.height, image.width) != tuple(ignored.shape):
        raise ValueError(
            f"{name}: the picture is {image.width} x {image.height} and its mask {ignored.shape[1]} x {ignored.shape[0]}; "
            "they belong to different pictures"
        )
    prompt = " and ".join(f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in words)
    return Annotated(name, image, words, masks, ignored, prompt)


def _lines(path: Path, holding: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; it lists the set, {holding}")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _labels(path: Path) -> Tensor:
    """A mask's values, int64 [h, w]; of one with a palette the indices, not the colours."""
    if not path.is_file():
        raise FileNotFoundError(f"no mask {path}; each listed picture has one")
    mask = Image.open(path)
    if mask.mode not in ("P", "L", "1", "I;16", "I"):
        raise ValueError(f"{path} is a picture of mode {mask.mode}; a mask has one value a pixel (mode P or L)")
    return torch.from_numpy(np.array(mask).astype(np.int64))


def _image(folder: Path, name: str) -> Image.Image:
    for suffix in (".jpg", ".jpeg", ".JPEG", ".png"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return Image.open(path).convert("RGB")
    raise FileNotFoundError(f"no picture {name}.jpg, .jpeg or .png in {folder}; each listed mask has one")
