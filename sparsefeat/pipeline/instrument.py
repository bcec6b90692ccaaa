"""What is attached to a pipeline: `Instrument`, what it sees at a hookpoint (`Activations`), and what it may answer.

An instrument that adds a fixed direction to every conditional row of one block, complete:

    class Push(Instrument):
        def __init__(self, hookpoint, direction):
            self.hookpoint, self.direction = hookpoint, direction

        def hookpoints(self):
            return (self.hookpoint,)

        def at_hookpoint(self, activations, context):
            return Delta(context.row_condition()[:, None] * self.direction)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsefeat.frozen import Frozen

if TYPE_CHECKING:
    from sparsefeat.pipeline.context import Call, Context
    from sparsefeat.pipeline.hookpoints import Hookpoint


@dataclass(frozen=True)
class Delta:
    """Add `rows` [batch * positions, d_model] to the block's output (to its input at an `input` hookpoint).

    The sum is taken in float32, or in the output's dtype if that is wider, and rounded once. Anything that broadcasts
    to the rows' shape is accepted, so a direction [d_model] is an edit of every row.
    """

    rows: torch.Tensor


@dataclass(frozen=True)
class Replace:
    """Put `rows` [batch * positions, d_model] in the place of the activations.

    At a `diff` hookpoint the block's output becomes input + rows.
    """

    rows: torch.Tensor


class Activations:
    """The activations of one hookpoint in one run of its module, as instruments see them.

    `tensor` is what the module gave (or was given), [batch, channels, height, width] or [batch, positions, channels];
    `rows` is the same as [batch * positions, d_model], positions in row-major order, in the module's dtype. Do not
    write into either: answer with a `Delta` or a `Replace`.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self._rows: torch.Tensor | None = None
        self._codes: dict[int, Any] = {}

    @property
    def rows(self) -> torch.Tensor:
        if self._rows is None:
            self._rows = rows_of(self.tensor)
        return self._rows

    @property
    def width(self) -> int:
        """The channels of a row."""
        return self.tensor.shape[1 if self.tensor.ndim > 3 else -1]

    def code(self, sae: Any) -> Any:
        """`sae.encode(rows)`, computed once for all instruments here that hold this same SAE object.

        An edit by an instrument in between makes new activations, which are encoded anew.
        """
        if id(sae) not in self._codes:
            self._codes[id(sae)] = sae.encode(self.rows)
        return self._codes[id(sae)]


@dataclass(frozen=True)
class AttentionCall:
    """One attention inside a tapped module, as `F.scaled_dot_product_attention` was called for it, with its own tensors.

    `query` [batch, heads, queries, head_dim], `key` and `value` [batch, heads, keys, head_dim] are exactly what the
    processor computed: LoRA, fused projections, normalisation and rotary embeddings are in them. `scale` multiplies
    query . key; `mask` is the call's `attn_mask`. `index` counts such calls within one run of the module: an
    IP-Adapter's image keys come second, and `reads_text` says whether this one's keys are the prompt's. In a joint
    attention `streams` says which queries are which stream's, and the keys are in the same order: {"text": (0, 512),
    "image": (512, 4608)} as (start, stop); elsewhere it is empty. `text_tokens` is the length of the longest text in the
    batch, where the entries of one sequence come one by one.

    `output` [batch, heads, queries, head_dim] is what the attention gave, before the module's projection, and `lse`
    [batch, heads, queries] the natural logarithm of the sum over all keys of exp(scale * query . key + mask), where the
    kernel that torch chose gives it; None elsewhere.

    `unturned` are the queries before the rotary embedding, by the stream they are of or "all" for one sequence of both, each
    [batch, heads, queries, head_dim]; only where an instrument asks for them (`reads_unturned`) and the module normalises
    its queries, after which they can be seen.

    A `linear` attention has no softmax: `query` and `key` are its features, none of them negative, and query i gives key j
    the share query[i] . key[j] / sum over all keys of query[i] . key. It has neither output nor lse.
    """

    path: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: torch.Tensor | None
    is_cross: bool
    is_causal: bool = False
    index: int = 0
    streams: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    text_tokens: int = 0
    reads_text: bool = True
    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    linear: bool = False
    unturned: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def entry(self, row: int) -> AttentionCall:
        """The call of one batch entry alone."""
        mask = self.mask
        if mask is not None and mask.dim() >= 4 and mask.shape[0] > 1:
            mask = mask[row : row + 1]
        own = slice(row, row + 1)
        return replace(
            self,
            query=self.query[own],
            key=self.key[own],
            value=self.value[own],
            mask=mask,
            output=None if self.output is None else self.output[own],
            lse=None if self.lse is None else self.lse[own],
            unturned={stream: held[own] for stream, held in self.unturned.items()},
        )


class Enough(Exception):
    """Raised by an instrument that has all it wanted of a call: `pipe(...)` ends there, gives None, and counts as complete,
    but that what it had not reached is no error. In a loop of your own it is raised through to you.
    """


