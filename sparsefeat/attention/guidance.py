"""Guidance by maps: latents are moved, step by step, to where the words' maps are as they should be.

    guide = AttendAndExcite(["fox", "rocket"])
    with sf.attach(pipe, guide) as run:
        image = pipe("a fox and a rocket").images[0]
    run[guide].losses

When the denoiser is about to run for a step, it is run on the conditional row alone with gradients; a loss of its maps
says where what it is given, x, is to move, x' = x - size dloss/dx, and both the denoiser and the scheduler go on from
there. A scheduler that holds its latents on another scale, z = x / s (Euler's), goes on from z' = x' / s: the same size
means the same with every scheduler. Maps are softmaxes over the text: of a joint attention (SD3, FLUX, Qwen-Image) those
of the image's queries over the text's keys alone, which is what a cross-attention has. The maps' gradient comes from `attention_map`: no [heads, positions, tokens] is kept by it, though torch's
own attention keeps what it needs of the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sparsefeat_kernels import attention_map
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefeat.arguments import mapping, number, sides, taking_gradients, whole
from sparsefeat.attention.cross_attention import cross_attentions_of, text_attentions, text_attentions_of
from sparsefeat.attention.losses import neglect, retention, segregation, sharpened
from sparsefeat.attention.moved_latents import MovedLatents, latents_argument, rows_of_arguments
from sparsefeat.attention.reading import refuse_unknown_words
from sparsefeat.attention.seen_prompts import SeenPrompts
from sparsefeat.attention.sums import cut, of_four
from sparsefeat.pipeline import Call, Context, FrozenInstrument, UnknownConditionError
from sparsefeat.pipeline.context import HOW_TO_STATE, UNKNOWN
from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.registry import family_of

# The step size of both methods at the first step, and how it falls: 20 sqrt(1 .. 1/2) (Attend-and-Excite's code).
SCALE = 20.0
# Where text and image attend to each other: the way that a move takes, of the latent's length. There a map is a mean over all
# layers, with little of a gradient: 20 moved the latent of the embedded UNet's first edition by 0.005 to 0.009 of its length in each of ten steps,
# that of a small SD3 trained on the same drawings by 0.0001 to 0.0002.
FAR = 0.01
# A loss of half precision is made larger before its gradient is taken, and the gradient smaller: fp16 ends at 6e-8.
HALF_SCALE = 2.0**10


@dataclass(frozen=True)
class GuidanceRecording:
    """Of one call, by (image, step): the loss before the first and before the last move, which are one where there is one
    move, as what the last one came to is not looked at; and how often the latent was moved.
    """

    losses: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    moves: dict[tuple[int, int], int] = field(default_factory=dict)


class MapGuidance(FrozenInstrument):
    """What the methods share: the pass with gradients, and the move of the latents.

    Args:
        words: what to guide, each a word or phrase of the prompt (the mean of its tokens' maps), or token positions where
            the prompt is not known.
        resolution: (height, width) of the maps; default the level whose side is nearest to a quarter of the latent's
            (16 x 16 of Stable Diffusion's 64 x 64).
        scale: of the step size, a factor of the loss's gradient. Default: 20, the papers' for Stable Diffusion; where text and
            image attend to each other (SD3, FLUX), whatever moves the latent by a hundredth of its length (L2).
    """

    condition = "cond"

    def __init__(self, words: Sequence[Any], resolution: tuple[int, int] | None = None, scale: float | None = None):
        if isinstance(words, str) or not isinstance(words, Sequence) or not words:
            raise ValueError(f"words={words!r} must be a list of words of the prompt, as in ['fox', 'rocket'].")
        for word in words:
            positions = word if isinstance(word, Sequence) and not isinstance(word, str) else [word]
            if not positions or not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in positions):
                raise ValueError(f"words={words!r} has {word!r}; name a word, a token position, or several of these.")
        self.words: tuple[Any, ...] = tuple(words)
        self.resolution: tuple[int, int] | None = None if resolution is None else sides("resolution", resolution)
        self.scale: float | None = None if scale is None else number("scale", scale)
        self._prompts = SeenPrompts()
        self._denoisers: tuple[str, ...] = ()
        self.begin_call(Call())

    def components(self, pipe: Any) -> tuple[str, ...]:
        modules = text_attentions(pipe, type(self).__name__)
        self._denoisers = tuple(dict.fromkeys(path.partition(".")[0] for path in modules))
        joint = [root for name in self._denoisers if not cross_attentions_of(root := getattr(pipe, name))]
        refuse_unknown_words(pipe, [(family_of(root), root) for root in joint], self.words, type(self).__name__)
        return (*self._denoisers, *self._prompts.components(pipe))

    def prepare(self, pipe: Any) -> None:
        self._prompts.prepare(pipe)

    def begin_call(self, call: Call) -> None:
        self._call = call
        self._prompts.begin_call(call)
        self._recording = GuidanceRecording()
        self._moment: tuple[int, int | None] | None = None  # loop and evaluation of the moves in hand
        self._step: tuple[int, int] | None = None  # loop and step that were last moved
        self._moved: MovedLatents | None = None

    def end_call(self, call: Call) -> GuidanceRecording:
        return self._recording

    # What the methods are

    def acts(self, step: int, n_steps: int) -> bool:
        """Whether latents are moved at this step."""
        return True

    def moved(self, latent: Tensor, guided: Guided, image: int, step: int, n_steps: int) -> Tensor:
        """The latent [1, ...] of one image moved; `guided.loss`, `guided.descended` do the work."""
        raise NotImplementedError

    def size(self, step: int, n_steps: int) -> float:
        """scale sqrt(1 - i / (2 (n - 1))), of step i of n."""
        return (SCALE if self.scale is None else self.scale) * math.sqrt(1 - 0.5 * step / max(n_steps - 1, 1))

    # When

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> Mapping[str, Tensor] | None:
        if name not in self._denoisers:
            self._prompts.at_component(name, arguments, context)
            return None
        if UNKNOWN in context.condition:
            raise UnknownConditionError(
                f"which of the {context.batch} batch entries of {name} are conditional cannot be told, and "
                f"{type(self).__name__} guides these: {HOW_TO_STATE}"
            )
        if context.step is None or context.n_steps is None or context.recomputing:
            return None
        taking_gradients(type(self).__name__)
        moment = context.loop, context.evaluation
        if moment != self._moment:
            self._moment, self._moved = moment, None
            step = context.loop, context.step
            # A second-order scheduler's second run in a step goes on from what it kept of the first.
            if step == self._step or not self.acts(context.step, context.n_steps):
                self._moment = None
                return None
            self._step = step
            self._moved = MovedLatents(type(self).__name__, self._call.pipe, arguments)
        if self._moment is None:
            return None
        return self._changed(name, arguments, context)

    def _changed(self, name: str, arguments: Mapping[str, Any], context: Context) -> Mapping[str, Tensor]:
        """The denoiser's input with every row moved as its image's conditional one."""
        argument = latents_argument(arguments)
        sample = arguments[argument]
        step, n_steps, moved = context.step, context.n_steps, self._moved
        assert step is not None
        assert n_steps is not None
        assert moved is not None
        for row, (condition, image) in enumerate(zip(context.condition, context.prompt_index, strict=True)):
            if condition == "cond" and image not in moved:
                own = rows_of_arguments(arguments, [row], len(sample))
                root = getattr(self._call.pipe, name)
                far = FAR / SCALE if self.scale is None and not cross_attentions_of(root) else None
                guided = Guided(self._call, root, own, argument, self._chosen(image, root), self.resolution, far)
                latent = sample[row : row + 1].detach()
                moved.move(image, latent[0], self.moved(latent, guided, image, step, n_steps)[0])
                self._recording.losses[image, step] = guided.losses[0], guided.losses[-1]
                self._recording.moves[image, step] = guided.moves
        return {argument: moved.applied(sample, context.prompt_index)}

    def before_step(self, sample: Tensor, context: Context) -> Tensor | None:
        if self._moment is None or (context.loop, context.evaluation) != self._moment or not self._moved:
            return None
        self._moment = None
        return self._moved.of_the_scheduler(sample)

    def _chosen(self, image: int, root: nn.Module) -> Chosen:
        def positions(keys: int) -> tuple[list[tuple[int, ...]], tuple[bool, bool]]:
            found = []
            for word in self.words:
                parts = [word] if isinstance(word, (str, int)) else list(word)
                tokens: tuple[int, ...] = ()
                for part in parts:
                    tokens += self._prompts.tokens(image, keys, part, root) if isinstance(part, str) else (part,)
                found.append(tokens)
            return found, self._prompts.marks(image, keys, root)

        return positions


Chosen = Callable[[int], tuple[list[tuple[int, ...]], tuple[bool, bool]]]
"""Of the number of keys: the token positions of each word in an image's prompt, and whether the first and the last are marks."""


@dataclass(eq=False)
class Guided:
    """One image's conditional row, at one step: the maps of the words as a function of the latent."""

    call: Call
    root: nn.Module
    arguments: Mapping[str, Any]
    argument: str
    chosen: Chosen
    resolution: tuple[int, int] | None
    far: float | None
    losses: list[float] = field(default_factory=list)
    moves: int = 0

    def maps(self, latent: Tensor) -> Tensor:
        """[words, h, w] of the latent, `sharpened`."""
        arguments = {**self.arguments, self.argument: latent}
        summed: dict[tuple[int, int], list[Any]] = {}
        family = family_of(self.root)
        run = Run(self.root, arguments, family.image_grid(self.root, arguments))

        def seen(path: str, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> None:
            streams = family.attention_streams(path, run, query.shape[2])
            own, grid, mask = streams[0] if isinstance(streams, tuple) else streams, run.grid, of_four(mask)
            if "text" in own and "image" in own:
                rows, columns = slice(*own["image"]), slice(*own["text"])
                query, key = query[:, :, rows], key[:, :, columns]
                mask = None if mask is None else cut(cut(mask, 2, rows), 3, columns)
            else:
                grid = family.grid(run, (1, query.shape[2], 1))
            if grid is None or len(grid) != 2:
                raise ValueError(f"attention from {query.shape[2]} positions is of no image grid; guidance needs one.")
            found = attention_map(query, key, scale, mask)[0]  # [positions, tokens]
            held = summed.setdefault((int(grid[0]), int(grid[1])), [0, 0])
            held[0], held[1] = held[0] + found, held[1] + query.shape[1]

        own_dtype = self.call.as_the_pipeline(latent.device)
        with torch.enable_grad(), own_dtype, _watching(text_attentions_of(self.root), seen):
            self.root(**arguments)
        if not summed:
            raise ValueError(
                f"the attention of {type(self.root).__name__} cannot be seen by guidance; use its default processors, "
                "set_default_attn_processor()."
            )
        grid = self._level(list(summed), latent.shape[-2:])
        total, heads = summed[grid]
        maps = (total / heads).T.reshape(-1, *grid)
        words, (marked, ended) = self.chosen(len(maps))
        return sharpened(maps, words, marked, ended)

    def _level(self, grids: list[tuple[int, int]], latent: Sequence[int]) -> tuple[int, int]:
        if self.resolution is not None:
            height, width = self.resolution
            if (height, width) not in grids:
                raise ValueError(f"resolution={self.resolution} has no maps here; there are {sorted(grids)}.")
            return height, width
        wanted = math.log(max(latent[0] * latent[1] / 16, 1))
        return min(grids, key=lambda grid: abs(math.log(grid[0] * grid[1]) - wanted))

    def loss(self, latent: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of the maps, and the latent that it is a function of."""
        latent = latent.detach().requires_grad_()
        with torch.enable_grad():
            loss = of(self.maps(latent))
        self.losses.append(float(loss.detach()))
        return loss, latent

    def descended(self, loss: Tensor, latent: Tensor, size: float) -> Tensor:
        """The latent moved by -size times the loss's gradient, or against it by size times `far` of the latent's length."""
        if not loss.requires_grad or float(loss) == 0:
            return latent.detach()
        larger = HALF_SCALE if latent.dtype == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(loss, latent, torch.full_like(loss, larger))
        self.moves += 1
        wide = torch.promote_types(latent.dtype, torch.float32)
        step = gradient.to(wide) / larger
        if self.far is None:
            step = step * size
        else:
            length = torch.linalg.vector_norm(step)
            step = step * torch.where(
                length > 0, size * self.far * torch.linalg.vector_norm(latent.to(wide)) / length, 0
            )
        return (latent.detach().to(wide) - step).to(latent.dtype)


class AttendAndExcite(MapGuidance):
    """No word may be neglected: the latent moves until every word's map has a high place.

        loss = max over words of (1 - highest value of its map)

    Args:
        words, resolution, scale: as in `MapGuidance`.
        steps: how many steps, from the first, a latent is moved once in.
        thresholds: step -> the height that every word's map has to reach there; until it does, or 20 moves are made, the
            latent is moved before its usual move.

    Source: Chefer et al., "Attend-and-Excite", SIGGRAPH 2023; the constants are those of its code.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    MOST_MOVES = 20

    def __init__(
        self,
        words: Sequence[Any],
        steps: int = 25,
        thresholds: Mapping[int, float] | None = None,
        resolution: tuple[int, int] | None = None,
        scale: float | None = None,
    ):
        super().__init__(words, resolution, scale)
        self.steps: int = whole("steps", steps)
        given = {0: 0.05, 10: 0.5, 20: 0.8} if thresholds is None else thresholds
        self.thresholds: dict[int, float] = dict(
            mapping("thresholds", given, "steps to heights of 0 to 1, as {10: 0.5}")
        )
        for step, height in self.thresholds.items():
            number(f"thresholds[{step}]", height, 0, 1)

    def acts(self, step: int, n_steps: int) -> bool:
        return step < self.steps or step in self.thresholds

    def moved(self, latent: Tensor, guided: Guided, image: int, step: int, n_steps: int) -> Tensor:
        size = self.size(step, n_steps)
        loss, at = guided.loss(latent, neglect)
        if step in self.thresholds and float(loss) > 1 - self.thresholds[step]:
            for _ in range(self.MOST_MOVES):
                loss, at = guided.loss(guided.descended(loss, at, size), neglect)
                if float(loss) <= 1 - self.thresholds[step]:
                    break
        return guided.descended(loss, at, size) if step < self.steps else at.detach()


class AStar(MapGuidance):
    """Words stay apart, and where they were: A-STAR's losses, at every step.

        loss = sum over pairs of words of overlap(map, map)                                    (segregation)
             + sum over words of 1 - overlap(map, where it was above its mean one step before)   (retention)

    The paper leaves the threshold and the step size open; here they are the map's mean and Attend-and-Excite's.

    Source: Agarwal et al., "A-STAR", ICCV 2023.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def begin_call(self, call: Call) -> None:
        super().begin_call(call)
        self._before: dict[int, Tensor] = {}

    def moved(self, latent: Tensor, guided: Guided, image: int, step: int, n_steps: int) -> Tensor:
        seen: list[Tensor] = []

        def of(maps: Tensor) -> Tensor:
            seen.append(maps.detach())
            loss = segregation(maps)
            return loss + retention(maps, self._before[image]) if image in self._before else loss

        loss, at = guided.loss(latent, of)
        self._before[image] = seen[0] > seen[0].mean((1, 2), keepdim=True)
        return guided.descended(loss, at, self.size(step, n_steps))


@contextmanager
def _watching(modules: Mapping[str, nn.Module], seen: Callable[..., None]) -> Iterator[None]:
    """Within this, `seen(path, query, key, mask, scale)` for the first attention of each run of these modules."""
    inside: list[str | None] = []
    handles = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention and inside and inside[-1]:
                path, inside[-1] = inside[-1], None  # what follows in this module is an IP-Adapter's image
                given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
                given |= kwargs
                seen(path, given["query"], given["key"], given.get("attn_mask"), given.get("scale"))
            return func(*args, **kwargs)

    def end(*_: Any) -> None:  # what a hook returns is taken for the module's output
        inside.pop()

    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: inside.append(path)))
            handles.append(module.register_forward_hook(end))
        with Watch():
            yield
    finally:
        for handle in handles:
            handle.remove()
