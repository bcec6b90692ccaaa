"""The pixel judge: a small dense CNN that says of every pixel which EmojiCanvas object it belongs to, or none.

It gives generated images masks, against which maps are measured. `tools/train_pixel_judge.py` trains it on real scenes
and drawings only; `report.json` beside its weights says how well it does on scenes of pairs it never saw together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.judge import FOLDER as JUDGE
from sparsefeat.evaluation.judge import as_tensor

FOLDER = JUDGE.parent / "pixel_judge"

BACKGROUND = len(emojicanvas.OBJECTS)
"""The label of a pixel that belongs to no object; objects have their index in `emojicanvas.OBJECTS`."""


def _layer(n_in: int, n_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
    )


class PixelJudge(nn.Module):
    """Images [n, 3, 64, 64] in [-1, 1] to logits [n, 51, 64, 64]: the fifty objects, then the background."""

    def __init__(self) -> None:
        super().__init__()
        self.fine: nn.Sequential = _layer(3, 16)
        self.middle: nn.Sequential = nn.Sequential(_layer(16, 48, 2), _layer(48, 48))
        self.quarter: nn.Sequential = nn.Sequential(_layer(48, 96, 2), _layer(96, 96), _layer(96, 96, dilation=2))
        self.eighth: nn.Sequential = nn.Sequential(_layer(96, 128, 2), _layer(128, 128))
        self.up_quarter: nn.Sequential = _layer(128 + 96, 96)
        self.up_middle: nn.Sequential = _layer(96 + 48, 48)
        self.up_fine: nn.Sequential = _layer(48 + 16, 32)
        self.labels: nn.Conv2d = nn.Conv2d(32, BACKGROUND + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        middle = self.middle(fine)
        quarter = self.quarter(middle)
        x = self.eighth(quarter)
        for skip, layer in ((quarter, self.up_quarter), (middle, self.up_middle), (fine, self.up_fine)):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.labels(x)


def load_pixel_judge(folder: Path | str = FOLDER) -> PixelJudge:
    """The embedded pixel judge, in fp32 and eval mode. Raises FileNotFoundError with the remedy."""
    path = Path(folder) / "pixel_judge.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no pixel judge at {path}; train it with `python tools/train_pixel_judge.py`")
    judge = PixelJudge()
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    judge.load_state_dict(state, strict=True)
    return judge.eval()


def pixel_judge_report(folder: Path | str = FOLDER) -> dict[str, Any]:
    """What `tools/train_pixel_judge.py` measured, as shares of 1."""
    return json.loads((Path(folder) / "report.json").read_text())


@torch.no_grad()
def label_pixels(judge: PixelJudge, images: list[Image.Image] | np.ndarray | Tensor, batch: int = 100) -> Tensor:
    """int64 [n, 64, 64]: each pixel's most likely object, or BACKGROUND. Images as `judge_images` takes them."""
    return torch.cat([judge(chunk).argmax(1) for chunk in as_tensor(images).split(batch)])


def objects_drawn(labels: Tensor, least: float = 0.01) -> Tensor:
    """bool [n, object]: which objects cover at least the share `least` of each image. `labels` from `label_pixels`."""
    counts = torch.stack([torch.bincount(row.flatten(), minlength=BACKGROUND + 1) for row in labels])
    return counts[:, :BACKGROUND] >= least * labels[0].numel()


def labels_of(masks: np.ndarray | Tensor, objects: tuple[int, ...]) -> Tensor:
    """The true labels of a scene: masks float [n, h, w] of `objects` to int64 [h, w].

    A pixel belongs to whatever covers the most of it, the background included.
    """
    masks = torch.as_tensor(masks)
    shares = torch.cat([masks, 1 - masks.sum(0, keepdim=True)])
    return torch.tensor([*objects, BACKGROUND])[shares.argmax(0)]


def mean_iou(predicted: Tensor, true: Tensor) -> float:
    """Intersection over union, averaged over the labels that occur in `true`; all pixels of all images together."""
    n = BACKGROUND + 1
    counts = torch.bincount(true.flatten() * n + predicted.flatten(), minlength=n * n).view(n, n).double()
    both = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - both
    return (both / union)[counts.sum(1) > 0].mean().item()
