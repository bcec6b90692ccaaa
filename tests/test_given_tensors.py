"""A tensor that was given is copied: what its owner writes into it afterwards is no part of the instrument."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sparsefeat as sf

AT, LAYER = "unet.mid_block.attentions.0", "text_encoder.encoder.layers.0"


def sae(at: str) -> sf.SAE:
    torch.manual_seed(1)
    return sf.SAE(sf.SAEConfig(d_model=4, n_latents=8, k=2, hookpoint=at)).eval()


def number_of_bins() -> int:
    from sparsefeat.erasure.posterior_attenuation import EDGES

    return len(EDGES) + 1


# What is given, the instrument of it, and the attribute that keeps it.
KEPT: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object], str]] = {
    "AddVector": (lambda: torch.ones(4), lambda given: sf.AddVector(AT, given), "vectors"),
    "TokenDirection": (lambda: torch.ones(4), lambda given: sf.TokenDirection(["fox"], given), "direction"),
    "Guard": (lambda: torch.ones(8), lambda given: sf.Guard(sae(AT), given, 1.0), "discriminant"),
    "Exchange": (lambda: torch.ones(2, 4), lambda given: sf.Exchange(sae(LAYER), [1, 2], given), "change"),
    "Exchange latents": (
        lambda: torch.tensor([1, 2]),
        lambda given: sf.Exchange(sae(LAYER), given, torch.ones(2, 4)),
        "latents",
    ),
    "PosteriorAttenuation": (
        lambda: torch.ones(2, number_of_bins()),
        lambda given: sf.PosteriorAttenuation(sae(AT), [1, 2], given),
        "posterior",
    ),
    "PosteriorAttenuation latents": (
        lambda: torch.tensor([1, 2]),
        lambda given: sf.PosteriorAttenuation(sae(AT), given, torch.ones(2, number_of_bins())),
        "latents",
    ),
    "ConceptLancet": (
        lambda: torch.ones(4),
        lambda given: sf.ConceptLancet({"fox": torch.eye(4)[0], "owl": torch.eye(4)[1]}, "fox", at=AT, center=given),
        "center",
    ),
    "Steer": (lambda: torch.ones(2, 2), lambda given: sf.Steer(sae(AT), add={1: 1.0}, mask=given), "mask"),
    "InterpretThenDeactivate": (
        lambda: torch.tensor([1, 2]),
        lambda given: sf.InterpretThenDeactivate(sae(LAYER), given),
        "latents",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_written_into_it_afterwards_changes_nothing(name: str):
    give, make, attribute = KEPT[name]
    given = give()
    made = make(given)
    given.zero_()
    assert torch.equal(getattr(made, attribute).flatten(), give().flatten())


def test_a_vector_that_is_being_trained_is_the_one_that_is_added():
    vector = torch.ones(4, requires_grad=True)
    made = sf.AddVector(AT, vector)
    with torch.no_grad():
        vector += 1
    assert torch.equal(made.vectors[0], 2 * torch.ones(4))
    made.vectors.sum().backward()
    assert torch.equal(vector.grad, torch.ones(4))
