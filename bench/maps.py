"""Maps of attention beside attention-map-diffusers, in the environment that `make peers` builds.

    python -m bench.maps agree    the same map of every layer and step, on tiny pipelines of each family
    python -m bench.maps cost     a step of a UNet of SD 1.5's size and a FLUX block, without maps, with ours, with theirs;
                                  in seconds of the processor, of one thread (OMP_NUM_THREADS=1)

Both write to bench/results/maps.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.nn import functional as F

import sparsefeat as sf
from bench.peers import importable
from sparsefeat.evaluation.sd_sized import sd_sized_pipeline
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import resident_peak_beyond, versions
from sparsefeat.pipeline import AttentionCall, Context
from sparsefeat.pipeline.visits import Visits
from sparsefeat.whole import write_json
from tests.families import families

RESULTS = Path(__file__).parent / "results" / "maps.json"
FAMILIES = ("sd", "sdxl", "sana", "wan", "sd3", "flux", "flux2", "z_image", "cogvideox", "hunyuan_video")
RELATIONS = {"image_to_text": ("image->text", "video->text"), "text_to_image": ("text->image", "text->video")}
ROUNDS = 1
"""Of a step of seconds, in which the time of the maps alone is taken."""
EIGHT = list(range(1, 9))
"""Eight tokens."""


def captured(pipe: Any, relations: tuple[str, ...], run: Callable[[], Any], **options: Any) -> tuple[Any, float]:
    """Their maps, and the seconds that they took once the pipeline was done."""
    from attention_map_diffusers import AttentionCapture

    with AttentionCapture(pipe, relations=relations, heads="mean", **options) as capture:
        run()
    began = time.process_time()
    return capture.compute(), time.process_time() - began


# ------------------------------------------------------------------------------------------------------------ agreement


def agreement(name: str, direction: str) -> dict[str, Any]:
    """The largest difference of a map of one layer and step; or why there is nothing to compare."""
    tiny = families()[name]
    pipe = tiny.build()
    runs, paths = tiny.runs(tiny.guidance == "cfg"), RELATIONS[direction]

    def run() -> Any:
        size = "wide" if name == "z_image" else "square"  # theirs keeps what pads an image to 32 tokens
        return tiny.call(pipe, ["red fox"], guidance=tiny.guidance == "cfg", size=size, steps=2)

    row = {"family": name, "direction": direction}
    try:
        maps = sf.HeatMaps(direction=direction, keep=["layers", "steps"])  # type: ignore[arg-type]
        with sf.attach(pipe, maps) as session:
            run()
    except ValueError as error:
        return {**row, "note": f"ours: {error}"}
    try:
        maps_of, _ = captured(pipe, paths, run, timesteps="all", mode="exact", allow_large_maps=True)
    except Exception as error:  # whatever it raises on a pipeline
        return {**row, "note": f"theirs: {type(error).__name__}: {error}"[:200]}
    theirs: dict[str, list[torch.Tensor]] = {}
    for record in maps_of.records:
        if record.relation in paths and record.data is not None:
            theirs.setdefault(record.layer_id, []).append(record.data)
    differences, shapes, compared = [], set(), 0
    for part, held in session[maps].sums.items():
        assert part.layer is not None
        assert part.step is not None
        own = held.total[0, 0] / held.count[0]
        for index, data in enumerate(theirs.get(part.layer, [])):
            chunks = runs[index % len(runs)]
            if index // len(runs) == part.step and "cond" in chunks:
                found = data[chunks.index("cond") * data.shape[0] // len(chunks), 0]
                found = found if direction == "image_to_text" else found.T
                if found.shape != own.shape:
                    shapes.add(f"theirs {tuple(found.shape)}, ours {tuple(own.shape)}")
                    continue
                compared += 1
                differences.append(float((found - own).abs().max() / own.abs().max()))
    note = "; ".join(sorted(shapes)) or ("" if compared else "no map of a layer that both have")
    largest = max(differences, default=None)
    missing = len({part.layer for part in session[maps].sums} - set(theirs))
    return {**row, "maps": compared, "largest_relative_difference": largest, "layers_only_ours": missing, "note": note}


# ----------------------------------------------------------------------------------------------------------------- cost


def sd_step(dtype: torch.dtype = torch.float32, device: str = "cpu", steps: int = 1) -> tuple[Any, Callable[[], Any]]:
    pipe = sd_sized_pipeline(device).to(dtype)
    embeds = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.flip(1), "num_inference_steps": steps}
    return pipe, lambda: pipe(**given, generator=torch.Generator().manual_seed(1), output_type="latent")


def flux_block(
    dtype: torch.dtype = torch.float32, device: str = "cpu", steps: int = 1
) -> tuple[Any, Callable[[], Any]]:
    """One double block of FLUX.1 at 1024 x 1024: 4,096 image tokens and 512 of text."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=0, guidance_embeds=False).eval()
    vae = diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(4,) * 4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe = pipe.to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": torch.randn(1, 512, 4096), "pooled_prompt_embeds": torch.randn(1, 768)}
    given = {name: tensor.to(device, dtype) for name, tensor in given.items()}
    size = {"height": 1024, "width": 1024, "num_inference_steps": steps, "output_type": "latent"}
    return pipe, lambda: pipe(**given, **size, generator=torch.Generator().manual_seed(1))


@contextmanager
def attention_seconds(pipe: Any, paths: tuple[str, ...]) -> Iterator[list[float]]:
    """How long each call of `F.scaled_dot_product_attention` in the modules at `paths` takes."""
    found: list[float] = []
    inside: list[None] = []
    original, handles = F.scaled_dot_product_attention, []

    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        began = time.process_time()
        result = original(*args, **kwargs)
        if inside:
            found.append(time.process_time() - began)
        return result

    for path in paths:
        root, _, inner = path.partition(".")
        module = getattr(pipe, root).get_submodule(inner)
        handles.append(module.register_forward_pre_hook(lambda *_: inside.append(None)))
        handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    F.scaled_dot_product_attention = timed
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()


