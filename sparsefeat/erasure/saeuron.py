"""SAeUron: erase a concept by its latents (Cywiński and Deja, ICML 2025, arXiv 2501.18052).

With mu_i(t, c) the mean activation of latent i over all positions of the prompts of concept c at timestep t:

    score      s_i(t) = mu_i(t, c) / sum_j mu_j(t, c) - mu_i(t, not c) / sum_j mu_j(t, not c)      (others pooled)
    selection  F_t    = latents with s_i(t) strictly above the percentile p of s(t)
    threshold  m_i(t) = mean over all concepts of mu_i(t, .)
    edit       z'_i   = gamma mu_i(t, c) z_i   where i in F_t and z_i > m_i(t), else z_i

gamma is negative; the paper's edit multiplies by mu as well, so it is quadratic in the scale of the activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsefeat.arguments import finite, mapping, number, whole
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.features.collecting import check_prompts, collect_statistics
from sparsefeat.features.scores import normalized_mean_difference, strictly_above_quantile
from sparsefeat.features.statistics import OUTSIDE_SCHEDULE, Statistics, check_statistics, concepts_of
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.code_rule import CodeRule, code_edit
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.steer import row_weights
from sparsefeat.steering.where import check_condition

Error = Literal["keep", "saeuron_released"]
Magnitude = Literal["mean", "scale"]

# The percentile of the paper's style experiments; its objects use 99.99 to 99.999.
PERCENTILE = 99.999


@dataclass(frozen=True)
class Selection:
    """The latents erased at one timestep: z' = factor z where z > threshold."""

    latents: Tensor  # int64 [F], ascending
    factor: Tensor  # fp32 [F]
    threshold: Tensor  # fp32 [F]

    def __len__(self) -> int:
        return len(self.latents)

    def rule(self) -> CodeRule:
        return CodeRule(
            self.latents,
            gain=self.factor,
            offset=torch.zeros_like(self.factor),
            low=torch.full_like(self.factor, -torch.inf),
            high=torch.full_like(self.factor, torch.inf),
            gate=self.threshold,
        )

    def union(self, later: Selection) -> Selection:
        """Both; for a latent in both, the later one's factor and threshold."""
        rules = {
            i: (f, m)
            for part in (self, later)
            for i, f, m in zip(part.latents.tolist(), part.factor.tolist(), part.threshold.tolist(), strict=True)
        }
        latents = sorted(rules)
        factor, threshold = (torch.tensor([rules[i][field] for i in latents], dtype=torch.float32) for field in (0, 1))
        return Selection(torch.tensor(latents, dtype=torch.int64), factor, threshold)


def select(
    statistics: Statistics,
    concept: str,
    timestep: float,
    *,
    percentile: float | None = None,
    n_latents: int | None = None,
    gamma: float = -1.0,
    magnitude: Magnitude = "mean",
) -> Selection:
    """The latents of a concept at one timestep of the statistics, with their factors and thresholds.

    Args:
        percentile: of the scores; those strictly above are selected (of 20,480: 1 at 99.999, 2 at 99.995, 3 at 99.99).
            Default 99.999.
        n_latents: select the n highest positive scores instead, for SAEs on which such a percentile says little.
        gamma: factor of the edit.
        magnitude: "mean": z' = gamma mu z, the paper's. "scale": z' = gamma z.

    Raises:
        ValueError: percentile and n_latents together; an argument that cannot be; a concept or timestep that is not there.
    """
    _check_choice(statistics.n_latents, percentile, n_latents, gamma, magnitude)
    target = statistics.mean(concept, timestep)
    scores = normalized_mean_difference(target, statistics.mean(statistics.others(concept), timestep))
    if n_latents is None:
        latents = strictly_above_quantile(scores, PERCENTILE if percentile is None else percentile)
    else:
        order = scores.argsort(descending=True, stable=True)[:n_latents]
        latents = order[scores[order] > 0].sort().values
    mean_of_concepts = torch.stack([statistics.mean(c, timestep)[latents] for c in statistics.concepts]).mean(0)
    factor = gamma * target[latents] if magnitude == "mean" else torch.full((len(latents),), gamma, dtype=torch.float64)
    return Selection(latents, factor.float(), mean_of_concepts.float())


