"""CogView 4 runs one feed-forward on the image and then on the text: each hookpoint sees its own run, and where the two are
as long nothing tells them apart.
"""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import Delta, attach
from sparsefeat.pipeline.families.family import UnknownRowsError
from tests.families.cogview4 import FAMILY, build, call
from tests.pipeline.instruments import Edit, Watch

pytestmark = pytest.mark.skipif(not FAMILY.available, reason=f"this diffusers has no {FAMILY.pipeline}")
FF = "transformer.transformer_blocks.0.ff"


@pytest.fixture(scope="module")
def pipe():
    return build()


def test_a_module_that_runs_on_both_streams_is_seen_once_for_each(pipe):
    seen, runs = {"image": Watch(FF), "text": Watch(f"{FF}:text")}, []
    handle = pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, args, out: runs.append(out[0]))
    with attach(pipe, *seen.values()):
        call(pipe, ["a fox"], guidance=False, steps=1)
    handle.remove()
    assert [len(run) for run in runs] == [36, 16]
    for (stream, watch), run in zip(seen.items(), runs, strict=True):
        assert [(c.stream, c.positions) for c in watch.contexts] == [(stream, len(run))]
        assert (watch.rows[0] == run).all()


def test_an_edit_of_the_texts_run_leaves_the_images_alone(pipe):
    def three(activations, context):
        return Delta(activations.rows * 0 + 3.0)

    plain, edited, text = Watch(FF), Watch(FF), Watch(f"{FF}:text")
    with attach(pipe, plain, text):
        call(pipe, ["a fox"], guidance=False, steps=1)
    before = text.rows[0]
    with attach(pipe, Edit(three, f"{FF}:text"), edited, text):
        call(pipe, ["a fox"], guidance=False, steps=1)
    assert torch.equal(plain.rows[0], edited.rows[0])  # the image's run of this block comes first
    torch.testing.assert_close(text.rows[0], before + 3.0)


def test_as_many_tokens_of_the_text_as_of_the_image_are_refused(pipe):
    with attach(pipe, Watch(FF)), pytest.raises(UnknownRowsError, match="16 tokens and on the text's 16 in turn"):
        call(pipe, ["a fox"], guidance=False, steps=1, height=32, width=32)
