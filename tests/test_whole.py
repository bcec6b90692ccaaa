"""A folder is there whole or not at all: refused at the beginning, killed in between, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsefeat.assets import block_sae_folder
from sparsefeat.whole import check_writable, whole_folder, write_json


def write(folder: Path, text: str = "1", error: BaseException | None = None, **options: str) -> None:
    with whole_folder(folder, **options) as unfinished:
        (unfinished / "mark").write_text(text)
        if error is not None:
            raise error


def test_nothing_has_the_name_until_everything_is_written(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "mark").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "mark").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_work_that_fails_leaves_nothing_not_even_the_parents(tmp_path, error):
    with pytest.raises(type(error)):
        write(tmp_path / "a" / "b", error=error)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used_and_anything_else_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "dangling"):
        with pytest.raises(FileExistsError, match=rf"^--out .*{name} exists already; choose another folder$"):
            write(tmp_path / name, "2", name="--out")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "empty" / "mark").read_text() == "1"


def test_only_one_of_ours_is_replaced_and_stands_when_the_new_one_fails(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "ours", text, replace="mark")
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "ours", "newer", ZeroDivisionError(), replace="mark")
    assert (tmp_path / "ours" / "mark").read_text() == "new"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").touch()
    with pytest.raises(FileExistsError):
        write(tmp_path / "theirs", replace="mark")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_place_made_meanwhile_by_somebody_else_is_left_alone(tmp_path):
    def meanwhile() -> None:
        with whole_folder(tmp_path / "place"):
            (tmp_path / "place").mkdir()
            (tmp_path / "place" / "theirs").touch()

    with pytest.raises(FileExistsError, match="exists already"):
        meanwhile()
    assert [path.name for path in tmp_path.rglob("*")] == ["place", "theirs"]


def test_a_killed_run_leaves_nothing_of_that_name_and_the_next_one_works(tmp_path):
    code = (
        "import os, signal; from sparsefeat.whole import whole_folder\n"
        "with whole_folder('place') as unfinished:\n"
        "    (unfinished / 'mark').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "place").exists()
    write(tmp_path / "place")
    assert (tmp_path / "place" / "mark").read_text() == "1"


@pytest.mark.parametrize("below", ["file/page", "file/deeper/page"])
def test_a_place_below_a_file_is_refused_in_one_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot be made, .*file is a file; choose another place"):
        check_writable(tmp_path / below)


def test_a_place_that_may_not_be_written_is_refused_in_one_sentence():
    with pytest.raises(OSError, match=r"^--out /proc/page cannot be made \(.*\); choose another place$"):
        check_writable("/proc/page", "--out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors'
        RuntimeError(
            "[enforce fail at inline_container.cc:664] . unexpected pos; PytorchStreamWriter failed writing file"
        ),
    ],
)
def test_a_full_disk_is_told_in_one_sentence_whoever_noticed_it(tmp_path, error):
    with pytest.raises(
        OSError, match=r"could not be written \(the disk is full\), and nothing of it was kept; make room"
    ):
        write(tmp_path / "place", error=error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sae convert {sae} out", "features 'an emoji of a fox' --steps 1 --out out"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(tmp_path, command):
    """A limit on the size of files stands for the full disk: both are met with while a file is written."""
    shell = f"ulimit -f 8; {sys.executable} -m sparsefeat.cli {command.format(sae=block_sae_folder())}"
    run = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1].endswith("and nothing of it was kept; make room, or choose another disk")
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for_not_of_its_parts(tmp_path):
    def save_a_part() -> None:
        with whole_folder(tmp_path / "place", "--save") as unfinished, whole_folder(unfinished / "sae"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"^--save .*/place could not be written \(the disk is full\), and nothing"):
        save_a_part()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_the_one_of_two_folders_that_was_being_written(tmp_path):
    def save_beside() -> None:
        with whole_folder(tmp_path / "out", "--out"), whole_folder(tmp_path / "fit", "--save"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"^--save .*/fit could not be written"):
        save_beside()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["steer", "statistics", "sae"])
def test_what_is_saved_on_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, what):
    """As above, by a limit on the size of files."""
    code = f"""
import torch, sparsefeat as sf
sae = sf.SAE(sf.SAEConfig(d_model=64, n_latents=2000, k=4, hookpoint="unet.mid_block"))
saved = dict(steer=sf.Steer(sae, add={{1: 1.0}}), statistics=sf.Statistics(["a", "b"], 20000, [1.0, 2.0]), sae=sae)
try:
    saved[{what!r}].save("place")
except OSError as error:
    print(error)
"""
    shell = f'ulimit -f 8; {sys.executable} -c "$CODE"'
    run = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"CODE": code}
    )
    assert run.stdout.startswith("folder place could not be written ("), run.stderr
    assert len(run.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_work_itself_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model"):
        write(tmp_path / "place", error=FileNotFoundError(errno.ENOENT, "no model", "/models/none"))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "results.json"
    write_json(path, {"one": 1})
    with pytest.raises(TypeError):
        write_json(path, {"one": object()})
    assert json.loads(path.read_text()) == {"one": 1}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
