"""The demo, with fewer denoising steps than a person would use: every section is made and written."""

from __future__ import annotations

import json

import pytest

import sparsefeat.demo as demo
from sparsefeat.features.progress import Progress


@pytest.mark.embedded
def test_the_demo_writes_a_page_with_every_section(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "N_STEPS", 4)
    bars = []
    monkeypatch.setattr(demo, "Progress", lambda *given: bars.append(Progress(*given)) or bars[-1])
    page = demo.run_demo(tmp_path / "page")
    assert bars[0].bar.n == bars[0].bar.total == bars[0].drawn  # as many images as it said
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert page == tmp_path / "page" / "index.html"
    for section in ("prompts", "features", "steering", "erasure", "heat_maps", "timings"):
        assert results[section], section
    assert {e["kind"] for e in results["erasure"]} == {"object", "style"}
    assert all(0 <= e[key] <= 1 for e in results["erasure"] for key in ("removed_share", "kept_share"))
    strengths = [s["strength"] for s in results["steering"][0]["strip"]]
    assert strengths == sorted(strengths)
    assert strengths[0] < 0 < strengths[-1]
    assert results["features"]["top"][0]["examples"]
    assert (tmp_path / "page" / "images" / "summary.png").is_file()


def test_an_existing_folder_is_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        demo.run_demo(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="no earlier report"):
        demo.run_demo(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
