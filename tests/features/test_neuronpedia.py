"""What is exported for Neuronpedia, against the fields of its writers and brute force over dense codes."""

from __future__ import annotations

import gzip
import json
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image

import sparsefeat as sf
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
PROMPTS = ["a fox", "a cat", "fox b", "dog c"]
SOURCE = "tiny-sd/up.1-random"
N = 64

# Field -> type, as SAEDashboard declares `Feature` and `Activation` in sae_dashboard/neuronpedia/neuronpedia_export.py
# (github.com/jbloomAus/SAEDashboard, commit 3ea1249a), which writes features/ and activations/ of this layout; the release
# 0.8.0 has the same statistics in neuronpedia_dashboard.py. "?": or null. createdAt is a datetime, in ISO 8601.
FEATURE = {
    **dict.fromkeys(["modelId", "layer", "index"], "str"),
    **dict.fromkeys(["creatorId", "vectorLabel", "hookName", "sourceSetName"], "str?"),
    **dict.fromkeys(["maxActApprox", "vectorDefaultSteerStrength"], "float?"),
    **dict.fromkeys(["neg_str", "pos_str"], "[str]"),
    **dict.fromkeys(["topkCosSimIndices", "neuron_alignment_indices"], "[int]"),
    **dict.fromkeys(["correlated_neurons_indices", "correlated_features_indices"], "[int]"),
    **dict.fromkeys(["vector", "topkCosSimValues", "neuron_alignment_values", "neuron_alignment_l1"], "[float]"),
    **dict.fromkeys(["correlated_neurons_pearson", "correlated_neurons_l1"], "[float]"),
    **dict.fromkeys(["correlated_features_pearson", "correlated_features_l1"], "[float]"),
    **dict.fromkeys(["neg_values", "pos_values", "decoder_weights_dist"], "[float]"),
    **dict.fromkeys(["freq_hist_data_bar_heights", "freq_hist_data_bar_values"], "[float]"),
    **dict.fromkeys(["logits_hist_data_bar_heights", "logits_hist_data_bar_values"], "[float]"),
    "hasVector": "bool",
    "frac_nonzero": "float",
    "createdAt": "time",
}
ACTIVATION = {
    **dict.fromkeys(["id", "index", "layer", "modelId", "creatorId"], "str"),
    **dict.fromkeys(["dataSource", "dataIndex", "logitContributions"], "str?"),
    **dict.fromkeys(["maxValue", "minValue"], "float"),
    **dict.fromkeys(["dfaMaxValue", "binMin", "binMax", "binContains"], "float?"),
    **dict.fromkeys(["dfaTargetIndex", "qualifyingTokenIndex"], "int?"),
    **dict.fromkeys(["values", "dfaValues", "lossValues"], "[float]"),
    "tokens": "[str]",
    "maxValueTokenIndex": "int",
    "zIndices": "[[int]]?",
    "zValues": "[float]?",
    "createdAt": "time",
}
# The columns that Neuronpedia's exporter selects (github.com/hijohnnylin/neuronpedia, commit 1a80fe9b,
# utils/neuronpedia-utils/neuronpedia_utils/export-data.py), with their types from `model Explanation` of its
# apps/webapp/prisma/schema.prisma. SAEDashboard writes no explanations.
EXPLANATION = {
    **dict.fromkeys(["id", "modelId", "layer", "index", "authorId", "description"], "str"),
    **dict.fromkeys(["typeName", "explanationModelName"], "str?"),
    **dict.fromkeys(["umap_x", "umap_y", "umap_log_feature_sparsity"], "float?"),
    "embedding": "[float]?",
    "umap_cluster": "int?",
}
# What Neuronpedia's exporter selects of features and activations (the same file): all of it is to be there.
SELECTED = {
    "features": "modelId layer index maxActApprox creatorId frac_nonzero freq_hist_data_bar_heights "
    "freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values neuron_alignment_indices "
    "neuron_alignment_l1 neuron_alignment_values correlated_neurons_indices correlated_neurons_l1 "
    "correlated_neurons_pearson decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName "
    "topkCosSimIndices topkCosSimValues vector vectorLabel hookName vectorDefaultSteerStrength hasVector",
    "activations": "id modelId layer index creatorId dataSource tokens maxValue minValue values maxValueTokenIndex "
    "dfaValues dfaMaxValue dfaTargetIndex binContains binMin binMax",
}


