"""What only a GPU can show of `attach`: half precision on the device, and the three ways of offloading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sparsefeat as sf
from sparsefeat.assets import JOINT, block_sae_folder, load_pipeline, sae_folders
from sparsefeat.assets.embedded import JOINT_SAES
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


@pytest.mark.parametrize("joint", [False, True], ids=["unet", "joint"])
def test_an_embedded_pipeline_draws_maps_and_edits_as_on_a_cpu(joint: bool, monkeypatch: pytest.MonkeyPatch):
    """By the kernels that are the default on the device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sae_at = sae_folders(JOINT_SAES)[0] if joint else block_sae_folder()
    seen: dict[str, tuple[Any, ...]] = {}
    for device in ("cpu", "cuda"):
        pipe = (load_pipeline(JOINT) if joint else load_pipeline()).to(device)
        sae = sf.load_sae(sae_at).to(device)

        def draw(*instruments: Any, pipe: Any = pipe) -> tuple[torch.Tensor, Any]:
            generator = torch.Generator().manual_seed(0)
            with sf.attach(pipe, *instruments) as run:
                images = pipe(
                    "a noto emoji of a fox", num_inference_steps=4, guidance_scale=3.0, generator=generator,
                    output_type="pt",
                ).images  # fmt: skip
            return images.float().cpu(), run

        record, words = sf.Record(sae), sf.HeatMaps()
        plain, run = draw(record, words)
        latent = run[record].top(1)[0].latent
        edited, _ = draw(sf.Steer(sae, scale={latent: 20.0}))
        heat = torch.as_tensor(run[record].heat(latent).values).float().cpu()
        word = torch.as_tensor(run[words].word("fox").values).float().cpu()
        seen[device] = plain, edited, heat, word, latent
    (*wanted, best), (*found, best_there) = seen["cpu"], seen["cuda"]
    assert best_there == best
    assert (wanted[0] - wanted[1]).abs().mean() > 0.005
    for here, there in zip(wanted, found, strict=True):
        assert (here - there).abs().mean() <= 0.002 * here.abs().amax()
