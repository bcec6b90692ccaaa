"""Names of latents, such as Neuronpedia's labels: read from files, looked up by what they say."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsefeat.arguments import NotThere, mapping, whole, wholes
from sparsefeat.sae.files import must_be_file, shown
from sparsefeat.whole import as_path

NAMES = "names.json"  # beside the SAE, if its latents have names

LARGEST = 2**28  # bytes of a file of names, unpacked; 130,000 labels of a sentence each take 15 MB
SHOWN = 8  # names in a refusal
API = "https://www.neuronpedia.org/api/feature"
# What a latent and its name are called: Neuronpedia's exports, its answers, and what people write.
INDEX, NAME = ("index", "latent", "feature", "feature_index"), ("description", "name", "label", "explanation")


class Names(Mapping[int, str]):
    """Latent -> name. Several latents may have the same name, which then names none of them.

    >>> names = Names({3: "foxes and other canids", 7: "snow"})
    >>> names[7], names.find("foxes")
    ('snow', 3)

    Raises:
        ValueError: a latent that is no number, a name that is no text.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        given = mapping("names", {} if names is None else names, "latents to names, as {3: 'foxes'}")
        self._names = {whole("latent", latent, 0): name for latent, name in given.items()}
        for latent, name in self._names.items():
            if not isinstance(name, str):
                raise ValueError(f"names[{latent}]={name!r:.80} must be a text.")

    def __getitem__(self, latent: int) -> str:
        if latent not in self._names:  # what cannot be hashed is told by Python
            raise NotThere(
                f"latent {latent!r:.80} has no name here; .get(latent) gives None, and .find(name) the latent"
            )
        return self._names[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Names({len(self)} latents)"

    def find(self, said: str) -> int:
        """The latent called so: by the whole name, or else by words that stand in one name alone; case does not matter.

        Raises:
            ValueError: no latent is called so, or several.
        """
        if not isinstance(said, str) or not said.strip():
            what = "is empty" if isinstance(said, str) else f"is {said!r}, no text"
            raise ValueError(f"the name of a latent {what}: write what it says")
        wanted = said.strip().casefold()
        exact = [latent for latent, name in self.items() if name.casefold() == wanted]
        found = exact or [latent for latent, name in self.items() if wanted in name.casefold()]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{said!r} names {len(found)} latents, {self._listed(found)}: write more of it, or the number"
            )
        if not self:
            raise ValueError(
                f"{said!r} cannot be looked up: this SAE has no names, set sae.names = sf.Names.read(path)"
            )
        near = difflib.get_close_matches(said, list(self.values()), n=3, cutoff=0.3)
        close = [latent for latent, name in self.items() if name in near]
        raise ValueError(f"no latent is called {said!r}: the nearest are {self._listed(close) or 'none'}")

    def _listed(self, latents: list[int]) -> str:
        more = f" and {len(latents) - SHOWN} more" if len(latents) > SHOWN else ""
        return ", ".join(f"{latent} ({self[latent]!r})" for latent in latents[:SHOWN]) + more

    @classmethod
    def read(cls, path: str | Path) -> Names:
        """From a file: JSON ({"12": "fox"}, or a list of objects), JSON lines (Neuronpedia's exports, `.jsonl.gz` too), or CSV.

        Objects and columns have the latent under `index`, `latent` or `feature` and its name under `description`,
        `name`, `label` or `explanation`; the first of a latent counts. CSV without a header is latent, name.

        Raises:
            TypeError: `path` is no path. OSError: it is no file that can be read.
            ValueError: it is no list of latents and names, or larger than one.
        """
        path = as_path(path, "path", "a file")
        if not path.exists():
            raise FileNotFoundError(f"path {path} does not exist; name a file of latents and names")
        must_be_file(path)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{path} has more than {LARGEST} bytes: it is no list of names")
        try:
            found = _parsed(path, content.decode("utf-8-sig"))
            names: dict[int, str] = {}
            for latent, name in found:
                if name is not None and str(name).strip():
                    names.setdefault(_number(latent), str(name).strip())
            return cls(names)
        except (ValueError, OverflowError, TypeError, AttributeError, KeyError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path} is no list of latents and names ({str(error)[:120]}): see Names.read") from None

    @classmethod
    def of_neuronpedia(cls, source: str, latents: Iterable[int], cache: str | Path | None = None) -> Names:
        """Labels of these latents from Neuronpedia's public API, one question a latent; answers are kept in `cache`.

        source: `MODEL/SOURCE`, such as "gemma-2-2b/20-gemmascope-res-16k". Nothing else here uses the network.

        Raises:
            OSError: Neuronpedia cannot be asked.
            ValueError: `source` is not MODEL/SOURCE.
        """
        model, layer = model_and_source(source)
        latents = wholes("latents", latents)
        kept = Path(cache) / f"{model}--{layer}.json" if cache is not None else None
        names = dict(cls.read(kept)) if kept is not None and kept.exists() else {}
        for latent in latents:
            if latent not in names:
                names[latent] = _asked(f"{API}/{model}/{layer}/{int(latent)}")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            cls(names).write(kept)
        return cls({latent: name for latent, name in names.items() if name})

    def write(self, path: str | Path) -> Path:
        """As JSON, {"12": "fox"}."""
        path = Path(path)
        path.write_text(json.dumps({str(k): v for k, v in self.items()}, ensure_ascii=False, indent=0) + "\n", "utf-8")
        return path


def model_and_source(source: str) -> tuple[str, str]:
    """Neuronpedia's identifiers of a model and of an SAE, from `MODEL/SOURCE`."""
    model, _, layer = source.partition("/")
    if not model or not layer or "/" in layer:
        raise ValueError(f"source is {source!r}: write MODEL/SOURCE, as in 'gemma-2-2b/20-gemmascope-res-16k'")
    return model, layer


def _parsed(path: Path, text: str) -> Iterator[tuple[Any, Any]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        if rows and not rows[0][0].strip().isdecimal():
            head = [column.strip().casefold() for column in rows[0]]
            yield from (_pair(dict(zip(head, row, strict=False))) for row in rows[1:])
        else:
            yield from ((row[0], row[1]) for row in rows)
    elif name.endswith(".jsonl"):
        yield from (_pair(json.loads(line)) for line in text.splitlines() if line.strip())
    else:
        values = json.loads(text)
        yield from values.items() if isinstance(values, dict) else map(_pair, values)


def _number(latent: Any) -> int:
    """Of a latent, which files also have as a text or, from a table, as 12.0."""
    number = int(latent)
    if isinstance(latent, float) and latent != number:
        raise ValueError(f"latent {latent} is no whole number")
    return number


def _pair(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Latent and name of one object."""
    latent = next((values[key] for key in INDEX if values.get(key) is not None), None)
    if latent is None:
        raise ValueError(f"{shown(sorted(values))} has no {' or '.join(INDEX)}")
    explanations = values.get("explanations")
    if isinstance(explanations, list):
        values = explanations[0] if explanations else {}
    return latent, next((values[key] for key in NAME if values.get(key)), None)


def _asked(address: str) -> str:
    """The label in an answer of the API, "" where there is none."""
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            values = json.loads(answer.read(2**24))
        return str(_pair({"index": 0, **values})[1] or "")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OSError(
            f"{address} gave no answer that can be read ({str(error)[:120]}): try later, or read an export"
        ) from error
