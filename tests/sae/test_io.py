"""Saving, loading, and every way a file on disk can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sparsefeat.sae import SAE, Names, SAEConfig, load_sae, save
from sparsefeat.sae.formats import native
from tests.sae.dense import CASES, NORMALIZERS, random_sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_sae("batch_topk", "threshold").save(tmp_path / "sae")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "sae.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "sae.safetensors")


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("activation", "inference"), CASES)
def test_a_saved_sae_reads_back_bit_for_bit(tmp_path, activation, inference, normalizer):
    sae = random_sae(activation, inference, normalizer)
    again = load_sae(save(sae, tmp_path / "new" / "sae"))
    assert again.config == sae.config
    assert not again.training
    state = again.state_dict()
    assert state.keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = torch.randn(6, 13)
    assert torch.equal(again(x), sae(x))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_folder_holds_two_files_and_the_config_says_what_it_is(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["sae"]
    values = json.loads((folder / "config.json").read_text())
    assert (values["format"], values["format_version"], values["n_latents"]) == ("sparsefeat.sae", 1, 37)


def test_dtypes_files_in_half_load_as_single_and_any_can_be_asked_for(tmp_path):
    sae = random_sae("topk")
    half = sae.save(tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in load_file(half / "sae.safetensors").values()} == {torch.float16}
    loaded = load_sae(half)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.W_dec, sae.W_dec.half().float())
    assert load_sae(half, dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16
    assert load_sae(random_sae("topk").double().save(tmp_path / "double")).dtype == torch.float64
    with pytest.raises(ValueError, match="floating dtype"):
        load_sae(half, dtype=torch.int32)


def test_saving_again_replaces_the_weights_while_the_loaded_ones_stay(tmp_path):
    sae = random_sae("topk")
    first = load_sae(sae.save(tmp_path / "sae"))
    kept = first.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec += 1
    with pytest.raises(FileExistsError, match=r"same config with other weights, .*pass overwrite=True"):
        sae.save(tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, kept)
    sae.save(tmp_path / "sae", overwrite=True)
    assert torch.equal(first.W_dec, kept)
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, sae.W_dec)


def test_the_same_weights_are_saved_again_unless_that_would_round_them(tmp_path):
    sae = random_sae("topk")
    for _ in range(2):
        sae.save(tmp_path / "sae")
    with pytest.raises(FileExistsError, match="these in a wider dtype"):
        sae.save(tmp_path / "sae", dtype=torch.float16)
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, sae.W_dec)
    sae.save(tmp_path / "sae", dtype=torch.float16, overwrite=True)
    load_sae(tmp_path / "sae").save(tmp_path / "sae")  # in fp32, as it was loaded
    sae.save(tmp_path / "half", dtype=torch.float16)
    sae.save(tmp_path / "half")  # which rounds to what lies there
    assert torch.equal(load_sae(tmp_path / "half").W_dec, sae.W_dec)


def test_a_damaged_file_is_not_replaced_unasked(folder):
    whole = load_sae(folder)
    (folder / "sae.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        whole.save(folder)
    whole.save(folder, overwrite=True)
    assert torch.equal(load_sae(folder).W_dec, whole.W_dec)


def test_a_folder_in_the_way_is_refused_unless_overwrite(tmp_path, folder):
    sae = random_sae("topk")
    with pytest.raises(FileExistsError, match="SAE of another config"):
        sae.save(folder)
    assert load_sae(folder).config.activation == "batch_topk"
    sae.save(folder, overwrite=True)
    assert load_sae(folder).config.activation == "topk"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files"):
        sae.save(tmp_path / "notes")
    sae.save(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "x"
    load_sae(tmp_path / "notes")
    with pytest.raises(FileExistsError, match="is a file"):
        sae.save(tmp_path / "notes" / "todo.txt")
    (tmp_path / "empty").mkdir()
    load_sae(sae.save(tmp_path / "empty"))


def test_a_save_killed_before_the_rename_leaves_the_old_sae_whole(folder, monkeypatch):
    before = (folder / "sae.safetensors").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        random_sae("batch_topk", "threshold", seed=9).save(folder, overwrite=True)
    assert (folder / "sae.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["sae"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write into"):
        random_sae("topk").save(tmp_path / "sae")


def test_a_place_below_a_file_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write into .*choose another folder"):
        random_sae("topk").save(tmp_path / "file" / "sae")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_enc[2] = 1e30
    with pytest.raises(ValueError, match=r"b_enc has NaN or Inf as torch\.float16"):
        sae.save(tmp_path / "sae", dtype=torch.float16)
    assert not (tmp_path / "sae").exists()


def test_a_truncated_file_is_said(folder):
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"sae\.safetensors is cut short .*download it again"):
        load_sae(folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in a zip, perhaps", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_said(folder, content):
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a safetensors file .*download it again"):
        load_sae(folder)


def test_missing_tensors_and_files_are_named(folder):
    rewrite(folder, b_out=None, threshold=None)
    with pytest.raises(ValueError, match=r"lacks \['b_out', 'threshold'\]"):
        load_sae(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors is missing"):
        load_sae(folder)


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_sae(folder)


def test_a_wrong_shape_dtype_or_value_is_named(folder):
    rewrite(folder, W_enc=torch.zeros(13, 37))
    with pytest.raises(ValueError, match=r"W_enc .* has shape \[13, 37\], \[37, 13\] was expected"):
        load_sae(folder)
    rewrite(folder, W_enc=torch.zeros(37, 13, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"W_enc .* is torch\.int32: a floating tensor"):
        load_sae(folder)
    for bad in (float("nan"), float("inf"), float("-inf")):
        weights = torch.zeros(37, 13)
        weights[30, 2] = bad
        rewrite(folder, W_enc=weights)
        with pytest.raises(ValueError, match=r"W_enc .* has NaN or Inf"):
            load_sae(folder)


def test_a_config_that_is_wrong_is_named_with_its_path(folder):
    reconfigure(folder, activation="swish")
    with pytest.raises(ValueError, match=r"config\.json: activation is 'swish'"):
        load_sae(folder)
    reconfigure(folder, activation="batch_topk", k=100)
    with pytest.raises(ValueError, match=r"config\.json: k is 100 but n_latents is 37"):
        load_sae(folder)
    reconfigure(folder, format_version=2)
    with pytest.raises(ValueError, match="format_version 2, this sparsefeat reads 1: upgrade"):
        load_sae(folder)
    reconfigure(folder, format="other")
    with pytest.raises(ValueError, match="has format 'other'"):
        load_sae(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_sae(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("stated", "given", "contradicts"),
    [
        ("unet.up_blocks.1.attentions.1", "unet.up_blocks.1.attentions.1", False),
        ("unet.up_blocks.1.attentions.1", "unet.up_blocks.1.attentions.1:output:image", False),
        ("unet.up_blocks.1.attentions.1", "unet.up_blocks.2.attentions.1", True),
        ("unet.up_blocks.1.attentions.1", "unet.up_blocks.1.attentions.1:diff", True),
        ("transformer.transformer_blocks.1.ff", "transformer.transformer_blocks.1.ff:text", True),
        ("layers.1", "text_encoder.encoder.layers.1", False),  # of the model alone, which the pipeline has
        ("layers.1", "text_encoder.encoder.layers.11", True),
        ("model.layers.9", "text_encoder.layers.9", False),
        ("model.layers.9", "text_encoder.layers.19", True),
        ("blocks.3.hook_resid_post", "text_encoder.layers.3", False),  # which names no module at all
        (None, "unet.mid_block", False),
    ],
)
def test_another_hookpoint_than_the_files_state_is_used_with_one_warning_of_both(folder, stated, given, contradicts):
    reconfigure(folder, hookpoint=stated, base_model="one/model")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = load_sae(folder, hookpoint=given, base_model="a-copy/Model").config
    assert (config.hookpoint, config.base_model) == (given, "a-copy/Model")
    assert len(told) == contradicts
    for one in told:
        assert f"state hookpoint {stated!r}, and {given!r} was given, which is used" in str(one.message)
        assert one.filename == __file__  # the caller's line


def test_another_model_than_the_files_state_is_used_with_one_warning_of_both(folder):
    reconfigure(folder, base_model="stabilityai/sdxl-turbo")
    with pytest.warns(UserWarning, match="state base_model 'stabilityai/sdxl-turbo', and 'a/b' was given") as told:
        assert load_sae(folder, base_model="a/b").config.base_model == "a/b"
    assert len(told) == 1


def test_an_unset_threshold_is_said(folder):
    rewrite(folder, threshold=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="put inference 'topk' into its config"):
        load_sae(folder)


def test_a_bias_the_normalizer_denies_is_said(folder):
    reconfigure(folder, normalizer="none")
    with pytest.raises(ValueError, match=r"b_pre .* is not zero but normalizer is 'none': put 'b_pre'"):
        load_sae(folder)


def test_a_folder_without_an_sae_says_what_was_expected(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"found \['weights\.bin'\].*config\.json and sae\.safetensors"):
        load_sae(tmp_path)


def test_local_paths_win_and_wrong_ones_never_ask_the_hub(tmp_path, folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append(a))
    monkeypatch.chdir(tmp_path)
    assert load_sae("sae").config == load_sae(folder).config
    assert load_sae(tmp_path, subfolder="sae").config == load_sae(folder).config
    for wrong in (tmp_path / "no", "./no/such", "a/b/c", "nothing"):
        with pytest.raises(FileNotFoundError, match="does not exist: pass a folder, or a hub id"):
            load_sae(wrong)
    with pytest.raises(FileNotFoundError, match="correct subfolder='mid'"):
        load_sae(tmp_path, subfolder="mid")
    with pytest.raises(NotADirectoryError, match="pass the folder it lies in"):
        load_sae(folder / "config.json")
    assert not asked


def test_hub_ids_fetch_only_the_files_of_known_formats(folder, monkeypatch):
    asked = {}

    def fetch(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    sae = load_sae("someone/saes", revision="v1", subfolder="sae")
    assert sae.config.activation == "batch_topk"
    assert (asked["repo"], asked["revision"]) == ("someone/saes", "v1")
    assert {"sae/config.json", "sae/sae.safetensors"} <= set(asked["patterns"])


def test_a_hub_repository_of_several_saes_names_their_folders(tmp_path, monkeypatch):
    """Of folders below the top nothing is fetched, and the snapshot's folder is not even made."""
    files = ["README.md", *(f"{layer}/{name}" for layer in ("mid", "up") for name in ("cfg.json", "sae.safetensors"))]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    with pytest.raises(FileNotFoundError, match=r"no SAE at its top: pass subfolder=, one of \['mid', 'up'\]"):
        load_sae("someone/saes")
    with pytest.raises(FileNotFoundError, match=r"no SAE in subfolder 'down': pass subfolder=, one of \['mid', 'up'\]"):
        load_sae("someone/saes", subfolder="down")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(OSError, match=r"'someone/saes' is no local folder .*no route to host.*connection"):
        load_sae("someone/saes")


