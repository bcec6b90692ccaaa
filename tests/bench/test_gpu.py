"""The nine minutes on a GPU, as far as a CPU can try them: what is kept, what is gone on with, what is counted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from sparsefeat_kernels import force_triton
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode.gpu import prefilter as prefilter_gpu

from bench import gpu, run, scaling
from bench.measure import Results
from bench.shapes import Wanted
from sparsefeat.evaluation.measure import Ceilings

SMALL = {"rows": 16, "d_model": 16, "n_latents": 64, "k": 2}


def test_a_test_file_that_failed_is_run_again_and_one_that_passed_is_not(tmp_path, monkeypatch):
    ran = []

    def command(arguments, limit, **variables):
        name = "one of each" if gpu.ONE_OF_EACH in arguments else arguments[3].rsplit("/", 1)[1]
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


def test_what_a_stopped_command_began_ends_with_it(tmp_path):
    """A sanitizer's child would keep the GPU that the next stage is timed on."""
    began = time.perf_counter()
    script = f"(sleep 8; touch {tmp_path}/late) & echo $! > {tmp_path}/pid; wait"
    assert gpu.command(["bash", "-c", script], 1.0)[0] is None
    assert time.perf_counter() - began < 6
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def test_the_longest_test_file_is_begun_first_and_none_is_left_out():
    files = gpu.files_to_test()
    names = [path.name for path in files if path != gpu.ATTACH]
    assert names[: len(gpu.TESTS_FIRST)] == list(gpu.TESTS_FIRST)
    every = {path.name for path in (gpu.ROOT / "tests" / "kernels").rglob("test_*.py")}
    assert set(names) == every - set(gpu.SKIPPED)


def test_a_figure_that_ends_its_process_is_not_begun_again(tmp_path, monkeypatch):
    measured, deadly = [], Wanted("sparse_edit", SMALL, "float32", 0.0)

    def measure(wanted, device, results, ceilings, budget):
        if wanted == [deadly]:
            raise SystemExit("as a segmentation fault would")
        if wanted[0].op == "feature_stats":
            raise RuntimeError("out of memory")
        measured.extend(one.op for one in wanted)
        return 0

    monkeypatch.setattr(gpu, "run", measure)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: Ceilings(1e9, {"float32": 1e9}))
    others = [Wanted(op, SMALL, "float32", 0.0) for op in ("feature_stats", "sparse_decode")]
    with pytest.raises(SystemExit):
        gpu.bench(gpu.Lease(tmp_path, 100.0), lambda: iter([deadly, *others]))
    assert measured == []
    gpu.bench(gpu.Lease(tmp_path, 100.0), lambda: iter([deadly, *others]))
    assert measured == ["sparse_decode"]
    kept = json.loads((tmp_path / "gpu.json").read_text())["bench"]
    assert kept["died"] == ["sparse_edit 16 16 64 2 float32"]
    assert kept["failed"] == {"feature_stats 16 16 64 2 float32": "RuntimeError: out of memory"}
    assert "begun" not in kept


def test_a_stage_that_dies_is_noted_and_the_bench_alone_lives_again(tmp_path, monkeypatch):
    codes, taken = iter([-11, -11, 0, 1]), []
    monkeypatch.setattr(gpu, "in_a_process", lambda name, lease: (taken.append(name), next(codes))[1])
    lease = gpu.Lease(tmp_path, 100.0)
    gpu.take("bench", lease)
    gpu.take("scaling", lease)
    assert taken == ["bench", "bench", "bench", "scaling"]
    assert lease.done["scaling failed"] == "exit code 1"


def test_every_stage_that_uses_the_gpu_can_be_taken_in_a_process_of_its_own(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    lease = gpu.Lease(tmp_path, 60.0)
    lease.keep("tables", "before")
    assert gpu.in_a_process("tables", lease) == 1  # it began, read its arguments, and found no GPU
    assert lease.done == {"tables": "before"}


def test_the_sanitizer_watches_what_was_compiled_before(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "command", lambda arguments, limit, **v: (ran.append((arguments, v)), (0, "no errors"))[1])
    gpu.sanitizer(gpu.Lease(tmp_path, 100.0))
    (arguments, variables), alone = ran[0], gpu.one_of_each_command()
    assert arguments[0] == "/bin/compute-sanitizer"
    assert arguments[-len(alone) :] == alone
    assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


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


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("name", gpu.OTHER_PATHS)
def test_paths_that_no_figure_runs_are_run_and_compared_bit_by_bit(name, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(prefilter_gpu, "LOW", torch.float32)  # the interpreter multiplies bfloat16 as integers
    monkeypatch.setattr(gpu, "REPEATS", 2)
    monkeypatch.setattr(gpu, "sae_shape", lambda *_: {"rows": 4, "d_model": 20, "n_latents": 320, "k": 5})
    path, _ = gpu.OTHER_PATHS[name]
    calls = []

    def spied(*arguments):
        run = path(*arguments)
        return lambda: (calls.append(run()), calls[-1])[1]

    monkeypatch.setitem(gpu.OTHER_PATHS, name, (spied, ("float32",)))
    with force_triton():
        assert gpu.path_same_bits(name, device)
    assert len(calls) == 2
    if name.endswith("prefiltered"):  # rows that cannot be proved are among them
        assert calls[0][0].isfinite().all(1).tolist() == [False, True, True, False]
    calls.clear()
    changing = iter((torch.zeros(2), torch.ones(2)))
    monkeypatch.setitem(gpu.OTHER_PATHS, name, (lambda *_: lambda: (next(changing),), ("float32",)))
    assert not gpu.path_same_bits(name, device)
