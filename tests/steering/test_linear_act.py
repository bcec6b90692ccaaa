"""Linear-AcT beside a derivation in numpy with plain forward hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsefeat as sf
from sparsefeat.steering import NeuronMaps
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

SOURCE = ["a fox", "a cat", "a dog in rain", "an owl", "two owls"]
TARGET = ["a red fox", "red cat on red", "the red dog", "red", "owls, red"]
FIRST, SECOND = "unet.down_blocks.1.attentions.0", "unet.up_blocks.1.attentions.1"
NORM = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm2"


def first_means(pipe, path, prompts, during=()):
    """[prompts, d]: the mean over positions of the conditional half at the module's first run, by plain hooks."""
    found = []
    for i, prompt in enumerate(prompts):
        seen = []
        handles = [module_at(pipe, other).register_forward_hook(edit) for other, edit in during]
        keep = lambda m, a, out, seen=seen: seen.append(tensor_of(out).detach().clone())  # noqa: E731
        handles.append(module_at(pipe, path).register_forward_hook(keep))
        pipe(prompt, num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(i))
        for handle in handles:
            handle.remove()
        conditional = seen[0][-1]
        found.append(conditional.flatten(1).mean(1) if conditional.ndim == 3 else conditional.mean(0))
    return torch.stack(found).double().numpy()


def module_at(pipe, path):
    root, _, inner = path.partition(".")
    return getattr(pipe, root).get_submodule(inner)


