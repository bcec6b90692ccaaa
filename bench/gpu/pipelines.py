"""What instruments cost a pipeline on a GPU: `python -m bench.gpu pipelines --out FOLDER`, where diffusers is installed.

A UNet of Stable Diffusion 1.5's size at 512 x 512 with guidance, and one double block of FLUX.1 at 1024 x 1024, of random
weights, in half precision. Whole calls are timed, one with each program in turn, so that everything counts: hooks, kernels,
and what waits for the host. Of the memory, what a call takes beyond the pipeline's own peak.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch

import sparsefeat as sf
from bench.maps import EIGHT, RELATIONS, flux_block, sd_step
from bench.peers import importable
from bench.run import file_name
from sparsefeat.evaluation.sd_sized import HOOKPOINT
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import versions
from sparsefeat.whole import write_json

ROUNDS, STEPS = 7, 4
DTYPES = {"SD 1.5 step": torch.float16, "FLUX block": torch.bfloat16}
PLAIN = "no instrument"


def their_maps(pipe: Any) -> AbstractContextManager[Any]:
    from attention_map_diffusers import AttentionCapture

    return AttentionCapture(
        pipe, relations=RELATIONS["image_to_text"], heads="mean", timesteps="all", tokens=EIGHT, allow_large_maps=True
    )


def programs(case: str, pipe: Any, dtype: torch.dtype) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is done around a call, by name."""
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        PLAIN: nullcontext,
        "HeatMaps, 8 words": lambda: sf.attach(pipe, sf.HeatMaps(words=EIGHT)),
    }
    if case == "SD 1.5 step":
        torch.manual_seed(1)
        sae = sf.SAE(sf.SAEConfig(1280, 20_480, k=32, hookpoint=HOOKPOINT)).to("cuda", dtype).eval()
        scaled = sf.Steer(sae, scale=dict.fromkeys(range(64), 2.0), condition="both")
        found["Record(sae)"] = lambda: sf.attach(pipe, sf.Record(sae))
        found["Steer(sae, scale=…)"] = lambda: sf.attach(pipe, scaled)
        found["Steer(sae, add=…)"] = lambda: sf.attach(pipe, sf.Steer(sae, add={7: 8.0}, condition="both"))
    if not importable("attention_map_diffusers"):
        found["attention-map-diffusers, 8 words"] = lambda: their_maps(pipe)
    return found


def cost(case: str, build: Callable[..., tuple[Any, Callable[..., Any]]]) -> list[dict[str, Any]]:
    dtype = DTYPES[case]
    pipe, run = build(dtype=dtype, device="cuda", steps=STEPS)
    found: Mapping[str, Callable[[], AbstractContextManager[Any]]] = programs(case, pipe, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    peaks: dict[str, int] = {}
    faults: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name, around in found.items():
            if name in faults:
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            try:
                with around():
                    began = time.perf_counter()
                    run()
                    torch.cuda.synchronize()
                    seconds[name].append((time.perf_counter() - began) / STEPS)
            except Exception as error:  # another library's failure is a result
                if name.startswith("attention"):
                    faults[name] = f"{type(error).__name__}: {error}"[:300]
                    continue
                raise
            peaks[name] = torch.cuda.max_memory_allocated()
    plain = statistics.median(seconds[PLAIN][2:])
    rows = []
    for name in found:
        row: dict[str, Any] = {"case": case, "program": name}
        if name in faults:
            rows.append({**row, "note": faults[name]})
            continue
        step = statistics.median(seconds[name][2:])  # without what is compiled and recorded
        rows.append(
            {**row, "step_ms": 1000 * step, "more": step / plain - 1, "more_bytes": max(0, peaks[name] - peaks[PLAIN])}
        )
    return rows


@torch.no_grad()
def pipelines(out: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: python -m bench.maps cost and sparsefeat evaluate overhead measure a CPU")
    rows = []
    for case, build in (("SD 1.5 step", sd_step), ("FLUX block", flux_block)):
        for row in cost(case, build):
            rows.append(row)
            print(row, flush=True)
        torch.cuda.empty_cache()
        made = {"command": "python -m bench.gpu pipelines", "date": date.today().isoformat()}
        about = {"device": device_name(), "versions": versions(), "steps": STEPS, "rounds": ROUNDS}
        write_json(out / f"pipelines-{file_name(device_name())}.json", {**made, **about, "rows": rows})
