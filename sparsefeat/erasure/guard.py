"""Guard: a picture in whose making a concept's latents fire as no other prompt makes them goes on without its prompt.

What is edited where prompts are read can be got round by words that were made for it; what they bring back has to pass through
the denoiser all the same. With z the mean code over an image's positions at a step, mu and C the mean and the covariance of z at the
first step, where nothing is drawn yet and the prompt alone speaks, of pictures without the concept, mu_c the mean with it, Fisher's
discriminant

    s = w . (z - mu)      w = v / v . (mu_c - mu)      v = (C + lambda I)^-1 (mu_c - mu)

is 0 for the others on average and 1 for the concept. From the first step on at which s exceeds a limit, the image's conditional
prediction is its unconditional one. The limit is above every s without the concept, so that where something else keeps the concept
away (`Exchange`) ordinary prompts are left as they are, to the bit, and only what gets round it is met.

The gradient of the switch is that of s / limit (straight through, arXiv 1308.3432): who searches for words is told the way out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.arguments import kept, number
from sparsefeat.erasure.replace_where import unconditional_rows
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.features.collecting import check_prompts, run_prompts
from sparsefeat.pipeline import Activations, Call, Context, Delta, Hookpoint, Instrument, attach, resolve
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.together import Together

# lambda, as a part of the largest variance of a latent.
RIDGE = 1e-2


@register("sparsefeat.erasure:Guard")
class Guard(SavableInstrument):
    """Instrument: an image whose s exceeds the limit is drawn without its prompt from there on. Made by `guard_concept`.

    `run[guard]` are the images of the call, by their place in the output, of which that is so.

    Args:
        sae: of a module of the denoiser.
        discriminant: [n_latents], w over the limit of s.
        limit: which discriminant . z exceeds where s exceeds its own: 1 + discriminant . mu.
        concept: for the record.
        at: hookpoint; default the SAE's.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name; in a call, the unconditional prediction is not in the same run of the
            denoiser as the conditional one.
    """

    kept: ClassVar[tuple[str, ...]] = ("discriminant", "limit", "concept")

    def __init__(
        self, sae: SAE, discriminant: Tensor, limit: float, concept: str = "", *, at: str | Hookpoint | None = None
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        self.sae: SAE = sae
        self.discriminant: Tensor = kept("discriminant", discriminant).detach().float().cpu()
        if self.discriminant.shape != (sae.n_latents,):
            raise ValueError(f"discriminant {list(discriminant.shape)} must be [{sae.n_latents}], one for each latent.")
        self.limit: float = number("limit", limit)
        self.concept: str = concept
        self._prediction: Hookpoint = Hookpoint(self.at.path.partition(".")[0])
        self._tripped: dict[int, Tensor] = {}

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at, self._prediction)

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return self.sae.d_model if hookpoint == self.at else None

    def conditions(self) -> tuple[str, ...]:
        return ("cond", "uncond")

    def begin_call(self, call: Call) -> None:
        self._tripped = {}

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        if context.hookpoint == self.at:
            self._look(activations, context)
            return None
        x = activations.rows
        wanted = context.row_condition("cond").nonzero()[:, 0]
        if not len(wanted):
            return None
        other = unconditional_rows(
            wanted, context
        )  # before anything has tripped: that it could not react is known at once
        images = [image for _, image in context.entries]
        if not any(image in self._tripped for image in images):
            return None
        untouched = torch.zeros((), device=x.device, dtype=torch.float32)
        switches = torch.stack([self._tripped.get(image, untouched).to(x.device) for image in images])
        wide = torch.promote_types(x.dtype, torch.float32)
        change = switches[wanted // context.positions][:, None] * (x[other].to(wide) - x[wanted].to(wide))
        return Delta(change.new_zeros(x.shape).index_copy(0, wanted, change))

    def _look(self, activations: Activations, context: Context) -> None:
        code = activations.code(beside(self.sae, activations, context))
        reached = mean_code(code, context) @ self.discriminant.to(code.values.device)
        for (condition, image), s in zip(context.entries, reached, strict=True):
            if condition == "cond" and image not in self._tripped and float(s.detach()) > self.limit:
                self._tripped[image] = 1 + s - s.detach()

    def end_call(self, call: Call) -> tuple[int, ...]:
        return tuple(sorted(self._tripped))

    def __repr__(self) -> str:
        return f"Guard({self.concept}: at {self.at})"


def mean_code(code: SparseCode, context: Context) -> Tensor:
    """fp32 [batch, n_latents], z of every entry."""
    values = code.values.reshape(-1).float()
    places = code.row_ids.reshape(-1) // context.positions * code.n_latents + code.indices.reshape(-1)
    total = values.new_zeros(context.batch * code.n_latents).index_add(0, places, values)
    return total.reshape(context.batch, -1) / context.positions


class _MeanCodes(Instrument):
    """Keeps z of every conditional entry at every step."""

    condition = "cond"

    def __init__(self, sae: SAE):
        self.at, self.sae = hookpoint_of(sae, None), sae
        self.steps: list[Tensor] = []
        self.kept: list[Tensor] = []

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        z = mean_code(activations.code(beside(self.sae, activations, context)), context).detach().cpu()
        self.kept.append(z[[condition == "cond" for condition, _ in context.entries]])
        self.steps.append(torch.full((len(self.kept[-1]),), context.step or 0))

    def found(self) -> tuple[Tensor, Tensor]:
        """fp64 [images, n_latents] of the first step, and [images x steps, n_latents] of all."""
        z, steps = torch.cat(self.kept).double(), torch.cat(self.steps)
        return z[steps == steps.min()], z


def guard_concept(
    pipe: Any,
    saes: Sequence[SAE],
    target: str,
    prompts: Mapping[str, Sequence[str]],
    *,
    behind: Sequence[Instrument] = (),
    margin: float = 1.5,
    batch_size: int = 4,
    seed: int | None = 0,
    **call: Any,
) -> Together:
    """A `Guard` at each SAE's hookpoint, from pictures of the target and from pictures without it.

    Holds images x steps x n_latents x 4 bytes of each SAE; a few steps say as much as many.

    Args:
        saes: of modules of the denoiser.
        target: the concept, a key of `prompts`.
        prompts: concept -> prompts, the target's and at least one other's.
        behind: what the guards will stand behind, such as an `Exchange`. Then the target's own prompts, which it makes say
            something else, are to pass too.
        margin: the limit of s, over the highest s of a picture that is to pass.
        batch_size, seed, call: of the runs; see `collect_statistics`.

    Raises:
        TypeError: one of `saes` is no SAE; an argument that the pipeline's call does not take.
        ValueError: an argument that cannot be, by its name; a target that is no key of `prompts`, or the only one; an SAE's latents
            do not tell the target from the others.
    """
    check_call(pipe, call, guard_concept, *GIVEN_TO_SEVERAL)
    check_prompts(prompts)
    number("margin", margin, 1)
    if not isinstance(target, str) or target not in prompts or len(prompts) < 2:
        raise ValueError(f"target={target!r} must be a key of prompts={list(prompts)}, which need another concept.")
    if not isinstance(saes, (list, tuple)) or not saes:
        raise ValueError(f"saes={saes!r:.80} must be a list of the SAEs of one or more modules of the denoiser.")
    for i, sae in enumerate(saes):
        where = hookpoint_of(sae, None, f"saes[{i}]")
        if not resolve(pipe, where.path).family.runs_in_steps:
            raise ValueError(f"saes[{i}] is of {where}, no block of the denoiser; a guard looks at what is drawn.")
    passing = dict.fromkeys(p for c, its in prompts.items() if behind or c != target for p in its)
    if len(passing) < 2:
        raise ValueError(
            f"prompts have one picture without {target!r}, and a guard is told by how several differ; give two at least."
        )

    def seen(texts: Sequence[str], *besides: Instrument) -> list[tuple[Tensor, Tensor]]:
        watching = [_MeanCodes(sae) for sae in saes]
        with attach(pipe, *besides, *watching):
            run_prompts(pipe, texts, batch_size=batch_size, seed=seed, **call)
        return [one.found() for one in watching]

    made = []
    for sae, (z, later), (concept, _) in zip(saes, seen(list(passing), *behind), seen(prompts[target]), strict=True):
        mu = z.mean(0)
        w = _discriminant(z - mu, concept.mean(0) - mu)
        limit = margin * float(((later - mu) @ w).max())
        if 0 < limit < 1:  # else this module's latents do not tell the target from the nearest of the others
            made.append(Guard(sae, w / limit, 1 + float(mu @ w) / limit, target))
    if not made:
        raise ValueError(
            f"no SAE's latents tell {target!r} from the other pictures by the margin of {margin:g}; take SAEs of other modules, or "
            "a smaller margin."
        )
    return Together(*made)


def _discriminant(centred: Tensor, apart: Tensor) -> Tensor:
    """w [n_latents] of samples without the concept [samples, n_latents] and the difference of means.

    (C + lambda I)^-1 d = (d - X^T (X X^T + n lambda I)^-1 X d) / lambda, with as many unknowns as there are samples.
    """
    n = len(centred)
    ridge = RIDGE * float(centred.square().mean(0).max())
    gram = centred @ centred.T + n * ridge * torch.eye(n, dtype=centred.dtype)
    v = apart - centred.T @ torch.linalg.solve(gram, centred @ apart)
    return v / (v @ apart)
