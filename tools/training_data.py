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
SINGLE = 0.5  # the share of single drawings in a batch
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


@dataclass(frozen=True)
class Bank:
    """Latents and token rows on one device; `batch` draws from them."""

    singles: Tensor  # fp16 [style, object, variant, 4, 16, 16]
    scenes: Tensor  # fp16 [n, 4, 16, 16]
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
        latents = load_file(path)
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
            "full": tokens([emojicanvas.prompt(n, s) for s in styles for n in names]).unflatten(0, (len(styles), -1)),
            "object_only": tokens([emojicanvas.prompt(n) for n in names]),
            "style_only": tokens([emojicanvas.prompt(None, s) for s in styles]),
            "empty": tokens([""])[0],
            "of_scenes": tokens([scene.caption for scene in scenes]),
            "of_scenes_without_style": tokens([emojiscenes.caption(s.objects, None, s.relation) for s in scenes]),
        }
        return Bank(**{name: value.to(device) for name, value in parts.items()})

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` clean latents fp32 [n, 4, 16, 16] and token rows int64 [n, token], the single drawings first."""
        n_single = round(n * SINGLE)
        device = self.scenes.device

        def one_of(count: int, size: int) -> Tensor:
            return torch.randint(count, (size,), device=device)

        s, o = one_of(self.singles.shape[0], n_single), one_of(self.singles.shape[1], n_single)
        picked = one_of(len(self.scenes), n - n_single)
        clean = torch.cat([self.singles[s, o, one_of(N_VARIANTS, n_single)], self.scenes[picked]])
        says = torch.rand(n_single, 1, device=device)
        single = torch.where(says < NO_STYLE + NO_OBJECT, self.object_only[o], self.full[s, o])
        single = torch.where(says < NO_OBJECT, self.style_only[s], single)
        says = torch.rand(n - n_single, 1, device=device)
        scene = torch.where(says < NO_STYLE, self.of_scenes_without_style[picked], self.of_scenes[picked])
        tokens = torch.cat([single, scene])
        tokens = torch.where(torch.rand(n, 1, device=device) < EMPTY, self.empty, tokens)
        return clean.float(), tokens
