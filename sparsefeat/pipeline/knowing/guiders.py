"""What the guider of a modular pipeline says: it prepares one batch of inputs for each condition, names each after the
prediction that will come of it ("pred_cond", "pred_uncond", "pred_cond_skip"), and tells the model before each run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsefeat.pipeline.knowing.watching import Listener

_IDENTIFIER = "__guidance_identifier__"
_LABELS = {"pred_cond": "cond", "pred_uncond": "uncond"}


def is_guider(thing: Any) -> bool:
    kind = type(thing)
    return all(hasattr(kind, name) for name in ("prepare_inputs", "prepare_models", "cleanup_models", "set_state"))


class Guiders:
    """Hears the guiders of one call. `changed()` is called when one may have put hooks on the model or taken them off."""

    def __init__(self, pipe: Any, changed: Callable[[], None], deaf: Callable[[], bool]):
        self._pipe = pipe
        self._changed = changed
        self._batches: list[Any] = []
        self._prepared = 0
        self._running = False
        methods = {
            "prepare_inputs": self._inputs,
            "prepare_inputs_from_block_state": self._inputs,
            "prepare_models": self._models,
            "cleanup_models": self._cleanup,
        }
        self._listener = Listener(methods, deaf)

    def open(self) -> None:
        self._listener.open()
        for part in vars(self._pipe).values():
            if is_guider(part):
                self._listener.listen(part)

    def close(self) -> None:
        self._listener.close()

    @property
    def condition(self) -> str | None:
        """That of the run of the model that a guider has prepared; None if no guider has."""
        if not self._running or not 0 < self._prepared <= len(self._batches):
            return None
        said = getattr(self._batches[self._prepared - 1], _IDENTIFIER, None)
        if not isinstance(said, str):
            return None
        return _LABELS.get(said) or ("perturbed" if said.startswith("pred_cond_") else None)

    def _inputs(self, guider: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batches: Any) -> None:
        self._batches, self._prepared, self._running = list(batches), 0, False

    def _models(self, guider: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._prepared += 1
        self._running = True
        self._changed()

    def _cleanup(self, guider: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._running = False
        self._changed()
