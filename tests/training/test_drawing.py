"""Collected stores are the same whoever made them, however often it was killed, and say what their rows are of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.inputs import Inputs, read_images, read_prompts
from sparsefeat.pipeline.context import CONDITIONS
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.store import ShardReader
from sparsefeat.training import PipelineRows, SAETrainer, StoreRows, TrainConfig
from sparsefeat.training.activations import drawing
from sparsefeat.training.activations.drawing import PART_IMAGES, Drawing, collect_activations
from sparsefeat.training.ranks import Ranks
from tests import killing
from tests.tiny import tiny_sd

BLOCK = "unet.up_blocks.1.attentions.1"
MIDDLE = "unet.mid_block.attentions.0:diff"
PROMPTS = tuple(f"a {animal} {i}" for i in range(15) for animal in ("fox", "cat", "owl", "dog", "bee"))
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


def collect(pipe: Any, folder: Path, *hookpoints: str, prompts: Any = PROMPTS, call: Any = CALL, **options: Any) -> Any:
    drawn = Drawing(pipe, Inputs(prompts), batch_size=options.pop("batch_size", 8), call=call)
    return collect_activations(drawn, hookpoints or (BLOCK,), folder, **{"rows_per_image": 4, **options})


def contents(folder: Path) -> dict[str, str]:
    """Every file but locks, by its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_rows_say_their_prompt_step_timestep_position_and_condition(pipe, tmp_path):
    (reader,) = collect(pipe, tmp_path, prompts=PROMPTS[:3], condition="both").values()
    rows = reader.rows(range(len(reader)))
    assert (tmp_path / "prompts.txt").read_text().splitlines() == list(PROMPTS[:3])
    labels = {name: set(rows[name].tolist()) for name in ("image", "step", "condition")}
    both = {CONDITIONS.index(name) for name in ("cond", "uncond")}
    assert labels == {"image": {0, 1, 2}, "step": {0, 1}, "condition": both}
    pipe.scheduler.set_timesteps(2)
    assert torch.equal(rows["timestep"], pipe.scheduler.timesteps[rows["step"]].float())
    assert len(reader) == 3 * 2 * 2 * 4
    assert reader.metadata["call"] == CALL


def test_each_step_has_other_positions_until_all_had_their_turn(pipe, tmp_path):
    (reader,) = collect(pipe, tmp_path, prompts=PROMPTS[:2], rows_per_image=2).values()
    rows = reader.rows(range(len(reader)))
    for image in range(2):
        by_step = [set(rows["position"][(rows["image"] == image) & (rows["step"] == s)].tolist()) for s in range(2)]
        assert not by_step[0] & by_step[1]
        assert by_step[0] | by_step[1] == set(range(4))


def test_so_many_steps_of_every_image_are_drawn_and_not_the_same_ones(pipe, tmp_path):
    call = {**CALL, "num_inference_steps": 4}
    (reader,) = collect(pipe, tmp_path, prompts=PROMPTS[:6], call=call, steps_per_image=1).values()
    rows = reader.rows(range(len(reader)))
    steps = [set(rows["step"][rows["image"] == image].tolist()) for image in range(6)]
    assert all(len(step) == 1 for step in steps)
    assert len(set.union(*steps)) > 1


