"""Which rows are conditional, and of which image: told by their texts, whatever the pipeline's loop does with them.

That the rows of diffusers' pipelines are what they are called is in test_what_changes.py and in the matrix.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sparsefeat import SAE, Record, SAEConfig, Steer
from sparsefeat.pipeline import Call, Hookpoint, UnknownConditionError, attach
from sparsefeat.pipeline.knowing.conditions import Conditions, DenoiserRun, is_diffusers_own
from sparsefeat.pipeline.knowing.references import Reference, References, rows_of_texts
from tests.pipeline.instruments import Edit, Watch, push
from tests.pipeline.knowing.loops import BLOCK, Between, OneByOne, Own, Silent, build
from tests.tiny import pixels, tiny_sd

RUNS = {
    "uncond first": (("uncond", "cond"),),
    "cond first": (("cond", "uncond"),),
    "two passes": (("cond",), ("uncond",)),
    "two passes, uncond first": (("uncond",), ("cond",)),
    "refined twice, then both in one run": (("cond",), ("cond",), ("uncond", "cond")),
    "refined once, then two passes": (("cond",), ("cond",), ("uncond",)),
    "three of one": (("cond", "cond", "uncond"),),
    "none": (("cond",),),
}


@pytest.fixture(scope="module")
def own():
    return build(Own)


def labels(pipe, **call):
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        pipe(**call)
    return [list(zip(c.condition, c.prompt_index, strict=True)) for c in watch.contexts]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("words", "avoid", "each"), [(["a fox"], ["cat"], 1), (["a fox", "red cat"], ["no", "dog"], 2)]
)
def test_a_loop_of_somebodys_own_is_understood_by_what_it_gives_its_denoiser(own, name, words, avoid, each):
    runs, n = RUNS[name], len(words) * each
    expected = [[(chunk, image) for chunk in chunks for image in range(n)] for chunks in runs]
    assert labels(own, words=words, avoid=avoid, each=each, runs=runs) == expected * 2


@pytest.mark.parametrize("change", [{"avoid": None}, {"dtype": torch.bfloat16}, {"copied": True}])
def test_zeroed_negatives_embeddings_in_another_precision_and_a_copied_scheduler_change_nothing(own, change):
    call = {"words": ["a fox", "red cat"], "avoid": ["no", "dog"], "runs": RUNS["cond first"], **change}
    assert labels(own, **call) == [[("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1)]] * 2


def test_the_texts_of_the_images_may_come_in_any_order():
    call = Call(prompts=["a", "b", "c"])
    texts = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(call, References(call, [Reference("cond", i, 1, row) for i, row in enumerate(texts)]))
    run = DenoiserRun("unet", {"hidden": torch.zeros(3, 4), "told": texts[[2, 0, 1]]}, 3)
    assert conditions.entries(build_nothing(), run, None) == (("cond",) * 3, (2, 0, 1))


@pytest.mark.parametrize(
    "layout", ["list", "sequence first", "in a dict", "padded", "pooled", "frames", "one more axis", "layers"]
)
def test_texts_are_found_wherever_they_lie_among_the_arguments(layout):
    call = Call(prompts=["a"])
    cond, uncond = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    if layout == "pooled":
        cond, uncond = cond[0], uncond[0]
    if layout == "layers":
        cond, uncond = (rows_of_texts(torch.stack([text] * 3, dim=1)[None])[0] for text in (cond, uncond))
    found = [Reference("cond", 0, 1, cond), Reference("uncond", 0, 1, uncond)]
    batch = torch.stack([cond, uncond])
    value = {
        "list": [cond, uncond],
        "sequence first": batch.transpose(0, 1),
        "in a dict": {"inner": batch},
        "padded": torch.nn.functional.pad(batch, (0, 0, 0, 3)),
        "pooled": batch,
        "frames": batch.repeat_interleave(3, dim=0),
        "one more axis": batch[:, None],
        "layers": batch.view(2, 5, -1, 8) if layout == "layers" else None,
    }[layout]
    run = DenoiserRun("transformer", {"latent": torch.randn(2, 4, 3, 3), "text": value}, 2)
    assert Conditions(call, References(call, found)).entries(build_nothing(), run, None)[0] == ("cond", "uncond")


def test_frames_of_different_texts_are_nobodys():
    """As where a batch of texts is repeated as a whole, and not each of them for its frames."""
    call = Call(prompts=["a"])
    cond, uncond = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    found = [Reference("cond", 0, 1, cond), Reference("uncond", 0, 1, uncond)]
    texts = torch.stack([cond, uncond]).repeat(3, 1, 1)
    run = DenoiserRun("unet", {"latent": torch.randn(2, 4, 3, 3, 3), "text": texts}, 2)
    assert Conditions(call, References(call, found)).entries(build_nothing(), run, None)[0] == ("unknown",) * 2


def build_nothing():
    return SimpleNamespace()


# Unknown


def test_a_run_on_embeddings_from_nowhere_is_unknown_unless_it_is_stated():
    pipe = build(Silent)
    sae = SAE(SAEConfig(d_model=32, n_latents=16, k=4, hookpoint=BLOCK)).eval()
    assert not is_diffusers_own(pipe)
    assert labels(pipe, prompt="a fox") == [[("unknown", 0), ("unknown", 0)]]
    for instrument in (Record(sae), Steer(sae, add={1: 2.0}), Steer(sae, add={1: 2.0}, condition="cond+uncond-")):
        with attach(pipe, instrument), pytest.raises(UnknownConditionError, match=r"layout=.*condition=\"both\""):
            pipe("a fox")
    with attach(pipe, Steer(sae, add={1: 2.0}, condition="both")):
        pipe("a fox")
    with attach(pipe, rec := Record(sae), layout=("cond", "uncond")) as run:
        pipe("a fox")
    assert run[rec].n_images == 1


def test_a_layout_that_the_texts_contradict_is_refused(own):
    call = {"words": ["a fox"], "avoid": ["cat"], "runs": RUNS["cond first"]}
    with attach(own, Watch(BLOCK), layout=("uncond", "cond")), pytest.raises(ValueError, match="not in that order"):
        own(**call)
    with attach(own, watch := Watch(BLOCK), layout=("cond", "uncond")):
        own(**call)
    assert watch.contexts[0].condition == ("cond", "uncond")


def test_diffusers_own_loops_are_told_from_subclasses_with_another():
    class Wrapped(StableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    class Renamed(StableDiffusionPipeline):
        pass

    assert is_diffusers_own(tiny_sd())
    assert is_diffusers_own(build(Renamed))
    assert not is_diffusers_own(build(Wrapped))


# No more waiting than once for each distinct run of a step


@pytest.mark.parametrize("name", RUNS)
def test_texts_are_compared_once_for_each_distinct_run_of_a_step(own, name, monkeypatch):
    from sparsefeat.pipeline.knowing import conditions

    compared = []
    evidence = conditions._evidence
    monkeypatch.setattr(conditions, "_evidence", lambda *a: compared.append(1) or evidence(*a))
    runs = RUNS[name]
    persistent = all(len(chunks) == 1 for chunks in runs)  # `torch.cat` makes a new tensor in each step
    labels(own, words=["a fox"], avoid=["cat"], runs=runs, steps=4)
    assert len(compared) <= len(runs) * (1 if persistent else 4)


def test_a_pipeline_of_diffusers_compares_once_a_call(monkeypatch):
    from sparsefeat.pipeline.knowing import conditions

    compared = []
    evidence = conditions._evidence
    monkeypatch.setattr(conditions, "_evidence", lambda *a: compared.append(1) or evidence(*a))
    pipe = tiny_sd()
    with attach(pipe, Watch(BLOCK, "unet.mid_block")):
        pixels(pipe, steps=6)
    assert len(compared) == 1


# What a call's arguments say


def pipe(name="FluxPipeline", guidance_embeds=None, **properties):
    config = SimpleNamespace() if guidance_embeds is None else SimpleNamespace(guidance_embeds=guidance_embeds)
    instance = type(name, (), {key: property(lambda self, v=value: v) for key, value in properties.items()})()
    instance.transformer = SimpleNamespace(config=config)
    return instance


@pytest.mark.parametrize(
    ("arguments", "guidance"),
    [
        ({"true_cfg_scale": 4.0, "negative_prompt": ""}, True),
        ({"true_cfg_scale": 4.0, "negative_prompt": None}, False),
        ({"true_cfg_scale": 4.0, "negative_prompt": None, "negative_prompt_embeds": torch.zeros(1, 2, 3)}, True),
        ({"true_cfg_scale": 1.0, "negative_prompt": "cat", "guidance_scale": 3.5}, False),
        ({"guidance_scale": 5.0}, True),
        ({"guidance_scale": 1.0}, False),
        ({"guidance_scale": None}, False),
        ({}, False),
    ],
)
def test_guidance_is_told_by_the_arguments(arguments, guidance):
    assert Call.of(pipe(), {"prompt": "fox", **arguments}).guidance is guidance


def test_a_scale_that_the_model_is_given_is_no_guidance_unless_the_pipeline_says_so():
    arguments = {"prompt": "fox", "guidance_scale": 30.0}
    for embedded in (True, False):
        assert Call.of(pipe("FluxFillPipeline", guidance_embeds=embedded), arguments).guidance is False
    assert Call.of(pipe("WanPipeline", guidance_embeds=False, do_classifier_free_guidance=True), arguments).guidance


@pytest.mark.parametrize("name", ["num_images_per_prompt", "num_videos_per_prompt"])
def test_images_and_videos_per_prompt_are_counted(name):
    call = Call.of(pipe(), {"prompt": ["fox", "cat"], name: 3})
    assert (call.prompts, call.images_per_prompt, call.n_images) == (["fox", "cat"], 3, 6)
    assert Call.of(pipe(), {"prompt": ["fox", "cat"], name: None}).n_images == 2


@pytest.mark.parametrize("embeds", [torch.zeros(3, 7, 4), [torch.zeros(5, 4), torch.zeros(9, 4), torch.zeros(2, 4)]])
def test_embeddings_instead_of_prompts_are_counted_as_a_tensor_and_as_a_list(embeds):
    call = Call.of(pipe(), {"prompt": None, "prompt_embeds": embeds, "num_images_per_prompt": 2})
    assert (call.prompts, call.n_images) == (None, 6)


# Where there is nothing to compare, the class tells: of diffusers' own pipelines only


def own_class(name, **properties):
    instance = pipe(name, **properties)
    owner = type(instance)
    owner.__call__ = lambda self: None
    owner.__module__ = "diffusers.pipelines.some"
    return instance


@pytest.mark.parametrize(
    ("name", "guidance", "batch", "earlier", "conditions"),
    [
        ("StableDiffusion3Pipeline", True, 4, (), ("uncond", "uncond", "cond", "cond")),
        ("LuminaPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("LuminaText2ImgPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("ZImagePipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("ZImagePipeline", False, 2, (), ("cond", "cond")),
        ("DiTPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("HunyuanDiTPipeline", True, 4, (), ("uncond", "uncond", "cond", "cond")),
        ("FluxPipeline", True, 2, (), ("cond", "cond")),
        ("FluxPipeline", True, 2, (2,), ("uncond", "uncond")),
        ("FluxPipeline", True, 2, (2, 2), ("cond", "cond")),  # a loop without a scheduler
        ("FluxPipeline", False, 2, (2,), ("cond", "cond")),
        ("StableDiffusion3Pipeline", True, 2, (4,), ("perturbed", "perturbed")),
    ],
)
def test_the_conditions_of_a_run_by_pipeline_batch_and_the_runs_before_it(name, guidance, batch, earlier, conditions):
    call = Call(prompts=["fox", "cat"], guidance=guidance)
    more = {"skip_layers": [1]} if "perturbed" in conditions else {}
    run = DenoiserRun("transformer", more, batch, earlier)
    found, images = Conditions(call, References(call)).entries(own_class(name), run, None)
    assert found == conditions
    assert images == (0, 1) * (batch // 2)


@pytest.mark.parametrize(
    ("layout", "conditions"),
    [
        (None, ("uncond", "cond")),
        ((("cond", "uncond"),), ("cond", "uncond")),
        ((("cond",), ("uncond",)), ("cond", "cond")),
    ],
)
def test_in_a_loop_of_ones_own_without_prompts_the_layout_says_how_many_images_there_are(layout, conditions):
    call = Call(guidance=True, own_loop=True)
    found, images = Conditions(call, References(call), layout).entries(
        own_class("Any"), DenoiserRun("unet", {}, 2), None
    )
    assert found == conditions
    assert images == ((0, 1) if conditions[0] == conditions[1] else (0, 0))


def test_in_a_loop_of_ones_own_a_run_without_guidance_is_conditional_whatever_ran_before():
    call = Call(prompts=["fox", "cat"], guidance=True, own_loop=True)
    run = DenoiserRun("unet", {}, 2, (4,))
    assert Conditions(call, References(call)).entries(own_class("Any"), run, None)[0] == ("cond", "cond")


@pytest.mark.parametrize("argument", ["prompt_embeds", "image_embeds", "class_labels", "image"])
def test_images_are_counted_by_what_stands_in_the_prompts_place(argument):
    for value, n in ((torch.zeros(3, 4, 5, 6), 3), ([torch.zeros(4, 5)] * 2, 2)):
        assert Call.of(pipe(), {"prompt": None, argument: value}).n_images == n
    assert Call.of(pipe(), {"image": object()}).n_images == 1


# Texts that a loop of one's own encodes one by one, by a method that would encode both


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"order": ["prompt", ""]}, ["cond", "uncond"]),
        ({"order": ["", "prompt"]}, ["uncond", "cond"]),
        ({"order": ["negative_prompt", "prompt"], "negative_prompt": "cat"}, ["uncond", "cond"]),
        ({"order": ["uncond_text", "prompt"], "uncond_text": "cat"}, ["uncond", "cond"]),
        ({"order": ["", "a fox", "a dog"], "prompt": "a fox | a dog"}, ["uncond", "cond", "cond"]),
        ({"order": ["", "a red fox"]}, ["uncond", "unknown"]),
        ({"order": ["", "a fox in the snow"]}, ["uncond", "cond"]),
        ({"order": ["bad", "prompt"], "bad": "cat"}, ["unknown", "unknown"]),
        ({"order": ["", "prompt"], "prompt": ""}, ["unknown", "unknown"]),
    ],
    ids=str,
)
def test_texts_encoded_one_by_one_are_told_by_the_calls_own(call, expected):
    (said,) = labels(build(OneByOne), **{"prompt": "a fox", **call})
    conditions = [condition for condition, _ in said]
    assert conditions == (["unknown"] * len(expected) if "unknown" in expected else expected)


def test_the_same_words_for_both_in_a_loop_of_ones_own_are_unknown():
    for order in (["prompt", "negative_prompt"], ["negative_prompt", "prompt"]):
        said = labels(build(OneByOne), prompt="a fox", negative_prompt="a fox", order=order)
        assert {condition for condition, _ in said[0]} == {"unknown"}


# A component between the text encoder and the denoiser


@pytest.mark.parametrize("order", [["cond", "uncond"], ["uncond", "cond"], ["cond"], ["uncond"]], ids=str)
def test_what_a_component_makes_of_a_text_is_that_texts(order):
    call = {"prompt": ["a fox", "red cat"], "negative_prompt": ["no", "dog"]}
    expected = [(condition, image) for condition in order for image in range(2)]
    pipe = Between()
    assert labels(pipe, **call, order=order) == [expected, expected]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.projector.modules())


def test_an_edit_of_what_lies_between_is_made_before_it_is_compared():
    pipe, call = Between(), {"prompt": ["a fox"], "negative_prompt": ["no"], "order": ["cond", "uncond"]}
    edit = Edit(push(), Hookpoint("projector.mix", rows=(0, None)))
    with attach(pipe, edit, watch := Watch(BLOCK)):
        pipe(**call)
    assert [c.condition for c in watch.contexts] == [("cond", "uncond")] * 2
