"""What is said of the results: the table, the section of the docs, `sparsefeat bench`."""

from __future__ import annotations

import json

import pytest
import write_tables
from typer.testing import CliRunner

from sparsefeat.cli import app
from sparsefeat.measure import figures
from sparsefeat.measure.speed_table import beside, describe, load_results, speed_markdown, summary

SHAPE = {"rows": 1024, "d_model": 1280, "n_latents": 20480, "k": 32}


def record(provider: str, ms: float | None, op: str = "topk_encode", bound: bool = False, **changes):
    times = {"sparsefeat": 10.0, "dense PyTorch": 30.0, "fast peer": 20.0, "the product alone": 8.0}
    return {
        "op": op, "shape": SHAPE, "dtype": "float32", "provider": provider, "bound": bound,
        "checked": ms is not None, "fault": "" if ms is not None else "a value is 3.0 tolerances off", "note": "",
        "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "peak_bytes": 3 << 20, "flops": 1.0, "bytes": 1.0,
        "ceiling_share": 0.5, "ratio": {name: t / ms for name, t in times.items() if ms and name != provider},
        "absent": {"some library": "not installed"}, "device": "a machine", "date": "2026-11-22", "versions": {},
        **changes,
    }  # fmt: skip


def results(**changes):
    records = [
        record("sparsefeat", 10.0), record("the product alone", 8.0, bound=True), record("dense PyTorch", 30.0),
        record("fast peer", 20.0), record("wrong and fast", None),
    ]  # fmt: skip
    return {"device": "a machine", "date": "2026-11-22", "records": records, "not_installed": {}, **changes}


def test_a_row_compares_with_the_fastest_right_answer_that_is_no_bound():
    (row,) = summary(results()["records"])
    assert row.other["provider"] == "fast peer"
    assert row.times_faster == 2.0
    assert row.bounds == {"the product alone": pytest.approx(1.25)}


def test_a_figure_without_a_right_answer_of_ours_has_no_row():
    assert summary([record("sparsefeat", None), record("dense PyTorch", 30.0)]) == []


def test_the_table_names_device_date_absent_and_wrong():
    text = speed_markdown(results())
    for said in ("a machine", "2026-11-22", "some library (not installed)", "wrong and fast at topk_encode", "2.00×"):
        assert said in text


def test_below_the_table_stands_every_figure_at_which_another_is_faster():
    ours, other = record("sparsefeat", 30.0), record("dense PyTorch", 24.0)
    slow = [{**one, "op": "sparse_decode", "dtype": "bfloat16"} for one in (ours, other)]
    slow[0]["ratio"] = {"dense PyTorch": 0.8}
    text = speed_markdown({**results(), "records": [*results()["records"], *slow]}, rows_an_op=0)
    assert "Another program is faster: `sparse_decode`, bfloat16, " in text
    assert text.count("0.80×") == 1
    assert "Another program" not in speed_markdown(results())


def test_the_readme_has_a_table_for_every_measured_device_and_no_other(tmp_path):
    assert "|" not in write_tables.speed({})
    (tmp_path / "one.json").write_text(json.dumps(results()))
    (tmp_path / "emoji.json").write_text(json.dumps({"device": "x", "saes": []}))
    (tmp_path / "scaling-one.json").write_text(json.dumps({"device": "x", "points": [1]}))
    found = load_results(tmp_path)
    assert list(found) == ["one.json"]
    text = write_tables.speed({**found, "two.json": results(device="another machine")})
    assert text.count("**a machine**") == text.count("**another machine**") == 1
    assert "bench/results/one.md" in text
    assert load_results(tmp_path / "nothing") == {}


def test_what_was_measured_elsewhere_stands_beside_the_same_shape_only():
    assert len(beside(record("sparsefeat", 5.0), [results()])) == 1
    other = record("sparsefeat", 5.0, shape={**SHAPE, "rows": 7})
    assert beside(other, [results()]) == []
    lines = "\n".join(describe(results()["records"], [results()]))
    assert "measured on a machine, 2026-11-22: 10.0 ms, 2.00× of fast peer" in lines
    assert "no time: a value is 3.0 tolerances off" in lines


def test_sparsefeat_bench_measures_an_op_against_dense_pytorch(monkeypatch):
    small = {"rows": 16, "d_model": 16, "n_latents": 64, "k": 2}
    monkeypatch.setitem(figures.HERE, "sparse_decode", small)
    result = CliRunner().invoke(app, ["bench", "--only", "sparse_decode", "--seconds", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "dense PyTorch" in result.output
    assert "no time" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--only", "decode"], "sparse_decode"), (["--device", "tpu"], "choose cpu")]
)
def test_bad_input_is_one_sentence(arguments, said):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
