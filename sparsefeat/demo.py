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
from sparsefeat.assets.embedded import FOLDER
from sparsefeat.attention import HeatMaps
from sparsefeat.erasure import Erase
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target
from sparsefeat.evaluation.generation import STATISTICS, Task, generate, task
from sparsefeat.evaluation.judge import Judge, judge_images, load_judge
from sparsefeat.evaluation.machine import device_name, versions
from sparsefeat.evaluation.overhead import measure_overhead
from sparsefeat.evaluation.run_emoji import CROSS_ATTENTIONS, RECIPES, place_of
from sparsefeat.features import CollectExamples, CollectStatistics, Examples, Record, Statistics
from sparsefeat.features.progress import Progress
from sparsefeat.pipeline import attach
from sparsefeat.report import check_folder, contact_sheet, overlay, write_page
from sparsefeat.sae import SAE, load_sae
from sparsefeat.steering import Steer

BENCHMARK = FOLDER / "results" / "emoji.json"

# Shown on the page: noise of a split of its own, so that no statistic has seen it.
SPLIT = 3
SHOWN = ("fox", "octopus", "rocket", "pizza", "rose", "castle", "owl", "key")
ERASED = (Target(OBJECT, emojicanvas.OBJECTS.index("fox")), Target(STYLE, emojicanvas.STYLES.index("mono")))
STRENGTHS = (-6.0, -3.0, -1.5, 0.0, 1.5, 3.0, 6.0)  # in units of the latent's own mean when it fires
N_FEATURES = 6
# Drawn in all, for the bar: prompts, the grid, features, two strips, two erasures before and after, heat maps, overhead.
N_IMAGES = 8 + 200 + 1 + 14 + 56 + 3 + 1


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


def survey(demo: Demo) -> tuple[Examples, Statistics, dict[tuple[int, str], Statistics], list[Tensor]]:
    """One pass over the fifty objects in four styles: statistics by object and style, and top-activating images."""
    tasks = [task(o, s, STATISTICS) for s in range(len(emojicanvas.STYLES)) for o in range(len(emojicanvas.OBJECTS))]
    words = {t.prompt: (emojicanvas.OBJECTS[t.object], emojicanvas.STYLES[t.style]) for t in tasks}
    statistics: dict[tuple[int, str], Statistics] = {}
    instruments: list[Any] = []
    for i, sae in enumerate(demo.saes):
        for kind, names in ((OBJECT, emojicanvas.OBJECTS), (STYLE, emojicanvas.STYLES)):
            statistics[i, kind] = Statistics(names, sae.n_latents)
            concept = {prompt: pair[0 if kind == OBJECT else 1] for prompt, pair in words.items()}
            instruments.append(CollectStatistics(sae, statistics[i, kind], concept))
    examples = Examples(demo.saes[0].n_latents, top=4)
    instruments.append(CollectExamples(demo.saes[0], examples, words))
    with attach(demo.pipe, *instruments):
        pixels = demo.draw(tasks)
    return examples, statistics[0, OBJECT], statistics, list(pixels)


def show_features(demo: Demo, examples: Examples, pixels: list[Tensor]) -> int:
    """The top features of one image, with maps and top-activating images. Returns the first one's latent."""
    sae = demo.saes[0]
    subject = at("fox", "noto")
    record = Record(sae)
    with attach(demo.pipe, record) as run:
        drawn = as_image(demo.draw([subject])[0])
    recording = run[record]
    top = []
    for rank, latent in enumerate(recording.top(N_FEATURES)):
        word, auc = best_word(examples, latent.latent)
        shown = [
            {
                "image": demo.picture(f"feature-{rank}-example-{n}", pixels[e.image]),
                "overlay": demo.picture(f"feature-{rank}-map-{n}", overlay(as_image(pixels[e.image]), e.map)),
                "prompt": e.prompt,
                "score": e.score,
            }
            for n, e in enumerate(examples.of(latent.latent))
        ]
        top.append(
            {
                "latent": latent.latent,
                "score": latent.score,
                "overlay": demo.picture(f"feature-{rank}", overlay(drawn, recording.map(latent.latent))),
                "best_word": word,
                "best_word_auc": auc,
                "examples": shown,
            }
        )
    demo.results["features"] = {
        "hookpoint": str(record.at),
        "sae": {"n_latents": sae.n_latents, "k": sae.config.k, "d_model": sae.d_model},
        "prompt": subject.prompt,
        "image": demo.picture("features", drawn),
        "top": top,
    }
    return top[0]["latent"]


def best_word(examples: Examples, latent: int) -> tuple[str, float]:
    """The word of the prompts that the latent's largest activation tells best: (word, area under the curve)."""
    scored = [
        (examples.area_under_curve(latent, word), emojicanvas.words(word))
        for word in (*emojicanvas.STYLES, *emojicanvas.OBJECTS)
    ]
    auc, word = max(scored)
    return word, auc


