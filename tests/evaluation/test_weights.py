"""What CAD does to pictures is counted as the judge counts it."""

from __future__ import annotations

import pytest

from sparsefeat.assets import GUIDANCE, emojicanvas, load_pipeline
from sparsefeat.evaluation.emoji import OBJECT, Target, tasks_for
from sparsefeat.evaluation.generation import TEST, generate
from sparsefeat.evaluation.judge import judge_images, load_judge
from sparsefeat.evaluation.weights import effects_of_weights


@pytest.mark.embedded
def test_untouched_pictures_are_counted_as_the_judge_does_and_edits_change_what_it_sees():
    pipe, judge = load_pipeline(), load_judge()
    pipe.set_progress_bar_config(disable=True)
    found = list(effects_of_weights(pipe, judge, "owl", images=3, n_steps=6))
    assert [(one.name, one.prompts) for one in found] == [
        ("untouched", "that name it"),
        ("CAD-Erase", "that name it"),
        ("untouched", "of a style alone"),
        ("CAD-Amplify", "of a style alone"),
    ]
    tasks = tasks_for(Target(OBJECT, emojicanvas.OBJECTS.index("owl")), TEST, 3, 3)
    seen = judge_images(judge, generate(pipe, tasks, n_steps=6, guidance=GUIDANCE)).objects.tolist()
    right = [object_seen == task.object for object_seen, task in zip(seen, tasks, strict=True)]
    assert found[0].own == pytest.approx(sum(right[:3]) / 3)
    assert found[0].others == pytest.approx(sum(right[3:]) / 3)
    assert found[0].log_own < 0
    assert found[1].log_own < found[0].log_own
    assert found[3].log_own > found[2].log_own
    with pytest.raises(ValueError, match="no object of EmojiCanvas"):
        next(effects_of_weights(pipe, judge, "dragon"))