def tensor_of(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def line(x, y, method):
    """Weight and bias of each neuron, one at a time."""
    weights, biases = [], []
    for i in range(x.shape[1]):
        a, b = np.sort(x[:, i]), np.sort(y[:, i])
        if a.std(ddof=1) < 1e-4 or b.std(ddof=1) < 1e-4:
            weights.append(1.0)
            biases.append(0.0)
            continue
        slope = {"linear": lambda a=a, b=b: np.polyfit(a, b, 1)[0], "gaussian": lambda a=a, b=b: b.std() / a.std(),
                 "mean": lambda: 1.0}[method]()  # fmt: skip
        weights.append(slope)
        biases.append(b.mean() - slope * a.mean())
    return torch.tensor(np.array(weights)).float(), torch.tensor(np.array(biases)).float()


def hook_of(x, weight, bias, method, strength):
    low, high = torch.tensor(x.min(0)).float(), torch.tensor(x.max(0)).float()

    def edit(module, args, out):
        given = tensor_of(out)
        if given.ndim == 4:
            w, b, lo, hi = (t[:, None, None] for t in (weight, bias, low, high))
            gate = given.mean((2, 3), keepdim=True)
        else:
            w, b, lo, hi, gate = weight, bias, low, high, given
        base = gate if method == "linear" else given
        moved = given + strength * torch.where((gate > lo) & (gate < hi), w * base + b - base, 0)
        return moved if isinstance(out, torch.Tensor) else (moved, *out[1:])

    return edit


@pytest.mark.parametrize("method", ["linear", "gaussian", "mean"])
def test_two_layers_in_sequence_are_what_plain_hooks_give(method):
    pipe = tiny_sd()
    act = sf.LinearAcT.fit(
        pipe, [SECOND, NORM], SOURCE, TARGET, method=method, strength=0.7, batch=2, num_inference_steps=1
    )
    assert [str(place) for place in act.maps] == [NORM, SECOND]  # in the order in which they run
    hooks = []
    for path in (NORM, SECOND):
        x, y = first_means(pipe, path, SOURCE, [(p, h(1.0)) for p, h in hooks]), first_means(pipe, path, TARGET)
        weight, bias = line(x, y, method)
        maps = next(m for place, m in act.maps.items() if str(place) == path)
        torch.testing.assert_close(maps.bias, bias, rtol=1e-2, atol=1e-4)
        hooks.append((path, lambda s, x=x, w=weight, b=bias: hook_of(x, w, b, method, s)))
    handles = [module_at(pipe, path).register_forward_hook(make(0.7)) for path, make in hooks]
    expected = pixels(pipe, SOURCE[0], seed=3, output_type="latent")
    for handle in handles:
        handle.remove()
    untouched = pixels(pipe, SOURCE[0], seed=3, output_type="latent")
    with sf.attach(pipe, act):
        moved = pixels(pipe, SOURCE[0], seed=3, output_type="latent")
    moved, expected, untouched = (torch.as_tensor(t) for t in (moved, expected, untouched))
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    assert (moved - untouched).abs().max() > 1e-3


def test_a_line_through_shifted_samples_moves_one_set_onto_the_other_within_the_support():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = x.flip(0) * torch.tensor([2.0, 0.5, 0.0]) + torch.tensor([1.0, -3.0, 4.0])
    maps = NeuronMaps.fit(x, y)
    torch.testing.assert_close(maps.weight, torch.tensor([2.0, 0.5, 1.0]))
    torch.testing.assert_close(maps.bias, torch.tensor([1.0, -3.0, 0.0]))  # the third is still in the target: untouched
    torch.testing.assert_close(maps.low, x.min(0).values)
    assert NeuronMaps.fit(x, y, support="all").high.isinf().all()
    torch.testing.assert_close(NeuronMaps.fit(x, y, support=(0.1, 0.9)).high, x.quantile(0.9, 0))


def test_without_sequence_every_module_is_fitted_to_what_it_gives_untouched():
    pipe = tiny_sd()
    at_once = sf.LinearAcT.fit(pipe, [FIRST, SECOND], SOURCE, TARGET, sequential=False, num_inference_steps=1)
    in_turn = sf.LinearAcT.fit(pipe, [FIRST, SECOND], SOURCE, TARGET, num_inference_steps=1)
    weight, _ = line(first_means(pipe, SECOND, SOURCE), first_means(pipe, SECOND, TARGET), "linear")
    last = [list(act.maps.values())[1].weight for act in (at_once, in_turn)]
    torch.testing.assert_close(last[0], weight, rtol=1e-2, atol=1e-3)
    assert (last[1] - weight).abs().max() > 1e-3


def test_strength_zero_and_closed_windows_change_no_bit_and_saving_keeps_everything(tmp_path):
    pipe = tiny_sdxl()
    at = "unet.mid_block.attentions.0"
    act = sf.LinearAcT.fit(pipe, at, SOURCE, TARGET, steps=(0.0, 0.5), condition="cond")
    before = pixels(pipe)
    with sf.attach(pipe, sf.LinearAcT(act.maps, strength=0.0)):
        assert (pixels(pipe) == before).all()
    act.save(tmp_path / "act")
    again = sf.load_instrument(tmp_path / "act")
    images = []
    for one in (act, again):
        with sf.attach(pipe, one):
            images.append(pixels(pipe))
    assert (images[0] == images[1]).all()
    assert (images[0] != before).any()
    with pytest.raises(ValueError, match="has no SAE"):
        sf.load_instrument(tmp_path / "act", sae=sf.SAE(sf.SAEConfig(d_model=4, n_latents=8, k=2)))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_moved_too(family):
    tiny = families()[family]
    pipe = tiny.build()
    at = ["transformer.transformer_blocks.0:text", "transformer.transformer_blocks.1"]
    act = sf.LinearAcT.fit(pipe, at, SOURCE, TARGET, support="all", num_inference_steps=2, height=64, width=64)
    plain = tiny.call(pipe, ["a fox"], guidance=True)
    with sf.attach(pipe, act):
        assert (tiny.call(pipe, ["a fox"], guidance=True) != plain).any()


def test_what_is_wrong_is_said_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="source has 5 prompts and target 2"):
        sf.LinearAcT.fit(pipe, FIRST, SOURCE, TARGET[:2])
    with pytest.raises(ValueError, match="target is 'a fox'"):
        sf.LinearAcT.fit(pipe, FIRST, SOURCE, "a fox")
    with pytest.raises(ValueError, match="support="):
        sf.LinearAcT.fit(pipe, FIRST, SOURCE, TARGET, support=(0.9, 0.1))
    with pytest.raises(ValueError, match="at="):
        sf.LinearAcT.fit(pipe, [FIRST, FIRST], SOURCE, TARGET)
    with pytest.raises(ValueError, match="strength="):
        sf.LinearAcT.fit(pipe, FIRST, SOURCE, TARGET, strength=1.5)
    with pytest.raises(ValueError, match="holds NaN"):
        NeuronMaps.fit(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    narrow = {FIRST: NeuronMaps.fit(torch.randn(4, 7), torch.randn(4, 7))}
    with pytest.raises(ValueError, match="needs activations of width 7"):
        sf.attach(pipe, sf.LinearAcT(narrow))