class Instrument:
    """Something attached to a pipeline. Every method may be left out; they are called in this order:

    `prepare` once, before anything is hooked; then for every call of the pipeline `begin_call`, `at_hookpoint` and
    `at_attention` as the modules run, `before_step` when the scheduler is about to step, `end_step` when a denoising step
    is complete, and `end_call` after a call that
    ended without an exception. A call that was interrupted has no `end_call`: put no clean-up there, and start afresh
    in `begin_call`. Modules of the pipeline that an instrument runs inside its own methods are not hooked.
    """

    reads_unturned = False
    """Whether `at_attention` needs `AttentionCall.unturned`, which takes the memory of the queries once more."""

    def members(self) -> tuple[Instrument, ...]:
        """What `attach` attaches in its place, in this order; an instrument that is made of others names them."""
        return (self,)

    def hookpoints(self) -> tuple[Hookpoint | str, ...]:
        """Where `at_hookpoint` is wanted; asked once, after `prepare`."""
        return ()

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        """Module paths of the attention modules whose calls `at_attention` wants to see; asked once, and the place to
        refuse a pipeline that cannot be read.
        """
        return ()

    def components(self, pipe: Any) -> tuple[str, ...]:
        """Names of the pipeline's components whose runs `at_component` wants to see; they need not run in a call. Asked
        once.
        """
        return ()

    def weights(self, pipe: Any) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Weights to change while attached: the path of a Linear or Conv2d, and a function from its weight to another of the
        same shape, which must not write into what it is given. Asked once, and the place to refuse weights of other shapes.

        A weight is one for all rows, so there is no condition; it is asked before every run of the component that it is in
        whether the instrument is `active`, and outside its steps the weight is as it was.
        """
        return {}

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        """The d_model this instrument needs at the hookpoint, checked before anything runs; None if any will do."""
        sae = getattr(self, "sae", None)
        return None if sae is None else sae.d_model

    def base_model(self) -> str | None:
        """The model that this instrument was made for, by its name; None if it does not say."""
        return getattr(getattr(getattr(self, "sae", None), "config", None), "base_model", None)

    def conditions(self) -> tuple[str, ...] | None:
        """The conditions of the rows it acts on; None if it takes all rows alike, and so needs not know them.

        By default what its attribute `condition` says: "cond", "cond+uncond-" for both of them, "both" or no attribute for
        all rows. Where the rows' conditions cannot be told, an instrument that acts on some is refused.
        """
        condition = getattr(self, "condition", None)
        known = re.findall("uncond|cond|image|perturbed", condition) if isinstance(condition, str) else []
        return tuple(known) or None

    def idle(self) -> str | None:
        """Why it did nothing in the call that is complete, where that is hardly what was meant: a clause, which is warned
        with, once a session. None if it did something, or was asked for nothing."""
        return None

    def prepare(self, pipe: Any) -> None:
        """Work before the run; the pipeline may be called here, and nothing of this session is attached yet."""

    def begin_call(self, call: Call) -> None:
        """The pipeline was called."""

    def active(self, context: Context) -> bool:
        """Whether `at_hookpoint`, or the change of weights, is wanted now. Outside its window of steps an instrument costs no encode."""
        return True

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | Replace | None:
        """The module of one of the hookpoints ran. None leaves it untouched."""
        return None

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        """One of the attention modules has attended. Where the texts of a batch differ in length within one sequence, the
        batch entries come one by one.
        """

    def at_component(
        self, name: str, arguments: Mapping[str, Any], context: Context
    ) -> Mapping[str, torch.Tensor] | None:
        """One of the components is about to run on these arguments of its forward, by name. What is answered, tensors of
        the same shapes by the names of arguments, it runs on in their place.
        """
        return None

    def before_step(self, sample: torch.Tensor, context: Context) -> torch.Tensor | None:
        """The scheduler is about to step from the latents `sample`, the `context.evaluation`-th time in this loop; what is
        answered, of the same shape, it steps from instead. There is no hookpoint and no batch in this context.
        """
        return None

    def end_step(self, context: Context) -> None:
        """The denoising step `context.step` is complete. There is no hookpoint and no batch in this context."""

    def end_call(self, call: Call) -> Any:
        """The pipeline's call is complete. What is returned is the call's recording, `session[instrument]`."""
        return None


class FrozenInstrument(Frozen, Instrument):
    """An instrument that goes on as it was made; to have it otherwise, another is made and attached."""


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, channels, *grid] or [batch, positions, channels] -> [batch * positions, channels]."""
    if tensor.ndim > 3:  # channels come second in convolutional layouts, last in sequences
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def like_tensor(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `rows_of`: rows laid out as `tensor` is."""
    if tensor.ndim > 3:
        batch, channels, *grid = tensor.shape
        return rows.reshape(batch, *grid, channels).movedim(-1, 1)
    return rows.reshape(tensor.shape)
