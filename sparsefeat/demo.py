"""The main job on the embedded default: draw, read features, steer one, erase two concepts, map words, write the page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparsefeat.assets import (
    GUIDANCE,
    N_STEPS,
    block_sae_folder,
    cross_attention_sae_folders,
    emojicanvas,
    load_pipeline,
    text_encoder_sae_folder,
)
from sparsefeat.assets.embedded import ERASE_LATENTS, FOLDER
from sparsefeat.attention import HeatMaps
from sparsefeat.erasure import Exchange
from sparsefeat.evaluation.before_after import before_after
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target
from sparsefeat.evaluation.generation import STATISTICS, Task, generate, task
from sparsefeat.evaluation.judge import Judge, Verdicts, judge_images, judge_report, load_judge, shares
from sparsefeat.evaluation.overhead import measure_overhead
from sparsefeat.evaluation.run_emoji import CROSS_ATTENTIONS, TEXT_ENCODER, place_of
from sparsefeat.features import CollectExamples, CollectStatistics, Examples, Found, Record, Statistics, search
from sparsefeat.features.chance import LEVEL
from sparsefeat.features.progress import Progress
from sparsefeat.measure.machine import device_name, versions
from sparsefeat.pipeline import attach
from sparsefeat.report import check_folder, contact_sheet, overlay, write_page
from sparsefeat.report.page import convincing
from sparsefeat.sae import SAE, load_sae
from sparsefeat.steering import Steer

BENCHMARK, OVERHEAD = (FOLDER / "results" / name for name in ("emoji.json", "overhead.json"))

# Shown on the page: noise of a split of its own, so that no statistic has seen it.
SPLIT = 3
SHOWN = ("fox", "octopus", "rocket", "pizza", "rose", "castle", "owl", "key")
ERASED = (Target(OBJECT, emojicanvas.OBJECTS.index("fox")), Target(STYLE, emojicanvas.STYLES.index("mono")))
TIMES = (-6.0, -3.0, -1.5, 0.0, 1.5, 3.0, 6.0)  # of the latent's mean activation where it is active
N_FEATURES = 6
# What a latent is turned up towards: every style and every shown object, each in a drawing of another object in another style.
TRIED = [(STYLE, name) for name in emojicanvas.STYLES] + [(OBJECT, name) for name in SHOWN]
N_STEERED = 2 * len(TRIED) + 2 * (len(TIMES) - 2)  # unedited and turned up, and of the two shown all other strengths
# Drawn in all, for the bar: prompts, the grid, features, steering, two erasures before and after, heat maps, overhead.
N_IMAGES = 8 + 200 + 1 + N_STEERED + 56 + 3 + 1


@dataclass
class Demo:
    """What the demo has made so far: the page's `results` and its images by key.

    The first SAE is a whole block's, for features; then come those of cross-attentions, for steering and erasure, and
    the text encoder's, for erasure.
    """

    pipe: Any
    saes: list[SAE]
    judge: Judge
    progress: Progress
    results: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)

    def picture(self, key: str, image: Image.Image | Tensor) -> str:
        self.images[key] = as_image(image) if isinstance(image, Tensor) else image
        return key

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.progress.bar.set_description(name)
        yield
        self.results.setdefault("timings", []).append({"name": name, "seconds": time.perf_counter() - started})

    def sure_of(self, kind: str, concept: str, verdicts: Verdicts) -> Tensor:
        """[n]: how sure the judge is that it sees an object or a style, a share of 1."""
        objects, styles = shares(self.judge, verdicts)
        if kind == OBJECT:
            return objects[:, emojicanvas.OBJECTS.index(concept)]
        return styles[:, emojicanvas.STYLES.index(concept)]

    def draw(self, tasks: list[Task], **options: Any) -> Tensor:
        return generate(self.pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE, **options)


def as_image(pixels: Tensor) -> Image.Image:
    """float [3, h, w] in [0, 1] as a PIL image."""
    return Image.fromarray((pixels.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def at(name: str, style: str, repeat: int = 0) -> Task:
    return task(emojicanvas.OBJECTS.index(name), emojicanvas.STYLES.index(style), SPLIT, repeat)


def draw_prompts(demo: Demo) -> None:
    """The prompts' images, each object in a style of its own."""
    styles = emojicanvas.STYLES
    tasks = [at(name, styles[i % len(styles)]) for i, name in enumerate(SHOWN)]
    for i, (t, pixels) in enumerate(zip(tasks, demo.draw(tasks), strict=True)):
        demo.results.setdefault("prompts", []).append(
            {"prompt": t.prompt, "seed": t.seed, "image": demo.picture(f"prompt-{i}", pixels)}
        )


