"""Ranks that share every batch lose, learn and write what one process does, whatever their number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsefeat.cli import app
from sparsefeat.inputs import Inputs
from sparsefeat.sae import SAE, SAEConfig, load_sae
from sparsefeat.sae.activations import batch_topk_encode
from sparsefeat.store import Field, ShardReader, ShardWriter
from sparsefeat.training import Drawing, Objective, PipelineRows, SAETrainer, TrainConfig
from sparsefeat.training.ranks import Ranks
from tests import killing
from tests.tiny import tiny_sd
from tests.training.test_trainer import superposition

D, N, K = 12, 40, 3
STEPS = 20
CODECS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({"k": K}, {"multi_topk": 0.125, "dead_after": 150}),
    "unbox": ({"k": K}, {"aux": "unbox", "reconstruction": "mse", "dead_after": 150}),
    "batch_topk": ({"activation": "batch_topk", "k": K, "inference": "threshold"}, {"dead_after": 150}),
    "matryoshka": ({"activation": "batch_topk", "k": K}, {"prefixes": (10, N), "reconstruction": "mse"}),
    "jumprelu": ({"activation": "jumprelu"}, {"sparsity": 1e-3, "penalty": "l0", "l0_target": 3.0}),
    "relu": ({"activation": "relu", "normalizer": "standardize"}, {"sparsity": 1e-2}),
}


def store(folder: Path) -> Path:
    rows = superposition(701, d=D, n=20)[0]
    with ShardWriter(folder, {"rows": Field(torch.float32, (D,))}, shard_rows=90) as writer:
        for part in rows.split(41):
            writer.append({"rows": part})
    return folder


def train(ranks: Ranks, folder: Path, codec: str, steps: int = STEPS, rows: str = "store", **changed: Any) -> None:
    sae_settings, objective = CODECS[codec]
    torch.manual_seed(ranks.rank)  # nothing depends on the global generator
    config = TrainConfig(
        steps=STEPS,
        batch_size=64,
        lr=1e-2,
        checkpoint_every=steps,
        log_every=1,
        objective=Objective(**objective),
        **changed,
    )
    if rows == "store":
        source: Any = ShardReader(folder.parent / "rows")
    elif rows == "tensor":
        source = superposition(701, d=D, n=20)[0]
    else:
        call = {"num_inference_steps": 2, "guidance_scale": 1.0}
        drawn = Drawing(tiny_sd(), Inputs(("a fox", "a cat", "an owl")), 2, call=call)
        source = PipelineRows(drawn, [rows], window=8, rows_per_image=20, dtype=torch.float32)
    d_model = 32 if rows.startswith("unet") else D
    trainer = SAETrainer(SAE(SAEConfig(d_model, N, **sae_settings)), source, config, folder, ranks=ranks)
    if steps < STEPS:
        for batches in source_of(trainer, ranks):
            trainer.sae.train()
            measured = trainer.train_step(batches[0], measure=True)
            trainer.metrics.add(measured or {})
            if trainer.step == steps:
                trainer.checkpoint()
                return
    sae = trainer.fit(progress=False)
    if ranks.first:
        sae.save(folder / "sae")


def source_of(trainer: SAETrainer, ranks: Ranks) -> Any:
    return trainer.source.stream(trainer.config.batch_size, trainer.config.seed, trainer.step, ranks)


def in_rank(rank: int, world: int, port: int, *arguments: Any, **options: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Ranks.of_environment().joined("cpu") as ranks:
        train(ranks, *arguments, **options)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def run(world: int, folder: Path, *arguments: Any, **options: Any) -> list[float]:
    """The losses."""
    port = free_port()
    killing.run_all([(in_rank, (rank, world, port, folder, *arguments), options) for rank in range(world)])
    return [json.loads(line)["fvu"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("codec", CODECS)
def test_one_two_and_four_ranks_have_the_same_losses_to_fp32_rounding(tmp_path, codec):
    store(tmp_path / "rows")
    worlds = (1, 2, 4) if codec in ("topk", "batch_topk") else (1, 3)
    losses = {world: torch.tensor(run(world, tmp_path / str(world), codec)) for world in worlds}
    assert len(losses[1]) == STEPS
    assert losses[1][-1] < 0.9 * losses[1][0]
    for world in worlds[1:]:
        # Sums in another order differ by some 1e-7; training carries that on, but no further than this in so few steps.
        torch.testing.assert_close(losses[world], losses[1], rtol=2e-5, atol=0)
    saes = [load_sae(tmp_path / str(world) / "sae") for world in worlds]
    x = superposition(50, d=D, n=20, seed=1)[0]
    for other in saes[1:]:
        torch.testing.assert_close(other(x), saes[0](x), rtol=0, atol=1e-3)


def test_the_number_of_ranks_may_change_when_a_run_goes_on(tmp_path):
    store(tmp_path / "rows")
    whole = run(1, tmp_path / "one", "topk")
    assert len(run(4, tmp_path / "changing", "topk", 7)) == 7
    changing = run(2, tmp_path / "changing", "topk")
    torch.testing.assert_close(torch.tensor(changing), torch.tensor(whole), rtol=2e-5, atol=0)


@pytest.mark.parametrize("rows", ["tensor", "unet.up_blocks.1.attentions.1"])
def test_ranks_share_tensors_and_what_a_pipeline_draws(tmp_path, rows):
    one, two = (torch.tensor(run(world, tmp_path / str(world), "topk", rows=rows)) for world in (1, 2))
    torch.testing.assert_close(two, one, rtol=2e-5, atol=0)


def test_the_largest_of_a_batch_are_found_wherever_they_are():
    """What one process of two would do, by turns: the other's part of each sum is worked out beside."""
    torch.manual_seed(0)
    rows, W = torch.randn(40, D), torch.randn(N, D)
    rows[:10] *= 3  # most of the largest are in the first part
    zero = (torch.zeros(N), torch.zeros(D))
    dense = (rows @ W.T).relu()
    edge = dense.flatten().topk(K * 40).values[-1]
    seen: list[list[torch.Tensor]] = [[], []]

    class Other(Exception):
        pass

    def run_part(i: int) -> Any:
        calls = iter(list(seen[1 - i]))

        def total(own: torch.Tensor) -> torch.Tensor:
            seen[i].append(own.clone())
            other = next(calls, None)
            if other is None:
                raise Other
            return own + other

        seen[i].clear()
        return batch_topk_encode(rows[20 * i : 20 * i + 20], W, *zero, K, total)

    for _ in range(200):  # each part runs until it needs what the other has not said yet
        try:
            first = run_part(0)
        except Other:
            first = None
        try:
            second = run_part(1)
        except Other:
            continue
        if first is not None:
            break
    for part, code in ((dense[:20], first), (dense[20:], second)):
        kept = torch.zeros_like(part).scatter_(1, code.indices.long(), code.values)
        torch.testing.assert_close(kept, part.where(part >= edge, 0), rtol=1e-5, atol=1e-5)


