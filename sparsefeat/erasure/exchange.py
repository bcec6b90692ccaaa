"""Exchange: a concept's latents of a text encoder say another concept, by decoder rows solved in closed form.

An erased concept leaves a hole, and what the model puts there it was never trained to draw: taking the latents of `fox` out of
`a noto emoji of a fox` leaves a prompt that no style belongs to. Here something stands in its place (an anchor, as in
arXiv 2303.13516, and UCE's guide, arXiv 2308.14761). With F the latents of the concept by SAeUron's score, z_F their values in a
row x, and X, X' the rows of prompts of the concept and of the same prompts with the other concept:

    x' = x + z_F U      U = argmin |Z_F U - (X' - X)|^2 + |O_F U|^2 + lambda |U|^2

O_F are the values in rows of all other concepts, which are to stay. It is UCE's closed form, on the latents of an SAE in the
place of the weights: a row in which none of F is active is left as it is, to the bit, and |F| vectors are all that is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.arguments import kept, whole
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.features.collecting import check_prompts
from sparsefeat.features.prompts import OwnTokens, layer_outputs_and_tokens
from sparsefeat.features.scores import normalized_mean_difference
from sparsefeat.features.statistics import OUTSIDE_SCHEDULE, Statistics
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.steer import row_weights
from sparsefeat.steering.where import check_condition

# lambda, as a part of the mean square of a latent: makes the solution the one there is, and moves it by that part.
RIDGE = 1e-4


@register("sparsefeat.erasure:Exchange")
class Exchange(SavableInstrument):
    """Instrument: where a concept's latents are active in a text encoder, the prompt says another concept. Made by `Exchange.fit`.

    Args:
        sae: of a layer of a text encoder.
        latents: F, their numbers.
        change: [F, d_model], U: what a latent's activation adds to the row, for each unit.
        concepts: what is erased and what stands in its place, for the record.
        condition: rows that are edited, as in `Steer`.
        at: hookpoint; default the SAE's.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name; `change` has not a finite row for each latent.
    """

    kept: ClassVar[tuple[str, ...]] = ("latents", "change", "concepts")

    def __init__(
        self,
        sae: SAE,
        latents: Sequence[int] | Tensor,
        change: Tensor,
        concepts: Sequence[str] = (),
        *,
        condition: str = "cond",
        at: str | Hookpoint | None = None,
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        self.sae: SAE = reconstructing(sae)
        sae.directions(latents)  # names a latent that does not exist
        self.latents: Tensor = torch.as_tensor(latents, dtype=torch.int64).clone()
        self.change: Tensor = kept("change", change).detach().float().cpu()
        if self.change.shape != (len(self.latents), sae.d_model) or len(self.latents.unique()) != len(self.latents):
            raise ValueError(
                f"change {list(self.change.shape)} must be [{len(self.latents)}, {sae.d_model}], one row for each of different "
                "latents."
            )
        self.concepts: tuple[str, ...] = tuple(concepts)
        self.condition: str = check_condition(condition)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        pipe: Any,
        sae: SAE,
        target: str,
        prompts: Mapping[str, Sequence[str]],
        *,
        into: str | None = None,
        n_latents: int = 32,
        condition: str = "cond",
        at: str | Hookpoint | None = None,
        **call: Any,
    ) -> Exchange:
        """Encode every prompt once, choose the latents, and solve. Nothing is drawn.

        Args:
            target: the concept to erase, a key of `prompts`.
            prompts: concept -> prompts, at least two concepts; the same sentences for each, in the same order, so that
                the target's first prompt becomes the first of the concept that stands in its place.
            into: the concept that stands in its place; default the one whose prompts' codes are most like the target's.
            n_latents: the latents of the highest scores above 0.
            condition, at: of the instrument.
            call: arguments of the calls that it will run in that say how prompts are encoded, such as max_sequence_length.

        Raises:
            TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
            ValueError: names the argument: a concept that is not in `prompts`, not as many prompts for it as for its stand-in, or
                none of the latents is more active with it than without.
        """
        where = hookpoint_of(sae, at)
        reconstructing(sae)
        check_call(pipe, call, cls.fit)
        check_condition(condition)
        whole("n_latents", n_latents, 1, sae.n_latents)
        check_prompts(prompts)
        for argument, name in (("target", target), ("into", into)):
            if (not isinstance(name, str) or name not in prompts) and not (argument == "into" and name is None):
                raise ValueError(f"{argument}={name!r} must be a key of prompts={list(prompts)}.")
        if len(prompts) < 2 or into == target:
            raise ValueError(f"prompts={list(prompts)} must have another concept to stand in the place of {target!r}.")
        found = {c: list(layer_outputs_and_tokens(pipe, where, list(its), call)) for c, its in prompts.items()}
        beside_rows = next(iter(found.values()))[0][0].device
        if sae.device != beside_rows:
            sae.to(beside_rows)
        rows = {c: torch.cat([out[own.start :] for out, own in texts]) for c, texts in found.items()}
        codes = {c: sae.encode(x) for c, x in rows.items()}
        statistics = Statistics(prompts, sae.n_latents)
        for i, code in enumerate(codes.values()):
            statistics.add(code, torch.full((code.rows,), i), OUTSIDE_SCHEDULE)
        others = statistics.others(target)
        chosen = into or _most_alike({c: statistics.mean(c) for c in prompts}, target)
        if len(found[chosen]) != len(found[target]):
            raise ValueError(
                f"prompts[{target!r}] are {len(found[target])} and prompts[{chosen!r}] {len(found[chosen])}; give the same "
                "sentences for both, one beside the other."
            )
        scores = normalized_mean_difference(statistics.mean(target), statistics.mean(others))
        order = scores.argsort(descending=True, stable=True)[:n_latents]
        latents = order[scores[order] > 0].sort().values
        if not len(latents):
            raise ValueError(f"no latent is more active with {target!r} than without; give prompts that differ.")
        pairs = zip(found[target], found[chosen], strict=True)
        wanted = torch.cat([_beside(own, other)[own[1].start :] - own[0][own[1].start :] for own, other in pairs])
        z, *kept = (_values(codes[c], sae, rows[c], latents).double() for c in (target, *others))
        gram = z.T @ z + sum(o.T @ o for o in kept)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(latents), dtype=gram.dtype, device=gram.device)
        change = torch.linalg.solve(gram, z.T @ wanted.double())
        return cls(sae, latents.cpu(), change.float(), (target, chosen), condition=condition, at=where)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        x = activations.rows
        beside(self.sae, activations, context)
        values = _values(activations.code(self.sae), self.sae, x, self.latents)
        weight = row_weights(self.condition, None, context, len(x), 0).to(values)
        return Delta((weight[:, None] * values) @ self.change.to(values))

    def __repr__(self) -> str:
        return f"Exchange({' for '.join(reversed(self.concepts))}: {len(self.latents)} latents, at {self.at})"


def _values(code: SparseCode, sae: SAE, x: Tensor, latents: Tensor) -> Tensor:
    """z_F of rows x in activations' units, fp32 [rows, F]."""
    values, scale = code.select(latents).float(), sae.row_scale(x)
    return values if scale is None else values * scale.float()


