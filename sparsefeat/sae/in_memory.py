"""SAEs that are already in memory, of SAELens, sparsify or dictionary_learning: the same one here, with equal codes.

Each is written by its own program into a folder and read from there, as a file of that program would be: there is one
reading of every format. Then both encode the same rows, and an SAE whose codes differ is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor, nn

from sparsefeat.sae.formats.dictionary_learning import READERS

if TYPE_CHECKING:
    from sparsefeat.sae.module import SAE

ROWS = 64
# Of the largest entry of the code: float32 products in another order.
EQUAL = 1e-4


@contextmanager
def written(module: nn.Module) -> Iterator[Path]:
    """A folder with what the module's own program writes of it; gone afterwards. Raises TypeError for a module of others."""
    program = type(module).__module__.partition(".")[0]
    if not isinstance(module, nn.Module) or program not in WRITERS:
        raise TypeError(
            f"{type(module).__module__}.{type(module).__name__} is no SAE of {', '.join(WRITERS)}: save it, and open it with "
            "sparsefeat.load_sae"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sae"
        folder.mkdir()
        WRITERS[program](module, folder)
        yield folder


@torch.no_grad()
def check_codes(module: nn.Module, sae: SAE) -> None:
    """Raise ValueError if the codes of the two differ on 64 rows."""
    weight = next(module.parameters())
    rows = torch.randn(ROWS, sae.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
        weight.device, weight.dtype
    )
    theirs, ours = _code(module, rows), sae.encode(rows).dense()
    if theirs.shape != ours.shape:
        raise ValueError(
            f"the module's codes are {list(theirs.shape)} and these {list(ours.shape)}: it is another kind of SAE"
        )
    largest = float(theirs.abs().max())
    difference = float((theirs.float() - ours.float()).abs().max())
    tolerance = max(EQUAL, 4 * torch.finfo(weight.dtype).eps) * max(largest, 1e-6)
    if not difference <= tolerance:
        raise ValueError(
            f"the module's codes differ by {difference:.3g} of {largest:.3g} from those of its saved weights: save it, and "
            "open it with sparsefeat.load_sae"
        )


def _code(module: nn.Module, rows: Tensor) -> Tensor:
    """Dense, `[rows, n_latents]`, as the module gives it at inference."""
    training = module.training
    module.eval()
    try:
        code = module.encode(rows)
    finally:
        module.train(training)
    if hasattr(code, "top_acts"):  # sparsify's
        return SparseCode(code.top_acts, code.top_indices, module.num_latents).dense()
    return code[0] if isinstance(code, tuple) else code


def _of_sae_lens(module: Any, folder: Path) -> None:
    module.save_model(folder)


def _of_sparsify(module: Any, folder: Path) -> None:
    module.save_to_disk(folder)


def _of_dictionary_learning(module: Any, folder: Path) -> None:
    kind = type(module).__name__
    if kind not in READERS:
        raise TypeError(f"dictionary_learning's {kind} cannot be read: one of {', '.join(READERS)} can")
    torch.save(module.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}), encoding="utf-8")


WRITERS = {"sae_lens": _of_sae_lens, "sparsify": _of_sparsify, "dictionary_learning": _of_dictionary_learning}
