"""Steer: formulas with hand-made contexts, promises on tiny pipelines."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import sparsefeat as sf
from sparsefeat.attention import HeatMaps
from sparsefeat.features import Record
from sparsefeat.features.record import TopLatent
from sparsefeat.pipeline import Activations, Call, Context, Delta, Hookpoint, Instrument, attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import Steer, load_instrument
from tests.tiny import pixels, tiny_sd, tiny_sdxl

AT = "unet.up_blocks.1.attentions.1"
D, N = 32, 128


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def make_sae(**options):
    torch.manual_seed(1)
    sae = SAE(SAEConfig(**{"d_model": D, "n_latents": N, "k": 6, "hookpoint": AT, **options}))
    return sae.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def moment(grid=(2, 3), condition=("uncond", "cond"), images=(0, 0), step=0, n_steps=4):
    return Context(
        hookpoint=Hookpoint.parse(AT),
        step=step,
        n_steps=n_steps,
        fraction=step / n_steps,
        condition=condition,
        prompt_index=images,
        grid=grid,
        batch=len(condition),
        positions=grid[0] * grid[1],
    )


def change(steer, x, context, n_images=1):
    """The delta as [batch, positions, d]; zeros where the rows are left alone."""
    steer.begin_call(Call(prompts=["p"] * n_images))
    delta = steer.at_hookpoint(Activations(x), context)
    return torch.zeros_like(x) if delta is None else delta.rows.view(x.shape)


def some_rows(batch=2, positions=6, seed=3):
    return torch.randn(batch, positions, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("condition", "signs"), [("cond", (0, 1)), ("uncond", (1, 0)), ("cond+uncond-", (-1, 1)), ("both", (1, 1))]
)
def test_t7_a_direction_is_added_with_the_sign_of_its_half(sae, condition, signs):
    steer = Steer(sae, add={5: 8.0, 9: -2.0}, condition=condition)
    direction = 8 * sae.W_dec[5] - 2 * sae.W_dec[9]
    expected = torch.tensor(signs)[:, None, None] * direction.expand(2, 6, D)
    torch.testing.assert_close(change(steer, some_rows(), moment()), expected)


def test_without_guidance_every_row_is_conditional(pipe, sae):
    """T7: "the second half" of a batch without guidance would be half of the images."""
    record = Record(sae)
    with attach(pipe, Steer(sae, add={5: 100.0}), record) as run:
        pixels(pipe, ["a fox", "a cat"], guidance_scale=1.0)
    for image in range(2):
        assert run[record].top(1, image, step=0)[0].latent == 5


def test_adding_never_encodes(sae):
    class Blind(SAE):
        def encode(self, x, k=None):
            raise AssertionError("encoded")

    blind = make_sae()
    blind.__class__ = Blind
    steer = Steer(blind, add={5: 8.0}, add_map={6: torch.ones(4, 6)})
    assert change(steer, some_rows(), moment()).any()


def test_a_painted_map_is_an_outer_product_on_the_grid(sae):
    painted = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    steer = Steer(sae, add_map={5: painted, 7: torch.ones(2, 3)})
    m = painted.view(2, 2, 3, 2).mean((1, 3)).flatten()
    expected = m[:, None] * sae.W_dec[5] + sae.W_dec[7]
    out = change(steer, some_rows(), moment())
    torch.testing.assert_close(out[1], expected)
    assert not out[0].any()


def test_each_image_has_its_own_map_and_mask(sae):
    context = moment(condition=("cond", "cond"), images=(0, 1))
    maps = torch.stack([torch.full((2, 3), 2.0), torch.zeros(2, 3)])
    out = change(Steer(sae, add_map={5: maps}), some_rows(), context, n_images=2)
    torch.testing.assert_close(out[0], 2 * sae.W_dec[5].expand(6, D))
    assert not out[1].any()
    out = change(Steer(sae, add={5: 4.0}, mask=maps / 4), some_rows(), context, n_images=2)
    torch.testing.assert_close(out[0], 2 * sae.W_dec[5].expand(6, D))
    assert not out[1].any()


@pytest.mark.parametrize("latent", [np.int64(3), torch.tensor(3)])
def test_a_latent_may_be_another_librarys_integer(sae, latent):
    x = some_rows()
    given = Steer(sae, add={latent: 2.0}, scale={latent: 0.5}, at=AT)
    torch.testing.assert_close(
        change(given, x, moment()), change(Steer(sae, add={3: 2.0}, scale={3: 0.5}, at=AT), x, moment()), atol=0, rtol=0
    )


def test_edits_compose(sae):
    """add + map + scale with clamp + set, under a mask, in fp64 from the dense code."""
    x, mask = some_rows(seed=8), torch.tensor([[1.0, 0.5, 0.0], [0.25, 1.0, 1.0]])
    pre = (x.double() - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    kept = pre.topk(6, -1)
    z = torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())
    busy = z.flatten(0, 1).sum(0).topk(3).indices.tolist()
    steer = Steer(
        sae,
        add={4: 1.5},
        add_map={5: torch.full((2, 3), 0.5)},
        scale={busy[0]: 3.0, busy[1]: 0.0},
        clamp={busy[0]: (None, 2.0)},
        set={busy[2]: 0.7},
        mask=mask,
        condition="cond+uncond-",
    )
    e = z.clone()
    e[..., busy[0]] = (3 * z[..., busy[0]]).clamp(max=2)
    e[..., busy[1]] = 0
    e[..., busy[2]] = 0.7
    w = sae.W_dec.double()
    expected = (e - z) @ w + 1.5 * w[4] + 0.5 * w[5]
    expected = expected * mask.double().flatten()[None, :, None] * torch.tensor([-1.0, 1.0])[:, None, None]
    torch.testing.assert_close(change(steer, x, moment()).double(), expected, rtol=1e-5, atol=1e-5)


def test_edits_of_a_standardising_sae_are_scaled_with_the_row():
    sae = make_sae(normalizer="standardize")
    x = some_rows() * torch.tensor([1.0, 7.0])[:, None, None]
    steer = Steer(sae, add={5: 2.0}, add_map={6: torch.ones(2, 3)}, set={7: 0.0}, condition="both")
    scale = x.double().std(-1, keepdim=True) + sae.config.eps
    z = sae.encode(x).select([7]).view(2, 6, 1).double()
    w = sae.W_dec.double()
    expected = scale * (2 * w[5] + w[6] - z * w[7])
    torch.testing.assert_close(change(steer, x, moment()).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"height": 48, "width": 80}]
)
@pytest.mark.parametrize("condition", ["cond", "both", "cond+uncond-"])
def test_a_neutral_edit_gives_the_same_image_bit_for_bit(pipe, sae, call, condition):
    prompts = ["a fox", "a cat"]
    before = pixels(pipe, prompts, **call)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    steer = Steer(
        sae,
        add={3: 0.0},
        add_map={4: torch.zeros(2, 2)},
        scale=dict.fromkeys(range(60), 1.0),
        clamp={70: (None, None)},
        mask=mask,
        condition=condition,
    )
    with attach(pipe, steer):
        during = pixels(pipe, prompts, **call)
    assert (during == before).all()
    assert (pixels(pipe, prompts, **call) == before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_neutral_edit_of_a_half_precision_pipeline_changes_no_bit(sae, dtype):
    pipe = tiny_sd(dtype=dtype)
    before = pixels(pipe)
    with attach(pipe, Steer(sae, add={3: 0.0}, scale=dict.fromkeys(range(60), 1.0), condition="both")):
        assert (pixels(pipe) == before).all()


class Seen(Instrument):
    """The rows at the hookpoint, at every step."""

    def __init__(self):
        self.rows = {}

    def hookpoints(self):
        return (Hookpoint.parse(AT),)

    def at_hookpoint(self, activations, context):
        self.rows.setdefault(context.step, []).append((context, activations.rows.clone()))


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2, "height": 48, "width": 80}])
def test_what_the_pipeline_goes_on_with_is_the_edited_output(pipe, sae, call):
    """Two instruments around the steer see the rows before and after it."""
    before, after = Seen(), Seen()
    steer = Steer(sae, add={5: 3.0}, scale={7: 0.0}, condition="cond")
    with attach(pipe, before, steer, after):
        pixels(pipe, ["a fox", "a cat"], **call)
    for step in (0, 1):
        (context, x), (_, y) = before.rows[step][0], after.rows[step][0]
        cond = torch.tensor([c == "cond" for c in context.condition]).repeat_interleave(context.positions)
        z = sae.encode(x).select([7]).double()
        expected = x.double() + cond[:, None] * (3 * sae.W_dec[5].double() - z * sae.W_dec[7].double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_t8_the_window_is_counted_anew_in_every_call(pipe, sae):
    before, after = Seen(), Seen()
    with attach(pipe, before, Steer(sae, add={5: 3.0}, steps=[1]), after):
        for _ in range(3):
            pixels(pipe, steps=3)
    for step in (0, 1, 2):
        for (_, x), (_, y) in zip(before.rows[step], after.rows[step], strict=True):
            assert torch.equal(x, y) == (step != 1)


def test_t8_a_second_order_scheduler_counts_steps_not_model_runs(sae):
    pipe = tiny_sd("heun")
    before, after = Seen(), Seen()
    with attach(pipe, before, Steer(sae, add={5: 3.0}, steps=(0.0, 0.5)), after):
        pixels(pipe, steps=4)
    changed = {
        s: [not torch.equal(x, y) for (_, x), (_, y) in zip(before.rows[s], after.rows[s], strict=True)]
        for s in before.rows
    }
    assert [all(changed[s]) for s in range(4)] == [True, True, False, False]
    assert not any(changed[2] + changed[3])


def test_a_mask_keeps_the_edit_inside_it(pipe, sae):
    mask = torch.zeros(12, 20)
    mask[:, :10] = 1
    before, after = Seen(), Seen()
    with attach(pipe, before, Steer(sae, add={5: 3.0}, mask=mask), after):
        pixels(pipe, height=48, width=80, guidance_scale=1.0)
    moved = (before.rows[0][0][1] != after.rows[0][0][1]).any(1).view(6, 10)
    assert moved[:, :5].all()
    assert not moved[:, 5:].any()


def test_a_heat_map_masks_from_the_second_step_on(pipe, sae):
    maps, masks = HeatMaps(), []
    fox = maps.mask("fox")

    def kept(context):
        masks.append((context.step, context.prompt_index, fox(context)))
        return masks[-1][2]

    with attach(pipe, maps, Steer(sae, add={5: 3.0}, mask=kept)) as run:
        pixels(pipe, ["a fox", "cat"], steps=2)
    (_, _, first), (step, images, second) = masks
    assert not first.any()
    assert (step, images) == (1, (0, 1, 0, 1))
    assert second.shape == (4, 16, 16)
    assert float(second[0].max()) == 1
    assert float(second[0].min()) == 0
    assert not second[1].any()  # "cat" has no fox
    # Two steps of the recording are the first one (which the mask saw) and the second.
    assert run[maps].evaluations == 2
    alone = HeatMaps()
    with attach(pipe, alone) as run:
        pixels(pipe, "a cat", steps=1)
    with pytest.raises(ValueError, match="its words are: a, cat"):
        run[alone].word("fox")
    with (
        attach(pipe, maps, Steer(sae, add={5: 3.0}, mask=fox)),
        pytest.raises(ValueError, match="its words are: a, cat"),
    ):
        pixels(pipe, "a cat", steps=2)


def test_sdxl_and_diff_hookpoints_are_steered():
    pipe = tiny_sdxl()
    steer = Steer(make_sae(), add={5: 3.0}, at="unet.mid_block.attentions.0:diff")
    before = pixels(pipe)
    with attach(pipe, steer):
        during = pixels(pipe)
    assert (before != during).any()
    with attach(pipe, Steer(make_sae(), add={5: 0.0}, scale={3: 1.0}, at="unet.mid_block.attentions.0:diff")):
        assert (pixels(pipe) == before).all()


def test_a_text_encoder_is_steered(pipe):
    before = pixels(pipe)
    with attach(pipe, Steer(make_sae(), add={5: 3.0}, at="text_encoder.text_model.encoder.layers.1")):
        assert (pixels(pipe) != before).any()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("instrument.json", "{", "instrument.json is damaged"),
        ("instrument.json", "[1]", "is not a instrument saved by sparsefeat"),
        ("tensors", "", r"instrument-.*\.safetensors is missing or damaged"),
        ("settings", "", r"holds a damaged instrument \(KeyError"),
        ("format", "", "holds an instrument of format 2, and this sparsefeat reads 1"),
    ],
)
def test_a_damaged_instrument_is_one_sentence(sae, tmp_path, file, content, said):
    Steer(sae, add={5: 2.0}).save(tmp_path / "it")
    path = tmp_path / "it" / "instrument.json"
    if file == "tensors":
        next((tmp_path / "it").glob("*.safetensors")).unlink()
    elif file == "settings":
        path.write_text(path.read_text().replace('"add"', '"sub"'))
    elif file == "format":
        path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        load_instrument(tmp_path / "it")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("steps", [[99], (0.1, 0.2)])
def test_a_window_that_holds_no_step_is_told(pipe, sae, steps):
    steer = Steer(sae, add={5: 2.0}, steps=steps)
    with (
        attach(pipe, steer),
        pytest.warns(
            UserWarning,
            match="did nothing in a whole call, as none of the 3 steps that ran is among its own: look at its steps=",
        ),
    ):
        pipe("fox", num_inference_steps=3)


def test_a_window_that_holds_one_is_not_told_of(pipe, sae, recwarn):
    with attach(pipe, Steer(sae, add={5: 2.0}, steps=[2])):
        pipe("fox", num_inference_steps=3)
    assert not [one for one in recwarn if "did nothing" in str(one.message)]


def test_a_mask_of_heat_maps_that_are_not_attached_is_refused(pipe, sae):
    steer = Steer(sae, add={5: 2.0}, mask=HeatMaps().mask("fox"))
    with (
        attach(pipe, steer),
        pytest.raises(ValueError, match=r"map of 'fox' of HeatMaps that are not attached; attach"),
    ):
        pipe("fox", num_inference_steps=2)


def test_a_saved_steer_does_the_same(pipe, sae, tmp_path):
    steer = Steer(
        sae,
        add={5: 2.0},
        add_map={6: torch.rand(3, 3)},
        scale={7: -1.0},
        clamp={8: (0.0, None)},
        set={9: 1.0},
        steps=(0.0, 0.5),
        mask=torch.rand(4, 4),
        condition="both",
    )
    steer.save(tmp_path / "with")
    with pytest.raises(FileExistsError, match="holds an instrument already; save to another folder, or replace it"):
        steer.save(tmp_path / "with")
    steer.save(tmp_path / "with", overwrite=True)
    steer.save(tmp_path / "without", include_sae=False)
    with attach(pipe, steer):
        expected = pixels(pipe)
    for loaded in (load_instrument(tmp_path / "with"), load_instrument(tmp_path / "without", sae=sae)):
        assert isinstance(loaded, Steer)
        with attach(pipe, loaded):
            assert (pixels(pipe) == expected).all()
    with pytest.raises(FileNotFoundError, match=r"without its SAE; pass it: load_instrument\(folder, sae=sae\)"):
        load_instrument(tmp_path / "without")
    torch.manual_seed(2)
    with pytest.raises(ValueError, match="not the SAE that"):
        load_instrument(tmp_path / "without", sae=SAE(sae.config))
    with pytest.raises(ValueError, match="mask is a callable cannot be saved"):
        Steer(sae, add={5: 2.0}, mask=lambda context: torch.ones(2, 2)).save(tmp_path / "no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "edits nothing; give at least one latent"),
        ({"add": {}}, "edits nothing"),
        ({"add": {128: 1.0}}, "add= names latent 128; this SAE has latents 0 to 127"),
        ({"scale": {-1: 1.0}}, "scale= names latent -1"),
        ({"set": {1.5: 1.0}}, r"set= names latent 1\.5"),
        ({"add": [1, 2]}, r"add=\[1, 2\] must map latents to amounts"),
        ({"add": {3: float("nan")}}, r"add\[3\]=nan must be a finite number"),
        ({"scale": {3: "much"}}, r"scale\[3\]='much' must be a finite number"),
        ({"clamp": {3: (2.0, 1.0)}}, r"clamp\[3\]=\(2\.0, 1\.0\) must be \(low, high\)"),
        ({"clamp": {3: 2.0}}, r"clamp\[3\]=2\.0 must be \(low, high\)"),
        ({"set": {3: 1.0}, "scale": {3: 1.0}}, "latent 3 is in set= and also in scale= or clamp="),
        ({"add_map": {3: torch.ones(4)}}, r"add_map\[3\] has shape \[4\]"),
        ({"add": {3: 1.0}, "mask": torch.ones(2, 2, 2, 2)}, r"mask has shape \[2, 2, 2, 2\]"),
        ({"add": {3: 1.0}, "condition": "positive"}, r"condition='positive' is not known; use one of 'cond', 'uncond'"),
        ({"add": {3: 1.0}, "steps": (0.5, 0.1)}, r"steps=\(0\.5, 0\.1\) must be \(start, stop\)"),
    ],
)
def test_mistakes_are_refused_when_the_steer_is_made(sae, arguments, message):
    with pytest.raises(ValueError, match=message):
        Steer(sae, **arguments)


def test_a_mask_for_another_number_of_images_is_refused_in_the_call(pipe, sae):
    with (
        attach(pipe, Steer(sae, add={3: 1.0}, mask=torch.ones(3, 4, 4))),
        pytest.raises(ValueError, match="maps for 3 images"),
    ):
        pixels(pipe)


def test_the_answer_is_a_delta(sae):
    steer = Steer(sae, add={3: 1.0})
    steer.begin_call(Call(prompts=["p"]))
    assert isinstance(steer.at_hookpoint(Activations(some_rows()), moment()), Delta)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bool, torch.int64])
def test_maps_and_masks_of_any_dtype_go_together(sae, kind):
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]])
    wanted = change(Steer(sae, add_map={5: 3.0 * mask}, mask=mask.float(), scale={7: 0.5}), some_rows(), moment())
    given = Steer(sae, add_map={5: 3 * mask}, mask=mask.to(kind), scale={7: 0.5})
    torch.testing.assert_close(change(given, some_rows(), moment()), wanted, atol=0, rtol=0)
    assert wanted[1, 1].any()
    assert not wanted[1, 0].any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 3), 255.0), "mask is float32 with values up to 255; divide it by 255"),
        (np.full((2, 3), 3.5), r"mask is float64 with values up to 3\.5; divide it by 3\.5"),
        ([[0.0, -1.0]], "mask has values down to -1; give weights of 0 to 1, and the sign with the amounts"),
    ],
)
def test_a_mask_is_of_weights_from_0_to_1(sae, mask, message):
    for make in (lambda: Steer(sae, add={5: 1.0}, mask=mask), lambda: sf.AddVector(AT, torch.ones(D), mask=mask)):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="the tensor that mask= returned"):
        change(Steer(sae, add={5: 1.0}, mask=lambda context: torch.as_tensor(mask)), some_rows(), moment())


def test_a_line_of_a_list_is_no_latent(sae):
    line = TopLatent(5, 0.25, 1.0, 0.5)
    with pytest.raises(
        ValueError, match=r"a latent of scale= is TopLatent\(latent=5, …\), a line of a list; give its number"
    ):
        Steer(sae, scale={line: 0.0})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"add": {5: 4.0}, "mask": torch.zeros(4, 4)}, "this Steer did nothing in a whole call, as its mask is 0"),
        (
            {"scale": {"idle": 2.0}},
            "none is active where it acts, and what is not there can be neither scaled nor set to 0",
        ),
        ({"set": {"idle": 0.0}}, "none is active where it acts"),
        ({"scale": {"top": 2.0}}, None),
        ({"scale": {"idle": 2.0, "top": 2.0}}, None),
        ({"scale": {"idle": 1.0}}, None),
        ({"clamp": {"idle": (None, 9.0)}}, None),
        ({"scale": {"idle": 0.0}, "add": {5: 1.0}}, None),
    ],
)
def test_an_edit_that_did_nothing_says_so(pipe, sae, edits, message):
    with attach(pipe, record := Record(sae)) as run:
        pixels(pipe, "a fox", steps=2)
    active = [found.latent for found in run[record].top(N)]
    named = {"top": active[0], "idle": next(i for i in range(N) if i not in active)}
    given = {
        name: {named.get(latent, latent): amount for latent, amount in edit.items()} if name != "mask" else edit
        for name, edit in edits.items()
    }
    with warnings.catch_warnings(record=True) as heard, attach(pipe, Steer(sae, **given)):
        warnings.simplefilter("always")
        pixels(pipe, "a fox", steps=2)
        pixels(pipe, "a fox", steps=2)
    said = [str(one.message) for one in heard if "did nothing" in str(one.message)]
    assert len(said) == (0 if message is None else 1)
    assert message is None or message in said[0]
