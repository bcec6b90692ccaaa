"""What `layer_outputs` gives for a prompt is what the pipeline's own call sees of it."""

from __future__ import annotations

import pytest
import torch

import sparsefeat as sf
from sparsefeat.features.prompts import layer_outputs
from tests.families import TinyFamily, families

PROMPTS = ["a red fox", "a cat in the blue snow"]
# Where the encoder lies, and the length that the tiny family's call asks for (None: the tokenizer's limit, CLIP's).
ENCODERS = {
    ("sd", "text_encoder.encoder.layers.0"): None,
    ("sdxl", "text_encoder_2.encoder.layers.0"): None,
    ("flux", "text_encoder_2.encoder.block.1"): 16,  # no attention mask: the padding counts
    ("sd3", "text_encoder_3.encoder.block.1"): 12,
    ("pixart", "text_encoder.encoder.block.1"): 12,  # with one
    ("wan", "text_encoder.encoder.block.1"): 8,
}


class Seen(sf.Instrument):
    """Keeps the conditional prompts' rows, `[prompts, tokens, width]`."""

    def __init__(self, at: str) -> None:
        self.at, self.rows = sf.Hookpoint.parse(at), torch.empty(0)

    def hookpoints(self):
        return (self.at,)

    def at_hookpoint(self, activations, context):
        if "cond" in context.condition:
            rows = activations.rows.reshape(context.batch, context.positions, -1)
            self.rows = rows[[c == "cond" for c in context.condition]].clone()


def family(name: str) -> TinyFamily:
    found = families()[name]
    if not found.available:
        pytest.skip(f"this diffusers has no {found.pipeline}")
    return found


@pytest.mark.parametrize(("name", "at"), ENCODERS, ids=lambda value: value)
def test_layer_outputs_are_those_of_the_pipelines_own_call(name, at):
    tiny = family(name)
    pipe, seen = tiny.build(), Seen(at)
    with sf.attach(pipe, seen):
        tiny.call(pipe, PROMPTS, guidance=False)
    given = torch.stack(list(layer_outputs(pipe, sf.Hookpoint.parse(at), PROMPTS, ENCODERS[name, at])))
    torch.testing.assert_close(given, seen.rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "at"), [key for key in ENCODERS if key[0] in ("wan", "flux")], ids=lambda value: value
)
def test_itd_edits_the_very_prompt_it_was_fitted_to_erase_in_a_t5(name, at):
    tiny = family(name)
    pipe = tiny.build()
    width = next(info.width for info in sf.hookpoints(pipe) if str(info.hookpoint) == at)
    torch.manual_seed(0)
    sae = sf.SAE(sf.SAEConfig(d_model=width, n_latents=40, k=4, hookpoint=at)).eval()
    erase = sf.InterpretThenDeactivate.fit(
        pipe, sae, PROMPTS[:1], PROMPTS[1:], top_m=8, max_sequence_length=ENCODERS[name, at]
    )
    assert len(erase.latents)
    before = tiny.call(pipe, PROMPTS[:1], guidance=False)
    with sf.attach(pipe, erase):
        assert not torch.equal(before, tiny.call(pipe, PROMPTS[:1], guidance=False))


def test_itd_without_a_latent_to_erase_says_so():
    pipe = family("sd").build()
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="text_encoder.encoder.layers.0")).eval()
    with pytest.warns(UserWarning, match="no latent is selected, so nothing will be erased"):
        erase = sf.InterpretThenDeactivate.fit(pipe, sae, PROMPTS[:1], PROMPTS[:1], top_m=8)
    assert not len(erase.latents)


@pytest.mark.parametrize("name", ["sana", "hunyuan_dit"])  # a template in front of the prompt; two encoders in two runs
def test_a_prompts_vector_is_as_long_as_what_the_encoder_runs_on(name):
    tiny = family(name)
    pipe = tiny.build()
    at = [info for info in sf.hookpoints(pipe) if info.kind == "layer" and info.stream == "text"][-1]
    assert at.width
    sae = sf.SAE(sf.SAEConfig(d_model=at.width, n_latents=40, k=4, hookpoint=str(at.hookpoint))).eval()
    before = tiny.call(pipe, PROMPTS[:1], guidance=False)
    with sf.attach(pipe, sf.PromptVector(sae, PROMPTS[1], 5.0)):
        after = tiny.call(pipe, PROMPTS[:1], guidance=False)
    assert not torch.equal(before, after)
