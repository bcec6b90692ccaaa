"""What takes gradients says so under torch.inference_mode(), where they would be none, or zero without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsefeat as sf
from tests.tiny import tiny_sd

AT, BEFORE = "unet.up_blocks.1.attentions.1", "unet.mid_block.attentions.0"
CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def sae(at: str) -> sf.SAE:
    torch.manual_seed(1)
    return sf.SAE(sf.SAEConfig(d_model=32, n_latents=96, k=6, hookpoint=at)).requires_grad_(False).eval()


LABELS = {"a fox": {"what": "fox"}, "an owl": {"what": "owl"}}
TAKING: dict[str, Callable[[Any], Any]] = {
    "attribute_latents": lambda pipe: sf.attribute_latents(pipe, sae(AT), "a fox", **CALL),
    "an attribution to weights": lambda pipe: sf.cad_erase(pipe, "a fox", **CALL),
    "df_cam": lambda pipe: sf.df_cam(pipe, "a fox", AT, **CALL),
    "circuit": lambda pipe: sf.circuit(pipe, sae(BEFORE), sae(AT), "a fox", latents=[3], **CALL),
    "ESD": lambda pipe: sf.ESD.fit(pipe, "a fox", iterations=1, rank=1, **CALL),
    "discover_direction": lambda pipe: sf.discover_direction(pipe, AT, ["a fox"], ["an owl"], **CALL),
    "decompose": lambda pipe: sf.decompose(pipe, "fox", **CALL),
    "learn_concepts": lambda pipe: sf.learn_concepts(pipe, AT, LABELS, **CALL),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


@pytest.mark.parametrize("name", TAKING)
def test_it_is_refused_in_a_sentence(name: str, pipe: Any):
    with (
        torch.inference_mode(),
        pytest.raises(
            ValueError, match=rf"{name} takes gradients, which torch\.inference_mode\(\) forbids; leave it out"
        ),
    ):
        TAKING[name](pipe)


def test_what_takes_none_is_the_same_in_it(pipe: Any):
    def ablated() -> torch.Tensor:
        return sf.attribute_latents(pipe, sae(AT), "a fox", method="ablation", latents=[3, 5, 7], **CALL).scores

    plain = ablated()
    with torch.inference_mode():
        assert torch.equal(ablated(), plain)
