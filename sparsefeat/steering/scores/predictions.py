"""What the denoiser predicts for one moment's rows, and what it would predict for other prompts or other latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefeat.attention.moved_latents import rows_of_arguments
from sparsefeat.pipeline import Context
from sparsefeat.steering.scores.texts import Texts


@dataclass
class Moment:
    """One run of the denoiser: its arguments, what its rows are, and what has been run beside it at the same latents."""

    root: nn.Module
    arguments: Mapping[str, Any]
    argument: str
    """The name of the latents among them."""
    context: Context
    texts: Texts
    level: Any
    """Called for the `NoiseLevel` of the step."""
    channels: int = 0
    """Of the latents that are made: an inpainting model is given more, and some predict a variance besides. 0: all."""
    before: dict[tuple[str | None, str, int], Tensor] = field(default_factory=dict)
    """Predictions that are known at this moment: by text (None: the row's own), condition of that, image."""

    def rows(self, condition: str) -> dict[int, int]:
        """Image -> its row under this condition."""
        entries = self.context.entries
        return {image: row for row, (said, image) in enumerate(entries) if said == condition}

    def latents(self, rows: Sequence[int]) -> Tensor:
        """What the denoiser is given of these rows, in float32 or wider."""
        return self._made(wide(self.arguments[self.argument][list(rows)]))

    def _made(self, tensor: Tensor) -> Tensor:
        return tensor[:, : self.channels] if self.channels and tensor.ndim > 3 else tensor

    @torch.no_grad()
    def run(
        self, rows: Sequence[int], images: Sequence[int], text: str | None = None, latents: Tensor | None = None
    ) -> Tensor:
        """The prediction for these rows; for another text, which rows must be conditional for; at other latents."""
        given = self.arguments[self.argument]
        arguments = rows_of_arguments(self.arguments, list(rows), len(given))
        if text is not None:
            arguments = self.texts.exchanged(arguments, images, text)
        if latents is not None:
            own = arguments[self.argument]
            made = latents.to(own)
            whole = own.shape == made.shape
            arguments[self.argument] = made if whole else torch.cat([made, own[:, made.shape[1] :]], 1)
        with self.texts.call.as_the_pipeline(given.device):
            output = self.root(**arguments)
        return self._made(wide(output if isinstance(output, Tensor) else output[0]))


class Predictions:
    """The predictions for the rows of one condition, one an image, in the layout in which the denoiser gives them.

    In float32 or wider. `own`: what it predicts for them. `latents`: what it is given. `step`, `n_steps`: of the schedule.
    """

    def __init__(self, moment: Moment, condition: str, own: Tensor | None = None, latents: Tensor | None = None):
        rows = moment.rows(condition)
        self.images: list[int] = list(rows)
        self._rows = list(rows.values())
        self.condition: str = condition
        self._moment = moment
        self._elsewhere = latents is not None
        self.latents: Tensor = moment.latents(self._rows) if latents is None else latents
        self.own: Tensor = moment.run(self._rows, self.images, latents=latents) if own is None else own
        assert moment.context.step is not None
        assert moment.context.n_steps is not None
        self.step: int = moment.context.step
        self.n_steps: int = moment.context.n_steps

    @property
    def level(self) -> Any:
        return self._moment.level()

    def of(self, text: str, latents: Tensor | None = None) -> Tensor:
        """What would be predicted for another prompt, at the latents or at others."""
        conditional = self._moment.rows("cond")
        kept = self._moment.before
        if latents is None and not self._elsewhere and all((text, "cond", i) in kept for i in self.images):
            return torch.stack([kept[text, "cond", image] for image in self.images])
        # The text can be told from a conditional row's arguments: an unconditional one's is another.
        rows = [conditional.get(image) for image in self.images]
        if None in rows:
            raise ValueError(
                f"{self._moment.texts.who} needs the conditional rows' arguments for {text!r}, and this run of the denoiser "
                "has none of them; use a pipeline that runs the prompt before or beside the negative prompt."
            )
        at = self.latents if self._elsewhere and latents is None else latents
        found = self._moment.run([row for row in rows if row is not None], self.images, text, at)
        if at is None:
            kept.update({(text, "cond", image): one for image, one in zip(self.images, found, strict=True)})
        return found

    def at(self, latents: Tensor) -> Tensor:
        """What would be predicted for the rows' own texts at other latents."""
        return self._moment.run(self._rows, self.images, latents=latents)

    def without(self) -> Tensor:
        """The unconditional prediction: that of the same run where it has one, else of the negative prompt or of none."""
        kept = self._moment.before
        if not self._elsewhere and all((None, "uncond", image) in kept for image in self.images):
            return torch.stack([kept[None, "uncond", image] for image in self.images])
        if self._elsewhere:
            rows = self._moment.rows("uncond")
            if all(image in rows for image in self.images):
                return self._moment.run([rows[image] for image in self.images], self.images, latents=self.latents)
        return self.of(self._moment.texts.negative)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
