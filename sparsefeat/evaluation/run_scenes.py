"""`sparsefeat evaluate scenes`: the table of segmenters, of one pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from sparsefeat.assets import emojiscenes
from sparsefeat.attention import HeatMaps
from sparsefeat.attention.reading import KINDS
from sparsefeat.evaluation import peer_maps, scenes
from sparsefeat.evaluation.parts import Parts
from sparsefeat.evaluation.pixel_judge import PixelJudge
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.image_to_image import image_to_image
from sparsefeat.sae import SAE

# Seeds of the pictures that thresholds and latents are chosen on, and of those that are scored.
FIT, SCORED = 1_000, 2_000


def evaluate_scenes(
    pipe: Any,
    name: str,
    judge: PixelJudge,
    saes: Sequence[SAE],
    n: int,
    parts: Parts,
    said: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Every method on every split: real scenes of held-out pairs, and what the pipeline draws from their
    captions. `n` pictures a split are scored; thresholds are chosen on as many other real ones and half as many drawn ones,
    the SAEs' latents on EmojiCanvas' real drawings. Other packages' maps are measured where they are installed; what one of
    them cannot do is a `note` in its row. A row is a part, kept under the pipeline's `name`.

    Raises:
        ValueError: two of the SAEs are of one hookpoint, by which their rows are named.
    """
    at = [sae.config.hookpoint for sae in saes]
    if len(set(at)) < len(at):
        raise ValueError(f"saes= has two of one hookpoint, of {', '.join(map(str, at))}; measure one at a time.")
    shown = image_to_image(pipe)[0]
    real = scenes.real(n, emojiscenes.TRAIN, FIT), scenes.real(n, emojiscenes.HELD_OUT, SCORED)
    drawn = scenes.generated(-(-n // 2), emojiscenes.TRAIN, FIT), scenes.generated(n, emojiscenes.HELD_OUT, SCORED)
    splits: list[tuple[str, Any, list[scenes.Picture], list[scenes.Picture], PixelJudge | None]] = [
        ("real scenes, held-out pairs", shown, *real, None),
        ("drawn scenes, held-out pairs", pipe, *drawn, judge),
    ]
    peers, absent = peer_maps.installed()
    for package in absent:
        said(f"{package} is not installed: no row of it")

    rows = []
    for split, own, fit, test, masked_by in splits:
        asked = {index for picture in (*fit, *test) for index in picture.objects}
        of_saes = (_of_latents(shown, name, sae, asked, parts) for sae in saes)  # chosen when it is their turn
        for method in chain(
            (scenes.nothing(), scenes.chance(), *of_attention(own, masked_by is not None)), of_saes, peers
        ):
            if isinstance(method, str):
                said(f"{split}: {method}")
                continue
            try:
                line = parts.kept(
                    _key(name, split, method.name),
                    partial(scenes.row, own, name, method, split, fit, test, masked_by),
                )
            except Exception as error:
                if method not in peers:
                    raise
                rows.append({"pipeline": name, "method": method.name, "split": split, "note": f"{error}"[:300]})
                said(f"{split}: {method.name}: {type(error).__name__}: {error}")
                continue
            if method.name == "no maps":  # nothing to score
                line |= dict.fromkeys(
                    (
                        "miou",
                        "oracle_miou",
                        "share_of_oracle",
                        "accuracy",
                        "map",
                        "pointing",
                        "fit_miou",
                        "fit_map",
                        "threshold",
                    )
                )
            rows.append(line)
            said(f"{split}: {method.name}: {line['miou']} of {line['oracle_miou']}, {line['seconds']} s")
    return rows


def _of_latents(shown: Any, name: str, sae: SAE, asked: set[int], parts: Parts) -> scenes.Method | str:
    """The SAE's latents of these objects; a sentence where it has none of one."""
    at = sae.config.hookpoint
    kept = parts.kept(_key(name, at), lambda: scenes.latents_of_objects(shown, sae, scenes.real_drawings()))
    latent = {int(o): index for o, index in kept.items()}
    if missing := asked - set(latent):
        return f"{at} has no latent for {len(missing)} objects; left out"
    return scenes.latents(f"a latent an object, {at}", sae, latent)


def _key(*names: str | None) -> str:
    return "/".join(("maps", *(re.sub(r"\W+", "-", str(name)) for name in names)))


def of_attention(pipe: Any, drawn: bool) -> list[scenes.Method]:
    """Every kind of map that the pipeline has, as it is and refined, of all steps and, `drawn` in more than one, of late
    ones; of cross-attention DAAM's, ours and eager."""
    found: list[scenes.Method] = []
    for kind in KINDS:
        if kind == "concept":
            continue
        try:
            attach(pipe, HeatMaps(kind)).close()
        except ValueError:
            continue
        if drawn and not found:  # the kind that a pipeline has by default
            found += [scenes.heat_maps(kind, late="last quarter"), scenes.heat_maps(kind, refined=1, late="last tenth")]
        found += [scenes.heat_maps(kind), scenes.heat_maps(kind, refined=1)]
        if drawn:
            found += [scenes.heat_maps(kind, refined=1, late="last quarter")]
        if kind == "cross":
            found += [scenes.heat_maps(kind, exact=True)]
    if getattr(pipe, "unet", None) is not None:
        found.append(scenes.eager_daam())
    try:
        attach(pipe, HeatMaps(concepts=["fox", "background"])).close()
    except ValueError:
        return found
    return [*found, scenes.concepts()]
