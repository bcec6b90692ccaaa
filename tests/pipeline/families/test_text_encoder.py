"""Text encoders of every kind that pipelines have: where their layers are in each library version, that edits of them
reach the image, and which texts their runs were.
"""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import attach, hookpoints, resolve
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.tiny import tiny_t5_encoder


class Encode:
    """The least that counts as a pipeline: components and a call."""

    def __init__(self):
        self.text_encoder = tiny_t5_encoder(d_model=24)

    @torch.no_grad()
    def __call__(self, prompt, negative_prompt=None):
        texts = [prompt] + ([negative_prompt] if negative_prompt else [])
        return [self.text_encoder(torch.tensor([[ord(c) % 64 for c in text]])).last_hidden_state for text in texts]


def test_t5_blocks_are_read_and_edited_inside_their_tuples():
    pipe = Encode()
    plain = pipe("fox", "cat")
    for rule, changes in ((zero, False), (push(), True)):
        watch = Watch("text_encoder.encoder.block.1")
        with attach(pipe, Edit(rule, "text_encoder.encoder.block.0"), watch) as run:
            edited = pipe("fox", "cat")
        assert torch.equal(edited[0], plain[0]) is not changes
        assert run[watch] == 2
        assert [(c.condition, c.stream, c.positions) for c in watch.contexts] == [
            (("cond",), "text", 3),
            (("uncond",), "text", 3),
        ]
    assert type(pipe) is Encode


def test_any_module_of_a_text_encoder_can_be_read_by_its_path():
    pipe = Encode()
    watch = Watch("text_encoder.encoder.block.0.layer.1")
    with attach(pipe, watch):
        pipe("fox")
    assert watch.rows[0].shape == (3, 24)


# (family, the layer, what else it was or is called). Layers of a language model are at the root, behind `model.` where
# it has a head, and behind `model.language_model.` where it has a vision tower, since transformers 4.52.
LAYERS = [
    ("sd3", "text_encoder.text_model.encoder.layers.0", ["text_encoder.encoder.layers.0"]),
    ("sd3", "text_encoder_2.text_model.encoder.layers.1", ["text_encoder_2.encoder.layers.1"]),
    ("sd3", "text_encoder_3.encoder.block.1", []),
    ("flux", "text_encoder.encoder.layers.0", ["text_encoder.text_model.encoder.layers.0"]),
    ("flux", "text_encoder_2.encoder.block.0", []),
    ("aura_flow", "text_encoder.encoder.block.0", []),
    ("sana", "text_encoder.layers.0", ["text_encoder.model.layers.0"]),
    (
        "qwen_image",
        "text_encoder.model.language_model.layers.0",
        [
            "text_encoder.model.layers.0",
            "text_encoder.language_model.layers.0",
            "text_encoder.language_model.model.layers.0",
        ],
    ),
    ("flux2", "text_encoder.model.layers.0", ["text_encoder.layers.0"]),
    ("hunyuan_dit", "text_encoder.encoder.layer.0", []),
    ("hunyuan_dit", "text_encoder_2.encoder.block.1", []),
]
LAYERS = [layer for layer in LAYERS if families()[layer[0]].available]


@pytest.fixture(scope="module")
def pipes():
    return {name: families()[name].build() for name in {layer[0] for layer in LAYERS}}


@pytest.mark.parametrize(("name", "path", "other_names"), LAYERS, ids=[f"{n}-{p}" for n, p, _ in LAYERS])
def test_a_layer_is_found_by_all_its_names_and_its_edits_reach_the_image(pipes, name, path, other_names):
    family, pipe = families()[name], pipes[name]
    layer = resolve(pipe, path).module
    for other in other_names:
        assert resolve(pipe, other).module is layer
    listed = {info.hookpoint.path: info for info in hookpoints(pipe) if info.stream == "text"}
    info = listed[resolve(pipe, path).path]
    watch = Watch(path)
    plain = family.call(pipe, ["red fox"], guidance=False)
    with attach(pipe, watch, Edit(zero, path)):
        assert torch.equal(family.call(pipe, ["red fox"], guidance=False), plain)
    assert (info.kind, info.width, info.grid) == ("layer", watch.rows[0].shape[1], None)
    assert (watch.contexts[0].stream, watch.contexts[0].grid, watch.contexts[0].step) == ("text", None, None)
    with attach(pipe, Edit(push(), path)):
        assert not torch.equal(family.call(pipe, ["red fox"], guidance=False), plain)


@pytest.mark.parametrize("name", sorted({layer[0] for layer in LAYERS}))
def test_each_text_encoder_runs_for_the_prompts_and_then_for_the_negative_ones(pipes, name):
    family, pipe = families()[name], pipes[name]
    encoders = dict.fromkeys(path.partition(".")[0] for family_name, path, _ in LAYERS if family_name == name)
    paths = [next(path for n, path, _ in LAYERS if n == name and path.startswith(f"{root}.")) for root in encoders]
    watches = [Watch(path) for path in paths]
    with attach(pipe, *watches):
        family.call(pipe, ["red fox", "a cat"], guidance=True, images_per_prompt=3, steps=1)
    for watch in watches:
        conditions = [c for context in watch.contexts for c in context.condition]
        assert conditions == ["cond"] * 2 + ["uncond"] * 2
        prompts = [image for context in watch.contexts for image in context.prompt_index]
        assert prompts == [0, 3] * 2  # the first of each prompt's three images


QWEN = pytest.mark.skipif(not families()["qwen_image"].available, reason="this diffusers has no QwenImagePipeline")


@QWEN
def test_tokens_of_a_template_are_positions_too(pipes):
    # Qwen-Image drops the first 34 tokens of what its encoder gives: its template's, before the prompt.
    family, pipe = families()["qwen_image"], pipes["qwen_image"]
    text, joint = Watch("text_encoder.model.language_model.layers.0"), Watch("transformer.transformer_blocks.0.txt_mlp")
    with attach(pipe, text, joint):
        family.call(pipe, ["red fox"], guidance=False, steps=1)
    assert text.contexts[0].positions == joint.contexts[0].positions + 34


@QWEN
def test_a_vision_tower_is_not_taken_for_the_text(pipes):
    listed = [info.hookpoint.path for info in hookpoints(pipes["qwen_image"]) if info.stream == "text"]
    assert any(path.endswith("layers.1") for path in listed)
    assert not any("visual" in path for path in listed)
