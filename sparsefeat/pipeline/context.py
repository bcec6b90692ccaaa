"""Where and when: `Call`, one call of the pipeline, and `Context`, one moment in it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsefeat.pipeline.hookpoints import Hookpoint


@dataclass
class Call:
    """One call of the pipeline: what was asked for, and what is known of it so far.

    `n_steps` and `guidance` are what the arguments say until the denoiser runs for the first time, and from then on
    what the scheduler and the pipeline say: image-to-image at strength 0.6 does 30 of the 50 steps asked for.
    """

    prompts: list[str] | None = None
    """The prompts, None if the pipeline was called with embeddings or takes none."""
    n_prompts: int | None = None
    images_per_prompt: int = 1
    guidance: bool = False
    """Whether classifier-free guidance is on."""
    n_steps: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The call's arguments by name, defaults included; once the call has ended, only text and numbers."""
    own_loop: bool = False
    """The denoising loop is the user's own, inside `session.call(...)`."""
    pipe_ref: weakref.ref | None = field(default=None, repr=False)
    scheduled: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.n_prompts is None and self.prompts is not None:
            self.n_prompts = len(self.prompts)

    @property
    def pipe(self) -> Any:
        """The pipeline, None when it is gone: a kept recording does not keep its pipeline."""
        return self.pipe_ref() if self.pipe_ref is not None else None

    def forget_objects(self) -> None:
        """Let go of the tensors, images and callbacks among the arguments: recordings outlive their calls."""
        self.arguments = {name: value for name, value in self.arguments.items() if _is_plain(value)}

    @property
    def timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of this call, one for each scheduler step; None until the denoiser runs.

        Reading them waits for the device.
        """
        return None if self.scheduled is None else tuple(float(t) for t in torch.as_tensor(self.scheduled).tolist())

    @property
    def n_images(self) -> int | None:
        """How many images come out, the length of the pipeline's output list."""
        return None if self.n_prompts is None else self.n_prompts * self.images_per_prompt

    @classmethod
    def of(cls, pipe: Any, arguments: Mapping[str, Any]) -> Call:
        """What the arguments of `pipe(...)` say. `arguments` are bound to their names, defaults applied."""
        prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
        if isinstance(prompt, (str, dict)):
            prompt = [prompt]
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else None
        n_prompts = None
        if prompts is None:
            n_prompts = embeds.shape[0] if isinstance(embeds, torch.Tensor) else arguments.get("batch_size")
        schedule = next((arguments[n] for n in ("timesteps", "sigmas") if arguments.get(n) is not None), None)
        scale = arguments.get("guidance_scale")
        return cls(
            prompts=prompts,
            n_prompts=n_prompts,
            images_per_prompt=arguments.get("num_images_per_prompt") or 1,
            guidance=isinstance(scale, (int, float)) and scale > 1,
            n_steps=arguments.get("num_inference_steps") if schedule is None else len(schedule),
            arguments=arguments,
            pipe_ref=weakref.ref(pipe),
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(element) for element in value)
    return value is None or isinstance(value, (str, int, float))


@dataclass(frozen=True)
class Context:
    """One moment of a call, for the rows an instrument was given. Read-only.

    Rows are flattened [batch * positions]: all positions of the first batch entry, then of the second. A batch entry
    is one image under one condition; under guidance a batch of 2 images is [uncond, uncond, cond, cond].
    """

    hookpoint: Hookpoint | None = None
    """As the instrument named it; None in `end_step`."""
    step: int | None = None
    """The denoising step, 0 to n_steps - 1, counted by the scheduler; a second-order scheduler's two runs of the
    model within one step have the same. None outside the steps: text encoders and VAEs."""
    n_steps: int | None = None
    fraction: float | None = None
    """How far the schedule was when the step began: 0.0 is pure noise. Starts above 0 for image-to-image."""
    condition: tuple[str, ...] = ()
    """One for each batch entry: "cond", "uncond", or what else a pipeline's guidance has ("image", "perturbed")."""
    prompt_index: tuple[int, ...] = ()
    """One for each batch entry: which image of the output list it becomes, prompt * images_per_prompt + j. In a text
    encoder a prompt runs once for all its images: the first of them."""
    prompts: list[str] | None = None
    grid: tuple[int, ...] | None = None
    """(h, w) or (frames, h, w), the product is `positions`; None for text."""
    stream: str = "image"
    batch: int = 0
    positions: int = 0
    device: torch.device = field(default=torch.device("cpu"), repr=False)
    recomputing: bool = False
    """The forward is run again by gradient checkpointing, in a backward pass: answer as before, record nothing."""
    _timestep: Any = field(default=None, repr=False)

    @property
    def timestep(self) -> float | None:
        """The model's timestep argument. Reading it waits for the device, so only do so when it is needed."""
        if isinstance(self._timestep, torch.Tensor):
            return float(self._timestep.flatten()[0])
        return self._timestep

    def row_condition(self, label: str = "cond") -> torch.Tensor:
        """[batch * positions], True for the rows under this condition, on the activations' device."""
        entries = torch.tensor([condition == label for condition in self.condition], device=self.device)
        return entries.repeat_interleave(self.positions)

    def row_batch(self) -> torch.Tensor:
        """[batch * positions], the batch entry of each row, on the activations' device."""
        return torch.arange(self.batch, device=self.device).repeat_interleave(self.positions)
