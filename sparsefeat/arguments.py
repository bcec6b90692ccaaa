"""What a caller gives, checked where it enters: a NaN that passes here is a black image minutes later, without a word.

Each function returns what it was given in the form that is wanted, or raises ValueError with the argument's name, its
value and what to give.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


class NotThere(KeyError):
    """What was looked up is not there. A KeyError, whose sentence is printed as it is and not in quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


# What a mask may be beyond 0 and 1: it was resized or averaged in half precision.
ROUNDING = 1e-2


def number(name: str, given: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number from `low` to `high`, which 32 bits hold; `above`: larger than `low`."""
    try:
        value = math.nan if isinstance(given, (str, bytes, bool)) else float(given)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        value = math.nan
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise ValueError(f"{name}={given!r} must be {_wanted('a finite number', low, high, above)}.")
    if abs(value) > LARGEST:
        raise ValueError(
            f"{name}={given!r} is infinite in 32 bits, which pipelines calculate with; give a smaller number."
        )
    return value


def whole(name: str, given: Any, low: int = 1, high: float = math.inf) -> int:
    """An integer from `low` to `high`, of Python, numpy or torch."""
    try:
        value = None if isinstance(given, bool) else operator.index(given)
    except (TypeError, ValueError):
        value = None
    if value is None or not low <= value <= high:
        raise ValueError(f"{name}={given!r} must be {_wanted('a whole number', low, high)}.")
    return value


def truth(name: str, given: Any) -> bool:
    """True or False: any text is true to Python, "no" too."""
    if not isinstance(given, bool):
        raise ValueError(f"{name}={given!r:.80} must be True or False.")
    return given


def latent_number(name: str, given: Any, n_latents: int) -> int:
    """The number of a latent."""
    no_entry(name, given)
    if isinstance(given, bool) or not hasattr(given, "__index__") or not 0 <= given < n_latents:
        raise ValueError(f"{name}={given!s:.80} is out of range; this SAE has {n_latents} latents, counted from 0.")
    return operator.index(given)


def no_entry(name: str, given: Any) -> None:
    """Refuse a line of what `top`, `search` or `latents` list in the place of its number, which it has as `.latent`."""
    if hasattr(given, "latent"):
        raise ValueError(
            f"{name} is {type(given).__name__}(latent={given.latent}, …), a line of a list; give its number, .latent."
        )


def wholes(name: str, given: Any, low: int = 0, high: float = math.inf) -> list[int]:
    """A list of integers from `low` to `high`; a tensor of one dimension is one."""
    numbers = None
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        with contextlib.suppress(TypeError, ValueError):  # TypeError: of a tensor without dimensions
            numbers = [whole(name, one, low, high) for one in given]
    if not numbers:
        raise ValueError(
            f"{name}={given!r:.80} must be a list, not empty, {_wanted('each a whole number', low, high)}."
        )
    return numbers


def sides(name: str, given: Any) -> tuple[int, int]:
    """(height, width)."""
    try:
        height, width = wholes(name, given, 1)
    except ValueError:
        raise ValueError(f"{name}={given!r:.80} must be (height, width), two whole numbers of at least 1.") from None
    return height, width


def mapping(name: str, given: Any, what: str) -> Mapping[Any, Any]:
    """A mapping; `what` it maps: "steps to heights"."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r:.80} must map {what}.")
    return given


def _wanted(what: str, low: float, high: float, above: bool = False) -> str:
    if high < math.inf:
        return f"{what} from {low:,g} to {high:,g}"
    if low > -math.inf:
        return f"{what} {'above' if above else 'of at least'} {low:,g}"
    return what


def finite(name: str, given: Tensor, *, unbounded: bool = False) -> Tensor:
    """The tensor itself, if no entry is NaN or infinite (`unbounded`: if none is NaN, as an infinite bound is no bound).

    Integers are; one without data (meta) cannot be looked at.
    """
    if not given.is_floating_point() or given.is_meta or not given.numel():
        return given
    # One pass, no tensor of booleans; a sum of finite numbers can overflow, which a second look tells apart.
    if given.detach().sum(dtype=torch.promote_types(given.dtype, torch.float32)).isfinite():
        return given
    bad = given.detach().isnan() if unbounded else ~given.detach().isfinite()
    if bad.any():
        what, first = "NaN" if unbounded else "NaN or infinity", bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {what}, {int(bad.sum())} of {given.numel()} entries, the first at {first}; give finite numbers."
        )
    return given


