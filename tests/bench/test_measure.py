"""Measuring: right before fast, everyone in turn, and nothing lost when a run is killed. No test asserts a time."""

from __future__ import annotations

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsefeat.measure import machine
from sparsefeat.measure import timing as core
from sparsefeat.measure.figures import build
from sparsefeat.measure.ops.encode import PRODUCT
from sparsefeat.measure.timing import (
    OURS,
    Results,
    fresh_peak,
    input_sets,
    measure,
    measure_ceilings,
    percentile,
    resident_growth,
    with_providers,
)
from tests.bench.figures import CEILINGS, provider, squares

ROOT = Path(__file__).resolve().parents[2]
COARSE = 1 << 20  # the kernel counts pages of a process by batches
KEYS = {
    "op", "shape", "dtype", "provider", "median_ms", "p20_ms", "p80_ms", "peak_bytes", "flops", "bytes",
    "ceiling_share", "ratio", "checked", "device", "date", "versions",
}  # fmt: skip


def records_of(*providers, **options):
    found = measure(squares(*providers, **options), CEILINGS, seconds=0.0, peaks=False)
    return {record["provider"]: record for record in found}


def test_a_wrong_answer_gets_no_time_and_is_in_nobodys_ratio():
    found = records_of(provider("right"), provider("wrong", lambda x: x * x + 1), provider("other"))
    assert found["wrong"]["checked"] is False
    assert found["wrong"]["fault"] == "not the square"
    assert found["wrong"]["median_ms"] is found["wrong"]["p20_ms"] is found["wrong"]["ceiling_share"] is None
    assert found["right"]["ratio"].keys() == {"other"}
    assert found["right"]["checked"]
    assert found["right"]["median_ms"] > 0


def test_a_provider_that_raises_is_a_result_and_not_the_end_of_the_run():
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand a long trace")

    found = records_of(provider("fails", fails), provider("right"))
    assert found["fails"]["fault"] == "RuntimeError: no such kernel"
    assert not found["fails"]["checked"]
    assert found["right"]["checked"]


def test_records_have_the_promised_keys():
    found = records_of(provider("a"), provider("b"))
    for record in found.values():
        assert record.keys() >= KEYS
        json.dumps(record)
    assert {"sparsefeat", "kernels", "torch", "python"} <= found["a"]["versions"].keys()


