"""The pages say what was measured, and the measured file holds what its readers rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import write_tables

from sparsefeat.assets import embedded_fingerprint

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_of_the_pages_are_what_the_results_file_says():
    run = subprocess.run([sys.executable, "tools/write_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


OLD = {"device": "a CPU", "date": "2026-11-26", "steps": 1, "batch_size": 1, "runs": []}


@pytest.mark.parametrize(
    ("said", "stale"), [({"fingerprint": "0" * 12}, True), ({}, True), ({"fingerprint": embedded_fingerprint()}, False)]
)
def test_a_table_of_another_pipeline_says_so(said, stale, tmp_path, monkeypatch):
    (tmp_path / "optimizers.json").write_text(json.dumps({**OLD, **said}))
    monkeypatch.setattr(write_tables, "MEASURED", tmp_path)
    assert ("of another pipeline" in write_tables.filled_table("optimizers")) == stale


def test_every_results_file_of_the_embedded_pipeline_names_its_weights():
    files = {write_tables.TABLES[name][0] for name in write_tables.OF_THE_PIPELINE}
    measured = ROOT / "bench" / "results"
    found = {path.name: json.loads(path.read_text()) for path in measured.glob("*.json")}
    files |= {name for name in found if name.startswith("training-")}
    assert {name for name in files & found.keys() if len(found[name].get("fingerprint", "")) != 12} == set()


def test_the_results_file_has_its_promised_keys():
    results = json.loads((ROOT / "bench" / "results" / "emoji.json").read_text())
    assert {"device", "date", "judge", "generation", "saes", "erasure"} <= results.keys()
    for part in ("judge", "generation"):
        assert {"object_accuracy", "style_accuracy"} <= results[part].keys()
    keys = {
        "hookpoint", "d_model", "n_latents", "k", "fvu", "fvu_pca", "fvu_random", "l0", "dead_share",
        "object_accuracy_spliced",
    }  # fmt: skip
    assert len(results["saes"]) >= 2
    assert all(keys <= sae.keys() for sae in results["saes"])
    rows = results["erasure"]
    assert all(
        {"method", "target_kind", "ua", "ira", "cra", "frechet", "n_targets", "n_images"} <= r.keys() for r in rows
    )
    assert any(row["method"] == "unedited" for row in rows)
    for row in rows:
        assert all(0 <= row[key] <= 1 for key in ("ua", "ira", "cra"))
    overhead = json.loads((ROOT / "bench" / "results" / "overhead.json").read_text())
    assert {"Record(sae)", "Steer(sae, scale=…)"} <= {row["instrument"] for row in overhead["rows"]}
    assert all(0 < row["hook_ms"] < row["step_ms"] for row in overhead["rows"])


def test_what_is_shipped_was_measured_to_hold_what_it_is_meant_to():
    results = json.loads((ROOT / "bench" / "results" / "emoji.json").read_text())
    assert results["fingerprint"] == embedded_fingerprint()
    assert results["generation"]["object_accuracy"] >= 0.99
    assert results["generation"]["style_accuracy"] >= 0.97
    for sae in results["saes"]:
        assert sae["fvu"] < sae["fvu_pca"]
        assert sae["dead_share"] < 0.2
        assert sae["n_images_spliced"] == 200
        for kind in ("object", "style"):
            assert sae[f"{kind}_accuracy_spliced"] >= sae[f"{kind}_accuracy_unedited"] - 0.02
    for kind in ("object", "style"):
        best = max(row["share_of_allowed"] for row in results["erasure"] if row["target_kind"] == kind)
        assert best >= 0.95