def kept(name: str, given: Tensor) -> Tensor:
    """The `finite` tensor to keep: a copy, as the caller may go on writing into theirs; one that is being trained is itself."""
    finite(name, given)
    return given if given.requires_grad else given.clone()


def finite_in(name: str, given: Any) -> None:
    """Refuse a number that is NaN or infinite, a tensor or array that holds one, and a list or dict of such."""
    if isinstance(given, float):
        number(name, given)
    elif isinstance(given, Tensor):
        finite(name, given)
    elif isinstance(given, np.ndarray) and given.dtype.kind == "f":
        finite(name, torch.from_numpy(np.ascontiguousarray(given)))
    elif isinstance(given, (list, tuple)):
        for i, entry in enumerate(given):
            finite_in(f"{name}[{i}]", entry)
    elif isinstance(given, Mapping):
        for key, entry in given.items():
            finite_in(f"{name}[{key!r}]", entry)


def on_the_cpu_by_default() -> None:
    """Refuse another default device of torch's: what is counted and kept here is made on the CPU, beside the device's tensors."""
    device = torch.get_default_device()
    if device.type != "cpu":
        raise RuntimeError(
            f"torch's default device is {device}, and what is kept here is on the CPU; torch.set_default_device('cpu'), or "
            f"leave the `with torch.device` block, and move to {device} by .to() what should be there"
        )


def taking_gradients(who: str) -> torch.enable_grad:
    """`torch.enable_grad()`, refused where it would enable nothing: gradients would be none, or zero without a word."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{who} takes gradients, which torch.inference_mode() forbids; leave it out.")
    return torch.enable_grad()


def image_map(name: str, given: Any) -> Tensor:
    """A map over the image, [height, width] for all images or [images, height, width], in fp32 (fp64 stays).

    Taken: tensors, arrays, nested lists, booleans (0 and 1) and PIL images in black and white or grey, whose white is 1.
    """
    for kind, remedy in (("scaled", ".scaled()"), ("word", "[word]"), ("so_far", ".mask(word)")):  # HeatMap and its kin
        if hasattr(given, kind):
            raise ValueError(f"{name} is {type(given).__name__}, of which one map is meant; give its {remedy}.")
    if hasattr(given, "getbands"):  # PIL
        if given.mode not in ("1", "L"):
            raise ValueError(f"{name} is a PIL image of mode {given.mode!r}; give one in grey, image.convert('L').")
        width, height = given.size
        grey = torch.frombuffer(bytearray(given.convert("L").tobytes()), dtype=torch.uint8)
        return grey.reshape(height, width).float() / 255
    try:
        # A copy of a tensor as of an array: the caller may paint the next map into the same.
        tensor = given.clone() if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} is {type(given).__name__} {given!r:.60}, which is no map; give a tensor, an array or a grey PIL image."
        ) from None
    shape = list(tensor.shape)
    if len(shape) not in (2, 3) or not tensor.numel():
        raise ValueError(f"{name} has shape {shape}; give [height, width] for all images or [images, height, width].")
    if len(shape) == 3 and shape[2] in (3, 4) and shape[0] > 4:
        raise ValueError(f"{name} has shape {shape}, an image in colours; give one number a pixel, [height, width].")
    if tensor.is_complex():
        raise ValueError(f"{name} has dtype {tensor.dtype}; give real numbers.")
    return finite(name, tensor if tensor.dtype == torch.float64 else tensor.float())


def mask_map(name: str, given: Any) -> Tensor:
    """An `image_map` of weights from 0 to 1: with a picture's 0 to 255 an edit would be that many times too strong."""
    mask = image_map(name, given)
    low, high = float(mask.min()), float(mask.max())
    if high > 1 + ROUNDING:
        dtype = str(getattr(given, "dtype", "")).removeprefix("torch.") or type(given).__name__
        largest = 255 if high <= 255 and high.is_integer() else high  # a picture's white, also where it has none
        raise ValueError(
            f"{name} is {dtype} with values up to {high:.4g}; divide it by {largest:.4g} for weights of 0 to 1."
        )
    if low < -ROUNDING:
        raise ValueError(f"{name} has values down to {low:.4g}; give weights of 0 to 1, and the sign with the amounts.")
    return mask
