"""What one `attach` put into one pipeline: what the wiring holds of a session, and what was recorded in it.

The `Session` itself is its user's alone. So it can be told when nobody has it any more, who could close it or read it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from sparsefeat.arguments import NotThere
from sparsefeat.pipeline.context import Call
from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import Instrument
from sparsefeat.pipeline.visits import Place, Tap
from sparsefeat.pipeline.weights import WeightPlace

if TYPE_CHECKING:
    from sparsefeat.pipeline.session import Session

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Records(Protocol[T_co]):
    """An instrument, for what it records."""

    def end_call(self, call: Call) -> T_co: ...


@dataclass(frozen=True, eq=False)
class Recordings:
    """What the instruments recorded in one call: `recordings[instrument]`."""

    call: Call
    _values: dict[int, Any] = field(repr=False)
    _instruments: tuple[Instrument, ...] = field(repr=False)

    def __getitem__(self, instrument: Records[T]) -> T:
        if not any(instrument is mine for mine in self._instruments):
            what = f"this {type(instrument).__name__}" if isinstance(instrument, Instrument) else f"{instrument!r:.80}"
            mine = ", ".join(type(one).__name__ for one in self._instruments)
            raise NotThere(f"{what} was not attached in this session, which has {mine}; look up by the object itself")
        if id(instrument) not in self._values:
            raise NotThere(f"this {type(instrument).__name__} recorded nothing: the call never reached its hookpoints")
        return cast("T", self._values[id(instrument)])


@dataclass(eq=False)
class Attachment:
    """The instruments of a session and where they are in the pipeline.

    `listened` are the components whose runs they hear, `between` the text encoders and the components between these and
    the denoiser, `layout` the runs of a step as the user stated them, `warned` what was warned of already, by id.
    """

    pipe: Any
    instruments: tuple[Instrument, ...]
    places: tuple[Place, ...] = ()
    taps: tuple[Tap, ...] = ()
    listened: tuple[Tap, ...] = ()
    between: tuple[Target, ...] = ()
    weights: tuple[WeightPlace, ...] = ()
    layout: tuple[tuple[str, ...], ...] | None = None
    calls: list[Recordings] = field(default_factory=list)
    is_one_of_several: bool = False
    warned: set[int] = field(default_factory=set)
    _session: weakref.ref[Session] | None = None

    @property
    def names(self) -> str:
        return ", ".join(type(instrument).__name__ for instrument in self.instruments)

    @property
    def session(self) -> Session | None:
        """None once nobody has it any more."""
        return None if self._session is None else self._session()

    def belongs_to(self, session: Session) -> None:
        self._session = weakref.ref(session)

    def record(self, call: Call, values: dict[int, Any]) -> None:
        """Keep the recordings of a completed call."""
        self.calls.append(Recordings(call, values, self.instruments))

    def prepare_again(self) -> None:
        """Where several pipelines share the instruments, these may have been prepared for another one since."""
        for instrument in self.instruments if self.is_one_of_several else ():
            instrument.prepare(self.pipe)

    def find_wrapped(self) -> None:
        """Hook the wrapper in a module's place where one was put around it since (LoRA): the model goes on with its output.
        A model that was made to share its sequence out since is refused.
        """
        for target in [place.target for place in self.places] + [tap.target for tap in self.taps]:
            refuse_a_shared_sequence(target)
        self.places = tuple(replace(place, target=_wrapped(place.target)) for place in self.places)
        self.taps = tuple(replace(tap, target=_wrapped(tap.target)) for tap in self.taps)

    def forget(self) -> None:
        """Let go of the pipeline and its modules, once nothing of it is in there; the recordings need none of them."""
        self.pipe = None
        self.places = self.taps = self.listened = self.between = self.weights = ()


def refuse_a_shared_sequence(target: Target) -> None:
    config = getattr(getattr(target.root, "_orig_mod", target.root), "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise RuntimeError(
            f"{target.root_name} shares its sequence out among several processes (context parallelism), so that {target.path} "
            "sees some of the rows: attach to a pipeline without it, and give each process prompts of its own"
        )


def _wrapped(target: Target) -> Target:
    """The target, or the module that is in its place now and has it inside."""
    try:
        here = target.root.get_submodule(target.inner)
    except AttributeError:
        return target
    inside = here is not target.module and any(module is target.module for module in here.modules())
    return replace(target, module=here) if inside else target