@dataclass
class Survey:
    """What one pass over the whole grid gave: every object in every style."""

    tasks: list[Task]
    pixels: list[Tensor]
    statistics: dict[tuple[int, str], Statistics]
    """By the SAE's number and the kind of concept."""
    examples: dict[int, Examples]
    """By the SAE's number: of the block's and of the one that steers."""

    @property
    def choosing(self) -> Tensor:
        """The half of the images on which names are chosen: half of each object's and half of each style's."""
        return torch.tensor([(t.object + t.style) % 2 == 0 for t in self.tasks])


def steering_sae(demo: Demo) -> int:
    """The last cross-attention's."""
    return max(i for i, sae in enumerate(demo.saes) if place_of(sae) == CROSS_ATTENTIONS)


def survey(demo: Demo) -> Survey:
    """Draw the grid once: statistics by object and style, and the images that excite each latent most."""
    tasks = [task(o, s, STATISTICS) for s in range(len(emojicanvas.STYLES)) for o in range(len(emojicanvas.OBJECTS))]
    words = {t.prompt: (emojicanvas.OBJECTS[t.object], emojicanvas.STYLES[t.style]) for t in tasks}
    statistics: dict[tuple[int, str], Statistics] = {}
    instruments: list[Any] = []
    for i, sae in enumerate(demo.saes):
        for kind, names in ((OBJECT, emojicanvas.OBJECTS), (STYLE, emojicanvas.STYLES)):
            statistics[i, kind] = Statistics(names, sae.n_latents)
            concept = {prompt: pair[0 if kind == OBJECT else 1] for prompt, pair in words.items()}
            instruments.append(CollectStatistics(sae, statistics[i, kind], concept))
    examples = {i: Examples(demo.saes[i].n_latents, top=4) for i in (0, steering_sae(demo))}
    instruments += [CollectExamples(demo.saes[i], kept, words) for i, kept in examples.items()]
    with attach(demo.pipe, *instruments):
        pixels = demo.draw(tasks)
    return Survey(tasks, list(pixels), statistics, examples)


