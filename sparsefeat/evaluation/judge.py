"""The judge: a small CNN that says which object and which style an EmojiCanvas image shows.

It plays the part of UnlearnCanvas' two ViT classifiers: object accuracy, style accuracy, and features for a Fréchet
distance. `tools/train_judge.py` trains it on real drawings only, never on an image that the pipeline generated;
`report.json` beside its weights says how far it can be trusted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsefeat.assets import emojicanvas

FOLDER = Path(emojicanvas.__file__).parent / "judge"


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut; halves the resolution."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.body: nn.Sequential = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut: nn.Sequential = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(n_in, n_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Judge(nn.Module):
    """Images [n, 3, 64, 64] in [-1, 1] to features [n, 160], object logits and style logits."""

    def __init__(self, n_objects: int, n_styles: int) -> None:
        super().__init__()
        self.stem: nn.Sequential = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.blocks: nn.Sequential = nn.Sequential(Residual(32, 64), Residual(64, 160))
        self.object_head: nn.Linear = nn.Linear(160, n_objects)
        self.style_head: nn.Linear = nn.Linear(160, n_styles)

    def features(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.object_head(features), self.style_head(features)


@dataclass(frozen=True)
class Verdicts:
    """`objects` and `styles` int64 [n]: indices into EmojiCanvas' names and styles; `features` float32 [n, 160]."""

    objects: Tensor
    styles: Tensor
    features: Tensor


def as_tensor(images: list[Image.Image] | np.ndarray | Tensor) -> Tensor:
    """PIL images, uint8 [n, h, w, 3], or float [n, 3, h, w] in [0, 1], to float [n, 3, 64, 64] in [-1, 1]."""
    if isinstance(images, Image.Image):
        raise ValueError("images is one image; give a list, [image].")
    if isinstance(images, Tensor):
        tensor = images.float() * 2 - 1
    else:
        array = images if isinstance(images, np.ndarray) else np.stack([np.asarray(i.convert("RGB")) for i in images])
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    if tensor.shape[-2:] != (64, 64):
        tensor = nn.functional.interpolate(tensor, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    return tensor


@torch.no_grad()
def judge_images(judge: Judge, images: list[Image.Image] | np.ndarray | Tensor, batch: int = 256) -> Verdicts:
    """The judge's most likely object and style of every image, and its features."""
    parts = []
    for chunk in as_tensor(images).split(batch):
        features = judge.features(chunk)
        parts.append((judge.object_head(features).argmax(1), judge.style_head(features).argmax(1), features))
    objects, styles, features = (torch.cat(column) for column in zip(*parts, strict=True))
    return Verdicts(objects, styles, features)


@torch.no_grad()
def shares(judge: Judge, verdicts: Verdicts) -> tuple[Tensor, Tensor]:
    """How sure the judge is of each object and of each style: [n, objects] and [n, styles], each row adds up to 1."""
    return judge.object_head(verdicts.features).softmax(1), judge.style_head(verdicts.features).softmax(1)


@torch.no_grad()
def objects_present(judge: Judge, images: list[Image.Image] | np.ndarray | Tensor, batch: int = 256) -> Tensor:
    """bool [n, object]: which objects each image shows, as many as there are; for scenes."""
    return torch.cat([judge(chunk)[0] > 0 for chunk in as_tensor(images).split(batch)])


def load_judge(folder: Path | str = FOLDER) -> Judge:
    """The embedded judge, in fp32 and eval mode."""
    path = Path(folder) / "judge.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no judge at {path}; train it with `python tools/train_judge.py`")
    judge = Judge(len(emojicanvas.OBJECTS), len(emojicanvas.STYLES))
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items() if value.dim()}, strict=False)
    return judge.eval()


def judge_report(folder: Path | str = FOLDER) -> dict[str, Any]:
    """What `tools/train_judge.py` measured: accuracies as shares of 1."""
    return json.loads((Path(folder) / "report.json").read_text())
