"""Feature statistics written in the layout of Neuronpedia's exports, with the examples' thumbnails beside them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsefeat.arguments import finite
from sparsefeat.features.search import Example, Examples
from sparsefeat.features.statistics import Statistics, check_statistics
from sparsefeat.sae import SAE
from sparsefeat.sae.names import model_and_source
from sparsefeat.whole import as_path, whole_folder

THUMBNAIL = 256  # pixels of the longer side; smaller images stay as they are

# About words, the model's vocabulary and its neurons, or not measured.
_EMPTY_LISTS = (
    *("vector", "topkCosSimIndices", "topkCosSimValues", "decoder_weights_dist"),
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("neg_str", "neg_values", "pos_str", "pos_values"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
)


def export_neuronpedia(
    folder: str | os.PathLike[str],
    sae: SAE,
    statistics: Statistics,
    examples: Examples | None = None,
    images: Sequence[Image.Image] | None = None,
    *,
    source: str,
) -> Path:
    """Write what is known of an SAE's latents as Neuronpedia's exports lay it out; whole or not at all. Gives the folder.

        features/batch-0.jsonl.gz      a line for every latent
        activations/batch-0.jsonl.gz   a line for every example of a latent
        explanations/batch-0.jsonl.gz  a line for every name in `sae.names`; `sf.Names.read` opens it
        thumbnails/12.png              image 12 of `images`, if it is an example; its longer side at most 256 pixels

    Args:
        statistics: all their concepts and timesteps are pooled; a position that counts for two concepts counts twice.
        examples: collected in the same run or another; without them there are no activations.
        images: every image that `examples` took in, in that order.
        source: `MODEL/SOURCE`, Neuronpedia's identifiers, as in `Names.of_neuronpedia`.

    A feature has `frac_nonzero` (share of the positions where the latent is active), `maxActApprox` (its largest
    activation) and `hookName` (the SAE's hookpoint). An activation is an example: `values` is its map row by row (mean
    over steps, so there is no step), `tokens` the places of the values ("3,5": row 3, column 5; the layout wants one
    token a value), `maxValue`, `minValue` and `maxValueTokenIndex` are of `values`, `dataSource` is the prompt and
    `dataIndex` the path of the thumbnail.

    Empty, as they are about words or were not measured: logits, histograms, neurons, similar features, vectors (lists);
    bins, losses, attribution, the embedding, the kind and the model of an explanation, its place on a map (lists or
    null). `creatorId` and `authorId` are "", as Neuronpedia's importer has to say whose they are.

    Fields and types: the export of SAEDashboard (features, activations) and Neuronpedia's own exporter (explanations).

    Raises:
        TypeError: an argument is of another kind.
        ValueError: statistics, examples, images or names are not of this SAE or of one another, or there are none.
        FileExistsError: `folder` is there and not empty.
    """
    model, layer = model_and_source(source)
    _check(sae, statistics, examples, images)
    written = _Written(model, layer, datetime.now(timezone.utc).isoformat())
    shown = {} if images is None else {place: f"thumbnails/{place}.png" for place in range(len(images))}
    with whole_folder(folder) as unfinished:
        _write(unfinished, "features", written.features(sae, statistics))
        _write(unfinished, "activations", () if examples is None else written.activations(examples, shown))
        _write(unfinished, "explanations", written.explanations(sae))
        if examples is not None and images is not None:
            (unfinished / "thumbnails").mkdir()
            for place in sorted({example.image for _, example in _examples(examples)}):
                if not isinstance(images[place], Image.Image):
                    raise TypeError(
                        f"images[{place}] is {type(images[place]).__name__}, not a PIL image; give PIL images."
                    )
                thumbnail = images[place].convert("RGB")
                thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
                thumbnail.save(unfinished / shown[place])
    return as_path(folder)


@dataclass(frozen=True)
class _Written:
    """The lines of one export: what Neuronpedia calls the model and the SAE, and when they were written."""

    model: str
    layer: str
    at: str

    def _of(self, latent: int) -> dict[str, Any]:
        return {"modelId": self.model, "layer": self.layer, "index": str(latent)}

    def features(self, sae: SAE, statistics: Statistics) -> Iterable[dict[str, Any]]:
        largest = finite("the statistics' maximum", statistics.maximum(statistics.concepts)).tolist()
        share = statistics.frequency(statistics.concepts).tolist()
        for latent in range(sae.n_latents):
            yield {
                **self._of(latent),
                "creatorId": "",
                "createdAt": self.at,
                "maxActApprox": largest[latent],
                "hasVector": False,
                "vectorLabel": None,
                "vectorDefaultSteerStrength": None,
                "hookName": sae.config.hookpoint,
                "frac_nonzero": share[latent],
                "sourceSetName": None,
                **{field: [] for field in _EMPTY_LISTS},
            }

    def activations(self, examples: Examples, shown: dict[int, str]) -> Iterable[dict[str, Any]]:
        for latent, example in _examples(examples):
            # Examples keep maps in half precision, which five digits give back exactly.
            values = [float(f"{v:.5g}") for v in finite("the examples' map", example.map).flatten().tolist()]
            yield {
                **self._of(latent),
                "id": f"{self.model}/{self.layer}/{latent}/{example.image}",
                "tokens": [",".join(map(str, place)) for place in np.ndindex(*example.map.shape)],
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "creatorId": "",
                "createdAt": self.at,
                "dataSource": example.prompt,
                "dataIndex": shown.get(example.image),
                **dict.fromkeys(("dfaTargetIndex", "dfaMaxValue", "logitContributions", "qualifyingTokenIndex")),
                **dict.fromkeys(("binMin", "binMax", "binContains", "zIndices", "zValues")),
                "dfaValues": [],
                "lossValues": [],
            }

    def explanations(self, sae: SAE) -> Iterable[dict[str, Any]]:
        for latent, name in sorted(sae.names.items()):
            yield {
                **self._of(latent),
                "id": f"{self.model}/{self.layer}/{latent}",
                "authorId": "",
                "description": name,
                **dict.fromkeys(("embedding", "typeName", "explanationModelName")),
                **dict.fromkeys(("umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity")),
            }


def _examples(examples: Examples) -> Iterable[tuple[int, Example]]:
    for latent in examples.allowed.nonzero()[:, 0].tolist():
        for example in examples.of(latent):
            yield latent, example


def _write(folder: Path, kind: str, lines: Iterable[dict[str, Any]]) -> None:
    (folder / kind).mkdir()
    with gzip.open(folder / kind / "batch-0.jsonl.gz", "wt", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _check(sae: SAE, statistics: Statistics, examples: Examples | None, images: Sequence[Image.Image] | None) -> None:
    check_statistics(statistics)
    if not isinstance(sae, SAE):
        raise TypeError(f"sae is {type(sae).__name__}, not an SAE; open it first, sparsefeat.load_sae(...).")
    if not isinstance(examples, Examples | None):
        raise TypeError(f"examples is {type(examples).__name__}, not Examples; collect them, CollectExamples(...).")
    check_statistics(statistics, sae)
    if examples is not None and examples.n_latents != sae.n_latents:
        raise ValueError(
            f"examples are of {examples.n_latents} latents, the SAE has {sae.n_latents}; use the same SAE."
        )
    if not statistics.rows(statistics.concepts):
        raise ValueError("statistics are empty; collect some first, collect_statistics(...).")
    if images is not None and len(images) != (0 if examples is None else examples.n_drawn):
        taken = "there are no examples" if examples is None else f"examples took in {examples.n_drawn}"
        raise ValueError(f"images= has {len(images)} images, {taken}; give each image of the examples, in their order.")
