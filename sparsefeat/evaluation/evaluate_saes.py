"""`sparsefeat evaluate saes`: what SAEs of a pipeline are worth, beside the controls that they must beat.

The prompts are drawn once, unedited, and rows of every hookpoint kept. Half of the images (halved word by word) is what
anything is fitted or chosen on; everything is measured on the other half.

| measured | of | beside |
|---|---|---|
| FVU, cosine, L0, densities, dead, dense | the SAE | PCA with as many components as latents are active, a random SAE |
| sparse probing, separability, names | its latents | raw neurons, PCA's components, a random SAE's latents, those of an SAE trained on the same pipeline with random weights |
| denoising loss recovered, change of the images | its reconstruction | zeros, the mean row |
| stability | its directions | another SAE of the same hookpoint, two random dictionaries |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefeat.evaluation.concepts import halves, names, separability_above_chance, sparse_probing
from sparsefeat.evaluation.denoising import DenoisingLoss, denoising_loss, recovered
from sparsefeat.evaluation.sae_metrics import measure_sae, pca_fvu, random_control
from sparsefeat.evaluation.shared_words import shared_words
from sparsefeat.evaluation.splice import Ablate, Splice
from sparsefeat.evaluation.stability import stability
from sparsefeat.evaluation.units import Units, components, latents, neurons, pooled
from sparsefeat.pipeline import Hookpoint, attach
from sparsefeat.pipeline.hookpoints import resolve
from sparsefeat.pipeline.noising import finished_latents
from sparsefeat.sae import SAE
from sparsefeat.training import Batch, CollectActivations, CollectedRows, Objective, SAETrainer, TensorRows, TrainConfig

# Of the control that is trained on a pipeline with random weights.
CONTROL_STEPS, CONTROL_BATCH = 300, 1024
BATCH = 25  # images a call
SPLICED = 24  # images that are drawn with activations replaced
DENOISED = 12  # images that the denoising loss is of


@dataclass(frozen=True)
class Drawing:
    """prompts, drawn from noise of `seed` + the image's number with these arguments of the pipeline's call."""

    prompts: Sequence[str]
    seed: int = 0
    rows_per_image: int = 16
    call: Mapping[str, Any] = field(default_factory=dict)

    def first(self, n: int) -> Drawing:
        return dataclasses.replace(self, prompts=self.prompts[:n])

    def images(self, pipe: Any, during: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
        """float32 `[n, 3, height, width]` in 0 to 1."""
        drawn = []
        for first in range(0, len(self.prompts), BATCH):
            part = list(self.prompts[first : first + BATCH])
            noise = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(part))]
            with during(), torch.no_grad():
                images = pipe(part, generator=noise, output_type="pt", **self.call).images
            drawn.append(images.float().cpu())
        return torch.cat(drawn)

    def rows(self, pipe: Any, hookpoints: Sequence[str]) -> tuple[Tensor, dict[str, CollectedRows]]:
        """The unedited images, and the conditional rows of every hookpoint at every step."""
        collect = CollectActivations(
            *hookpoints, rows_per_image=self.rows_per_image, dtype=torch.float32, seed=self.seed
        )
        with attach(pipe, collect):
            images = self.images(pipe)
        return images, {at: collect.collected(at) for at in hookpoints}


@dataclass(frozen=True)
class Concepts:
    """words; member: bool `[words, images]`; of_image: every image's words; choosing: bool `[images]`, the half that is
    fitted and chosen on."""

    words: list[str]
    member: Tensor
    of_image: list[list[str]]
    choosing: Tensor

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> Concepts:
        """Their shared words (`shared_words`), halved word by word.

        Raises:
            ValueError: fewer than two words are shared.
        """
        words, of_image = shared_words(prompts)
        member = torch.tensor([[word in of for of in of_image] for word in words])
        return cls(words, member, of_image, halves(len(prompts), member))


def measure_units(units: Units, rows: CollectedRows, concepts: Concepts) -> dict[str, float]:
    """Probing, separability and names of the units, pooled over each image's rows and steps."""
    found = pooled(units, rows.rows, rows.image, rows.timestep)
    named = names(found.peak, concepts.of_image, concepts.words, concepts.choosing)
    alive = (found.peak > 0).any(0)
    units_alive = found.mean[:, alive] if alive.any() else found.mean
    apart = separability_above_chance(units_alive, concepts.member)
    probes = {
        f"probe_{k}": _mean(sparse_probing(found.mean, concepts.member, min(k, units.n), concepts.choosing))
        for k in (1, 5)
    }
    return {
        **probes,
        "separability": apart.value,
        "separability_interval": apart.interval,
        "named": named.share,
        "word_auc": named.auc,
        "units": units.n,
        "units_active": int(alive.sum()),
    }


