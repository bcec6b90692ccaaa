"""What came of a completed call: the hookpoints that it never reached, and the instruments whose time never came."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsefeat.pipeline.attention_seam import why_unseen
from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import Instrument
from sparsefeat.pipeline.running import RunningCall

if TYPE_CHECKING:
    from sparsefeat.pipeline.attachment import Attachment


SHOWN = 3


@dataclass(frozen=True)
class Missing:
    """A hookpoint or an attention that a completed call did not reach: whose, and why with the remedy."""

    instrument: Instrument
    name: str
    why: str


class HookpointNotReachedError(RuntimeError):
    """A call of the pipeline completed without ever running a hooked module. `result` is what the call returned."""

    def __init__(self, message: str, missing: tuple[str, ...], result: Any):
        super().__init__(message)
        self.missing = missing
        self.result = result


def missing(attachment: Attachment, running: RunningCall) -> list[Missing]:
    """What a completed call did not reach.

    In a loop of the user's own a component that did not run at all was not meant to.
    """

    def meant(target: Target) -> bool:
        return not running.call.own_loop or target.root_name in running.roots

    found = [
        Missing(place.instrument, str(place.hookpoint), place.target.family.never_reached)
        for place in attachment.places
        if place.hook not in running.reached and meant(place.target)
    ]
    reached = [tap for tap in attachment.taps if id(tap.target.module) in running.tapped]
    for tap in attachment.taps:
        # Of two models for parts of the schedule (Wan 2.2) one may have had no step.
        elsewhere = tap.target.root_name not in running.roots and any(tap.instrument is t.instrument for t in reached)
        if tap not in reached and meant(tap.target) and not elsewhere:
            why = why_unseen(tap.target.root_name, tap.target.module)
            found.append(Missing(tap.instrument, f"the attention of {tap.target.path}", why))
    run = {id(place.instrument) for place in attachment.weights if place.target.root_name in running.roots}
    for place in attachment.weights:
        if id(place.instrument) not in run and meant(place.target):
            run.add(id(place.instrument))
            found.append(
                Missing(place.instrument, f"the weight of {place.target.path}", place.target.family.never_reached)
            )
    return found


def report(unreached: dict[Attachment, list[Missing]], result: Any) -> None:
    """Raise HookpointNotReachedError if there is anything in it."""
    everything = {what.name: what.why for attachment in unreached.values() for what in attachment}
    if everything:
        reasons = "; ".join(
            f"{_some([name for name in everything if everything[name] == why])} ({why})"
            for why in dict.fromkeys(everything.values())
        )
        message = f"the call completed without reaching {reasons}. Its result is this exception's `result`"
        raise HookpointNotReachedError(message, tuple(everything), result)


def _some(names: list[str]) -> str:
    """The first few: a model has 70 attentions, and `missing` has them all."""
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def warn_of_unkept(attachments: Sequence[Attachment]) -> None:
    """Warn, once, of instruments at work whose session nobody has: nothing can close it, nor read what they record."""
    for attachment in attachments:
        if attachment.session is None and id(attachment) not in attachment.warned:
            attachment.warned.add(id(attachment))
            warnings.warn(
                f"sparsefeat: what attach gave for {attachment.names} was not kept, and goes on acting in every call: keep "
                "it, run = sf.attach(...) or `with sf.attach(...) as run:`, to close it and to read it; sf.detach(pipe) "
                "closes it now",
                UserWarning,
                stacklevel=3,
            )


def warn_of_silence(attachment: Attachment, running: RunningCall) -> None:
    """Warn, once a session, of each instrument that was reached and had nothing to do in the whole call; and if the
    texts changed under labels that were taken from the first step.
    """
    call = running.call
    for instrument in attachment.instruments:
        if id(instrument) not in running.asked or id(instrument) in attachment.warned:
            continue
        wanted, seen = instrument.conditions(), running.conditions_seen.get(id(instrument), set())
        name = type(instrument).__name__
        if not running.asked[id(instrument)]:
            why: str | None = f"none of the {call.n_steps} steps that ran is among its own: look at its steps="
        elif wanted is not None and not seen & set(wanted):
            asked = " or ".join(map(repr, wanted))
            why = (
                f"no row was {asked} in it, only {', '.join(sorted(seen))}: look at its condition= and at the guidance"
            )
        else:
            why = instrument.idle()
        if why is None:
            continue
        attachment.warned.add(id(instrument))
        warnings.warn(f"sparsefeat: this {name} did nothing in a whole call, as {why}", UserWarning, stacklevel=5)
    if running.conditions.changed() and id(running.conditions) not in attachment.warned:
        attachment.warned.add(id(running.conditions))
        warnings.warn(
            "sparsefeat: the texts that the denoiser was given changed in the course of the call (by a callback?); its rows "
            "were taken for those of the first step",
            UserWarning,
            stacklevel=5,
        )
