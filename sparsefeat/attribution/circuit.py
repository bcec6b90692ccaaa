"""Circuits: which latents of one block make which latents of a later one active (attribution graphs, as of DifFRACT, arXiv
2606.15796, between the dictionaries of two blocks).

With a_i d_i what upstream latent i writes in a row, x the rows that it is written to, and m_j the sum over rows of downstream
latent j's activation, both of one run of the denoiser under the prompt:

    gradient   e_ij = sum over rows of a_i (d_i . dm_j/dx)     a backward for every j
    ablation   e_ij = m_j(x) - m_j(x - a_i d_i)                a run of the denoiser for every i

each summed over the images and the steps, through all that lies between the two blocks. The gradient is taken with the same
latents active; ablation also sees others take their place. The downstream latents' own effect is `attribute_latents`'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from sparsefeat.arguments import taking_gradients, whole
from sparsefeat.attribution.block import CodedBlock, active_latents, finite_gradient
from sparsefeat.attribution.circuit_drawing import drawing
from sparsefeat.attribution.components import prompts_of
from sparsefeat.attribution.gradients import EachStep, predicted
from sparsefeat.attribution.latents import LatentScores, Objective, attribute_latents, distance_from_nothing
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.pipeline import Context, Hookpoint, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.instrument import like_tensor, rows_of
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.whole import as_path, written_plainly


@dataclass(frozen=True)
class Edge:
    """Of latent `upstream` to latent `downstream`: by how much the one adds to the other's activations, guessed by the
    gradient and as ablation measures it.
    """

    upstream: int
    downstream: int
    gradient: float
    ablation: float


@dataclass(frozen=True)
class Circuit:
    """The strongest edges between two blocks under a prompt, the strongest first."""

    prompts: tuple[str, ...]
    upstream: str
    """Where the first latents are written."""
    downstream: str
    """Where the second ones are read."""
    edges: tuple[Edge, ...]
    scores: Mapping[int, float]
    """Of the downstream latents, what they add to the objective, by gradient times activation; empty where they were given."""
    rank_correlation: float
    """Spearman's of gradient and ablation over all edges between the latents that were looked at, before the weak ones went."""
    names: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {})
    """Of upstream and downstream latents, where their SAEs have some."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, or where `path` ends in .svg as a picture.

        Raises:
            TypeError: `path` is no path.
            ValueError: it is empty.
            OSError: it cannot be written.
        """
        path = as_path(path, "path", "a file")
        text = self.svg() if path.suffix.lower() == ".svg" else json.dumps(asdict(self), indent=1, ensure_ascii=False)
        with written_plainly(path, "path"):
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """What `save` wrote as JSON.

        Raises:
            ValueError: the file holds no circuit.
        """
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            edges = tuple(Edge(**edge) for edge in told.pop("edges"))
            prompts = tuple(told.pop("prompts"))
            scores, *names = ({int(k): v for k, v in one.items()} for one in (told.pop("scores"), *told.pop("names")))
            return cls(edges=edges, prompts=prompts, scores=scores, names=(names[0], names[1]), **told)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"path={str(path)!r} holds no circuit ({error}); give what Circuit.save wrote.") from error

    def svg(self) -> str:
        """The picture: upstream latents at the left, downstream ones at the right; a line is as wide as its edge is strong,
        blue where the one makes the other more active and red where less.
        """
        return drawing(self)

    def __str__(self) -> str:
        lines = ["upstream  downstream    gradient    ablation"]
        for edge in self.edges:
            named = " -> ".join(filter(None, (self.names[0].get(edge.upstream), self.names[1].get(edge.downstream))))
            numbers = f"{edge.upstream:>8}  {edge.downstream:>10}  {edge.gradient:>+10.4g}  {edge.ablation:>+10.4g}"
            lines.append(f"{numbers}  {named}".rstrip())
        return "\n".join(lines)


class _Edges(EachStep):
    """The edges to chosen downstream latents: by gradient from all upstream ones, or by ablation from `ablated`."""

    def __init__(
        self, upstream: CodedBlock, downstream: CodedBlock, to: Tensor, ablated: Sequence[int], window: StepWindow
    ):
        super().__init__(upstream.read.target.root_name)
        self.upstream, self.downstream, self.to, self.ablated, self.window = upstream, downstream, to, ablated, window
        self.sums = torch.zeros(upstream.sae.n_latents, len(to), dtype=torch.float64)
        self.moments = 0

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if not self.window.contains(context):
            return
        self.moments += 1
        found = self.upstream.run(given)
        rows = rows_of(found.written).float()
        if self.ablated:
            with torch.no_grad():
                before = self._activity(given, rows)
                for latent in set(self.ablated) & set(active_latents(found.code).tolist()):
                    after = self._activity(given, rows - self.upstream.part(found, latent))
                    self.sums[latent] += (before - after).cpu()
            return
        leaf = rows.detach().requires_grad_()
        with taking_gradients("circuit"):
            activity = self._activity(given, leaf)
            reached = False
            for j, value in enumerate(activity):
                gradient = finite_gradient(value, leaf, keep=True)
                if gradient is not None:
                    reached = True
                    self.sums[:, j] += self.upstream.sums(found, gradient)
            if not reached:  # also where weights ask for gradients, which activity has then
                raise ValueError(
                    f"what {self.downstream.read.at} codes does not depend on {self.upstream.written.at}, or its code has no "
                    "gradient (pursuits): name the earlier block first, and an SAE with an encoder."
                )

    def _activity(self, given: Mapping[str, Any], rows: Tensor) -> Tensor:
        """m `[to]`, where the upstream rows are these."""
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x)
            return x

        block, read = self.upstream.written, self.downstream.read
        with block.exchanging(given, lambda own: like_tensor(rows, own)), read.exchanging(given, keep):
            predicted(block.root, given)
        return self.downstream.encode(seen[0], given).select(self.to.to(seen[0].device)).double().sum(0)


