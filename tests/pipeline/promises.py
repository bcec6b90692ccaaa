"""The promises of `attach`, each checked on one configuration of one family.

What is expected comes from elsewhere: the latents of the pipeline alone; the blocks' grids as the family's file
declares them, worked out by hand from its sizes; the conditions from that file and from the texts themselves, for a
batch entry whose text is that of an unguided run is conditional, whatever its place; the steps from counting.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Context, Hookpoint, Instrument, attach, hookpoints, resolve
from tests.families import Block, TinyFamily, families
from tests.pipeline.caches import CACHES, Computed, NoSuchCache, computing, config
from tests.pipeline.caches import STEPS as CACHE_STEPS
from tests.pipeline.instruments import push, zero
from tests.pipeline.matrix import BATCHES, Cell
from tests.pipeline.state import everything

PROMPTS = ("a fox", "red cat")
STEPS = 2
PROMISES = (
    "a neutral edit gives the same bits",
    "an edit reaches the output",
    "conditions of the rows",
    "conditions in the text encoders",
    "grid",
    "step",
    "leaving restores",
    "an exception restores",
)


class NotHere(Exception):
    """This configuration does not exist for this family, in these versions; the message says why."""


class Spot(Instrument):
    """Watches or edits one block, its stream and io given."""

    def __init__(self, block: Block, io: str = "output", rule: Callable[..., Any] | None = None):
        self.place = Hookpoint(block.path, io, block.stream)
        self.rule = rule
        self.contexts: list[Context] = []
        self.shapes: list[tuple[int, ...]] = []
        self.folded: list[int] = []  # the entries of the tensors' batch dimension

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.place,)

    def begin_call(self, call: Any) -> None:
        self.contexts, self.shapes, self.folded = [], [], []

    def at_hookpoint(self, activations: Any, context: Context) -> Any:
        self.contexts.append(context)
        self.shapes.append(tuple(activations.rows.shape))
        self.folded.append(len(activations.tensor))
        return self.rule(activations, context) if self.rule else None


# One configuration


def component(pipe: Any, path: str) -> nn.Module:
    return getattr(pipe, path.partition(".")[0])


def denoisers(family: TinyFamily) -> list[str]:
    """The components that run in steps, as the family's blocks name them."""
    names = [block.path.partition(".")[0] for block in family.blocks]
    return [name for name in dict.fromkeys(names) if not name.startswith("text_encoder")]


@functools.lru_cache(maxsize=1)  # the cells of one pipeline come next to each other
def prepared(family: str, option: str, mode: str) -> Any:
    """The pipeline of a family in a mode."""
    if mode.startswith("int8"):
        library = mode.partition("(")[2].rstrip(")")
        pytest.importorskip(library, reason=f"{library} is not installed")
    tiny = families()[family]
    pipe = tiny.build(**tiny.options.get(option, {}))
    for name in denoisers(tiny):
        model = getattr(pipe, name)
        if mode == "LoRA":
            _adapt(model)
        elif mode == "fused projections":
            _fuse(model)
        elif mode == "gradient checkpointing":
            if not getattr(model, "_supports_gradient_checkpointing", False):
                raise NotHere(f"{type(model).__name__} has no gradient checkpointing")
            model.enable_gradient_checkpointing()
            model.train()  # older diffusers checkpoint in training mode only; nothing here has dropout
        elif mode == "layerwise casting":
            model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        elif mode == "group offload":
            if not getattr(model, "_supports_group_offloading", True):
                raise NotHere(f"{type(model).__name__} has no group offload")
            cpu = torch.device("cpu")
            model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
        elif mode in CACHES:
            _cache(model, mode)
        elif mode.startswith("int8"):
            _quantise(model, mode)
    if mode in ("bf16", "fp16"):
        pipe.to(torch.bfloat16 if mode == "bf16" else torch.float16)
    return pipe


