"""The main job on the embedded default: draw, read features, steer one, erase two concepts, map words, write the page."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

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
from sparsefeat.demo.made import SHOWN, Demo, Grid, as_image, at, call_of, said
from sparsefeat.demo.steering import N_STEERED, show_steering, steering_sae
from sparsefeat.erasure import Exchange
from sparsefeat.evaluation.before_after import before_after
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target
from sparsefeat.evaluation.generation import STATISTICS, Task, task
from sparsefeat.evaluation.judge import judge_images, judge_report, load_judge
from sparsefeat.evaluation.overhead import measure_overhead
from sparsefeat.evaluation.run_emoji import TEXT_ENCODER, place_of
from sparsefeat.features import CollectExamples, CollectStatistics, Examples, Record, Statistics
from sparsefeat.features.progress import Progress
from sparsefeat.measure.machine import device_name, versions
from sparsefeat.pipeline import attach
from sparsefeat.report import check_folder, contact_sheet, overlay, write_page
from sparsefeat.report.page import convincing
from sparsefeat.sae import load_sae
from sparsefeat.steering import Steer

BENCHMARK, OVERHEAD = (FOLDER / "results" / name for name in ("emoji.json", "overhead.json"))

N_FEATURES = 6
MAPPED = (("rocket", "noto"), ("birthday-cake", "twemoji"), ("owl", "fluent"))
"""Whose words are mapped."""
ERASED = (Target(OBJECT, emojicanvas.OBJECTS.index("fox")), Target(STYLE, emojicanvas.STYLES.index("mono")))


def prompts_shown() -> list[Task]:
    """Each object in a style of its own."""
    styles = emojicanvas.STYLES
    return [at(name, styles[i % len(styles)]) for i, name in enumerate(SHOWN)]


def every_cell() -> list[Task]:
    """Every object in every style."""
    return [task(o, s, STATISTICS) for s in range(len(emojicanvas.STYLES)) for o in range(len(emojicanvas.OBJECTS))]


def judged_for(target: Target) -> tuple[list[Task], list[Task]]:
    """What an erasure is looked at on: drawings of the target, and others."""
    if target.kind == OBJECT:
        hit = [at(target.name, style, repeat) for repeat in (0, 1) for style in emojicanvas.STYLES]
        kept = [at(name, style) for name, style in zip(SHOWN[1:7], emojicanvas.STYLES * 2, strict=False)]
    else:
        hit = [at(name, target.name) for name in SHOWN]
        others = [style for style in emojicanvas.STYLES if style != target.name]
        kept = [at(name, others[i % 3]) for i, name in enumerate(SHOWN[:6])]
    return hit, kept


def draw_prompts(demo: Demo) -> None:
    tasks = prompts_shown()
    for i, (t, pixels) in enumerate(zip(tasks, demo.draw(tasks), strict=True)):
        demo.results.setdefault("prompts", []).append(
            {"prompt": t.prompt, "seed": t.seed, "image": demo.picture(f"prompt-{i}", pixels)}
        )


def survey(demo: Demo) -> Grid:
    """Draw the grid once: statistics by object and style, and the images that excite each latent most."""
    tasks = every_cell()
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
    return Grid(tasks, list(pixels), statistics, examples)


def show_features(demo: Demo, surveyed: Grid) -> None:
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
    {call_of(subject)}
print(*run[record].top({N_FEATURES}), sep="\\n")""",
    }


def show_erasure(demo: Demo) -> None:
    """One object and one style erased: before, after, and what the judge says."""
    demo.results["erasure"] = []
    for target in ERASED:
        hit, kept = judged_for(target)
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
    subjects = [at(name, style) for name, style in MAPPED]
    with attach(demo.pipe, maps) as run:
        pixels = demo.draw(subjects)
    code = f"""\
import sparsefeat as sf
import torch
from sparsefeat.assets import load_pipeline

pipe, maps = load_pipeline(), sf.HeatMaps()
with sf.attach(pipe, maps) as run:
    image = {call_of(subjects[0])}.images[0]
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
    steer = Steer(sae, add={0: 1.0})
    measured = measure_overhead(demo.pipe, steer.at.path, steer, lambda: demo.draw([at("fox", "noto")]))
    middle = sorted(measured.step_s)[len(measured.step_s) // 2]
    hook = sorted(measured.hook_s)[len(measured.hook_s) // 2]
    demo.results["timings"].append({"name": "one denoising step, one image with guidance", "seconds": middle})
    demo.results["timings"].append({"name": "of which Steer(add) at one hookpoint", "seconds": hook})


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
    of_one_image = 2  # its features, and what the hook costs
    n_images = len(prompts_shown()) + len(every_cell()) + N_STEERED + n_erased() + len(MAPPED) + of_one_image
    demo = Demo(load_pipeline(), saes, load_judge(), Progress(n_images, "the demo"))
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
    with demo.timed(f"drawing {len(prompts_shown())} prompts"):
        draw_prompts(demo)
    with demo.timed(f"drawing {len(every_cell())} images with statistics at {len(demo.saes)} SAEs"):
        surveyed = survey(demo)
    with demo.timed("features of one image"):
        show_features(demo, surveyed)
    with demo.timed(f"{N_STEERED} steered images"):
        show_steering(demo, surveyed)
    with demo.timed(f"erasing {len(ERASED)} concepts, {n_erased()} images"):
        show_erasure(demo)
    with demo.timed(f"heat maps of {len(MAPPED)} images"):
        show_heat_maps(demo)
    show_overhead(demo)


def n_erased() -> int:
    """Images, before and after."""
    return sum(2 * (len(hit) + len(kept)) for hit, kept in map(judged_for, ERASED))


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
