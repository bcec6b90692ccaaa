"""What each click of the explorer costs on the embedded pipeline, without a browser: `python -m bench.explore`.

From the click to the pictures that the page would show: seconds, seconds of the processor in all threads, and how often the
denoiser ran. Twenty steps, and no image is drawn before its click. Clicks come in the order of a visit, so that what an
earlier one kept serves a later one, as on the page.

Writes bench/results/explore.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import date
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from bench.run import RESULTS
from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.assets.embedded import GUIDANCE, N_STEPS, embedded_fingerprint
from sparsefeat.cli.commands.explore import open_explorer
from sparsefeat.cli.opening import PipelineChoice, SAEChoice
from sparsefeat.explore import Asked
from sparsefeat.explore.page import ADD, EVERYWHERE, PAINTED, SIDE, Page, Tab
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import versions
from sparsefeat.whole import write_json

WITHIN = 5.0
"""Seconds in which an answer is wanted."""
SAVING = ("edit", False)


def painting() -> dict[str, Any]:
    """What the page sends of a brush that went over the upper half."""
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste((255, 62, 165, 255), (0, 0, SIDE, SIDE // 2))
    return {"layers": [layer]}


def visit(page: Page, asked: Asked) -> dict[str, Callable[[], dict[Any, Any]]]:
    """The clicks by name, in their order."""
    tab = Tab()

    def draw(prompt: str) -> dict[Any, Any]:
        return page.on_draw(tab, prompt, asked.seed, asked.steps, asked.guidance, *SAVING)

    def steer(strength: float, where: str = EVERYWHERE, last: int = asked.steps) -> dict[Any, Any]:
        return page.on_steer(tab, *SAVING, painting(), ADD, where, strength, 1, last)

    fox, owl = asked.prompt, canvas.prompt("owl", "noto")
    clicks: dict[str, Callable[[], dict[Any, Any]]] = {
        "draw, with features and maps of the words": lambda: draw(fox),
        "draw the same again": lambda: draw(fox),
        "choose a feature": lambda: page.on_choose(tab, SimpleNamespace(index=0)),
        "find a latent by its number": lambda: page.on_find(tab, "7"),
        "features of the other SAE": lambda: page.on_sae(tab, 1),
        "choose one of these": lambda: page.on_choose(tab, SimpleNamespace(index=0)),
        "steer it with the slider": lambda: steer(5.0),
        "steer it with the slider, further": lambda: steer(8.0),
        "bring the slider back": lambda: steer(5.0),
        "steer it where it was painted, in the first half": lambda: steer(5.0, PAINTED, asked.steps // 2),
        "take the edit out": lambda: page.on_list(tab, *SAVING, []),
    }
    for method in page.explorer.methods:
        clicks[f"erase fox by {method}"] = lambda method=method: page.on_erase(tab, *SAVING, "fox", method)
        clicks[f"take {method} out"] = lambda: page.on_list(tab, *SAVING, [])
    clicks[f"erase owl by {page.explorer.methods[0]}"] = lambda: page.on_erase(
        tab, *SAVING, "owl", page.explorer.methods[0]
    )
    clicks["draw another prompt, with that edit at work"] = lambda: draw(owl)
    return clicks


def measured(page: Page, asked: Asked) -> Iterator[dict[str, Any]]:
    """A row for each click of a visit.

    Raises:
        RuntimeError: a click said that it could not be done.
    """
    runs: list[int] = []
    hook = page.explorer.pipe.unet.register_forward_pre_hook(lambda *given: runs.append(1))
    try:
        for name, click in visit(page, asked).items():
            runs.clear()
            began, busy = time.perf_counter(), time.process_time()
            shown = click()
            took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - busy}
            told = str(shown.get(page.status, ""))
            if "error" in told:
                raise RuntimeError(f"{name}: {told}")
            yield {"click": name, **took, "denoiser_runs": len(runs)}
    finally:
        hook.remove()


def main() -> None:
    choice = PipelineChoice(None, "cpu", N_STEPS)
    began = time.perf_counter()
    explorer = open_explorer(choice, SAEChoice(None, None, None, "explore"))
    asked = Asked(canvas.prompt("fox", "noto"), 0, N_STEPS, GUIDANCE)
    page = Page(explorer, asked)
    rows: list[dict[str, Any]] = [{"click": "open the page", "seconds": time.perf_counter() - began}]
    print(f"{rows[0]['seconds']:7.2f} s to open the page", flush=True)
    for row in measured(page, asked):
        rows.append(row)
        late = f"  over {WITHIN:g} s" * (row["seconds"] > WITHIN)
        took = (
            f"{row['seconds']:7.2f} s {row['processor_seconds']:7.2f} s of the processor {row['denoiser_runs']:4d} runs"
        )
        print(f"{took}  {row['click']}{late}", flush=True)
    machine = {"device": device_name(), "threads": torch.get_num_threads(), "versions": versions()}
    made = {"command": "python -m bench.explore", "date": date.today().isoformat(), "weights": embedded_fingerprint()}
    write_json(RESULTS / "explore.json", {**made, **machine, "steps": N_STEPS, "rows": rows})


if __name__ == "__main__":
    main()
