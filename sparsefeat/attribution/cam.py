"""DF-CAM: where in a block the activations are that a prediction rests on (arXiv 2402.10404; only its abstract is public).

Grad-CAM of a denoiser. With A the block's activations at one step, [positions, channels], and J a number of the prediction,

    saliency = relu( sum over channels c of A_c mean over positions of dJ/dA_c )

Assumed, as the formulas are not public: J = |eps|, the prediction's norm, where no other is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import taking_gradients, whole
from sparsefeat.attribution.block import Block, finite_gradient
from sparsefeat.attribution.components import prompts_of
from sparsefeat.attribution.gradients import EachStep, predicted
from sparsefeat.attribution.latents import Objective
from sparsefeat.pipeline import Context, Hookpoint, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.instrument import rows_of
from sparsefeat.pipeline.step_window import Steps, StepWindow


def norm_of_prediction(said: Tensor, without: Tensor | None) -> Tensor:
    """|eps|."""
    return said.norm()


class _Cam(EachStep):
    def __init__(self, block: Block, objective: Objective, window: StepWindow):
        super().__init__(block.target.root_name)
        self.block, self.objective, self.window = block, objective, window
        self.maps: dict[int, Tensor] = {}

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if not self.window.contains(context):
            return
        block, leaves = self.block, []

        def leaf(own: Tensor) -> Tensor:
            leaves.append(own.detach().requires_grad_())
            return leaves[0]

        with torch.no_grad():
            nothing = None if without is None else predicted(block.root, without)
        with taking_gradients("df_cam"):
            gradient = finite_gradient(self.objective(block.predict(given, leaf), nothing), leaves[0])
        if gradient is None:
            raise ValueError(f"the prediction does not depend on {block.at}; name another block.")
        run = Run(block.root, given, block.grid_of(given))
        grid = block.family.extent(block.target.inner, block.stream, run, leaves[0].shape).grid
        if grid is None or len(grid) != 2:
            raise ValueError(
                f"{block.at} has no grid of (height, width), of which DF-CAM makes maps; name another block."
            )
        weights = rows_of(gradient).float().mean(0)
        assert context.step is not None
        self.maps[context.step] = (rows_of(leaves[0].detach()).float() @ weights).relu().reshape(grid).cpu()


def df_cam(
    pipe: Any,
    prompt: str,
    at: str | Hookpoint,
    *,
    objective: Objective = norm_of_prediction,
    steps: Steps = None,
    seed: int = 0,
    **call: Any,
) -> dict[int, Tensor]:
    """Step -> saliency [h, w] of the block's grid, for one picture of the prompt; a run and its backward a step.

    Args:
        at: a block of the denoiser whose positions are the image's, as "unet.mid_block".
        objective: J, a number of (what the denoiser says under the prompt, what it says without one), as of
            `attribute_latents`.
        steps: window of steps as in `Steer`. seed: of the picture. call: arguments of the pipeline.

    Raises:
        ValueError: an argument that cannot be, by its name; none of the steps that ran is among `steps`. TypeError: an
            argument that the pipeline's call does not take.
    """
    (text,) = prompts_of("prompt", [prompt])
    whole("seed", seed, 0)
    block = Block(pipe, at if isinstance(at, Hookpoint) else Hookpoint.parse(at))
    check_call(pipe, call, df_cam, "output_type")
    cam = _Cam(block, objective, StepWindow.parse(steps))
    with attach(pipe, cam):
        pipe(text, generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
    if not cam.maps:
        raise ValueError(f"none of the steps that ran is among steps={steps!r}; leave it out or choose others.")
    return cam.maps
