"""An SAE while it learns: in rows of unit spread, with what only training has. The optimiser and the loop are elsewhere.

The scale of the rows does not matter: they are divided by the spread of the sample that the start values are from, and
`fold` puts it into the biases at the end, so that the SAE takes rows as they are. With s of the rows and t of what is
reconstructed (the same but for a transcoder), codes in the rows' own units and decoder rows as they were,

    W_enc t / s,  b_enc t,  b_pre s,  b_out t,  thresholds t,  W_skip t / s
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor, nn

from sparsefeat.sae import SAE
from sparsefeat.sae.config import FITTED
from sparsefeat.sae.module import TIME
from sparsefeat.sae.normalizers import ROW_SCALED
from sparsefeat.training.learning.dictionaries import Archetypal, FreeRows, pull_back, remake
from sparsefeat.training.learning.initialise import geometric_median, initialise
from sparsefeat.training.objective.losses import ONE, Across, Batch, Loss, training_loss
from sparsefeat.training.objective.objectives import LOG_WEIGHT_STEP, SELECTING, Objective
from sparsefeat.training.objective.penalised import Gate, penalised_loss

ENCODER = ("W_enc", "b_enc", "W_dec")


class Learner(nn.Module):
    """`sae`, which is trained in place, under `objective`.

    A step of a trainer:

    >>> loss = learner.loss(batch, step)
    >>> for parameter, gradient in zip(learner.trained, learner.gradients(loss)):
    ...     parameter.grad = gradient                # of several processes: their sum
    >>> learner.project()                            # then clip, optimizer.step()
    >>> learner.settle(loss, step)

    `state_dict()` has all that a checkpoint needs beside the optimiser's. `b_pre` stays at the geometric median it starts
    from: beside a trained `b_enc` it adds nothing, and its gradient would cost another decode a step.
    """

    def __init__(self, sae: SAE, objective: Objective, ranks: Across = ONE) -> None:
        super().__init__()
        objective.check(sae.config)
        config = sae.config
        if config.transcoder and (config.normalizer in ROW_SCALED or config.normalizer in FITTED):
            raise ValueError(
                f"normalizer {config.normalizer!r} puts the reconstruction into the input's units: train a transcoder "
                "with 'b_pre', 'none' or 'timestep'"
            )
        self.sae: SAE = sae
        self.objective: Objective = objective
        self.ranks: Across = ranks
        fresh = sae.W_dec.detach().new_zeros
        self.register_buffer("scale", fresh(()) + 1)
        self.register_buffer("target_scale", fresh(()) + 1)
        self.register_buffer("log_weight", fresh(()))
        self.register_buffer("rows_since_fired", torch.zeros(sae.n_latents, dtype=torch.int64, device=sae.device))
        self.dictionary: FreeRows | Archetypal | None = None
        if objective.decoder == "free":
            self.dictionary = FreeRows(sae)
        elif objective.decoder == "archetypal":
            self.dictionary = Archetypal(sae, objective.archetypes or sae.n_latents, objective.delta)
        jumping = config.activation == "jumprelu" and not objective.gated
        self.thresholds: nn.Parameter | None = nn.Parameter(fresh(sae.n_latents)) if jumping else None
        self.log_factor: nn.Parameter | None = nn.Parameter(fresh(sae.n_latents)) if objective.gated else None
        self.gate_bias: nn.Parameter | None = nn.Parameter(fresh(sae.n_latents)) if objective.gated else None

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimiser moves; `names` are theirs."""
        return [parameter for _, parameter in self._trained()]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._trained()]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        made = () if self.dictionary is None else self.dictionary.made().keys()
        for name in self._of_sae():
            if name not in made:
                yield f"sae.{name}", self.sae.get_parameter(name)
        if self.dictionary is not None:
            yield from self.dictionary.named_parameters(prefix="dictionary")
        for name in ("thresholds", "log_factor", "gate_bias"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def _of_sae(self) -> list[str]:
        """The SAE's tensors that the loss is differentiated by."""
        held = self.objective.decoder == "archetypal"  # the hull is of the rows around this bias
        shapes = self.sae.config.tensor_shapes()
        names = [*ENCODER, *([] if held else ["b_out"]), "W_skip", *TIME]
        return [name for name in names if name in shapes]

    @torch.no_grad()
    def begin(self, sample: Batch | Tensor, seed: int = 0, start: str = "random") -> None:
        """Scale and start values from a sample of the rows; see `initialise`."""
        sample = sample if isinstance(sample, Batch) else Batch(sample)
        sae, objective = self.sae, self.objective
        rows = sample.rows.reshape(-1, sae.d_model).to(sae.device, sae.dtype)
        self.get_buffer("scale").fill_(spread(rows))
        target = None
        if sample.target is not None:
            target = sample.target.reshape(-1, sae.d_model).to(sae.device, sae.dtype)
        self.get_buffer("target_scale").fill_(spread(rows if target is None else target))
        units = self.units(Batch(rows, target, sample.timestep))
        if units.timestep is not None:
            sae.at_timestep(units.timestep)
        initialise(sae, units.rows, seed, target=units.target, start=start)
        if self.thresholds is not None and sae.threshold is not None:
            self.thresholds.fill_(objective.first_threshold)
            sae.threshold.copy_(self.thresholds)
        if self.dictionary is not None:
            self.dictionary.begin(sae, sae.normalize(units.rows) if target is None else units.target, seed)
            remake(self.dictionary, sae)
        sae.timestep = None

    def units(self, batch: Batch | Tensor) -> Batch:
        """The batch on the SAE's device, in rows of unit spread."""
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        sae, scale = self.sae, self.get_buffer("scale")
        if sae.config.transcoder != (batch.target is not None):
            if batch.target is None:
                raise ValueError("the rows have no target: a transcoder has one, the rows of its module's output")
            raise ValueError("the rows have a target: a transcoder has one, and the SAE is none, pass transcoder=True")
        if (sae.config.normalizer == "timestep") and batch.timestep is None:
            raise ValueError(
                "the SAE depends on the timestep and the rows have none: collect them with their timesteps"
            )
        target = batch.target
        if target is not None:
            target = target.to(sae.device, sae.dtype) / self.get_buffer("target_scale")
        return Batch(batch.rows.to(sae.device, sae.dtype) / scale, target, batch.timestep)

    def loss(self, batch: Batch | Tensor, step: int) -> Loss:
        """Of optimiser step number `step`, from 0."""
        sae, objective = self.sae, self.objective
        x, target, timestep = self.units(batch)
        if sae.config.activation in SELECTING:
            if timestep is not None and sae.config.normalizer == "timestep":
                sae.at_timestep(timestep)
            return training_loss(sae, x, self.dead(), objective, target=target, ranks=self.ranks)
        warm = min(1.0, (step + 1) / objective.sparsity_warmup) if objective.sparsity_warmup else 1.0
        weight = objective.sparsity * warm * self.get_buffer("log_weight").exp()
        gate = None
        if self.log_factor is not None and self.gate_bias is not None:
            gate = Gate(self.log_factor, self.gate_bias)
        return penalised_loss(
            sae,
            x,
            objective,
            weight,
            thresholds=self.thresholds,
            gate=gate,
            target=target,
            timestep=timestep if sae.config.normalizer == "timestep" else None,
            ranks=self.ranks,
        )

    def gradients(self, loss: Loss) -> list[Tensor]:
        """Of `trained`, in that order."""
        extras = [p for p in (self.thresholds, self.log_factor, self.gate_bias) if p is not None]
        names = self._of_sae()
        found = torch.autograd.grad(loss.total, [*map(self.sae.get_parameter, names), *extras])
        of_sae = dict(zip(names, found, strict=False))
        pulled: Sequence[Tensor] = ()
        if self.dictionary is not None:
            pulled = pull_back(self.dictionary, of_sae)
            for name in self.dictionary.made():
                del of_sae[name]
        return [*of_sae.values(), *pulled, *found[len(names) :]]

    @torch.no_grad()
    def project(self) -> None:
        """Remove from every unit row's gradient its part along the row, which renormalising would undo anyway."""
        if self.objective.decoder != "unit":
            return
        weight, gradient = self.sae.W_dec, self.sae.W_dec.grad
        assert gradient is not None
        gradient.addcmul_((gradient * weight).sum(-1, keepdim=True), weight, value=-1)

    @torch.no_grad()
    def settle(self, loss: Loss, step: int) -> Tensor:
        """After the optimiser's step: constraints, thresholds, who fired; the mean number of active latents."""
        sae, objective = self.sae, self.objective
        if self.dictionary is not None:
            self.dictionary.settle()
            remake(self.dictionary, sae)
        else:
            sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True))
        if self.thresholds is not None and sae.threshold is not None:
            sae.threshold.copy_(self.thresholds.clamp_(min=0))
        above = objective.fired_above
        if above is None and sae.config.activation == "batch_topk":
            above = 0.0  # codes are padded: of those entries the activation is 0, and nothing chose them
        counts, active = (loss.counts, None) if loss.code is None else fired(loss.code, above)
        assert counts is not None
        counts = self.ranks.sum(counts.clone())
        rows = self.ranks.sum(counts.new_full((), loss.rows))
        l0 = (counts.sum() if active is None else self.ranks.sum(active)) / rows
        since = self.get_buffer("rows_since_fired")
        since += rows
        since.masked_fill_(counts > 0, 0)
        if sae.config.activation == "batch_topk" and loss.code is not None and step >= objective.threshold_after:
            self._follow_threshold(loss.code.values.detach(), first=step == objective.threshold_after)
        if objective.l0_target is not None and objective.penalty != "l0":
            excess = (l0 / objective.l0_target - 1).clamp(-1, 1)
            self.get_buffer("log_weight").add_(LOG_WEIGHT_STEP * excess)
        return l0

    def dead(self) -> Tensor:
        """bool `[n_latents]`."""
        return self.get_buffer("rows_since_fired") >= self.objective.dead_after

    @torch.no_grad()
    def fold(self) -> SAE:
        """Put the scale, and a gate, into the SAE, in place; it then takes rows as they are. A second call changes nothing,
        and training may go on."""
        sae = self.sae
        s, t = self.get_buffer("scale").clone(), self.get_buffer("target_scale").clone()
        self.get_buffer("scale").fill_(1)
        self.get_buffer("target_scale").fill_(1)
        if self.log_factor is not None and self.gate_bias is not None and sae.threshold is not None:
            factor = self.log_factor.exp()
            sae.W_enc *= factor[:, None]
            self.gate_bias *= factor
            self.log_factor.zero_()
            sae.threshold.copy_(sae.b_enc - self.gate_bias)
        config = sae.config
        if config.normalizer in ROW_SCALED:  # a row's own scale, but for what is added to it
            if config.normalizer == "standardize":
                sae.config = dataclasses.replace(config, eps=config.eps * float(s))
            return sae
        if config.normalizer in FITTED:
            sae.pca_mean *= s
            sae.pca_std *= s
            return sae
        if self.dictionary is not None:
            self.dictionary.scaled(float(t / s), float(t))
        for tensor, factor in (
            (sae.W_enc, t / s),
            (sae.b_enc, t),
            (sae.b_pre, s),
            (sae.b_out, t),
            (sae.threshold, t),
            (self.thresholds, t),
            (self.gate_bias, t),
        ):
            if tensor is not None:
                tensor *= factor
        if config.skip:
            sae.W_skip *= t / s
        if config.time_width is not None:  # the shift of the modulated rows is in their units
            sae.get_parameter("modulation_weight")[config.d_model :] *= s
            sae.get_parameter("modulation_bias")[config.d_model :] *= s
        return sae

    def _follow_threshold(self, values: Tensor, first: bool) -> None:
        """Move BatchTopK's threshold towards the smallest value this batch kept."""
        threshold = self.sae.threshold
        assert threshold is not None
        smallest = self.ranks.least(values.masked_fill(values <= 0, math.inf).min().to(threshold.dtype))
        smallest = torch.where(smallest.isfinite(), smallest, threshold)
        threshold.lerp_(smallest, 1.0 if first else 1 - self.objective.threshold_decay)


def spread(rows: Tensor) -> float:
    """Root mean square of the entries of `rows [rows, d_model]` around their geometric median; 1 where they are all equal."""
    around = (rows.double() - geometric_median(rows).double()).square().mean().sqrt()
    return float(around) if around > 0 else 1.0


def fired(code: SparseCode, above: float | None) -> tuple[Tensor, Tensor]:
    """How often each latent fired, `[n_latents]` int64, and how many activations are not 0."""
    values = code.values.detach()
    hits = values == values if above is None else values.abs() > above
    counts = torch.zeros(code.n_latents, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, code.indices.flatten().long(), hits.flatten().long())
    return counts, (values != 0).sum()