def of_type(value, name: str) -> bool:
    if name.endswith("?"):
        return value is None or of_type(value, name[:-1])
    if name.startswith("["):
        return isinstance(value, list) and all(of_type(entry, name[1:-1]) for entry in value)
    if name == "time":
        return datetime.fromisoformat(value).tzinfo is not None
    return type(value) is {"str": str, "int": int, "float": float, "bool": bool}[name]


def lines(folder, kind: str) -> list[dict]:
    with gzip.open(folder / kind / "batch-0.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(3)
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=N, k=4, hookpoint=AT)).requires_grad_(False).eval()
    sae.names = sf.Names({7: "foxes, “red”", 40: "snow"})
    return sae


@pytest.fixture(scope="module")
def collected(sae):
    """Statistics, examples, images, dense codes [images, steps, positions, latents] and recordings of two calls."""
    pipe = tiny_sd()
    concepts = {prompt: "fox" if "fox" in prompt else "other" for prompt in PROMPTS}
    statistics, examples = sf.Statistics(["fox", "other"], N), sf.Examples(N, top=2)
    record, images, dense, recordings = sf.Record(sae), [], [], []
    both = sf.CollectStatistics(sae, statistics, concepts), sf.CollectExamples(sae, examples)
    with sf.attach(pipe, record, *both) as run:
        for start in (0, 2):
            drawn = pixels(pipe, PROMPTS[start : start + 2], steps=2, seed=start, height=48, width=64)
            images += [Image.fromarray((np.asarray(one) * 255).astype(np.uint8)) for one in drawn]
            recordings.append(run[record])
            dense += [
                torch.stack([run[record].codes(step, image).dense() for step in run[record].steps])
                for image in range(2)
            ]
    return statistics, examples, images, torch.stack(dense), recordings


@pytest.fixture(scope="module")
def exported(sae, collected, tmp_path_factory):
    statistics, examples, images, *_ = collected
    folder = tmp_path_factory.mktemp("export") / "tiny"
    assert sf.export_neuronpedia(folder, sae, statistics, examples, images, source=SOURCE) == folder
    return folder


@pytest.mark.parametrize(
    ("kind", "fields"), [("features", FEATURE), ("activations", ACTIVATION), ("explanations", EXPLANATION)]
)
def test_every_line_has_the_fields_and_types_of_neuronpedias_writers(exported, kind, fields):
    written = lines(exported, kind)
    assert written
    for line in written:
        assert set(line) == set(fields)
        assert set(SELECTED.get(kind, "").split()) <= set(line)
        assert [f"{name}={line[name]!r}" for name, kind in fields.items() if not of_type(line[name], kind)] == []
        assert (line["modelId"], line["layer"]) == tuple(SOURCE.split("/"))


def test_features_are_counted_over_all_positions_and_steps(exported, collected):
    rows = collected[3].reshape(-1, N)
    features = lines(exported, "features")
    assert [line["index"] for line in features] == [str(latent) for latent in range(N)]
    assert [line["frac_nonzero"] for line in features] == pytest.approx((rows != 0).double().mean(0).tolist())
    assert [line["maxActApprox"] for line in features] == rows.amax(0).clamp(min=0).tolist()
    assert {line["hookName"] for line in features} == {AT}


def test_activations_are_the_maps_of_the_images_with_the_highest_mean(exported, collected):
    maps = collected[3].double().mean(1).mT  # [images, latents, positions]
    written = lines(exported, "activations")
    expected = []
    for latent, scores in enumerate(maps.mean(2).T):
        order = scores.argsort(descending=True, stable=True)[:2]
        expected += [(str(latent), image) for image in order.tolist() if scores[image] > 0]
    assert [(line["index"], int(line["dataIndex"][11:-4])) for line in written] == expected
    assert len({line["id"] for line in written}) == len(written)
    for line, (latent, image) in zip(written, expected, strict=True):
        exact = maps[image, int(latent)]
        values = torch.tensor(line["values"], dtype=torch.float64)
        torch.testing.assert_close(values, exact, rtol=2**-10, atol=1e-6)  # maps are kept in half precision
        assert line["tokens"] == [f"{y},{x}" for y in range(6) for x in range(8)]
        assert (line["maxValue"], line["minValue"]) == (values.max(), values.min())
        assert line["maxValueTokenIndex"] == int(values.argmax())
        assert line["dataSource"] == PROMPTS[image]


