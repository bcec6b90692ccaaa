"""DF-RISE: which parts of the noisy latents a prediction rests on (arXiv 2402.10404; only its abstract is public).

With random masks m_k (cells x cells of 0 and 1, enlarged bilinearly), fresh noise xi_k, and eps the prediction of one step,

    saliency = sum_k m_k cos(eps(x_t m_k + xi_k (1 - m_k)), eps(x_t)) / sum_k m_k

is high where keeping the latents keeps the prediction. Assumed, as the formulas are not public: the cosine, and noise of the
latents' own spread in the place of what is masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import number, whole
from sparsefeat.attribution.components import prompts_of
from sparsefeat.attribution.gradients import EachStep, denoiser_name, predicted
from sparsefeat.pipeline import Context, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.noising import LATENTS
from sparsefeat.pipeline.step_window import Steps, StepWindow


class _Rise(EachStep):
    def __init__(self, pipe: Any, masks: int, cells: int, share: float, window: StepWindow, seed: int):
        super().__init__(denoiser_name(pipe))
        root = components(pipe)[self.root_name]
        self.family, self.root = family_of(root), getattr(root, "_orig_mod", root)
        self.masks, self.cells, self.share, self.window = masks, cells, share, window
        self.generator = torch.Generator().manual_seed(seed)
        self.maps: dict[int, Tensor] = {}

    @torch.no_grad()
    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if not self.window.contains(context):
            return
        name = next(one for one in LATENTS if one in given)
        x = given[name]
        grid = x.shape[2:] if x.ndim == 4 else self.family.image_grid(self.root, given) if x.ndim == 3 else None
        if grid is None or len(grid) != 2 or (x.ndim == 3 and grid[0] * grid[1] != x.shape[1]):
            raise ValueError(
                f"the latents {list(x.shape)} of {type(self.root).__name__} are on no grid of two sides; DF-RISE maps images."
            )
        plain = predicted(self.root, given).flatten()
        height, width = grid
        total, weight = torch.zeros(2, height, width, dtype=torch.float32)
        for _ in range(self.masks):
            cells = (
                torch.rand(1, 1, self.cells, self.cells, generator=self.generator, dtype=torch.float32) < self.share
            ).float()
            mask = F.interpolate(cells, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
            noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float32).to(x) * x.float().std().to(x)
            over = (mask if x.ndim == 4 else mask.reshape(-1, 1)).to(x)
            said = predicted(self.root, {**given, name: x * over + noise * (1 - over)}).flatten()
            total += mask * float(F.cosine_similarity(said, plain, dim=0))
            weight += mask
        assert context.step is not None
        self.maps[context.step] = torch.where(weight > 0, total / weight, 0.0)


def df_rise(
    pipe: Any,
    prompt: str,
    *,
    n_masks: int = 64,
    cells: int = 8,
    share: float = 0.5,
    steps: Steps = None,
    seed: int = 0,
    **call: Any,
) -> dict[int, Tensor]:
    """Step -> saliency [h, w] of the latents' grid, for one picture of the prompt.

    Args:
        n_masks: runs of the denoiser a step. cells: of a side of a mask. share: of the cells that are kept.
        steps: window of steps as in `Steer`; every step costs `n_masks` runs.
        seed: of the picture and of the masks. call: arguments of the pipeline.

    Raises:
        ValueError: an argument that cannot be, by its name; none of the steps that ran is among `steps`. TypeError: an
            argument that the pipeline's call does not take.
    """
    (text,) = prompts_of("prompt", [prompt])
    whole("n_masks", n_masks)
    whole("cells", cells, 2)
    number("share", share, 0, 1, above=True)
    whole("seed", seed, 0)
    window = StepWindow.parse(steps)
    check_call(pipe, call, df_rise, "output_type")
    rise = _Rise(pipe, n_masks, cells, share, window, seed)
    with attach(pipe, rise):
        pipe(text, generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
    if not rise.maps:
        raise ValueError(f"none of the steps that ran is among steps={steps!r}; leave it out or choose others.")
    return rise.maps
