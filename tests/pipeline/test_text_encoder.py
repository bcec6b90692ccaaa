"""T5, whose blocks return tuples, in a pipeline that is not diffusers' own; CLIP is in the other tests here."""

from __future__ import annotations

import torch

from sparsefeat.pipeline import attach
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