def test_thumbnails_are_of_the_examples_images(exported, collected):
    named = {line["dataIndex"] for line in lines(exported, "activations")}
    assert {f"thumbnails/{path.name}" for path in (exported / "thumbnails").iterdir()} == named
    for path in named:
        shown = np.asarray(Image.open(exported / path))
        assert np.array_equal(shown, np.asarray(collected[2][int(path[11:-4])]))  # small ones are not scaled


def test_names_are_read_back_from_the_explanations(exported, sae):
    assert dict(sf.Names.read(exported / "explanations" / "batch-0.jsonl.gz")) == {7: "foxes, “red”", 40: "snow"}


def test_large_images_are_made_smaller_and_latents_may_be_chosen(sae, collected, tmp_path):
    statistics, _, images, _, recordings = collected
    best = int(statistics.maximum("fox").argmax())
    chosen = sf.Examples(N, top=1, latents=[best])
    for recording in recordings:
        chosen.add(recording)
    large = [image.resize((640, 480)) for image in images]
    folder = sf.export_neuronpedia(tmp_path / "one", sae, statistics, chosen, large, source=SOURCE)
    assert [line["index"] for line in lines(folder, "activations")] == [str(best)]
    assert {Image.open(path).size for path in (folder / "thumbnails").iterdir()} == {(256, 192)}


def test_without_images_there_are_no_thumbnails_and_without_examples_no_activations(sae, collected, tmp_path):
    statistics, examples, *_ = collected
    folder = sf.export_neuronpedia(tmp_path / "no-images", sae, statistics, examples, source=SOURCE)
    assert {line["dataIndex"] for line in lines(folder, "activations")} == {None}
    assert not (folder / "thumbnails").exists()
    assert lines(sf.export_neuronpedia(tmp_path / "none", sae, statistics, source=SOURCE), "activations") == []


def test_what_does_not_belong_together_is_refused_and_nothing_is_left(sae, collected, tmp_path):
    statistics, examples, images, *_ = collected
    here = tmp_path / "refused"
    for said, given in {
        "images= has 3 images, examples took in 4": (statistics, examples, images[:3]),
        "images= has 4 images, there are no examples": (statistics, None, images),
        "examples are of 32 latents, the SAE has 64": (statistics, sf.Examples(32), None),
        "statistics are of 32 latents": (sf.Statistics(["fox"], 32), None, None),
        "statistics are empty": (sf.Statistics(["fox"], N), None, None),
    }.items():
        with pytest.raises(ValueError, match=said):
            sf.export_neuronpedia(here, sae, *given, source=SOURCE)
    with pytest.raises(TypeError, match="statistics is Examples"):
        sf.export_neuronpedia(here, sae, examples, source=SOURCE)
    with pytest.raises(TypeError, match="sae is str, not an SAE"):
        sf.export_neuronpedia(here, "my-sae", statistics, source=SOURCE)
    with pytest.raises(TypeError, match="examples is list, not Examples"):
        sf.export_neuronpedia(here, sae, statistics, images, source=SOURCE)
    with pytest.raises(ValueError, match="write MODEL/SOURCE"):
        sf.export_neuronpedia(here, sae, statistics, source="tiny-sd")
    broken = [*images[:3], object()]
    with pytest.raises(TypeError, match=r"images\[3\] is object, not a PIL image"):
        sf.export_neuronpedia(here, sae, statistics, examples, broken, source=SOURCE)
    assert list(tmp_path.iterdir()) == []
    here.mkdir()
    (here / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        sf.export_neuronpedia(here, sae, statistics, source=SOURCE)
    assert [path.name for path in here.iterdir()] == ["mine.txt"]


def test_a_name_of_a_latent_that_is_not_there_is_refused():
    other = sf.SAE(sf.SAEConfig(d_model=32, n_latents=N, k=4, hookpoint=AT))
    with pytest.raises(ValueError, match="names has latent 64; this SAE has latents 0 to 63"):
        other.names = sf.Names({N: "one too many"})


def test_infinity_in_the_statistics_is_refused_and_nothing_is_left(sae, tmp_path):
    statistics = sf.Statistics(["fox"], N)
    code = sf.SparseCode(torch.tensor([[torch.inf, 1.0]]), torch.tensor([[3, 5]], dtype=torch.int32), N)
    statistics.add(code, torch.tensor([0]), 0.0)
    with pytest.raises(ValueError, match="the statistics' maximum holds NaN or infinity"):
        sf.export_neuronpedia(tmp_path / "refused", sae, statistics, source=SOURCE)
    assert list(tmp_path.iterdir()) == []
