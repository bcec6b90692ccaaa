"""What `layer_outputs` gives for a prompt is what the pipeline's own call sees of it, and its own tokens are found in it."""

from __future__ import annotations

import functools

import pytest
import torch

import sparsefeat as sf
from sparsefeat.features.prompts import layer_outputs, own_tokens
from tests.families import TinyFamily, families, hunyuan_video, sana

PROMPTS = ["a red fox", "a cat in the blue snow"]
# Where the encoder lies, and the length that the tiny family's call asks for (None: the tokenizer's limit, CLIP's).
ENCODERS = {
    ("sd", "text_encoder.encoder.layers.0"): None,
    ("sdxl", "text_encoder_2.encoder.layers.0"): None,
    ("flux", "text_encoder_2.encoder.block.1"): 16,  # no attention mask: the padding counts
    ("sd3", "text_encoder_3.encoder.block.1"): 12,
    ("pixart", "text_encoder.encoder.block.1"): 12,  # with one
    ("wan", "text_encoder.encoder.block.1"): 8,
    ("flux2", "text_encoder.model.layers.1"): 16,  # its call's default reads layers that a small encoder does not have
}
# What stands before the prompt in families that put something there, where the tiny call's texts say it, or where the
# pipeline publishes how many rows it drops; and whether the tokenizer's end mark comes next.
TEMPLATES = {
    ("sana", "text_encoder.layers.1"): (lambda pipe: len(pipe.tokenizer("\n".join(sana.INSTRUCTION)).input_ids), False),
    ("qwen_image", "text_encoder.model.language_model.layers.1"): (lambda pipe: pipe.prompt_template_encode_start_idx, False),
    ("hunyuan_video", "text_encoder.layers.1"): (lambda pipe: hunyuan_video.TEMPLATE["crop_start"], True),
    ("kandinsky5", "text_encoder.model.language_model.layers.1"): (lambda pipe: pipe.prompt_template_encode_start_idx, True),
    ("lumina2", "text_encoder.layers.1"): (lambda pipe: len(pipe.tokenizer("a photo <Prompt Start>").input_ids), False),
    ("z_image", "text_encoder.layers.1"): (lambda pipe: len(["<|im_start|>", "user", "\n"]), False),
    ("flux2", "text_encoder.model.layers.1"): (lambda pipe: len(["<|im_start|>", "user", "\n"]), False),
    ("hunyuan_dit", "text_encoder.encoder.layer.1"): (lambda pipe: 0, True),
    ("flux", "text_encoder_2.encoder.block.1"): (lambda pipe: 0, True),
    ("aura_flow", "text_encoder.encoder.block.1"): (lambda pipe: 0, True),
}  # fmt: skip


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


