"""Every file is asked first what it is; what ends a reading is one sentence with the path."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.files import described, names_in, read_json, read_yaml, reading, shown, weights
from tests.sae.formats.expected import FIXTURES, copied, made_by

FILES = sorted(
    (case, file.name)
    for case in {path.parent for path in FIXTURES.glob("*/*/expected.safetensors")}
    for file in case.iterdir()
    if file.is_file() and file.name not in ("expected.safetensors", "made_by.json", "sae_lens.safetensors")
)
ONE_OF_EACH = list({(case.parent.name, name): (case, name) for case, name in FILES}.values())


@pytest.fixture
def alarm():
    """A reading that waits for a pipe fails the test and not the run."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize(("case", "name"), ONE_OF_EACH, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "pointer", "annex", "page", "empty"])
def test_what_lies_in_a_files_place_is_called_what_it_is(tmp_path, alarm, case, name, kind):
    place = copied(case, tmp_path)
    file = place / name
    file.unlink()
    words = {"pipe": "a pipe or a device", "device": "a pipe or a device", "folder": "a folder", "pointer": "Git LFS"}
    words |= {"annex": "git-annex", "page": "HTML", "empty": str(tmp_path)}
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        texts = {"pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "empty": ""}
        texts |= {"annex": "/annex/objects/SHA256E-s1--00.pt\n", "page": "<!DOCTYPE html>\n<html></html>"}
        file.write_text(texts[kind])
    made = made_by(case)
    if made.get("file") == name and kind in ("pipe", "device", "folder"):
        return  # a single file is told by being one: there is nothing to open
    with pytest.raises((ValueError, OSError)) as said:
        load_sae(place / made["file"] if made.get("file") else place, k=made.get("k"))
    assert words[kind] in str(said.value)
    assert str(tmp_path) in str(said.value)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RecursionError(), MemoryError(), RuntimeError("a\nb"), TypeError("t"), OverflowError("big")],
)
def test_whatever_fails_ends_in_one_sentence_with_the_path(error):
    with (
        pytest.raises(ValueError, match=r"/some/place is damaged or was not made by this") as said,
        reading(Path("/some/place")),
    ):
        raise error
    assert "\n" not in str(said.value)


def test_an_error_of_the_system_stays_one():
    with pytest.raises(PermissionError if False else OSError, match="/some/place"), reading(Path("/some/place")):
        raise PermissionError(13, "Permission denied", "x")


def test_what_a_file_made_of_aliases_is_shown_short():
    value: list[object] = ["lol"] * 9
    for _ in range(12):
        value = [value] * 9
    assert len(shown(value)) < 300


def test_configs_are_bounded(tmp_path):
    path = tmp_path / "config.json"
    for content, words in [
        ('{"a":' + "[" * 10**6 + "]" * 10**6 + "}", "nested too deep"),
        ('{"a":' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"a": "' + "x" * 5 * 2**20 + '"}', "too much for a config"),
        ("[]", "holds a list"),
        ("\x00", "not valid JSON"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json .*{words}"):
            read_json(path)
    path = tmp_path / "metadata.yaml"
    merged = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 28))
    for content, words in [
        (merged, "aliases"),
        ("a: &a [1, 2]\nb: *a\n", "aliases"),
        ("k: " + "[" * 10**4 + "]" * 10**4, "not plain YAML"),
        ("x: 2020-99-99\n", "not plain YAML"),
        ("!!python/object/apply:os.system [true]", "not plain YAML"),
        ("a: " + "x" * 2**19, "too much for a config"),
        ("1: 2", "names and values"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"metadata\.yaml .*{words}"):
            read_yaml(path)


def test_a_header_of_safetensors_is_bounded(tmp_path):
    header = b"{" + b" " * (2**22 + 8) + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with (
        pytest.raises(ValueError, match=r"x\.safetensors has a header of more than"),
        weights(tmp_path / "x.safetensors"),
    ):
        pass
    assert not names_in(tmp_path / "x.safetensors")


def test_prefixes_of_wrapped_models_are_taken_off_and_said(tmp_path):
    path = tmp_path / "x.safetensors"
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        save_file({f"{prefix}encoder.weight": torch.ones(2), f"{prefix}module.bias": torch.zeros(2)}, path)
        with pytest.warns(UserWarning, match=f"'{prefix}', which a wrapped or compiled model"), weights(path) as held:
            assert set(held.take({"encoder.weight": (2,), "module.bias": (2,)})) == {"encoder.weight", "module.bias"}
    save_file({"encoder._orig_mod.weight": torch.ones(2), "module.bias": torch.zeros(2)}, path)
    with pytest.warns(UserWarning, match="'_orig_mod.'"), weights(path) as held:
        assert set(held.take({"encoder.weight": (2,), "module.bias": (2,)})) == {"encoder.weight", "module.bias"}
    save_file({"_orig_mod.a": torch.ones(2), "a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="the same names with and without"), weights(path):
        pass


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("normalize_io", True, True),
        ("matching_pursuit", True, True),
        ("input_scale", 2.0, True),
        ("activation_function", "gelu", True),
        ("second_decoder", {"a": 1}, True),
        ("normalize_io", False, False),
        ("input_scale", None, False),
        ("learning_rate", 1e-4, False),
        ("wandb_project", "x", False),
        ("n_batches", 5, False),
    ],
)
def test_a_key_nobody_asked_for_is_refused_if_it_can_matter(tmp_path, key, value, refused):
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({"d": 3, key: value}))
    if refused:
        with pytest.raises(ValueError, match=rf"cfg\.json says {key} .*not understood"), described(path) as values:
            assert values["d"] == 3
    else:
        with described(path) as values:
            assert values["d"] == 3