@contextmanager
def map_seconds() -> Iterator[list[float]]:
    """How long what a session does at each attention takes."""
    found: list[float] = []
    original = Visits.attention

    def timed(self: Visits, *args: Any) -> None:
        began = time.process_time()
        original(self, *args)
        found.append(time.process_time() - began)

    Visits.attention = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Visits.attention = original  # type: ignore[method-assign]


@contextmanager
def peer_seconds() -> Iterator[list[float]]:
    """How long what attention-map-diffusers does at each attention takes; what it computes afterwards comes on top."""
    from attention_map_diffusers import AttentionCollector

    found: list[float] = []
    original = AttentionCollector.capture_qk

    def timed(self: Any, **given: Any) -> Any:
        began = time.process_time()
        result = original(self, **given)
        found.append(time.process_time() - began)
        return result

    AttentionCollector.capture_qk = timed
    try:
        yield found
    finally:
        AttentionCollector.capture_qk = original


class Kept(sf.HeatMaps):
    """The last attention, to do its maps again alone."""

    _largest: tuple[AttentionCall, Context] | None = None

    @property
    def largest(self) -> tuple[AttentionCall, Context] | None:
        return self._largest

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        if self._largest is None or call.query.numel() >= self._largest[0].query.numel():
            self._largest = call, context
        super().at_attention(call, context)


def peak_of_a_map(pipe: Any, run: Callable[[], Any]) -> int:
    """What the process takes more while the maps of the largest attention are added up, buffers included."""
    kept = Kept(words=EIGHT)
    with sf.attach(pipe, kept):
        run()
    assert kept.largest is not None
    call, context = kept.largest
    alone = sf.HeatMaps(words=EIGHT)
    alone.attentions(pipe)
    return resident_peak_beyond(lambda: alone.at_attention(call, context))


def warmed() -> None:
    """What is made once in a process, by the first map of either: it is no part of a step."""
    for name in ("sd", "flux"):
        tiny = families()[name]
        pipe = tiny.build()

        def run(tiny: Any = tiny, pipe: Any = pipe) -> Any:
            return tiny.call(pipe, ["red fox"], guidance=tiny.guidance == "cfg")

        with sf.attach(pipe, sf.HeatMaps(words=[1, 2])):
            run()
        if not importable("attention_map_diffusers"):
            captured(pipe, RELATIONS["image_to_text"], run, timesteps="last")


def cost(name: str, build: Callable[[], tuple[Any, Callable[[], Any]]]) -> list[dict[str, Any]]:
    pipe, run = build()
    maps = sf.HeatMaps(words=EIGHT)
    paths = maps.attentions(pipe)
    peer = importable("attention_map_diffusers")
    seconds: dict[str, list[float]] = {"none": [], "sparsefeat": [], "attention-map-diffusers": []}
    attention, at_maps, at_theirs, stored = [], [], [], 0
    run()
    for _ in range(ROUNDS):
        with attention_seconds(pipe, paths) as watched:
            began = time.process_time()
            run()
            seconds["none"].append(time.process_time() - began)
        attention.append(sum(watched))
        with sf.attach(pipe, maps) as session, map_seconds() as ours:
            began = time.process_time()
            run()
            seconds["sparsefeat"].append(time.process_time() - began)
        at_maps.append(sum(ours))
        if not peer:
            with peer_seconds() as theirs:
                began = time.process_time()
                found, computing = captured(pipe, RELATIONS["image_to_text"], run, timesteps="last", tokens=EIGHT)
                seconds["attention-map-diffusers"].append(time.process_time() - began)
            at_theirs.append(sum(theirs) + computing)
            stored = sum(r.data.numel() * r.data.element_size() for r in found.records if r.data is not None)
    plain = statistics.median(seconds["none"])
    rows = [{"case": name, "method": "none", "seconds": plain, "attention_seconds": statistics.median(attention)}]

    def row_of(method: str, of_maps: list[float], **memory: int) -> dict[str, Any]:
        own = statistics.median(of_maps)
        shares = {"share_of_step": own / plain, "share_of_attention": own / statistics.median(attention)}
        took = {"seconds": statistics.median(seconds[method]), "map_seconds": own}
        return {"case": name, "method": method, **took, **shares, **memory}

    rows.append(row_of("sparsefeat", at_maps, held_bytes=session[maps].bytes, peak_bytes=peak_of_a_map(pipe, run)))
    if peer:
        rows.append({"case": name, "method": "attention-map-diffusers", "note": peer})
    else:
        rows.append(row_of("attention-map-diffusers", at_theirs, held_bytes=stored))
    return rows


def write(key: str, rows: list[dict[str, Any]]) -> None:
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    machine = {"device": device_name(), "threads": torch.get_num_threads(), "versions": versions()}
    made = {"command": f"python -m bench.maps {key}", "date": date.today().isoformat(), **machine, "rows": rows}
    write_json(RESULTS, {**before, key: made})


@torch.no_grad()
def main(what: str) -> None:
    rows = []
    if what == "agree":
        made: Iterator[Any] = ([agreement(n, d)] for n in FAMILIES for d in RELATIONS)
    else:
        warmed()
        made = (cost(n, build) for n, build in (("SD 1.5 step", sd_step), ("FLUX block", flux_block)))
    for some in made:
        for row in some:
            rows.append(row)
            print(json.dumps(row), flush=True)
    write(what, rows)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("agree", "cost"):
        raise SystemExit(__doc__)
    main(sys.argv[1])
