"""Open an SAE from a folder or a hub, save it, share it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsefeat.sae.config import FITTED, SAEConfig
from sparsefeat.sae.files import reading
from sparsefeat.sae.formats import FORMATS, SINGLE_FILES, detect
from sparsefeat.sae.formats.format import Given
from sparsefeat.sae.model_card import model_card
from sparsefeat.sae.module import NAMES, SAE
from sparsefeat.sae.names import Names
from sparsefeat.sae.published import published
from sparsefeat.whole import as_path


def save(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write `config.json` and `sae.safetensors`; the same as `sae.save(folder)`."""
    return sae.save(folder, dtype=dtype, overwrite=overwrite)


def load_sae(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    k: int | None = None,
    hookpoint: str | None = None,
    base_model: str | None = None,
) -> SAE:
    """Open a trained SAE of any format in `docs/interop.md`, in evaluation mode.

    source: a local folder, or a single file where the format is one, which win, a name of the table of published SAEs
        (`sparsefeat sae list`, such as "sdxl-unbox/up.0.1"), or a hub id `owner/name`; `subfolder` is a folder (or file)
        within either, `revision` a branch, tag or commit of the hub.
    dtype: None gives float32 (float64 if stored so), whatever the file holds.
    k, hookpoint, base_model: in the place of what the files say; most foreign formats do not know the pipeline they were
        trained on, and overcomplete's not their k. `sparsefeat.check(sae, pipe, prompts)` tells whether they fit.
    """
    _check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}: choose a floating dtype, such as torch.float16")
    entry = published(source) if isinstance(source, str) and not Path(source).expanduser().exists() else None
    if entry is not None:
        source, subfolder = entry.repository, subfolder or entry.subfolder
        hookpoint, base_model = hookpoint or entry.hookpoint, base_model or entry.base_model
    place = _place(source, revision, subfolder)
    with reading(place):
        return _read(place, device, dtype, k, hookpoint, base_model)


def _read(
    place: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    k: int | None,
    hookpoint: str | None,
    base_model: str | None,
) -> SAE:
    found = detect(place)
    config, tensors = found.read(place, Given(k=k))
    given: dict[str, Any] = {"k": k, "hookpoint": hookpoint, "base_model": base_model}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    shapes = config.tensor_shapes()
    if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
        raise ValueError(f"the {found.name} reader gave tensors that do not fit its config: report this as a bug")
    if dtype is None:
        dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
    _check_biases(config, tensors, place)
    with torch.device("meta"):
        sae = SAE(config)
    # A copy: safetensors hands out views of the mapped file, which a later save into the same folder would replace. One
    # tensor at a time, each let go of when it is copied: of a large SAE no two whole copies are held.
    state = {name: _cast(place, name, tensors.pop(name), device, dtype) for name in list(tensors)}
    sae.load_state_dict(state, assign=True)
    if place.is_dir() and (place / NAMES).exists():
        sae.names = Names.read(place / NAMES)
    return sae.eval()


def _cast(
    place: Path, name: str, tensor: torch.Tensor, device: torch.device | str | None, dtype: torch.dtype
) -> torch.Tensor:
    """A copy as the SAE keeps it, finite throughout: a sum in fp64 is NaN or Inf exactly when an entry is."""
    if name == "threshold" and tensor.isfinite().all():  # beyond the dtype's largest nothing is active either way
        tensor = tensor.double().clamp(max=torch.finfo(dtype).max)
    cast = tensor.to(device, dtype, copy=True)
    if cast.sum(dtype=torch.float64).isfinite():
        return cast
    if tensor.sum(dtype=torch.float64).isfinite():
        raise ValueError(f"{name} in {place} has numbers beyond {dtype}'s largest: load it in torch.float32")
    raise ValueError(f"{name} in {place} has NaN or Inf: it is damaged, download or train it again")


def push_to_hub(
    sae: SAE,
    repo_id: str,
    *,
    private: bool | None = None,
    subfolder: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Upload the SAE to a hub repository, created if need be; returns the address of the commit.

    A model card goes with it (README.md, beside the SAE): hookpoint, base model, width, k, how to open it, and `metrics`,
    such as {"fvu": 0.21, "l0": 32.0}.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = sae.save(Path(folder) / "sae")
        (written / "README.md").write_text(model_card(sae, repo_id, subfolder, metrics or {}), encoding="utf-8")
        return hub.upload_folder(repo_id=repo_id, folder_path=written, path_in_repo=subfolder).commit_url


def _place(source: str | Path, revision: str | None, subfolder: str | None) -> Path:
    local = as_path(source, "source", "a folder or a hub id 'owner/name'")
    if local.is_file() and subfolder is None:
        return local
    if local.is_dir():
        place = local / subfolder if subfolder else local
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: correct subfolder={subfolder!r}")
        return place
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} does not exist: pass a folder, or a hub id written 'owner/name'")
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [prefix + name for known in FORMATS for name in known.files + known.optional] + [prefix + NAMES]
    if prefix and Path(prefix).suffix in SINGLE_FILES:
        beside = prefix.rstrip("/").rpartition("/")[0]
        wanted = [f"{beside}/{name}".lstrip("/") for known in FORMATS if not known.files for name in known.optional]
        wanted.append(prefix.rstrip("/"))
    try:
        root = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, httpx's and OSError, one for every way to fail
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{source!r} is no local folder and could not be fetched from the hub ({type(error).__name__}: {reason}): "
            "check the name, revision and your connection"
        ) from error
    place = root / prefix.rstrip("/") if prefix else root
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        there = f"in subfolder {subfolder!r}" if subfolder else "at its top"
        folders = _hub_folders(source, revision)
        more = f" and {len(folders) - 8} more" if len(folders) > 8 else ""
        remedy = f"pass subfolder=, one of {folders[:8]}{more}" if folders else "see its list of files"
        raise FileNotFoundError(f"{source!r} on the hub has no SAE {there}: {remedy}")
    return place


def _hub_folders(repo_id: str, revision: str | None) -> list[str]:
    """The folders of a hub repository that have a known format's files; none if the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo_id, revision=revision)
    except Exception:  # as above; what is being said is another mistake
        return []
    held: dict[str, set[str]] = {}
    for folder, _, name in (file.rpartition("/") for file in files):
        held.setdefault(folder, set()).add(name)
    return sorted(f for f, names in held.items() if f and any(k.files and names.issuperset(k.files) for k in FORMATS))


def _check_device(device: torch.device | str | None) -> None:
    """Before gigabytes are read."""
    try:
        usable = torch.empty(0, device=device).device.type != "meta"  # which holds no numbers
    except (RuntimeError, AssertionError, TypeError):
        usable = False
    if not usable:
        raise ValueError(
            f"device is {str(device)!r}, which torch cannot use here: pass 'cpu', or 'cuda' where there is one"
        )


def _check_biases(config: SAEConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """What shapes and finiteness do not tell, but encoding would silently get wrong."""
    if config.inference == "threshold" and float(tensors["threshold"]) < 0:
        raise ValueError(f"threshold in {folder} is negative, unset: put inference 'topk' into its config")
    if config.normalizer in FITTED and not bool((tensors["pca_std"] > 0).all()):
        raise ValueError(f"pca_std in {folder} is not positive throughout: it is damaged, export the SAE again")
    if config.normalizer == "none" and tensors["b_pre"].any():
        raise ValueError(f"b_pre in {folder} is not zero but normalizer is 'none': put 'b_pre' into its config")