def quality(sae: SAE, held: Batch, fitted: Batch) -> dict[str, Any]:
    """Reconstruction on `held`, and of its controls, which are fitted on `fitted`."""
    found = measure_sae(sae, held)
    k = min(sae.d_model, max(1, round(found.l0)))
    return {
        "fvu": found.fvu,
        "cosine": found.cosine,
        "l0": found.l0,
        "dead": found.dead,
        "dense": found.dense,
        "density_by_decade": found.histogram(),
        "rows": found.rows,
        "fvu_pca": pca_fvu(held.rows, k, fit_rows=fitted.rows),
        "fvu_random": measure_sae(random_control(sae, fitted), held).fvu,
    }


def evaluate_saes(
    pipe: Any,
    saes: Mapping[str, SAE],
    drawing: Drawing,
    *,
    on_part: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Everything, by the SAEs' names; `on_part` hears of all there is after every part."""
    at = {name: _hookpoint(name, sae) for name, sae in saes.items()}
    hookpoints = list(dict.fromkeys(at.values()))
    concepts = Concepts.of_prompts(drawing.prompts)
    images, rows = drawing.rows(pipe, hookpoints)
    results: dict[str, Any] = {
        "images": len(images),
        "words": len(concepts.words),
        "saes": {name: {"hookpoint": at[name]} for name in saes},
        "controls": {hookpoint: {} for hookpoint in hookpoints},
    }
    for name, sae in saes.items():
        held, fitted = parts(rows[at[name]], concepts.choosing)
        results["saes"][name] |= quality(sae, held, fitted) | measure_units(
            latents(sae, name), rows[at[name]], concepts
        )
        on_part(results)
    for hookpoint in hookpoints:
        sae = next(sae for name, sae in saes.items() if at[name] == hookpoint)
        _, fitted = parts(rows[hookpoint], concepts.choosing)
        k = min(sae.d_model, max(1, round(measure_sae(sae, fitted).l0)))
        controls = results["controls"][hookpoint]
        for units in (
            neurons(fitted.rows),
            components(fitted.rows, k),
            latents(random_control(sae, fitted), "random SAE"),
        ):
            controls[units.name] = measure_units(units, rows[hookpoint], concepts)
        on_part(results)
        with random_weights(pipe, hookpoint, drawing.seed):
            of_random = drawing.rows(pipe, [hookpoint])[1][hookpoint]
        control = trained_control(sae, of_random, concepts.choosing)
        held, fitted = parts(of_random, concepts.choosing)
        controls["random pipeline"] = {
            **quality(control, held, fitted),
            **measure_units(latents(control, "random pipeline"), of_random, concepts),
        }
        on_part(results)
    for hookpoint in hookpoints:
        splicing = Splicing(pipe, hookpoint, rows[hookpoint], images, drawing)
        results["controls"][hookpoint]["ablation"] = splicing.ablations()
        for name, sae in saes.items():
            if at[name] == hookpoint and not sae.config.transcoder:
                results["saes"][name] |= splicing.of(sae)
                on_part(results)
    results["stability"] = stabilities(saes, at, rows)
    on_part(results)
    return results


def parts(rows: CollectedRows, choosing: Tensor) -> tuple[Batch, Batch]:
    """What is measured on, and what is fitted on."""
    fitted = choosing[rows.image]
    timed = not rows.timestep.isnan().any()
    held, chosen = (Batch(rows.rows[part], None, rows.timestep[part] if timed else None) for part in (~fitted, fitted))
    return held, chosen


class Splicing:
    """What replacing a hookpoint's activations does: the denoising loss by bin of the schedule, and the images' change."""

    def __init__(self, pipe: Any, hookpoint: str, rows: CollectedRows, images: Tensor, drawing: Drawing) -> None:
        self.pipe: Any = pipe
        self.images: Tensor = images[:SPLICED]
        self.drawing: Drawing = drawing.first(SPLICED)
        self.denoised: Drawing = drawing.first(DENOISED)
        # A text encoder runs before there is a noisy image: its part in that loss is not of one step.
        self.finished: Tensor | None = None
        if not hookpoint.startswith("text_encoder"):
            self.finished = finished_latents(pipe, self.denoised.prompts, drawing.seed, **drawing.call)
        mean, zero = rows.rows.mean(0), torch.zeros(rows.rows.shape[1])
        self.untouched: DenoisingLoss | None = self._loss(nullcontext)
        ablated = {"mean": Ablate(hookpoint, mean), "zero": Ablate(hookpoint, zero)}
        self.losses: dict[str, DenoisingLoss | None] = {
            name: self._loss(partial(attach, pipe, one)) for name, one in ablated.items()
        }
        self.changes: dict[str, float] = {
            name: self._change(partial(attach, pipe, one)) for name, one in ablated.items()
        }

    def ablations(self) -> dict[str, Any]:
        """The controls."""
        found: dict[str, Any] = {f"image_change_{name}": change for name, change in self.changes.items()}
        if self.untouched is not None:
            found["denoising_loss"] = float(self.untouched.loss.mean())
            found |= {f"denoising_loss_{n}": float(loss.loss.mean()) for n, loss in self.losses.items() if loss}
        return found

    def of(self, sae: SAE) -> dict[str, Any]:
        """Of the SAE's reconstruction in the activations' place."""
        found: dict[str, Any] = {"image_change": self._change(partial(attach, self.pipe, Splice(sae)))}
        spliced = self._loss(partial(attach, self.pipe, Splice(sae)))
        for name, loss in self.losses.items():
            if spliced is not None and self.untouched is not None and loss is not None:
                found["denoising_loss"] = float(spliced.loss.mean())
                found[f"recovered_{name}"] = recovered(self.untouched, spliced, loss)
                whole = recovered(self.untouched, spliced, loss, bins=1)
                found[f"recovered_{name}_overall"] = whole[0]
        return found

    def _loss(self, during: Callable[[], AbstractContextManager]) -> DenoisingLoss | None:
        if self.finished is None:
            return None
        prompts, seed = self.denoised.prompts, self.drawing.seed
        return denoising_loss(self.pipe, prompts, self.finished, seed=seed, during=during, **self.drawing.call)

    def _change(self, during: Callable[[], AbstractContextManager]) -> float:
        """Root mean square over pixels, of values from 0 to 1."""
        return float((self.drawing.images(self.pipe, during) - self.images).square().mean().sqrt())


def stabilities(
    saes: Mapping[str, SAE], at: Mapping[str, str], rows: Mapping[str, CollectedRows]
) -> list[dict[str, Any]]:
    """Of every two SAEs of one hookpoint and width, over latents that fire; beside two random dictionaries of that size."""
    found = []
    names_of = list(saes)
    for i, first in enumerate(names_of):
        for second in names_of[i + 1 :]:
            if at[first] != at[second]:
                continue
            directions = []
            for name in (first, second):
                held, _ = parts(rows[at[name]], torch.zeros(int(rows[at[name]].image.max()) + 1, dtype=torch.bool))
                alive = measure_sae(saes[name], held).density > 0
                directions.append(saes[name].W_dec.detach().cpu()[alive])
            generator = torch.Generator().manual_seed(0)
            chance = stability(*(torch.randn(d.shape, generator=generator) for d in directions))
            result = stability(*directions)
            found.append(
                {
                    "saes": [first, second],
                    **result._asdict(),
                    "cosine_random": chance.cosine,
                    "latents": len(directions[0]),
                }
            )
    return found


def trained_control(sae: SAE, rows: CollectedRows, choosing: Tensor, seed: int = 0) -> SAE:
    """A TopK SAE of the same width and sparsity, trained for a short while."""
    _, fitted = parts(rows, choosing)
    config = sae.config
    k = config.k or max(1, round(measure_sae(sae, fitted).l0))
    torch.manual_seed(seed)
    like = SAE(type(config)(config.d_model, config.n_latents, k=k, hookpoint=config.hookpoint))
    batch = min(CONTROL_BATCH, len(fitted.rows))
    training = TrainConfig(
        steps=CONTROL_STEPS, batch_size=batch, lr=2e-3, seed=seed, objective=Objective(dead_after=50 * batch)
    )
    return SAETrainer(like, TensorRows(fitted.rows), training).fit(progress=False)


@contextmanager
def random_weights(pipe: Any, hookpoint: str, seed: int) -> Iterator[None]:
    """Within, every matrix and convolution of the model that the hookpoint lies in is random, of the same mean and deviation
    (arXiv 2501.17727); the rest of it, and what it was, are kept."""
    root = resolve(pipe, Hookpoint.parse(hookpoint).path).root_name
    module: nn.Module = getattr(pipe, root)
    generator = torch.Generator().manual_seed(seed)
    kept = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}
    try:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in kept:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    spread = parameter.std() if parameter.numel() > 1 else parameter.new_zeros(())
                    parameter.copy_(parameter.mean() + spread * noise)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


def _hookpoint(name: str, sae: SAE) -> str:
    if sae.config.hookpoint is None:
        raise ValueError(f"{name} does not know its hookpoint: open it with load_sae(..., hookpoint=)")
    return sae.config.hookpoint


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
