"""What ranks send each other in a training step, counted and reckoned: `python -m bench.wire`, a minute.

Counted: two gloo processes train a small SAE, and every collective's tensor is added up. It must be what the formula says,

    4 bytes (2 n d + n + d) + some hundred bytes       W_enc, W_dec, b_enc, b_out; losses, counts; batch mean of d

and n int64 counts of who fired. A ring all-reduce makes each rank send 2 (ranks - 1) / ranks times that. Reckoned: the same for
the published shapes on 8 and 64 GPUs, beside the arithmetic of a step and the speeds that the makers of the hardware state.
With `--measure`: how long steps of one and of two processes with a thread each take here, on the same batches.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Objective, Ranks, SAETrainer, TrainConfig

SMALL = (48, 640, 8)
SHAPES = {"SDXL, unbox": (1280, 5120, 10), "SD 1.5, SAeUron": (1280, 20480, 32), "FLUX, fae": (3072, 65536, 64)}
ROWS = 4096  # a rank's, a step

# What the makers state of an H100 SXM and of its usual network: dense bf16 products, NVLink in one direction, memory, and
# one 400 Gb/s adapter a GPU. None of it was measured here.
PRODUCT, NVLINK, MEMORY, ADAPTER = 989e12, 450e9, 3.35e12, 50e9
SHARE_OF_PRODUCT = 0.5  # of the stated rate that large products reach, a guess on the careful side


# FLUX.1: 12 billion weights, each multiplied and added once a token; 4,096 tokens of the image and 512 of the text.
PARAMETERS, TOKENS, STEPS = 12e9, 4608, 50


def gradient_bytes(d: int, n: int) -> int:
    """Float32, all weights that are trained."""
    return 4 * (2 * n * d + n + d)


def other_bytes(d: int, n: int) -> int:
    """Counts of who fired (int64), the batch's mean; the scalars are left out."""
    return 8 * n + 4 * d


def sent(total: int, ranks: int) -> float:
    """By each rank of a ring."""
    return 2 * (ranks - 1) / ranks * total


def in_rank(rank: int, world: int, port: int, shape: tuple[int, int, int], rows: int, steps: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    d, n, k = shape
    with Ranks.of_environment().joined("cpu") as ranks:
        x = torch.randn(4 * rows, d, generator=torch.Generator().manual_seed(0))
        config = TrainConfig(steps=steps, batch_size=rows, lr=1e-3, objective=Objective(auxk=0.0))
        trainer = SAETrainer(SAE(SAEConfig(d, n, k=k)), x, config, ranks=ranks)
        batches = trainer.source.stream(rows, 0, 0, ranks)
        trainer.sae.train()
        trainer.train_step(next(batches)[0])
        counted, times, real = [], [], dist.all_reduce

        def counting(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
            counted.append(tensor.nbytes)
            return real(tensor, *rest, **named)

        dist.all_reduce = counting
        for _ in range(steps):
            batch = next(batches)[0]
            began = time.perf_counter()
            trainer.train_step(batch)
            times.append(time.perf_counter() - began)
        dist.all_reduce = real
    if rank == 0:
        results.put((sum(counted) // steps, len(counted) // steps, statistics.median(times)))


def run(world: int, shape: tuple[int, int, int], rows: int, steps: int) -> tuple[int, int, float]:
    """Bytes and collectives of a step at one rank, and the seconds of a step."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    ranks = [context.Process(target=in_rank, args=(r, world, port, shape, rows, steps, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found = results.get()
    for process in ranks:
        process.join()
    return found


def costs(shape: tuple[int, int, int], gpus: int) -> tuple[float, float, float]:
    """Seconds on the wire and of arithmetic in a step, and of the latter what does not grow with the rows."""
    d, n, k = shape
    total = gradient_bytes(d, n) + other_bytes(d, n)
    wire = NVLINK if gpus <= 8 else ADAPTER
    products = 2 * ROWS * n * d  # the encoder's; of its gradients and the decoder's, rows k d are gathered
    gathered = 4 * 4 * ROWS * k * d
    optimizer = 4 * (2 * n * d) * 8  # weights, gradient and two moments, most of them read and written
    compute = products / (PRODUCT * SHARE_OF_PRODUCT) + (gathered + optimizer) / MEMORY
    return sent(total, gpus) / wire, compute, optimizer / MEMORY


def flux_step(gpus: int) -> float:
    over, compute, _ = costs(SHAPES["FLUX, fae"], gpus)
    return over + compute


def reckoned(name: str, shape: tuple[int, int, int], gpus: int) -> str:
    d, n, _ = shape
    total = gradient_bytes(d, n) + other_bytes(d, n)
    over, compute, fixed = costs(shape, gpus)
    memory = 16 * (2 * n * d)
    step = over + compute  # one after the other: gradients are summed when all are there
    reading = 2 * d * ROWS / step  # float16 rows
    needed = (over - fixed) / (compute - fixed) * ROWS
    return (
        f"| {name} | {gpus} | {total / 1e6:,.0f} MB | {sent(total, gpus) / 1e6:,.0f} MB | {1e3 * over:.1f} ms | {1e3 * compute:.1f} ms "
        f"| {memory / 1e9:.1f} GB | {reading / 1e9:.1f} GB/s | {max(needed, 0):,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also time one and two processes")
    arguments = parser.parse_args()
    d, n, _ = SMALL
    counted, collectives, _ = run(2, SMALL, 256, 3)
    formula = gradient_bytes(d, n) + other_bytes(d, n)
    print(
        f"counted at {d} to {n} latents, two ranks: {counted:,} bytes in {collectives} collectives; formula {formula:,}"
    )
    if not formula <= counted <= formula + 1024:
        raise SystemExit("the formula does not hold")
    print()
    print(
        "| SAE | GPUs | summed a step | sent by a rank | on the wire | compute | memory a GPU | reading a GPU | rows a rank where wire and compute are equal |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for gpus in (8, 64):
            print(reckoned(name, shape, gpus))
    seconds = 2 * PARAMETERS * TOKENS * STEPS / (PRODUCT * SHARE_OF_PRODUCT)
    print()
    print(
        f"FLUX.1 draws an image of 1024 x 1024 in {STEPS} steps in {seconds:.0f} s on one GPU, {4096 * STEPS / seconds:,.0f} rows a second if "
        f"all are kept, {64 * STEPS / seconds:,.0f} if 64 a step are; an SAE of its size trains on {ROWS / flux_step(8):,.0f} a second a GPU."
    )
    if arguments.measure:
        print()
        for shape in ((320, 5120, 32),):
            one, two = (run(world, shape, 2048, 8)[2] for world in (1, 2))
            print(
                f"here, {shape[0]} to {shape[1]:,}, k = {shape[2]}, 2,048 rows: one process {1e3 * one:.0f} ms a step, two {1e3 * two:.0f} ms, {one / two:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
