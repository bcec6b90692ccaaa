"""The card's tables and sentences, from rows that are given."""

from __future__ import annotations

from sparsefeat.evaluation.card.tables import card_header, card_markdown


def row(method, metric, value, ci=None, section="erasers", of="object", note=""):
    own = {"section": section, "method": method, "of": of, "metric": metric, "value": value, "ci": ci}
    return {**own, "n": 10, "seed": 0, "note": note}


def results(rows, **more):
    own = {"date": "2026-11-26", "device": "a CPU", "precision": "float32", "budget": "full"}
    return {**own, "fingerprint": "0123456789ab", "rows": rows, **more}


ROWS = [
    row("unedited", "of possible", 0.66, [0.6, 0.7]),
    row("UCE", "of possible", 0.91, [0.88, 0.94]),
    row("SAeUron", "of possible", 0.98, [0.95, 0.99]),
    row("ItD", "of possible", 0.7, [0.6, 0.8]),
    row("UCE", "adversarial UA", 0.2, [0.1, 0.3]),
    row("SAeUron", "adversarial UA", 0.5, [0.29, 0.7]),
]


def test_a_table_names_best_and_worst_and_is_not_ahead_inside_the_intervals():
    text = card_markdown(results(ROWS), "erasers")
    assert "| SAeUron | 98 [95, 99] | 50 [29, 70] |" in text
    assert "| ItD | 70 [60, 80] | – |" in text
    assert "Best for objects: SAeUron, 98.0% of what is possible (interval from 95% on), which reaches the 97%" in text
    assert "Worst: ItD, 70.0%" in text  # the unedited pipeline is no eraser
    assert "the best baseline, UCE, 20.0%: not ahead outside the intervals" in text
    ahead = [*ROWS[:-1], row("SAeUron", "adversarial UA", 0.5, [0.31, 0.7])]
    assert "20.0%: ahead outside" in card_markdown(results(ahead), "erasers")


def test_a_bound_is_said_to_be_one_and_wins_nothing_for_ours():
    bounded = [*ROWS, {**row("ItD", "adversarial UA", 0.9, [0.8, 1.0]), "bound": True}]
    text = card_markdown(results(bounded), "erasers")
    assert "| ItD | 70 [60, 80] | ≤ 90 [80, 100] |" in text
    assert "Under the adversary SAeUron keeps 50.0%" in text


def test_an_adversary_that_does_not_count_decides_nothing():
    weak = [*ROWS[:-1], row("SAeUron", "adversarial UA", 0.5, [0.31, 0.7], note="it is too weak")]
    text = card_markdown(results(weak), "erasers")
    assert "Under the adversary" not in text
    assert "it is too weak" in text


def test_what_was_not_measured_and_what_has_reservations_is_said():
    assert card_markdown(results(ROWS), "maps") == "Not measured yet."
    given = [row("Slider", "else per unit", None, section="steerers", of="style mono", note="it rises too little")]
    text = card_markdown(results(given), "steerers")
    assert "| Slider | – |" in text
    assert "it rises too little" in text


def test_the_header_says_quick_and_of_which_weights():
    full = card_header(results(ROWS))
    assert "`sparsefeat evaluate card`; weights 0123456789ab." in full
    assert "quick" not in full
    assert "`sparsefeat evaluate card --quick`" in card_header(results(ROWS, budget="quick"))
