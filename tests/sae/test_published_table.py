"""Published SAEs by name: the table, and what `load_sae` makes of a name. Tested on stand-ins: nothing is downloaded."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from sparsefeat.assets.embedded import block_sae_folder
from sparsefeat.cli.app import app
from sparsefeat.sae import load_sae
from sparsefeat.sae.config import is_hookpoint
from sparsefeat.sae.published import PUBLISHED_SAES, PublishedSAE, published
from tests.sae.formats.expected import FIXTURES


def test_every_entry_says_where_it_lies_and_where_it_belongs():
    assert len(PUBLISHED_SAES) > 200
    for name, entry in PUBLISHED_SAES.items():
        assert name == entry.name
        assert name.count("/") == entry.repository.count("/") == entry.base_model.count("/") == 1
        assert is_hookpoint(entry.hookpoint)
    assert sum(name.startswith("difffract/") for name in PUBLISHED_SAES) == 40


def test_a_name_fetches_its_files_and_brings_its_place(tmp_path, monkeypatch):
    asked = {}
    entry = PUBLISHED_SAES["sdxl-unbox/up.0.1"]

    def fetch(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        shutil.copytree(FIXTURES / "unbox" / "sdxl_unbox", tmp_path / entry.subfolder, dirs_exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    config = load_sae("sdxl-unbox/up.0.1").config
    assert asked["repo"] == "surokpro2/sdxl-saes"
    assert f"{entry.subfolder}/state_dict.pth" in asked["patterns"]
    assert (config.hookpoint, config.base_model) == ("unet.up_blocks.0.attentions.1:diff", "stabilityai/sdxl-turbo")
    with pytest.warns(UserWarning, match="and 'unet.mid_block' was given"):
        assert load_sae("sdxl-unbox/up.0.1", hookpoint="unet.mid_block").config.hookpoint == "unet.mid_block"


def test_a_single_file_is_fetched_with_what_lies_beside_it(tmp_path, monkeypatch):
    source = FIXTURES / "mwhanna" / "qwen3_4b" / "mwhanna" / "qwen3-4b-transcoders"
    asked = {}

    def fetch(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(patterns=allow_patterns)
        shutil.copy(source / "layer_9.safetensors", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    sae = load_sae("mwhanna-4b/9")
    assert {"layer_9.safetensors", "config.yaml"} <= set(asked["patterns"])
    assert (sae.config.hookpoint, sae.config.transcoder) == ("model.layers.9.mlp:input", True)


def test_a_wrong_name_of_a_family_names_the_nearest_and_others_are_hub_ids():
    with pytest.raises(ValueError, match=r"'sdxl-unbox/up.0.2' is not in the table of published SAEs: did you mean"):
        load_sae("sdxl-unbox/up.0.2")
    assert published("someone/else") is None


def test_the_table_is_printed():
    run = CliRunner().invoke
    assert "sdxl-unbox/up.0.1" in run(app, ["sae", "list"]).output
    found = json.loads(run(app, ["sae", "list", "gemma", "--json"]).output)
    assert {entry["base_model"] for entry in found} == {"google/gemma-2-2b"}
    assert run(app, ["sae", "list", "no-such-thing"]).exit_code == 2


def test_verify_measures_a_stand_in_beside_what_is_published_of_it(monkeypatch):
    """An SAE and pipeline that are embedded, as if they had been published; and with an L0 that is not theirs."""
    folder = block_sae_folder()
    sae = load_sae(folder)
    run = CliRunner().invoke
    for l0, agrees in ((float(sae.config.k), True), (10.0 * sae.config.k, False)):
        entry = PublishedSAE("stand/in", "some/where", None, sae.config.hookpoint, "tiny/pipeline", l0=l0)
        monkeypatch.setitem(PUBLISHED_SAES, "stand/in", entry)
        done = run(
            app,
            ["sae", "verify", "stand/in", "a noto emoji of a fox", "--weights", str(folder), "--steps", "2", "--json"],
        )
        assert done.exit_code == (0 if agrees else 1), done.output
        assert "state base_model" in done.stderr  # the stand-in is of another pipeline, and that is said
        told = json.loads(done.stdout)
        assert told["agrees"] == agrees
        assert told["published"] == {"l0": l0}
        assert 0 < told["measured"]["fvu"] < 1
    assert run(app, ["sae", "verify", "no/such", "a fox"]).exit_code == 2
