"""SAEs of language models on the pipelines that carry these as text encoders: recorded, steered by name, erased."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsefeat as sf
from sparsefeat.evaluation.check import CheckWarning
from sparsefeat.pipeline.hookpoints import resolve
from tests.families import families

D, N = 32, 64
LAYER = 0
PROMPTS = ["a red fox", "the blue dog in the snow"]


def numbers(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def gemma_scope(folder: Path) -> sf.SAE:
    place = folder / "gemma-scope-2b-pt-res" / f"layer_{LAYER}" / "width_16k" / "average_l0_9"
    place.mkdir(parents=True)
    t = numbers(0, w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
    np.savez(place / "params.npz", **{k: (v.abs() if k == "threshold" else v).numpy() for k, v in t.items()})
    return sf.load_sae(place)


def goodfire(folder: Path) -> sf.SAE:
    sides = {"encoder_linear": (N, D), "decoder_linear": (D, N)}
    t = numbers(1, **{f"{k}.weight": v for k, v in sides.items()}, **{f"{k}.bias": v[:1] for k, v in sides.items()})
    torch.save(t, folder / f"Llama-3.1-8B-Instruct-SAE-l{LAYER}.pth")
    return sf.load_sae(folder / f"Llama-3.1-8B-Instruct-SAE-l{LAYER}.pth")


def llama_scope(folder: Path) -> sf.SAE:
    (folder / "checkpoints").mkdir()
    sides = {"encoder": (N, D), "decoder": (D, N)}
    t = numbers(2, **{f"{k}.weight": v for k, v in sides.items()}, **{f"{k}.bias": v[:1] for k, v in sides.items()})
    save_file(t, folder / "checkpoints" / "final.safetensors")
    described = {
        "d_model": D,
        "d_sae": N,
        "jump_relu_threshold": 0.1,
        "hook_point_in": f"blocks.{LAYER}.hook_resid_post",
    }
    described["dataset_average_activation_norm"] = {"in": 6.0}
    (folder / "hyperparams.json").write_text(json.dumps(described))
    return sf.load_sae(folder)


def andyrdt(folder: Path) -> sf.SAE:
    """dictionary_learning's, whose files do not say the place."""
    t: dict[str, Any] = numbers(
        3, **{"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "b_dec": (D,)}
    )
    torch.save(t | {"k": torch.tensor(6), "threshold": torch.tensor(0.2)}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    return sf.load_sae(folder, hookpoint=f"model.layers.{LAYER}")


def qwen_scope(folder: Path) -> sf.SAE:
    t = numbers(4, W_enc=(N, D), W_dec=(D, N), b_enc=(N,), b_dec=(D,))
    torch.save(t, folder / f"layer{LAYER}.sae.pt")
    return sf.load_sae(folder / f"layer{LAYER}.sae.pt", k=6)


def mwhanna(folder: Path) -> sf.SAE:
    save_file(numbers(5, W_enc=(N, D), W_dec=(N, D), b_enc=(N,), b_dec=(D,)), folder / f"layer_{LAYER}.safetensors")
    return sf.load_sae(folder / f"layer_{LAYER}.safetensors")


CASES = [
    ("sana", gemma_scope, f"text_encoder.layers.{LAYER}"),
    ("lumina2", gemma_scope, f"text_encoder.layers.{LAYER}"),
    ("hidream", goodfire, f"text_encoder_4.model.layers.{LAYER}"),
    ("hidream", llama_scope, f"text_encoder_4.model.layers.{LAYER}"),
    ("hidream", andyrdt, f"text_encoder_4.model.layers.{LAYER}"),
    ("z_image", qwen_scope, f"text_encoder.layers.{LAYER}"),
    ("flux2", qwen_scope, f"text_encoder.model.layers.{LAYER}"),
    ("z_image", mwhanna, f"text_encoder.layers.{LAYER}.mlp"),
    ("flux2", mwhanna, f"text_encoder.model.layers.{LAYER}.mlp"),
]


@pytest.mark.parametrize(("name", "make", "path"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_sae_of_a_text_encoders_language_model_is_recorded_steered_by_name_and_erased(tmp_path, name, make, path):
    family = families()[name]
    pipe, sae = family.build(), make(tmp_path)
    assert resolve(pipe, sae.config.hookpoint.partition(":")[0]).path == path
    sae.names = sf.Names({latent: f"what latent {latent:02d} is about" for latent in range(N)})
    # What the language model gives there, by a plain hook.
    given: list[torch.Tensor] = []
    module = pipe.components[path.partition(".")[0]].get_submodule(path.partition(".")[2])
    transcoder = sae.config.transcoder
    hook = module.register_forward_hook(
        lambda _, args, out: given.append(args[0] if transcoder else out[0] if isinstance(out, tuple) else out)
    )
    with sf.attach(pipe, rec := sf.Record(sae)) as run:
        plain = family.call(pipe, PROMPTS, guidance=False)
    hook.remove()
    top = run[rec].top(3)
    assert top[0].name == f"what latent {top[0].latent:02d} is about"
    rows = torch.cat([rows.reshape(-1, D) for rows in given])
    recorded = torch.cat([run[rec].codes(image=i).dense() for i in run[rec].images])
    theirs = sae.encode(rows).dense()
    distances = torch.cdist(recorded.double(), theirs.double()).min(1).values  # in whatever order prompts ran
    assert distances.max() < 1e-4
    edits: list[Any] = [sf.Steer(sae, scale={top[0].name: -5.0})]
    if transcoder:  # ItD needs a reconstruction of what it reads
        edits.append(sf.Steer(sae, scale=dict.fromkeys((latent.name for latent in top), 0.0)))
    else:
        edits.append(sf.InterpretThenDeactivate(sae, [latent.latent for latent in top]))
    for edit in edits:
        with sf.attach(pipe, edit):
            edited = family.call(pipe, PROMPTS, guidance=False)
        assert (edited.float() - plain.float()).abs().max() > 1e-4
    assert torch.equal(family.call(pipe, PROMPTS, guidance=False), plain)  # nothing is left behind


@pytest.mark.parametrize(
    ("name", "layer", "read", "call"),
    [
        ("z_image", 0, True, {}),
        ("z_image", 1, False, {}),  # the last but one state is read, which comes before the last layer
        ("lumina2", 0, True, {"num_inference_steps": 1}),
        ("lumina2", 1, False, {}),
        ("flux2", 1, True, {"text_encoder_out_layers": (1, 2)}),
        ("flux2", 1, False, {"text_encoder_out_layers": (0, 1)}),
        ("sana", 1, True, {"use_resolution_binning": False}),
    ],
)
def test_check_warns_of_an_edit_behind_what_the_pipeline_reads(name, layer, read, call):
    family = families()[name]
    pipe = family.build()
    sae = sf.SAE(sf.SAEConfig(D, N, k=8, hookpoint=f"model.layers.{layer}")).eval()
    size = {"height": 64, "width": 64, "max_sequence_length": 16}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = sf.check(sae, pipe, ["a red fox"], rows=64, **size, **call)
    told = [str(warning.message) for warning in said if issubclass(warning.category, CheckWarning)]
    behind = [text for text in told if "changes nothing" in text]
    assert bool(behind) == (not read), told
    if not read:
        assert not result
        assert "reads hidden states of its text encoder that come before it" in behind[0]
