"""Calls of a pipeline from which activations are taken: prompts drawn from noise, or images that are noised and looked at.

Image i starts from noise of `seed + i`, whatever the batch it is in. What is seen in an image is decided by nothing else,
so that a run that is killed, or shared out over ranks, ends with the same rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsefeat.arguments import whole
from sparsefeat.features.progress import Progress
from sparsefeat.inputs import Inputs
from sparsefeat.pipeline import Context, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import check_arguments, check_values
from sparsefeat.pipeline.hookpoints import resolve
from sparsefeat.pipeline.image_to_image import image_to_image
from sparsefeat.store import MANIFEST, ShardReader, last_marks
from sparsefeat.training.activations.collect import CollectActivations, store_of
from sparsefeat.training.ranks import ALONE, Ranks
from sparsefeat.whole import as_path, written_plainly

PROMPTS = "prompts.txt"
SIZE = ("width", "height")
# Images of one part, the unit that ranks share out and that a kill loses at most (if it fills no shard before).
PART_IMAGES = 64


@dataclass(frozen=True)
class Drawing:
    """How `inputs` go through a pipeline.

    batch_size: images a call. seed: of the noise. call: arguments of the pipeline's call, such as num_inference_steps,
    guidance_scale, height.

    Images of `inputs` are encoded by the VAE, noised to a step that the seed and the batch decide (each step equally often),
    and the model is run once; their step is 0, and the timestep says which it was. This needs a pipeline that diffusers has
    an image-to-image one of.
    """

    pipe: Any
    inputs: Inputs
    batch_size: int = 4
    seed: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, 0)
        pipe = self.pipe
        if self.inputs.images:
            pipe = _looking(pipe)
            object.__setattr__(self, "pipe", pipe)
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(
                f"{type(pipe).__name__} takes no prompt, and is drawn from otherwise: use CollectActivations."
            )
        checked = {name: self.call[name] for name in self.call if name not in SIZE or not self.inputs.images}
        try:
            check_arguments(pipe, checked)
        except TypeError as error:  # of a call in Python; here it is a setting that does not fit the pipeline
            raise ValueError(str(error)) from None
        check_values(pipe, checked)

    @property
    def origin(self) -> dict[str, Any]:
        """What is drawn and how, as JSON has it."""
        return {
            "pipeline": type(self.pipe).__name__,
            "inputs": self.inputs.digest,
            "images": len(self.inputs),
            "batch_size": self.batch_size,
            "noise_seed": self.seed,
            "call": dict(self.call),
        }

    def only_text(self, hookpoints: Sequence[Hookpoint]) -> bool:
        """Whether all of them are in text encoders, which have run before the first step."""
        return bool(hookpoints) and not any(
            resolve(self.pipe, hookpoint.path).family.runs_in_steps for hookpoint in hookpoints
        )

    def draw(self, first: int, stop: int, hookpoints: Sequence[Hookpoint]) -> Iterator[int]:
        """Call the pipeline for images `first` to `stop`; yields how many each call made. After the last of the inputs comes
        the first, from other noise."""
        takes = inspect.signature(type(self.pipe).__call__).parameters
        options: dict[str, Any] = {"output_type": "latent"} if "output_type" in takes else {}
        # An image-to-image pipeline may take its size from the image, which has it.
        options |= {name: value for name, value in self.call.items() if name in takes or not self.inputs.images}
        if "num_inference_steps" in takes and "strength" not in takes and self.only_text(hookpoints):
            options["num_inference_steps"] = 1
        for start in range(first, stop, self.batch_size):
            numbers = range(start, min(start + self.batch_size, stop))
            generators = [torch.Generator().manual_seed(self.seed + number) for number in numbers]
            call = {"generator": generators if len(generators) > 1 else generators[0], **options}
            if self.inputs.images:
                call |= self._noised(numbers, options)
            with torch.no_grad():
                self.pipe(prompt=[self.inputs.prompts[number % len(self.inputs)] for number in numbers], **call)
            yield len(numbers)

    def _noised(self, numbers: range, options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with which the first step of the call is the one that is looked at, and the only one."""
        steps = options.get("num_inference_steps")
        if steps is None:
            steps = inspect.signature(type(self.pipe).__call__).parameters["num_inference_steps"].default
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(self.seed))
        step = int(order[numbers.start // self.batch_size % steps])
        images = [_opened(self.inputs.images[number % len(self.inputs)]) for number in numbers]
        width, height = (self.call.get(name) or _own_size(self.pipe) for name in SIZE)
        return {
            "image": [image.resize((width, height), Image.Resampling.LANCZOS) for image in images],
            "strength": _strength(steps - step, steps),
            "num_inference_steps": steps,
            "callback_on_step_end": _stop,
        }


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise OSError(f"{path} cannot be read as an image ({error}): mend it, or take it away") from None


def _looking(pipe: Any) -> Any:
    try:
        twin, takes = image_to_image(pipe)
        if takes == "image":
            return twin
        problem = f"{type(pipe).__name__} looks at videos"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{problem}: collect from prompts.")


def _strength(left: int, steps: int) -> float:
    """With which so many steps are left: `strength * steps` is that number exactly, as pipelines round either way."""
    strength = left / steps
    return strength if strength * steps == left else math.nextafter(strength, math.inf)


def _stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = True  # diffusers' own way to end a loop: the steps that are left are passed over
    return tensors


def _own_size(pipe: Any) -> int:
    size = getattr(pipe, "default_sample_size", None)
    if size is None:
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(size, int):
        raise ValueError("the size of the images cannot be told from this pipeline: give height= and width=.")
    return size * pipe.vae_scale_factor


class _Rate(Instrument):
    """Instrument: the bar says how many rows a second are kept."""

    def __init__(self, collect: CollectActivations, progress: Any) -> None:
        self.collect, self.progress = collect, progress

    def end_step(self, context: Context) -> None:
        elapsed = self.progress.bar.format_dict["elapsed"]
        if self.collect.rows_kept and elapsed:
            self.progress.bar.set_postfix_str(f"{self.collect.rows_kept / elapsed:,.0f} rows/s", refresh=False)


def collect_activations(
    drawing: Drawing,
    hookpoints: Sequence[Hookpoint | str],
    folder: str | Path,
    *,
    rows_per_image: int | None = 64,
    steps_per_image: int | None = None,
    condition: str | None = "cond",
    dtype: torch.dtype = torch.float16,
    base_model: str | None = None,
    ranks: Ranks = ALONE,
) -> dict[Hookpoint, ShardReader]:
    """Write the rows of all inputs into a store for each hookpoint, and return their readers, as far as other ranks are.

    Inputs are shared out over the ranks in parts of 64. Killed at any moment, or started with another number of ranks, the
    same call goes on with what is missing; other settings in the same folder are refused. The rows, their files and their
    order do not depend on either. What is kept of an image: see `CollectActivations`.

    folder: beside the stores it gets `prompts.txt`, of which line i is the prompt of image i.
    base_model: what SAEs that are trained on the rows will say they are of.
    """
    folder = as_path(folder)
    places = [h if isinstance(h, Hookpoint) else Hookpoint.parse(h) for h in hookpoints]
    inputs, n = drawing.inputs, len(drawing.inputs)
    metadata = {**drawing.origin, "base_model": base_model}
    settings = {
        "rows_per_image": rows_per_image,
        "steps_per_image": steps_per_image,
        "condition": condition,
        "seed": drawing.seed,
        "dtype": dtype,
        "folder": folder,
        "metadata": metadata,
    }
    # Whole batches: the batch that an image is in does not depend on who draws it.
    size = math.ceil(PART_IMAGES / drawing.batch_size) * drawing.batch_size
    n_parts = math.ceil(n / size)
    CollectActivations(*places, **settings, worker=n_parts)  # refuses what stands there with other settings
    marks = [last_marks(store_of(folder, place)) for place in places]
    left: dict[int, tuple[int, int]] = {}
    for part in range(ranks.rank, n_parts, ranks.world):
        stop = min((part + 1) * size, n)
        reached = min(mark.get(part) or part * size for mark in marks)
        if reached < stop:
            left[part] = (reached, stop)
    with ExitStack() as shown:
        watching: list[Instrument] = []
        if ranks.first and left:
            images = sum(stop - reached for reached, stop in left.values())
            watching = [shown.enter_context(Progress(images, "collecting"))]
        for part, (_, stop) in left.items():
            with CollectActivations(*places, **settings, worker=part, first_image=part * size) as collect:
                rate = [_Rate(collect, progress) for progress in watching]
                with attach(drawing.pipe, collect, *watching, *rate):
                    for _ in drawing.draw(collect.images_done, stop, places):
                        check_rows(collect, places)
    _write_prompts(folder, inputs.prompts)
    stores = {place: store_of(folder, place) for place in places}
    return {place: ShardReader(store) for place, store in stores.items() if (store / MANIFEST).is_file()}


def check_rows(collect: CollectActivations, places: Sequence[Hookpoint]) -> None:
    """Raise ValueError if the calls so far had no row of the condition: none of the later ones would."""
    if not collect.rows_kept:
        raise ValueError(
            f"condition={collect.condition!r} has no rows at {', '.join(map(str, places))}: guidance is off, or it is "
            "another condition's; turn guidance on, or keep the rows of all."
        )


def _write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    path = folder / PROMPTS
    if path.is_file():
        return
    with written_plainly(path):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{Ranks.of_environment().rank}.unfinished")
        unfinished.write_text("".join(" ".join(prompt.split()) + "\n" for prompt in prompts), encoding="utf-8")
        unfinished.replace(path)
