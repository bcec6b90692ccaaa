"""The explorer without its page: runs, features, edits, what is saved, on tiny pipelines."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sparsefeat.erasure import Erase, Exchange
from sparsefeat.explore import Asked, Explorer, LatentEdit, Source, Stopped, WordEdit, painted, with_edit
from sparsefeat.features import Record
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, Names, SAEConfig, load_sae
from sparsefeat.steering import load_instrument
from tests.tiny import tiny_sd, tiny_sdxl

OF_SD, OF_SDXL = "unet.up_blocks.1.attentions.1", "unet.down_blocks.1.attentions.0"
ASKED = Asked("a fox", seed=7, steps=4, guidance=3.0)


def make_sae(at: str, seed: int = 1, **options: object) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(d_model=32, n_latents=48, k=5, hookpoint=at, **options))  # type: ignore[arg-type]
    return sae.requires_grad_(False).eval()


def opened(folder, pipe, saes) -> tuple[Any, list[SAE], Source]:
    """The pipeline and SAEs from disk, and how they were opened from there.

    Not those that were written: weights that lie elsewhere in memory may round otherwise, and guidance makes it seen.
    """
    pipe.save_pretrained(folder / "pipe")
    for i, sae in enumerate(saes):
        sae.save(folder / f"sae-{i}")
    source = Source(
        ("from diffusers import DiffusionPipeline",),
        f"DiffusionPipeline.from_pretrained({str(folder / 'pipe')!r}).to('cpu', torch.float32)",
        tuple(f"sf.load_sae({str(folder / f'sae-{i}')!r})" for i in range(len(saes))),
    )
    read = DiffusionPipeline.from_pretrained(folder / "pipe").to("cpu", torch.float32)
    read.set_progress_bar_config(disable=True)
    return read, [load_sae(folder / f"sae-{i}") for i in range(len(saes))], source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    saes = [make_sae(OF_SD), make_sae("unet.mid_block.attentions.0", seed=2)]
    return opened(tmp_path_factory.mktemp("opened"), tiny_sd(), saes)


@pytest.fixture
def explorer(source):
    pipe, saes, how = source
    return Explorer(pipe, saes, how, prompts=["a fox", "a snow fox", "snow"])


def plain(pipe, asked, *instruments):
    call = {"num_inference_steps": asked.steps, "generator": torch.Generator("cpu").manual_seed(asked.seed)}
    if asked.guidance is not None:
        call["guidance_scale"] = asked.guidance
    if not instruments:
        return pipe(asked.prompt, **call).images[0]
    with attach(pipe, *instruments):
        return pipe(asked.prompt, **call).images[0]


def left_half(size=(64, 64)):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def run_lines(lines: str, where, monkeypatch) -> Image.Image:
    monkeypatch.chdir(where)
    names: dict = {}
    exec(compile(lines, "edit.py", "exec"), names)
    with Image.open(where / "edited.png") as written:
        assert written.tobytes() == names["image"].tobytes()
    return names["image"]


def test_looking_changes_no_bit_and_the_second_look_draws_nothing(explorer):
    expected = plain(explorer.pipe, ASKED)
    seen = []
    drawn = explorer.draw(ASKED, lambda *step: seen.append(step))
    assert drawn.image.tobytes() == expected.tobytes()
    assert seen == [("drawing", 1, 4), ("drawing", 2, 4), ("drawing", 3, 4), ("drawing", 4, 4)]
    assert explorer.draw(Asked("a fox", seed=7, steps=4, guidance=3.0), lambda *step: seen.append(step)) is drawn
    assert len(seen) == 4
    assert explorer.draw(Asked("a fox", seed=8, steps=4, guidance=3.0)).image.tobytes() != expected.tobytes()


def test_features_are_those_of_record(explorer):
    drawn = explorer.draw(ASKED)
    for i, sae in enumerate(explorer.saes):
        record = Record(sae)
        with attach(explorer.pipe, record) as run:
            plain(explorer.pipe, ASKED)
        expected = run[record].top(5)
        found = explorer.features(drawn, i, 5)
        assert [(f.latent, f.score) for f in found] == [(t.latent, t.score) for t in expected]
        codes = [run[record].codes(step).dense()[:, expected[0].latent] for step in run[record].steps]
        active = torch.cat(codes)
        assert found[0].usual == pytest.approx(float(active[active > 0].double().mean()), rel=1e-5)
        assert found[0].picture is not None
        assert found[0].picture.size == (256, 256)


def test_a_latent_that_is_not_active_is_found_by_number_and_says_what_its_scale_is(explorer):
    drawn = explorer.draw(ASKED)
    active = {f.latent for f in explorer.features(drawn, 0, 48)}
    silent = next(i for i in range(48) if i not in active)
    feature = explorer.feature(drawn, 0, str(silent))
    assert feature.score == 0
    assert feature.usual > 0
    assert "no image so far" in feature.usual_of
    for wrong, sentence in (("48", "0 to 47"), ("-1", "0 to 47"), (" ", "no latent is named"), ("fox", "none yet")):
        with pytest.raises(ValueError, match=sentence):
            explorer.feature(drawn, 0, wrong)


def test_a_latent_is_found_by_the_sae_s_own_name(source):
    pipe, _, how = source
    named = make_sae(OF_SD)
    named.names = Names({3: "foxes", 4: "snow"})
    explorer = Explorer(pipe, [named], how)
    drawn = explorer.draw(ASKED)
    assert explorer.feature(drawn, 0, "Foxes").latent == 3
    assert explorer.feature(drawn, 0, "4").name == "snow"


def test_examples_are_the_images_drawn_so_far_each_once(explorer):
    drawn = explorer.draw(ASKED)
    explorer.draw(ASKED)
    assert len(explorer.pictures) == 1
    assert explorer.survey(5, Asked("a fox", steps=2)) == 6
    latent = explorer.features(drawn, 0, 1)[0].latent
    shown = explorer.examples_of(0, latent)
    assert 0 < len(shown) <= 6
    assert {one.caption.partition(" · ")[0] for one in shown} <= {"a fox", "a snow fox", "snow"}
    scores = [float(one.caption.partition(" · ")[2]) for one in shown]
    assert scores == sorted(scores, reverse=True)


def test_words_have_maps_or_the_reason_why_not(explorer):
    drawn = explorer.draw(ASKED)
    assert [one.caption for one in explorer.word_maps(drawn)] == ["a", "fox"]
    pipe = tiny_sd()
    pipe.unet.set_attn_processor(Unreadable())
    other = Explorer(pipe, explorer.saes, explorer.source)
    for seed in (7, 8):
        asked = Asked("a fox", seed=seed, steps=2)
        blind = other.draw(asked)
        assert blind.image.tobytes() == plain(pipe, asked).tobytes()
        assert other.features(blind)
        with pytest.raises(ValueError, match=r"there are no heat maps of this pipeline: .*attention"):
            other.word_maps(blind)


class Unreadable:
    """An attention that `HeatMaps` refuses: it is no softmax that torch sees."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


