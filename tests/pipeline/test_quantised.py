"""Quantised models: their layers' weights are packed and cannot be read, and nothing of `attach` wants to.

torchao's and bitsandbytes' int8 layers are in the matrix; here are torch's own, those of GGUF files, a model opened from
such a file, and Nunchaku's.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import sparsefeat as sf
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.families import Block, families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.state import everything


def _torch_int8(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def _gguf(model: nn.Module) -> None:
    """The layers of diffusers for GGUF files, in Q8_0 where a row is made of its blocks of 32 and in BF16 elsewhere."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    layers = pytest.importorskip("diffusers.quantizers.gguf.utils")

    def layer(linear: nn.Linear) -> nn.Module:
        kinds = gguf.GGMLQuantizationType
        kind = kinds.BF16 if linear.in_features % 32 else kinds.Q8_0
        packed = gguf.quants.quantize(linear.weight.detach().numpy().astype(np.float32), kind)
        made = layers.GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        made.weight = layers.GGUFParameter(torch.from_numpy(np.array(packed)), quant_type=kind)
        made.bias = linear.bias
        return made

    _replace(model, layer)


def _nunchaku(model: nn.Module) -> None:
    """Nunchaku's layers, whose product runs on its GPU kernels alone: here a product of PyTorch's stands in its place."""
    layers = _nunchaku_layers()

    class OnACPU(layers.AWQW4A16Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.rounded, self.own_bias)

    def layer(linear: nn.Linear) -> nn.Module:
        made = OnACPU(linear.in_features, linear.out_features, group_size=1)
        step = linear.weight.detach().abs().amax() / 7
        made.rounded, made.own_bias = (linear.weight.detach() / step).round() * step, linear.bias
        return made

    _replace(model, layer)


def _nunchaku_layers() -> Any:
    """diffusers' module of them, whose import fetches the kernels: here it is given none."""
    pytest.importorskip("diffusers.quantizers.nunchaku", reason="this diffusers has no Nunchaku layers")
    kernels = types.SimpleNamespace(get_kernel=lambda *_, **__: types.SimpleNamespace(ops=None))
    there = {"is_kernels_available": lambda: True, "is_kernels_version": lambda *_: True}
    with (
        mock.patch.dict(sys.modules, {"kernels": kernels}),
        mock.patch.multiple("diffusers.utils", **there),
        mock.patch("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True),
    ):
        return importlib.import_module("diffusers.quantizers.nunchaku.utils")


def _replace(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> None:
    for path, linear in [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer(linear).eval())


QUANTISERS: dict[str, Callable[[nn.Module], Any]] = {"torch": _torch_int8, "GGUF": _gguf, "Nunchaku": _nunchaku}


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own quantisation is on its way to torchao
def test_attach_reads_and_edits_a_model_whose_linear_layers_are_packed(name, quantiser):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = copy.deepcopy(family.build())
    block = family.blocks[0]
    part = block.path.partition(".")[0]
    QUANTISERS[quantiser](getattr(pipe, part))
    assert not any(type(m) is nn.Linear for m in getattr(pipe, part).modules())

    def run() -> torch.Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=False))

    _keeps_its_promises(pipe, block, run)


def test_attach_reads_and_edits_a_transformer_opened_from_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    family = families()["qwen_image"]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = copy.deepcopy(family.build())
    model = pipe.transformer
    kinds, writer = gguf.GGMLQuantizationType, gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "qwen_image")
    for name, tensor in model.state_dict().items():
        kind = kinds.F32 if tensor.ndim < 2 else kinds.BF16 if tensor.shape[-1] % 32 else kinds.Q8_0
        packed = gguf.quants.quantize(tensor.numpy().astype(np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(tmp_path / "transformer")
    pipe.transformer = type(model).from_single_file(
        str(tmp_path / "tiny.gguf"),
        config=str(tmp_path / "transformer"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert {type(m).__name__ for m in pipe.transformer.modules()} & {"GGUFLinear"}

    def run() -> torch.Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=True))

    block = next(block for block in family.blocks if block.path.startswith("transformer."))
    _keeps_its_promises(pipe, block, run)


def _keeps_its_promises(pipe: Any, block: Block, run: Callable[[], torch.Tensor]) -> None:
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
