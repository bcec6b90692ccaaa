"""DF-CAM against Grad-CAM by plain hooks."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.attribution import df_cam
from tests.families import families
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 2, "height": 48, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.mark.parametrize("chosen", [None, "first_channel"])
def test_the_map_is_grad_cam_of_the_first_step(pipe, chosen):
    at, seen = "down_blocks.0.attentions.0", {}
    option = {} if chosen is None else {"objective": lambda said, without: said[:, 0].sum()}
    found = df_cam(pipe, "a fox", f"unet.{at}", steps=[0], seed=7, guidance_scale=1.0, **option, **CALL)
    assert list(found) == [0]
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0].detach()
    pipe.scheduler.set_timesteps(2)
    x = torch.randn((1, 4, 12, 8), generator=torch.Generator().manual_seed(7))

    def keep(module, args, output):
        seen["A"] = output[0] if isinstance(output, tuple) else output
        seen["A"].retain_grad()

    hook = pipe.unet.get_submodule(at).register_forward_hook(keep)
    said = pipe.unet(x, pipe.scheduler.timesteps[0], text)[0]
    hook.remove()
    (said.square().sum().sqrt() if chosen is None else said[0, 0].sum()).backward()
    weights = seen["A"].grad.mean((2, 3), keepdim=True)
    wanted = torch.clamp((weights * seen["A"].detach()).sum(1)[0], min=0)
    pipe.unet.zero_grad(set_to_none=True)
    assert found[0].shape == wanted.shape
    assert float(wanted.max()) > 0
    assert (found[0] - wanted).abs().max() <= 1e-5 * wanted.max()


@pytest.mark.parametrize(
    ("name", "at"),
    [("sd3", "transformer.transformer_blocks.0"), ("flux", "transformer.single_transformer_blocks.0")],
)
def test_joint_blocks_have_maps_on_their_grid(name, at):
    call = {"max_sequence_length": 16} if name == "flux" else {}
    found = df_cam(families()[name].build(), "a fox", at, **CALL, **call)
    assert list(found) == [0, 1]
    height, width = found[0].shape
    assert height * 2 == width * 3
    assert all(bool(one.isfinite().all()) and float(one.max()) > 0 for one in found.values())


def test_wrong_inputs_are_refused_in_a_sentence(pipe):
    with pytest.raises(ValueError, match="block of the denoiser"):
        df_cam(pipe, "a fox", "text_encoder.encoder.layers.0")
    with pytest.raises(ValueError, match="has no grid"):
        df_cam(
            families()["flux"].build(),
            "a fox",
            "transformer.transformer_blocks.0:output:text",
            max_sequence_length=16,
            **CALL,
        )
    with pytest.raises(ValueError, match="none of the steps"):
        df_cam(pipe, "a fox", "unet.mid_block", steps=[9], **CALL)
    with pytest.raises(ValueError, match="must be a prompt"):
        df_cam(pipe, "", "unet.mid_block")