def show_steering(demo: Demo, statistics: dict[tuple[int, str], Statistics]) -> None:
    """Two strips: the last cross-attention's latent most specific to a style and to an object, added elsewhere."""
    from sparsefeat.features import search

    demo.results["steering"] = []
    shown = ((STYLE, "mono", at("rose", "fluent")), (OBJECT, "red-heart", at("star", "twemoji")))
    for kind, concept, subject in shown:
        last = max(i for i, sae in enumerate(demo.saes) if place_of(sae) == CROSS_ATTENTIONS)
        found = search(statistics[last, kind], concept, 1)[0]
        usual = float(statistics[last, kind].mean_active(concept)[found.latent])
        strip = []
        for strength in STRENGTHS:
            steer = Steer(demo.saes[last], add={found.latent: strength * usual})
            with attach(demo.pipe, steer):
                pixels = demo.draw([subject])[0]
            key = demo.picture(f"steer-{concept}-{strength:+g}", pixels)
            strip.append({"strength": strength * usual, "image": key})
        demo.results["steering"].append(
            {
                "hookpoint": demo.saes[last].config.hookpoint,
                "latent": found.latent,
                "label": f"latent {found.latent}, the most specific to “{emojicanvas.words(concept)}”",
                "prompt": subject.prompt,
                "strip": strip,
            }
        )


def recipes_for(target: Target) -> dict[str, Any]:
    """The hyperparameters that the benchmark's validation chose for this kind of target, or a middling choice."""
    if BENCHMARK.is_file():
        chosen = json.loads(BENCHMARK.read_text()).get("validation", {})
        if target.kind in chosen:
            return chosen[target.kind]["chosen"]
    return asdict(RECIPES[0])


def show_erasure(demo: Demo, statistics: dict[tuple[int, str], Statistics]) -> None:
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
        recipe = recipes_for(target)
        erases = [
            Erase.from_statistics(
                sae,
                statistics[i, target.kind],
                target.name,
                n_latents=recipe["n_latents"],
                gamma=recipe["gamma"],
                magnitude="scale",
            )
            for i, sae in enumerate(demo.saes)
            if place_of(sae) == recipe["place"]
        ]
        tasks = hit + kept
        before = demo.draw(tasks)
        with attach(demo.pipe, *erases):
            after = demo.draw(tasks)
        verdicts = [judge_images(demo.judge, pixels) for pixels in (before, after)]
        pairs, correct = [], []
        for n, t in enumerate(tasks):
            said = [
                f"{emojicanvas.words(emojicanvas.OBJECTS[int(v.objects[n])])}, {emojicanvas.STYLES[int(v.styles[n])]}"
                for v in verdicts
            ]
            own = verdicts[1].objects[n] == t.object if target.kind == OBJECT else verdicts[1].styles[n] == t.style
            correct.append(bool(own))
            pairs.append(
                {
                    "prompt": t.prompt,
                    "before": demo.picture(f"erase-{target.name}-{n}-before", before[n]),
                    "after": demo.picture(f"erase-{target.name}-{n}-after", after[n]),
                    "is_target": target.shows(t),
                    "judge_before": said[0],
                    "judge_after": said[1],
                }
            )
        demo.results["erasure"].append(
            {
                "kind": target.kind,
                "target": target.words,
                "method": f"{recipe['n_latents']} latents, z' = {recipe['gamma']:g} z, at the {recipe['place']}",
                "pairs": pairs,
                "removed_share": 1 - sum(correct[: len(hit)]) / len(hit),
                "kept_share": sum(correct[len(hit) :]) / len(kept),
            }
        )


def show_heat_maps(demo: Demo) -> None:
    maps = HeatMaps()
    subjects = [at("rocket", "noto"), at("birthday-cake", "twemoji"), at("owl", "fluent")]
    with attach(demo.pipe, maps) as run:
        pixels = demo.draw(subjects)
    for i, t in enumerate(subjects):
        drawn = as_image(pixels[i])
        words = [emojicanvas.STYLES[t.style], "emoji", emojicanvas.words(emojicanvas.OBJECTS[t.object])]
        shown = [
            {"word": word, "overlay": demo.picture(f"heat-{i}-{n}", overlay(drawn, run[maps].word(word, i).values))}
            for n, word in enumerate(words)
        ]
        demo.results.setdefault("heat_maps", []).append(
            {"prompt": t.prompt, "image": demo.picture(f"heat-{i}", drawn), "words": shown}
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
        "pipeline": {"name": "EmojiCanvas (embedded)", "n_steps": N_STEPS, "guidance": GUIDANCE},
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
        examples, _, statistics, pixels = survey(demo)
    with demo.timed("features of one image"):
        show_features(demo, examples, pixels)
    with demo.timed("14 steered images"):
        show_steering(demo, statistics)
    with demo.timed("erasing an object and a style, 56 images"):
        show_erasure(demo, statistics)
    with demo.timed("heat maps of 3 images"):
        show_heat_maps(demo)
    show_overhead(demo)


def summary(demo: Demo) -> Image.Image:
    """One picture of it all: prompts, one image's features, a steering strip, an erasure."""
    width = 7
    prompts = [demo.images[p["image"]] for p in demo.results["prompts"][:width]]
    features = [demo.images[demo.results["features"]["image"]]]
    features += [demo.images[f["overlay"]] for f in demo.results["features"]["top"][: width - 1]]
    strip = demo.results["steering"][0]
    erased = demo.results["erasure"][0]["pairs"][:4] + demo.results["erasure"][0]["pairs"][8:11]
    rows = [
        prompts,
        features,
        [demo.images[s["image"]] for s in strip["strip"]],
        [demo.images[p["before"]] for p in erased],
        [demo.images[p["after"]] for p in erased],
    ]
    labels = [
        "drawn by the embedded pipeline",
        "an image and its top features",
        f"steering latent {strip['latent']}, from − to +",
        "before",
        f"“{demo.results['erasure'][0]['target']}” erased",
    ]
    return contact_sheet(rows, labels, tile=112)
