"""`sparsefeat sae convert`: what is written reads back the same, and what is lost is said."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from sparsefeat.cli import app
from sparsefeat.sae import load_sae
from sparsefeat.sae.convert import convert, writable
from tests.sae.dense import random_sae
from tests.sae.formats.expected import FIXTURES, TOLERANCE, copied, largest_difference

runner = CliRunner()


@pytest.mark.parametrize("name", [name for name in writable() if name != "itda"])
def test_a_top_k_sae_reads_back_the_same_from_every_format_that_is_written(tmp_path, name):
    sae = random_sae("topk", normalizer="standardize" if name == "openai" else "b_pre")
    with torch.no_grad():
        sae.b_out.copy_(sae.b_pre)  # openai's files have one bias for both
    done = convert(sae, tmp_path / "sae", name)
    assert done.difference < 1e-4
    x = torch.randn(9, 13)
    assert (load_sae(tmp_path / "sae", k=5)(x) - sae(x)).abs().max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_the_command_converts_one_library_s_files_into_another_s(tmp_path):
    case = FIXTURES / "dictionary_learning" / "matryoshka"
    target = tmp_path / "native"
    arguments = ["sae", "convert", str(case), str(target), "--hookpoint", "unet.mid_block"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    sae = load_sae(target)
    assert sae.config.hookpoint == "unet.mid_block"
    assert largest_difference(sae, case) < TOLERANCE
    result = runner.invoke(
        app, ["sae", "convert", str(target), str(tmp_path / "back"), "--format", "dictionary_learning"]
    )
    assert result.exit_code == 0, result.output
    assert "not kept by the format: hookpoint" in result.output
    assert "not kept by the format: metadata 'group_sizes'" in result.output
    assert largest_difference(load_sae(tmp_path / "back"), case) < TOLERANCE


def test_k_that_the_file_does_not_say_can_be_given(tmp_path):
    file = str(FIXTURES / "overcomplete" / "topk" / "sae.pt")
    result = runner.invoke(app, ["sae", "convert", file, str(tmp_path / "no")])
    assert result.exit_code == 2
    assert "--k " in result.output
    assert runner.invoke(app, ["sae", "convert", file, str(tmp_path / "yes"), "--k", "4"]).exit_code == 0
    assert load_sae(tmp_path / "yes").config.k == 4


@pytest.mark.parametrize(
    ("format_", "said"),
    [
        ("swish", "--format 'swish' cannot be written; choose one of sparsefeat, sparsify"),
        ("crosscoder", "--format 'crosscoder' cannot be written; choose one of sparsefeat, sparsify"),
        ("itda", "cannot express activation 'topk'"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, format_, said):
    source = random_sae("topk").save(tmp_path / "source")
    result = runner.invoke(app, ["sae", "convert", str(source), str(tmp_path / "out"), "--format", format_])
    assert result.exit_code == 2
    assert said in result.output.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_library_says_which_formats_are_only_read(tmp_path):
    for name, said in (
        ("swish", "format 'swish' is not known"),
        ("crosscoder", "'crosscoder' is only read, not written"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(random_sae("topk"), tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["decoder.weight", "encoder.weight"])
def test_a_damaged_file_is_one_sentence_and_exit_code_2(tmp_path, missing):
    source = copied(FIXTURES / "dictionary_learning" / "topk", tmp_path)
    state = torch.load(source / "ae.pt", weights_only=True)
    del state[missing]
    torch.save(state, source / "ae.pt")
    result = runner.invoke(app, ["sae", "convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {source / 'ae.pt'}")
    assert missing in result.output


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already and is not an empty folder"):
        convert(random_sae("topk"), tmp_path / "out", "dictionary_learning")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]
