"""Recordings against dense codes taken from the pipeline by a plain hook."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.features import Record
from sparsefeat.features.record import active_entries, join
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def make_sae(**options):
    torch.manual_seed(1)
    config = {"d_model": 32, "n_latents": 128, "k": 6, "hookpoint": AT, **options}
    return SAE(SAEConfig(**config)).requires_grad_(False).eval()


class Plain:
    """The module's outputs as [batch, positions, d] fp64, one a model run."""

    def __init__(self, module):
        self.rows = []
        self.handle = module.register_forward_hook(
            lambda m, args, out: self.rows.append(out[0].double().flatten(2).transpose(1, 2))
        )


def dense_codes(sae, rows):
    """relu of the k largest pre-activations of every row, in fp64."""
    pre = (rows - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    if sae.config.activation == "relu":
        return pre.relu()
    kept = pre.topk(sae.config.k, -1)
    return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_codes_maps_and_scores_are_those_of_the_rows(pipe, guidance, activation):
    sae = make_sae() if activation == "topk" else make_sae(activation="relu", k=None)
    record, plain = Record(sae), Plain(pipe.unet.up_blocks[1].attentions[1])
    with attach(pipe, record) as run:
        prompts = ["a fox", "a cat"]
        pixels(pipe, prompts, steps=3, guidance_scale=guidance, num_images_per_prompt=2, height=48, width=80)
    plain.handle.remove()
    recording = run[record]
    assert recording.steps == (0, 1, 2)
    assert recording.images == (0, 1, 2, 3)
    assert recording.grid == (6, 10)
    assert [recording.prompt(i) for i in range(4)] == ["a fox", "a fox", "a cat", "a cat"]
    # [steps, images, positions, latents], of the conditional half
    expected = torch.stack([dense_codes(sae, rows[-4:]) for rows in plain.rows])

    torch.testing.assert_close(recording.codes(1, image=2).dense().double(), expected[1, 2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recording.codes(2).dense().double(), expected[2].flatten(0, 1), rtol=1e-4, atol=1e-5)
    latent = int(expected.sum((0, 1, 2)).argmax())
    torch.testing.assert_close(
        recording.map(latent, image=1).double(), expected[:, 1, :, latent].mean(0).view(6, 10), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        recording.map(latent, image=1, step=2).double(), expected[2, 1, :, latent].view(6, 10), rtol=1e-4, atol=1e-5
    )
    scores = expected.mean(2).mean(0)  # [images, latents]: mean over positions and steps
    for image, score in ((None, scores.mean(0)), (3, scores[3])):
        top = recording.top(5, image)
        assert [t.score for t in top] == pytest.approx(score.topk(5).values.tolist(), rel=1e-4)
        assert [t.latent for t in top] == score.topk(5).indices.tolist()
        part = expected if image is None else expected[:, image : image + 1]
        for t in top:
            assert t.maximum == pytest.approx(float(part[..., t.latent].max()), rel=1e-4)
            assert t.frequency == pytest.approx(float((part[..., t.latent] != 0).double().mean()), abs=1e-9)
    assert float(recording.map(top[0].latent, 3).mean()) == pytest.approx(top[0].score, rel=1e-5)
    assert recording.top(2, 0, step=1)[0].score == pytest.approx(float(expected[1, 0].mean(0).max()), rel=1e-4)


def test_the_unconditional_half_is_recorded_when_asked_for(pipe):
    sae = make_sae()
    record, plain = Record(sae, condition="uncond"), Plain(pipe.unet.up_blocks[1].attentions[1])
    with attach(pipe, record) as run:
        pixels(pipe)
    plain.handle.remove()
    expected = dense_codes(sae, plain.rows[1][0])
    torch.testing.assert_close(run[record].codes(1).dense().double(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_spilled_to_disk_reads_as_what_is_in_memory(pipe, tmp_path):
    for sae in (make_sae(), make_sae(activation="relu", k=None)):
        memory, disk = Record(sae), Record(sae, max_bytes=3000, store=tmp_path / sae.config.activation)
        with attach(pipe, memory, disk) as run:
            pixels(pipe, ["a fox", "a cat"], steps=3)
            pixels(pipe, "a cat")
        for i, folder in ((0, "call-0000"), (1, "call-0001")):
            kept, spilled = run.calls[i][memory], run.calls[i][disk]
            assert any(str(place[0]).endswith(folder) for place in spilled._stored.values())
            assert spilled.nbytes <= 3000
            assert spilled.top(7) == kept.top(7)
            latent = kept.top(1)[0].latent
            assert torch.equal(spilled.map(latent), kept.map(latent))
            for step in kept.steps:
                assert torch.equal(spilled.codes(step).dense(), kept.codes(step).dense())


def test_without_a_store_the_limit_stops_the_call_and_says_what_to_do(pipe):
    record = Record(make_sae(), max_bytes=1000)
    before = pixels(pipe)
    with attach(pipe, record), pytest.raises(MemoryError, match=r"max_bytes=1000; pass store=<folder>"):
        pixels(pipe)
    assert (pixels(pipe) == before).all()


def test_sums_alone_give_the_same_scores_and_no_maps(pipe):
    sae = make_sae()
    full, sums = Record(sae), Record(sae, positions=False)
    with attach(pipe, full, sums) as run:
        pixels(pipe, ["a fox", "a cat"], steps=3)
    assert run[sums].top(9) == run[full].top(9)
    assert run[sums].top(3, image=1, step=2) == run[full].top(3, image=1, step=2)
    with pytest.raises(ValueError, match=r"\.map\(\) needs; record with Record\(positions=True\)"):
        run[sums].map(3)


def test_t8_steps_are_the_schedulers_in_every_call_and_with_every_scheduler():
    sae = make_sae()
    for scheduler in ("ddim", "heun", "pndm"):  # a Heun step runs the model twice
        record, pipe = Record(sae), tiny_sd(scheduler)
        with attach(pipe, record) as run:
            pixels(pipe, steps=3)
            pixels(pipe, steps=4)
        assert run.calls[0][record].steps == (0, 1, 2)
        assert run.calls[1][record].steps == (0, 1, 2, 3)


def test_a_text_encoder_is_recorded_before_the_schedule(pipe):
    sae = make_sae(hookpoint=None)
    record = Record(sae, at="text_encoder.text_model.encoder.layers.1")
    with attach(pipe, record) as run:
        pixels(pipe, ["a fox", "a cat"])
    recording = run[record]
    assert recording.steps == (None,)
    assert recording.grid is None
    assert recording.map(recording.top(1)[0].latent, image=1).shape == (16,)


def test_recording_does_not_change_the_image(pipe):
    before = pixels(pipe)
    with attach(pipe, Record(make_sae())):
        assert (pixels(pipe) == before).all()


def test_errors_name_the_mistake(pipe):
    with pytest.raises(ValueError, match=r"does not know its hookpoint; name one"):
        Record(make_sae(hookpoint=None))
    record = Record(make_sae())
    with attach(pipe, record) as run:
        pixels(pipe)
    with pytest.raises(ValueError, match=r"latent=128 is out of range; this SAE has 128 latents"):
        run[record].map(128)
    with pytest.raises(ValueError, match=r"image=1 was not recorded; there are \[0\]"):
        run[record].map(3, image=1)
    with pytest.raises(ValueError, match=r"step=5 was not recorded; there are \[0, 1\]"):
        run[record].codes(5)


def test_a_condition_that_no_row_has_is_refused():
    with pytest.raises(ValueError, match=r"condition='positive' is not known; use one of 'cond', 'uncond'"):
        Record(SAE(SAEConfig(d_model=8, n_latents=16, k=2)), at="unet.mid_block", condition="positive")


def test_joined_codes_of_both_forms_are_their_rows_in_order():
    topk, relu = make_sae(), make_sae(activation="relu", k=None)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    parts = [topk.encode(x[:3]), relu.encode(x[3:])]
    joined = join(parts)
    assert torch.equal(joined.dense(), torch.cat([part.dense() for part in parts]))
    row, latent, value = active_entries(joined)
    assert torch.equal(joined.dense()[row, latent.long()], value)


# Many calls in one session


def test_recordings_of_many_calls_are_held_within_max_bytes_and_the_last_is_whole(pipe):
    one = Record(make_sae())
    with attach(pipe, one) as run:
        pixels(pipe, steps=3)
    size = run[one].nbytes
    record = Record(make_sae(), max_bytes=int(2.5 * size))
    with attach(pipe, record) as run:
        pixels(pipe, steps=3)
        pixels(pipe, steps=3)
        with pytest.warns(UserWarning, match=r"Record let the codes of an earlier call go"):
            pixels(pipe, steps=3)
        pixels(pipe, steps=3)
        pixels(pipe, steps=3)
    held = [call[record].nbytes for call in run.calls]
    assert sum(held) <= record.max_bytes
    assert held == [0, 0, 0, size, size]
    assert run[record].top(3) == run.calls[3][record].top(3)
    with pytest.raises(ValueError, match=r"were let go for those of later ones, as max_bytes="):
        run.calls[0][record].top(3)


def test_recordings_that_nobody_keeps_count_nothing(pipe, recwarn):
    sae = make_sae()
    with attach(pipe, one := Record(sae)) as run:
        pixels(pipe, steps=3)
    record = Record(sae, max_bytes=int(1.5 * run[one].nbytes))
    for _ in range(3):
        run = None
        with attach(pipe, record) as run:
            pixels(pipe, steps=3)
    assert not [w for w in recwarn if "let the codes" in str(w.message)]
    assert run[record].nbytes > 0


def test_with_a_store_earlier_calls_go_to_disk_and_stay_readable(pipe, tmp_path):
    sae = make_sae()
    with attach(pipe, one := Record(sae)) as run:
        pixels(pipe, steps=3)
    size, top = run[one].nbytes, run[one].top(5)
    record = Record(sae, max_bytes=int(1.5 * size), store=tmp_path)
    with attach(pipe, record) as run:
        for _ in range(3):
            pixels(pipe, steps=3)
    assert sum(call[record].nbytes for call in run.calls) <= record.max_bytes
    assert [call[record].top(5) for call in run.calls] == [top] * 3


def test_of_several_runs_before_the_scheduler_steps_the_last_is_recorded(pipe):
    sae = make_sae()
    record, watch = Record(sae), Watch(str(sae.config.hookpoint))
    with attach(pipe, record, watch) as run, run.call("a fox"), torch.no_grad():
        text = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
        pipe.scheduler.set_timesteps(2)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps:
            for _ in range(3):  # refinements of the latent, as in guidance by gradients
                latents = latents + 0.1
                noise = pipe.unet(latents, t, text).sample
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    for step in (0, 1):
        assert torch.equal(run[record].codes(step).dense(), sae.encode(watch.rows[3 * step + 2]).dense())


def test_a_loop_that_runs_again_for_the_same_image_goes_on_counting(pipe):
    record = Record(make_sae())
    with attach(pipe, record) as run, run.call("a fox"), torch.no_grad():
        text = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
        for _ in range(2):
            pipe.scheduler.set_timesteps(2)
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            for t in pipe.scheduler.timesteps:
                latents = pipe.scheduler.step(pipe.unet(latents, t, text).sample, t, latents).prev_sample
    assert run[record].steps == (0, 1, 2, 3)
    assert torch.equal(run[record].codes(0).dense(), run[record].codes(2).dense())


def test_the_scores_are_a_table_of_images_and_latents(pipe):
    sae = make_sae()
    with attach(pipe, record := Record(sae)) as run:
        for prompts in (["a fox", "a cat"], ["an owl"]):
            pixels(pipe, prompts, steps=2)
    table = torch.cat([call[record].scores() for call in run.calls])
    assert table.shape == (3, 128)
    assert table.dtype == torch.float32
    for row, (call, image) in zip(table, ((0, 0), (0, 1), (1, 0)), strict=True):
        means = run.calls[call][record].maps(range(128), image).mean((1, 2))
        torch.testing.assert_close(row, means)
    assert str(run[record]) == "Recording(1 images, 2 steps, 8 x 8, 128 latents)"
    assert str(run) == "Session(Record; 2 calls, closed)"


def test_a_line_of_the_list_is_no_number_of_a_latent(pipe):
    with attach(pipe, record := Record(make_sae())) as run:
        pixels(pipe, "a fox", steps=1)
    found = run[record].top(1)[0]
    for ask in (run[record].map, run[record].heat):
        with pytest.raises(
            ValueError, match=rf"latent is TopLatent\(latent={found.latent}, …\), a line of a list; give its"
        ):
            ask(found)
