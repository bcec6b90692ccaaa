"""Circuits: gradients are those of plain hooks and autograd, ablations those of edits, and both are one where all is linear."""

from __future__ import annotations

import copy
from xml.etree import ElementTree

import pytest
import torch

import sparsefeat as sf
from sparsefeat.attribution import Circuit, Edge, circuit
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.instrument import Instrument, rows_of
from sparsefeat.sae import SAE, SAEConfig
from tests.families import families
from tests.pipeline.state import everything
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 1, "height": 48, "width": 48}
MID, UP = "unet.mid_block.attentions.0", "unet.up_blocks.1.attentions.0"


def make_sae(d, n=40, seed=2, **options):
    torch.manual_seed(seed)
    config = {"d_model": d, "n_latents": n, "activation": "topk", "k": 5, **options}
    return SAE(SAEConfig(**config)).requires_grad_(False).eval()


def width(pipe, path):
    return next(info.width for info in sf.hookpoints(pipe) if info.hookpoint.path == path)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def saes(pipe):
    return make_sae(width(pipe, MID), hookpoint=MID), make_sae(width(pipe, UP), seed=3, hookpoint=UP)


def test_gradient_and_ablation_are_one_where_all_between_is_linear(pipe):
    """From what `conv_out` is given to what it gives, and an SAE whose latents are all active."""
    before = make_sae(16, hookpoint="unet.conv_act")
    after = make_sae(4, n=6, seed=3, hookpoint="unet.conv_out", activation="relu", k=None)
    after.b_enc.fill_(8.0)  # all active, and small enough for float32 to tell sums apart
    state = everything(pipe)
    found = circuit(
        pipe, before, after, "a fox", latents=range(6), n_latents=7, n_edges=100, guidance_scale=1.0, **CALL
    )
    assert everything(pipe) == state
    assert len(found.edges) == 6 * 7
    largest = max(abs(edge.ablation) for edge in found.edges)
    assert largest > 0
    assert all(abs(edge.gradient - edge.ablation) <= 2e-4 * largest for edge in found.edges)
    assert found.rank_correlation > 0.99