def _adapt(model: nn.Module) -> None:
    if not hasattr(model, "add_adapter"):
        raise NotHere(f"{type(model).__name__} takes no LoRA")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(11)
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = sorted(names & {"to_q", "to_k", "to_v", "to_query", "to_key", "to_value"})
    model.add_adapter(peft.LoraConfig(r=2, target_modules=wanted, init_lora_weights=False))


def _fuse(model: nn.Module) -> None:
    if not hasattr(model, "fuse_qkv_projections"):
        raise NotHere(f"{type(model).__name__} has no fused projections")
    try:
        model.fuse_qkv_projections()
    except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise NotHere(f"{type(model).__name__} does not fuse its projections: {error}") from error


def _cache(model: nn.Module, mode: str) -> None:
    if not hasattr(model, "enable_cache"):
        raise NotHere(f"{type(model).__name__} takes no cache")
    try:
        model.enable_cache(config(CACHES[mode]))
    except NoSuchCache as reason:
        raise NotHere(str(reason)) from reason
    except Exception as error:
        raise NotHere(f"{type(model).__name__} does not take it: {type(error).__name__}: {error}") from error


def _quantise(model: nn.Module, mode: str) -> None:
    """Every linear layer in int8, as the library does it on a CPU."""
    if mode == "int8 (torchao)":
        torchao = importlib.import_module("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return
    bnb = importlib.import_module("bitsandbytes")
    for path, layer in [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]:
        parent, _, name = path.rpartition(".")
        quantised = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
        )
        quantised.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        quantised.bias = layer.bias
        setattr(model.get_submodule(parent), name, quantised.to("cpu"))


@dataclass(frozen=True)
class Visit:
    """A run of a block that instruments have to see."""

    run: int
    """Which of the denoiser's runs of the call it is in."""
    step: int
    chunks: tuple[str, ...]
    """The conditions of the chunks that it runs on."""


