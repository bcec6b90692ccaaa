"""overcomplete: its state dicts read as it computes them; what a state dict does not say is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect
from tests.sae.formats.expected import TOLERANCE, cases, copied, largest_difference, made_by

CASES = cases("overcomplete")
FIXTURE = {case.name: case for case in CASES}


def state_of(case: str) -> dict[str, torch.Tensor]:
    return torch.load(FIXTURE[case] / "sae.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_library_computes(case):
    assert detect(case / "sae.pt").name == "overcomplete"
    sae = load_sae(case / "sae.pt", k=made_by(case)["k"])
    assert largest_difference(sae, case) < TOLERANCE


def test_the_same_state_dict_in_safetensors_reads_the_same(tmp_path):
    save_file(state_of("topk"), tmp_path / "sae.safetensors")
    assert largest_difference(load_sae(tmp_path / "sae.safetensors", k=4), FIXTURE["topk"]) < TOLERANCE


def test_without_k_the_error_says_to_pass_it():
    with pytest.raises(ValueError, match=r"does not hold k: pass the k of training, load_sae\(…, k=\), or k=24 for"):
        load_sae(FIXTURE["topk"] / "sae.pt")


def test_a_pre_activation_exactly_at_its_threshold_is_active_as_in_the_library(tmp_path):
    state = state_of("jumprelu")
    state["encoder.final_block.0.weight"].zero_()
    state["encoder.final_block.0.bias"] = state["thresholds"].exp()
    torch.save(state, tmp_path / "sae.pt")
    assert bool((load_sae(tmp_path / "sae.pt").encode(torch.zeros(1, 10)).dense() > 0).all())


def test_the_tied_encoder_is_the_dictionary_with_its_multiplier(tmp_path):
    state = state_of("tied") | {"dictionary.multiplier": torch.tensor(0.7)}
    torch.save(state, tmp_path / "sae.pt")
    sae = load_sae(tmp_path / "sae.pt", k=4)
    assert torch.allclose(sae.W_enc, state["dictionary._weights"] * 2.0137527, rtol=1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Q": torch.linspace(0, 1, 4)}, r"has Q: only overcomplete's SAEs with a linear encoder"),
        (
            {"encoder.mlp_blocks.0.0.weight": torch.zeros(10, 10)},
            r"mlp_blocks.* only overcomplete's SAEs with a linear",
        ),
        ({"encoder.final_block.1.weight": torch.ones(24)}, r"layer norm in its encoder"),
        ({"encoder.final_block.0.weight": None}, r"has no encoder: overcomplete's pursuit SAEs"),
        ({"encoder.final_block.0.weight": torch.zeros(10, 24)}, r"shape \[10, 24\], \[24, 10\] was expected"),
        ({"encoder.final_block.0.bias": torch.full((24,), torch.nan)}, r"b_enc .* NaN or Inf"),
        ({"dictionary._weights": torch.zeros(24)}, r"no matrix dictionary\._weights"),
        ({"dictionary.multiplier": "large"}, r"dictionary\.multiplier .* is str: a floating tensor"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, changes, words):
    state = {name: value for name, value in (state_of("topk") | changes).items() if value is not None}
    torch.save(state, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=words):
        load_sae(tmp_path / "sae.pt", k=4)


class Saved(torch.nn.Module):
    """A module pickled whole, as the library's own examples do; its class says it comes from overcomplete."""


Saved.__module__, Saved.__qualname__ = "overcomplete.sae.topk_sae", "TopKSAE"


def test_a_pickled_module_is_refused_with_the_command_that_saves_its_weights(tmp_path, monkeypatch):
    import sys
    import types

    parts = ["overcomplete", "overcomplete.sae", "overcomplete.sae.topk_sae"]
    for name in parts:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[parts[-1]].TopKSAE = Saved
    torch.save(Saved(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"could run code .*torch\.save\(model\.state_dict\(\), path\)"):
        load_sae(tmp_path / "model.pt", k=4)


def test_a_file_cut_short_is_refused(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    data = (place / "sae.pt").read_bytes()
    (place / "sae.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"sae\.pt is damaged .*download it again"):
        load_sae(Path(place / "sae.pt"), k=4)