def test_edges_are_those_of_plain_hooks(pipe, saes):
    before, after = saes
    latents = [3, 17, 30, 8]
    found = circuit(pipe, *saes, "a fox", latents=latents, n_edges=1000, seed=5, guidance_scale=1.0, **CALL)
    assert found.edges
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0].detach()
    pipe.scheduler.set_timesteps(1)
    x = torch.randn((1, 4, 12, 12), generator=torch.Generator().manual_seed(5))
    kept = {}

    def topk(sae, rows):
        pre = (rows - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        values, indices = pre.topk(5, 1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def activity(removed):
        def at_mid(module, args, output):
            h = output[0].detach().clone()
            rows = h.movedim(1, -1).reshape(-1, h.shape[1])
            z = topk(before, rows)
            if removed is not None:
                rows = rows - z[:, [removed]] * before.W_dec[removed]
            kept["rows"], kept["z"] = rows.requires_grad_(), z
            return (rows.reshape(1, *h.shape[2:], -1).movedim(-1, 1),)

        def at_up(module, args, output):
            kept["up"] = output[0].movedim(1, -1).reshape(-1, output[0].shape[1])

        hooks = [
            pipe.unet.get_submodule(place.removeprefix("unet.")).register_forward_hook(hook)
            for place, hook in ((MID, at_mid), (UP, at_up))
        ]
        pipe.unet(x, pipe.scheduler.timesteps[0], text)
        for hook in hooks:
            hook.remove()
        return topk(after, kept["up"]).sum(0)[latents]

    plain = activity(None)
    gradients = {}
    for j, value in zip(latents, plain, strict=True):
        (slope,) = torch.autograd.grad(value, kept["rows"], retain_graph=True)
        gradients[j] = (kept["z"] * (slope @ before.W_dec.T)).sum(0)
    ablated = {i: plain - activity(i) for i in {edge.upstream for edge in found.edges}}
    size = max(float(one.abs().max()) for one in gradients.values())
    change = max(float(one.abs().max()) for one in ablated.values())
    for edge in found.edges:
        assert abs(edge.gradient - float(gradients[edge.downstream][edge.upstream])) <= 1e-4 * size
        wanted = float(ablated[edge.upstream][latents.index(edge.downstream)])
        assert abs(edge.ablation - wanted) <= 1e-3 * change
    strongest = sum(one.abs() for one in gradients.values()).argsort(descending=True)[:8].tolist()
    assert {edge.upstream for edge in found.edges} <= set(strongest)


def test_transcoders_of_flux_are_read_at_inputs_and_written_at_outputs():
    pipe = families()["flux"].build()
    blocks = [f"transformer.transformer_blocks.{i}.ff" for i in (0, 1)]
    d = width(pipe, "transformer.transformer_blocks.0")
    before, after = (make_sae(d, seed=i, hookpoint=f"{at}:input", transcoder=True) for i, at in enumerate(blocks))
    call = {**CALL, "max_sequence_length": 16}
    found = circuit(pipe, before, after, "a fox", latents=range(40), n_latents=3, n_edges=500, seed=4, **call)
    assert (found.upstream, found.downstream) == (blocks[0], f"{blocks[1]}:input")
    edge = found.edges[0]

    class Without(Instrument):
        def hookpoints(self):
            return tuple(map(sf.Hookpoint.parse, (f"{blocks[0]}:input", f"{blocks[0]}:output", f"{blocks[1]}:input")))

        def __init__(self, removed):
            self.removed = removed

        def at_hookpoint(self, activations, context):
            at = str(context.hookpoint)
            if at == f"{blocks[0]}:input":
                self.z = before.encode(activations.rows).select([edge.upstream])
            elif at == f"{blocks[1]}:input":
                self.found = float(after.encode(activations.rows).select([edge.downstream]).sum())
            elif self.removed:
                return sf.Delta(-self.z * before.W_dec[edge.upstream])
            return None

    seen = []
    for removed in (False, True):
        without = Without(removed)
        with attach(pipe, without):
            pipe("a fox", generator=torch.Generator().manual_seed(4), output_type="latent", **call)
        seen.append(without.found)
    assert abs(edge.ablation) > 0
    assert edge.ablation == pytest.approx(seen[0] - seen[1], rel=1e-3)


def test_the_objective_chooses_the_downstream_latents(pipe, saes):
    found = circuit(pipe, *saes, "a fox", n_latents=3, n_edges=4, guidance_scale=3.0, **CALL)
    scores = sf.attribute_latents(pipe, saes[1], "a fox", guidance_scale=3.0, **CALL)
    strongest = scores.latents[scores.scores.abs().argsort(descending=True)[:3]].tolist()
    assert list(found.scores) == strongest
    assert len(found.edges) <= 4
    assert {edge.downstream for edge in found.edges} <= set(strongest)
    sizes = [abs(edge.ablation) for edge in found.edges]
    assert sizes == sorted(sizes, reverse=True)


def test_a_circuit_is_saved_and_drawn(tmp_path):
    edges = (Edge(3, 5, 1.5, 2.0), Edge(3, 6, -1.0, -0.5), Edge(4, 5, 0.25, 0.125))
    made = Circuit(("a <fox>",), "unet.a:output", "unet.b:output", edges, {5: 2.0}, 0.5, ({3: "fur & <ears>"}, {}))
    made.save(tmp_path / "fox.json")
    assert Circuit.load(tmp_path / "fox.json") == made
    made.save(tmp_path / "fox.svg")
    picture = ElementTree.parse(tmp_path / "fox.svg").getroot()
    paths = picture.findall("{*}path")
    assert len(paths) == 3
    widths = [float(path.get("stroke-width")) for path in paths]
    assert widths[2] == max(widths) == pytest.approx(4 * widths[1], rel=0.01)
    assert paths[1].get("stroke") != paths[2].get("stroke") == paths[0].get("stroke")
    assert any(text.text == "3 fur & <ears>" for text in picture.findall("{*}text"))
    assert str(made).splitlines()[1].split() == ["3", "5", "+1.5", "+2", "fur", "&", "<ears>"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no circuit"):
        Circuit.load(tmp_path / "other.json")


def test_wrong_inputs_are_refused_in_a_sentence(pipe, saes):
    before, after = saes
    call = {"guidance_scale": 1.0, **CALL}
    with pytest.raises(ValueError, match="name the earlier block first"):
        circuit(pipe, after, before, "a fox", latents=[3, 17, 30, 8], **call)
    learning = [copy.deepcopy(sae).requires_grad_() for sae in (after, before)]  # as they are read from a file
    with pytest.raises(ValueError, match="name the earlier block first"):
        circuit(pipe, *learning, "a fox", latents=[3, 17, 30, 8], **call)
    with pytest.raises(ValueError, match=f"are both of {UP}"):
        circuit(pipe, after, after, "a fox", latents=[3], **call)
    with pytest.raises(ValueError, match="without guidance"):
        circuit(pipe, before, after, "a fox", **call)
    with pytest.raises(ValueError, match="each once"):
        circuit(pipe, before, after, "a fox", latents=[3, 3], **call)
    with pytest.raises(ValueError, match="choose in 0 to 39"):
        circuit(pipe, before, after, "a fox", latents=[40], **call)
    with pytest.raises(ValueError, match="block of the denoiser"):
        circuit(pipe, before, after, "a fox", at=("text_encoder.encoder.layers.0", None), **call)
    with pytest.raises(ValueError, match="no input, which a transcoder reads"):
        circuit(pipe, before, make_sae(after.d_model, hookpoint=UP, transcoder=True), "a fox", **call)
    assert rows_of(torch.zeros(1, 2, 3, 4)).shape == (12, 2)
