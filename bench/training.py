"""Whole training steps against other libraries, and what collecting costs: `python -m bench.training`, ten minutes.

A step is what each library's trainer does with a batch in memory: loss with AuxK over as many dead latents, gradients, clipping,
the decoder's constraint, Adam. Each library is in a process of its own, from the same weights, and they take turns; before a
time counts, its loss must be that of the reference. Its memory is what the process grows by from one made trainer to the peak of
its steps. Writes bench/results/training-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.run import RESULTS, file_name
from sparsefeat.evaluation.results import measured_on_embedded
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.sae_case import AUXK, SAECase, sae_case
from sparsefeat.whole import write_json

SHAPE = {"d_model": 1280, "n_latents": 20480, "k": 32}
ROWS = (256, 4096)
OURS = "sparsefeat"
LR = 1e-5  # the weights hardly move: every step costs what the first does
SAME_LOSS = 1e-3

Made = tuple[float, Callable[[], Any]]


def ours(case: SAECase) -> Made:
    from sparsefeat.sae import SAE, SAEConfig
    from sparsefeat.training import SAETrainer, TrainConfig

    rows, d_model = case.x.shape
    config = TrainConfig(steps=10**6, batch_size=rows, lr=LR, decay_steps=0)
    sae = SAE(SAEConfig(d_model, len(case.W_enc), k=case.k))
    trainer = SAETrainer(sae, case.x, config)
    learner = trainer.learner
    with torch.no_grad():
        for name, tensor in (("W_enc", case.W_enc), ("b_enc", case.b_enc), ("W_dec", case.W_dec), ("b_pre", case.b)):
            sae.get_parameter(name).copy_(tensor)
        sae.b_out.copy_(case.b)
        learner.get_buffer("scale").fill_(1)
        learner.get_buffer("target_scale").fill_(1)
        learner.get_buffer("rows_since_fired")[case.dead] = config.objective.dead_after
    sae.train()
    return float(learner.loss(case.x, 0).total.detach()), lambda: trainer.train_step(case.x)


def sparsify(case: SAECase) -> Made:
    from bench.peers import sparsify as adapter

    coder = adapter.coder(case)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)

    def step() -> None:
        out = coder(case.x, dead_mask=case.is_dead)
        (out.fvu + AUXK * out.auxk_loss).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return float(adapter.step((case, coder))["loss"]), step


def sae_lens(case: SAECase, **options: Any) -> Made:
    from bench.peers import sae_lens as adapter

    sae = adapter.sae(case, training=True, **options)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step() -> None:
        _loss, gradients = adapter.step((case, sae))
        for parameter, gradient in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return float(adapter.canonical((case, sae), adapter.step((case, sae)))["loss"]), step


def dictionary_learning(case: SAECase) -> Made:
    from bench.peers import dictionary_learning as adapter

    _, trainer = adapter.trainer(case)
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=LR, betas=(0.9, 0.999))
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    loss = float(adapter.canonical((case, trainer), adapter.step((case, trainer)))["loss"])
    return loss, lambda: trainer.update(1, case.x)


def overcomplete(case: SAECase) -> Made:
    """Its TopKSAE under a mean squared error, as its own `train_sae` has it: no dead latents, and so less work."""
    from bench.peers import overcomplete as adapter

    with adapter.what_its_import_needs():
        sae = adapter.sae(case).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        _, _, x_hat = sae(case.x)
        (case.x - x_hat).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    with torch.no_grad():
        missed = (case.x - case.b - sae(case.x)[2]).square().sum()  # it has no bias after the decoder
    return float(missed / (case.x - case.x.mean(0)).square().sum()), step


LIBRARIES: dict[str, Callable[..., Made]] = {
    OURS: ours,
    "sparsify": sparsify,
    "sae-lens": sae_lens,
    "sae-lens, sparse activations": lambda case: sae_lens(case, use_sparse_activations=True),
    "dictionary-learning": dictionary_learning,
    "overcomplete": overcomplete,
}
# What some do less than the others: their loss is compared with that of the reference without it.
NOTES = {"overcomplete": "no AuxK: its loss knows no dead latents"}


@torch.no_grad()
def references(case: SAECase) -> dict[bool, float]:
    """The loss in fp64, with AuxK and without, a chunk of rows at a time."""
    W_enc, b_enc, W_dec, b = (t.double() for t in (case.W_enc, case.b_enc, case.W_dec, case.b))
    wanted = case.x.shape[1] // 2
    k_aux = min(wanted, len(case.dead))
    missed = guessed = 0.0
    for x in case.x.double().split(256):
        found = (x - b) @ W_enc.T + b_enc
        error = x - b - _decoded(found, case.k, W_dec)
        missed += float(error.square().sum())
        guessed += float((_decoded(found[:, case.dead], k_aux, W_dec[case.dead]) - error).square().sum())
    variance = float((case.x.double() - case.x.double().mean(0)).square().sum())
    plain = missed / variance
    return {False: plain, True: plain + AUXK * min(len(case.dead) / wanted, 1.0) * guessed / variance}


def _decoded(found: torch.Tensor, k: int, W_dec: torch.Tensor) -> torch.Tensor:
    values, chosen = found.topk(k)
    return torch.zeros_like(found).scatter_(1, chosen, values.relu()) @ W_dec


def in_process(connection: Any, library: str, rows: int, threads: int, wanted: float) -> None:
    """Answers each "go" with the seconds of a step; before that, what is wrong with it, and at the end its memory."""
    torch.set_num_threads(threads)
    case = sae_case(rows, **SHAPE, dtype="float32", device="cpu", seed=0, dead_norm=0.3)
    try:
        peers.load()
        loss, step = LIBRARIES[library](case)
        fault = "" if abs(loss / wanted - 1) < SAME_LOSS else f"its loss is {loss:.6f}, not {wanted:.6f}"
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    connection.send(fault)
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    reset_peak()
    while connection.recv() == "go":
        began = time.perf_counter()
        step()
        connection.send(time.perf_counter() - began)
    connection.send(max(peak() - resident, 0))


def reset_peak() -> None:
    """Linux forgets the largest resident size when it is told so."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure_steps(rows: int, rounds: int, libraries: list[str]) -> Iterator[dict[str, Any]]:
    wanted = references(sae_case(rows, **SHAPE, dtype="float32", device="cpu", seed=0, dead_norm=0.3))
    context, running = multiprocessing.get_context("spawn"), {}
    for name in libraries:
        here, there = context.Pipe()
        process = context.Process(
            target=in_process, args=(there, name, rows, torch.get_num_threads(), wanted[name not in NOTES])
        )
        process.start()
        running[name] = (process, here, here.recv())  # one after the other: making them takes all threads
    times: dict[str, list[float]] = {name: [] for name, (_, _, fault) in running.items() if not fault}
    for number in range(rounds + 1):
        for name in list(times)[number % len(times) :] + list(times)[: number % len(times)]:
            running[name][1].send("go")
            seconds = running[name][1].recv()
            if number:  # the first makes the optimiser's state
                times[name].append(seconds)
    for name, (process, connection, fault) in running.items():
        record: dict[str, Any] = {"library": name, "rows": rows, **SHAPE, "fault": fault, "note": NOTES.get(name, "")}
        if not fault:
            connection.send("stop")
            ordered = sorted(times[name])
            record |= {
                "seconds": statistics.median(ordered),
                "fastest": ordered[0],
                "slowest": ordered[-1],
                "rows_per_second": rows / statistics.median(ordered),
                "peak_bytes": connection.recv(),
            }
        process.join()
        yield record


