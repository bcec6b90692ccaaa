"""Pipelines and SAEs by the names that the shell gives: checked without torch, opened when everything was checked."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefeat.assets.embedded import (
    EMBEDDED_NAME,
    GUIDANCE,
    JOINT,
    JOINT_NAME,
    JOINT_SAES,
    N_STEPS,
    PIPELINE,
    block_sae_folder,
    cross_attention_sae_folders,
    load_pipeline,
    sae_folders,
    text_encoder_sae_folder,
)
from sparsefeat.schedule import check_steps, most_steps

if TYPE_CHECKING:
    from sparsefeat.sae import SAE

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DEVICE = re.compile(r"(cpu|cuda|xpu|mps)(:\d+)?")
HOOKPOINT = re.compile(r"\w+(\.\w+)*(:(output|input|diff))?(:(image|text))?(:\d+-\d*)?")


JOINT_CHOICE = "joint"


def is_embedded(name: str | None) -> bool:
    """Whether that is a pipeline that the package carries: the default, or "joint" ("./joint" is a folder)."""
    return name is None or name == JOINT_CHOICE


def check_device(device: str) -> None:
    if not DEVICE.fullmatch(device):
        raise ValueError(f"--device {device!r} is not one to run on; choose cpu, cuda, cuda:1, xpu or mps")


def check_usable(device: str) -> None:
    """Loads torch, which alone knows what this machine has."""
    import torch

    kind = device.partition(":")[0]
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise ValueError(f"--device {device} cannot be used: torch finds none on this machine; choose cpu")


def check_hookpoint(at: str | None, option: str = "--at") -> None:
    if at is not None and not HOOKPOINT.fullmatch(at):
        raise ValueError(
            f"{option} {at!r} is no hookpoint; write path[:output|input|diff][:text], as `sparsefeat hookpoints` lists "
            "them, or leave it out for the SAE's own"
        )


def _dtype(device: str) -> str:
    """What a pipeline calculates with there."""
    return "float32" if device == "cpu" else "float16"


@dataclass(frozen=True)
class PipelineChoice:
    """The pipeline that is asked for, on which device, and how often it steps. Raises ValueError for what cannot be.

    option: how the command's user names it, for the sentences.
    """

    name: str | None
    device: str = "cpu"
    steps: int | None = None
    option: str = "--pipeline"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.name is not None and not self.embedded:
            folder = Path(self.name).expanduser()
            if not self.name.strip() or not (folder.exists() or HUB_ID.fullmatch(self.name)):
                raise ValueError(
                    f"{self.option} {self.name!r} does not exist; pass a diffusers folder, a hub id OWNER/NAME, or joint"
                )
            if folder.exists() and not (folder / "model_index.json").is_file():
                raise ValueError(
                    f"{self.option} {self.name!r} has no model_index.json; pass the folder of a diffusers pipeline"
                )
        try:
            scheduler = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        except (OSError, ValueError):  # on the hub, or damaged: told when the pipeline is opened
            scheduler = {}
        most = most_steps(str(scheduler.get("_class_name")), scheduler.get("num_train_timesteps"))
        check_steps("num_inference_steps", self.n_steps, most)

    @property
    def embedded(self) -> bool:
        return is_embedded(self.name)

    @property
    def folder(self) -> Path:
        """Where it is, if it is a folder."""
        if self.name is None:
            return PIPELINE
        return JOINT if self.embedded else Path(self.name).expanduser()

    @property
    def n_steps(self) -> int:
        return self.steps or (N_STEPS if self.embedded else 50)

    def open(self) -> Any:
        quiet_libraries()
        check_usable(self.device)
        if self.name is None or self.embedded:
            return load_pipeline(self.folder).to(self.device)
        import torch
        from diffusers import DiffusionPipeline

        dtype = getattr(torch, _dtype(self.device))
        local = Path(self.name).expanduser()
        try:
            pipe = DiffusionPipeline.from_pretrained(local if local.exists() else self.name).to(self.device, dtype)
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0].partition(". ")[0].partition(" Please check out")[0].rstrip(".")
            if local.exists():
                raise ValueError(
                    f"{self.option} {self.name!r} cannot be opened ({why}); pass a whole diffusers folder"
                ) from error
            raise OSError(
                f"{self.option} {self.name!r} could not be fetched from the hub ({why}); check its name and your connection"
            ) from error
        from sparsefeat.pipeline.call_arguments import check_number_of_steps

        check_number_of_steps(
            pipe, "num_inference_steps", self.n_steps
        )  # of a pipeline on the hub, now that it is here
        if not sys.stderr.isatty():
            pipe.set_progress_bar_config(disable=True)
        return pipe

    def code(self) -> tuple[tuple[str, ...], str]:
        """What `open` does, as Python: the lines of its imports, and the expression."""
        if self.name is None or self.embedded:
            moved = "" if self.device == "cpu" else f".to({self.device!r})"
            which, names = ("", "load_pipeline") if self.name is None else ("JOINT", "JOINT, load_pipeline")
            return (f"from sparsefeat.assets import {names}",), f"load_pipeline({which}){moved}"
        folder = Path(self.name).expanduser()
        place, dtype = str(folder.absolute()) if folder.exists() else self.name, _dtype(self.device)
        opened = f"DiffusionPipeline.from_pretrained({place!r}).to({self.device!r}, torch.{dtype})"
        return ("from diffusers import DiffusionPipeline",), opened

    def call_options(self, guidance: float | None, seed: int) -> dict[str, Any]:
        """Arguments of the pipeline's call; noise that is drawn anew from the seed."""
        import torch

        return {"generator": torch.Generator("cpu").manual_seed(seed), **self.call_settings(guidance)}

    def call_settings(
        self, guidance: float | None, height: int | None = None, width: int | None = None
    ) -> dict[str, Any]:
        """Arguments of every call of the pipeline."""
        options: dict[str, Any] = {"num_inference_steps": self.n_steps}
        if guidance is not None or self.embedded:
            options["guidance_scale"] = GUIDANCE if guidance is None else guidance
        return options | {name: side for name, side in (("height", height), ("width", width)) if side is not None}

    @property
    def base_model(self) -> str:
        """What an SAE says it is of."""
        if self.name is None:
            return EMBEDDED_NAME
        return JOINT_NAME if self.embedded else self.name