def test_ranks_that_are_none_are_said(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"no ranks .*start it with torchrun"):
        Ranks.of_environment()


@pytest.mark.embedded
def test_the_commands_run_under_torchrun_and_write_what_one_process_writes(tmp_path):
    """Collected by two ranks, trained by two, against one of each."""
    place = "unet.mid_block.attentions.0"
    collect = ["collect", "--at", place, "--limit", "70", "--batch", "2", "--steps", "1", "--rows-per-image", "8"]
    train = [
        "train",
        "--activations",
        "acts",
        "--latents",
        "64",
        "--k",
        "4",
        "--train-steps",
        "12",
        "--batch-size",
        "64",
    ]
    train += ["--lr", "1e-3", "--log-every", "1", "--dead-after", "100"]
    losses = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        for line in ([*collect, "--out", "acts"], [*train, "--out", "saes"]):
            said = in_this_process(folder, line) if world == 1 else under_torchrun(folder, line)
            assert len(said.splitlines()) == (2 if "train" in line else 1)  # the first rank alone speaks
        table = (folder / "saes" / place / "metrics.jsonl").read_text().splitlines()
        losses[world] = torch.tensor([json.loads(line)["fvu"] for line in table])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / w / "acts").rglob("*.safetensors")} for w in "12")
    assert one == two
    assert len(one) == 2
    torch.testing.assert_close(losses[2], losses[1], rtol=2e-5, atol=0)


def in_this_process(folder: Path, line: list[str]) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has: what is drawn is compared bit by bit
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = CliRunner().invoke(app, line)
    torch.set_num_threads(threads)
    assert run.exit_code == 0, run.output
    return run.stdout


def under_torchrun(folder: Path, line: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["-m", "sparsefeat.cli", *line]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout
