"""Where and when: `Call`, one call of the pipeline, and `Context`, one moment in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsefeat.arguments import finite_in
from sparsefeat.pipeline.hookpoints import Hookpoint
from sparsefeat.pipeline.weakly import Weakly

CONDITIONS = ("cond", "uncond", "image", "perturbed")
"""What a batch entry may be; `Context.condition` says what each is."""

UNKNOWN = "unknown"
"""The condition of a batch entry that cannot be told."""


HOW_TO_STATE = (
    'say what one step runs, as in attach(pipe, ..., layout=[("uncond", "cond")]) for one run of two halves or '
    'layout=[("cond",), ("uncond",)] for two runs, or act on all rows alike (condition="both")'
)


class UnknownConditionError(ValueError):
    """An instrument needs to know which rows are conditional, and nothing in the call tells it."""


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
    autocast: bool = field(default_factory=lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda"))), repr=False)
    """The model runs in autocast, which instruments do not."""
    own_loop: bool = False
    """The denoising loop is the user's own, inside `session.call(...)`."""
    pipe_ref: Weakly[Any] = field(default_factory=Weakly, repr=False)
    scheduled: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.n_prompts is None and self.prompts is not None:
            self.n_prompts = len(self.prompts)

    def learn(self, prompts: list[str], encoding: Mapping[str, Any]) -> None:
        """What the arguments of the pipeline's method that encodes say of prompts and images, where its own do not."""
        if self.prompts is None and prompts:
            self.prompts = prompts
            self.n_prompts = self.n_prompts or len(prompts)
        if not self.own_loop and not any(name in self.arguments for name in _PER_PROMPT):
            self.images_per_prompt = next((n for n in map(encoding.get, _PER_PROMPT) if n), self.images_per_prompt)

    @property
    def pipe(self) -> Any:
        """The pipeline, None when it is gone: a kept recording does not keep its pipeline."""
        return self.pipe_ref()

    def as_the_pipeline(self, device: torch.device) -> torch.autocast:
        """For an instrument that runs the model itself, which the pipeline may run in autocast."""
        return torch.autocast(device.type, enabled=self.autocast)

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
        for name, value in arguments.items():
            finite_in(name, value)
        arguments = _said(arguments)
        prompt = arguments.get("prompt")
        if isinstance(prompt, (str, dict)):
            prompt = [prompt]
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else None
        n_prompts = None if prompts is not None else _n_without_prompts(arguments)
        schedule = next((arguments[n] for n in ("timesteps", "sigmas") if arguments.get(n) is not None), None)
        return cls(
            prompts=prompts,
            n_prompts=n_prompts,
            images_per_prompt=_images_per_prompt(pipe, arguments),
            guidance=_guidance(pipe, arguments),
            n_steps=arguments.get("num_inference_steps") if schedule is None else len(schedule),
            arguments=arguments,
            pipe_ref=Weakly(pipe),
        )


def _said(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments, those in the state that a modular pipeline may be given included."""
    state = getattr(arguments.get("state"), "values", None)
    return {**state, **arguments} if isinstance(state, Mapping) else arguments


def _n_without_prompts(arguments: Mapping[str, Any]) -> int | None:
    """How many prompts there would be, by the embeddings, labels or images in their place."""
    for name in ("prompt_embeds", "image_embeds", "class_labels", "image", "batch_size"):
        given = arguments.get(name)
        if isinstance(given, int):
            return given
        if isinstance(given, (list, tuple)):  # a model that takes texts of different lengths has a list of embeddings
            return len(given)
        shape = getattr(given, "shape", None)
        if shape is not None:
            return 1 if name == "image" and len(shape) < 4 else shape[0]
        if given is not None and name == "image":
            return 1
    return None


_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

# Pipelines that take such an argument and set it to 1 (read in diffusers 0.33.0 and 0.42.1), by a part of their name.
_ONE_A_PROMPT = (
    "CogVideoX",
    "ConsisID",
    "WanVideoToVideo",
    "SkyReelsV2DiffusionForcingVideoToVideo",
    "Allegro",
    "AnimateDiff",
    "TextToVideoSD",
    "VideoToVideoSD",
    "LEditsPP",
)


def _images_per_prompt(pipe: Any, arguments: Mapping[str, Any]) -> int:
    if any(name in cls.__name__ for cls in type(pipe).__mro__ for name in _ONE_A_PROMPT):
        return 1
    return next((n for n in map(arguments.get, _PER_PROMPT) if n), 1)


def _guidance(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether there is an unconditional pass. Once the denoiser runs, pipelines that say so themselves are believed.

    FLUX, Qwen-Image and HunyuanVideo have `true_cfg_scale` for it, which only counts with a negative prompt; their
    `guidance_scale` is a number that the model is given, as in every model with `guidance_embeds` in its config.
    """
    scale = arguments.get("true_cfg_scale")
    if scale is not None:
        negative = (arguments.get("negative_prompt"), arguments.get("negative_prompt_embeds"))
        return scale > 1 and any(text is not None for text in negative)
    scale = arguments.get("guidance_scale")
    if not isinstance(scale, (int, float)) or scale <= 1:
        return False
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    own = hasattr(type(pipe), "do_classifier_free_guidance")
    return own or getattr(config, "guidance_embeds", None) is None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(element) for element in value)
    return value is None or isinstance(value, (str, int, float))


