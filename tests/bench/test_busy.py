"""The busy figure: neighbours that really work while it measures and end with it, and ratios of the same rounds."""

import contextlib
import json
import os
import time

import pytest

from bench import busy
from bench.busy import PRODUCT, beside_the_product, measure_busy, neighbours, record, table
from sparsefeat.measure.figures import build

SMALL = {"rows": 8, "d_model": 16, "n_latents": 64, "k": 3}


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system has no /proc")
def test_neighbours_work_inside_the_block_and_end_with_it_whatever_happens():
    begun = []

    def interrupted() -> None:
        with neighbours(1) as found:
            begun.extend(found)
            before, deadline = processor_seconds(found[0].pid), time.perf_counter() + 600
            while processor_seconds(found[0].pid) < before + 0.05 and time.perf_counter() < deadline:
                time.sleep(0.02)
            assert processor_seconds(found[0].pid) >= before + 0.05
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert begun[0].poll() is not None


def test_a_neighbour_that_cannot_begin_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(busy, "NEIGHBOUR", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="code 3 before it began"), neighbours(1):
        pass


def test_ratios_are_to_the_product_of_the_same_rounds():
    quiet = {"op": "sparse_decode", "shape": SMALL, "dtype": "float32", "provider": "sparsefeat", "median_ms": 10.0}
    found = record(quiet | {"ratio": {PRODUCT: 4.0}}, quiet | {"median_ms": 90.0, "ratio": {PRODUCT: 2.0}})
    assert (found["quiet_ratio"], found["busy_ratio"], found["busy_over_quiet"]) == (0.25, 0.5, 2.0)


def test_small_figures_are_measured_and_written_as_a_table():
    figures = [
        beside_the_product(build(op, SMALL, "float32", "cpu"), (8, 16, 64)) for op in ("topk_encode", "sparse_decode")
    ]
    records = measure_busy(figures, 0.05)
    ours = ["sparsefeat", "sparsefeat, weights prepared"]
    assert [r["provider"] for r in records if r["op"] == "topk_encode"] == ours
    assert all(r["quiet_ms"] > 0 and r["busy_ratio"] > 0 for r in records)
    content = {"ratios": records, "date": "2026-01-02", "device": "a machine", "neighbours": 2, "command": "this"}
    assert "| `topk_encode`, weights prepared | 8 rows, 16 → 64, k = 3 |" in table(content)


def test_the_demo_is_measured_beside_the_ops_that_were_measured_before(tmp_path, monkeypatch):
    took = iter([60.0, 90.0])
    monkeypatch.setattr(busy, "demo_seconds", lambda: next(took))
    monkeypatch.setattr(busy, "neighbours", contextlib.nullcontext)
    monkeypatch.setattr(busy, "measure_busy", lambda figures, seconds: [])
    for option in ("--only=topk_encode", "--demo", "--only=topk_encode"):
        monkeypatch.setattr("sys.argv", ["bench.busy", option, "--out", str(tmp_path)])
        busy.main()
    content = json.loads(next(tmp_path.glob("busy-*.json")).read_text())
    assert content["demo"] == {"quiet_s": 60.0, "busy_s": 90.0, "busy_over_quiet": 1.5}
    assert "60 s quiet, 90 s busy, 1.50 times as long" in next(tmp_path.glob("busy-*.md")).read_text()
