"""The tensors of a checkpoint: their names, shapes and dtypes before any is read, and a refusal of what is not understood."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefeat.sae.files.asked import Asked, listed
from sparsefeat.sae.files.npz_file import read_npz
from sparsefeat.sae.files.stored import Stored, Unreadable
from sparsefeat.sae.files.torch_file import read_torch
from sparsefeat.sae.files.untrusted import first_line, must_be_file, say, shown

# The floating dtypes an SAE may be stored in, by safetensors' names.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
WHOLE |= {"BOOL": torch.bool}
LARGEST_HEADER = 2**22  # bytes of a safetensors header; about 100 a tensor
# What wrapping an SAE puts before the names of its tensors, and means nothing: torch.compile and data parallelism.
COMPILED, WRAPPED = "_orig_mod.", "module."
# Counters and statistics of a training, of any format: no encoder or decoder uses them.
HARMLESS = listed(
    "stats_last_nonzero num_batches_tracked steps_since_active n_forward_passes_since_fired "
    "num_tokens_since_fired activated_in feature_density latents_activation_frequency latents_mean_square"
)


class Weights(Asked):
    """What one file holds, by name: tensors are read when they are taken, and not before their shape was checked."""

    def __init__(self, path: Path, values: Mapping[str, Any], around: Mapping[str, Any] | None = None) -> None:
        """around: what lies beside the state dict in a file that holds more."""
        super().__init__(values)
        self.path: Path = path
        self.around: dict[str, Any] = dict(around or {})

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None where there is none of that name."""
        found = self.get(name)
        return found.shape if isinstance(found, Stored) else None

    def take(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """These tensors, of floating numbers; all are checked before one is read."""
        missing = sorted(set(shapes) - set(self.plain))
        if missing:
            raise ValueError(
                f"{self.path} lacks {shown_list(missing)} (it has {shown_names(self)}): it was not written for this config"
            )
        for name, shape in shapes.items():
            found = self[name]
            if not isinstance(found, Stored) or found.dtype not in FLOATING.values():
                raise ValueError(
                    f"{name} in {self.path} is {_kind(found)}: a floating tensor of 16 bits or more was "
                    "expected, float32 for instance"
                )
            if found.shape != tuple(shape):
                raise ValueError(
                    f"{name} in {self.path} has shape {list(found.shape)}, {list(shape)} was expected: the files do not "
                    "belong together"
                )
        return {name: self[name].load() for name in shapes}

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix that must be there."""
        shape = self.shape(name)
        if shape is None or len(shape) != 2:
            raise ValueError(
                f"{self.path} has no {name} of two dimensions (it has {shown_names(self)}): it is another kind of file"
            )
        return shape[0], shape[1]

    def number(self, name: str, absent: int | None = None) -> int:
        """A whole number, stored as such or as a tensor of one."""
        found = self.get(name, absent)
        if isinstance(found, Stored) and found.shape in ((), (1,)) and found.dtype in WHOLE.values():
            found = int(found.load())
        if isinstance(found, bool) or not isinstance(found, int):
            raise ValueError(f"{name} in {self.path} is {_kind(found)}: a whole number was expected")
        return found

    def whole_numbers(self, name: str) -> Tensor | None:
        """A tensor of whole numbers, None where there is none."""
        found = self.get(name)
        return found.load() if isinstance(found, Stored) and found.dtype in WHOLE.values() else None

    def check(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse what nobody asked for: a variant with one parameter more is another SAE."""
        unknown = sorted(
            name
            for name in self.left()
            if name not in harmless and name.rpartition(".")[2] not in HARMLESS and self.plain[name] is not None
        )
        if unknown:
            raise ValueError(
                f"{self.path} has {', '.join(name[:60] for name in unknown[:8])}, which this format's SAEs do not have: it is another kind, read "
                "it with the program that wrote it"
            )


def shown_names(values: Mapping[Any, Any]) -> str:
    names = sorted(map(str, values))
    return shown_list(names)


def shown_list(names: list[str]) -> str:
    return f"{[name[:60] for name in names[:12]]}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _kind(found: object) -> str:
    if isinstance(found, Unreadable):
        return found.what
    if isinstance(found, Stored):
        return str(found.dtype)
    return f"{type(found).__name__} {shown(found)}" if isinstance(found, (int, float)) else type(found).__name__


@contextlib.contextmanager
def weights(
    path: Path, harmless: frozenset[str] = frozenset(), inside: str | None = None, alone: str | None = None
) -> Iterator[Weights]:
    """What a file of tensors holds, for a reader; what it did not ask for when it is done is refused.

    harmless: names beside `HARMLESS` that may be passed over; inside: the key under which a state dict may lie in the
    file; alone: what to call the tensor of a file that holds one and no names.
    """
    found = read_weights(path)
    held = Weights(path, {alone: found}) if alone is not None else _of(path, found, inside)
    yield held
    held.check(harmless)


def read_weights(path: Path) -> Any:
    """What the file holds, as it is nested there, its tensors unread."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return read_npz(path) if path.suffix == ".npz" else read_torch(path)


def names_in(path: Path) -> frozenset[str]:
    """The names in a file, to tell its format by; none where it cannot be read."""
    try:
        held = read_weights(path)
        return frozenset(_unwrapped(held)[0]) if isinstance(held, Mapping) else frozenset()
    except (ValueError, OSError):
        return frozenset()


def shape_in(path: Path, name: str) -> tuple[int, ...] | None:
    """Of a tensor in a file, to tell its format by; None where there is none or the file cannot be read."""
    try:
        held = read_weights(path)
    except (ValueError, OSError):
        return None
    found = _unwrapped(held)[0].get(name) if isinstance(held, Mapping) else None
    return found.shape if isinstance(found, Stored) else None


def _of(path: Path, held: Any, inside: str | None) -> Weights:
    around: Mapping[str, Any] = {}
    if isinstance(held, Mapping) and inside is not None and isinstance(held.get(inside), Mapping):
        around = {str(name): value for name, value in held.items() if name != inside}
        held = held[inside]
    if not isinstance(held, Mapping):
        raise ValueError(
            f"{path} holds a {_kind(held) if isinstance(held, Stored) else type(held).__name__}: a state dict was expected"
        )
    named, taken = _unwrapped(held)
    if len(named) != len(held):
        raise ValueError(f"{path} has the same names with and without {taken!r}: save the state dict of one model")
    if taken:
        say(path, f"{taken!r}, which a wrapped or compiled model puts before its names, was taken off them")
    return Weights(path, named, around)


def _unwrapped(held: Mapping[Any, Any]) -> tuple[dict[str, Any], str]:
    names = [str(name) for name in held]
    taken = COMPILED if any(COMPILED in name for name in names) else ""
    bare = [name.replace(COMPILED, "") for name in names]
    if bare and all(name.startswith(WRAPPED) for name in bare):
        bare, taken = [name.removeprefix(WRAPPED) for name in bare], WRAPPED + taken
    return dict(zip(bare, held.values(), strict=True)), taken


def _safetensors(path: Path) -> dict[str, Any]:
    size = must_be_file(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) == 8 and LARGEST_HEADER < struct.unpack("<Q", start)[0] <= size:
        raise ValueError(f"{path} has a header of more than {LARGEST_HEADER} bytes: copy or download it again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: _stored(path, name, entry) for name, entry in slices.items()}
    except SafetensorError as error:
        reason = "is cut short" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise ValueError(f"{path} {reason} ({first_line(error)}): copy or download it again") from None


def _stored(path: Path, name: str, entry: Any) -> Stored | Unreadable:
    dtype = (FLOATING | WHOLE).get(entry.get_dtype())
    if dtype is None:
        return Unreadable(f"of dtype {entry.get_dtype()}")

    def load() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return Stored(tuple(entry.get_shape()), dtype, load)