def show_features(demo: Demo, surveyed: Survey) -> None:
    """The top features of one image: where each acts, when, in which other images, and its name if it has one."""
    sae, examples = demo.saes[0], surveyed.examples[0]
    subject = at("fox", "noto")
    record = Record(sae)
    with attach(demo.pipe, record) as run:
        drawn = as_image(demo.draw([subject])[0])
    recording = run[record]
    by_step = [{f.latent: f.score for f in recording.top(sae.n_latents, step=step)} for step in recording.steps]
    top = []
    for rank, latent in enumerate(recording.top(N_FEATURES)):
        naming = examples.name(latent.latent, (*emojicanvas.STYLES, *emojicanvas.OBJECTS), surveyed.choosing)
        evidence = naming._asdict()
        word = evidence.pop("word")
        peaks = examples.peaks(latent.latent)
        top.append(
            {
                "latent": latent.latent,
                "score": latent.score,
                "maximum": latent.maximum,
                "frequency_share": latent.frequency,
                "overlay": demo.picture(f"feature-{rank}", overlay(drawn, recording.map(latent.latent))),
                "name": emojicanvas.words(word) if naming.is_a_name else None,
                "evidence": evidence,
                "n_images_active": int((peaks > 0).sum()),
                "examples": [
                    {
                        "image": demo.picture(f"feature-{rank}-example-{n}", surveyed.pixels[e.image]),
                        "overlay": demo.picture(
                            f"feature-{rank}-map-{n}", overlay(as_image(surveyed.pixels[e.image]), e.map)
                        ),
                        "prompt": e.prompt,
                        "score": e.score,
                    }
                    for n, e in enumerate(examples.of(latent.latent))
                ],
                "curves": {"by_step": [scores.get(latent.latent, 0.0) for scores in by_step], "peaks": peaks.tolist()},
            }
        )
    demo.results["features"] = {
        "hookpoint": str(record.at),
        "sae": {"n_latents": sae.n_latents, "k": sae.config.k, "d_model": sae.d_model},
        "prompt": subject.prompt,
        "image": demo.picture("features", drawn),
        "n_images": len(surveyed.tasks),
        "top": top,
        "curves": {
            "concepts": [list(pair) for pair in examples.concepts],
            "choosing": surveyed.choosing.tolist(),
        },
        "code": f"""\
import sparsefeat as sf
import torch
from sparsefeat.assets import block_sae_folder, load_pipeline

pipe, sae = load_pipeline(), sf.load_sae(block_sae_folder())
record = sf.Record(sae)
with sf.attach(pipe, record) as run:
    {_call(subject)}
print(*run[record].top({N_FEATURES}), sep="\\n")""",
    }


def _call(t: Task) -> str:
    """The call that draws a task, as a user writes it."""
    return (
        f"pipe({t.prompt!r}, num_inference_steps={N_STEPS}, guidance_scale={GUIDANCE},\n"
        f"         generator=torch.Generator().manual_seed({t.seed}))"
    )


@dataclass
class Tried:
    """A concept that a latent was turned up towards, in a drawing of something else."""

    kind: str
    concept: str
    found: Found
    usual: float
    subject: Task
    unedited: Tensor
    turned_up: Tensor
    shares: tuple[float, float]
    """How sure the judge is of the concept, in the unedited image and in the other."""


def try_steering(demo: Demo, surveyed: Survey) -> list[Tried]:
    """For every concept of `TRIED` its most specific latent, turned up as far as any is."""
    last, tried = steering_sae(demo), []
    styles = emojicanvas.STYLES
    subjects = [
        at(SHOWN[(i + 3) % len(SHOWN)], styles[(i + 1) % len(styles)])  # another object, another style
        for i in range(len(TRIED))
    ]
    unedited = demo.draw(subjects)
    for (kind, concept), subject, before in zip(TRIED, subjects, unedited, strict=True):
        statistics = surveyed.statistics[last, kind]
        found = search(statistics, concept, 1, examples=surveyed.examples[last])[0]
        usual = float(statistics.mean_active(concept)[found.latent])
        with attach(demo.pipe, Steer(demo.saes[last], add={found.latent: TIMES[-1] * usual})):
            after = demo.draw([subject])[0]
        sure = demo.sure_of(kind, concept, judge_images(demo.judge, torch.stack([before, after])))
        tried.append(Tried(kind, concept, found, usual, subject, before, after, (float(sure[0]), float(sure[1]))))
    return tried