EDITS = {
    "added where painted": (LatentEdit(0, 5, 9.0, (1, 2), left_half()),),
    "taken out": (LatentEdit(0, 5, None),),
    "two SAEs": (LatentEdit(1, 5, -7.5), LatentEdit(0, 2, 30.0, (2, 4))),
    "a word": (WordEdit("fox", "uce"), LatentEdit(0, 5, 20.0)),
    "guidance": (WordEdit("fox", "sld"),),
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_the_folder_and_the_lines_draw_the_same_bits(explorer, edits, tmp_path, monkeypatch):
    shown = explorer.edited(ASKED, edits)
    if edits != EDITS["taken out"]:  # an untrained SAE's latent may be silent
        assert shown.tobytes() != explorer.draw(ASKED).image.tobytes()
    folder = explorer.save(str(tmp_path / "edit"), ASKED, edits)
    assert plain(explorer.pipe, ASKED, load_instrument(folder)).tobytes() == shown.tobytes()
    lines = (folder / "edit.py").read_text()
    assert lines == explorer.lines(ASKED, edits, str(folder))
    assert run_lines(lines, tmp_path, monkeypatch).tobytes() == shown.tobytes()
    loaded = explorer.lines(ASKED, edits, str(folder), loaded=True)
    assert run_lines(loaded, tmp_path, monkeypatch).tobytes() == shown.tobytes()


def test_lines_without_an_edit_draw_the_unedited_image(explorer, tmp_path, monkeypatch):
    lines = explorer.lines(ASKED, (), "nowhere")
    assert run_lines(lines, tmp_path, monkeypatch).tobytes() == explorer.draw(ASKED).image.tobytes()


def test_painting_acts_where_it_was_painted(source):
    """The change of the block's output is nothing but where the mask is white."""
    pipe, saes, _ = source
    collected = []
    for instruments in ((), (LatentEdit(0, 5, 9.0, None, left_half()).instrument(saes),)):
        record = Record(saes[0], positions=True)
        with attach(pipe, *instruments, record) as run:
            plain(pipe, Asked("a fox", seed=7, steps=1))
        collected.append(run[record].codes(0).dense().reshape(*run[record].grid, -1))
    changed = (collected[0] != collected[1]).any(-1)
    width = changed.shape[1]
    assert changed[:, : width // 2].any()
    assert not changed[:, width // 2 :].any()


def test_another_family_works_alike(tmp_path):
    pipe, saes, how = opened(tmp_path, tiny_sdxl(), [make_sae(OF_SDXL)])
    explorer = Explorer(pipe, saes, how)
    asked = Asked("a snow fox", seed=1, steps=3)
    drawn = explorer.draw(asked)
    assert drawn.image.tobytes() == plain(pipe, asked).tobytes()
    assert [one.caption for one in explorer.word_maps(drawn)] == ["a", "snow", "fox"]
    edits = (LatentEdit(0, explorer.features(drawn)[0].latent, 50.0, (1, 1), left_half()),)
    shown = explorer.edited(asked, edits)
    assert shown.tobytes() != drawn.image.tobytes()
    folder = explorer.save(str(tmp_path / "edit"), asked, edits)
    assert plain(pipe, asked, load_instrument(folder)).tobytes() == shown.tobytes()


def test_stopping_says_where_and_leaves_everything_as_it_was(explorer):
    drawn = explorer.draw(ASKED)
    processors = dict(explorer.pipe.unet.attn_processors)

    def stop_at_two(what, step, n):
        if step == 2:
            explorer.stop()

    with pytest.raises(Stopped, match="stopped after 2 of 4 steps"):
        explorer.edited(ASKED, [LatentEdit(0, 5, 9.0)], stop_at_two)
    with pytest.raises(Stopped):
        explorer.draw(Asked("snow", steps=4), stop_at_two)
    assert explorer.draw(ASKED) is drawn
    assert len(explorer.pictures) == 1
    assert explorer.pipe.unet.attn_processors == processors
    assert explorer.edited(ASKED, []).tobytes() == drawn.image.tobytes()  # an earlier stop does not end a later run
    explorer.stop()
    assert explorer.edited(ASKED, [LatentEdit(0, 5, 9.0)]).tobytes() != drawn.image.tobytes()


def test_the_same_edits_are_drawn_once_and_another_mask_is_another_edit(explorer):
    steps = []

    def tell(what, step, n):
        steps.append(step)

    def edit(rectangle):
        mask = Image.new("L", (64, 64))
        mask.paste(255, rectangle)
        return LatentEdit(0, 5, 9.0, mask=mask)

    top, bottom = (0, 0, 64, 32), (0, 32, 64, 64)
    first = explorer.edited(ASKED, [edit(top)], tell)
    assert len(steps) == ASKED.steps
    assert explorer.edited(ASKED, [edit(top)], tell) is first
    assert len(steps) == ASKED.steps
    assert explorer.edited(ASKED, [edit(bottom)], tell).tobytes() != first.tobytes()
    assert len(steps) == 2 * ASKED.steps
    for mask in (top, bottom):  # as they are drawn by whoever kept nothing
        alone = Explorer(explorer.pipe, explorer.saes, explorer.source)
        assert alone.edited(ASKED, [edit(mask)]).tobytes() == explorer.edited(ASKED, [edit(mask)]).tobytes()


CONCEPTS = {"fox": ["a fox", "red fox"], "snow": ["snow", "a snow"], "cat": ["a cat"]}


def test_fitting_tells_how_far_it_is_and_what_was_read_before_a_stop_serves_the_next_word(source, monkeypatch):
    pipe, saes, how = source
    explorer = Explorer(pipe, saes, how, concepts=lambda word: CONCEPTS)
    read, encode = [], pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda text, *a, **k: read.append(text) or encode(text, *a, **k))
    seen = []

    def stop_at_three(what, step, n):
        seen.append((what, step, n))
        if step == 3:
            explorer.stop()

    with pytest.raises(Stopped, match="stopped after 3 of 5 steps"):
        explorer.edited(ASKED, [WordEdit("fox")], stop_at_three)
    assert seen == [("learning what “fox” is", i, 5) for i in (1, 2, 3)]
    assert read == ["a fox", "red fox", ""]
    explorer.edited(ASKED, [WordEdit("snow")])
    assert read[3:] == ["snow", "a snow", "a cat", ASKED.prompt]  # what the first read is not read again
    alone = Explorer(pipe, saes, how, concepts=lambda word: CONCEPTS)
    drawn = alone.edited(ASKED, [WordEdit("fox")])
    assert explorer.edited(ASKED, [WordEdit("fox")]).tobytes() == drawn.tobytes()


def test_words_of_one_sae_share_the_texts_that_were_read_for_the_first(source, monkeypatch):
    pipe, saes, how = source
    eraser = make_sae("text_encoder.encoder.layers.0", seed=3)
    explorer = Explorer(pipe, saes, how, eraser=eraser, concepts=lambda word: CONCEPTS)
    read, encode, seen = [], pipe.encode_prompt, []
    monkeypatch.setattr(pipe, "encode_prompt", lambda text, *a, **k: read.append(text) or encode(text, *a, **k))
    explorer.edited(ASKED, [WordEdit("fox", "saeuron")], lambda *told: seen.append(told))
    assert read == [["a fox", "red fox", "snow", "a snow", "a cat"], ASKED.prompt]
    assert [told for told in seen if told[0] == "editing"] == [("editing", i, 4) for i in (1, 2, 3, 4)]
    explorer.edited(ASKED, [WordEdit("cat", "saeuron")])
    assert read[2:] == [ASKED.prompt]


def test_a_survey_that_is_stopped_keeps_what_was_drawn(explorer):
    seen = []

    def stop_in_the_second_batch(what, step, n):
        seen.append((step, n))
        if step == 10:
            explorer.stop()

    with pytest.raises(Stopped):
        explorer.survey(6, Asked("a fox", steps=2), stop_in_the_second_batch)
    assert seen == [(4, 12), (8, 12), (10, 12)]
    assert len(explorer.pictures) == 4


def test_runs_wait_for_one_another(explorer):
    results = []
    threads = [
        threading.Thread(target=lambda s=seed: results.append(explorer.draw(Asked("a fox", seed=s, steps=2))))
        for seed in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for drawn in results:
        assert drawn.image.tobytes() == plain(explorer.pipe, drawn.asked).tobytes()
    assert len(results) == 3


def test_an_edit_replaces_that_of_the_same_latent_and_nothing_leaves():
    edits = with_edit((), LatentEdit(0, 5, 2.0))
    edits = with_edit(edits, WordEdit("fox"))
    edits = with_edit(edits, LatentEdit(1, 5, 1.0))
    edits = with_edit(edits, LatentEdit(0, 5, None))
    assert edits == (LatentEdit(0, 5, None), WordEdit("fox"), LatentEdit(1, 5, 1.0))
    assert with_edit(edits, LatentEdit(0, 5, 0.0)) == edits[1:]


def test_paint_is_the_union_of_the_layers_alpha():
    empty = Image.new("RGBA", (8, 6))
    assert painted([]) is None
    assert painted([empty, empty]) is None
    one, other = empty.copy(), empty.copy()
    one.putpixel((1, 2), (0, 0, 0, 255))  # black paint is paint
    other.putpixel((3, 4), (255, 255, 255, 128))
    mask = painted([one, other])
    assert mask is not None
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[2, 1], expected[4, 3] = 255, 128
    assert (np.asarray(mask) == expected).all()


WRONG = {
    "an empty prompt": (lambda e, t: Asked("  "), "the prompt is empty"),
    "no steps": (lambda e, t: Asked("a fox", steps=0), "steps=0 must be"),
    "half a step": (lambda e, t: Asked("a fox", steps=2.5), "steps=2.5 must be"),
    "too many steps": (lambda e, t: e.draw(Asked("a fox", steps=5000)), "steps=5000 is more than the 1000"),
    "a seed below zero": (lambda e, t: Asked("a fox", seed=-1), "seed=-1 must be"),
    "guidance that is no number": (lambda e, t: Asked("a fox", guidance=float("nan")), "guidance=nan must be"),
    "a latent that is not there": (lambda e, t: e.edited(ASKED, [LatentEdit(0, 48, 1.0)]), "latents 0 to 47"),
    "an amount that is none": (lambda e, t: LatentEdit(0, 1, float("inf")), "amount=inf must be"),
    "steps turned round": (lambda e, t: LatentEdit(0, 1, 1.0, (3, 2)), "the last step, 2, is before the first, 3"),
    "steps that never come": (lambda e, t: e.edited(ASKED, [LatentEdit(0, 1, 1.0, (5, 9))]), "begins at step 5 of 4"),
    "no word": (lambda e, t: e.edited(ASKED, [WordEdit(" ")]), "no word is named"),
    "an unknown method": (lambda e, t: e.edited(ASKED, [WordEdit("fox", "saeuron")]), "cad, uce, sld"),
    "nothing to save": (lambda e, t: e.save(str(t / "new"), ASKED, []), "nothing to save yet"),
    "no folder": (lambda e, t: e.save(" ", ASKED, [LatentEdit(0, 1, 1.0)]), "the folder is empty"),
    "a folder that is taken": (lambda e, t: e.save(str(t), ASKED, [LatentEdit(0, 1, 1.0)]), "exists already"),
    "no prompts to survey": (lambda e, t: Explorer(e.pipe, e.saes, e.source).survey(3, ASKED), "--prompts FILE"),
    "an SAE of another hookpoint": (
        lambda e, t: Explorer(e.pipe, [make_sae("unet.up_blocks.9.attentions.0")], e.source),
        "unet.up_blocks",
    ),
    "an SAE of another width": (
        lambda e, t: Explorer(e.pipe, [SAE(SAEConfig(d_model=24, n_latents=48, k=5, hookpoint=OF_SD))], e.source),
        "24",
    ),
    "no SAE": (lambda e, t: Explorer(e.pipe, [], e.source), "saes is empty"),
    "numbers beyond all bounds": (lambda e, t: e.edited(ASKED, [LatentEdit(0, 1, 3e38)]), "came out as NaN"),
}


@pytest.mark.parametrize(("mistake", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_sentence_and_loses_nothing(explorer, mistake, sentence, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    drawn = explorer.draw(ASKED)
    with pytest.raises((ValueError, FileExistsError, TypeError), match=sentence) as caught:
        mistake(explorer, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert explorer.draw(ASKED) is drawn
    assert explorer.edited(ASKED, []).tobytes() == drawn.image.tobytes()


@pytest.mark.filterwarnings("ignore:n_latents=32 asks for more than there are")
def test_a_word_is_erased_by_the_text_encoders_sae_in_either_way(source, tmp_path):
    pipe, saes, how = source
    eraser = make_sae("text_encoder.encoder.layers.0")
    known = {"fox": ["a fox", "fox b"], "cat": ["a cat", "cat b"]}
    explorer = Explorer(pipe, saes, how, eraser=eraser, concepts=lambda word: known)
    assert explorer.methods == ("exchange", "saeuron", "cad", "uce", "sld")
    unedited = plain(pipe, ASKED)
    for method, kind in (("exchange", Exchange), ("saeuron", Erase)):
        edit = WordEdit("fox", method)
        shown = explorer.edited(ASKED, [edit])
        (fitted,) = load_instrument(explorer.save(str(tmp_path / method), ASKED, [edit])).instruments
        assert isinstance(fitted, kind)
        assert shown.tobytes() == plain(pipe, ASKED, fitted).tobytes() != unedited.tobytes()
