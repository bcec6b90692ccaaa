"""Files of every format, damaged at random: each is read, or refused in one sentence, within the memory it may take.

    python -m tests.sae.fuzzing --seconds 600 [--seed 7]

A variant is a fixture with one of its files changed: bytes flipped, cut short, declared sizes replaced, keys of its
config replaced, or another kind of file in its place. Whatever comes of it, `load_sae` gives an SAE or raises a
ValueError or OSError of one line with the path, and takes no more memory than twice the files, the SAE and SLACK.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparsefeat.sae import Names, load_sae
from tests.sae.dense import CASES, NORMALIZERS, random_sae
from tests.sae.formats.expected import FIXTURES, copied, made_by, opened

SLACK = 24 * 2**20  # what the interpreter and the allocator take and give back as they please
PICKLED = (".pt", ".pth", ".bin")
LONGEST = 1500  # characters of a refusal
NUMBERS = [0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 10**30, 1.5, True, None, "7", [], {}, [2], "x" * 5000]


def cases() -> list[Path]:
    return sorted(path.parent for path in FIXTURES.glob("*/*/expected.safetensors"))


def native_cases(folder: Path) -> list[Path]:
    """sparsefeat's own format, which has no fixtures: one SAE of every kind, saved into `folder`."""
    found = []
    for number, ((activation, inference), normalizer) in enumerate(
        zip(CASES, itertools.cycle(NORMALIZERS), strict=False)
    ):
        sae = random_sae(activation, inference, normalizer, statistics=("mean_nonzero",), metadata={"of": "a run"})
        sae.names = Names({3: "fox"})
        found.append(sae.save(folder / "sparsefeat" / str(number)))
        (found[-1] / "made_by.json").write_text("{}")
    return found


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(min(len(changed), rng.choice([64, 4096, len(changed)])))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if rng.random() < 0.8 else data + data[: rng.randrange(len(data))]


def resized(data: bytes, rng: random.Random) -> bytes:
    """Another number where one is declared: a digit of a text or header, or 2, 4 or 8 bytes of a binary field."""
    changed = bytearray(data)
    digits = [i for i, byte in enumerate(data[:8192]) if 48 <= byte <= 57]
    if digits and rng.random() < 0.5:
        for at in rng.sample(digits, min(len(digits), rng.choice([1, 2, 6]))):
            changed[at] = rng.choice(b"0123456789")
        return bytes(changed)
    size, code = rng.choice([(2, "<H"), (4, "<I"), (8, "<Q")])
    at = rng.randrange(max(1, len(data) - size))
    most = 256**size - 1
    changed[at : at + size] = struct.pack(code, rng.choice([0, 1, most, most // 2, most // 3, 2 ** (8 * size - 4)]))
    return bytes(changed)


def replaced(data: bytes, rng: random.Random) -> bytes:
    """A key of a config, at any depth; another kind of file where there is no config."""
    try:
        values = json.loads(data)
    except ValueError:
        return rng.choice(
            [b"", b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x05\x06"]
        )
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(values)
    for _ in range(rng.choice([1, 2])):
        where, key = rng.choice(places)
        where[key] = rng.choice(NUMBERS)
    return json.dumps(values).encode()


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, resized, replaced)


def variants(seed: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """For ever: a name, a folder or file that is gone when the next is asked for, and options of `load_sae`."""
    rng = random.Random(seed)
    native = tempfile.TemporaryDirectory()
    found = [*cases(), *native_cases(Path(native.name))]
    while True:
        for case in found:
            with tempfile.TemporaryDirectory() as temporary:
                place = copied(case, Path(temporary))
                files = sorted(path for path in place.rglob("*") if path.is_file() and "tree" not in path.parts)
                file, change = rng.choice(files), rng.choice(CHANGES)
                if file.suffix in PICKLED and rng.random() < 0.3:
                    state = torch.load(file, weights_only=True)
                    torch.save(state, file, _use_new_zipfile_serialization=False)  # as before torch 1.6
                file.write_bytes(change(file.read_bytes(), rng))
                made = made_by(case)
                asked = place / made["file"] if made.get("file") else place
                yield f"{case.parent.name}/{case.name}/{file.name} {change.__name__}", asked, {"k": made.get("k")}


def warm_up() -> None:
    """What a first call of the maths takes belongs to no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases():
            opened(case)


def peak() -> int:
    """The most bytes that were resident since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def try_one(name: str, place: Path, options: dict[str, Any]) -> str | None:
    """What is wrong with how `load_sae` took it, if anything is."""
    around = place if place.is_dir() else place.parent
    files = sum(path.stat().st_size for path in around.rglob("*") if path.is_file())
    forget_peak()
    before = peak()
    size = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = load_sae(place, **options)
        size = sum(tensor.nbytes for tensor in sae.state_dict().values())
    except (ValueError, OSError) as error:
        said = str(error)
        if str(around) not in said:
            return f"{name}: {said!r} does not name the path"
        if "\n" in said or len(said) > LONGEST:
            return f"{name}: {said[:300]!r} is not one sentence"
    except BaseException as error:
        return f"{name}: {type(error).__name__}: {error}"
    grown = peak() - before
    if grown > 2 * files + size + SLACK:
        return f"{name}: memory grew by {grown} bytes for {files} of files and an SAE of {size}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    warm_up()
    end, tried, wrong = time.monotonic() + given.seconds, 0, []
    for name, place, options in variants(given.seed):
        kept = shutil.copytree(place if place.is_dir() else place.parent, tempfile.mkdtemp() + "/kept")
        problem = try_one(name, place, options)
        tried += 1
        if problem:
            wrong.append(problem)
            print(f"{problem} (kept in {kept})", flush=True)
        else:
            shutil.rmtree(Path(kept).parent)
        if time.monotonic() > end:
            break
    print(f"{tried} files tried with seed {given.seed}, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
