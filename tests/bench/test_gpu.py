"""The seven minutes on a GPU, as far as a CPU can try them: what is kept, what is gone on with, what is counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sparsefeat_kernels import force_triton
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

from bench import run, scaling
from bench.gpu import children, faults, full, repeats
from bench.gpu.__main__ import main
from bench.gpu.record import Record
from bench.measure import Results, available
from bench.shapes import Wanted
from sparsefeat.measure.timing import Ceilings

SMALL = {"rows": 16, "d_model": 16, "n_latents": 64, "k": 2}


def test_a_test_file_that_failed_is_run_again_and_one_that_passed_is_not(tmp_path, monkeypatch):
    ran = []

    def command(arguments, limit, **variables):
        name = "one of each" if arguments[-1] == "once" else arguments[3].rsplit("/tests/", 1)[1]
        ran.append(name)
        return (1 if name == "kernels/gradient/test_csr.py" and len(ran) < 50 else 0), "noise\n==== 3 passed in 1s ===="

    monkeypatch.setattr(full, "command", command)
    full.tests(Record(tmp_path, "full.json", 100.0))
    kept = json.loads((tmp_path / "full.json").read_text())["tests"]
    assert kept["kernels/gradient/test_csr.py"] == {"code": 1, "said": "3 passed in 1s"}
    assert not [name for name in kept if "ahead_of_time" in name]
    ran.clear()
    full.tests(Record(tmp_path, "full.json", 100.0))
    assert ran == ["kernels/gradient/test_csr.py"]
    assert (tmp_path / "tests.log").read_text().count("exit code 0") == len(kept) - 1


def test_a_command_is_stopped_at_its_limit_and_keeps_its_output():
    code, output = children.command(["bash", "-c", "echo begun; sleep 300"], 3.0)
    assert code is None
    assert "begun" in output


def test_what_a_stopped_command_began_ends_with_it(tmp_path):
    """A sanitizer's child would keep the GPU that the next stage is timed on."""
    script = f"(sleep 60; touch {tmp_path}/late) & echo $! > {tmp_path}/pid; wait"
    assert children.command(["bash", "-c", script], 3.0)[0] is None
    assert not (tmp_path / "late").exists()
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def test_the_longest_test_file_is_begun_first_and_none_is_left_out():
    files = full.files_to_test()
    ours = [path for path in files if path != full.ATTACH]
    names = list(dict.fromkeys(path.name for path in ours))  # two folders may have a file of one name
    assert names[: len(full.TESTS_FIRST)] == list(full.TESTS_FIRST)
    every = (full.ROOT / "tests" / "kernels").rglob("test_*.py")
    assert set(ours) == {path for path in every if "ahead_of_time" not in path.name}


def test_a_figure_that_ends_its_process_is_not_begun_again(tmp_path, monkeypatch):
    measured, deadly = [], Wanted("sparse_edit", SMALL, "float32", 0.0)

    def measure(wanted, device, results, ceilings, budget):
        if wanted == [deadly]:
            raise SystemExit("as a segmentation fault would")
        if wanted[0].op == "feature_stats":
            raise RuntimeError("out of memory")
        measured.extend(one.op for one in wanted)
        return 0

    monkeypatch.setattr(full, "run", measure)
    monkeypatch.setattr(full, "measure_ceilings", lambda device: Ceilings(1e9, {"float32": 1e9}))
    others = [Wanted(op, SMALL, "float32", 0.0) for op in ("feature_stats", "sparse_decode")]
    monkeypatch.setattr(full, "gpu_figures", lambda: iter([deadly, *others]))
    with pytest.raises(SystemExit):
        full.bench(Record(tmp_path, "full.json", 100.0))
    assert measured == []
    full.bench(Record(tmp_path, "full.json", 100.0))
    assert measured == ["sparse_decode"]
    kept = json.loads((tmp_path / "full.json").read_text())["bench"]
    assert kept["died"] == ["sparse_edit 16 16 64 2 float32"]
    assert kept["failed"] == {"feature_stats 16 16 64 2 float32": "RuntimeError: out of memory"}
    assert "begun" not in kept


