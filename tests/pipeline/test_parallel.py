"""Models on several processes: one that shares its sequence out (context parallelism) is refused, on two gloo processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Watch, WatchAttention
from tests.pipeline.state import everything

FLUX = families()["flux"]
BLOCK = "transformer.transformer_blocks.0"
WORLD = 2


def _share(rank: int, folder: str, said: Any) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    pipe = FLUX.build()
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        FLUX.call(pipe, ["a fox"], guidance=False)
    before = len(watch.contexts)
    session = attach(pipe, watch)
    pipe.transformer.set_attention_backend("native")
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and there is none
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
    reasons = []
    try:
        FLUX.call(pipe, ["a fox"], guidance=False)
    except RuntimeError as error:
        reasons.append(str(error))
    session.close()
    state = everything(pipe)
    for instrument in (Watch(BLOCK), Watch(f"{BLOCK}.ff"), WatchAttention(f"{BLOCK}.attn")):
        try:
            attach(pipe, instrument)
        except RuntimeError as error:
            reasons.append(str(error))
    said.put((rank, before, reasons, everything(pipe) == state))
    torch.distributed.destroy_process_group()


def test_a_model_that_shares_its_sequence_out_is_refused_in_every_process(tmp_path: Path):
    pytest.importorskip("diffusers.hooks.context_parallel")
    spawn = multiprocessing.get_context("spawn")
    said = spawn.Queue()
    processes = [spawn.Process(target=_share, args=(rank, str(tmp_path), said)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    answers = sorted(said.get(timeout=600) for _ in processes)
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * WORLD
    for rank, (whose, seen, reasons, untouched) in enumerate(answers):
        assert (whose, seen, untouched) == (rank, 2, True)
        assert len(reasons) == 4
        assert all("shares its sequence out among several processes" in reason for reason in reasons)


def test_a_model_whose_layers_are_shared_out_is_not(monkeypatch):
    """Tensor parallelism leaves every row where it is."""

    class Layers:
        context_parallel_config = None
        tensor_parallel_config = object()

    pipe = FLUX.build()
    monkeypatch.setattr(pipe.transformer, "_parallel_config", Layers(), raising=False)
    attach(pipe, Watch(BLOCK)).close()
