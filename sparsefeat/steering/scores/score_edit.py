"""ScoreEdit: arithmetic on what the denoiser predicts for several prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import mask_map
from sparsefeat.attention.moved_latents import MovedLatents, latents_argument
from sparsefeat.pipeline import Activations, Call, Context, Delta, Hookpoint
from sparsefeat.pipeline.context import UNKNOWN
from sparsefeat.pipeline.instrument import rows_of
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.scores.corrections import Hamiltonian, Langevin
from sparsefeat.steering.scores.inversion import Inversion
from sparsefeat.steering.scores.levels import NoiseLevel, noise_level
from sparsefeat.steering.scores.predictions import Moment, Predictions, wide
from sparsefeat.steering.scores.rules import Compose, ConceptAlgebra, Rule, ScaleConcept, Slider, Views
from sparsefeat.steering.scores.safe import SafeGuidance
from sparsefeat.steering.scores.texts import Texts
from sparsefeat.steering.where import GivenMask, Mask, mask_of_rows

_RULES = {rule.__name__: rule for rule in (Compose, ConceptAlgebra, SafeGuidance, ScaleConcept, Slider, Views)}
_CHAINS = {chain.__name__: chain for chain in (Langevin, Hamiltonian)}


@register("sparsefeat.steering:ScoreEdit")
class ScoreEdit(SavableInstrument):
    """Instrument: changes what the denoiser predicts by what it predicts for other prompts, before guidance.

        edit = sf.ScoreEdit(sf.Compose({"snow": 1.0}), steps=(0.0, 0.5))
        with sf.attach(pipe, edit):
            pipe("a fox")

    Each other prompt costs a run of the denoiser a step, in which other instruments of the session are not at work. The
    call must have its prompt as text.

    Args:
        rule: `Compose`, `Slider`, `ScaleConcept`, `ConceptAlgebra` or `Views`.
        corrections: `Langevin(...)` or `Hamiltonian(...)`, which move the latents before each step of the window.
        steps, mask: as in `Steer`; the mask weighs what is added at each position.

    Raises:
        ValueError: a rule, corrections or a mask of another kind; an argument that cannot be, by its name.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        corrections: Langevin | Hamiltonian | None = None,
        steps: Steps = None,
        mask: GivenMask = None,
    ):
        if not isinstance(rule, Rule):
            raise ValueError(f"rule is {type(rule).__name__}; give one, as in Compose({{'snow': 1.0}}).")
        if corrections is not None and not isinstance(corrections, (Langevin, Hamiltonian)):
            raise ValueError(
                f"corrections is {type(corrections).__name__}; give Langevin(...), Hamiltonian(...) or None."
            )
        self.rule: Rule = rule
        self.corrections: Langevin | Hamiltonian | None = corrections
        self.window: StepWindow = StepWindow.parse(steps)
        self.mask: Mask = mask if mask is None or callable(mask) else mask_map("mask", mask)
        self._name = ""
        self._added: Tensor = torch.tensor(False)
        self._begin()

    def _begin(self) -> None:
        self._texts: Texts | None = None
        self._moment: Moment | None = None
        self._known: tuple[Any, dict[tuple[str | None, str, int], Tensor]] = (None, {})
        self._moved: MovedLatents | None = None
        self._moved_at: Any = None
        self._last_step: Any = None
        self._generators: dict[int, torch.Generator] = {}

    def conditions(self) -> tuple[str, ...]:
        return self.rule.conditions

    def prepare(self, pipe: Any) -> None:
        names = [
            name for name in ("unet", "transformer", "transformer_2", "prior") if getattr(pipe, name, None) is not None
        ]
        if names not in (["unet"], ["transformer"]):
            raise ValueError(
                f"{type(pipe).__name__} has {' and '.join(names) or 'no unet or transformer'}; ScoreEdit works on pipelines "
                "with one denoiser, a unet or a transformer."
            )
        self._name = names[0]

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (Hookpoint(self._name),)

    def components(self, pipe: Any) -> tuple[str, ...]:
        return (self._name,)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def begin_call(self, call: Call) -> None:
        self._begin()
        self._added = torch.tensor(False)
        self._call = call
        self._n_images = call.n_images
        if not self._is_nothing:
            self._texts = Texts(call, self.rule.prompts(), type(self.rule).__name__)

    def end_call(self, call: Call) -> None:
        self._begin()

    @property
    def _is_nothing(self) -> bool:
        return self.corrections is None and self.rule.is_nothing()

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> Mapping[str, Tensor] | None:
        self._moment = None
        if self._texts is None or UNKNOWN in context.condition or not self.active(context):
            return None
        root = getattr(self._call.pipe, name)
        argument = latents_argument(arguments)
        when = context.loop, context.evaluation
        if self._known[0] != when:
            self._known = when, {}
        channels = [getattr(root.config, side, None) for side in ("in_channels", "out_channels")]
        self._moment = Moment(
            root,
            arguments,
            argument,
            context,
            self._texts,
            lambda: self._level(context),
            min((one for one in channels if isinstance(one, int)), default=0),
            self._known[1],
        )
        if self.corrections is None:
            return None
        changed = {argument: self._corrected(self._moment, when)}
        self._moment.arguments = {**arguments, **changed}
        return changed

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        moment = self._moment
        if moment is None or self.rule.is_nothing():
            return None
        given = moment.arguments[moment.argument]
        if activations.tensor.ndim == 3 and activations.tensor.shape != given.shape:
            raise ValueError(
                f"{type(self._call.pipe).__name__} predicts {list(activations.tensor.shape)} of the {list(given.shape)} that it is "
                "given, as there is a reference beside the image; ScoreEdit works on pipelines without one."
            )
        tensor = wide(activations.tensor)
        change = torch.zeros_like(tensor)
        made = slice(0, moment.channels or None) if tensor.ndim > 3 else slice(None)
        for image, row in moment.rows("uncond").items():
            moment.before[None, "uncond", image] = tensor[row, made]
        for condition in self.rule.conditions:
            rows = list(moment.rows(condition).values())
            if rows:
                added = self.rule.change(Predictions(moment, condition, tensor[rows][:, made]))
                change[rows, made] = added.to(change)
        rows_of_change = rows_of(change)
        weights = mask_of_rows(self.mask, context, self._n_images)
        if weights is not None:
            rows_of_change = rows_of_change * weights.reshape(-1, 1).to(rows_of_change)
        if not (rows_of_change.device.type == "cpu" and self._added):  # elsewhere, asking would wait
            self._added = self._added.to(rows_of_change.device) | rows_of_change.any()
        return Delta(rows_of_change)

    def idle(self) -> str | None:
        if self.corrections is not None or self.rule.is_nothing() or self._added:
            return None
        return f"what its {type(self.rule).__name__} adds was 0 wherever it acted: {self.rule.remedy()}"

    def before_step(self, sample: Tensor, context: Context) -> Tensor | None:
        if not self._moved or (context.loop, context.evaluation) != self._moved_at:
            return None
        moved, self._moved = self._moved, None
        return moved.of_the_scheduler(sample)

    # Corrections

    def _corrected(self, moment: Moment, when: Any) -> Tensor:
        """What the denoiser is given, moved by the chain: once a step, for all its runs."""
        context = moment.context
        given = moment.arguments[moment.argument]
        if self._moved_at != when:
            step = context.loop, context.step
            if step == self._last_step:  # a second-order scheduler's second run goes on from what it kept of the first
                return given
            self._last_step, self._moved_at = step, when
            self._moved = MovedLatents(type(self.corrections).__name__, self._call.pipe, moment.arguments)
        moved = self._moved
        assert moved is not None
        if given.ndim > 3 and given.shape[1] != (moment.channels or given.shape[1]):
            raise ValueError(
                "the denoiser is given more than the latents (inpainting, an image to edit), which corrections do not move; "
                "leave corrections= out."
            )
        rows = {image: row for image, row in moment.rows("cond").items() if image not in moved}
        if rows:
            x = moment.latents(list(rows.values()))
            after = self._chain(moment, x, list(rows))
            for image, before, one in zip(rows, x, after, strict=True):
                moved.move(image, before, one)
        return moved.applied(given, context.prompt_index)

    def _chain(self, moment: Moment, x: Tensor, images: list[int]) -> Tensor:
        level = self._level(moment.context)
        assert self.corrections is not None
        generators = [
            self._generators.setdefault(image, torch.Generator().manual_seed(self.corrections.seed + image))
            for image in images
        ]
        guidance = self._guidance_scale()

        def score(latents: Tensor) -> Tensor:
            return -level.noise(latents, self._guided(moment, latents, guidance)) / level.sigma

        return self.corrections.moved(x, score, level.sigma, generators)

    def _guided(self, moment: Moment, latents: Tensor, scale: float | None) -> Tensor:
        """What the pipeline makes of the changed predictions at other latents."""
        cond = Predictions(moment, "cond", latents=latents)
        with_it = cond.own if self.rule.is_nothing() else cond.own + self.rule.change(cond)
        if scale is None:
            return with_it
        if not moment.rows("uncond"):
            if "uncond" in self.rule.conditions:
                raise ValueError(
                    f"{type(self._call.pipe).__name__} runs the negative prompt by itself, where {type(self.rule).__name__} cannot be "
                    "corrected; leave corrections= out."
                )
            without = cond.without()
        else:
            uncond = Predictions(moment, "uncond", latents=latents)
            changes = "uncond" in self.rule.conditions and not self.rule.is_nothing()
            without = uncond.own + self.rule.change(uncond) if changes else uncond.own
        return without + scale * (with_it - without)

    def _guidance_scale(self) -> float | None:
        """Of the call that is going on; None where it has no guidance."""
        if not self._call.guidance:
            return None
        given = self._call.arguments
        scale = given.get("true_cfg_scale") or given.get("guidance_scale")
        if not isinstance(scale, (int, float)) or given.get("guidance_rescale") or self.mask is not None:
            raise ValueError(
                "corrections follow plain guidance, whose scale the call says, and this one has another (a rescaling, a mask, "
                "a loop of your own); leave that out, or corrections=."
            )
        return float(scale)

    def _level(self, context: Context) -> NoiseLevel:
        scheduled, at = self._call.timesteps, context.evaluation
        if scheduled is None or at is None or at >= len(scheduled):
            raise ValueError("the schedule of this call is not known, which the noise level is told from.")
        return noise_level(self._call.pipe.scheduler, scheduled[at], type(self.rule).__name__)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if callable(self.mask) and not isinstance(self.mask, Tensor):
            raise ValueError("a ScoreEdit whose mask is a callable cannot be saved; give the mask as a tensor.")
        fields = {field.name: getattr(self.rule, field.name) for field in dataclasses.fields(self.rule) if field.init}
        inversion = fields.pop("inversion", None)
        tensors = {} if inversion is None else {"inversion": inversion.latents}
        if isinstance(self.mask, Tensor):
            tensors["mask"] = self.mask
        chain = self.corrections
        return {
            "rule": [type(self.rule).__name__, fields],
            "corrections": None if chain is None else [type(chain).__name__, dataclasses.asdict(chain)],
        }, tensors

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> ScoreEdit:
        kind, fields = config["rule"]
        if "inversion" in tensors:
            fields = {**fields, "inversion": Inversion(tensors["inversion"])}
        rule: Rule = _RULES[kind](**fields)
        saved = config["corrections"]
        chain: Any = None if saved is None else _CHAINS[saved[0]](**saved[1])
        return cls(rule, corrections=chain, mask=tensors.get("mask"))