def test_of_a_figure_that_loses_the_gpu_the_record_keeps_what_it_raised(tmp_path, monkeypatch):
    def measure(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise SystemExit("as an error that nobody catches would")

    monkeypatch.setattr(full, "run", measure)
    monkeypatch.setattr(full, "synchronised", lost)
    monkeypatch.setattr(full, "measure_ceilings", lambda device: Ceilings(1e9, {"float32": 1e9}))
    monkeypatch.setattr(full, "gpu_figures", lambda: iter([Wanted("sparse_edit", SMALL, "float32", 0.0)]))
    with pytest.raises(SystemExit):
        full.bench(Record(tmp_path, "full.json", 100.0))
    full.bench(Record(tmp_path, "full.json", 100.0))  # the next process
    kept = json.loads((tmp_path / "full.json").read_text())["bench"]
    name = "sparse_edit 16 16 64 2 float32"
    assert kept["died"] == [name]
    assert kept["failed"] == {name: "RuntimeError: an illegal memory access was encountered"}


def test_a_stage_that_dies_is_noted_and_the_bench_alone_lives_again(tmp_path, monkeypatch):
    codes, taken = iter([-11, -11, 0, 1]), []
    monkeypatch.setattr(full, "in_a_process", lambda name, record: (taken.append(name), next(codes))[1])
    record = Record(tmp_path, "full.json", 100.0)
    full.take("bench", record)
    full.take("scaling", record)
    assert taken == ["bench", "bench", "bench", "scaling"]
    assert record.done["scaling failed"] == "exit code 1"


def test_every_stage_that_uses_the_gpu_can_be_taken_in_a_process_of_its_own(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    record = Record(tmp_path, "full.json", 1500.0)  # of which the child has a part; without a GPU it ends at once
    record.keep("repeats", "before")
    assert full.in_a_process("repeats", record) == 1  # it began, read its arguments, and found no GPU
    assert record.done == {"repeats": "before"}


def test_the_sanitizer_watches_what_was_compiled_before(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(full.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(full.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        full, "command", lambda arguments, limit, **v: (ran.append((arguments, v)), (0, "no errors"))[1]
    )
    full.sanitizer(Record(tmp_path, "full.json", 100.0))
    (arguments, variables), alone = ran[0], full.one_of_each_command()
    assert arguments[0] == "/bin/compute-sanitizer"
    assert arguments[-len(alone) :] == alone
    assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SPARSEFEAT_FORCE_TRITON": "1"}


def test_children_run_real_triton_from_the_checkout(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in children.environment()
    assert children.environment(TRITON_INTERPRET="1")["TRITON_INTERPRET"] == "1"
    assert "kernels" in children.environment()["PYTHONPATH"]


def test_the_same_bits_twenty_times():
    assert repeats.same_bits("sparse_decode", SMALL, "float32", "cpu")
    assert repeats.same_bits("feature_stats", SMALL, "float32", "cpu")
    changing = iter((torch.zeros(2), torch.ones(2)))
    assert not repeats.same_answers(lambda: [next(changing)])


def test_one_of_each_runs_every_op(capsys):
    repeats.one_of_each("cpu")
    assert capsys.readouterr().out.split() == list(available())


def test_without_a_gpu_it_says_what_to_do_instead(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=r"bench\.run"):
        main(["full", "--out", str(tmp_path)])


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
@pytest.mark.parametrize("name", repeats.OTHER_PATHS)
def test_paths_that_no_figure_runs_are_run_and_compared_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(repeats, "REPEATS", 2)
    path, _ = repeats.OTHER_PATHS[name]
    calls = []
    monkeypatch.setitem(
        repeats.OTHER_PATHS, name, (lambda case: (calls.append(path(case)), calls[-1])[1], ("float32",))
    )
    with force_triton():
        assert repeats.path_same_bits(name, {"rows": 4, "d_model": 20, "n_latents": 320, "k": 5}, faults.device())
    assert len(calls) == 2


def test_a_test_that_hangs_ends_its_process_with_its_stack(tmp_path):
    (tmp_path / "test_hangs.py").write_text("import time\n\ndef test_it():\n    time.sleep(60)\n")
    begin = "import pytest, bench.gpu.watchdog as w; w.TEST_S = 1.0; "
    run = f"raise SystemExit(pytest.main(['-q', '-p', 'bench.gpu.watchdog', '-p', 'no:cacheprovider', {str(tmp_path)!r}]))"
    code, output = children.command([sys.executable, "-c", begin + run], 50.0)
    assert code == 1
    assert "Timeout (" in output
    assert "test_it" in output
