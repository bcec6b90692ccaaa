"""The figures: all that take part agree, and the gates let nothing wrong through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import peers, shapes
from bench.measure import build, into_extra_info
from bench.peers import compiled
from sparsefeat.measure import figures as plain
from sparsefeat.measure.figures import OPS, available
from sparsefeat.measure.ops.training import training_fault
from sparsefeat.measure.sae_case import dense_step, sae_case
from sparsefeat.measure.timing import OURS, measure, with_providers
from tests.bench.figures import CEILINGS, provider, squares

SAE = {"rows": 37, "d_model": 48, "n_latents": 600, "k": 5}
CROSS = {"batch": 2, "heads": 3, "n": 33, "t": 11, "d": 8}


def small(op: str) -> dict[str, int]:
    if op == "attention_tap":
        return {**CROSS, "selected": 4}
    if op == "resize_add":
        return {"maps": 6, "t": 3, "side": 4, "to": 8}
    return CROSS if "attention" in op or "concept" in op else SAE


def answers(op: str):
    """Inputs and our answer, as the gate sees them, and the gate."""
    figure = plain.build(op, small(op))
    ours = next(p for p in figure.providers if p.name == OURS)
    inputs = figure.inputs(3)
    with torch.set_grad_enabled(figure.gradients):
        state = ours.prepare(inputs)
        return inputs, ours.canonical(state, ours.run(state)), figure.check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_everyone_who_takes_part_agrees(op, dtype):
    if op == "matching_pursuit" and dtype != "float32":
        pytest.skip("matching_pursuit takes float32 and float64")
    figure = build(op, small(op), dtype)
    kept = [p.name for p in figure.providers if p.name != compiled.NAME]  # compiling takes seconds
    records = measure(with_providers(figure, *kept), CEILINGS, 0.0, min_rounds=1, peaks=False)
    assert [(r["provider"], r["fault"]) for r in records if not r["checked"]] == []
    assert len(records) >= 2


def test_another_index_value_or_number_of_latents_is_no_right_code():
    case, (values, indices), check = answers("topk_encode")
    assert check(case, (values, indices)) == ""
    assert "off" in check(case, (values * 1.01, indices))
    assert "twice" in check(case, (values[:, [0, 0, 2, 3, 4]], indices[:, [0, 0, 2, 3, 4]]))
    lowest = case.preactivations.argmin(1).int()
    missed = indices.clone()
    missed[case.rows, -1] = lowest
    assert check(case, (values, missed)) != ""
    sixth = case.preactivations.topk(6).indices[:, -1].int()
    worse, worse_values = indices.clone(), values.clone()
    worse[case.rows, -1] = sixth
    worse_values[case.rows, -1] = case.preactivations.topk(6).values[:, -1].float()
    assert "left out" in check(case, (worse_values, worse))
    assert "finite" in check(case, (values * torch.nan, indices))


@pytest.mark.parametrize("op", ["sparse_decode", "forward", "sparse_edit"])
def test_a_row_that_is_not_right_is_seen(op):
    case, answer, check = answers(op)
    assert check(case, answer) == ""
    for row in (0, len(answer) - 1):  # the first and the last row are among those compared
        wrong = answer.clone()
        wrong[row, 3] += 1.0
        assert check(case, wrong) != ""


def test_a_gradient_that_is_missing_or_of_another_length_is_seen():
    case, answer, check = answers("training_step")
    assert check(case, answer) == ""
    assert "loss" in check(case, {**answer, "loss": answer["loss"] * 1.1})
    for name in ("W_enc", "W_dec", "b_enc"):
        assert name in check(case, {**answer, name: answer[name] * 0})
        assert name in check(case, {**answer, name: answer[name] * 1.1})


def test_statistics_gradients_thresholds_and_pursuits_that_are_wrong_are_seen():
    case, (total, count, maximum), check = answers("feature_stats")
    assert check(case, [total, count, maximum]) == ""
    assert check(case, [total, count + 1, maximum]) != ""
    assert check(case, [total * 1.01, count, maximum]) != ""
    case, (weight, bias), check = answers("weight_gradient")
    assert check(case, (weight, bias)) == ""
    assert check(case, (weight * 1.01, bias)) != ""
    case, z, check = answers("threshold_encode")
    assert check(case, z) == ""
    assert check(case, z * 0) != ""
    case, (values, indices), check = answers("matching_pursuit")
    assert check(case, (values, indices)) == ""
    assert check(case, (values * 0.9, indices)) != ""


@pytest.mark.parametrize("op", ["attention_map", "attention_tap"])
def test_an_output_or_a_map_that_is_wrong_is_seen(op):
    case, (out, maps), check = answers(op)
    assert check(case, (out, maps)) == ""
    assert check(case, (out, maps * 1.01)) != ""
    assert check(case, (out.roll(1, dims=2), maps)) != ""


def test_sums_of_rows_and_keys_and_gradients_that_are_wrong_are_seen():
    case, answer, check = answers("attention_rows")
    assert check(case, answer) == ""
    for place in range(3):
        wrong = [tensor * (1.01 if place == of else 1.0) for of, tensor in enumerate(answer)]
        assert check(case, tuple(wrong)) != ""
    case, sums, check = answers("attention_column_sums")
    assert check(case, sums) == ""
    assert check(case, sums.roll(1, dims=1)) != ""
    assert check(case, sums * 1.01) != ""
    case, (of_query, of_key), check = answers("attention_map_gradient")
    assert check(case, (of_query, of_key)) == ""
    assert check(case, (of_query * 1.01, of_key)) != ""
    assert check(case, (of_query, of_key * 1.01)) != ""


@pytest.mark.parametrize("op", ["topk_encode", "sparse_decode", "forward", "threshold_encode"])
def test_flops_by_formula_are_what_the_counter_counts(op):
    figure = plain.build(op, SAE)
    ours = next(p for p in figure.providers if p.name == OURS)
    state = ours.prepare(figure.inputs(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours.run(state)
    assert counter.get_total_flops() == figure.flops


def test_peers_that_are_not_there_are_listed_and_never_measured(monkeypatch):
    from bench.peers import sparsify

    monkeypatch.setattr(sparsify, "why_absent", lambda: peers.importable("no_such_package_at_all"))
    peers.load.cache_clear()
    try:
        figure = build("forward", SAE)
        record = measure(with_providers(figure, OURS), CEILINGS, 0.0, peaks=False)[0]
    finally:
        peers.load.cache_clear()
    assert record["absent"]["sparsify"] == "not installed"
    assert "sparsify" not in {p.name for p in figure.providers}
    assert len(peers.importable("no_such_package_at_all.kernels")) > 0


def test_every_adapter_says_who_it_is():
    found, absent = peers.load()
    assert len(found) + len(absent) == len(peers.ADAPTERS)
    assert all(reason for reason in absent.values())


def test_the_shapes_that_are_wanted_can_be_built():
    for wanted in (*shapes.cpu_figures(), *shapes.gpu_figures()):
        if wanted.op in available():
            figure = plain.build(wanted.op, wanted.shape, wanted.dtype)
            assert figure.flops > 0
            assert figure.bytes > 0
    names = {shapes.name_of(wanted.shape) for wanted in shapes.gpu_figures()}
    assert {*shapes.SAES, *shapes.CROSS, *shapes.JOINT} <= names
    targets = {(w.shape["d_model"], w.shape["n_latents"]) for w in shapes.cpu_figures() if w.op == "topk_encode"}
    assert {(1280, 20480), (768, 32768), (3072, 16384)} <= targets


def test_an_unknown_op_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'top_k'.*topk_encode"):
        plain.build("top_k", SAE)


def test_extra_info_of_pytest_benchmark_holds_the_record_and_all_providers():
    benchmark = SimpleNamespace(extra_info={})
    records = measure(squares(provider("other"), provider(OURS)), CEILINGS, 0.0, peaks=False)
    into_extra_info(benchmark, records)
    assert benchmark.extra_info["provider"] == OURS
    assert benchmark.extra_info["ratio"].keys() == {"other"}
    assert benchmark.extra_info["providers"].keys() == {"other", OURS}


def test_a_step_that_breaks_a_tie_the_other_way_is_right_and_one_that_is_wrong_is_not():
    case = sae_case(2048, 256, 1024, 4, "float32", "cpu", seed=3, dead_norm=0.3)
    a = (case.x - case.b) @ case.W_enc.T + case.b_enc
    chosen, first_out = a[0].topk(5).indices[3:].tolist()
    case.W_enc[first_out], case.b_enc[first_out] = case.W_enc[chosen], case.b_enc[chosen]
    order = torch.arange(1024)
    order[[chosen, first_out]] = order[[first_out, chosen]]

    def step_in_order(order):
        """The gradients of the same weights, their latents numbered anew and the answer numbered back."""
        answer = dense_step(
            case.x, case.W_enc[order], case.b_enc[order], case.W_dec[order], case.b, case.k, case.is_dead[order]
        )
        return {**answer, **{name: answer[name][order] for name in ("W_enc", "b_enc", "W_dec")}}

    one, other = step_in_order(torch.arange(1024)), step_in_order(order)
    assert case.tied[[chosen, first_out]].all()
    assert not torch.allclose(one["W_dec"][chosen], other["W_dec"][chosen])  # it is a tie, and it was broken otherwise
    assert training_fault(case, one) == training_fault(case, other) == ""
    untied = (~case.tied & ~case.is_dead).nonzero()[:3, 0]
    assert "the gradient of W_dec" in training_fault(case, {**one, "W_dec": one["W_dec"].index_fill(0, untied, 1.0)})