@dataclass(frozen=True)
class Context:
    """One moment of a call, for the rows an instrument was given. Read-only.

    Rows are flattened [batch * positions]: all positions of the first image, then of the second. One image under two
    conditions counts as two; under guidance a batch of 2 images is [uncond, uncond, cond, cond].
    """

    hookpoint: Hookpoint | None = None
    """As the instrument named it; None in `end_step`."""
    step: int | None = None
    """The denoising step, 0 to n_steps - 1, counted by the scheduler that this model is run with; a second-order scheduler's two runs of the
    model within one step have the same. None outside the steps: text encoders and VAEs."""
    n_steps: int | None = None
    fraction: float | None = None
    """How far the schedule was when the step began: 0.0 is pure noise. Starts above 0 for image-to-image."""
    condition: tuple[str, ...] = ()
    """One for each entry of the tensor's batch dimension: "cond", "uncond", "unknown" where it cannot be told (who needs it is then refused, see
    `attach(..., layout=...)`), or what else a pipeline's guidance has: "image" (the image without
    the instruction, InstructPix2Pix), "perturbed" (perturbed-attention guidance, and the extra pass of the skip-layer
    guidance of SD3, which is conditional with some blocks left out). Pipelines that run the model once for each
    condition have one condition a run, at the same step. Where a model folds the frames of a video into its batch, every
    frame has its video's; `entries` has them once a video."""
    prompt_index: tuple[int, ...] = ()
    """As long as `condition`: which image or video of the output list it becomes, prompt * images_per_prompt + j. In a
    text encoder a prompt runs once for all its images: the first of them."""
    prompts: list[str] | None = None
    grid: tuple[int, ...] | None = None
    """(h, w) or (frames, h, w), the product is `positions`; None for text. At a joint attention, whose positions are
    those of both streams, it is the image's."""
    stream: str = "image"
    batch: int = 0
    """How many images, videos or texts the rows are of."""
    positions: int = 0
    """How many rows each has, those of all its frames."""
    device: torch.device = field(default=torch.device("cpu"), repr=False)
    loop: int = 0
    """Which way through the schedule it is, in a call that has several: images one after the other, segments of a video."""
    evaluation: int | None = None
    """How often the scheduler has stepped in this loop. Several runs of a model at one evaluation are what one scheduler
    step is made of (guidance in passes; a refinement, of which the last run counts)."""
    recomputing: bool = False
    """The forward is run again by gradient checkpointing, in a backward pass: answer as before, record nothing."""
    _timestep: Any = field(default=None, repr=False)

    @property
    def timestep(self) -> float | None:
        """The model's timestep argument; the scheduler's own where the model is given one for every token. Reading it waits
        for the device, so only do so when it is needed.
        """
        if isinstance(self._timestep, torch.Tensor):
            return float(self._timestep.flatten()[0])
        return self._timestep

    @property
    def entries(self) -> tuple[tuple[str, int], ...]:
        """(condition, prompt_index) of each of the `batch` images, videos or texts."""
        each = len(self.condition) // self.batch if self.batch else 1
        return tuple(zip(self.condition, self.prompt_index, strict=True))[::each]

    def row_condition(self, label: str = "cond") -> torch.Tensor:
        """[batch * positions], True for the rows under this condition, on the activations' device.

        Raises:
            UnknownConditionError: some row's condition cannot be told.
        """
        if UNKNOWN in self.condition:
            raise UnknownConditionError(
                f"which of the {self.batch} batch entries at {self.hookpoint} are {label!r} cannot be told: {HOW_TO_STATE}"
            )
        entries = torch.tensor([condition == label for condition, _ in self.entries], device=self.device)
        return entries.repeat_interleave(self.positions)

    def row_batch(self) -> torch.Tensor:
        """[batch * positions], the batch entry of each row, on the activations' device."""
        return torch.arange(self.batch, device=self.device).repeat_interleave(self.positions)