def _check_choice(of: int, percentile: float | None, n_latents: int | None, gamma: float, magnitude: str) -> None:
    """What `select` is told, before anything is drawn for it. of: how many latents there are."""
    if percentile is not None and n_latents is not None:
        raise ValueError(
            f"percentile={percentile!r} and n_latents={n_latents!r} each say how many latents are selected; give one of them."
        )
    if percentile is not None:
        number("percentile", percentile, 0, 100)
    number("gamma", gamma)
    if n_latents is not None:
        whole("n_latents", n_latents, 1, of)
    if magnitude not in ("mean", "scale"):
        raise ValueError(f'magnitude={magnitude!r} is not known; use "mean" (gamma mu z) or "scale" (gamma z).')


@register("sparsefeat.erasure:Erase")
class Erase(SavableInstrument):
    """Instrument: SAeUron's erasure of one or several concepts. Made by `Erase.fit` or `Erase.from_statistics`.

    Args:
        sae: whose latents.
        selections: timestep -> what is erased there. A step of a run uses the nearest timestep, so the number of steps
            may differ from that of the statistics.
        concepts: names, for the record.
        error: "keep": x' = x + sum (z' - z) W_dec, the paper's: the SAE's reconstruction error is kept.
            "saeuron_released": the released code adds the error with the opposite sign, x' = 2 x_hat - x + sum (z' - z)
            W_dec, which reflects *every* row about its reconstruction; its published strengths were probably tuned so.
        condition: rows that are edited; "both" as in the paper ("cond", "uncond" as in `Steer`).
        steps: window of steps as in `Steer`; default all.
        at: hookpoint; default the SAE's.

    Raises:
        TypeError: `sae` is no SAE, or a selection no Selection.
        ValueError: an argument that cannot be, by its name; a latent that the SAE has not.
    """

    def __init__(
        self,
        sae: SAE,
        selections: Mapping[float, Selection],
        concepts: Iterable[str] = (),
        *,
        error: Error = "keep",
        condition: str = "both",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
    ):
        if not selections:
            raise ValueError("selections={} is empty; give one for at least one timestep.")
        for timestep, selection in mapping("selections", selections, "timesteps to selections").items():
            number("timestep", timestep)
            if not isinstance(selection, Selection):
                raise TypeError(
                    f"selections[{timestep}] is {type(selection).__name__}, not a Selection; make one by select()."
                )
            finite(f"selections[{timestep}].factor", selection.factor)
            finite(f"selections[{timestep}].threshold", selection.threshold)
            latents = selection.latents
            if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < sae.n_latents:
                raise ValueError(
                    f"selections[{timestep}] names latents {int(latents.min())} to {int(latents.max())}; this SAE has "
                    f"latents 0 to {sae.n_latents - 1}."
                )
        if error not in ("keep", "saeuron_released"):
            raise ValueError(f'error={error!r} is not known; use "keep" or "saeuron_released".')
        if condition == "cond+uncond-":
            raise ValueError(
                'condition="cond+uncond-" adds what it should erase to one half; use "both", "cond" or "uncond".'
            )
        self.sae: SAE = reconstructing(sae)
        self.selections: dict[float, Selection] = {float(t): selections[t] for t in sorted(selections)}
        self.concepts: tuple[str, ...] = tuple(concepts)
        self.error: Error = error
        self.condition: str = check_condition(condition)
        self.window: StepWindow = StepWindow.parse(steps)
        self.at: Hookpoint = hookpoint_of(sae, at)

    @classmethod
    def from_statistics(
        cls,
        sae: SAE,
        statistics: Statistics,
        concept: str | Sequence[str],
        *,
        percentile: float | None = None,
        n_latents: int | None = None,
        gamma: float = -1.0,
        magnitude: Magnitude = "mean",
        **options: Any,
    ) -> Erase:
        """Select the concept's latents at every timestep of the statistics.

        Args:
            concept: its name in the statistics, which need at least one other; or several names. Each is selected
                against all others; where two select one latent at a timestep, the one named later decides its edit.
            percentile, n_latents, gamma, magnitude: see `select`.
            options: error, condition, steps, at of `Erase`.

        Raises:
            TypeError: `sae` or `statistics` is no such thing.
            ValueError: statistics that are empty, of another SAE, or without the concept or others; an argument that
                cannot be, by its name.
        """
        hookpoint_of(sae, options.get("at"))
        check_statistics(statistics, sae)
        concepts = concepts_of("concept", concept)
        if not concepts or not all(statistics.others(c) for c in concepts):
            raise ValueError(
                f"concept={concept!r} must be one or more of several concepts: {', '.join(statistics.concepts)}; "
                "a score compares a concept with others, so collect prompts without it too."
            )
        _check_choice(sae.n_latents, percentile, n_latents, gamma, magnitude)
        if not statistics.timesteps:
            raise ValueError(
                "the statistics are empty; collect some first, with CollectStatistics or collect_statistics."
            )
        how: dict[str, Any] = {
            "percentile": percentile,
            "n_latents": n_latents,
            "gamma": gamma,
            "magnitude": magnitude,
        }
        selections = {}
        for timestep in statistics.timesteps:
            selection = select(statistics, concepts[0], timestep, **how)
            for later in concepts[1:]:
                selection = selection.union(select(statistics, later, timestep, **how))
            selections[timestep] = selection
        if not any(len(selection) for selection in selections.values()):
            warnings.warn(
                f"no latent is selected at any timestep, so nothing will be erased: none is more {' or '.join(concepts)} "
                "than the other concepts by this percentile; collect prompts that differ, lower percentile or pass n_latents",
                stacklevel=2,
            )
        elif n_latents is not None and len(concepts) == 1 and len(min(selections.values(), key=len)) < n_latents:
            fewest, most = (len(which(selections.values(), key=len)) for which in (min, max))
            warnings.warn(
                f"n_latents={n_latents} asks for more than there are: {fewest if fewest == most else f'{fewest} to {most}'} "
                f"latents a timestep are more active with {concepts[0]!r} than without, and those are used",
                stacklevel=2,
            )
        return cls(sae, selections, concepts, **options)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        sae: SAE,
        target: str | Sequence[str],
        prompts: Mapping[str, Sequence[str]],
        *,
        percentile: float | None = None,
        n_latents: int | None = None,
        gamma: float = -1.0,
        magnitude: Magnitude = "mean",
        error: Error = "keep",
        condition: str = "both",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
        batch_size: int = 4,
        seed: int | None = 0,
        **call: Any,
    ) -> Erase:
        """Run the pipeline on every concept's prompts, collect statistics, and select the target's latents.

        Args:
            target: the concept (or several) to erase, a key of `prompts`.
            prompts: concept -> prompts, the target's and at least one other's.
            batch_size, seed: of the runs; see `collect_statistics`.
            call: arguments of the pipeline, such as num_inference_steps and guidance_scale.

        The statistics can be kept and used for several targets: `collect_statistics`, then `Erase.from_statistics`.

        Raises:
            TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name; a target that is no key of `prompts`, or the only one.
        """
        # All that can be refused is refused before the minutes of drawing.
        hookpoint_of(sae, at)
        check_prompts(prompts)
        for one in target if isinstance(target, (list, tuple)) and target else (target,):
            if not isinstance(one, str) or one not in prompts or len(prompts) < 2:
                raise ValueError(
                    f"target={one!r} must be a key of prompts={list(prompts)}, which need at least one other concept."
                )
        _check_choice(sae.n_latents, percentile, n_latents, gamma, magnitude)
        nothing = Selection(
            torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.float32)
        )
        cls(sae, {0.0: nothing}, error=error, condition=condition, steps=steps, at=at)
        check_call(pipe, call, cls.fit, *GIVEN_TO_SEVERAL)
        statistics = collect_statistics(pipe, sae, prompts, at=at, batch_size=batch_size, seed=seed, **call)
        return cls.from_statistics(
            sae,
            statistics,
            target,
            percentile=percentile,
            n_latents=n_latents,
            gamma=gamma,
            magnitude=magnitude,
            error=error,
            condition=condition,
            steps=steps,
            at=at,
        )

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def selection_at(self, timestep: float | None) -> Selection:
        """The selection of the nearest timestep (of two equally near ones the smaller); None is outside of the schedule.

        Raises:
            ValueError: it is no finite number.
        """
        wanted = OUTSIDE_SCHEDULE if timestep is None else number("timestep", timestep)
        return self.selections[min(self.selections, key=lambda t: (abs(t - wanted), t))]

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        x = activations.rows
        beside(self.sae, activations, context)
        selection = self.selection_at(context.timestep)
        weight = row_weights(self.condition, None, context, len(x), 0)
        if self.error == "keep":
            change = code_edit(activations, self.sae, selection.rule(), weight) if len(selection) else None
            return None if change is None else Delta(change)
        reconstruction = self.sae.decode(activations.code(self.sae), like=x).float()
        change = 2 * (reconstruction - x.float()) * weight.to(x.device)[:, None]
        if len(selection):
            edit = code_edit(activations, self.sae, selection.rule(), weight)
            change = change if edit is None else change + edit
        return Delta(change)

    def union(self, later: Erase) -> Erase:
        """Both erasures in one, with this one's settings; where both edit a latent at a timestep, the later decides.

        Raises:
            TypeError: `later` is no Erase.
            ValueError: it is of another SAE or hookpoint.
        """
        if not isinstance(later, Erase):
            raise TypeError(f"later is {type(later).__name__}, not an Erase; make one, Erase.fit(...).")
        if later.sae is not self.sae or later.at != self.at:
            raise ValueError("only erasures with one SAE at one hookpoint unite; attach the two side by side.")
        timesteps = sorted({*self.selections, *later.selections})
        united = {t: self.selection_at(t).union(later.selection_at(t)) for t in timesteps}
        return self.with_selections(united, (*self.concepts, *later.concepts))

    def with_selections(self, selections: Mapping[float, Selection], concepts: Iterable[str]) -> Erase:
        """The same settings with other latents."""
        other = Erase(self.sae, selections, concepts, error=self.error, condition=self.condition, at=self.at)
        vars(other)["window"] = self.window
        return other

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = list(self.selections.values())
        tensors = {"lengths": torch.tensor([len(selection) for selection in chosen])} | {
            name: torch.cat([getattr(selection, name) for selection in chosen])
            for name in ("latents", "factor", "threshold")
        }
        return {"concepts": list(self.concepts), "timesteps": list(self.selections), "error": self.error}, tensors

    @classmethod
    def from_saved(cls, sae: SAE, config: dict[str, Any], tensors: dict[str, Tensor]) -> Erase:
        lengths = tensors["lengths"].tolist()
        columns = (tensors[name].split(lengths) for name in ("latents", "factor", "threshold"))
        selections = {
            float(timestep): Selection(*parts)
            for timestep, *parts in zip(config.pop("timesteps"), *columns, strict=True)
        }
        return cls(sae, selections, **config)

    def __repr__(self) -> str:
        counts = sorted({len(selection) for selection in self.selections.values()})
        of_step = f" at each of {len(self.selections)} timesteps" if len(self.selections) > 1 else ""
        return f"Erase({', '.join(self.concepts)}: {'-'.join(map(str, counts))} of the latents{of_step}, at {self.at})"