def show_steering(demo: Demo, surveyed: Survey) -> None:
    """Two strips, of a style and of an object: of those tried, what the judge came to see most that it had not seen. A latent
    that chance explains is shown only if chance explains all."""
    demo.results["steering"] = []
    last, tried = steering_sae(demo), try_steering(demo, surveyed)
    for kind in (STYLE, OBJECT):
        of_kind = [one for one in tried if one.kind == kind]
        best = max(
            of_kind, key=lambda one: (one.found.p is not None and one.found.p <= LEVEL, one.shares[1] - one.shares[0])
        )
        concept, latent, usual = best.concept, best.found.latent, best.usual
        drawn = {0.0: best.unedited, TIMES[-1]: best.turned_up}
        for times in TIMES:
            if times not in drawn:
                with attach(demo.pipe, Steer(demo.saes[last], add={latent: times * usual})):
                    drawn[times] = demo.draw([best.subject])[0]
        verdicts = judge_images(demo.judge, torch.stack([drawn[times] for times in TIMES]))
        strip = [
            {
                "times": times,
                "image": demo.picture(f"steer-{concept}-{times:+g}", drawn[times]),
                "judge_share": float(sure),
                "verdict": said(verdicts, i),
            }
            for i, (times, sure) in enumerate(zip(TIMES, demo.sure_of(kind, concept, verdicts), strict=True))
        ]
        demo.results["steering"].append(
            {
                "hookpoint": demo.saes[last].config.hookpoint,
                "latent": latent,
                "kind": kind,
                "concept": emojicanvas.words(concept),
                "auc": best.found.auc,
                "p": best.found.p,
                "n_latents": demo.saes[last].n_latents,
                "usual": usual,
                "prompt": best.subject.prompt,
                "strip": strip,
                "tried": [
                    {
                        "concept": emojicanvas.words(one.concept),
                        "prompt": one.subject.prompt,
                        "share_before": one.shares[0],
                        "share_after": one.shares[1],
                        "p": one.found.p,
                    }
                    for one in of_kind
                ],
                "curves": {"peaks": surveyed.examples[last].peaks(latent).tolist()},
                "code": f"""\
import sparsefeat as sf
import torch
from sparsefeat.assets import cross_attention_sae_folders, load_pipeline

pipe, sae = load_pipeline(), sf.load_sae(cross_attention_sae_folders()[-1])
with sf.attach(pipe, sf.Steer(sae, add={{{latent}: {TIMES[-1] * usual:.4g}}})):
    image = {_call(best.subject)}.images[0]
image.save("steered.png")""",
            }
        )


def said(verdicts: Verdicts, i: int) -> str:
    """What the judge takes image i for."""
    name = emojicanvas.words(emojicanvas.OBJECTS[int(verdicts.objects[i])])
    return f"{name}, {emojicanvas.STYLES[int(verdicts.styles[i])]}"


def show_erasure(demo: Demo) -> None:
    """One object and one style erased: before, after, and what the judge says."""
    demo.results["erasure"] = []
    for target in ERASED:
        if target.kind == OBJECT:
            hit = [at(target.name, style, repeat) for repeat in (0, 1) for style in emojicanvas.STYLES]
            kept = [at(name, style) for name, style in zip(SHOWN[1:7], emojicanvas.STYLES * 2, strict=False)]
        else:
            hit = [at(name, target.name) for name in SHOWN]
            others = [style for style in emojicanvas.STYLES if style != target.name]
            kept = [at(name, others[i % 3]) for i, name in enumerate(SHOWN[:6])]
        (sae,) = (sae for sae in demo.saes if place_of(sae) == TEXT_ENCODER)
        prompts = emojicanvas.prompts_by_concept(target.words)
        exchange = Exchange.fit(demo.pipe, sae, target.words, prompts, n_latents=ERASE_LATENTS)
        tasks = hit + kept
        before = demo.draw(tasks)
        with attach(demo.pipe, exchange):
            after = demo.draw(tasks)
        verdicts = [judge_images(demo.judge, pixels) for pixels in (before, after)]
        pairs = []
        for n, t in enumerate(tasks):
            own = emojicanvas.OBJECTS[t.object] if target.kind == OBJECT else emojicanvas.STYLES[t.style]
            sure = [float(demo.sure_of(target.kind, own, v)[n]) for v in verdicts]
            pairs.append(
                {
                    "prompt": t.prompt,
                    "before": demo.picture(f"erase-{target.name}-{n}-before", before[n]),
                    "after": demo.picture(f"erase-{target.name}-{n}-after", after[n]),
                    "is_target": target.shows(t),
                    "judge_before": said(verdicts[0], n),
                    "judge_after": said(verdicts[1], n),
                    "word": emojicanvas.words(own),
                    "share_before": sure[0],
                    "share_after": sure[1],
                }
            )
        axis = "objects" if target.kind == OBJECT else "styles"
        wanted = torch.tensor([t.object if target.kind == OBJECT else t.style for t in tasks])
        said_before, said_after = (getattr(v, axis) for v in verdicts)
        counts = before_after(said_before, said_after, wanted, [target.shows(t) for t in tasks])
        demo.results["erasure"].append(
            {
                "kind": target.kind,
                "target": target.words,
                "method": f"{len(exchange.latents)} latents of the text encoder say “{exchange.concepts[1]}” in its place",
                "pairs": pairs,
                "counts": asdict(counts),
                "code": f'sparsefeat erase "{hit[0].prompt}" --concept "{target.words}" --save kept',
            }
        )


