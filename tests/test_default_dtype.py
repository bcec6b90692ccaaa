"""What torch's default dtype is changes nothing of a pipeline that is already made: recordings, edits and fits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsefeat as sf
from sparsefeat.features import collect_statistics
from sparsefeat.steering import Overwrite
from tests.tiny import pixels, tiny_sd

AT, D, N = "unet.up_blocks.1.attentions.1", 32, 96
CONCEPTS = {"fox": ["a fox"], "owl": ["an owl"]}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def sae() -> sf.SAE:
    torch.manual_seed(1)
    return sf.SAE(sf.SAEConfig(d_model=D, n_latents=N, k=6, hookpoint=AT)).requires_grad_(False).eval()


def drawn(pipe: Any, *instruments: Any) -> torch.Tensor:
    with sf.attach(pipe, *instruments):
        return torch.as_tensor(pixels(pipe))


def seen(pipe: Any, sae: sf.SAE) -> list[torch.Tensor]:
    record, maps = sf.Record(sae), sf.HeatMaps(layer_weights={AT + ".transformer_blocks.0.attn2": 0.5})
    examples = sf.Examples(N)
    with sf.attach(pipe, record, maps, sf.CollectExamples(sae, examples)) as run:
        pixels(pipe)
    top = run[record].top(3)
    return [run[maps].tensor(), run[record].map(top[0].latent), torch.tensor([t.latent for t in top])]


def fitted(pipe: Any, sae: sf.SAE) -> list[torch.Tensor]:
    statistics = collect_statistics(pipe, sae, CONCEPTS, num_inference_steps=2)
    erase = sf.Erase.from_statistics(sae, statistics, "fox")
    return [drawn(pipe, erase), *(selection.latents for selection in erase.selections.values())]


WORK: dict[str, Callable[[Any, sf.SAE], list[torch.Tensor]]] = {
    "seen": seen,
    "fitted": fitted,
    "Steer": lambda pipe, sae: [
        drawn(
            pipe, sf.Steer(sae, add={3: 1}, scale={5: 0.5}, set={6: 2.0}, clamp={7: (0.0, 3.0)}, mask=torch.ones(8, 8))
        )
    ],
    "add_map": lambda pipe, sae: [drawn(pipe, sf.Steer(sae, add_map={4: torch.eye(4)}))],
    "Overwrite": lambda pipe, sae: [drawn(pipe, Overwrite(sae, {3: 1.0}))],
    "AddVector": lambda pipe, sae: [drawn(pipe, sf.AddVector(AT, torch.arange(D) / D))],
    "Slider": lambda pipe, sae: [drawn(pipe, sf.ScoreEdit(sf.Slider("old", "young")))],
}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WORK)
def test_it_is_the_same(name: str, default: torch.dtype, pipe: Any, sae: sf.SAE):
    torch.manual_seed(0)
    plain = WORK[name](pipe, sae)
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        inside = WORK[name](pipe, sae)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(plain) == len(inside)
    for a, b in zip(plain, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
