"""`bench.gpu smoke`, rehearsed: whatever one op does, every other one is reported, by name."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from sparsefeat_kernels import dispatch
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

from bench.gpu import checks, children, prove, smoke, times
from bench.gpu.__main__ import main
from bench.gpu.children import Job
from tests.bench.broken_op import BROKEN

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
GOOD = ("auxk_decode",)
KERNELS = ("sparsefeat, Triton",)  # what a default would run
# Ops that the checks of another one run.
WITHIN = {
    "attention_with_map": "attention_map",
    "auxk_decode_grad_values": "gradients",
    "sparse_decode_grad_values": "gradients",
    "sparse_edit_grad_directions": "sparse_edit_delta",
    "sparse_edit_grad_values": "sparse_edit_delta",
    "threshold_encode_csr_grad_weights": "threshold_encode_csr",
    "threshold_encode_csr_grad_x": "threshold_encode_csr",
    "topk_encode_prefiltered": "topk_encode",
}


def kept(folder):
    return json.loads((folder / "smoke.json").read_text())


def limited(*given, jobs=smoke.jobs):
    """The jobs; only of the op that hangs is the end waited for, the others have what time a busy machine needs."""
    checked, timed = jobs(*given)
    return [replace(job, limit=12.0 if job.name == "sparse_edit" else 600.0) for job in checked], timed


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What a rehearsal leaves in which one op answers wrongly, one raises, one hangs and one aborts; and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    patch = pytest.MonkeyPatch()
    patch.setattr(smoke, "jobs", limited)
    patch.setattr(children, "STARTING_S", 600.0)
    patch.setattr(smoke.checks, "CHECKS", {name: checks.CHECKS[name] for name in (*BROKEN, *GOOD)})
    patch.setattr(smoke.times, "OPS", {})
    passed = smoke.smoke(folder, 3000.0, rehearse=True, tables=smoke.Tables("tests.bench.broken_op:checks"))
    patch.undo()
    return folder, passed


def test_each_way_to_fail_is_named_and_the_good_op_passes(broken):
    folder, passed = broken
    assert not passed
    summary = kept(folder)["summary"]
    assert set(summary) == {*BROKEN, *GOOD}
    assert summary["auxk_decode"] == "passed"
    assert re.match(r"failed at tiny, float32: the answer is [0-9.]+ tolerances off$", summary["feature_stats"])
    assert "RuntimeError: an illegal memory access" in summary["latent_major"]
    assert "hung: nothing after 12 s" in summary["sparse_edit"]
    assert "ended by SIGABRT" in summary["sparse_decode"]


def test_the_steps_after_the_one_that_ended_the_process_are_run_in_another(broken):
    folder, _ = broken
    found = kept(folder)["checks"]
    for name in (*BROKEN, *GOOD):
        assert list(found[name]) == [step.name for step in checks.checks(name, True)]
    for name in BROKEN:
        assert [bool(step["fault"]) for step in found[name].values()] == [True, *[False] * (len(found[name]) - 1)]


def test_what_a_process_said_last_is_on_the_log(broken):
    folder, _ = broken
    log = (folder / "smoke.log").read_text()
    assert "in hangs" in log
    assert "######## latent_major" in log


def test_the_file_is_whole_after_every_step(tmp_path, monkeypatch):
    seen = []

    def run_job(job, deadline, told, child=None):
        for step in job.steps:
            told(job.name, step, {"fault": "", "seconds": 0.1})
            content = kept(tmp_path)
            seen.append((job.name, step in content["checks"][job.name], content["summary"][job.name]))

    monkeypatch.setattr(smoke, "run_job", run_job)
    monkeypatch.setattr(smoke, "in_turn", lambda *_: None)
    monkeypatch.setattr(smoke.checks, "CHECKS", {"sparse_decode": checks.CHECKS["sparse_decode"]})
    assert smoke.smoke(tmp_path, 100.0, ["sparse_decode"], rehearse=True)
    assert all(there for _, there, _ in seen)
    assert seen[0][2] == "3 of 4 steps not reached"
    assert seen[-1][2] == "passed"


def test_an_op_that_was_not_reached_has_not_passed():
    assert (
        smoke.verdict({"a": {"fault": ""}, "b": {"fault": "not reached: no time was left"}})
        == "1 of 2 steps not reached"
    )
    assert smoke.verdict({"a": {"fault": ""}}) == "passed"
    assert smoke.verdict({"a": {"fault": "x"}, "b": {"fault": "y"}}) == "failed at a: x (and 1 more)"


def test_every_op_of_the_package_is_checked_by_both_ways_at_published_and_odd_shapes():
    for op in torch.ops.sparsefeat:
        name = op.removesuffix("_")
        assert WITHIN.get(name, name) in checks.CHECKS, op
    for name, make in checks.CHECKS.items():
        steps = [label for label, _ in make(name, False)]
        assert len(steps) == len(set(steps)), name
        if name.startswith("topk_encode, "):
            continue
        assert any("plain torch" in label for label in steps), name
        assert any("odd" in label for label in steps), name


def test_times_are_of_ours_both_ways_beside_the_product_and_topk():
    figure = times.build("topk_encode", times.TINY, "float32", "cpu")
    ours = [provider.name for provider in times.encode_providers(figure)]
    assert [name.removeprefix("sparsefeat, ") for name in ours] == [
        "Triton", "Triton, bias kept", "Triton, 256 wide", "plain torch",
    ]  # fmt: skip
    shapes = times.wanted("topk_encode", False)
    assert {"SAeUron, bfloat16", "768 wide, bfloat16", "FLUX, bfloat16"} <= set(shapes)


def test_what_follows_a_step_is_run_and_not_blamed_for_it_whatever_that_did_to_its_process(tmp_path, monkeypatch):
    """An illegal access raises in its own step and ends the process with the next call; a failed capture ends it as well. As
    many processes as that takes."""
    told, steps = {}, ("raises", "captures", "loses", "answers")
    job = Job("job", "tests.bench.last_steps:steps", steps, 300.0, {}, {}, str(tmp_path / "log"))
    monkeypatch.setattr(children, "LIVES", 2)  # what ends well takes none
    children.run_job(job, time.monotonic() + 600, lambda op, step, result: told.setdefault(step, result))
    assert {step: result["fault"] for step, result in told.items()} == {
        "raises": "raised ValueError: no", "captures": "", "loses": "raised RuntimeError: an illegal memory access",
        "answers": "",
    }  # fmt: skip
    assert told["captures"]["process"] != told["answers"]["process"]


def test_graphs_are_of_kernels_alone_and_end_with_the_first_that_cannot_be_captured(monkeypatch):
    captured = []

    def graph_ms(figure, provider):
        captured.append(provider.name)
        if provider.name == times.LARGE:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 0.5

    monkeypatch.setattr(times, "graph_ms", graph_ms)
    figure = times.build("topk_encode", times.TINY, "float32", "cpu")
    names = times.PLAIN, times.KERNELS, times.LARGE, f"{times.KERNELS}, bias kept"
    figure = replace(figure, providers=tuple(replace(figure.providers[0], name=name) for name in names))
    records = [{"checked": True} for _ in names]
    assert not times.all_captured(figure, records)
    assert captured == [times.KERNELS, times.LARGE]
    assert [record.get("graph_ms") for record in records] == [
        None, 0.5, "RuntimeError: operation not permitted when stream is capturing", None,
    ]  # fmt: skip
    assert times.all_captured(replace(figure, providers=figure.providers[:2]), records[:2])


def test_where_no_folder_is_given_the_variable_says_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(smoke, "smoke", lambda out, *rest: asked.append((out, rest)) or True)
    monkeypatch.setenv("OUT", str(tmp_path / "here"))
    main(["smoke"])
    assert asked[0][0] == tmp_path / "here"
    assert asked[0][1][-1] is (not torch.cuda.is_available())
    monkeypatch.delenv("OUT")
    with pytest.raises(SystemExit):
        main(["smoke"])


def smoked(folder, rehearsal=False, **took):
    """A smoke.json: of each op the milliseconds of the kernels and of plain torch, or what its checks said."""
    records = {
        op: {"tiny": {"records": [
            {"provider": "sparsefeat, Triton", "median_ms": ms[0], "checked": True},
            {"provider": "sparsefeat, Triton, 256 wide", "median_ms": 0.01, "checked": True},
            {"provider": "sparsefeat, plain torch", "median_ms": ms[1], "checked": ms[1] < 100},
        ]}} for op, ms in took.items()
    }  # fmt: skip
    machine = {"device": "A Card", "backend": "cuda", "rehearsal": rehearsal}
    summary = dict.fromkeys(took, "passed") | {"sparse_edit_delta": "2 of 5 steps not reached"}
    (folder / "smoke.json").write_text(json.dumps({"machine": machine, "summary": summary, "times": records}))


def test_what_smoke_found_right_and_faster_becomes_the_default_and_no_longer_when_it_is_not(tmp_path, capsys):
    proven, results = tmp_path / "proven.json", tmp_path
    other = {"record": "smoke-other.json", "kernels": "0"}
    known = {"sparse_decode": {"record": "smoke-a-card.json", "kernels": "1"}, "attention_map": other}
    proven.write_text(json.dumps({"cuda": known, "hip": {}}))
    smoked(tmp_path, topk_encode=(1.0, 2.0), sparse_decode=(3.0, 2.0), sparse_edit=(1.0, 2.0), feature_stats=(1.0, 200))
    prove.prove(tmp_path, results, proven)
    found = json.loads(proven.read_text())
    digest = found["cuda"]["topk_encode"].pop("kernels")
    assert len(digest) == 12
    assert found == {"cuda": {"topk_encode": {"record": "smoke-a-card.json"}, "attention_map": other}, "hip": {}}
    assert json.loads((results / "smoke-a-card.json").read_text())["machine"]["device"] == "A Card"
    said = capsys.readouterr().out
    assert "sparse_edit_delta: 2 of 5 steps not reached" in said
    assert "3.000 ms at tiny where plain torch takes 2.000 ms" in said
    assert "not timed at tiny" in said
    smoked(tmp_path, rehearsal=True, topk_encode=(1.0, 2.0))
    with pytest.raises(SystemExit, match="proves nothing"):
        prove.prove(tmp_path, results, proven)


def test_a_digest_is_of_an_ops_kernels_and_of_what_they_call(tmp_path):
    helper, kernel = (
        "@jit\ndef _add(x):\n    return x + {}\n",
        "@jit_over_rows\ndef _sparse_edit_row_kernel(x):\n    {}return _add(x)\n",
    )
    other = "@jit\ndef _sparse_decode_sum_kernel(x):\n    return {}\n"

    def digest(of_helper="1", before="", of_other="1"):
        (tmp_path / "a.py").write_text(helper.format(of_helper))
        (tmp_path / "b.py").write_text(kernel.format(before) + other.format(of_other))
        return prove.kernels_digest("sparse_edit", tmp_path)

    assert digest() == digest(before='"""Says something."""\n    # and more\n    ') == digest(of_other="2")
    assert len({digest(), digest(of_helper="2"), digest(before="x = x + 1\n    ")}) == 3
    assert prove.kernels_digest("attention_tap", tmp_path) == ""


def test_kernels_with_a_name_of_their_own_are_proven_by_their_own_checks(tmp_path):
    """topk_encode_stored is no check of topk_encode, and neither stands in the other's way."""
    took, proven = {"topk_encode": (1.0, 2.0), "topk_encode_stored": (1.0, 2.0)}, tmp_path / "proven.json"
    for wrong, right in (("topk_encode_stored", "topk_encode"), ("topk_encode, bias kept", "topk_encode_stored")):
        proven.write_text('{"cuda": {}, "hip": {}}')
        smoked(tmp_path, **took)
        found = json.loads((tmp_path / "smoke.json").read_text())
        found["summary"][wrong] = "failed at odd, bfloat16: a latent was missed"
        (tmp_path / "smoke.json").write_text(json.dumps(found))
        prove.prove(tmp_path, tmp_path, proven)
        assert list(json.loads(proven.read_text())["cuda"]) == [right]


