"""Collected rows are the pipeline's own, the right ones, and survive a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.pipeline import Hookpoint, attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import CollectActivations, SAETrainer, TrainConfig
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.up_blocks.1.attentions.1"
MIDDLE = "unet.mid_block.attentions.0:diff"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


def outputs(pipe: Any, **call: Any) -> list[torch.Tensor]:
    """What BLOCK gave at every step, by a hook of our own: `[batch, positions, channels]`."""
    seen: list[torch.Tensor] = []
    module = pipe.unet.up_blocks[1].attentions[1]

    def keep(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0].movedim(1, -1).flatten(1, 2).detach().clone())

    handle = module.register_forward_hook(keep)
    try:
        pixels(pipe, **call)
    finally:
        handle.remove()
    return seen


def collect(
    pipe: Any, *hookpoints: str, calls: tuple[dict[str, Any], ...] = ({},), **options: Any
) -> CollectActivations:
    with CollectActivations(*hookpoints, **options) as collector, attach(pipe, collector):
        for call in calls:
            pixels(pipe, **call)
    return collector


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_rows_are_those_of_the_conditional_half_at_every_step(pipe, guidance):
    call = {"prompt": ["a fox", "a cat"], "guidance_scale": guidance, "steps": 3}
    kept = collect(pipe, BLOCK, calls=(call,), dtype=torch.float32).collected()
    expected = torch.stack(
        [seen[-2:] for seen in outputs(pipe, **call)]
    )  # uncond comes first; [step, image, position, d]
    steps, images, positions, d_model = expected.shape
    assert kept.rows.shape == (steps * images * positions, d_model)
    assert torch.equal(expected[kept.step, kept.image, kept.position], kept.rows)
    assert len(set(zip(kept.step.tolist(), kept.image.tolist(), kept.position.tolist(), strict=True))) == len(kept.rows)


def test_condition_none_keeps_both_halves(pipe):
    kept = collect(pipe, BLOCK, condition=None, dtype=torch.float32).collected()
    half = collect(pipe, BLOCK, dtype=torch.float32).collected()
    assert len(kept.rows) == 2 * len(half.rows)


def test_images_are_numbered_over_calls_and_images_per_prompt(pipe):
    calls = ({"prompt": ["a fox", "a cat"], "num_images_per_prompt": 2}, {"prompt": "a fox"})
    collector = collect(pipe, BLOCK, calls=calls, rows_per_image=5)
    kept = collector.collected()
    assert kept.image.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.bincount(kept.image).tolist() == [10] * 5  # 2 steps
    assert collector.images_done == 5
    assert kept.rows.dtype == torch.float16


def test_the_draw_of_rows_depends_on_seed_image_and_step_but_not_on_the_batch(pipe):
    together = collect(pipe, BLOCK, calls=({"prompt": ["a fox", "a cat"]},), rows_per_image=6).collected()
    apart = collect(pipe, BLOCK, calls=({"prompt": "a fox"}, {"prompt": "a cat"}), rows_per_image=6).collected()

    def places(kept: Any) -> set[tuple[int, int, int]]:
        return set(zip(kept.image.tolist(), kept.step.tolist(), kept.position.tolist(), strict=True))

    assert places(together) == places(apart)
    assert len(places(together)) == 24
    assert places(collect(pipe, BLOCK, rows_per_image=6, seed=1).collected()) != places(
        collect(pipe, BLOCK, rows_per_image=6).collected()
    )
    assert {p[2] for p in places(together) if p[:2] == (0, 0)} != {p[2] for p in places(together) if p[:2] == (0, 1)}


def test_several_hookpoints_have_rows_and_stores_of_their_own(pipe, tmp_path):
    collector = collect(pipe, BLOCK, MIDDLE, folder=tmp_path, dtype=torch.float32)
    memory = collect(pipe, BLOCK, MIDDLE, dtype=torch.float32)
    for hookpoint in (BLOCK, Hookpoint.parse(MIDDLE)):
        stored = collector.reader(hookpoint)
        assert torch.equal(stored.rows(range(len(stored)))["rows"], memory.collected(hookpoint).rows)
    assert collector.reader(BLOCK).metadata["hookpoint"] == BLOCK
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "unet.mid_block.attentions.0-diff-image",
        "unet.up_blocks.1.attentions.1-output-image",
    ]


def test_a_text_encoder_has_rows_outside_the_steps(pipe):
    kept = collect(pipe, "text_encoder.text_model.encoder.layers.1").collected()
    assert kept.step.unique().tolist() == [-1]
    assert len(kept.rows) == 16


def test_an_interrupted_call_leaves_nothing_and_the_image_is_unchanged(pipe):
    collector = CollectActivations(BLOCK, rows_per_image=3)
    with attach(pipe, collector):

        def stop(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pixels(pipe, callback_on_step_end=stop)
        assert collector.images_done == 0
        image = pixels(pipe)
    assert (image == pixels(pipe)).all()
    assert collector.images_done == 1
    assert len(collector.collected().rows) == 6


def test_a_killed_collection_goes_on_without_loss_or_repeat(pipe, tmp_path):
    prompts = ["a fox", "a cat", "a fox cat", "cats", "foxes"]
    calls = tuple({"prompt": prompt} for prompt in prompts)
    options = {"rows_per_image": 8, "dtype": torch.float32}
    whole = collect(pipe, BLOCK, MIDDLE, calls=calls, folder=tmp_path / "whole", **options)

    options |= {"folder": tmp_path / "killed", "shard_rows": 32}  # a shard every two images
    first = CollectActivations(BLOCK, MIDDLE, **options)
    with attach(pipe, first):
        for call in calls[:3]:
            pixels(pipe, **call)
    for writer in first._writers.values():
        writer._lock.release()  # gone, without a flush: the third image is lost
    # And of one hookpoint even the shard before it.
    next(Path(tmp_path / "killed").glob("unet.mid*/w*.safetensors")).unlink()
    again = CollectActivations(BLOCK, MIDDLE, **options)
    assert again.images_done == 0
    with again, attach(pipe, again):
        for call in calls[again.images_done :]:
            pixels(pipe, **call)
    for hookpoint in (BLOCK, MIDDLE):
        one, other = whole.reader(hookpoint), again.reader(hookpoint)
        one_rows, other_rows = one.rows(range(len(one))), other.rows(range(len(other)))
        for name, tensor in one_rows.items():
            assert torch.equal(other_rows[name], tensor), (hookpoint, name)


def test_collected_rows_train_an_sae_from_memory_and_store(pipe, tmp_path):
    config = TrainConfig(steps=3, batch_size=32)
    SAETrainer(SAE(SAEConfig(32, 64, k=4)), collect(pipe, BLOCK).collected().rows, config).fit(progress=False)
    SAETrainer(SAE(SAEConfig(32, 64, k=4)), collect(pipe, BLOCK, folder=tmp_path).reader(), config).fit(progress=False)


def test_what_users_get_wrong_is_said(pipe, tmp_path):
    with pytest.raises(ValueError, match="hookpoints is empty"):
        CollectActivations()
    with pytest.raises(ValueError, match="rows_per_image=0 must be a whole number of at least 1"):
        CollectActivations(BLOCK, rows_per_image=0)
    with pytest.raises(ValueError, match=r"dtype is torch\.int32"):
        CollectActivations(BLOCK, dtype=torch.int32)
    collector = CollectActivations(BLOCK, MIDDLE)
    with pytest.raises(ValueError, match="choose one of"):
        collector.collected()
    with pytest.raises(ValueError, match="attach this instrument and call the pipeline first"):
        collector.collected(BLOCK)
    with pytest.raises(ValueError, match=r"use collected\(\)"):
        collector.reader(BLOCK)
    with pytest.raises(ValueError, match=r"use reader\(\)"):
        CollectActivations(BLOCK, folder=tmp_path).collected()
    with pytest.raises(MemoryError, match="pass folder="):
        collect(pipe, BLOCK, max_bytes=1000)
    collect(pipe, BLOCK, folder=tmp_path, rows_per_image=4)
    with pytest.raises(ValueError, match="store with other metadata"):
        CollectActivations(BLOCK, folder=tmp_path, rows_per_image=5)


def test_activations_too_large_for_the_dtype_are_said():
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.up_blocks[1].attentions[1].proj_out.weight *= 1e12
    with pytest.raises(OverflowError, match=r"pass dtype=torch\.float32"):
        collect(pipe, BLOCK)