def show_heat_maps(demo: Demo) -> None:
    maps = HeatMaps()
    subjects = [at("rocket", "noto"), at("birthday-cake", "twemoji"), at("owl", "fluent")]
    with attach(demo.pipe, maps) as run:
        pixels = demo.draw(subjects)
    code = f"""\
import sparsefeat as sf
import torch
from sparsefeat.assets import load_pipeline

pipe, maps = load_pipeline(), sf.HeatMaps()
with sf.attach(pipe, maps) as run:
    image = {_call(subjects[0])}.images[0]
run[maps].word({emojicanvas.words(emojicanvas.OBJECTS[subjects[0].object])!r}).overlay(image).save("heat-map.png")"""
    for i, t in enumerate(subjects):
        drawn = as_image(pixels[i])
        words = [emojicanvas.STYLES[t.style], "emoji", emojicanvas.words(emojicanvas.OBJECTS[t.object])]
        shown = [
            {"word": word, "overlay": demo.picture(f"heat-{i}-{n}", overlay(drawn, run[maps].word(word, i).values))}
            for n, word in enumerate(words)
        ]
        demo.results.setdefault("heat_maps", []).append(
            {"prompt": t.prompt, "image": demo.picture(f"heat-{i}", drawn), "words": shown}
            | ({"code": code} if i == 0 else {})
        )


