"""Models by themselves, without the encoders and the scheduler of their pipelines: which rows are which patch of the image
(or which place of the audio), and which are the text's.

What is expected is what changes: with a row of the last block edited one patch of the output changes, that of the row's
place; what the first block is given of the image changes with the noise and not with the text, and the other way round.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sparsefeat.pipeline import Delta, Hookpoint, attach
from tests.pipeline.families import models
from tests.pipeline.families.models import Model, Pipe, generator
from tests.pipeline.instruments import Edit, Watch

MODELS = [pytest.param(model, id=model.name) for model in models.MODELS]


def build(model: Model) -> Pipe:
    if not hasattr(diffusers, model.name):
        pytest.skip(f"this diffusers has no {model.name}")
    torch.manual_seed(0)
    net = getattr(diffusers, model.name)(**model.config).eval()
    for parameter in net.parameters():  # gates and last layers that begin at zero let nothing through
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipe(net)


def run(pipe: Pipe, model: Model, *instruments: Any, noise: int = 1, words: int = 2) -> torch.Tensor:
    latent, text = (
        torch.randn(model.latent, generator=generator(noise)),
        torch.randn(model.text, generator=generator(words)),
    )
    with torch.no_grad():
        if not instruments:
            return pipe.transformer(**model.inputs(latent, text), return_dict=False)[0]
        with attach(pipe, *instruments) as session, session.call(prompts=["a fox"]):
            return pipe.transformer(**model.inputs(latent, text), return_dict=False)[0]


@pytest.mark.parametrize("model", MODELS)
def test_an_edit_of_one_row_of_the_last_block_changes_its_patch_and_nothing_else(model):
    pipe = build(model)
    plain = model.patches(run(pipe, model))
    for row in (0, len(plain) - 1):

        def one_row(activations, context, row=row):
            assert (context.stream, context.grid, context.batch) == (model.stream, model.grid, 1)
            assert context.positions == len(plain)
            rows = torch.zeros_like(activations.rows)
            rows[row] = torch.linspace(-30, 30, rows.shape[-1])
            return Delta(rows)

        edited = model.patches(run(pipe, model, Edit(one_row, f"transformer.{model.last}")))
        assert (plain != edited).any(-1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("model", MODELS)
def test_the_rows_of_the_image_are_those_that_change_with_the_noise_and_the_texts_those_that_change_with_the_text(
    model,
):
    pipe = build(model)
    seen = {}
    for stream in (model.stream, *(["text"] if model.text_stream else [])):
        for said, options in {"plain": {}, "noise": {"noise": 3}, "words": {"words": 4}}.items():
            watch = Watch(Hookpoint(f"transformer.{model.first}", "input", stream))
            run(pipe, model, watch, **options)
            assert {context.stream for context in watch.contexts} == {stream}
            (seen[said, stream],) = watch.rows
    moves, stays = ("noise", "words")
    assert (seen["plain", model.stream] != seen[moves, model.stream]).any(1).all()
    assert torch.equal(seen["plain", model.stream], seen[stays, model.stream])
    if model.text_stream:
        # A token that the model adds (a register, an image's) changes with neither.
        assert (seen["plain", "text"] != seen["words", "text"]).any()
        assert torch.equal(seen["plain", "text"], seen["noise", "text"])


def test_of_a_video_with_sound_the_second_stream_is_the_audios():
    model = next(p.values[0] for p in MODELS if p.id == "LTX2VideoTransformer3DModel")
    pipe = build(model)
    block = "transformer.transformer_blocks.1"
    given = []
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda m, args, output: given.append(output))
    watches = {path: Watch(path) for path in (block, f"{block}:audio", f"{block}.audio_ff", f"{block}.attn2.to_k")}
    run(pipe, model, *watches.values())
    handle.remove()
    assert torch.equal(watches[block].rows[0], given[0][0][0])
    assert torch.equal(watches[f"{block}:audio"].rows[0], given[0][1][0])
    assert [w.contexts[0].stream for w in watches.values()] == ["image", "audio", "audio", "text"]
    assert [w.contexts[0].grid for w in watches.values()] == [(2, 3, 4), None, None, None]


def test_the_decoder_of_motif_video_has_no_text():
    model = next(p.values[0] for p in MODELS if p.id == "MotifVideoTransformer3DModel")
    pipe = build(model)
    text = Watch("transformer.single_transformer_blocks.1:text")
    run(pipe, model, text)
    assert text.rows[0].shape[0] == 5
    with pytest.raises(ValueError, match="this block of the decoder has no text"):
        run(pipe, model, Watch("transformer.single_transformer_blocks.2:text"))
