"""SAEs whose input depends on the timestep: in a pipeline they encode at the step's, as their authors' formula has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.nn import functional

import sparsefeat as sf
from tests.families import families

FLUX = families()["flux"]
PROMPTS = ["a fox", "a red cat in the snow", "the blue dog"]
D, N, E = 16, 40, 12


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as the authors save one."""
    random = torch.Generator().manual_seed(seed)
    sizes = {"time_mlp.0": (E, E), "time_mlp.2": (E, E), "mod_linear": (2 * D, E), "encoder": (N, D), "decoder": (D, N)}
    found = {}
    for name, (out, into) in sizes.items():
        found[f"{name}.weight"] = 0.5 * torch.randn(out, into, generator=random)
        found[f"{name}.bias"] = 0.5 * torch.randn(out, generator=random)
    return found


def derived(s: dict[str, torch.Tensor], x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The code of x `[batch, positions, d]`, every batch entry at its own timestep; in float64."""
    s = {name: t.double() for name, t in s.items()}
    inner = get_timestep_embedding(timestep.float(), E).double()
    for layer in ("time_mlp.0", "time_mlp.2"):
        inner = functional.silu(functional.linear(inner, s[f"{layer}.weight"], s[f"{layer}.bias"]))
    scale, shift = functional.linear(inner, s["mod_linear.weight"], s["mod_linear.bias"]).chunk(2, -1)
    moved = x.double() * (1 + scale[:, None]) + shift[:, None]
    return functional.linear(moved, s["encoder.weight"], s["encoder.bias"]).relu()


def watched(pipe: Any, module: torch.nn.Module, io: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(timestep, tensor) of every run, by plain hooks."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    now: list[torch.Tensor] = []

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        now[:] = [kwargs["timestep"]]

    pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda _, args, out: seen.append((now[0], args[0] if io == "input" else out)))
    return seen


@pytest.mark.parametrize("name", ["transcoder_img_1", "transcoder_txt_0", "sae_img_0", "sae_txt_1"])
def test_codes_at_batch_three_with_guidance_are_the_formulas_of_every_step(tmp_path, name):
    kind, stream, block = name.split("_")
    torch.save(state(), tmp_path / f"{name}.pt")
    sae = sf.load_sae(tmp_path / f"{name}.pt")
    pipe = FLUX.build()
    mlp = {"img": "ff", "txt": "ff_context"}[stream]
    module = pipe.transformer.transformer_blocks[int(block)].get_submodule(mlp)
    seen = watched(pipe, module, "input" if kind == "transcoder" else "output")
    with sf.attach(pipe, rec := sf.Record(sae)) as run:
        FLUX.call(pipe, PROMPTS, guidance=True, steps=3)
    assert len(seen) == 6  # two passes a step
    for step in range(3):
        timestep, x = seen[2 * step]  # the conditional pass comes first
        expected = derived(state(), x, timestep)
        ours = torch.stack([run[rec].codes(image=i, step=step).dense() for i in range(3)])
        assert (ours.double() - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
        other = derived(state(), x, seen[2 * ((step + 1) % 3)][0])
        assert (ours.double() - other).abs().max() > 1e-3  # the timestep matters


@pytest.mark.parametrize("name", ["sae_img_0", "transcoder_img_0", "transcoder_txt_0"])
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_an_edit_keeps_what_the_sae_does_not_reconstruct(tmp_path, name, guidance):
    """At batch 3, in every step: the module's own output and the change, of a transcoder from the module's input."""
    kind, stream, _ = name.split("_")
    torch.save(state(), tmp_path / f"{name}.pt")
    sae = sf.load_sae(tmp_path / f"{name}.pt")
    pipe = FLUX.build()
    module = pipe.transformer.transformer_blocks[0].get_submodule({"img": "ff", "txt": "ff_context"}[stream])
    reads = kind == "transcoder"
    seen = watched(pipe, module, "input")
    FLUX.call(pipe, PROMPTS, guidance=guidance, steps=2)
    timestep, x = seen[0]
    latent = int(derived(state(), x if reads else module(x), timestep).sum((0, 1)).argmax())
    seen.clear()
    edited: list[torch.Tensor] = []
    with sf.attach(pipe, sf.Steer(sae, scale={latent: 0.0}, condition="both")):
        handle = module.register_forward_hook(lambda _, args, out: edited.append(out))
        FLUX.call(pipe, PROMPTS, guidance=guidance, steps=2)
        handle.remove()
    runs = list(seen)
    assert len(edited) == len(runs) == (4 if guidance else 2)
    for (timestep, x), result in zip(runs, edited, strict=True):
        own = module(x)  # of the module as it is left, without an edit
        code = derived(state(), x if reads else own, timestep)[..., latent, None]
        removed = code * state()["decoder.weight"].double()[:, latent]
        assert removed.abs().max() > 0.1
        assert (result.double() - (own.double() - removed)).abs().max() < 1e-5


def test_without_a_timestep_it_is_refused(tmp_path):
    torch.save(state(), tmp_path / "sae_img_0.pt")
    sae = sf.load_sae(tmp_path / "sae_img_0.pt")
    with pytest.raises(ValueError, match=r"depends on the timestep: attach it to a pipeline, or call sae\.at_timestep"):
        sae.encode(torch.randn(2, D))
    one, each = torch.tensor([0.25, 0.75]), torch.randn(2, D)
    together = sae.at_timestep(one).encode(each).dense()
    alone = [sae.at_timestep(float(t)).encode(x[None]).dense()[0] for t, x in zip(one, each, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)
    with pytest.raises(ValueError, match="timestep has 2 numbers for 3 rows"):
        sae.at_timestep(one).encode(torch.randn(3, D))
    with pytest.raises(ValueError, match="depends on the timestep, which rows do not say"):
        sf.check(sae, FLUX.build(), ["a fox"])
    again = sf.load_sae(sae.save(tmp_path / "ours"))
    assert again.config == sae.config
    assert torch.equal(again.at_timestep(0.5)(each), sae.at_timestep(0.5)(each))


def test_its_weights_learn_through_the_timestep():
    sae = sf.SAE(sf.SAEConfig(D, N, activation="relu", normalizer="timestep", time_width=E))
    assert torch.equal(sae.at_timestep(0.5).normalize(torch.ones(1, D)), torch.ones(1, D))  # it begins as no modulation
    sae.at_timestep(0.5)(torch.randn(6, D)).square().sum().backward()
    assert all(p.grad is not None for name, p in sae.named_parameters() if name.startswith(("time_", "modulation_")))
    assert sae.modulation_weight.grad.abs().max() > 0
