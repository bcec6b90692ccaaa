"""Names of latents: read from what Neuronpedia and people write, found by what they say, kept with the SAE."""

from __future__ import annotations

import gzip
import io
import json

import pytest
import torch
from typer.testing import CliRunner

import sparsefeat as sf
from sparsefeat.cli.app import app
from sparsefeat.sae import Names, load_sae
from tests.sae.dense import random_sae

LABELS = {3: "foxes and other canids", 7: "snow", 12: "red foxes in snow", 20: "Paris"}


def test_a_latent_is_found_by_its_name_and_an_ambiguous_one_is_refused_with_the_list():
    names = Names(LABELS)
    assert names.find("snow") == 7  # the whole name of one, though a part of another
    assert names.find("canids") == 3
    assert names.find(" paris ") == 20
    with pytest.raises(
        ValueError, match=r"'fox' names 2 latents, 3 \('foxes and other canids'\), 12 \('red foxes in snow'\)"
    ):
        names.find("fox")
    with pytest.raises(ValueError, match=r"no latent is called 'Pariss': the nearest are 20 \('Paris'\)"):
        names.find("Pariss")
    with pytest.raises(ValueError, match="is empty"):
        names.find(" ")
    with pytest.raises(ValueError, match=r"has no names, set sae\.names = sf\.Names\.read"):
        Names().find("fox")
    twice = Names({1: "fox", 2: "Fox"})
    with pytest.raises(ValueError, match="names 2 latents"):
        twice.find("fox")


FILES = {
    "plain.json": json.dumps({str(k): v for k, v in LABELS.items()}),
    "list.json": json.dumps([{"latent": k, "name": v} for k, v in LABELS.items()]),
    "answers.json": json.dumps(
        [{"index": str(k), "explanations": [{"description": v}, {"description": "no"}]} for k, v in LABELS.items()]
    ),
    "batch-0.jsonl": "\n".join(
        json.dumps({"modelId": "m", "layer": "s", "index": str(k), "description": v}) for k, v in LABELS.items()
    ),
    "header.csv": "latent,label\n" + "\n".join(f'{k},"{v}"' for k, v in LABELS.items()),
    "bare.csv": "\n".join(f'{k},"{v}"' for k, v in LABELS.items()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_files_of_every_kind_give_the_same_names(tmp_path, name, packed):
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(FILES[name].encode()) if packed else FILES[name].encode())
    assert dict(Names.read(path)) == LABELS


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{",
        '{"a": "b"}',
        '[{"name": "fox"}]',
        '{"-3": "fox"}',
        '[{"index": 3.7, "name": "fox"}]',
        '[{"index": Infinity, "name": "fox"}]',
        "[[[" * 10**5,
    ],
)
def test_a_file_of_something_else_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ValueError, match=r"names\.json is no list of latents and names \(.*\): see Names\.read"):
        Names.read(tmp_path / "names.json")


def test_names_are_kept_with_the_sae_and_edits_take_them(tmp_path):
    sae = random_sae("topk", hookpoint="unet.mid_block")
    sae.names = Names(LABELS)
    again = load_sae(sae.save(tmp_path / "sae"))
    assert dict(again.names) == LABELS
    assert not load_sae(random_sae("topk").save(tmp_path / "other")).names
    by_name, by_number = sf.Steer(again, scale={"snow": 0.0, 3: 2.0}), sf.Steer(again, scale={7: 0.0, 3: 2.0})
    assert torch.equal(by_name.rule.latents, by_number.rule.latents)
    assert torch.equal(by_name.rule.gain, by_number.rule.gain)
    assert sf.Steer(again, add={"Paris": 2.0}).add == {20: 2.0}
    with pytest.raises(ValueError, match="names 2 latents"):
        sf.Steer(again, scale={"fox": 0.0})
    with pytest.raises(ValueError, match="names a latent twice"):
        sf.Steer(again, scale={"snow": 0.0, 7: 1.0})


@pytest.mark.parametrize("overwrite", [False, True])
def test_names_stay_with_their_weights_and_go_with_them(tmp_path, overwrite):
    config = sf.SAEConfig(d_model=6, n_latents=12, k=3)
    one, other = sf.SAE(config), sf.SAE(config)
    one.save(tmp_path / "sae")
    Names({3: "fox"}).write(tmp_path / "sae" / "names.json")
    one.save(tmp_path / "sae", overwrite=overwrite)
    assert load_sae(tmp_path / "sae").names == Names({3: "fox"})
    other.save(tmp_path / "sae", overwrite=True)  # whose latent 3 is another
    assert not load_sae(tmp_path / "sae").names


def test_neuronpedia_is_asked_once_a_latent_and_its_answers_are_kept(tmp_path, monkeypatch):
    asked = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        latent = int(address.rpartition("/")[2])
        explanations = [{"description": LABELS[latent], "scores": []}] if latent in LABELS else []
        return io.BytesIO(
            json.dumps({"modelId": "gemma-2-2b", "index": str(latent), "explanations": explanations}).encode()
        )

    monkeypatch.setattr("urllib.request.urlopen", answer)
    source = "gemma-2-2b/20-gemmascope-res-16k"
    for _ in range(2):
        assert dict(Names.of_neuronpedia(source, [3, 7], cache=tmp_path)) == {3: LABELS[3], 7: LABELS[7]}
    assert asked == [f"https://www.neuronpedia.org/api/feature/{source}/{latent}" for latent in (3, 7)]
    assert dict(Names.of_neuronpedia(source, [4])) == {}
    with pytest.raises(ValueError, match="write MODEL/SOURCE"):
        Names.of_neuronpedia("gemma", [3])

    def fail(address: str, timeout: float) -> io.BytesIO:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(OSError, match=r"gave no answer that can be read \(no route to host\): try later"):
        Names.of_neuronpedia(source, [5])


def test_the_command_gives_names_and_prints_them(tmp_path):
    folder = random_sae("topk").save(tmp_path / "sae")
    (tmp_path / "labels.csv").write_text(FILES["header.csv"])
    run = CliRunner().invoke
    assert "has no names" in run(app, ["sae", "names", str(folder)]).output
    assert "give it some, sparsefeat sae names" in run(app, ["sae", "names", str(folder), "--find", "fox"]).stderr
    done = run(app, ["sae", "names", str(folder), str(tmp_path / "labels.csv")])
    assert done.exit_code == 0
    assert "names of 4 of 37 latents" in done.output
    assert json.loads(run(app, ["sae", "names", str(folder), "--json"]).output) == {
        str(k): v for k, v in LABELS.items()
    }
    assert run(app, ["sae", "names", str(folder), "--find", "canids"]).output.split()[0] == "3"
    given = run(app, ["sae", "names", str(folder), str(tmp_path / "labels.csv"), "--json"])
    assert json.loads(given.stdout) == {str(k): v for k, v in LABELS.items()}
    both = run(app, ["sae", "names", str(folder), str(tmp_path / "labels.csv"), "--find", "canids"])
    assert both.exit_code == 2
    assert "--find is of the names that an SAE has" in both.stderr
    (tmp_path / "labels.csv").write_text("99,far")
    refused = run(app, ["sae", "names", str(folder), str(tmp_path / "labels.csv")])
    assert refused.exit_code == 2
    assert "names latent 99, and the SAE has 37" in refused.stderr
