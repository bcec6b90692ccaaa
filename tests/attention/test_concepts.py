"""ConceptAttention against its definition, re-derived in fp64 from the modules' weights and what their attentions had."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import sparsefeat as sf
from sparsefeat.attention.concepts import WAYS
from tests.attention.eager import eager
from tests.families import families

CONCEPTS = ["cat", "red dog", "snow"]


def norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def linear(module, x):
    return x @ module.weight.double().T + (0 if module.bias is None else module.bias.double())


def heads_of(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def rms(module, x):
    return x if module is None else x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight.double()


def gelu_block(ff, x):
    return linear(ff.net[2], F.gelu(linear(ff.net[0].proj, x), approximate="tanh"))


class Derived:
    """One pass of the concepts [1, tokens, width] beside the attentions of one run; (image, concept) outputs by layer."""

    def __init__(self, root, concepts, time, image):
        self.root, self.c, self.time, self.image = root, concepts, F.silu(time), image

    def attend(self, seen, row, q, k, v):
        start, stop = self.image
        keys = torch.cat([k, seen.key[row : row + 1, :, start:stop]], 2)
        values = torch.cat([v, seen.value[row : row + 1, :, start:stop]], 2)
        p = (torch.einsum("bhcd,bhtd->bhct", q, keys) * seen.scale).softmax(-1)
        concept = torch.einsum("bhct,bhtd->bhcd", p, values)
        whole = torch.einsum("hnt,htd->hnd", seen.scores()[row].softmax(-1), seen.value[row])
        return whole[None, :, start:stop], concept


class Joint(Derived):
    def block(self, block, seen, row):
        heads = seen.query.shape[1]
        parts = linear(block.norm1_context.linear, self.time)[:, None]
        last = parts.shape[-1] == 2 * self.c.shape[-1]
        if last:
            scale, shift = parts.chunk(2, -1)
        else:
            shift, scale, gate, shift_ff, scale_ff, gate_ff = parts.chunk(6, -1)
        x, attn = norm(self.c) * (1 + scale) + shift, block.attn
        q = rms(attn.norm_added_q, heads_of(linear(attn.add_q_proj, x), heads))
        k = rms(attn.norm_added_k, heads_of(linear(attn.add_k_proj, x), heads))
        image, concept = self.attend(seen, row, q, k, heads_of(linear(attn.add_v_proj, x), heads))
        if not last:
            self.c = self.c + gate * linear(attn.to_add_out, concept.transpose(1, 2).flatten(2))
            x = norm(self.c) * (1 + scale_ff) + shift_ff
            self.c = self.c + gate_ff * gelu_block(block.ff_context, x)
        return image, concept


class Shared(Derived):
    def zero(self, module, x):
        *_, shift, scale, gate = linear(module.linear, self.time)[:, None].chunk(6, -1)
        own = module.norm
        return (norm(x, own.eps) * own.weight.double() + own.bias.double()) * (1 + scale) + shift, gate

    def block(self, block, seen, row):
        heads, attn = seen.query.shape[1], block.attn1
        x, gate = self.zero(block.norm1, self.c)
        q, k, v = (heads_of(linear(m, x), heads) for m in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (norm(t, m.eps) * m.weight.double() + m.bias.double() for t, m in ((q, attn.norm_q), (k, attn.norm_k)))
        image, concept = self.attend(seen, row, q, k, v)
        self.c = self.c + gate * linear(attn.to_out[0], concept.transpose(1, 2).flatten(2))
        x, gate = self.zero(block.norm2, self.c)
        self.c = self.c + gate * gelu_block(block.ff, x)
        return image, concept


def encoded(pipe, encoder, length):
    """Each concept alone, padded, without a mask; its own tokens, none of which is a mark."""
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    found = []
    for concept in CONCEPTS:
        words = concept.split()  # one word is one token there
        ids = [*tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        with torch.no_grad():
            found.append(getattr(pipe, encoder)(torch.tensor([ids]))[0][0, : len(words)].double())
    return torch.cat(found), [(0, 1), (1, 3), (3, 4)]


def encoded_without_t5(pipe):
    """The last hidden layer but one of both CLIPs side by side, then zeros. In these tokenizers "cat" is one token and a
    letter of other words one each; the first of all is a mark."""
    found, spans = [], []
    for concept in CONCEPTS:
        n = {"cat": 1, "red dog": 6, "snow": 4}[concept]
        parts = []
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            ids = tokenizer(concept, padding="max_length", max_length=16, return_tensors="pt").input_ids
            with torch.no_grad():
                hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
            parts.append(hidden[0, 1 : 1 + n].double())
        both = torch.cat(parts, -1)
        found.append(
            torch.cat([both, both.new_zeros(n, pipe.transformer.config.joint_attention_dim - both.shape[1])], -1)
        )
        start = spans[-1][1] if spans else 0
        spans.append((start, start + n))
    return torch.cat(found), spans


CASES = {
    "flux": ("flux", {}, [1], "text_encoder_2"),  # the last fifth of two blocks is the second
    "flux, schnell": ("flux", {"embedded": False}, [1], "text_encoder_2"),
    "sd3": ("sd3", {}, [0, 1], "text_encoder_3"),
    "sd3.5": ("sd3", {"dual": True}, [0, 1], "text_encoder_3"),
    "sd3, without T5": ("sd3", {"t5": False, "joint": 40}, [0, 1], None),
    "cogvideox": ("cogvideox", {}, [0, 1], "text_encoder"),
    "cogvideox, added positions": ("cogvideox", {"rotary": False}, [0, 1], "text_encoder"),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_are_those_of_the_definition(case):
    name, options, layers, encoder = CASES[case]
    tiny = families()[name]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    pipe = tiny.build(**options)
    root, attn = pipe.transformer, "attn1" if name == "cogvideox" else "attn"
    paths = tuple(f"transformer.transformer_blocks.{i}.{attn}" for i in (0, 1))
    runs = []
    handle = root.register_forward_pre_hook(lambda m, a, kw: runs.append(kw), with_kwargs=True)
    guidance = tiny.guidance == "cfg"

    def call():
        return tiny.call(pipe, ["red fox"], guidance=guidance, size="wide")

    ran = eager(pipe, paths, call)
    handle.remove()
    maps, first = (
        sf.HeatMaps(concepts=CONCEPTS),
        sf.HeatMaps("concept", concepts=CONCEPTS, layers="blocks.0.", steps=[1]),
    )
    with sf.attach(pipe, maps, first) as run:
        result = call()
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(ran.result)), "reading changed the image"
    grid = run[maps].grid
    made, length = math.prod(grid), ran.attentions[0].query.shape[2]
    image = (0, made) if name == "sd3" else (length - made, length)
    if encoder is None:
        embedded, spans = encoded_without_t5(pipe)
    else:
        embedded, spans = encoded(pipe, encoder, length - made - (16 if name == "sd3" else 0))
    double = copy.deepcopy(root).double()
    conditions = [chunk for each in tiny.runs(guidance) for chunk in [each]]
    total, at_first, count = 0.0, None, 0
    for index, arguments in enumerate(runs):
        chunks = conditions[index % len(conditions)]
        if "cond" not in chunks:
            continue
        row = chunks.index("cond")
        time = arguments["timestep"].double().reshape(-1)[-1:]
        if name == "flux":
            pooled = torch.zeros(1, 16, dtype=torch.float64)
            embedder, time = double.time_text_embed, time.float().double() * 1000
            temb = embedder(time, pooled) if "embedded" in options else embedder(time, time * 0, pooled)
            start = linear(root.context_embedder, embedded)
        elif name == "sd3":
            temb = double.time_text_embed(time, arguments["pooled_projections"][row : row + 1].double())
            start = linear(root.context_embedder, embedded)
        else:
            temb = double.time_embedding(double.time_proj(time).double(), None)
            start = linear(root.patch_embed.text_proj, embedded)
        derived = (Shared if name == "cogvideox" else Joint)(root, start[None], temb.detach(), image)
        for layer, path in enumerate(paths):
            own, concept = derived.block(root.transformer_blocks[layer], ran.of(path)[index], row)
            averaged = torch.stack([concept[:, :, a:b].mean(2) for a, b in spans], 2)
            one = torch.einsum("bhnd,bhcd->bnc", own, averaged).softmax(-1)[0]
            if layer in layers:
                total, count = total + one, count + 1
            if layer == 0 and index // len(conditions) == 1:
                at_first = one
    actual = run[maps].tensor(normalize="steps").flatten(1).T.double()
    torch.testing.assert_close(actual, (total / count).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.sum(1), torch.ones(made, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    early = run[first].tensor(normalize="steps").flatten(1).T.double()
    torch.testing.assert_close(early, at_first.detach(), rtol=1e-4, atol=1e-5)
    assert (early - actual).abs().max() > 1e-5
    torch.testing.assert_close(
        run[maps].word("red dog").values.flatten().double(), actual[:, 1] * run[maps].evaluations
    )
    with pytest.raises(ValueError, match="word='fox' is none of the concepts: cat, red dog, snow"):
        run[maps].word("fox")
    assert set(WAYS) >= {type(root).__name__}


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        ("qwen_image", {"concepts": CONCEPTS}, "kind='concept' needs a text stream whose blocks are known"),
        ("lumina2", {"concepts": CONCEPTS}, "Lumina2Transformer2DModel: take kind='joint' or kind='text_renormalised'"),
        ("sd", {"concepts": CONCEPTS}, "take kind='cross'"),
        ("flux", {"concepts": ["cat", "unicorn"]}, "the tokenizer does not know 'unicorn'"),
        ("flux", {"concepts": CONCEPTS, "layers": "single"}, "match no joint-attention module"),
    ],
)
def test_what_has_no_concept_stream_is_refused_at_attach(build, options, said):
    tiny = families()[build]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    with pytest.raises(ValueError, match=re.escape(said)):
        sf.attach(tiny.build(), sf.HeatMaps(**options))


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("flux", ["text_encoder_2"], "by pipe.text_encoder_2, which this FluxPipeline was loaded without"),
        ("sd3", ["text_encoder_2", "text_encoder_3"], "by pipe.text_encoder_2, which this StableDiffusion3Pipeline"),
        ("sd3", ["text_encoder", "text_encoder_2", "text_encoder_3"], "by pipe.text_encoder and pipe.text_encoder_2"),
    ],
)
def test_an_encoder_that_was_not_loaded_is_named(name, missing, said):
    pipe = families()[name].build()
    for encoder in missing:
        setattr(pipe, encoder, None)
    with pytest.raises(ValueError, match=re.escape(said)):
        sf.attach(pipe, sf.HeatMaps(concepts=CONCEPTS))


def test_tokenizers_that_split_a_concept_differently_are_refused_where_they_stand_side_by_side():
    pipe = families()["sd3"].build(t5=False)
    pipe.tokenizer_2.add_tokens(["snow"])
    with pytest.raises(ValueError, match="'snow' is 4 and 1 tokens of the two tokenizers"):
        sf.attach(pipe, sf.HeatMaps(concepts=CONCEPTS))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "concept"}, "name them"),
        ({"concepts": ["cat"]}, "two different ones at least"),
        ({"concepts": CONCEPTS, "kind": "joint"}, "leave kind='joint'"),
        ({"concepts": CONCEPTS, "words": ["cat"]}, "leave words out"),
        ({"concepts": CONCEPTS, "daam_exact": True}, "leave daam_exact out"),
        ({"concepts": CONCEPTS, "layer_weights": {"blocks": [1.0, 2.0]}}, "give one"),
        ({"concepts": 3}, "concepts=3 must be"),
    ],
)
def test_what_makes_no_sense_with_concepts_is_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sf.HeatMaps(**options)


def test_layers_and_steps_weigh_concepts_maps():
    tiny = families()["sd3"]
    pipe = tiny.build()
    apart = sf.HeatMaps(concepts=CONCEPTS, keep=["layers", "steps"])
    weighted = sf.HeatMaps(concepts=CONCEPTS, layer_weights={"blocks.1.": 3.0}, step_weights=[0.0, 2.0])
    with sf.attach(pipe, apart, weighted) as run:
        tiny.call(pipe, ["red fox"], guidance=True)
    first, second = (
        run[apart].tensor(layer=f"transformer.transformer_blocks.{i}.attn", step=1, normalize="steps") for i in (0, 1)
    )
    actual = run[weighted].tensor(normalize="steps")
    torch.testing.assert_close(actual, (first + 3 * second) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "twin"), [("flux", "FluxImg2ImgPipeline"), ("sd3", "StableDiffusion3Img2ImgPipeline")]
)
def test_a_real_image_is_noised_and_read_in_one_step(name, twin):
    import diffusers

    tiny = families()[name]
    pipe = tiny.build()
    image = Image.fromarray((np.random.default_rng(0).random((32, 64, 3)) * 255).astype(np.uint8))
    ran = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kw: ran.append(kw["timestep"]), with_kwargs=True)
    options = {"height": 32, "width": 64, "max_sequence_length": 12, "guidance_scale": 1.0}
    found = sf.read_image(pipe, sf.HeatMaps(concepts=CONCEPTS), image, "a fox", noise=0.4, samples=2, seed=5, **options)
    assert len(ran) == 2
    assert found.n_images == 1
    assert found.grid == (4, 8)
    singles = []
    for seed in (5, 6):
        own = getattr(diffusers, twin).from_pipe(pipe)
        with sf.attach(own, maps := sf.HeatMaps(concepts=CONCEPTS, steps=[0])) as run:
            own(
                "a fox",
                image=image,
                strength=0.4,
                num_inference_steps=50,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
                **options,
            )
        singles.append(run[maps].tensor(normalize="steps"))
    handle.remove()
    torch.testing.assert_close(found.tensor(normalize="steps"), sum(singles) / 2, rtol=1e-5, atol=1e-6)
    assert (singles[0] - singles[1]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="leave it out"):
        sf.read_image(pipe, sf.HeatMaps(concepts=CONCEPTS, steps=[0]), image)


def test_a_model_without_image_to_image_is_refused():
    pipe = families()["aura_flow"].build()
    with pytest.raises(ValueError, match="no image-to-image pipeline of AuraFlowPipeline's models"):
        sf.read_image(pipe, sf.HeatMaps(), Image.new("RGB", (32, 32)))
