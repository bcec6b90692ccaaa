"""A report's data as the demo gives them, made from real EmojiCanvas drawings and invented numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sparsefeat.assets import emojicanvas
from sparsefeat.report import overlay

HOOKPOINT = "unet.up_blocks.1.attentions.1:output"


def sample(n_features: int = 6, n_examples: int = 6, seed: int = 3) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    rng = np.random.default_rng(seed)
    canvas = emojicanvas.load()
    drawings, masks = canvas.on_white(), canvas.masks()
    objects = {name: index for index, name in enumerate(canvas.names)}
    images: dict[str, Image.Image] = {}

    def drawing(name: str, style: int = 0) -> str:
        key = f"{name}-{canvas.styles[style]}"
        images.setdefault(key, Image.fromarray(drawings[style, objects[name]]))
        return key

    def heat(key: str, name: str, style: int, label: str) -> str:
        """A blob somewhere on the drawing, on a 16 x 16 grid with a little noise."""
        y, x = np.mgrid[:16, :16]
        cy, cx = rng.uniform(4, 12, 2)
        covered = masks[style, objects[name]].reshape(16, 4, 16, 4).mean((1, 3))
        values = covered * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 20) + 0.06 * rng.random((16, 16))
        images[f"{key}-{label}"] = overlay(images[key], values)
        return f"{key}-{label}"

    def prompt(name: str, style: int = 0) -> str:
        return emojicanvas.prompt(name, canvas.styles[style])

    def example(name: str, style: int, label: str, score: float) -> dict[str, Any]:
        key = drawing(name, style)
        return {"image": key, "overlay": heat(key, name, style, label), "prompt": prompt(name, style), "score": score}

    shown = ("fox", "sunflower", "rocket", "alarm-clock", "watermelon", "castle")
    fox = drawing("fox")
    top = []
    for i in range(n_features):
        near = rng.permutation(len(canvas.names))[:n_examples]
        top.append(
            {
                "latent": int(rng.integers(2048)),
                "score": 14.283 / (i + 1.25),
                "maximum": 61.31 / (i + 1.1),
                "frequency_share": 0.4127 / (i + 1),
                "n_images_active": 197 - i,
                "overlay": heat(fox, "fox", 0, f"latent{i}"),
                "name": ("fox", None, "alarm clock", None)[i % 4],
                "evidence": {
                    "n_words": 54,
                    "p_chosen": (0.0031, 0.4127)[i % 2] + 0.001 * i,
                    "auc": 0.9987 - 0.0312 * i,
                    "chance": 0.8467 - 0.001 * i,
                    "p": (0.00021, 0.0731)[i % 2] + 0.001 * i,
                    "n_with": 2 + i,
                    "n_without": 98 - i,
                },
                "curves": {"by_step": rng.random(20).tolist(), "peaks": (9 * rng.random(12)).tolist()},
                "examples": [
                    example(canvas.names[o], int(rng.integers(4)), f"latent{i}", 13.8127 / (j + 1.1))
                    for j, o in enumerate(near)
                ],
            }
        )

    def faded(name: str, share: float) -> str:
        key = drawing(name)
        blend = Image.blend(images[key], Image.fromarray(drawings[2, objects["frog"]]), share)
        images[f"{key}-steered{share:.2f}"] = blend
        return f"{key}-steered{share:.2f}"

    def strip(name: str, times: tuple[float, ...]) -> list[dict[str, Any]]:
        span = times[-1] - times[0]
        return [
            {
                "times": t,
                "image": faded(name, (t - times[0]) / span),
                "judge_share": 0.0117 + 0.0731 * i,
                "verdict": f"{name}, noto",
            }
            for i, t in enumerate(times)
        ]

    def pair(name: str, style: int, after: str, style_after: int, is_target: bool) -> dict[str, Any]:
        return {
            "prompt": prompt(name, style),
            "before": drawing(name, style),
            "after": drawing(after, style_after),
            "is_target": is_target,
            "word": emojicanvas.words(name),
            "share_before": 0.9731 - 0.01 * style,
            "share_after": (0.0213 if is_target else 0.8817) + 0.01 * style,
            "judge_before": f"{emojicanvas.words(name)}, {canvas.styles[style]}",
            "judge_after": f"{emojicanvas.words(after)}, {canvas.styles[style_after]}",
        }

    fox_pairs = [pair("fox", style, "cat-face", style, True) for style in range(4)]
    fox_pairs += [pair(name, style, name, style, False) for name in ("panda", "rocket") for style in (0, 2)]
    style_pairs = [pair(name, 3, name, 1, True) for name in ("house", "guitar", "fox")]
    style_pairs += [pair(name, style, name, style, False) for name, style in (("house", 0), ("guitar", 1), ("fox", 2))]

    def counted(n: int, ua: float) -> dict[str, int]:
        after = round(20 * n * (1 - ua))
        return {"n_targets": 20 * n, "seen_before": 19 * n, "seen_after": after} | {
            "n_others": 40 * n,
            "right_before": 39 * n,
            "right_after": 38 * n,
        }

    results = {
        "version": "0.1.0",
        "date": "2026-11-22",
        "device": "AMD EPYC 9R14, 2 cores",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0", "triton": "3.7.1"},
        "pipeline": {"name": "the embedded EmojiCanvas pipeline", "n_steps": 20, "guidance": 3.0},
        "prompts": [{"prompt": prompt(name), "seed": 2000 + i, "image": drawing(name)} for i, name in enumerate(shown)],
        "features": {
            "hookpoint": HOOKPOINT,
            "sae": {"n_latents": 20480, "k": 32, "d_model": 1280, "fvu": 0.0871},
            "prompt": prompt("fox"),
            "image": fox,
            "n_images": 200,
            "top": top,
            "curves": {"concepts": [["fox", "noto"], ["alarm-clock", "mono"]] * 6, "choosing": [True, False] * 6},
            "code": "import sparsefeat as sf",
        },
        "steering": [
            {
                "hookpoint": HOOKPOINT,
                "latent": 1417,
                "kind": "object",
                "concept": "frog",
                "auc": 0.9371,
                "p": 0.0123,
                "n_latents": 20480,
                "usual": 1.4619,
                "curves": {"peaks": (9 * rng.random(12)).tolist()},
                "prompt": prompt("fox"),
                "tried": [
                    {
                        "concept": name,
                        "prompt": prompt("fox"),
                        "share_before": 0.0132,
                        "share_after": after,
                        "p": 0.0312,
                    }
                    for name, after in (("frog", 0.9317), ("owl", 0.1371))
                ],
                "strip": strip("fox", (-12.5, -8.0, -4.0, 0.0, 4.0, 8.0, 12.5)),
            },
            {
                "hookpoint": "unet.mid_block.attentions.0:diff",
                "latent": 88,
                "kind": "style",
                "concept": "noto",
                "auc": 0.8713,
                "p": 0.2145,
                "n_latents": 4096,
                "usual": 0.7317,
                "prompt": prompt("castle"),
                "strip": strip("castle", (-2.0, -1.0, 0.0, 1.0, 2.0)),
            },
        ],
        "erasure": [
            {
                "kind": "object",
                "target": "fox",
                "method": "SAeUron-style latent ablation",
                "pairs": fox_pairs,
                "counts": {
                    "n_targets": 8,
                    "seen_before": 6,
                    "seen_after": 1,
                    "removed": 5,
                    "n_others": 9,
                    "right_before": 7,
                    "right_after": 7,
                    "kept": 4,
                },
            },
            {
                "kind": "style",
                "target": "mono",
                "method": "SAeUron-style latent ablation",
                "pairs": style_pairs,
                "counts": {
                    "n_targets": 12,
                    "seen_before": 11,
                    "seen_after": 3,
                    "removed": 10,
                    "n_others": 16,
                    "right_before": 15,
                    "right_after": 14,
                    "kept": 13,
                },
            },
        ],
        "benchmark": {
            "device": "AMD EPYC 9R14, 2 cores",
            "date": "2026-11-21",
            "generation": {"object_accuracy": 0.9641, "style_accuracy": 0.9917, "n_images": 600}
            | {"by_style": {"noto": {"object_accuracy": 0.9533, "style_accuracy": 0.9866}}},
            "saes": [
                {"hookpoint": hookpoint, "n_latents": n_latents, "k": k, "d_model": 128, "fvu": fvu}
                | {"fvu_pca": 2 * fvu, "fvu_random": 5.5 * fvu, "dead_share": dead}
                | {"object_accuracy_unedited": 0.9911, "object_accuracy_spliced": 0.9822 - fvu}
                for hookpoint, n_latents, k, fvu, dead in (
                    (HOOKPOINT, 2048, 16, 0.0871, 0.0132),
                    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2:output", 4096, 32, 0.0423, 0.2071),
                )
            ],
            "erasure": [
                {"method": name, "target_kind": kind, "ua": ua, "ira": ira, "cra": cra, "frechet": frechet}
                | {"n_targets": n, "n_images": n * 216, "before_after": counted(n, ua)}
                for kind, n in (("object", 50), ("style", 4))
                for name, ua, ira, cra, frechet in (
                    ("no edit", 0.0341, 0.9641, 0.9917, 0.0),
                    ("negative prompt", 0.6127, 0.9012, 0.9613, 31.482),
                    ("latent ablation", 0.9413, 0.9527, 0.9884, 4.0291),
                    ("difference-of-means direction", 0.8806, 0.8911, 0.9721, 12.733),
                )
            ],
        },
        "judge": {
            "real": {"object_accuracy": 1.0, "style_accuracy": 0.9999, "n_images": 200},
            "held_out_augmentations": {"object_accuracy": 0.9934, "style_accuracy": 0.9982, "n_images": 800},
            "autoencoded": {"object_accuracy": 0.9955, "style_accuracy": 0.9977, "n_images": 201},
            "unseen_concepts": {"style_accuracy": 0.8058, "n_images": 1200},
            "unseen_vendor": {
                "noto": {"object_accuracy": 0.72, "n_images": 50},
                "mono": {"object_accuracy": 0.08, "n_images": 51},
            },
        },
        "overhead": {
            "device": "AMD EPYC 9R14, 2 cores",
            "rows": [
                {
                    "instrument": "Record(sae)",
                    "hook_seconds": 0.07368,
                    "step_seconds": 8.8273,
                    "share_of_step": 0.00805,
                },
                {
                    "instrument": "Steer(sae, add=…)",
                    "hook_seconds": 0.001671,
                    "step_seconds": 8.2627,
                    "share_of_step": 0.000205,
                },
            ],
        },
        "heat_maps": [
            {
                "prompt": prompt(name, style),
                "image": drawing(name, style),
                "words": [
                    {"word": word, "overlay": heat(drawing(name, style), name, style, f"word{j}")}
                    for j, word in enumerate([canvas.styles[style], "emoji", *emojicanvas.words(name).split()])
                ],
            }
            for name, style in (("fox", 0), ("alarm-clock", 1), ("birthday-cake", 2))
        ],
        "timings": [
            {"name": "load the pipeline", "seconds": 0.8134},
            {"name": "draw six images", "seconds": 12.411},
            {"name": "features", "seconds": 31.92},
            {"name": "heat maps", "seconds": 0.0217},
            {"name": "whole demo", "seconds": 148.7},
        ],
    }
    return results, images
