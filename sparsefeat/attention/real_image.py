"""Maps of an image that exists: encoded, noised and put through the denoiser once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsefeat.arguments import number, whole
from sparsefeat.attention.heat_maps import HeatMaps
from sparsefeat.attention.recording import HeatMapRecording
from sparsefeat.attention.sums import MapSum, Part, add_up
from sparsefeat.pipeline import Instrument, Session, attach
from sparsefeat.pipeline.call_arguments import check_pipeline
from sparsefeat.pipeline.image_to_image import WITH_ONE, image_to_image

SCHEDULE = 50
"""Steps of the schedule of which one is run: how finely `noise` is told."""
MADE_HERE = {
    "num_inference_steps": "noise", "strength": "noise", "timesteps": "noise", "sigmas": "noise", "generator": "seed",
    "num_images_per_prompt": "samples", "num_videos_per_prompt": "samples",
}  # fmt: skip
"""What a call of the image-to-image pipeline takes and is told here by another argument."""


def read_image(
    pipe: Any,
    maps: HeatMaps,
    image: Any,
    prompt: str = "",
    *,
    noise: float = 0.5,
    samples: int = 1,
    seed: int = 0,
    **arguments: Any,
) -> HeatMapRecording:
    """The maps of a real image (or video), as `HeatMaps` makes them of one that is being made.

    The image is encoded by the VAE, noised to the share `noise` of the schedule, and the denoiser runs once on it, by
    diffusers' own image-to-image pipeline around the same models; its later steps are not run.

    Args:
        pipe: a pipeline that is not attached to anything now; models are shared with it, not copied.
        maps: what to read, e.g. `HeatMaps(concepts=["fox", "snow"])`; its `steps` have to be left out.
        image: a PIL image, or what else the image-to-image pipeline takes; of CogVideoX the frames of a video, a list.
        prompt: the text beside it. ConceptAttention's evaluation takes "a " and the class.
        noise: 0 to 1, above 0; ConceptAttention's figures are at 0.5.
        samples: draws of noise, whose maps are averaged. seed: of the first; the next has seed + 1.
        arguments: for the image-to-image pipeline's call, such as `guidance_scale`, `height` and `width`.

    Returns one recording of one image.

    Raises:
        TypeError: `image` or `maps` is no such thing; an argument that the pipeline's call does not take.
        ValueError: an argument that cannot be, by its name; diffusers has no image-to-image pipeline for these models.

    Example:
        found = sf.read_image(pipe, sf.HeatMaps(concepts=["fox", "snow"]), Image.open("fox.png"), "a fox")
        found.word("fox").mask(0.5)
    """
    if not isinstance(maps, HeatMaps):
        raise TypeError(f"maps is {type(maps).__name__}, not HeatMaps; make some, sparsefeat.HeatMaps().")
    if maps.window.fractions is not None or maps.window.indices is not None:
        raise ValueError("read_image runs one step alone, so steps= of its HeatMaps means nothing; leave it out.")
    run = run_noised(pipe, [maps], image, prompt, noise=noise, samples=samples, seed=seed, **arguments)
    return joined([each[maps] for each in run.calls])


def run_noised(
    pipe: Any,
    instruments: Sequence[Instrument],
    image: Any,
    prompt: str = "",
    *,
    noise: float = 0.5,
    samples: int = 1,
    seed: int = 0,
    **arguments: Any,
) -> Session:
    """The denoiser run once on a noised image, with instruments attached; arguments and errors as of `read_image`. The
    session has a call for every sample.
    """
    noise, samples = number("noise", noise, 0, 1, above=True), whole("samples", samples)
    check_pipeline(pipe)
    if image is None or isinstance(image, (str, bytes, os.PathLike)):
        raise TypeError(f"image is {type(image).__name__}, not an image; open one, PIL.Image.open(path).")
    if not isinstance(prompt, str):
        raise ValueError(
            f"prompt={prompt!r:.80} must be one text, that of the one image; read several images one by one."
        )
    told = next((name for name in arguments if name in MADE_HERE), None)
    if told is not None:
        raise TypeError(f"{told}= is made here, from {MADE_HERE[told]}=; give that in its place.")
    try:
        twin, name = image_to_image(pipe)
    except ValueError as error:
        raise ValueError(f"{error}: take a model that has one ({WITH_ONE}).") from None
    if name == "image" and isinstance(image, (list, tuple)):
        raise ValueError(f"image is a list of {len(image)}; give one image, and read several one by one.")

    def stop(running: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        running._interrupt = True  # as diffusers' guide on callbacks does
        return kept

    steps = max(SCHEDULE, -(-1 // noise)) if noise < 1 else SCHEDULE
    call = {
        "prompt": prompt,
        name: image,
        "strength": noise,
        "num_inference_steps": int(steps),
        "output_type": "latent",
        "callback_on_step_end": stop,
    }
    with attach(twin, *instruments) as run:
        for sample in range(samples):
            twin(**{**call, "generator": torch.Generator().manual_seed(whole("seed", seed, 0) + sample), **arguments})
    return run


def joined(recordings: Sequence[HeatMapRecording]) -> HeatMapRecording:
    """Recordings of the same maps of one image as one: their mean, by how many maps went into each."""
    sums: dict[Part, MapSum] = {}
    for recording in recordings:
        add_up(
            {part: MapSum(h.total.clone(), list(h.count), h.head_weight) for part, h in recording.sums.items()}, sums
        )
    return replace(recordings[0], sums=sums, evaluations=sum(recording.evaluations for recording in recordings))
