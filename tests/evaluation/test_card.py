"""The score card: its figures, its adversary, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy import stats

from sparsefeat.assets import embedded_fingerprint, emojicanvas
from sparsefeat.cli.options import Section
from sparsefeat.evaluation.card import QUICK, SECTIONS, Bench, Edit, Eraser, attacked, evaluate_card, load_card, run
from sparsefeat.evaluation.card.adversary import (
    OneStep,
    differentiable,
    first_vectors,
    free_words,
    frozen,
    invert,
    only_at,
    trajectory,
)
from sparsefeat.evaluation.card.attacked import attacked_rows, learned_words, worded_with
from sparsefeat.evaluation.card.bench import adjacent_tasks
from sparsefeat.evaluation.card.edit import LearnedWords
from sparsefeat.evaluation.card.erasers import ERASERS, bare, prompts_with, prompts_without
from sparsefeat.evaluation.card.erasing import Unit, erb, measured
from sparsefeat.evaluation.card.forked import at_once
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target, tasks_for
from sparsefeat.evaluation.generation import STATISTICS, TEST, VALIDATION, task
from sparsefeat.evaluation.intervals import around, interval, mean_interval, resampled, share_draws

TINY = dataclasses.replace(
    QUICK,
    name="tiny",
    styles=(),
    n_target=2,
    n_other=2,
    n_adjacent=1,
    n_validation=1,
    n_inverted=3,
    n_steps=2,
    attack_steps=2,
    n_steered=1,
    n_explained=1,
    n_pictures=1,
    n_drawn=8,
)
FISH = Target(OBJECT, emojicanvas.OBJECTS.index("fish"))
BY_NAME = {eraser.name: eraser for eraser in ERASERS}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(TINY, tmp_path_factory.mktemp("work"))


# ------------------------------------------------------------------------------------------------------------ figures


def test_erb_is_the_harmonic_mean_of_erasing_and_keeping():
    assert float(erb(torch.tensor(0.5), torch.tensor(1.0))) == pytest.approx(2 / 3)
    assert float(erb(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


@pytest.mark.parametrize(("k", "n"), [(0, 7), (5, 12), (16, 16)])
def test_the_interval_of_a_share_is_jeffreys(k, n):
    low, high = interval(share_draws(torch.arange(n) < k, seed=3))
    wanted = stats.beta(k + 0.5, n - k + 0.5).ppf([0.025, 0.975])
    assert [low, high] == pytest.approx(wanted.tolist(), abs=0.02)
    assert high > low


def test_the_interval_of_a_mean_is_the_bootstraps():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    low, high = mean_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert [low, high] == pytest.approx([float(values.mean()) - half, float(values.mean()) + half], abs=0.02)


def test_an_interval_around_a_figure_that_resampling_raises_still_holds_it():
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    found = resampled(values, lambda rows: 5.0 + float(rows.mean()), times=300)
    low, high = around(4.0, found)
    assert low < 4.0 < high


def unit(gone, own, cross, adjacent):
    said = [torch.tensor(part, dtype=torch.bool) for part in (gone, own, cross, adjacent, gone)]
    return Unit(*said, features=torch.randn(8, 160, generator=torch.Generator().manual_seed(0)))


def test_a_methods_figures_are_means_over_targets(bench):
    units = [unit([1, 1, 0, 0], [1, 1], [1, 0, 1, 1, 1, 1], [1, 1]), unit([1, 1, 1, 1], [0, 1], [1] * 6, [0, 1])]
    rows = {row.metric: row for row in measured(bench, ERASERS[0], OBJECT, units)}
    assert rows["UA"].value == pytest.approx((0.5 + 1) / 2)
    assert rows["IRA"].value == pytest.approx((1 + 0.5) / 2)
    assert rows["CRA"].value == pytest.approx((5 / 6 + 1) / 2)
    assert rows["mean"].value == pytest.approx((0.75 + 0.75 + 11 / 12) / 3)
    assert rows["ERB"].value == pytest.approx((2 * 0.5 / 1.5 + 2 * 0.5 / 1.5) / 2)
    for metric in ("UA", "IRA", "CRA", "mean", "ERB"):
        low, high = rows[metric].ci
        assert low < rows[metric].value < high
    assert rows["UA"].n == 8


@pytest.mark.parametrize("target", [FISH, Target(STYLE, 3)], ids=lambda t: t.name)
def test_neighbours_are_others_of_the_kind_in_noise_of_their_own(bench, target):
    nearest = bench.nearest(target)
    assert target.index not in nearest
    assert len(nearest) == (5 if target.kind == OBJECT else 3)
    tasks = adjacent_tasks(target, nearest, 3)
    own = tasks_for(target, TEST, 40, 60) + tasks_for(target, VALIDATION, 8, 8)
    assert len({t.seed for t in tasks}) == len(tasks)
    assert not {t.seed for t in tasks} & {t.seed for t in own}
    assert not any(target.shows(t) for t in tasks)


@pytest.mark.parametrize("target", [FISH, Target(STYLE, 3)], ids=lambda t: t.name)
def test_erasers_are_given_prompts_with_and_without_the_target(target):
    assert all(target.words in prompt for prompt in [bare(target), *prompts_with(target)])
    assert not any(target.words in prompt.split() for prompt in prompts_without(target))


# ---------------------------------------------------------------------------------------------------------- adversary


def test_one_step_of_the_adversary_is_the_pipelines_own(bench):
    call = {**bench.call, "num_inference_steps": 4}
    aim = trajectory(bench.pipe, ["a noto emoji of a fish", "a mono emoji of a fish"], [3, 4], call)
    own = differentiable(bench.pipe)
    one = OneStep(own, aim, call)
    weights = {name: p.requires_grad for name, p in bench.pipe.unet.named_parameters()}
    with only_at(own.unet, one.at_work), torch.no_grad():
        for step in (0, 2, 3):
            found = one("a mono emoji of a fish", 1, step)
            assert torch.allclose(found, aim.latents[step + 1, 1:2], atol=1e-4)
    assert "forward" not in vars(bench.pipe.unet)
    assert weights == {name: p.requires_grad for name, p in bench.pipe.unet.named_parameters()}


@pytest.mark.parametrize("name", ["negative prompt", "UCE", "exchange", "Concept Steerers", "SLD", "concept lancet"])
def test_gradients_of_the_adversary_go_through_the_eraser(bench, name):
    words = free_words(bench.pipe, emojicanvas.training_prompts())
    edit = BY_NAME[name].make(bench, FISH, **BY_NAME[name].settings[0])
    call = {**bench.call, "num_inference_steps": 4}
    if edit.negative_prompt is not None:
        call["negative_prompt"] = edit.negative_prompt
    shown = task(FISH.index, 1, STATISTICS)
    aim = trajectory(bench.pipe, [shown.prompt], [shown.seed], bench.call | {"num_inference_steps": 4})
    own = differentiable(bench.pipe)
    one = OneStep(own, aim, call)
    start = first_vectors(bench.pipe, seed=1)
    along = torch.randn(start.shape, generator=torch.Generator().manual_seed(5))
    vectors = start.clone().requires_grad_()
    learned = LearnedWords(vectors, words)

    def loss():
        return (one(worded_with(shown, words), 0, 2) - aim.latents[3]).square().sum()

    edit = dataclasses.replace(edit, words=learned)
    with frozen(own.unet, own.text_encoder, own.vae), only_at(own.unet, one.at_work), edit.opened(own):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(), [vectors])
        around_it = []
        with torch.no_grad():
            for sign in (1, -1):
                learned.vectors = start + sign * 3e-4 * along
                around_it.append(float(loss()))
    # The central difference errs by a third derivative times 1e-7, by rounding of 1e-6 over the step of 6e-4, and where SLD's
    # threshold is crossed within the step.
    assert float((gradient * along).sum()) == pytest.approx((around_it[0] - around_it[1]) / 6e-4, rel=0.05)


def test_learned_words_come_closer_to_the_concept_and_leave_nothing_behind(bench):
    words = free_words(bench.pipe, emojicanvas.training_prompts())
    shown = [task(FISH.index, s, STATISTICS) for s in range(2)]
    call = {**bench.call, "num_inference_steps": 3}
    aim = trajectory(bench.pipe, [t.prompt for t in shown], [t.seed for t in shown], call)
    table = bench.pipe.text_encoder.get_input_embeddings()
    before = table.weight.clone()
    worded = [worded_with(t, words) for t in shown]
    start = first_vectors(bench.pipe)
    vectors, _ = invert(bench.pipe, Edit(), aim, worded, words, start, steps=20, call=call)
    own = differentiable(bench.pipe)
    one = OneStep(own, aim, call)

    def apart(learned):
        with only_at(own.unet, one.at_work), Edit(words=LearnedWords(learned, words)).opened(own), torch.no_grad():
            return sum(
                float((one(worded[i], i, step) - aim.latents[step + 1, i : i + 1]).square().sum())
                for i in range(2)
                for step in range(3)
            )

    assert apart(vectors) < 0.9 * apart(start)
    assert vectors.shape == (4, table.weight.shape[1])
    assert torch.equal(table.weight, before)
    assert not table._forward_hooks
    assert "forward" not in vars(bench.pipe.unet)


def test_a_tokenizer_without_free_letters_is_refused(bench):
    with pytest.raises(ValueError, match="are needed"):
        free_words(bench.pipe, ["z y x w v u t s r q p o n m l k j i h g f e d c b"])


def test_an_eraser_that_leaves_most_images_is_given_no_learned_words(bench):
    found = unit([0, 0, 1, 0], [1], [1], [1])._replace(paraphrased=torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]).bool())
    weak = types.SimpleNamespace(eraser=Eraser("weak", None), chosen={OBJECT: {}}, unit=lambda target: (found, {}))
    (row,) = attacked_rows(bench, [weak])
    assert (row.metric, row.value, row.n, row.bound) == ("adversarial UA", 0.25, 4, True)


def test_an_eraser_that_the_budget_spares_is_given_no_learned_words(bench):
    found = unit([1, 1], [1], [1], [1])
    spared = types.SimpleNamespace(
        eraser=Eraser(QUICK.spared[0], None), chosen={OBJECT: {}}, unit=lambda target: (found, {})
    )
    (row,) = attacked_rows(bench, [spared])
    assert (row.metric, row.value, row.bound) == ("adversarial UA", 1.0, True)


def test_the_second_try_begins_where_words_get_round_what_the_eraser_stands_behind(tmp_path, monkeypatch):
    began = []

    def invert(pipe, edit, aim, worded, placeholders, start, **how):
        began.append((edit.negative_prompt, start))
        return start + {None: 1.0, "front": 10.0, "behind it": 100.0}[edit.negative_prompt], []

    monkeypatch.setattr(attacked, "invert", invert)
    monkeypatch.setattr(attacked, "at_once", lambda parts: None)
    monkeypatch.setattr(attacked, "trajectory", lambda *args: None)

    def named(name, **how):
        edit = Edit(negative_prompt=None if name == "unedited" else name)
        return types.SimpleNamespace(eraser=Eraser(name, None, **how), chosen={OBJECT: {}}, edit=lambda target: edit)

    erasings = [named("behind it", behind="front"), named("front")]
    bench = Bench(TINY, tmp_path)
    words = ("z", "y", "x", "w")
    learned = learned_words(bench, erasings, named("unedited"), FISH, words)
    random = first_vectors(bench.pipe, seed=FISH.index)
    starts = {name: [start - random for one, start in began if one == name] for name in (None, "front", "behind it")}
    assert [[float(s.mean()) for s in of] for of in starts.values()] == [
        [0.0],
        pytest.approx([0.0, 1.0], abs=1e-5),
        pytest.approx([0.0, 10.0], abs=1e-5),
    ]
    found = {name: [float((one.vectors - random).mean()) for one in of] for name, of in learned.items()}
    assert found == {"behind it": pytest.approx([100, 110], abs=1e-4), "front": pytest.approx([10, 11], abs=1e-4)}
    again = learned_words(bench, erasings, named("unedited"), FISH, words)
    assert len(began) == 5  # all is on disk
    assert all(torch.equal(a.vectors, b.vectors) for n in again for a, b in zip(again[n], learned[n], strict=True))


@pytest.mark.parametrize("eraser", QUICK.spared)
def test_who_is_spared_is_no_baseline_that_is_published(eraser):
    assert not BY_NAME[eraser].baseline or eraser == "as many random latents"


def test_what_is_done_at_once_is_done_once_in_other_processes_and_is_left_where_there_is_one_thread(tmp_path):
    def part(i):
        (tmp_path / f"{i}-{os.getpid()}").write_text("")
        if i == 1:
            raise ValueError("told, and left to who misses what it was to make")

    threads = torch.get_num_threads()
    try:
        for n, made in ((1, []), (2, ["0", "1", "2"])):
            torch.set_num_threads(n)
            at_once([partial(part, i) for i in range(3)])
            found = [path.name.split("-") for path in sorted(tmp_path.iterdir())]
            assert [i for i, _ in found] == made
            assert str(os.getpid()) not in [pid for _, pid in found]
    finally:
        torch.set_num_threads(threads)


def test_what_settings_share_is_made_once_and_its_seconds_count_for_each(bench):
    made = []

    def make():
        made.append(time.process_time())
        while time.process_time() < made[0] + 0.05:
            pass
        return 7

    tasks = [task(FISH.index, 0, TEST, 90)]
    seconds = [bench.verdicts(f"once-{i}", tasks, lambda: (bench.once("a", make), Edit())[1])[1] for i in "ab"]
    assert len(made) == 1
    assert all(one["made"] >= 0.05 for one in seconds)


# ------------------------------------------------------------------------------------------------------- the whole run


def less(bench, target, of="bare"):
    edit = BY_NAME["UCE"].make(bench, target, of=of, preserve=False)
    return edit


TWO = (ERASERS[0], Eraser("less", less, ({"of": "bare"}, {"of": "word"})))


def card(work: Path, said=lambda line: None):
    torch.set_num_threads(1)
    return evaluate_card(TINY, work / "card.json", work / "parts", erasers=TWO, sections=("erasers",), said=said)


def killed_after(work: Path, parts: int) -> None:
    left = iter(range(parts - 1))

    def said(line: str) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    card(work, said)


def test_a_killed_card_goes_on_where_it_was_and_says_what_it_measured(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(tmp_path, 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "card.json").exists()
    assert len(list((tmp_path / "parts").rglob("*.json"))) == 3
    heard: list[str] = []
    rows = card(tmp_path, heard.append)
    assert len(heard) == len(set(heard)) == len(list((tmp_path / "parts").rglob("*.json"))) - 3
    again: list[str] = []
    assert card(tmp_path, again.append) == rows == load_card(tmp_path / "card.json")
    assert again == []
    results = json.loads((tmp_path / "card.json").read_text())
    assert results["budget"] == "tiny"
    assert results["fingerprint"] == embedded_fingerprint()
    assert set(results["chosen"]) == {"unedited", "less"}
    metrics = {row.metric for row in rows if row.method == "less"}
    assert {"UA", "IRA", "CRA", "mean", "ERB", "Fréchet", "adversarial UA", "time", "of possible"} <= metrics
    assert all(row.note for row in rows if row.metric == "adversarial UA")  # nothing says that it is strong enough


def test_rows_of_another_pipeline_are_refused(tmp_path):
    for said in ({"fingerprint": "0" * 12}, {"fingerprint": None}):
        (tmp_path / "card.json").write_text(json.dumps({**said, "rows": []}))
        with pytest.raises(ValueError, match="measure it again"):
            load_card(tmp_path / "card.json")


def test_a_section_that_is_measured_alone_leaves_the_others_on_the_card(tmp_path, monkeypatch):
    def row(name, value):
        return Row(name, "a", "b", "c", value, None, 1, 0)

    def measured(*sections):
        evaluate_card(TINY, tmp_path / "card.json", tmp_path, sections=sections)
        return {(one.section, one.value) for one in load_card(tmp_path / "card.json")}

    monkeypatch.setitem(run.OTHERS, "maps", lambda bench: [row("maps", 1.0)])
    monkeypatch.setitem(run.OTHERS, "judges", lambda bench: [row("judges", 2.0)])
    assert measured("maps", "judges") == {("maps", 1.0), ("judges", 2.0)}
    monkeypatch.setitem(run.OTHERS, "judges", lambda bench: [row("judges", 3.0)])
    assert measured("judges") == {("maps", 1.0), ("judges", 3.0)}
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "budget": "another"}))
    assert measured("judges") == {("judges", 3.0)}
    measured("maps")
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "fingerprint": "0" * 12}))
    assert measured("judges") == {("judges", 3.0)}


def test_the_shell_knows_the_sections():
    assert tuple(one.value for one in Section) == SECTIONS


def test_a_section_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose from erasers"):
        evaluate_card(TINY, tmp_path / "card.json", tmp_path, sections=("colours",))
