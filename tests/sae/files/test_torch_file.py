"""What `torch.save` wrote is read without executing it; what declares more than lies in it is refused before it is allocated."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsefeat.sae.files import weights
from sparsefeat.sae.files.stored import Stored, Unreadable
from sparsefeat.sae.files.torch_file import read_torch


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    shared = torch.randn(6, 5)
    return {
        **layer.state_dict(),
        "turned": torch.randn(5, 3).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "half": torch.randn(7).half(),
        "rounded": torch.randn(3, 3).bfloat16(),
        "wide": torch.randn(2, 2).double(),
        "part": shared[2:4, 1:],
        "whole": shared,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "numbers": torch.arange(5),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("nested", [True, False])
def test_every_tensor_is_the_one_that_torch_reads(tmp_path, zipped, nested):
    path = tmp_path / "x.pt"
    saved = {"model": torch.nn.Module().state_dict() | state(), "k": 3, "lr": 0.5} if nested else state()
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    theirs = torch.load(path, weights_only=True)
    with weights(path, inside="model") as held:
        for name, tensor in (theirs["model"] if nested else theirs).items():
            ours = held[name]
            assert (ours.shape, ours.dtype) == (tuple(tensor.shape), tensor.dtype), name
            assert torch.equal(ours.load(), tensor), name
        assert held.around == ({"k": 3, "lr": 0.5} if nested else {})


def test_an_ordered_dict_with_metadata_and_plain_values_is_read(tmp_path):
    saved = {
        "l": [1, 2.5, None, True, {}],
        "t": (1, "a"),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "n": 2**70,
    }
    torch.save(saved, tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt") == saved | {"size": (2, 3)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_tensor_of_more_numbers_than_the_file_has_is_refused(tmp_path, zipped):
    torch.save({"W": torch.zeros(1).expand(30_000, 30_000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.pt declares a tensor of 900000000 numbers of which 1 are in the file"):
        read_torch(tmp_path / "x.pt")


def edited(path: Path, **records: bytes) -> None:
    """Replace records of a file of `torch.save`; two underscores stand for a slash."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(held)).partition("/")[0]
    held |= {f"{root}/{name.replace('__', '/')}": data for name, data in records.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_storage_that_declares_more_than_its_record_holds_is_refused(tmp_path, zipped):
    path = tmp_path / "x.pt"
    torch.save({"W": torch.zeros(300)}, path, _use_new_zipfile_serialization=zipped)
    declared = pickle.BININT2 + struct.pack("<H", 300)
    enlarged = pickle.BININT + struct.pack("<i", 2**30)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            program = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        edited(path, data__pkl=b"")
        with zipfile.ZipFile(path) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in held.items():
                if not name.endswith("/pkl"):
                    archive.writestr(name, program.replace(declared, enlarged) if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(path.read_bytes().replace(declared, enlarged))
    with pytest.raises(ValueError, match=r"x\.pt declares 1073741824 numbers where it holds 1200 bytes"):
        read_torch(path)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(3).to_sparse(), "a sparse tensor"),
        (torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8), "a quantized tensor"),
        (torch.empty(3, device="meta"), "on the meta device"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "dtype that no SAE is stored in"),
        (torch.zeros(3, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        ("text", "str"),
        (7, "int 7"),
        (torch.arange(3), r"torch\.int64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_what_is_no_plain_tensor_is_refused_when_it_is_asked_for_and_not_before(tmp_path, value, what):
    torch.save({"W": value, "b": torch.zeros(2)}, tmp_path / "x.pt")
    with weights(tmp_path / "x.pt", frozenset({"W"})) as held:
        assert torch.equal(held.take({"b": (2,)})["b"], torch.zeros(2))
    with (
        pytest.raises(
            ValueError, match=f"W in .*x.pt is .*{what}.*: a floating tensor of 16 bits or more was expected"
        ),
        weights(tmp_path / "x.pt") as held,
    ):
        held.take({"W": (3,)})


def zipped_program(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return path


BOMBS: dict[str, bytes] = {
    "a byte array": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "a far place in the memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a long string that is not there": b"\x80\x02X\xff\xff\xff\x7f.",
    "a program without an end": b"\x80\x02}",
    "a stack that is empty": b"\x80\x02a.",
    "a mark that is not there": b"\x80\x02e.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a container as a key": b"\x80\x02}]K\x01s.",
    "a tuple in itself": b"\x80\x02" + b")" + b"\x85" * 50_000 + b"K\x01}sR.",
    "many containers": b"\x80\x02" + b"}" * 600_000 + b".",
    "a class": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "frames of a newer protocol": pickle.dumps({"a": 1}, protocol=5),
    "not a pickle": os.urandom(64),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_program_that_is_not_a_list_of_tensors_is_refused(tmp_path, name):
    path = zipped_program(tmp_path / "x.pt", BOMBS[name])
    with pytest.raises(ValueError, match=r"x\.pt"), weights(path):
        pass


def test_compressed_records_are_refused_unread(tmp_path):
    path = zipped_program(tmp_path / "x.pt", b"\x00" * 2**20, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"x\.pt has records that are compressed or encrypted"):
        read_torch(path)


def test_a_table_of_contents_that_is_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"a/{i}", "")
    with pytest.raises(ValueError, match=r"x\.pt is damaged \(a table of contents of \d+ bytes\)"):
        read_torch(tmp_path / "x.pt")


def test_a_module_of_torchscript_is_refused_by_name(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is a TorchScript module, which runs code"):
        read_torch(tmp_path / "x.pt")


def test_a_pickled_class_of_before_1_6_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"could run code when it is opened \(GLOBAL torch.nn.modules.linear.Linear\)"):
        read_torch(tmp_path / "x.pt")


def test_arrays_of_numpy_are_read_and_objects_and_compressed_ones_are_not(tmp_path):
    rng: Any = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype("f4"),
        "b": np.asfortranarray(rng.normal(size=(3, 4))),
        "c": np.float32(3),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    with weights(tmp_path / "x.npz") as held:
        for name, array in arrays.items():
            assert np.array_equal(held[name].load().numpy(), array)
    np.savez(tmp_path / "o.npz", a=np.array([{}], dtype=object))
    with weights(tmp_path / "o.npz") as held:
        assert isinstance(held["a"], Unreadable)
    np.savez_compressed(tmp_path / "z.npz", **arrays)
    with (
        pytest.raises(ValueError, match=r"z\.npz has records that are compressed .* numpy\.savez"),
        weights(tmp_path / "z.npz"),
    ):
        pass


def test_an_array_that_declares_more_than_it_has_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((3, 4), "f4"))
    data = (tmp_path / "x.npz").read_bytes()
    assert b"(3, 4), }     " in data
    (tmp_path / "x.npz").write_bytes(data.replace(b"(3, 4), }     ", b"(3000, 4000), }"[:14]))
    with pytest.raises(ValueError, match=r"x\.npz"), weights(tmp_path / "x.npz"):
        pass


def test_tensors_are_read_when_they_are_taken_and_not_before(tmp_path):
    torch.save({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    assert all(isinstance(value, Stored) for value in found.values())
    assert io.BytesIO((tmp_path / "x.pt").read_bytes())
