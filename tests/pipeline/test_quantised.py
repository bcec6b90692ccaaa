"""Quantised models: their layers' weights are packed and cannot be read, and nothing of `attach` wants to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsefeat as sf
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.state import everything


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own quantisation is on its way to torchao
def test_attach_reads_and_edits_a_model_whose_linear_layers_are_int8(name):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = copy.deepcopy(family.build())
    block = family.blocks[0]
    part = block.path.partition(".")[0]
    torch.ao.quantization.quantize_dynamic(getattr(pipe, part), {nn.Linear}, dtype=torch.qint8, inplace=True)
    packed = [m for m in getattr(pipe, part).modules() if type(m).__module__.startswith("torch.ao.nn.quantized")]
    assert len(packed) > 5
    assert not any(isinstance(m, nn.Linear) for m in getattr(pipe, part).modules())

    def run() -> torch.Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=False))

    plain, before = run(), everything(pipe)
    place = sf.Hookpoint(block.path, stream=block.stream)
    watch = Watch(place)
    sae = SAE(SAEConfig(block.width, 4 * block.width, k=4)).eval()
    with attach(pipe, watch, Edit(zero, str(place)), rec := sf.Record(sae, at=place)) as session:
        assert torch.equal(run(), plain)
        assert len(session[rec].top(4)) == 4
    assert watch.rows[0].shape[1] == block.width
    with attach(pipe, Edit(push(), str(place))):
        assert not torch.equal(run(), plain)
    assert torch.equal(run(), plain)
    assert everything(pipe) == before
