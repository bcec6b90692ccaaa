"""`sparsefeat evaluate card`: all sections, one after the other; the file is written after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparsefeat.evaluation.card.attacked import attacked_rows
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.budget import Budget
from sparsefeat.evaluation.card.dictionaries import dictionaries_rows
from sparsefeat.evaluation.card.erasers import ERASERS, Eraser
from sparsefeat.evaluation.card.erasing import erasers_rows
from sparsefeat.evaluation.card.explaining import explained_rows
from sparsefeat.evaluation.card.judging import judges_rows
from sparsefeat.evaluation.card.mapping import maps_rows
from sparsefeat.evaluation.card.result import Row, rows_of_others, write_card
from sparsefeat.evaluation.card.steering import steerers_rows

OTHERS: dict[str, Callable[[Bench], list[Row]]] = {
    "steerers": steerers_rows,
    "maps": maps_rows,
    "dictionaries": dictionaries_rows,
    "attribution": explained_rows,
    "judges": judges_rows,
}
SECTIONS = ("erasers", *OTHERS)


def evaluate_card(
    budget: Budget,
    out: Path,
    work: Path,
    *,
    erasers: Sequence[Eraser] = ERASERS,
    sections: Sequence[str] = SECTIONS,
    said: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Measure the card on the embedded pipelines; goes on where an earlier run stopped.

    Args:
        budget: QUICK, FULL, or one of your own.
        out: the file of results; what it has of other sections, of the same weights and budget, stays. work: folder of
            finished parts.
        erasers: what is compared; `ERASERS` has those of the package.
        sections: of `SECTIONS`.
        said: hears of every part that is finished.

    Raises:
        ValueError: a section that there is not.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"sections={unknown} are not known; choose from {', '.join(SECTIONS)}.")
    bench = Bench(budget, work, said)
    rows, chosen = rows_of_others(out, sections, budget.name)
    if "erasers" in sections:
        found, chosen, erasings = erasers_rows(bench, erasers)
        rows += found
        write_card(out, rows, budget.name, chosen)
        rows += attacked_rows(bench, erasings)
        write_card(out, rows, budget.name, chosen)
    for name, measure in OTHERS.items():
        if name in sections:
            rows += measure(bench)
            write_card(out, rows, budget.name, chosen)
    return rows