def _strongest(found: LatentScores, n: int) -> dict[int, float]:
    """The n latents of largest score, by falling size."""
    order = found.scores.abs().argsort(descending=True, stable=True)[:n]
    return dict(zip(found.latents[order].tolist(), found.scores[order].tolist(), strict=True))


def _named(sae: SAE, latents: Sequence[int | str]) -> Tensor:
    """int64 [latents], each once and all of the SAE's."""
    found = torch.tensor([sae.latent(latent) for latent in latents], dtype=torch.int64)
    sae.directions(found)  # names a latent that does not exist
    if not len(found) or len(found.unique()) < len(found):
        raise ValueError(f"latents={list(latents)!r:.60} must name at least one downstream latent, each once.")
    return found


def _names(sae: SAE, latents: Iterable[int]) -> dict[int, str]:
    return {latent: sae.names[latent] for latent in sorted(set(latents)) if sae.names.get(latent)}


def circuit(
    pipe: Any,
    upstream: SAE,
    downstream: SAE,
    prompts: str | Sequence[str],
    *,
    n_latents: int = 8,
    n_edges: int = 16,
    latents: Sequence[int | str] | None = None,
    objective: Objective = distance_from_nothing,
    at: tuple[str | Hookpoint | None, str | Hookpoint | None] = (None, None),
    steps: Steps = None,
    seed: int = 0,
    **call: Any,
) -> Circuit:
    """The graph of the strongest edges from latents of one block to latents of a later one.

    Args:
        upstream, downstream: SAEs or transcoders of blocks of the denoiser, in the order in which they run.
        prompts: each is drawn once; the edges add up.
        n_latents: how many of each are looked at: downstream those that the objective rests on most, upstream those whose
            edges to these are strongest.
        n_edges: how many of their n_latents^2 edges are kept, by ablation.
        latents: the downstream latents instead; then no objective is asked, and the call needs no guidance.
        objective: as of `attribute_latents`, which chooses the downstream latents.
        at: hookpoints of the two; default the SAEs'.
        steps: window of steps as in `Steer`. seed: of the images. call: arguments of the pipeline.

    Costs for every image and step, in runs of the denoiser: one and n_latents backwards, n_latents to ablate, and what
    `attribute_latents` takes.

    Raises:
        TypeError: an SAE that is none; an argument that the pipeline's call does not take.
        ValueError: the second block does not depend on the first; no edge is left.
    """
    window = StepWindow.parse(steps)
    first, second = hookpoint_of(upstream, at[0], "upstream"), hookpoint_of(downstream, at[1], "downstream")
    source, target = CodedBlock(pipe, upstream, first), CodedBlock(pipe, downstream, second)
    texts = prompts_of("prompts", prompts)
    if latents is not None and objective is not distance_from_nothing:
        raise ValueError("objective= chooses the downstream latents, which latents= names; give one of them.")
    whole("n_latents", n_latents)
    whole("n_edges", n_edges)
    whole("seed", seed, 0)
    check_call(pipe, call, circuit, "output_type")
    if source.read.target.root_name != target.read.target.root_name:
        raise ValueError(f"{source.read.at} and {target.read.at} lie in different models; name blocks of one denoiser.")
    if source.read.at == target.read.at:
        raise ValueError(
            f"upstream and downstream are both of {source.read.at}; name a block and one that runs after it."
        )
    if latents is None:
        told: dict[str, Any] = {"objective": objective, "at": at[1], "steps": steps, "seed": seed}
        scores = _strongest(attribute_latents(pipe, downstream, texts, **told, **call), n_latents)
        to = torch.tensor(list(scores), dtype=torch.int64)
    else:
        scores, to = {}, _named(downstream, latents)

    def edges(ablated: Sequence[int]) -> Tensor:
        heard = _Edges(source, target, to, ablated, window)
        with attach(pipe, heard):
            for i, text in enumerate(texts):
                pipe(text, generator=torch.Generator().manual_seed(seed + i), output_type="latent", **call)
        if not heard.moments:
            raise ValueError(f"none of the steps that ran is among steps={steps!r}; leave it out or choose others.")
        return heard.sums

    gradients = edges(())
    order = gradients.abs().sum(1).argsort(descending=True, stable=True)[:n_latents]
    begun = [latent for latent in order.tolist() if gradients[latent].any()]
    if not begun:
        raise ValueError("no upstream latent adds to these downstream latents under the prompt; give other latents.")
    ablations = edges(begun)
    pairs = [
        Edge(i, int(j), float(gradients[i, column]), float(ablations[i, column]))
        for i in begun
        for column, j in enumerate(to)
    ]
    kept = sorted((edge for edge in pairs if edge.ablation), key=lambda edge: -abs(edge.ablation))[:n_edges]
    agreement = stats.spearmanr([e.gradient for e in pairs], [e.ablation for e in pairs]).statistic
    return Circuit(
        tuple(texts),
        str(source.written.at),
        str(target.read.at),
        tuple(kept),
        scores,
        float(agreement) if len(pairs) > 1 else float("nan"),
        (_names(upstream, [edge.upstream for edge in kept]), _names(downstream, [edge.downstream for edge in kept])),
    )