def measure_collecting(rounds: int) -> dict[str, float]:
    """Seconds of drawing eight images on the embedded pipeline, alone and with two hookpoints' rows going to disk."""
    import tempfile

    from sparsefeat.assets import emojicanvas, load_pipeline
    from sparsefeat.inputs import Inputs
    from sparsefeat.training import Drawing, collect_activations

    places = ["unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0"]
    drawing = Drawing(load_pipeline(), Inputs(emojicanvas.training_prompts()[:8]), 8, call={"num_inference_steps": 20, "guidance_scale": 3.0})  # fmt: skip
    alone, collecting = [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        list(drawing.draw(0, 8, []))
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            collect_activations(drawing, places, Path(folder) / "rows", rows_per_image=64)
            ended = time.perf_counter()
        if number:
            alone.append(middle - began)
            collecting.append(ended - middle)
    added = statistics.median(c / a - 1 for c, a in zip(collecting, alone, strict=True))
    return {
        "alone_seconds": statistics.median(alone),
        "collecting_seconds": statistics.median(collecting),
        "added": added,
    }


def table(content: dict[str, Any]) -> str:
    lines = [f"Measured on {content['date']}, {content['device']}, with `python -m bench.training`.", ""]
    for rows in ROWS:
        records = [r for r in content["steps"] if r["rows"] == rows]
        if not records:
            continue
        base = next((r for r in records if r["library"] == OURS and not r["fault"]), None)
        lines += [
            f"A training step of {rows:,} rows, {SHAPE['d_model']:,} to {SHAPE['n_latents']:,} latents, k = {SHAPE['k']}, float32:",
            "",
        ]
        lines += [
            "| | rows a second | a step | fastest to slowest | its time / ours | memory beyond weights | |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in records:
            if r["fault"]:
                lines.append(f"| {r['library']} | — | | | | | {r['fault']} |")
                continue
            ratio = "" if r is base or base is None else f"{r['seconds'] / base['seconds']:.2f}"
            spread = f"{r['fastest']:.3f} – {r['slowest']:.3f} s"
            lines.append(
                f"| {r['library']} | {r['rows_per_second']:,.0f} | {r['seconds']:.3f} s | {spread} | {ratio} | {r['peak_bytes'] / 2**20:,.0f} MiB | {r['note']} |"
            )
        lines.append("")
    c = content.get("collecting")
    if c:
        lines.append(
            f"Drawing eight images takes {c['alone_seconds']:.2f} s, and {c['collecting_seconds']:.2f} s while 64 positions a step at "
            f"two hookpoints are kept on disk: {c['added']:+.1%} (median of pairs)."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, nargs=2, default=(11, 3), help="of steps of 256 and of 4,096 rows")
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"training-{file_name(device_name())}.json"
    content: dict[str, Any] = {**measured_on_embedded(), "steps": []}
    content["collecting"] = measure_collecting(9)
    for rows, rounds in zip(ROWS, arguments.rounds, strict=True):
        content["steps"] += list(measure_steps(rows, rounds, arguments.only))
    write_json(path, content)
    path.with_suffix(".md").write_text(table(content))
    print(table(content))


if __name__ == "__main__":
    main()