def test_push_to_hub_uploads_what_save_writes_and_leaves_no_names_of_another(monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            uploaded["created"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, path_in_repo, delete_patterns):
            uploaded["deleted first"] = delete_patterns  # in the same commit, but for what is uploaded
            uploaded["names"] = sorted(path.name for path in Path(folder_path).iterdir())
            uploaded["sae"] = load_sae(folder_path)
            uploaded["card"] = (Path(folder_path) / "README.md").read_text()
            uploaded["place"] = path_in_repo
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    sae = random_sae("topk", hookpoint="unet.mid_block.attentions.0:diff", base_model="stabilityai/sdxl-turbo")
    metrics = {"fvu": 0.21, "l0": 5.0}
    assert sae.push_to_hub("me/sae", private=True, subfolder="mid", metrics=metrics) == "https://hub/commit"
    assert uploaded["created"] == ("me/sae", True, True)
    assert uploaded["place"] == "mid"
    assert uploaded["deleted first"] == ["names.json"]
    assert uploaded["names"] == ["README.md", "config.json", "sae.safetensors"]
    assert torch.equal(uploaded["sae"].W_dec, sae.W_dec)
    head, table = uploaded["card"].split("---\n")[1:3]
    assert yaml.safe_load(head)["base_model"] == "stabilityai/sdxl-turbo"
    assert "sparse-autoencoder" in yaml.safe_load(head)["tags"]
    for fact in (
        "`unet.mid_block.attentions.0:diff`",
        "| 13 |",
        "| 37 |",
        "topk, k = 5",
        "| fvu | 0.21 |",
        "| l0 | 5.0 |",
    ):
        assert fact in table, fact
    assert 'sf.load_sae("me/sae", subfolder="mid")' in table
    sae.names = Names({3: "fox"})
    sae.push_to_hub("me/sae")
    assert "names.json" in uploaded["names"]
    assert uploaded["sae"].names == Names({3: "fox"})


def test_the_sae_package_never_imports_diffusers_or_transformers():
    check = (
        "import sys, sparsefeat.sae, sparsefeat.store; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_meta_sae_allocates_nothing():
    with torch.device("meta"):
        assert SAE(SAEConfig(8, 16, k=2)).W_dec.is_meta


SPARSIFY = Path(__file__).parent / "formats" / "fixtures" / "sparsify" / "topk"


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_hub_id_opens_from_the_hubs_cache_without_a_connection(tmp_path, revision):
    """The real client, offline, on a cache laid out as it lays one out; a foreign format, in a subfolder."""
    repository = tmp_path / "hub" / "models--someone--saes"
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(SPARSIFY, repository / "snapshots" / commit / "layers.3")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = (
        "import sparsefeat as sf; "
        f"sae = sf.load_sae('someone/saes', subfolder='layers.3', revision={revision!r}); "
        "print(sae.d_model, sae.config.k, sae.config.hookpoint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "4", "layers.3"]
    missing = code.replace("layers.3", "layers.4", 1)
    done = subprocess.run([sys.executable, "-c", missing], capture_output=True, text=True, env=environment)
    assert "has no SAE in subfolder 'layers.4'" in done.stderr


def test_a_device_that_is_not_here_is_said_before_any_file_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"device is 'warp', which torch cannot use here: pass 'cpu'"):
        load_sae(tmp_path / "nothing", device="warp")


def test_a_config_that_an_editor_on_windows_saved_is_read(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_sae(folder).config.to_json().items() <= json.loads(text).items()
