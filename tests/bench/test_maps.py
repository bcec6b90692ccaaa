"""bench/results/maps.json: what attention-map-diffusers says too, and what maps cost beside it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = json.loads((Path(__file__).resolve().parents[2] / "bench" / "results" / "maps.json").read_text())


def test_the_same_map_wherever_both_have_one():
    rows = RESULTS["agree"]["rows"]
    compared = {(row["family"], row["direction"]) for row in rows if row.get("maps")}
    assert all(row["largest_relative_difference"] < 1e-5 for row in rows if row.get("maps"))
    assert len({family for family, direction in compared if direction == "image_to_text"}) == 10
    # Where only the image attends to the text there is one direction, which is said.
    assert all("only the image attends to the text" in row["note"] for row in rows if not row.get("maps"))