class Given(sf.Instrument):
    """Keeps which tokens of a call are its prompts' own, and the ids that its encoder was given."""

    def __init__(self, at: str) -> None:
        self.at, self.own, self.ids = sf.Hookpoint.parse(at), [], []

    def hookpoints(self):
        return (self.at,)

    def begin_call(self, call):
        self.own = own_tokens(call.pipe, self.at, call)
        root = getattr(call.pipe, self.at.path.partition(".")[0])
        self.handle = root.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs):
        self.ids += list(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    def end_call(self, call):
        self.handle.remove()


def words(pipe, at: str):
    """The tokenizer of whole words that belongs to the encoder."""
    found = getattr(pipe, at.partition(".")[0].replace("text_encoder", "tokenizer"))
    if hasattr(found, "words"):  # Kandinsky's, which stands for a processor: those have their tokenizer as an attribute
        found.tokenizer = found.words
        return found.words
    return found


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


@pytest.mark.parametrize(("name", "at"), TEMPLATES, ids=lambda value: value)
def test_a_prompts_own_tokens_are_found_where_the_call_has_them(name, at):
    tiny, (before, is_closed) = family(name), TEMPLATES[name, at]
    pipe, given = tiny.build(), Given(at)
    tokenizer = words(pipe, at)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    with sf.attach(pipe, given):
        tiny.call(pipe, PROMPTS, guidance=False, steps=1)
    for prompt, own, ids in zip(PROMPTS, given.own, given.ids, strict=False):
        expected = prompt.split() + ([tokenizer.eos_token] if is_closed else [])
        assert own.start == own.begin == before(pipe)
        assert tokenizer.convert_ids_to_tokens(ids[own.start : own.stop].tolist()) == expected


@pytest.mark.parametrize("at", ["text_encoder.encoder.layers.1", "text_encoder_2.text_model.encoder.layers.1"])
def test_clips_marks_are_no_part_of_a_prompt_but_for_the_one_that_ends_it(at):
    pipe, given = family("sdxl").build(), Given(at)
    texts = {"text_encoder": "fox fox cat", "text_encoder_2": "cat"}
    prompts = [["fox", texts["text_encoder"]], ["fox", texts["text_encoder_2"]]]
    with sf.attach(pipe, given):
        family("sdxl").call(pipe, prompts[0], guidance=False, steps=1, prompt_2=prompts[1])
    own, count = given.own[1], len(texts[at.partition(".")[0]].split())
    assert (own.begin, own.start, own.stop) == (0, 1, 1 + count + 1)
    assert given.ids[1][own.stop - 1] == pipe.tokenizer.eos_token_id
    assert (given.own[0].start, given.own[0].stop) == (1, 3)


@pytest.mark.parametrize("prompt", ["", "a red fox in the snow a red fox in the snow a red fox in the snow"])
@pytest.mark.parametrize("name", ["sana", "qwen_image", "hunyuan_video", "wan"])
def test_a_blank_prompt_and_one_that_is_cut_off_have_tokens_within_the_encoders_positions(name, prompt):
    at = next(key[1] for key in {**TEMPLATES, **ENCODERS} if key[0] == name)
    tiny, given = family(name), Given(at)
    pipe = tiny.build()
    before, is_closed = TEMPLATES.get((name, at), (lambda pipe: 0, True))
    with sf.attach(pipe, given):
        tiny.call(pipe, [prompt], guidance=False, steps=1)
    (own,), ids = given.own, given.ids[0]
    there = words(pipe, at).convert_ids_to_tokens(ids[own.start : own.stop].tolist())
    assert own.start == before(pipe)
    assert own.stop <= len(ids)
    if prompt:
        assert len(there) > 3
        assert set(there) <= {*prompt.split(), "</s>"}
    else:
        assert there == ["</s>"] * is_closed


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sana", {"max_sequence_length": 10, "complex_human_instruction": sana.INSTRUCTION}),
        ("hunyuan_video", {"max_sequence_length": 8, "prompt_template": hunyuan_video.TEMPLATE}),
        ("qwen_image", {"max_sequence_length": 12}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_itd_selects_edits_and_gates_by_the_prompts_own_tokens_behind_a_template(name, arguments):
    at = next(key[1] for key in TEMPLATES if key[0] == name)
    tiny, (before, is_closed) = family(name), TEMPLATES[name, at]
    pipe, seen = tiny.build(), Seen(at)
    with sf.attach(pipe, seen):
        tiny.call(pipe, PROMPTS, guidance=False, steps=1)
    torch.manual_seed(0)
    sae = sf.SAE(sf.SAEConfig(d_model=seen.rows.shape[-1], n_latents=40, k=4, hookpoint=at)).eval()
    erase = sf.InterpretThenDeactivate.fit(pipe, sae, PROMPTS, top_m=3, **arguments)

    start = before(pipe)
    own = [
        rows[start : start + len(p.split()) + is_closed].double() for p, rows in zip(PROMPTS, seen.rows, strict=True)
    ]
    largest = [code(sae, rows).amax(0) for rows in own]
    latents = set().union(*(v.topk(3).indices[v.topk(3).values > 0].tolist() for v in largest))
    assert set(erase.latents.tolist()) == latents
    errors = [(without(sae, rows, latents) - rows).square().mean() for rows in own]
    assert erase.tau == pytest.approx(0.99 * float(min(errors)), rel=1e-4)

    after = Seen(at)
    with sf.attach(pipe, erase, after):
        tiny.call(pipe, PROMPTS, guidance=False, steps=1)
    for rows, edited, of_own in zip(seen.rows.double(), after.rows.double(), own, strict=True):
        torch.testing.assert_close(edited[:start], without(sae, rows[:start], ()), atol=1e-4, rtol=1e-4)
        stop = start + len(of_own)
        torch.testing.assert_close(edited[start:stop], without(sae, of_own, latents), atol=1e-4, rtol=1e-4)

    erase = sf.InterpretThenDeactivate(
        sae, list(latents), tau=1.001 * float(max(errors)), at=at
    )  # above both prompts' errors: neither is touched
    with sf.attach(pipe, erase, after):
        tiny.call(pipe, PROMPTS, guidance=False, steps=1)
    assert torch.equal(after.rows, seen.rows)


@torch.no_grad()
def code(sae: sf.SAE, rows: torch.Tensor) -> torch.Tensor:
    """The top-k SAE's dense code of rows, in float64."""
    pre = (rows - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    return torch.zeros_like(pre).scatter(1, pre.topk(4).indices, pre.topk(4).values.relu())


@torch.no_grad()
def without(sae: sf.SAE, rows: torch.Tensor, latents) -> torch.Tensor:
    """What the paper's edit makes of rows, -8 times the latents' values."""
    z = code(sae, rows)
    z[:, list(latents)] *= -8
    return z @ sae.W_dec.double() + sae.b_out.double()


def test_fit_refuses_an_argument_that_no_call_takes_and_a_blank_concept():
    pipe = family("sd").build()
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="text_encoder.encoder.layers.0")).eval()
    with pytest.raises(
        TypeError, match=r"topm= is no argument of this StableDiffusionPipeline's call; did you mean top_m\?"
    ):
        sf.InterpretThenDeactivate.fit(pipe, sae, ["a fox"], topm=3)
    with pytest.raises(ValueError, match=r"erase=\['a fox', ' '\] must be prompts that show the concept"):
        sf.InterpretThenDeactivate.fit(pipe, sae, ["a fox", " "])


def test_a_pipeline_that_rewrites_prompts_is_refused_with_what_it_made_of_them():
    pipe = family("sd").build()
    encode = type(pipe).encode_prompt

    class Rewriting(type(pipe)):
        @functools.wraps(encode)
        def encode_prompt(self, prompt, *args, **kwargs):
            return encode(self, [{"a": "fox", "b": "a cat"}.get(text, text) for text in prompt], *args, **kwargs)

    pipe.__class__ = Rewriting
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="text_encoder.encoder.layers.0")).eval()
    with pytest.raises(
        ValueError, match=r"where a prompt's tokens stand at text_encoder.encoder.layers.0 cannot be told"
    ):
        sf.InterpretThenDeactivate.fit(pipe, sae, ["a fox"], top_m=8)


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
