"""ITDA: atoms and k are all there is; the pursuit gives the published algorithm's code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, itda
from tests.sae.dense import random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, largest_difference

CASES = cases("itda")
FIXTURE = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_the_published_algorithms(case):
    assert detect(case).name == "itda"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_where_every_atom_came_from_is_kept_as_statistics():
    sae = load_sae(FIXTURE["itda"])
    indices = torch.load(FIXTURE["itda"] / "atom_indices.pt", weights_only=True)
    assert torch.equal(sae.statistic("sequence"), indices[:, 0].float())
    assert torch.equal(sae.statistic("position"), indices[:, 1].float())
    assert (sae.config.base_model, sae.config.k) == ("gpt2", 4)


def test_k_is_the_files_the_callers_or_forty(tmp_path):
    place = copied(FIXTURE["itda"], tmp_path)
    assert load_sae(place, k=2).config.k == 2
    (place / "metadata.yaml").write_text("lm_name: gpt2\n")
    atoms = torch.nn.functional.normalize(torch.randn(64, 10), dim=1)
    torch.save(atoms, place / "atoms.pt")
    (place / "atom_indices.pt").unlink()
    assert load_sae(place).config.k == 40


def test_what_is_written_reads_back_bit_for_bit(tmp_path):
    sae = load_sae(FIXTURE["itda"])
    itda.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert largest_difference(load_sae(tmp_path), FIXTURE["itda"]) < TOLERANCE
    for name in ("atoms.pt", "atom_indices.pt"):
        read = [torch.load(folder / name, weights_only=True) for folder in (tmp_path, FIXTURE["itda"])]
        assert torch.equal(*read)


def test_an_sae_with_an_encoder_is_not_written(tmp_path):
    sae = random_sae("topk")
    with pytest.raises(ValueError, match="cannot express activation 'topk'"):
        itda.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/sparsefeat-itda-was-here",)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("atoms.pt", torch.zeros(3), "holds no matrix"),
        ("atoms.pt", torch.ones(24, 10), r"atoms of norms 3\.16 to 3\.16: unit vectors were expected"),
        ("atoms.pt", torch.full((24, 10), torch.nan), "unit vectors were expected"),
        ("atoms.pt", {"atoms": torch.zeros(24, 10)}, "holds no matrix"),
        ("atoms.pt", Malicious(), "could run code"),
        ("atom_indices.pt", torch.zeros(23, 2, dtype=torch.long), r"whole numbers of shape \[24, 2\]"),
        ("metadata.yaml", "!!python/object/apply:os.system ['true']", "not plain YAML"),
        ("metadata.yaml", "[1, 2]", "holds a list"),
        ("metadata.yaml", "k: many", r"k in .* is 'many': a whole number"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, file, content, words):
    place = copied(FIXTURE["itda"], tmp_path)
    if file.endswith(".yaml"):
        (place / file).write_text(content)
    else:
        torch.save(content, place / file)
    with pytest.raises(ValueError, match=words):
        load_sae(place)
    assert not Path("/tmp/sparsefeat-itda-was-here").exists()


def test_missing_metadata_is_named(tmp_path):
    place = copied(FIXTURE["itda"], tmp_path)
    assert yaml.safe_load((place / "metadata.yaml").read_text())["k"] == 4
    (place / "metadata.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.yaml is missing"):
        load_sae(place)
