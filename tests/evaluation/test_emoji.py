from __future__ import annotations

import itertools

import pytest
import torch

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.emoji import (
    OBJECT,
    STYLE,
    EmojiBenchmark,
    Ledger,
    Method,
    Target,
    all_targets,
    allowed_mean,
    scores,
    tasks_for,
)
from sparsefeat.evaluation.generation import (
    STATISTICS,
    TEST,
    VALIDATION,
    Task,
    accuracy,
    generate,
    held_out,
    task,
    whole_grid,
)
from sparsefeat.evaluation.judge import Verdicts
from tests.tiny import tiny_sd


def verdicts(pairs: list[tuple[int, int]]) -> Verdicts:
    return Verdicts(
        torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]), torch.randn(len(pairs), 3)
    )


def test_scores_of_an_object_are_unlearncanvas_definitions():
    target = Target(OBJECT, 3)
    tasks = [Task(3, 0, 0), Task(3, 1, 1), Task(3, 2, 2), Task(3, 3, 3), Task(5, 0, 4), Task(6, 1, 5)]
    # Of four target images one is still recognised; of two others one object is right; styles: five of six are right.
    said = verdicts([(3, 0), (9, 1), (8, 2), (7, 0), (5, 0), (0, 1)])
    measured = scores(said, target, tasks)
    assert measured.ua == pytest.approx(3 / 4)
    assert measured.ira == pytest.approx(1 / 2)
    assert measured.cra == pytest.approx(5 / 6)
    assert measured.mean == pytest.approx((3 / 4 + 1 / 2 + 5 / 6) / 3)


def test_scores_of_a_style_swap_the_roles():
    target = Target(STYLE, 1)
    tasks = [Task(3, 1, 0), Task(4, 1, 1), Task(5, 0, 2), Task(6, 2, 3), Task(7, 2, 4)]
    said = verdicts([(3, 1), (4, 0), (5, 0), (0, 2), (7, 3)])
    measured = scores(said, target, tasks)
    assert measured.ua == pytest.approx(1 / 2)
    assert measured.ira == pytest.approx(2 / 3)
    assert measured.cra == pytest.approx(4 / 5)


def test_what_erasure_could_reach_counts_a_perfect_removal_and_the_pipelines_own_errors():
    assert allowed_mean({"ua": 0.1, "ira": 0.9, "cra": 0.8}) == pytest.approx((1 + 0.9 + 0.8) / 3)


@pytest.mark.parametrize("target", all_targets(), ids=lambda t: f"{t.kind}-{t.name}")
def test_a_unit_has_twenty_images_of_the_target_and_forty_others_all_different(target):
    tasks = tasks_for(target, TEST)
    shown = [t for t in tasks if target.shows(t)]
    assert len(shown) == 20
    assert len(tasks) == 60
    assert len(set(tasks)) == 60
    assert len({t.seed for t in tasks}) == 60


def test_there_are_all_styles_and_at_least_twenty_objects_to_erase():
    kinds = [t.kind for t in all_targets()]
    assert kinds.count(STYLE) == len(emojicanvas.STYLES) == 4
    assert kinds.count(OBJECT) >= 20


def test_statistics_validation_and_test_never_share_noise():
    seeds = {
        split: {t.seed for repeat in range(12) for t in whole_grid(split, repeat)}
        | {t.seed for target in all_targets() for t in tasks_for(target, split)}
        for split in (STATISTICS, VALIDATION, TEST)
    }
    for a, b in itertools.combinations(seeds.values(), 2):
        assert not a & b


def test_held_out_cells_leave_every_object_and_style_in_training():
    hidden = [t for t in whole_grid(TEST) if held_out(t)]
    seen = [t for t in whole_grid(TEST) if not held_out(t)]
    assert len(hidden) == len(whole_grid(TEST)) // 5
    assert {t.object for t in seen} == set(range(len(emojicanvas.OBJECTS)))
    assert {t.style for t in seen} == set(range(len(emojicanvas.STYLES)))


def test_a_ledger_keeps_verdicts_and_draws_broken_ones_again(tmp_path):
    ledger = Ledger(tmp_path / "work")
    said = verdicts([(1, 2), (3, 0)])
    ledger.put("test/method/object-fox", said)
    again = Ledger(tmp_path / "work").get("test/method/object-fox")
    assert again is not None
    assert torch.equal(again.objects, said.objects)
    assert torch.equal(again.styles, said.styles)
    assert torch.allclose(again.features, said.features, atol=1e-3)
    path = tmp_path / "work" / "test" / "method" / "object-fox.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert ledger.get("test/method/object-fox") is None
    assert ledger.get("never drawn") is None


def test_accuracy_counts_objects_and_styles_apart():
    tasks = [Task(0, 0, 0), Task(1, 1, 1), Task(2, 2, 2), Task(3, 3, 3)]
    measured = accuracy(verdicts([(0, 0), (1, 0), (0, 0), (3, 0)]), tasks)
    assert (measured.object, measured.style, measured.n_images) == (0.75, 0.25, 4)


def test_an_image_does_not_depend_on_what_else_is_in_its_batch():
    pipe = tiny_sd()
    tasks = [task(o, 0, TEST) for o in range(3)]
    together = generate(pipe, tasks, n_steps=2, guidance=3.0, batch=3)
    apart = generate(pipe, tasks, n_steps=2, guidance=3.0, batch=1)
    assert torch.allclose(together, apart, atol=0.02)  # bfloat16, where the CPU has it
    assert not torch.allclose(together[0], together[1], atol=0.02)


def test_a_row_says_what_was_seen_before_beside_what_is_seen_after():
    """Unedited, the judge misses the first image of every unit; edited, it sees no target and one other less."""

    class Canned(EmojiBenchmark):
        def __init__(self):
            self.progress = False

        def verdicts(self, tasks, wrong):
            right = torch.tensor([i not in wrong for i in range(len(tasks))])
            objects, styles = (torch.tensor([getattr(t, name) for t in tasks]) for name in ("object", "style"))
            objects = torch.where(right, objects, (objects + 1) % 50)
            features = torch.randn(len(tasks), 160, generator=torch.Generator().manual_seed(1))
            return Verdicts(objects, styles, features)

        def unedited(self, tasks):
            return self.verdicts(tasks, {0})

        def unit(self, method, target, tasks, split):
            return self.verdicts(tasks, {*range(20), 59})

    targets = [Target(OBJECT, 0), Target(OBJECT, 2)]
    real = torch.randn(300, 160, generator=torch.Generator().manual_seed(2))
    counts = {"n_targets": 40, "seen_before": 38, "n_others": 80, "right_before": 80}
    edited = Canned().row("edited", OBJECT, dict.fromkeys(targets, Method("edited")), real)
    assert edited["before_after"] == counts | {"seen_after": 0, "removed": 38, "right_after": 78, "kept": 78}
    assert edited["ua"] == 1.0
    unedited = Canned().row("unedited", OBJECT, dict.fromkeys(targets), real)
    assert unedited["before_after"] == counts | {"seen_after": 38, "removed": 0, "right_after": 80, "kept": 80}