class Run:
    """A cell's pipeline, and what it does by itself."""

    def __init__(self, cell: Cell):
        self.cell, self.family = cell, families()[cell.family]
        self.pipe = prepared(cell.family, cell.option, cell.mode)
        n_prompts, self.asked_for = BATCHES[cell.batch]
        self.prompts = list(PROMPTS[:n_prompts])
        self.runs = self.family.runs(cell.guidance)
        self.main = denoisers(self.family)[0]
        self.steps = CACHE_STEPS if cell.mode in CACHES else STEPS
        inside = [b.path.partition(".")[2] for b in self.family.blocks if b.path.startswith(self.main + ".")]
        watched = computing(component(self.pipe, self.main), inside) if cell.mode in CACHES else nullcontext()
        self.computed: Computed | None
        try:
            with listening(self) as self.prompts_heard, watched as self.computed:
                self.latents = self()
        except Exception as error:
            if cell.mode == "plain":
                raise
            raise NotHere(f"diffusers itself fails: {type(error).__name__}: {error}") from error
        if self.computed is not None and not self.computed.passed_something_over(len(self.runs)):
            raise NotHere(f"it passes nothing over in {type(component(self.pipe, self.main)).__name__}")
        self.n_images = self.latents.shape[0]
        self.images_per_prompt = self.n_images // n_prompts  # not what was asked for: CogVideoX always makes one
        if cell.guidance:  # a run without it: its texts are the conditional ones
            with listening(self) as self.prompts_heard:
                self(guidance=False)

    def __call__(self, guidance: bool | None = None, seed: int = 3, **arguments: Any) -> torch.Tensor:
        out = self.family.call(
            self.pipe,
            self.prompts,
            guidance=self.cell.guidance if guidance is None else guidance,
            images_per_prompt=self.asked_for,
            size=self.cell.size,
            steps=self.steps,
            seed=seed,
            **arguments,
        )
        return torch.as_tensor(out)

    def visits(self, path: str) -> list[Visit]:
        """The runs of a block: all, or where a cache passes some over those in which it computed."""
        n, inner = len(self.runs), path.partition(".")[2]
        if self.computed is None or inner not in self.computed.runs:
            return [Visit(run, run // n, self.runs[run % n]) for run in range(self.steps * n)]
        found, whole = [], dict(reversed([(run % n, entries) for run, entries in self.computed.runs[inner]]))
        for run, entries in self.computed.runs[inner]:
            chunks = self.runs[run % n]
            if 2 * entries == whole[run % n]:  # FasterCache leaves the unconditional half out
                chunks = chunks[1:]
            found.append(Visit(run, run // n, chunks))
        return found

    def spots(self, io: str = "output", rule: Callable[..., Any] | None = None) -> list[Spot]:
        return [Spot(block, io, rule) for block in self.family.blocks]


# The texts that reach the denoiser and the text encoders, read with plain hooks


@contextmanager
def listening(run: Run) -> Iterator[dict[str, list[list[torch.Tensor]]]]:
    """For the denoiser and each text encoder, for each of its runs, the text of each batch entry."""
    names = [run.main, *text_encoders(run)]
    heard: dict[str, list[list[torch.Tensor]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def listen(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
            heard[name].append(_texts(module, args, kwargs))

        handles.append(getattr(run.pipe, name).register_forward_pre_hook(listen, with_kwargs=True))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _texts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("encoder_hidden_states", "encoder_hidden_states_t5", "clip_text_pooled", "cap_feats", "input_ids"):
        if given.get(name) is not None:
            return list(given[name])
    return list((given.get("added_cond_kwargs") or {}).get("image_embeds", ()))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two texts are the same, where one may be padded further than the other."""
    shorter = min(a.shape[0], b.shape[0])
    return bool(torch.allclose(a[:shorter].float(), b[:shorter].float(), rtol=1e-2, atol=1e-2))


def text_encoders(run: Run) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(run.pipe, name, None)]


def text_blocks(run: Run) -> list[Block]:
    """The first layer of each text encoder."""
    found = {}
    for info in hookpoints(run.pipe):
        name = info.hookpoint.path.partition(".")[0]
        if name in text_encoders(run) and info.width is not None:
            found.setdefault(name, Block(info.hookpoint.path, "text", info.width))
    assert found.keys() == set(text_encoders(run))
    return list(found.values())


# The promises


def reaches(run: Run, turn: int) -> None:
    block = run.family.blocks[turn % len(run.family.blocks)]
    io = ("output", "diff", "input")[turn // len(run.family.blocks) % 3]
    with attach(run.pipe, Spot(block, io, push(8.0))):
        edited = run()
    assert edited.shape == run.latents.shape
    assert not torch.equal(edited, run.latents), f"an edit at {block.path}:{io}, {block.stream}, did nothing"


def conditions(run: Run, spots: list[Spot], heard: list[list[torch.Tensor]]) -> None:
    assert len(heard) == run.steps * len(run.runs)
    for spot in spots:
        expected = run.visits(spot.place.path)
        assert len(spot.contexts) == len(expected), f"{spot.place} was seen {len(spot.contexts)} times"
        for context, folded, visit in zip(spot.contexts, spot.folded, expected, strict=True):
            entries = [(condition, image) for condition in visit.chunks for image in range(run.n_images)]
            assert list(context.entries) == entries, spot.place
            assert context.batch == len(entries)
            each = folded // len(entries)  # frames of a video that are folded into the batch
            assert context.condition == tuple(condition for condition, _ in entries for _ in range(each)), spot.place
            assert context.prompt_index == tuple(image for _, image in entries for _ in range(each)), spot.place
    for context, visit in zip(spots[0].contexts, run.visits(spots[0].place.path), strict=True):
        texts, given = heard[visit.run], run.n_images * len(run.runs[visit.run % len(run.runs)])
        frames = len(texts) // given  # where a video's frames are folded into the batch, its text is too
        assert len(texts) == frames * given, f"{len(texts)} texts for {given} batch entries"
        texts = texts[::frames][-context.batch :]
        for text, (condition, image) in zip(texts, context.entries, strict=True):
            is_prompt = _same(text, run.prompts_heard[run.main][0][::frames][image])
            assert is_prompt == (condition in ("cond", "perturbed")), (condition, image)


def text_conditions(run: Run, spots: list[Spot], heard: dict[str, list[list[torch.Tensor]]]) -> None:
    for spot in spots:
        name = spot.place.path.partition(".")[0]
        rows = [text.tolist() for texts in heard[name] for text in texts]
        prompts = [text.tolist() for texts in run.prompts_heard[name] for text in texts]
        seen = [
            (c, i) for context in spot.contexts for c, i in zip(context.condition, context.prompt_index, strict=True)
        ]
        assert len(rows) == len(seen), f"{spot.place} saw {len(seen)} of {len(rows)} texts"
        for row, (condition, image) in zip(rows, seen, strict=True):
            assert image % run.images_per_prompt == 0
            is_prompt = any(_same(torch.tensor(row), torch.tensor(prompt)) for prompt in prompts)
            assert is_prompt == (condition == "cond"), (spot.place, condition)
            if is_prompt:
                prompt = torch.tensor(prompts[image // run.images_per_prompt])
                assert _same(torch.tensor(row), prompt), (spot.place, image)
        assert all(context.step is None for context in spot.contexts)


def grids(run: Run, spots: list[Spot]) -> None:
    for spot, block in zip(spots, run.family.blocks, strict=True):
        expected = block.square if run.cell.size == "square" else block.wide
        for context, shape in zip(spot.contexts, spot.shapes, strict=True):
            assert context.grid == expected, spot.place
            assert context.stream == block.stream, spot.place
            assert shape == (context.batch * context.positions, block.width), spot.place
            assert expected is None or context.positions == math.prod(expected), spot.place


def steps(run: Run, spots: list[Spot]) -> None:
    for spot in spots:
        expected = [visit.step for visit in run.visits(spot.place.path)]
        assert [context.step for context in spot.contexts] == expected, spot.place
        assert {context.n_steps for context in spot.contexts} == {run.steps}, spot.place
        assert all(context.timestep is not None for context in spot.contexts)


def fails_inside(run: Run, turn: int, before: dict) -> None:
    """An instrument fails, then a module of the denoiser does; by turns with an error and with an interrupt. `before` is what
    the pipeline was."""
    error = RuntimeError if turn % 2 else KeyboardInterrupt

    def fail(*args: Any) -> None:
        raise error("in the middle")

    def interrupted(before: dict, *spots: Spot) -> list:
        """What is not as it was after a call in which something failed."""
        inner = resolve(run.pipe, next(b.path for b in run.family.blocks if b.path.startswith(run.main))).module
        handle = None if any(spot.rule is fail for spot in spots) else inner.register_forward_pre_hook(fail)
        try:
            with pytest.raises(error, match="in the middle"), attach(run.pipe, *spots) if spots else nullcontext():
                run()
        finally:
            if handle is not None:
                handle.remove()
        run.pipe.maybe_free_model_hooks()  # what the interrupted call did not come to
        after = everything(run.pipe)
        return [key for key in before if before[key] != after[key]]

    failing = Spot(run.family.blocks[turn % len(run.family.blocks)], rule=fail)
    changed = interrupted(before, *run.spots(rule=zero), failing), interrupted(before, *run.spots(rule=zero))
    if not any(changed):
        assert torch.equal(run(), run.latents), "the pipeline is not what it was"
        return
    # Perturbed-attention guidance leaves its processors behind when it is interrupted; that is not ours.
    prepared.cache_clear()
    run.pipe = prepared(run.cell.family, run.cell.option, run.cell.mode)
    own = interrupted(everything(run.pipe))
    prepared.cache_clear()
    assert [key for keys in changed for key in keys if key not in own] == []


def gradients(run: Run) -> None:
    """The denoiser's own run, with a gradient: checkpointed blocks run again, and nothing may change or count twice."""
    model = component(run.pipe, run.main)
    given: list[tuple[tuple, dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    run()
    handle.remove()
    args, kwargs = given[0]
    blocks = [block for block in run.family.blocks if block.path.startswith(run.main + ".")]
    spots = [Spot(block, rule=zero) for block in blocks]

    def gradient() -> list[torch.Tensor]:
        bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
        name = next(name for name in ("sample", "hidden_states", "x") if name in bound.arguments)
        latent = bound.arguments[name]
        several = isinstance(latent, list)  # Z-Image is given one latent for each batch entry
        inputs = [each.detach().clone().requires_grad_() for each in (latent if several else [latent])]
        bound.arguments[name] = inputs if several else inputs[0]
        out = model(*bound.args[1:], **bound.kwargs)
        out = out[0] if isinstance(out, tuple) else next(iter(out.values()))
        for each in out if isinstance(out, list) else [out]:
            each.float().square().sum().backward(retain_graph=isinstance(out, list))
        return [each.grad for each in inputs if each.grad is not None]

    try:
        alone = gradient()
    except Exception as error:
        raise NotHere(f"diffusers itself fails: {type(error).__name__}: {error}") from error
    assert alone
    guidance = run.cell.guidance and not run.family.two_pass
    with (
        attach(run.pipe, *spots) as session,
        session.call(run.prompts, images_per_prompt=run.images_per_prompt, guidance=guidance),
    ):
        attached = gradient()
    torch.testing.assert_close(attached, alone, rtol=0, atol=0)
    for spot in spots:
        assert [context.recomputing for context in spot.contexts].count(False) == 1, spot.place


def check(cell: Cell, turn: int) -> dict[str, str | None]:
    """What came of every promise: None where it was kept, and otherwise what was wrong. Raises `NotHere`.

    `turn` counts a family's cells: what is tried at one place only goes through the places by it.
    """
    run = Run(cell)
    before = everything(run.pipe)  # what libraries put in at a first call is not ours
    outcome: dict[str, str | None] = {}

    def attempt(promise: str, keep: Callable[..., None], *arguments: Any) -> None:
        try:
            keep(*arguments)
        except NotHere:
            return  # there is nothing of this kind to promise anything about
        except Exception as error:
            outcome[promise] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        else:
            outcome[promise] = None

    spots, others = run.spots(rule=zero), [spot for io in ("input", "diff") for spot in run.spots(io, zero)]
    of_text = [Spot(block, rule=zero) for block in text_blocks(run)]
    try:
        with attach(run.pipe, *spots, *others, *of_text), listening(run) as heard:
            latents = run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return dict.fromkeys(PROMISES, reason)

    def same_bits() -> None:
        assert torch.equal(latents, run.latents), "a zero edit changed the latents"
        assert all(spot.contexts for spot in (*spots, *others))

    def restored() -> None:
        assert everything(run.pipe) == before

    of_model = [spot for spot in spots if not spot.place.path.startswith("text_encoder")]
    of_main = [spot for spot in of_model if spot.place.path.startswith(run.main + ".")]
    attempt("a neutral edit gives the same bits", same_bits)
    attempt("conditions of the rows", conditions, run, of_main, heard[run.main])
    if of_text:
        attempt("conditions in the text encoders", text_conditions, run, of_text, heard)
    attempt("grid", grids, run, spots)
    attempt("step", steps, run, of_model)
    attempt("an edit reaches the output", reaches, run, turn)
    if cell.mode == "gradient checkpointing":
        attempt("gradients through checkpoints", gradients, run)
    attempt("leaving restores", restored)
    attempt("an exception restores", fails_inside, run, turn, before)
    return outcome