def test_ranks_in_any_number_and_order_write_what_one_writes(pipe, tmp_path):
    assert len(PROMPTS) > PART_IMAGES
    collect(pipe, tmp_path / "one", BLOCK, MIDDLE)
    assert collect(pipe, tmp_path / "two", BLOCK, MIDDLE, ranks=Ranks(3, 4)) == {}  # there are two parts
    collect(pipe, tmp_path / "two", BLOCK, MIDDLE, ranks=Ranks(1, 2))
    collect(pipe, tmp_path / "two", BLOCK, MIDDLE, ranks=Ranks(0, 3))
    collect(pipe, tmp_path / "two", BLOCK, MIDDLE)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_file_that_is_no_image_is_named(pipe, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("not a picture")
    drawing = Drawing(pipe, read_images(tmp_path / "photos"), 1, call={"num_inference_steps": 2})
    with pytest.raises(OSError, match=r"a\.png cannot be read as an image .*: mend it, or take it away"):
        collect_activations(drawing, ["unet.mid_block.attentions.0"], tmp_path / "rows")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_prompts_are_of_a_file_and_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is a pipe or a device: write one prompt a line into a \.txt file"):
        read_prompts(tmp_path / "pipe")


def test_captions_are_utf_8_with_a_mark_or_without_and_anything_else_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("ein Bär\n", encoding="utf-8-sig")
    assert read_images(tmp_path).prompts == ("ein Bär",)
    for name, content in (("a.txt", "ein Bär"), ("metadata.csv", "file_name,text\na.png,ein Bär\n")):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(
            ValueError, match=rf"{re.escape(name)} is not text in UTF-8 \(.* at byte \d+\): save it as that"
        ):
            read_images(tmp_path)


def test_images_are_noised_to_a_step_and_seen_once(pipe, tmp_path):
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "a fox"}\n')
    (tmp_path / "3.txt").write_text("an owl\n")
    inputs = read_images(tmp_path)
    assert inputs.prompts == ("", "", "a fox", "an owl")
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}
    drawn = Drawing(pipe, inputs, batch_size=1, call=call)
    (reader,) = collect_activations(drawn, [BLOCK], tmp_path / "store", rows_per_image=3).values()
    rows = reader.rows(range(len(reader)))
    assert torch.bincount(rows["image"]).tolist() == [3] * 4
    pipe.scheduler.set_timesteps(4)
    # Four images a batch each, four steps: every step once, each image at one of them.
    assert sorted(rows["timestep"].unique().tolist()) == sorted(pipe.scheduler.timesteps.float().tolist())


FEED_FORWARD = "unet.up_blocks.1.attentions.1.transformer_blocks.0.ff"


def test_a_modules_input_and_output_are_kept_at_the_same_positions_and_train_a_transcoder(pipe, tmp_path):
    collected = collect(pipe, tmp_path, f"{FEED_FORWARD}:input", FEED_FORWARD, prompts=PROMPTS[:9], dtype=torch.float32)
    given, made = collected.values()
    module = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].ff
    for rows, target in ((given.rows(range(len(given))), made.rows(range(len(made)))),):
        for name in ("image", "step", "position", "condition"):
            assert torch.equal(rows[name], target[name])
        with torch.no_grad():
            torch.testing.assert_close(module(rows["rows"]), target["rows"], rtol=1e-4, atol=1e-5)
    width = given.schema["rows"].shape[0]
    config = TrainConfig(steps=60, batch_size=32, lr=1e-2)
    skipping = SAEConfig(width, 64, k=4, transcoder=True, skip=True)
    stored = SAETrainer(SAE(skipping), StoreRows(given, target=made), config)
    drawn = Drawing(pipe, Inputs(PROMPTS[:9]), 8, call=CALL)
    live = PipelineRows(drawn, [f"{FEED_FORWARD}:input"], 8, rows_per_image=4, targets=[FEED_FORWARD])
    for trainer in (stored, SAETrainer(SAE(skipping), live, config)):
        trainer.fit(progress=False)
        assert trainer.log[-1]["fvu"] < 1
    with pytest.raises(ValueError, match=r"has other rows than .*: collect a module's input and output in one run"):
        StoreRows(given, target=next(iter(collect(pipe, tmp_path / "b", MIDDLE, prompts=PROMPTS[:9]).values())))


def test_a_condition_that_no_row_has_is_said(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"condition='uncond' has no rows at .*turn guidance on"):
        collect(pipe, tmp_path, call={**CALL, "guidance_scale": 1.0}, prompts=PROMPTS[:2], condition="uncond")


