"""Drawing the images that the pages of an SAE's latents are made of, a call at a time; what is done is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsefeat.arguments import whole
from sparsefeat.features import Record
from sparsefeat.features.progress import Progress
from sparsefeat.features.survey import Survey
from sparsefeat.pipeline import Hookpoint, attach
from sparsefeat.pipeline.call_arguments import check_arguments
from sparsefeat.pipeline.drawing import draw, draw_all
from sparsefeat.report.figures import on_white
from sparsefeat.sae import SAE

# Of what is shown of an image; smaller ones are kept as they are, and the browser enlarges them.
LARGEST_SIDE = 256

# A word is tried as a name if at least so many prompts have it, and as many lack it; of more words the most frequent.
LEAST_PROMPTS, MOST_WORDS = 4, 100

IMAGES, DATA = "images", "data"

# Numbers of a weight that stand for all of it where weights are compared.
LOOKED_AT = 64


@dataclass(frozen=True)
class Drawn:
    """What the pages are made of: which SAE on which pipeline, which prompts, how they are drawn.

    concepts: prompt -> its concepts, of which latents can be named; image i is of prompt i and starts from noise of
    `seed + i`. call: arguments of the pipeline's call. during: opens a context around each.
    """

    pipe: Any
    sae: SAE
    concepts: Mapping[str, Sequence[str]]
    at: Hookpoint
    seed: int = 0
    batch_size: int = 4
    call: Mapping[str, Any] = field(default_factory=dict)
    during: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, 0)
        check_arguments(self.pipe, self.call)
        for name, given in self.call.items():
            if given is not None and not isinstance(given, (bool, int, float, str)):
                raise ValueError(
                    f"{name} is {type(given).__name__}; a call that can be gone on with takes plain values."
                )
        if not isinstance(self.concepts, Mapping) or not self.concepts:
            raise ValueError("prompts is empty; give at least one, with the concepts of each.")

    @property
    def prompts(self) -> list[str]:
        return list(self.concepts)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        told = json.dumps([[prompt, list(names)] for prompt, names in self.concepts.items()])
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        config = self.sae.config
        return {
            "hookpoint": str(self.at),
            "pipeline": type(self.pipe).__name__,
            "weights": _fingerprint(modules),
            "sae": {
                "n_latents": config.n_latents,
                "d_model": config.d_model,
                "k": config.k,
                "weights": _fingerprint([self.sae]),
            },
            "n_images": len(self.concepts),
            "prompts": hashlib.sha256(told.encode()).hexdigest()[:16],
            "seed": self.seed,
            "call": dict(self.call),
        }

    def image(self, number: int, **more: Any) -> Image.Image:
        """One of the images again; the same as in its batch but for rounding."""
        noise = torch.Generator().manual_seed(self.seed + number)
        with torch.no_grad(), self.during():
            return draw(self.pipe, self.prompts[number], {**self.call, **more, "generator": noise})

    def survey(self, folder: Path) -> Survey:
        """The counts of all images: those of an earlier run in `folder` are gone on from."""
        data = folder / DATA
        (folder / IMAGES).mkdir(exist_ok=True)
        prompts = self.prompts
        survey = Survey.load(data) if (data / "survey.json").is_file() else Survey(self.sae.n_latents, len(prompts))
        start = len(survey.examples)
        if start == len(prompts):
            return survey
        record = Record(self.sae, self.at)
        with Progress(len(prompts) - start, "drawing images") as progress:
            for first in range(start, len(prompts), self.batch_size):
                chunk = prompts[first : first + self.batch_size]
                noise = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(chunk))]
                with torch.no_grad(), self.during(), attach(self.pipe, record, progress) as run:
                    images = draw_all(self.pipe, chunk, {**self.call, "generator": noise})
                for i, image in enumerate(images):
                    save_picture(image, folder / picture_of(first + i))
                survey.add(run[record], [tuple(self.concepts[prompt]) for prompt in chunk])
                survey.save(data)
        return survey


def picture_of(number: int) -> str:
    return f"{IMAGES}/{number:05d}.webp"


def save_picture(image: Image.Image, path: Path) -> None:
    """On white, its longer side at most `LARGEST_SIDE` pixels."""
    shown = on_white(image)
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    path.parent.mkdir(exist_ok=True)
    shown.save(path, "WEBP", quality=92, method=4)


def words_of(prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each prompt's own words as its concepts: of three letters or more, that at least `LEAST_PROMPTS` prompts have and as
    many lack."""
    words = {prompt: sorted(set(re.findall(r"[^\W\d_]{3,}", prompt.lower()))) for prompt in prompts}
    counts = Counter(word for of_prompt in words.values() for word in of_prompt)
    usable = [w for w, n in counts.most_common() if LEAST_PROMPTS <= n <= len(words) - LEAST_PROMPTS][:MOST_WORDS]
    return {prompt: tuple(word for word in of_prompt if word in usable) for prompt, of_prompt in words.items()}


def _fingerprint(modules: Sequence[torch.nn.Module]) -> str:
    """Of the first numbers of every weight: of other weights it is another, and it costs nothing."""
    seen = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            seen.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:  # offloaded: only brought in while it runs
                seen.update(weight.detach().reshape(-1)[:LOOKED_AT].cpu().double().numpy().tobytes())
    return seen.hexdigest()[:16]