def _most_alike(means: Mapping[str, Tensor], target: str) -> str:
    centre = torch.stack(list(means.values())).mean(0)
    others = [c for c in means if c != target]
    alike = [torch.cosine_similarity(means[c] - centre, means[target] - centre, dim=0) for c in others]
    return others[int(torch.stack(alike).argmax())]


def _beside(own: tuple[Tensor, OwnTokens], other: tuple[Tensor, OwnTokens]) -> Tensor:
    """For every position of a prompt the row of the other's that says the same, or what stands in its place, [length, d_model].

    Tokens that both begin with, and that both end with, belong to each other; between them the words that differ, the last
    of one to the last of the other. Padding belongs to padding.
    """
    (rows, mine), (others, its) = own, other
    a, b = mine.ids, its.ids
    shorter = min(len(a), len(b))
    before = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    after = next((i for i in range(shorter - before) if a[-1 - i] != b[-1 - i]), shorter - before)
    words_differ_at = max(min(before, len(b) - after - 1), 0)
    of_text = [its.start + (i if i < before else max(len(b) - len(a) + i, words_differ_at)) for i in range(len(a))]
    of_padding = [min(max(p, its.stop), len(others) - 1) for p in range(mine.stop, len(rows))]
    return others[torch.tensor([*range(mine.start), *of_text, *of_padding], device=others.device)]
