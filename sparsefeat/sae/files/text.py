"""Configs: JSON and YAML, bounded in size, without what makes little text into much, and without keys nobody understands."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsefeat.sae.files.asked import Asked, listed
from sparsefeat.sae.files.untrusted import first_line, must_be_file, shown

LARGEST_JSON, LARGEST_YAML = 4 * 2**20, 2**18  # bytes; the largest published config has about 10 KB
# A key with one of these words is of the training, the data or the program: it says nothing about what the weights mean.
OF_THE_TRAINING = listed(
    "adam aux auxk author base batch beta1 beta2 buffer cache checkpoint checkpoints coeff coefficient commit "
    "context cooldown ctx dataset date dead decay description device dtype duration epoch epochs eval evals ghost "
    "grad hf hub id init initial l0 l1 lambda layer learning license log logger lr loss losses lp mse n_batches "
    "name names neuronpedia noise num_workers optimizer p_anneal path penalty pre_act prepend resample run save "
    "seed sparsity step steps ste store tags tanh tokens train training url version wandb warm warmup window "
    "workers"
)
NOTHING: tuple[Any, ...] = (None, False, "", "none", "None", 0, [], {})


class Described(Asked):
    """A config: a mapping that notes what it was asked for."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def check(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse keys that nobody asked for and that may change what the weights mean."""
        unknown = [
            name
            for name, value in self.left().items()
            if name not in harmless and not _is_nothing(value) and not OF_THE_TRAINING & _words(name)
        ]
        if unknown:
            raise ValueError(
                f"{self.path} says {', '.join(f'{name[:60]} {shown(self.plain[name])}' for name in unknown[:4])}, which is "
                "not understood and may change what the weights mean: read them with the program that wrote them, or take "
                "the key out if it says nothing about them"
            )


def _is_nothing(value: object) -> bool:
    return any(value is nothing or (type(value) is type(nothing) and value == nothing) for nothing in NOTHING)


def _words(name: str) -> set[str]:
    words = re.split(r"[_\W]+", name.lower())
    return {*words, *("_".join(pair) for pair in itertools.pairwise(words))}


@contextlib.contextmanager
def described(path: Path, harmless: frozenset[str] = frozenset()) -> Iterator[Described]:
    """A JSON config for a reader; what it did not ask for when it is done is refused, unless it cannot matter."""
    config = Described(path, read_json(path))
    yield config
    config.check(harmless)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path, LARGEST_JSON))
    except RecursionError:
        raise ValueError(f"{path} is nested too deep for a config: copy or download it again") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}): copy or download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: a JSON object was expected")
    return values


class _Plain(yaml.SafeLoader):
    """Without aliases, with which a few hundred bytes stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name)")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(_text(path, LARGEST_YAML), _Plain)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is not plain YAML ({first_line(error)}): copy or download it again") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds a {type(values).__name__}: names and values were expected")
    return values


def _text(path: Path, most: int) -> str:
    if must_be_file(path) > most:
        raise ValueError(f"{path} has more than {most} bytes, too much for a config: copy or download it again")
    with open(path, "rb") as file:
        content = file.read(most)
    try:
        return content.decode("utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"{path} is not valid {kind} ({error}): copy or download it again") from None
