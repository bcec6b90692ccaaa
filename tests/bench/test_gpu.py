"""The nine minutes on a GPU, as far as a CPU can try them: what is kept, what is gone on with, what is counted."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu, run, scaling
from bench.measure import Results
from bench.shapes import Wanted
from sparsefeat.evaluation.measure import Ceilings

SMALL = {"rows": 16, "d_model": 16, "n_latents": 64, "k": 2}


def test_a_test_file_that_failed_is_run_again_and_one_that_passed_is_not(tmp_path, monkeypatch):
    ran = []

    def command(arguments, limit, **variables):
        name = arguments[3].rsplit("/", 1)[1]
        ran.append(name)
        return (1 if name == "test_csr.py" and len(ran) < 50 else 0), "noise\n==== 3 passed in 1s ===="

    monkeypatch.setattr(gpu, "command", command)
    gpu.tests(gpu.Lease(tmp_path, 100.0))
    kept = json.loads((tmp_path / "gpu.json").read_text())["tests"]
    assert kept["test_csr.py"] == {"code": 1, "said": "3 passed in 1s"}
    assert "test_ahead_of_time.py" not in kept
    ran.clear()
    gpu.tests(gpu.Lease(tmp_path, 100.0))
    assert ran == ["test_csr.py"]
    assert (tmp_path / "tests.log").read_text().count("exit code 0") == len(kept) - 1


def test_a_command_is_stopped_at_its_limit_and_keeps_its_output():
    code, output = gpu.command(["bash", "-c", "echo begun; sleep 30"], 1.0)
    assert code is None
    assert "begun" in output


def test_children_run_real_triton_from_the_checkout():
    found = gpu.environment()
    assert "TRITON_INTERPRET" not in found
    assert "kernels" in found["PYTHONPATH"]


def test_the_same_bits_twenty_times():
    assert gpu.same_bits("sparse_decode", SMALL, "float32", "cpu")
    assert gpu.same_bits("feature_stats", SMALL, "float32", "cpu")


def test_one_of_each_runs_every_op(capsys):
    gpu.one_of_each("cpu")
    assert capsys.readouterr().out.split() == list(gpu.available())


def test_without_a_gpu_it_says_what_to_do_instead(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"bench\.run"):
        gpu.main()


def test_a_run_writes_results_a_table_and_a_plot_and_counts_what_is_left(tmp_path):
    wanted = [Wanted(op, SMALL, "float32", 0.0) for op in ("sparse_decode", "sparse_edit")]
    results = Results(tmp_path / "device.json")
    ceilings = Ceilings(1e9, {"float32": 1e9})
    assert run.run(wanted, "cpu", results, ceilings, budget=-1.0, peaks=False) == 2
    assert run.run(wanted, "cpu", results, ceilings, budget=60.0, peaks=False) == 0
    run.write_table(results)
    run.write_plot(results)
    assert "dense PyTorch" in (tmp_path / "device.md").read_text()
    assert (tmp_path / "device.png").stat().st_size > 1000
    assert run.file_name("AMD EPYC, 2 threads") == "amd-epyc-2-threads"


def test_scaling_measures_every_axis_beside_its_model(tmp_path):
    ceilings = Ceilings(1e9, {"float32": 2e9})
    model = scaling.model_ms("forward", SMALL, ceilings, "float32")
    assert model == pytest.approx({"product": 0.016384, "selection": 0.004096, "gather": 0.002048})
    points = scaling.sweep("cpu", "float32", 0.0, 60.0, SMALL, {"rows": (8, 16), "k": (1, 4)}, ceilings)
    assert len(points) == 8
    assert all(point["checked"] for point in points)
    scaling.draw(points, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
