"""What the embedded pipelines learn from: latents of single drawings and of scenes, with the tokens of their captions.

Encoded once and kept (`build/training/bank.safetensors`), as both pipelines and every run use the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from sparsefeat.assets import emojicanvas, emojiscenes

N_VARIANTS = 6  # of each drawing: as it is, and lightly shifted and scaled
N_SCENES = 40_000
NOTHING = len(emojicanvas.OBJECTS) * len(emojicanvas.STYLES)  # the region that is no drawing's
SINGLE = 0.5  # the share of single drawings in a batch, unless told otherwise
EMPTY, NO_STYLE, NO_OBJECT = 0.10, 0.06, 0.03  # the shares of captions that say less


def _variants(images: Tensor) -> Tensor:
    """float [n, 3, 64, 64] in [-1, 1] to [N_VARIANTS, n, 3, 64, 64], the first as it is."""
    generator = torch.Generator().manual_seed(1)
    made = [images]
    for _ in range(N_VARIANTS - 1):
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / (0.9 + 0.1 * torch.rand(len(images), generator=generator))
        theta[:, :, 2] = (torch.rand(len(images), 2, generator=generator) - 0.5) * (4 * 2 / 64)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        made.append(F.grid_sample(images - 1, grid, align_corners=False) + 1)
    return torch.stack(made)


@torch.no_grad()
def _encoded(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    return torch.cat([vae.encoder(chunk).half() for chunk in images.split(200)])


def _pixels(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_bank(vae_folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """`singles` fp16 [style, object, variant, 4, 16, 16]; `scenes` fp16 [n, 4, 16, 16] in the order of
    `emojiscenes.scenes(N_SCENES)`."""
    vae = AutoencoderTiny.from_pretrained(vae_folder).float().eval().to(device, memory_format=torch.channels_last)
    canvas = emojicanvas.load().on_white()
    singles = _variants(_pixels(list(canvas.reshape(-1, 64, 64, 3))))
    encoded = _encoded(vae, singles.flatten(0, 1).to(device)).unflatten(0, (N_VARIANTS, *canvas.shape[:2]))
    scenes = emojiscenes.scenes(N_SCENES)
    parts = []
    for start in range(0, N_SCENES, 1000):
        drawn = [emojiscenes.draw(scene).image for scene in scenes[start : start + 1000]]
        parts.append(_encoded(vae, _pixels(drawn).to(device)))
    return {"singles": encoded.movedim(0, 2).contiguous().cpu(), "scenes": torch.cat(parts).contiguous().cpu()}


def _coarse(masks: Tensor) -> Tensor:
    """bool [..., 16, 16]: the cells of [..., 64, 64] masks of which more than half is covered."""
    return F.avg_pool2d(masks.flatten(0, -3), 4).unflatten(0, masks.shape[:-2]) > 0.5


def build_regions() -> dict[str, Tensor]:
    """What is drawn in each of the 16x16 cells, for what the bank holds in its order: `singles` uint8 [style, object,
    variant, 16, 16] and `scenes` uint8 [n, 16, 16], `style * objects + object` or NOTHING."""
    masks = torch.from_numpy(emojicanvas.load().masks()).float()
    n_styles, n_objects = masks.shape[:2]
    covered = _variants(1 - 2 * masks.flatten(0, 1)[:, None].expand(-1, 3, -1, -1))[:, :, 0]  # white is +1
    covered = _coarse((1 - covered) / 2).unflatten(1, (n_styles, n_objects)).movedim(0, 2)
    which = torch.arange(NOTHING, dtype=torch.uint8).view(n_styles, n_objects, 1, 1, 1)
    scenes = emojiscenes.scenes(N_SCENES)
    regions = torch.full((N_SCENES, 16, 16), NOTHING, dtype=torch.uint8)
    for region, scene in zip(regions, scenes, strict=True):
        seen = _coarse(torch.from_numpy(emojiscenes.draw(scene).masks))
        for mask, index in zip(seen, scene.objects, strict=True):
            region[mask] = scene.style * n_objects + index
    return {"singles": torch.where(covered, which, NOTHING).to(torch.uint8).contiguous(), "scenes": regions}


@dataclass(frozen=True)
class Batch:
    """`clean` latents fp32 [n, 4, 16, 16]; `tokens` int64 [n, token]; `regions` int64 [n, 16, 16]."""

    clean: Tensor
    tokens: Tensor
    regions: Tensor


@dataclass(frozen=True)
class Bank:
    """Latents and token rows on one device; `batch` draws from them."""

    singles: Tensor  # fp16 [style, object, variant, 4, 16, 16]
    scenes: Tensor  # fp16 [n, 4, 16, 16]
    regions_of_singles: Tensor  # uint8 [style, object, variant, 16, 16]
    regions_of_scenes: Tensor  # uint8 [n, 16, 16]
    full: Tensor  # int64 [style, object, token]
    object_only: Tensor  # [object, token]
    style_only: Tensor  # [style, token]
    empty: Tensor  # [token]
    of_scenes: Tensor  # [n, token]
    of_scenes_without_style: Tensor  # [n, token]

    @staticmethod
    def open(path: Path, vae_folder: Path, tokenizer: CLIPTokenizer, device: str) -> Bank:
        """Read the bank, or build and keep it."""
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(build_bank(vae_folder, device), path)
        of_regions = path.with_name("regions.safetensors")
        if not of_regions.is_file():
            save_file(build_regions(), of_regions)
        latents, regions = load_file(path), load_file(of_regions)
        names, styles = emojicanvas.OBJECTS, emojicanvas.STYLES
        scenes = emojiscenes.scenes(len(latents["scenes"]))

        def tokens(prompts: list[str]) -> Tensor:
            length = tokenizer.model_max_length
            rows = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
            if rows.shape[1] > length:
                raise ValueError(f"a caption has more than {length} tokens: {max(prompts, key=len)!r}")
            return rows

        parts = {
            **latents,
            **{f"regions_of_{name}": value for name, value in regions.items()},
            "full": tokens([emojicanvas.prompt(n, s) for s in styles for n in names]).unflatten(0, (len(styles), -1)),
            "object_only": tokens([emojicanvas.prompt(n) for n in names]),
            "style_only": tokens([emojicanvas.prompt(None, s) for s in styles]),
            "empty": tokens([""])[0],
            "of_scenes": tokens([scene.caption for scene in scenes]),
            "of_scenes_without_style": tokens([emojiscenes.caption(s.objects, None, s.relation) for s in scenes]),
        }
        return Bank(**{name: value.to(device) for name, value in parts.items()})

    def batch(self, n: int, single: float = SINGLE) -> Batch:
        """`n` drawings, the single ones first; `single`: their share."""
        n_single = round(n * single)
        device = self.scenes.device

        def one_of(count: int, size: int) -> Tensor:
            return torch.randint(count, (size,), device=device)

        s, o = one_of(self.singles.shape[0], n_single), one_of(self.singles.shape[1], n_single)
        picked = one_of(len(self.scenes), n - n_single)
        variant = one_of(N_VARIANTS, n_single)
        clean = torch.cat([self.singles[s, o, variant], self.scenes[picked]])
        regions = torch.cat([self.regions_of_singles[s, o, variant], self.regions_of_scenes[picked]])
        says = torch.rand(n_single, 1, device=device)
        of_single = torch.where(says < NO_STYLE + NO_OBJECT, self.object_only[o], self.full[s, o])
        of_single = torch.where(says < NO_OBJECT, self.style_only[s], of_single)
        says = torch.rand(n - n_single, 1, device=device)
        scene = torch.where(says < NO_STYLE, self.of_scenes_without_style[picked], self.of_scenes[picked])
        tokens = torch.cat([of_single, scene])
        tokens = torch.where(torch.rand(n, 1, device=device) < EMPTY, self.empty, tokens)
        return Batch(clean.float(), tokens, regions.long())
