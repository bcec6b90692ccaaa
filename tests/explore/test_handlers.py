"""What the page's clicks do, without a browser: mistakes, warnings, and clicks that come while a run goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from PIL import Image

from sparsefeat.explore import Asked, Explorer, LatentEdit, Source
from sparsefeat.explore.page import ADD, EVERYWHERE, PAINTED, Page, Tab
from tests.explore.test_explorer import OF_SD, make_sae
from tests.tiny import tiny_sd

STEPS = 2
SAVING = ("edit", False)


@pytest.fixture(scope="module")
def page():
    source = Source((), "pipe", ("sae",))
    explorer = Explorer(tiny_sd(), [make_sae(OF_SD)], source, prompts=["a fox", "snow"])
    return Page(explorer, Asked("a fox", 7, STEPS, 3.0))


@pytest.fixture
def tab(page):
    tab = Tab(session="mine")
    drawn = page.on_draw(tab, "a fox", 7, STEPS, 3.0, *SAVING)
    assert "error" not in drawn[page.status]
    return tab


def draw(page, tab, **changed):
    given = {"prompt": "a fox", "seed": 7, "steps": STEPS, "guidance": 3.0, **changed}
    return page.on_draw(tab, *given.values(), *SAVING)


def steer(page, tab, **changed):
    given = {"editor": None, "how": ADD, "where": EVERYWHERE, "strength": 5, "first": 1, "last": STEPS, **changed}
    return page.on_steer(tab, *SAVING, *given.values())


def choose(page, tab, rank):
    return page.on_choose(tab, SimpleNamespace(index=rank))


WRONG = {
    "no prompt": (lambda p, t: draw(p, t, prompt=" \n"), "the prompt is empty"),
    "no seed": (lambda p, t: draw(p, t, seed=None), "the seed is empty; write a whole number"),
    "half a seed": (lambda p, t: draw(p, t, seed=2.5), "the seed=2.5 must be a whole number"),
    "a seed that a browser rounds": (lambda p, t: draw(p, t, seed=2**53), "the seed=9007199254740992 must be"),
    "a seed below zero": (lambda p, t: draw(p, t, seed=-1), "the seed=-1 must be"),
    "no steps": (lambda p, t: draw(p, t, steps=None), "steps is empty"),
    "zero steps": (lambda p, t: draw(p, t, steps=0), "steps=0 must be"),
    "half a step": (lambda p, t: draw(p, t, steps=1.5), "steps=1.5 must be"),
    "more steps than there are": (lambda p, t: draw(p, t, steps=1e6), "steps=1000000 is more than the 1000"),
    "guidance beyond all bounds": (lambda p, t: draw(p, t, guidance=1e39), "guidance=1e+39 is infinite in 32 bits"),
    "guidance that ends in NaN": (lambda p, t: draw(p, t, guidance=1e38), "the image came out as NaN"),
    "no strength": (lambda p, t: steer(p, t, strength=None), "how much is empty"),
    "no first step": (lambda p, t: steer(p, t, first=None), "the first step is empty"),
    "half a last step": (lambda p, t: steer(p, t, last=1.5), "the last step=1.5 must be"),
    "steps turned round": (lambda p, t: steer(p, t, first=2, last=1), "the last step, 1, is before the first, 2"),
    "steps that never come": (lambda p, t: steer(p, t, first=9, last=10), "begins at step 9 of 2"),
    "nothing painted": (lambda p, t: steer(p, t, where=PAINTED), "nothing is painted"),
    "no word": (lambda p, t: p.on_erase(t, *SAVING, " ", "uce"), "no word is named"),
    "a latent beyond the SAE's": (lambda p, t: p.on_find(t, "48"), "latent 48 is not in this SAE, which has 0 to 47"),
    "a latent by no name": (lambda p, t: p.on_find(t, "1e3"), "no latent is called '1e3'"),
    "nothing to find": (lambda p, t: p.on_find(t, ""), "no latent is named"),
    "nothing to save": (lambda p, t: p.on_save(t, *SAVING), "nothing to save yet"),
}


@pytest.mark.parametrize(("mistake", "sentence"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_sentence_and_the_tab_stays_as_it_was(page, tab, mistake, sentence):
    choose(page, tab, 0)
    before = dict(vars(tab))
    shown = mistake(page, tab)
    assert list(shown) == [page.status]
    assert sentence.replace("'", "&#x27;") in shown[page.status]
    assert shown[page.status].count("<p") == 1
    assert vars(tab) == before
    assert page.at_work is None


PLACES = {
    "a folder that is taken": ("taken", "exists already; choose another folder"),
    "a file": ("file", "exists already; choose another folder"),
    "a folder in a file": ("file/new", "file"),
    "no name": (" ", "the folder is empty"),
    "a name too long": ("x" * 300, "too long"),
    "a name that no file can have": ("a\0b", "null"),
}


@pytest.mark.parametrize(("name", "sentence"), PLACES.values(), ids=PLACES)
def test_what_cannot_be_saved_there_is_one_sentence_and_nothing_is_lost(page, tab, tmp_path, name, sentence):
    choose(page, tab, 0)
    steer(page, tab)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    place = name if not name.strip() else str(tmp_path / name)
    shown = page.on_save(tab, place, False)
    assert 'class="error"' in shown[page.status]
    assert sentence in shown[page.status]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "taken"]
    assert (tmp_path / "file").read_text() == "mine"
    assert "Saved in" in page.on_save(tab, str(tmp_path / "new"), False)[page.status]


def test_before_the_first_image_every_click_says_what_to_do_first(page):
    tab = Tab()
    for shown in (
        steer(page, tab),
        page.on_find(tab, "3"),
        page.on_erase(tab, *SAVING, "fox", "uce"),
        page.on_save(tab, *SAVING),
        page.on_list(tab, *SAVING, []),
    ):
        assert "there is no image yet; write a prompt and press Draw" in shown[page.status]


def test_a_feature_that_is_chosen_while_another_is_drawn_stays_chosen(page, tab, monkeypatch):
    choose(page, tab, 0)
    first, second = tab.shown[0].latent, tab.shown[1].latent
    edited = page.explorer.edited

    def meanwhile(*given):
        choose(page, tab, 1)
        return edited(*given)

    monkeypatch.setattr(page.explorer, "edited", meanwhile)
    steer(page, tab)
    assert tab.edits == (LatentEdit(0, first, 5 * tab.shown[0].usual),)
    assert tab.chosen is not None
    assert tab.chosen.latent == second
    monkeypatch.setattr(page.explorer, "edited", edited)
    steer(page, tab)
    assert [edit.latent for edit in tab.edits] == [first, second]


@pytest.mark.parametrize("by", ["Stop", "Stop in another tab", "closing it", "closing another"])
def test_a_run_ends_with_its_own_tab_and_no_other_s(page, tab, monkeypatch, by):
    progress = SimpleNamespace(told=[])

    def told(done, **more):
        progress.told.append(done)
        if len(progress.told) == 1:
            {
                "Stop": lambda: page.on_stop(tab),
                "Stop in another tab": lambda: page.on_stop(Tab(session="other")),
                "closing it": lambda: page.on_close(SimpleNamespace(session_hash="mine")),
                "closing another": lambda: page.on_close(SimpleNamespace(session_hash="other")),
            }[by]()

    before = tab.drawn
    shown = page.on_draw(tab, "snow", 3, 4, 3.0, *SAVING, progress=told)
    if "other" in by:
        assert len(progress.told) == 4
        assert tab.drawn is not before
    else:
        assert "stopped after 1 of 4 steps; everything is as it was before" in shown[page.status]
        assert tab.drawn is before
    page.explorer._runs.clear()


def test_what_is_not_read_of_a_prompt_is_said_below(page, tab):
    shown = draw(page, tab, prompt="a fox " + "snow " * 90)
    assert 'class="warning"' in shown[page.status]
    assert "was cut off" in shown[page.status]
    assert isinstance(shown[page.after], Image.Image)
    assert "warning" not in draw(page, tab)[page.status]
