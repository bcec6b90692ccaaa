"""Places in a pipeline: `Hookpoint`, what a pipeline offers, and how a name becomes a module."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsefeat.pipeline.call_arguments import check_pipeline
from sparsefeat.pipeline.families.family import Family
from sparsefeat.pipeline.families.registry import family_of, is_known
from sparsefeat.pipeline.published import published_at

IO = ("output", "input", "diff")
STREAMS = ("image", "text", "audio")

# Names that wrappers put into a module's path: torch.compile's, and PEFT's around an adapted layer.
_WRAPPERS = ("_orig_mod", "base_layer")


@dataclass(frozen=True)
class Hookpoint:
    """A named module of a pipeline and which of its tensors is meant; written `path[:io][:stream][:rows]`.

    `path` starts with the pipeline's component ("unet.mid_block.attentions.0"). `io` is the module's "output", its
    "input", or "diff", output minus input: what the block adds to its residual stream. `stream` tells the image from
    the text, and from the audio, in blocks that carry several; the only stream of a module need not be named. `rows`,
    [start, stop) of a sequence [batch, rows, width], is for modules of which sparsefeat does not know the rows, and is
    believed: `"transformer.blocks.3:77-4173"`, or `"…:77-"` to the end.

    Raises:
        ValueError: a path, io, stream or rows that cannot be.
    """

    path: str
    io: str = "output"
    stream: str = "image"
    rows: tuple[int, int | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path.strip():
            raise ValueError(f"path={self.path!r} is no module's path; name one, as in 'unet.mid_block.attentions.0'")
        if ":" in self.path:
            raise ValueError(f"path={self.path!r} has more than the path; read it by Hookpoint.parse({self.path!r})")
        if self.rows is not None:
            start, stop = self.rows if isinstance(self.rows, (tuple, list)) and len(self.rows) == 2 else (-1, None)
            whole_numbers = all(isinstance(n, int) for n in (start, 0 if stop is None else stop))
            if not whole_numbers or start < 0 or (stop is not None and stop <= start):
                raise ValueError(
                    f"rows={self.rows!r} of hookpoint {self.path!r} are not (start, stop) with 0 <= start < stop, stop "
                    "None for the end of the sequence"
                )
        if self.io not in IO:
            raise ValueError(f"io={self.io!r} of hookpoint {self.path!r} is not one of {', '.join(IO)}")
        if self.stream not in STREAMS:
            raise ValueError(f"stream={self.stream!r} of hookpoint {self.path!r} is not one of {', '.join(STREAMS)}")

    @classmethod
    def parse(cls, text: str, stream: str = "image") -> Hookpoint:
        """`Hookpoint.parse("unet.mid_block.attentions.0:diff")`; without a colon the output is meant, and `stream`.

        `Hookpoint.parse("transformer.transformer_blocks.18:output:text")`, or `":text"`, is a joint block's text stream.

        Raises:
            ValueError: the text is no hookpoint.
        """
        if isinstance(text, HookpointInfo):
            raise ValueError(f"{text.hookpoint} is given as a line of hookpoints(pipe); name it, str(line.hookpoint)")
        if not isinstance(text, str) or not text.partition(":")[0].strip():
            raise ValueError(f"{text!r} is no hookpoint; name one, as in 'unet.mid_block.attentions.0:diff'")
        path, *said = text.split(":")
        stated = re.fullmatch(r"(\d+)-(\d*)", said[-1]) if said else None
        rows = None
        if stated:
            rows = int(stated[1]), int(stated[2]) if stated[2] else None
            said.pop()
        if len(said) > 1 or (said and said[0] in STREAMS):
            stream = said.pop()
        return cls(path, ":".join(said) or "output", stream, rows)

    def __str__(self) -> str:
        """The shortest form that `parse` reads back as the same hookpoint."""
        said = [self.path, *([] if self.io == "output" else [self.io])]
        said += [] if self.stream == "image" else [self.stream]
        if self.rows is not None:
            start, stop = self.rows
            said.append(f"{start}-{'' if stop is None else stop}")
        return ":".join(said)


@dataclass(frozen=True)
class HookpointInfo:
    """One line of `hookpoints(pipe)`; a block with an image and a text stream has two."""

    hookpoint: Hookpoint
    """Where the module has one stream, whichever it is, the hookpoint does not say it."""
    width: int | None
    """d_model of the output; None if only a run would tell."""
    stream: str
    """"image", "text" or "audio"; "unknown" where a hookpoint has to state its rows."""
    kind: str
    grid: tuple[int, ...] | None = None
    """The positions' grid at the pipeline's default size; None for text, or if only a run would tell."""
    published: tuple[str, ...] = ()
    """The published SAEs that were trained at this hookpoint of this base model."""

    def __str__(self) -> str:
        said = [self.stream, self.kind, f"width {'?' if self.width is None else self.width}"]
        said += [] if self.grid is None else [" x ".join(map(str, self.grid))]
        return f"{self.hookpoint}: {', '.join([*said, *self.published])}"


@dataclass(frozen=True)
class Target:
    """A module that was found: its component, its path as this pipeline names it, and what is known of its family."""

    path: str
    module: nn.Module = field(repr=False)
    root_name: str
    root: nn.Module = field(repr=False)
    family: Family = field(repr=False)

    @property
    def inner(self) -> str:
        """The path within the component, as families know it."""
        return self.path.partition(".")[2]


class UnknownHookpointError(ValueError):
    """No module of the pipeline has this name."""


def hookpoints(pipe: Any) -> list[HookpointInfo]:
    """The blocks of a pipeline that can be hooked, in each model's own order.

    Parts of these blocks work too, by their path ("transformer_blocks.0.attn.to_q"). Of any other module, and where the
    stream is "unknown", the hookpoint has to state its rows.

    Raises:
        TypeError: `pipe` is no pipeline.
    """
    check_pipeline(pipe)
    found = []
    for root_name, root in components(pipe).items():
        family = family_of(root)
        model = getattr(root, "_orig_mod", root)
        for path, kind, module in family.blocks(model):
            path = _plain(path)
            streams = family.streams(path, module)
            for stream in streams:
                hookpoint = Hookpoint(f"{root_name}.{path}", stream=stream if len(streams) > 1 else "image")
                width = family.width(module, "output")
                grid = family.default_grid(pipe, model, path) if stream == "image" else None
                published = published_at(pipe, hookpoint.path, stream, width)
                found.append(HookpointInfo(hookpoint, width, stream, kind, grid, published))
    return found


def components(pipe: Any) -> dict[str, nn.Module]:
    """The modules a pipeline is made of, by name; of a wrapper around a denoiser that is known, the denoiser."""
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, Mapping) else vars(pipe)
    return {name: _wrapped(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def _wrapped(part: nn.Module) -> nn.Module:
    if is_known(part) or hasattr(part, "_orig_mod") or type(part).__module__.startswith("diffusers."):
        return part
    inside = [module for module in part.modules() if is_known(module)]
    return inside[0] if len(inside) == 1 else part


def resolve(pipe: Any, path: str) -> Target:
    """The module meant by `path`, in this pipeline and these library versions.

    The component may be left out ("mid_block.attentions.0" is looked for in the denoiser), names of other library
    versions are understood, places of a language model ("model.layers.12") are looked for in the text encoders, and what
    wrappers put into names ("_orig_mod", "base_layer") makes no difference.

    Raises:
        UnknownHookpointError: there is none, or several; a ValueError, which names the nearest.
    """
    plain = _plain(path)
    parts = components(pipe)
    root_name, _, inner = plain.partition(".")
    if root_name in parts:
        candidates = [(root_name, inner)]
    else:
        candidates = [(name, plain) for name, root in parts.items() if family_of(root).runs_in_steps]
    found = []
    for root_name, inner in candidates:
        root = parts[root_name]
        family = family_of(root)
        for name in (inner, *family.aliases(inner)):
            module = _module(root, name)
            if module is not None:
                found.append(Target(f"{root_name}.{name}".rstrip("."), module, root_name, root, family))
                break
    found = found or _in_language_models(parts, plain)
    if len(found) > 1:
        raise UnknownHookpointError(
            f"hookpoint {path!r} is in {' and in '.join(t.root_name for t in found)} of {type(pipe).__name__}: name "
            f"the component, as in {found[0].path!r}"
        )
    if not found:
        raise UnknownHookpointError(_unknown(pipe, path, parts))
    return found[0]


# What stands before a language model's `layers.N` in the classes that pipelines carry: LlamaModel, LlamaForCausalLM,
# Qwen2_5_VLForConditionalGeneration, and so on.
_LANGUAGE_MODELS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def _in_language_models(parts: Mapping[str, nn.Module], path: str) -> list[Target]:
    """Where a place of a language model, `model.layers.N` as SAEs of these are published, is in the text encoders."""
    before = max((prefix for prefix in _LANGUAGE_MODELS if path.startswith(prefix)), key=len)
    inner = path.removeprefix(before)
    found = []
    for root_name, root in parts.items():
        family = family_of(root)
        if family.runs_in_steps or not inner.startswith(("layers.", "norm", "embed_tokens")):
            continue
        for name in (prefix + inner for prefix in _LANGUAGE_MODELS):
            module = _module(root, name)
            if module is not None:
                found.append(Target(f"{root_name}.{name}", module, root_name, root, family))
                break
    return found


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)  # also through torch.compile's wrapper, which forwards attributes
    except AttributeError:
        return _named_modules(root).get(path)  # inside a wrapper that does not, such as PEFT's


def _named_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module of a root by its plain path. Of a wrapper and what it wraps the wrapper is meant: its output is
    what the model goes on with, and hooks on torch.compile's wrapper are not part of the compiled graph.
    """
    named: dict[str, nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        named.setdefault(_plain(path), module)
    return named


def _unknown(pipe: Any, path: str, parts: Mapping[str, nn.Module]) -> str:
    message = f"{type(pipe).__name__} has no module {path!r}"
    component = path.partition(".")[0]
    if component not in parts and getattr(pipe, component, parts) is None:
        return f"{message}: its {component} is None; load the pipeline with it"
    if path.rpartition(".")[2].startswith("hook_"):
        return (
            f"{message}: it is TransformerLens's name of a place in a language model; name the place in this pipeline "
            "(sparsefeat.hookpoints(pipe) lists all), as at= or load_sae(…, hookpoint=)"
        )
    known = [str(info.hookpoint) for info in hookpoints(pipe)]
    everything = [f"{name}.{inner}" for name, root in parts.items() for inner in _named_modules(root) if inner]
    # A component that was left out must not make every real name look far away.
    wanted = [_plain(path), *(f"{name}.{_plain(path)}" for name in parts)]
    near = [name for query in wanted for name in difflib.get_close_matches(query, known, n=4, cutoff=0.75)]
    near = near or difflib.get_close_matches(_plain(path), everything, n=4, cutoff=0.5) or known[:4]
    nearest = ", ".join(dict.fromkeys(near[:4]))
    return f"{message}; the nearest are {nearest} (sparsefeat.hookpoints(pipe) lists all)"
