"""A store keeps what was appended, whole, whatever happens to its writers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sparsefeat.store import Field, ShardReader, ShardWriter

FIELDS = {"rows": Field(torch.float16, (3,)), "image": Field(torch.int64)}


def example(start: int, stop: int) -> dict[str, Tensor]:
    image = torch.arange(start, stop)
    return {"rows": torch.stack([image, image * 2, -image], 1).half(), "image": image}


def filled(folder: Path, n: int = 103, part: int = 7, **options: int) -> Path:
    with ShardWriter(folder, FIELDS, **{"shard_rows": 20, **options}) as writer:
        for start in range(0, n, part):
            writer.append(example(start, min(n, start + part)), mark=start + part)
    return folder


def test_what_was_appended_is_read_in_order(tmp_path):
    reader = ShardReader(filled(tmp_path / "deep" / "store"))
    assert len(reader) == reader.n_rows == 103
    assert [shard.n_rows for shard in reader.shards] == [21, 21, 21, 21, 19]  # a shard ends between appends
    everything = example(0, 103)
    for name, tensor in everything.items():
        joined = torch.cat([batch[name] for batch in reader.batches(10)])
        assert torch.equal(joined, tensor)
        assert joined.dtype == FIELDS[name].dtype
    assert [len(batch["image"]) for batch in reader.batches(10)] == [10] * 10 + [3]
    assert [len(batch["image"]) for batch in reader.batches(10, drop_last=True)] == [10] * 10
    assert list(next(reader.batches(4, fields=["image"]))) == ["image"]


def test_rows_by_number_in_any_order_and_repeated(tmp_path):
    reader = ShardReader(filled(tmp_path))
    index = torch.tensor([102, 0, 50, 50, 21, 20, 62])
    assert torch.equal(reader.rows(index)["image"], index)
    assert torch.equal(reader.rows(index.tolist(), ["rows"])["rows"], example(0, 103)["rows"][index])
    assert reader.rows([])["rows"].shape == (0, 3)
    for wrong in ([103], [-1]):
        with pytest.raises(IndexError, match="there are 103"):
            reader.rows(wrong)


def test_a_shuffled_epoch_has_every_row_once_and_is_decided_by_seed_and_epoch(tmp_path):
    reader = ShardReader(filled(tmp_path))

    def order(**options: int) -> list[int]:
        return torch.cat([batch["image"] for batch in reader.batches(8, window=2, **options)]).tolist()

    first = order(seed=4)
    assert sorted(first) == list(range(103))
    assert first != list(range(103))
    assert order(seed=4) == first
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in (4, 5) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("seed", [None, 6])
@pytest.mark.parametrize("skip", [0, 1, 5, 11, 12, 40])
def test_skipped_batches_leave_the_rest_as_it_was(tmp_path, seed, skip):
    reader = ShardReader(filled(tmp_path))
    whole = [batch["image"].tolist() for batch in reader.batches(9, seed=seed, epoch=2, window=2)]
    rest = [batch["image"].tolist() for batch in reader.batches(9, seed=seed, epoch=2, window=2, skip=skip)]
    assert rest == whole[skip:]


def test_skipped_windows_are_not_read_and_at_most_one_window_is_held(tmp_path, monkeypatch):
    reader = ShardReader(filled(tmp_path))
    read: list[int] = []
    original = ShardReader.read_shard
    monkeypatch.setattr(ShardReader, "read_shard", lambda self, n, *rest: read.append(n) or original(self, n, *rest))
    next(reader.batches(21, skip=3))
    assert read == [3]
    read.clear()
    next(reader.batches(2, seed=0, window=2))
    assert len(read) == 2


@pytest.mark.parametrize("seed", [None, 3])
def test_parts_have_every_batch_between_them_and_read_nothing_twice(tmp_path, seed, monkeypatch):
    reader = ShardReader(filled(tmp_path))
    whole = [batch["image"].tolist() for batch in reader.batches(9, seed=seed, window=2)]
    read: list[int] = []
    original = ShardReader.read_shard

    def counted(self, *arguments):
        found = original(self, *arguments)
        read.append(len(found["image"]))
        return found

    monkeypatch.setattr(ShardReader, "read_shard", counted)
    parts = [[b["image"].tolist() for b in reader.batches(9, seed=seed, window=2, part=(i, 3))] for i in range(3)]
    assert sum(read) == len(reader)
    assert [sorted(chain(*batch)) for batch in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    skipped = [b["image"].tolist() for b in reader.batches(9, seed=seed, window=2, part=(1, 3), skip=4)]
    assert skipped == parts[1][4:]


def test_several_writers_own_their_shards_and_reading_merges_them(tmp_path):
    writers = [ShardWriter(tmp_path, FIELDS, worker=worker, shard_rows=10) for worker in (0, 1, 2)]
    for start in range(0, 90, 5):
        writers[start // 5 % 3].append(example(start, start + 5))
    for writer in writers:
        writer.close()
    reader = ShardReader(tmp_path)
    assert sorted(reader.rows(range(90))["image"].tolist()) == list(range(90))
    assert {shard.worker for shard in reader.shards} == {0, 1, 2}
    other = filled(tmp_path / "other", 10)
    assert len(ShardReader(tmp_path, other)) == 100


def test_two_writers_with_one_id_are_refused(tmp_path):
    with ShardWriter(tmp_path, FIELDS):
        with pytest.raises(RuntimeError, match="another writer has worker 0"):
            ShardWriter(tmp_path, FIELDS)
        ShardWriter(tmp_path, FIELDS, worker=1).close()
    ShardWriter(tmp_path, FIELDS).close()


def test_a_reopened_writer_goes_on_after_its_last_mark(tmp_path):
    filled(tmp_path, 40, part=8)
    with ShardWriter(tmp_path, FIELDS, shard_rows=20) as writer:
        assert (writer.n_rows, writer.mark) == (40, 40)
        writer.append(example(40, 50), mark={"prompt": 50})
        assert writer.mark == 40  # nothing of it is on disk yet
    with ShardWriter(tmp_path, FIELDS) as writer:
        assert writer.mark == {"prompt": 50}
    assert ShardReader(tmp_path).rows(range(50))["image"].tolist() == list(range(50))


def test_what_was_appended_is_written_even_if_the_caller_reuses_the_tensor(tmp_path):
    with ShardWriter(tmp_path, FIELDS) as writer:
        rows = example(0, 5)
        writer.append(rows)
        rows["image"].zero_()
    assert ShardReader(tmp_path).rows(range(5))["image"].tolist() == [0, 1, 2, 3, 4]


WRITE_FOREVER = """
import sys, torch
from sparsefeat.store import Field, ShardWriter
writer = ShardWriter(sys.argv[1], {"rows": Field(torch.float32, (256,)), "image": Field(torch.int64)}, shard_rows=64)
start = writer.mark or 0
while True:
    image = torch.arange(start, start + 16)
    writer.append({"rows": image[:, None].float().expand(16, 256), "image": image}, mark=start + 16)
    start += 16
