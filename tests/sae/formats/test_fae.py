"""fae's FLUX SAEs: the converted files compute the published formulas, and the conversion reads what orbax wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import convert_fae, detect
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference

CASES = cases("fae")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(place / "fae.safetensors") | changes
    save_file({name: t for name, t in state.items() if t is not None}, place / "fae.safetensors")


def describe(place: Path, **changes: object) -> None:
    described = json.loads((place / "fae.json").read_text()) | changes
    (place / "fae.json").write_text(json.dumps(described))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_the_formulas(case):
    assert detect(case).name == "fae"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_the_fixtures_have_negative_values_and_values_at_the_bound():
    assert any((expected(case)["code"] < 0).any() for case in CASES)
    sae = load_sae(FIXTURE["clipped"])
    normal = sae.normalize(expected(FIXTURE["clipped"])["x"]).abs()
    assert float(normal.max()) == pytest.approx(0.8)
    assert 0.1 < float((normal > 0.79).float().mean()) < 0.9


def test_the_site_of_training_is_the_hookpoint(tmp_path):
    assert load_sae(FIXTURE["pca"]).config.hookpoint == "transformer.transformer_blocks.18:output"
    place = copied(FIXTURE["square"], tmp_path)
    describe(place, site=["single", 9])
    assert load_sae(place).config.hookpoint == "transformer.single_transformer_blocks.9:output"


def test_without_a_config_k_is_asked_for_and_the_bound_is_the_programs_own(tmp_path):
    place = copied(FIXTURE["pca"], tmp_path)
    (place / "fae.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no k: pass the k of training"):
        load_sae(place)
    sae = load_sae(place, k=5)
    assert sae.config.clip == 10.0
    assert largest_difference(sae, FIXTURE["pca"]) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"W_dec": None}, r"has no matrix W_dec"),
        ({"b_post": None}, r"lacks \['b_post'\]"),
        ({"W_enc": torch.zeros(24, 10)}, r"W_enc .* shape \[24, 10\], \[10, 24\] was expected"),
        ({"whitening_matrix": torch.ones(10, 10)}, r"not orthonormal \(off by 10\)"),
        ({"whitening_matrix": torch.full((10, 10), torch.nan)}, r"not orthonormal"),
        ({"W_enc": torch.full((10, 24), torch.nan)}, r"W_enc .* NaN or Inf"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, changes, words):
    place = copied(FIXTURE["pca"], tmp_path)
    change(place, **changes)
    with pytest.raises(ValueError, match=words):
        load_sae(place)


def test_sae_s_of_activations_that_were_not_standardised_are_refused(tmp_path):
    place = copied(FIXTURE["pca"], tmp_path)
    describe(place, standardize=False)
    with pytest.raises(ValueError, match=r"standardize in .* is False"):
        load_sae(place)


def test_a_file_cut_short_is_refused(tmp_path):
    place = copied(FIXTURE["pca"], tmp_path)
    path = place / "fae.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"fae\.safetensors is cut short .*download it again"):
        load_sae(place)


def test_the_conversion_reads_what_orbax_wrote(tmp_path):
    """Made from the kept checkpoint; the committed files were made from the same one, by orbax's own tensorstore."""
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    convert_fae.convert(FIXTURE["pca"] / "tree", tmp_path)
    for file in ("fae.safetensors", "fae.json"):
        assert (tmp_path / file).read_bytes() == (FIXTURE["pca"] / file).read_bytes()


def test_the_command_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "sparsefeat.sae.formats.convert_fae", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} holds no orbax checkpoint: pass the folder")
    assert not (tmp_path / "out").exists()


def test_without_tensorstore_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match="pip install tensorstore"):
        convert_fae.convert(FIXTURE["pca"] / "tree", tmp_path)


def test_an_array_that_declares_more_than_the_checkpoint_holds_is_refused_unread(tmp_path, monkeypatch):
    """zarr gives zeros for chunks that are not there, as many as its header declares. tensorstore's answers are recorded."""
    (tmp_path / "sae_params.W_dec").mkdir()
    (tmp_path / "sae_params.W_dec" / "0.0").write_bytes(bytes(1000))

    def read():
        raise AssertionError("nothing may be read")

    declared = SimpleNamespace(
        shape=(10**6, 10**6), dtype=SimpleNamespace(numpy_dtype=SimpleNamespace(itemsize=4)), read=read
    )
    store = SimpleNamespace(open=lambda *_, **__: SimpleNamespace(result=lambda: declared))
    monkeypatch.setitem(sys.modules, "tensorstore", store)
    with pytest.raises(
        ValueError, match=r"declares 4000000000000 bytes and the whole checkpoint has 1000: chunks are missing"
    ):
        convert_fae.convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