def show_overhead(demo: Demo) -> None:
    """How long the hook of a Steer takes, and the step it runs in, for one image with guidance."""
    sae = demo.saes[0]
    steer = Steer(sae, scale={0: 0.5})
    measured = measure_overhead(demo.pipe, steer.at.path, steer, lambda: demo.draw([at("fox", "noto")]))
    middle = sorted(measured.step_s)[len(measured.step_s) // 2]
    hook = sorted(measured.hook_s)[len(measured.hook_s) // 2]
    demo.results["timings"].append({"name": "one denoising step, one image with guidance", "seconds": middle})
    demo.results["timings"].append({"name": "of which Steer(scale) at one hookpoint", "seconds": hook})


def overhead_elsewhere() -> dict[str, Any] | None:
    """What attaching costs a UNet of Stable Diffusion 1.5's size, as it was measured for the package."""
    if not OVERHEAD.is_file():
        return None
    measured = json.loads(OVERHEAD.read_text())
    rows = [
        {
            "instrument": row["instrument"],
            "hook_seconds": row["hook_ms"] / 1000,
            "step_seconds": row["step_ms"] / 1000,
            "share_of_step": row["share_of_step"],
        }
        for row in measured["rows"]
    ]
    return {"device": measured["device"], "date": measured["date"], "rows": rows}


def run_demo(out: Path, *, force: bool = False) -> Path:
    """Do the main job on the embedded pipeline and write the page into `out`. Returns the page's path."""
    check_folder(out, force=force)
    started = time.perf_counter()
    saes = [
        load_sae(folder) for folder in (block_sae_folder(), *cross_attention_sae_folders(), text_encoder_sae_folder())
    ]
    torch.manual_seed(0)
    demo = Demo(load_pipeline(), saes, load_judge(), Progress(N_IMAGES, "the demo"))
    demo.results |= {
        "version": versions()["sparsefeat"],
        "date": date.today().isoformat(),
        "device": device_name(),
        "versions": versions(),
        "pipeline": {
            "name": "a small Stable Diffusion, trained on emoji drawings, that the package carries",
            "n_steps": N_STEPS,
            "guidance": GUIDANCE,
        },
        "judge": judge_report(),
        "overhead": overhead_elsewhere(),
    }
    with demo.progress, attach(demo.pipe, demo.progress):
        show_everything(demo)
    demo.results["benchmark"] = json.loads(BENCHMARK.read_text()) if BENCHMARK.is_file() else None
    demo.results["timings"].append({"name": "everything", "seconds": time.perf_counter() - started})
    demo.images["summary"] = summary(demo)
    return write_page(out, demo.results, demo.images, force=force)


def show_everything(demo: Demo) -> None:
    with demo.timed("drawing 8 prompts"):
        draw_prompts(demo)
    with demo.timed("drawing 200 images with statistics at five SAEs"):
        surveyed = survey(demo)
    with demo.timed("features of one image"):
        show_features(demo, surveyed)
    with demo.timed(f"{N_STEERED} steered images"):
        show_steering(demo, surveyed)
    with demo.timed("erasing an object and a style, 56 images"):
        show_erasure(demo)
    with demo.timed("heat maps of 3 images"):
        show_heat_maps(demo)
    show_overhead(demo)


def findings(results: dict[str, Any]) -> list[str]:
    """What the page says of the erasures and the judge, a line each, from the same `results`."""
    lines = []
    for entry in results["erasure"]:
        c = entry["counts"]
        lines.append(
            f"without the {entry['kind']} {entry['target']}: the judge saw it in {c['seen_before']} of {c['n_targets']} "
            f"images before and in {c['seen_after']} after; of the {c['n_others']} others it was right on "
            f"{c['right_before']} before and {c['right_after']} after"
        )
    judge = results["judge"]
    unseen = ", ".join(f"{name} {v['object_accuracy']:.0%}" for name, v in judge["unseen_vendor"].items())
    lines.append(
        f"the judge names the object in {judge['held_out_augmentations']['object_accuracy']:.0%} of the drawings it knows; "
        f"of a vendor it never saw: {unseen}"
    )
    return lines


def summary(demo: Demo) -> Image.Image:
    """One picture of it all: an erasure, a steering strip, one image's features, prompts."""
    width = 7
    shown, features = demo.results["prompts"][:width], demo.results["features"]
    best = convincing(demo.results["erasure"], demo.results["steering"])
    assert best["erased"] is not None
    assert best["steered"] is not None
    strip, erased = best["steered"][0], best["erased"][0]
    pairs = [p for p in erased["pairs"] if p["is_target"]][:4] + [p for p in erased["pairs"] if not p["is_target"]][:3]
    rows = [
        ("before", [(p["before"], p["judge_before"]) for p in pairs]),
        (f"without “{erased['target']}”, as judged", [(p["after"], p["judge_after"]) for p in pairs]),
        (
            f"steering latent {strip['latent']}, “{strip['concept']}”",
            [(s["image"], f"{s['times']:+g} ×" if s["times"] else "unedited") for s in strip["strip"]],
        ),
        (
            "an image and its top features",
            [(features["image"], features["prompt"])]
            + [(f["overlay"], f["name"] or f"latent {f['latent']}") for f in features["top"][: width - 1]],
        ),
        ("drawn by the embedded pipeline", [(p["image"], p["prompt"]) for p in shown]),
    ]
    return contact_sheet(
        [[demo.images[key] for key, _ in row] for _, row in rows],
        [label for label, _ in rows],
        captions=[[caption for _, caption in row] for _, row in rows],
        tile=112,
    )