"""


def test_a_killed_writer_loses_at_most_the_shard_in_hand_and_resumes(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        before = len(list(tmp_path.glob("*.safetensors")))
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], env=environment)
        deadline = time.monotonic() + 600
        while len(list(tmp_path.glob("*.safetensors"))) < before + 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader = ShardReader(tmp_path)
        for shard in reader.shards:
            with safe_open(shard.path, "pt") as file:
                assert set(file.keys()) == {"rows", "image"}
                assert file.get_slice("rows").get_shape() == [64, 256]
    # Two lives of the writer: every row up to the last shard, once, in order, and right.
    rows = reader.rows(range(len(reader)))
    assert rows["image"].tolist() == list(range(len(reader)))
    assert torch.equal(rows["rows"], rows["image"][:, None].float().expand(-1, 256))
    (tmp_path / "w0000-999999-64.partial").write_bytes(b"half a shard")
    with ShardWriter(tmp_path, {"rows": Field(torch.float32, (256,)), "image": Field(torch.int64)}) as writer:
        assert writer.mark == writer.n_rows == len(reader)
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_no_partial_file_and_keeps_what_was_safe(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, FIELDS, shard_rows=10)
    writer.append(example(0, 10), mark=10)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsefeat.store.shards.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*rows up to mark 10 are safe"):
        writer.append(example(10, 20), mark=20)
    monkeypatch.undo()
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name[0] == "w") == [".safetensors"]
    writer.close()  # space was made: what was buffered is written
    assert ShardReader(tmp_path).rows(range(20))["image"].tolist() == list(range(20))


def test_another_schema_or_metadata_is_refused(tmp_path):
    ShardWriter(tmp_path, FIELDS, metadata={"hookpoint": "mid"}).close()
    with pytest.raises(ValueError, match="store with other fields"):
        ShardWriter(
            tmp_path, {"rows": Field(torch.float16, (4,)), "image": Field(torch.int64)}, metadata={"hookpoint": "mid"}
        )
    with pytest.raises(ValueError, match="store with other fields"):
        ShardWriter(tmp_path, {"rows": FIELDS["rows"]}, metadata={"hookpoint": "mid"})
    with pytest.raises(ValueError, match="store with other metadata"):
        ShardWriter(tmp_path, FIELDS, metadata={"hookpoint": "up"})
    assert ShardReader(tmp_path).metadata == {"hookpoint": "mid"}
    (tmp_path / "b").mkdir()
    ShardWriter(tmp_path / "b", {"rows": FIELDS["rows"]}).close()
    with pytest.raises(ValueError, match="has other fields than"):
        ShardReader(tmp_path, tmp_path / "b")


def test_a_wrong_append_is_refused_by_field_and_leaves_the_store_usable(tmp_path):
    with ShardWriter(tmp_path, FIELDS) as writer:
        good = example(0, 4)
        with pytest.raises(ValueError, match=r"append got fields \['rows'\]: this store has \['image', 'rows'\]"):
            writer.append({"rows": good["rows"]})
        with pytest.raises(ValueError, match="different numbers of rows"):
            writer.append(good | {"image": torch.arange(3)})
        with pytest.raises(ValueError, match=r"field 'rows' got torch\.float32 .*it holds torch\.float16 \[n, 3\]"):
            writer.append(good | {"rows": good["rows"].float()})
        with pytest.raises(ValueError, match="field 'rows' got"):
            writer.append(good | {"rows": good["rows"][:, :2]})
        with pytest.raises(TypeError, match="JSON"):
            writer.append(good, mark=object())
        writer.append(good)
    assert len(ShardReader(tmp_path)) == 4
    with pytest.raises(ValueError, match="is closed: open a new one"):
        writer.append(example(0, 70_000))


def test_a_folder_that_is_no_store_or_cannot_be_written_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a store, it has no manifest\.json"):
        ShardReader(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a store"):
        ShardReader(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write into .*choose another folder"):
        ShardWriter(tmp_path / "file" / "store", FIELDS)
    none, newer = r"is no manifest of sparsefeat\.store version 1", "is of version 9 of .* reads version 1: upgrade it"
    for content, said in (
        ("{", none),
        ("[]", none),
        (json.dumps({"format": "other", "format_version": 1}), none),
        (json.dumps({"format": "sparsefeat.store", "format_version": 9}), newer),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            ShardReader(tmp_path)
    filled(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has shards but no manifest\.json"):
        ShardWriter(tmp_path / "store", FIELDS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write into"):
        ShardWriter(tmp_path / "store", FIELDS)


def test_a_damaged_shard_is_named(tmp_path):
    reader = ShardReader(filled(tmp_path))
    path = reader.shards[1].path
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(OSError, match=r"w0000-000001-21\.safetensors cannot be read .*copy it again"):
        reader.rows([25])
    assert reader.rows([3])["image"].tolist() == [3]
    os.rename(reader.shards[0].path, tmp_path / "w0000-000001-21.safetensors")
    path.rename(tmp_path / "w0000-000000-22.safetensors")
    with pytest.raises(ValueError, match="not what its name and the manifest say"):
        ShardReader(tmp_path).rows([0])


def test_what_users_get_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match="fields is empty"):
        ShardWriter(tmp_path, {})
    with pytest.raises(ValueError, match="worker is -1"):
        ShardWriter(tmp_path, FIELDS, worker=-1)
    with pytest.raises(ValueError, match=r"dtype is torch\.complex64"):
        Field(torch.complex64)
    with pytest.raises(ValueError, match="metadata cannot be JSON"):
        ShardWriter(tmp_path, FIELDS, metadata={"a": {1, 2}})
    with pytest.raises(ValueError, match="at least one folder"):
        ShardReader()
    reader = ShardReader(filled(tmp_path))
    with pytest.raises(ValueError, match=r"fields \['row'\] are not in"):
        reader.rows([0], ["row"])
    with pytest.raises(ValueError, match="batch_size 0"):
        next(reader.batches(0))


def test_what_may_not_be_read_is_told_so_and_nothing_is_to_be_copied_again(tmp_path):
    """In a process without root's right to read everything, where this one has it."""
    with ShardWriter(tmp_path / "store", {"rows": Field(torch.float32, (3,))}) as writer:
        writer.append({"rows": torch.ones(5, 3)}, mark=1)
    program = (
        "from sparsefeat.store import ShardReader, last_marks\n"
        "for attempt in (lambda: ShardReader('store').read_shard(0), lambda: last_marks('store')):\n"
        "    try: attempt()\n"
        "    except PermissionError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program]
    if os.geteuid() == 0:
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and there is no setpriv to give that up")
    for name in ("w0000-000000-5.safetensors", "manifest.json"):
        (tmp_path / "store" / name).chmod(0)
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said == [f"store/{name} may not be read (Permission denied): make it readable, chmod u+r"] * 2
        (tmp_path / "store" / name).chmod(0o600)
