"""`sparsefeat evaluate scenes`: the table of segmenters, of one pipeline."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
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

# How many latents an object is marked by: chosen on scenes of trained pairs.
SEVERAL = 64

# Of the embedded UNet: where it has its full resolution again.
LAST_BLOCK = "up_blocks.1"


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
    the SAEs' latents by the words' maps of EmojiCanvas' real drawings. Other packages' maps are measured where they are
    installed; what one of them cannot do is a `note` in its row. What our own methods mark in a split is a part, and so is
    what each method costs, kept under the pipeline's `name`.

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
        in_split = partial(_key, name, split)
        drawn_here = masked_by is not None
        asked = {index for picture in (*fit, *test) for index in picture.objects}
        ours = [scenes.chance(), *of_attention(own, drawn_here)]
        for sae in saes:
            of_sae = _of_latents(shown, name, sae, asked, drawn_here, parts)
            ours += of_sae
            if not of_sae:
                said(f"{split}: {sae.config.hookpoint} has no latent for some of the objects; left out")
        together = [method for method in ours if not method.alone]
        for group in ([scenes.nothing()], together, *([method] for method in (*ours, *peers) if method.alone)):
            lines = [{"pipeline": name, "method": method.name, "split": split} for method in group]
            try:
                if group[0].name != "no maps":
                    key = hashlib.sha256("/".join(method.name for method in group).encode()).hexdigest()[:12]
                    measured = partial(scenes.scores, own, group, fit, test, masked_by)
                    for line, found in zip(lines, parts.kept(in_split("scores", key), measured), strict=True):
                        line |= found
                for line, method in zip(lines, group, strict=True):
                    costs = partial(scenes.cost, own, method, test, drawn_here)
                    line |= parts.kept(in_split("cost", method.name), costs)
                    said(
                        f"{split}: {method.name}: {line.get('miou')} of {line.get('oracle_miou')}, {line['seconds']} s"
                    )
            except Exception as error:
                if group[0] not in peers:
                    raise
                lines[0] |= {"note": f"{error}"[:300]}
                said(f"{split}: {group[0].name}: {type(error).__name__}: {error}")
            rows += lines
    return rows


def _of_latents(shown: Any, name: str, sae: SAE, asked: set[int], drawn: bool, parts: Parts) -> list[scenes.Method]:
    """The SAE's latents of these objects, the first alone and several, these refined too, `drawn` in more than one step late
    ones; none where an object has no latent."""
    at = sae.config.hookpoint
    key = _key(name, at, f"{SEVERAL} latents")
    kept = parts.kept(key, lambda: scenes.latents_of_objects(shown, sae, scenes.real_drawings(), SEVERAL))
    several = {int(o): {int(latent): weight for latent, weight in of.items()} for o, of in kept.items()}
    if asked - set(several):
        return []
    one = {o: {max(of, key=lambda latent: of[latent]): 1.0} for o, of in several.items()}
    what, late = f"{SEVERAL} latents an object, {at}", "last quarter" if drawn else None
    return [
        scenes.latents(f"a latent an object, {at}", sae, one),
        scenes.latents(what, sae, several, late=late),
        scenes.latents(what, sae, several, refined=1, late=late),
    ]


def _key(*names: str | None) -> str:
    return "/".join(("maps", *(re.sub(r"\W+", "-", str(name)) for name in names)))


def of_attention(pipe: Any, drawn: bool) -> list[scenes.Method]:
    """Every kind of map that the pipeline has, as it is and refined; of the kind that it has by default also the words'
    shares and, `drawn` in more than one step, late ones; of cross-attention DAAM's, ours and eager."""
    found: list[scenes.Method] = []
    for kind in KINDS:
        if kind == "concept" or not _attaches(pipe, HeatMaps(kind)):
            continue
        if not found:  # the kind by default
            late = "last quarter" if drawn else None
            if drawn:
                found += [scenes.heat_maps(kind, late=late), scenes.heat_maps(kind, refined=1, late=late)]
                found += [scenes.heat_maps(kind, refined=1, late="last tenth")]
            found += [scenes.heat_maps(kind, late=late, shares=True)]
            found += [scenes.heat_maps(kind, refined=1, late=late, shares=True)]
            if _attaches(pipe, HeatMaps(kind, layers=LAST_BLOCK)):
                last = {"said": f"{LAST_BLOCK} alone", "layers": LAST_BLOCK}
                found += [scenes.heat_maps(kind, refined=1, late=late, shares=True, **last)]
        found += [scenes.heat_maps(kind), scenes.heat_maps(kind, refined=1)]
        if kind == "cross":
            found += [scenes.heat_maps(kind, said="clamped as DAAM does", daam_exact=True)]
        if kind == "text_renormalised":
            found += [scenes.heat_maps(kind, said="from text to image", direction="text_to_image")]
    if getattr(pipe, "unet", None) is not None:
        found.append(scenes.eager_daam())
    return [*found, scenes.concepts()] if _attaches(pipe, HeatMaps(concepts=["fox", "background"])) else found


def _attaches(pipe: Any, maps: HeatMaps) -> bool:
    try:
        attach(pipe, maps).close()
    except ValueError:
        return False
    return True
