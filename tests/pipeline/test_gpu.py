"""What only a GPU can show of `attach`: half precision on the device, and the three ways of offloading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparsefeat.pipeline import Hookpoint, attach
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.state import everything

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FAMILIES = ("sd", "sdxl", "flux", "wan")
MODES = ("on the device", "fp16", "model offload", "sequential offload", "group offload", "compiled")


def placed(name: str, mode: str) -> Any:
    pipe = copy.deepcopy(families()[name].build())
    if mode == "model offload":
        pipe.enable_model_cpu_offload()
    elif mode == "sequential offload":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to("cuda", torch.float16 if mode == "fp16" else torch.float32)
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    if mode == "group offload":
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        denoiser.enable_group_offload(cuda, cpu, offload_type="leaf_level", use_stream=True)
    return pipe


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_attach_keeps_its_promises_on_a_gpu(name, mode):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = placed(name, mode)
    block = family.blocks[0]
    place = str(Hookpoint(block.path))

    def run() -> torch.Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=family.guidance == "cfg")).cpu()

    if mode == "compiled":
        watch = Watch(place)
        plain = run()
        with attach(pipe, watch):
            denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
            denoiser.compile()
            torch.testing.assert_close(run(), plain, rtol=1e-3, atol=1e-3)
        assert watch.rows
        return
    plain = run()
    before = everything(pipe)
    watch = Watch(place)
    with attach(pipe, watch):
        assert torch.equal(run(), plain)
    assert watch.rows[0].is_cuda
    with attach(pipe, Edit(zero, place)):
        assert torch.equal(run(), plain)
    with attach(pipe, Edit(push(), place)):
        assert not torch.equal(run(), plain)
    assert torch.equal(run(), plain)
    if mode not in (
        "model offload",
        "sequential offload",
    ):  # these put their own hooks on again at the end of each call
        assert everything(pipe) == before
