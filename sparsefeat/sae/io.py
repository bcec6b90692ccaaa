"""Where an SAE lies, on the disk or on a hub, and what its files hold."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsefeat.sae.config import FITTED, SAEConfig
from sparsefeat.sae.formats import FORMATS, SINGLE_FILES, detect
from sparsefeat.sae.formats.format import Given
from sparsefeat.sae.names import NAMES
from sparsefeat.whole import as_path


def read_sae(
    place: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    given: Mapping[str, Any],
) -> tuple[SAEConfig, dict[str, torch.Tensor]]:
    """The config and the state of the SAE in `place`, on the device and in the dtype; given: `k`, `hookpoint` and `base_model`,
    each in the place of what the files say unless None."""
    found = detect(place)
    config, tensors = found.read(place, Given(k=given["k"]))
    stated = config
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    _tell_contradictions(stated, config)
    shapes = config.tensor_shapes()
    if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
        raise ValueError(f"the {found.name} reader gave tensors that do not fit its config: report this as a bug")
    if dtype is None:
        dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
    _check_biases(config, tensors, place)
    # A copy: safetensors hands out views of the mapped file, which a later save into the same folder would replace. One
    # tensor at a time, each let go of when it is copied: of a large SAE no two whole copies are held.
    return config, {name: _cast(place, name, tensors.pop(name), device, dtype) for name in list(tensors)}


def _tell_contradictions(files: SAEConfig, used: SAEConfig) -> None:
    """One warning for each thing of which the files say one thing and the caller another: one of the two is wrong."""
    for name, same in (("hookpoint", _same_place), ("base_model", _same_model)):
        stated, given = getattr(files, name), getattr(used, name)
        if stated is not None and not same(stated, given):
            warnings.warn(
                f"the SAE's files state {name} {stated!r}, and {given!r} was given, which is used; leave it out "
                "unless the files are wrong",
                stacklevel=4,
            )


def _same_place(stated: str, given: str) -> bool:
    """Whether both may be one place: a language model's file does not know under which name a pipeline has the model."""
    (path, *stated_said), (place, *given_said) = stated.split(":"), given.split(":")
    if path.rpartition(".")[2].startswith("hook_"):  # TransformerLens's names are of no module
        return True
    tensors = [[word for word in said if word not in ("output", "image")] for said in (stated_said, given_said)]
    inner = path.removeprefix("model.")
    return tensors[0] == tensors[1] and (place == inner or place.endswith(f".{inner}"))


def _same_model(stated: str, given: str) -> bool:
    """Repositories of one name are copies."""
    return stated.rpartition("/")[2].lower() == given.rpartition("/")[2].lower()


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


def place_of(source: str | Path, revision: str | None, subfolder: str | None) -> Path:
    local = as_path(source, "source", "a folder or a hub id 'owner/name'")
    for name, given in (("revision", revision), ("subfolder", subfolder)):
        if given is not None and not isinstance(given, str):
            raise TypeError(f"{name} is {given!r:.80}: pass it as text")
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
        reason = str(error).strip().split("\n")[0].partition(". ")[0].rstrip(".")
        raise OSError(
            f"{source!r} is no local folder and could not be fetched from the hub ({reason}): check the name, revision= and "
            "your connection"
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


def check_device(device: torch.device | str | None) -> None:
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