def test_other_settings_in_the_same_folder_are_refused_by_name_and_the_rows_stay(pipe, tmp_path):
    collect(pipe, tmp_path, prompts=PROMPTS[:3])
    before = contents(tmp_path)
    for change, said in (
        ({"rows_per_image": 5}, "rows_per_image 4, not 5"),
        ({"prompts": PROMPTS[:4]}, "images 3, not 4"),
        ({"dtype": torch.float32}, "float16"),
    ):
        with pytest.raises(ValueError, match=rf"store with other .*{said}.*choose a new folder"):
            collect(pipe, tmp_path, **{"prompts": PROMPTS[:3], **change})
    assert contents(tmp_path) == before


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_truncated_shard_one_of_another_run_and_a_newer_manifest_are_each_named(pipe, tmp_path):
    (reader,) = collect(pipe, tmp_path / "a", prompts=PROMPTS[:3]).values()
    (other,) = collect(pipe, tmp_path / "b", prompts=PROMPTS[3:6]).values()
    strange = reader.folder / "w0007-000000-24.safetensors"
    strange.write_bytes(other.shards[0].path.read_bytes())
    with pytest.raises(
        ValueError, match=r"w0007-000000-24\.safetensors belongs to another store.*: remove it from here"
    ):
        ShardReader(reader.folder).check()
    strange.unlink()
    whole = reader.shards[0].path.read_bytes()
    reader.shards[0].path.write_bytes(whole[:-100])
    with pytest.raises(OSError, match=r"w0000-000000-24\.safetensors cannot be read .*: copy it again, or remove it"):
        ShardReader(reader.folder).check()
    with pytest.raises(
        OSError, match=r"w0000-000000-24\.safetensors cannot be read .*: remove it, the run goes on before"
    ):
        collect(pipe, tmp_path / "a", prompts=PROMPTS[:3])
    reader.shards[0].path.unlink()  # as it says
    collect(pipe, tmp_path / "a", prompts=PROMPTS[:3])
    assert reader.shards[0].path.read_bytes() == whole
    manifest = reader.folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    with pytest.raises(
        ValueError, match=r"is of version 2 of sparsefeat\.store, of which this .* version 1: upgrade it"
    ):
        ShardReader(reader.folder)


# Killed ---------------------------------------------------------------------------------------------------------------


def collect_in_parts(folder: Path) -> None:
    drawing.PART_IMAGES = 8
    collect(tiny_sd(), folder, BLOCK, MIDDLE, batch_size=2)


def test_collection_killed_ten_times_at_random_moments_is_that_of_an_undisturbed_run(tmp_path):
    seconds = killing.run(collect_in_parts, tmp_path / "whole")
    assert killing.killed(20, seconds * 0.25, collect_in_parts, tmp_path / "killed") > 8
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_every_kind_of_file(tmp_path):
    wanted = ("a fox", 'a "red" owl', "ein Bär")
    (tmp_path / "p.txt").write_text('a fox\n\n  a "red" owl \nein Bär', encoding="utf-8-sig")
    (tmp_path / "p.csv").write_text('id,caption\n1,a fox\n2,"a ""red"" owl"\n3,\n4,ein Bär\n')
    (tmp_path / "p.tsv").write_text('text\tid\na fox\t1\n"a ""red"" owl"\t2\nein Bär\t3\n')
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"n": 1, "prompt": text}) + "\n" for text in wanted))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(text) + "\n" for text in wanted))
    for name in ("p.txt", "p.csv", "p.tsv", "p.jsonl", "q.jsonl"):
        assert read_prompts(tmp_path / name).prompts == wanted, name
    assert read_prompts(tmp_path / "p.csv", limit=2).prompts == wanted[:2]
    assert read_prompts(tmp_path / "p.csv", column="id").prompts == ("1", "2", "3", "4")


def test_prompts_are_read_from_parquet_and_from_data_sets(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"caption": ["a fox", None, "an owl"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet").prompts == ("a fox", "an owl")
    with pytest.raises(ValueError, match=r"column='n' of .* holds int, not text"):
        read_prompts(tmp_path / "p.parquet", column="n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not Parquet"):
        read_prompts(tmp_path / "broken.parquet")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a fox", "an owl"]}).save_to_disk(str(tmp_path / "saved"))
    assert read_prompts(tmp_path / "saved").prompts == ("a fox", "an owl")


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("p.txt", b"", {}, "has no prompt in it: write at least one"),
        ("p.txt", b"\xff\xfe\x00", {}, "is not text in UTF-8"),
        ("p.txt", b"a fox", {"column": "x"}, "has lines of text: leave it out"),
        ("p.txt", b"a fox", {"split": "train"}, "is of a data set and .* is a file: leave it out"),
        ("p.csv", b"", {}, "has no prompt in it"),
        ("p.csv", b"id,who\n1,a", {}, "which has none of prompt, caption.* but id, who"),
        ("p.csv", b"id,who\n1,a", {"column": "x"}, "which has no 'x' but id, who"),
        ("p.jsonl", b'{"prompt": "a"}\n{"pro', {}, "line 2 of .* is not JSON"),
        ("p.jsonl", b'{"prompt": 3}\n', {}, "entry 1 of .* has no text for a prompt"),
        ("p.yaml", b"a: b", {}, "is none of .txt, .csv"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_said(tmp_path, name, content, options, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name, **options)