def test_providers_take_turns_and_everyone_comes_after_everyone_else():
    calls: list[str] = []

    def logged(name: str):
        def run(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return x * x

        return provider(name, run)

    names = ["a", "b", "c"]
    real, turns = core._turn_ms, []

    def one_turn(run, states, first, count, device):
        calls.clear()
        took = real(run, states, first, 1, device)
        turns.append(calls[0])
        return took

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_turn_ms", one_turn)
        measure(squares(*map(logged, names)), CEILINGS, seconds=0.0, min_rounds=12, peaks=False)
    timed = turns[core.WARM_UPS * len(names) :]
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(rounds) == 12
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    pairs = {pair for one in rounds for pair in itertools.pairwise(one)}
    assert pairs == set(itertools.permutations("abc", 2))


def test_statistics_are_of_the_rounds_and_ratios_of_pairs(monkeypatch):
    """The machine slows down by a factor of ten half way: medians move, ratios do not."""
    scripted = {"a": [1.0, 1.0, 1.0, 10.0, 10.0], "b": [3.0, 3.0, 3.0, 30.0, 30.0]}
    monkeypatch.setattr(core, "_rounds", lambda *_: scripted)
    found = records_of(provider("a"), provider("b"), flops=1e6, bytes=0.0)
    assert found["a"]["ratio"] == {"b": 3.0}
    assert found["b"]["ratio"] == {"a": 1 / 3}
    assert found["a"]["median_ms"] == 1.0
    assert found["a"]["p80_ms"] == 10.0
    assert found["b"]["ceiling_share"] == pytest.approx(1 / 3)  # 1e6 FLOPs at 1e9 a second: 1 ms


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_percentile_is_numpys(n):
    times = np.random.default_rng(n).exponential(size=n).tolist()
    for share in (0.2, 0.5, 0.8):
        assert percentile(times, share) == pytest.approx(np.quantile(times, share))


def test_the_floor_is_the_slower_of_products_and_bytes():
    assert CEILINGS.floor_ms(2e6, 1e6, "float32") == pytest.approx(2.0)
    assert CEILINGS.floor_ms(2e6, 5e6, "float32") == pytest.approx(5.0)
    measured = measure_ceilings("cpu", side=64, copy_bytes=1 << 20)
    assert measured.copy > 0
    assert measured.product.keys() == {"float32", "bfloat16"}


def test_a_cpu_has_one_set_of_inputs():
    assert input_sets(squares()) == 1


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_resident_growth_counts_what_a_call_keeps_for_the_next_where_it_is_forgotten():
    n, kept = 64 << 20, []

    def run():
        if not kept:
            kept.append(torch.ones(n, dtype=torch.uint8))

    assert resident_growth(run) < n // 4
    assert n - COARSE <= resident_growth(run, kept.clear) < n + 8 * COARSE


def test_resident_growth_sees_what_is_freed_before_the_call_returns():
    n = 48 << 20

    def run() -> int:
        return int(np.ones(n, dtype=np.uint8)[-1])

    assert n - COARSE <= resident_growth(run) < n + 8 * COARSE


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_peak_memory_of_a_fresh_process_is_what_the_formula_says():
    shape = {"rows": 2048, "d_model": 32, "n_latents": 4096, "k": 4}
    figure = build("topk_encode", shape)
    assert 4 * 2048 * 4096 - COARSE <= fresh_peak(figure, PRODUCT) < 4 * 2048 * 4096 + 8 * COARSE
    assert fresh_peak(squares(provider("a")), provider("a")) is None  # no recipe to build it again


def test_with_providers_keeps_order_and_drops_the_others():
    figure = with_providers(squares(*map(provider, "abc")), "c", "a", "not there")
    assert [p.name for p in figure.providers] == ["c", "a"]


# ------------------------------------------------------------------------------------------------------------- results


def test_a_run_that_goes_on_measures_only_what_is_missing(tmp_path):
    path = tmp_path / "device.json"
    figure = squares(provider("a"), provider("b"))
    Results(path).add(figure, measure(figure, CEILINGS, 0.0, peaks=False))
    again = Results(path)
    assert again.has(figure)
    assert not again.has(squares(provider("a"), provider("installed since")))
    assert not Results(path, start_over=True).has(figure)


def test_other_versions_are_measured_again_and_replace_the_old_records(tmp_path, monkeypatch):
    path = tmp_path / "device.json"
    figure = squares(provider("a"))
    Results(path).add(figure, measure(figure, CEILINGS, 0.0, peaks=False))
    monkeypatch.setattr(core, "source_digest", lambda: "other kernels")
    results = Results(path)
    assert not results.has(figure)
    results.add(figure, measure(figure, CEILINGS, 0.0, peaks=False))
    assert [r["versions"]["kernels"] for r in json.loads(path.read_text())["records"]] == ["other kernels"]


KILLED = """
import os, signal, sys
from pathlib import Path
import bench.run
from bench.measure import Ceilings, Results
from bench.shapes import Wanted

real, figures = bench.run.measure, []

def measure(figure, *arguments, **options):
    figures.append(figure.op)
    if len(figures) == 2 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(figure, *arguments, **options)

bench.run.measure = measure
shape = {"rows": 9, "d_model": 16, "n_latents": 64, "k": 3}
wanted = [Wanted(op, shape, "float32", 0.0) for op in ("sparse_decode", "weight_gradient", "sparse_edit")]
results = Results(Path(sys.argv[1]))
bench.run.run(wanted, "cpu", results, Ceilings(1e9, {"float32": 1e9}), 60.0, peaks=False)
print("measured", *figures)
"""


def test_a_killed_run_keeps_what_was_measured_and_goes_on(tmp_path):
    path = tmp_path / "device.json"

    def run(how: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", KILLED, str(path), how]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert run("kill").returncode == -signal.SIGKILL
    assert {record["op"] for record in json.loads(path.read_text())["records"]} == {"sparse_decode"}
    finished = run("go on")
    assert finished.returncode == 0, finished.stderr
    assert "measured weight_gradient sparse_edit" in finished.stdout
    ours = [r for r in json.loads(path.read_text())["records"] if r["provider"] == OURS]
    assert len(ours) == 3
    assert all(record["checked"] for record in ours)


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 3\n", "AMD EPYC (family 25, model 17)"),
        ("cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon 8481C @ 2.7 GHz\n", "Xeon 8481C @ 2.7 GHz"),
        ("model name\t: Somebody\n", "Somebody"),
    ],
)
def test_a_processor_without_a_number_in_its_name_is_told_by_its_model(monkeypatch, tmp_path, says, name):
    (tmp_path / "cpuinfo").write_text(says)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.device_name() == f"{name}, 2 threads"