@dataclass(frozen=True)
class SAEChoice:
    """The SAEs that are asked for. Raises ValueError for names that cannot be.

    names: without any the embedded ones: "all", that of the last "attention", that and the block's to "explore", or the
        "text" encoder's.
    pipeline: what they will be attached to; the embedded SAEs are of the embedded pipelines alone. Of the joint one there
        are those of the blocks, whatever is asked for.
    option: how the command's user names them, for the sentences.
    """

    names: list[str] | None
    subfolders: list[str] | None
    pipeline: str | None = None
    embedded: str = "all"
    option: str = "--sae"

    def __post_init__(self) -> None:
        names, subfolders = self.names or [], self.subfolders or []
        if subfolders and not names:
            raise ValueError(
                f"--subfolder {subfolders[0]!r} is given without an SAE; name the folder or hub id it lies in"
            )
        if subfolders and len(subfolders) != len(names):
            raise ValueError(
                f"--subfolder is given {len(subfolders)} times for {len(names)} --sae; give it once for each"
            )
        for name in names:
            if not name.strip() or not (Path(name).expanduser().exists() or HUB_ID.fullmatch(name)):
                raise ValueError(f"{self.option} {name!r} does not exist; pass a folder, or a hub id OWNER/NAME")
        if not names and not is_embedded(self.pipeline):
            raise ValueError("the pipeline is not the embedded one, so its SAE must be named: add --sae FOLDER")

    def places(self) -> list[str]:
        if self.names:
            return self.names
        if self.pipeline is not None:
            return [str(folder) for folder in sae_folders(JOINT_SAES)]
        embedded = {
            "all": sae_folders(),
            "explore": [block_sae_folder(), cross_attention_sae_folders()[-1]],
            "attention": [cross_attention_sae_folders()[-1]],
            "text": [text_encoder_sae_folder()],
        }[self.embedded]
        return [str(folder) for folder in embedded]

    def open(self, device: str = "cpu", **said: Any) -> list[SAE]:
        """The SAEs, with what `load_sae` is told of them: k, hookpoint, base_model."""
        check_usable(device)
        from sparsefeat.sae import load_sae

        return [load_sae(place, device=device, subfolder=folder, **said) for place, folder in self._within()]

    def _within(self) -> list[tuple[str, str | None]]:
        """Each place, and the folder or file in it."""
        places = self.places()
        inside: list[str | None] = [*self.subfolders] if self.subfolders else [None] * len(places)
        return list(zip(places, inside, strict=True))

    def code(self, device: str = "cpu") -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What `open` does, as Python: the lines of its imports, and an expression for each SAE."""
        more = "" if device == "cpu" else f", device={device!r}"
        if not self.names:
            of = "SAES" if self.pipeline is None else "JOINT_SAES"
            opened = tuple(f"sf.load_sae({of} / {Path(place).name!r}{more})" for place in self.places())
            return (f"from sparsefeat.assets.embedded import {of}",), opened
        lines = []
        for place, inside in self._within():
            folder = Path(place).expanduser()
            within = "" if inside is None else f", subfolder={inside!r}"
            lines.append(f"sf.load_sae({(str(folder.absolute()) if folder.exists() else place)!r}{within}{more})")
        return (), tuple(lines)


def quiet_libraries() -> None:
    """Loading notices of diffusers and transformers are for developers of those."""
    import logging

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for module in (diffusers_logging, transformers_logging):
        if hasattr(module, "disable_progress_bar"):
            module.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
