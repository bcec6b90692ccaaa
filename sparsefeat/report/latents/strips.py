"""What steering a latent does: the image where it is most active and the one where it is least, each at three strengths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsefeat.features.progress import progress_bar
from sparsefeat.features.survey import Survey
from sparsefeat.pipeline import attach
from sparsefeat.report.latents.surveying import DATA, Drawn, picture_of, save_picture
from sparsefeat.steering import Steer

STRENGTHS = (-3.0, 3.0, 6.0)
"""Times the latent's usual activation, its mean where it is active; added everywhere."""

STEERED, STEERING = "steered", "steering"


def steering_of(place: Path, latent: int) -> dict[str, Any] | None:
    """What was done with a latent, if anything was."""
    path = place / STEERING / f"{latent:05d}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_steering(place: Path, drawn: Drawn, latents: Sequence[int]) -> Iterator[int]:
    """Draw the strips of these latents that have none, and yield each latent whose strips are whole.

    Raises ValueError for a latent that is active in no image, of which no usual strength is known.
    """
    missing = [latent for latent in dict.fromkeys(latents) if steering_of(place, latent) is None]
    if not missing:
        return
    survey = Survey.load(place / DATA)
    peaks = {latent: survey.examples.peaks(latent) for latent in missing}
    for latent, of_images in peaks.items():
        if not of_images.any():
            raise ValueError(
                f"steer={latent} is active in none of the {len(of_images)} images, so its usual strength is not known; "
                "leave it out."
            )
    (place / STEERING).mkdir(exist_ok=True)
    with progress_bar(len(missing) * 2 * len(STRENGTHS), "steering", "images") as bar:
        for latent in missing:
            usual = float(survey.mean_active[latent])
            order = peaks[latent].abs().argsort(stable=True)
            strips = []
            for which, number in (("most", int(order[-1])), ("least", int(order[0]))):
                steps: list[dict[str, Any]] = [{"times": 0.0, "image": picture_of(number)}]
                for times in STRENGTHS:
                    steer = Steer(drawn.sae, add={latent: times * usual}, at=drawn.at)
                    with attach(drawn.pipe, steer):
                        image = drawn.image(number)
                    name = f"{STEERED}/{latent:05d}-{which}-{times:+g}.webp"
                    save_picture(image, place / name)
                    steps.append({"times": times, "image": name})
                    bar.update(1)
                strips.append(
                    {
                        "which": which,
                        "prompt": drawn.prompts[number],
                        "seed": drawn.seed + number,
                        "maximum": float(peaks[latent][number]),
                        "strip": sorted(steps, key=lambda step: step["times"]),
                    }
                )
            path = place / STEERING / f"{latent:05d}.json"
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps({"usual": usual, "strips": strips}, indent=1))
            unfinished.replace(path)
            yield latent