def test_whatever_has_kernels_is_checked_and_timed_and_can_become_the_default(tmp_path):
    ops = dict.fromkeys(sorted(dispatch.SWITCHED), (1.0, 2.0))
    digests = {op: prove.kernels_digest(op) for op in ops}
    assert all(digests.values())
    assert len(set(digests.values())) == len(ops)
    smoked(tmp_path, **ops)
    found = json.loads((tmp_path / "smoke.json").read_text())
    found["summary"] = dict.fromkeys(checks.CHECKS, "passed")  # nothing that was not checked
    for wrong, op in {
        "attention_map_gradient": "attention_map_gradient",
        "attention_map, all options": "attention_map",
        "attention_tap, all options": "attention_tap",
        "attention_column_sums": "attention_column_sums",
        "concept_attention, all dtypes": "concept_attention",
        "times of resize_add": "resize_add",
    }.items():
        said = {**found, "summary": {**found["summary"], wrong: "failed at odd: output 0 is far off"}}
        (tmp_path / "smoke.json").write_text(json.dumps(said))
        (tmp_path / "proven.json").write_text('{"cuda": {}, "hip": {}}')
        prove.prove(tmp_path, tmp_path, tmp_path / "proven.json")
        of = json.loads((tmp_path / "proven.json").read_text())["cuda"]
        assert {name: entry["kernels"] for name, entry in of.items()} == {n: d for n, d in digests.items() if n != op}


def test_an_op_that_is_the_default_on_a_gpu_has_a_record_that_says_it_is_right_and_faster():
    """Of dispatch.PROVEN: smoke.json of a card of that backend, under bench/results."""
    for backend, of in dispatch.PROVEN.items():
        for op, entry in of.items():
            name = entry["record"]
            assert prove.kernels_digest(op) == entry["kernels"], f"{op} has other kernels than a card ran: take it out"
            found = json.loads((children.ROOT / "bench" / "results" / name).read_text())
            assert not found["machine"]["rehearsal"]
            assert found["machine"]["backend"] == backend
            of_op = {kind: what for kind, what in found["summary"].items() if prove.owner(kind) == op}
            assert of_op, f"{name} says nothing of {op}"
            assert set(of_op.values()) == {"passed"}
            for shape, timed in found["times"][op].items():
                own = {r["provider"]: r["median_ms"] for r in timed["records"]}
                assert min(ms for p, ms in own.items() if p in KERNELS) < own[times.PLAIN], shape
