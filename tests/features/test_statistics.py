"""Streaming statistics against a dense re-derivation."""

from __future__ import annotations

import copy

import pytest
import torch
from sparsefeat_kernels import SparseCode

from sparsefeat.erasure import Erase, clamp_latents
from sparsefeat.erasure.posterior_attenuation import Histograms
from sparsefeat.features import CollectStatistics, Record, Statistics, collect_statistics
from sparsefeat.features import folders as folders_module
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
N = 37


def random_code(rows, seed, csr=False, signed=False, k=5):
    """A code with paddings of value 0, and the dense fp64 tensor that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(N, generator=generator)[:k] for _ in range(rows)]).int()
    values = torch.randn(rows, k, generator=generator)
    values = values if signed else values.relu()
    dense = torch.zeros(rows, N, dtype=torch.float64).scatter_(1, indices.long(), values.double())
    if not csr:
        return SparseCode(values, indices, N), dense
    active = values != 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    return SparseCode(values[active], indices[active], N, offsets), dense


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=128, k=6, hookpoint=AT)).requires_grad_(False).eval()


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_every_number_is_that_of_the_dense_codes(csr, signed):
    statistics, seen = Statistics(["a", "b", "c"], N), {}
    for seed, timestep in enumerate((981.0, 1.0, 981.0)):
        code, dense = random_code(29, seed, csr, signed)
        concept = torch.randint(-1, 2, (29,), generator=torch.Generator().manual_seed(seed))
        statistics.add(code, concept, timestep)
        for c in range(2):
            seen.setdefault((c, timestep), []).append(dense[concept == c])
    for names, timestep in (("a", 981.0), ("b", 1.0), (("a", "b"), None), (("a", "c"), 981.0)):
        numbers = [statistics.concepts.index(name) for name in names]
        rows = torch.cat([r for (c, t), parts in seen.items() for r in parts if c in numbers and timestep in (None, t)])
        active = (rows != 0).sum(0)
        assert statistics.rows(names, timestep) == len(rows)
        torch.testing.assert_close(statistics.mean(names, timestep), rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            statistics.mean_active(names, timestep), rows.sum(0) / active.clamp(min=1), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(statistics.frequency(names, timestep), active.double() / len(rows))
        largest = rows.masked_fill(rows == 0, -torch.inf).amax(0)
        torch.testing.assert_close(
            statistics.maximum(names, timestep).double(), largest.masked_fill(active == 0, 0), rtol=0, atol=0
        )
    assert statistics.rows("c") == 0
    assert not statistics.mean("c").any()


def test_t10_the_mean_over_all_positions_and_over_active_ones_differ_by_the_firing_rate():
    statistics = Statistics(["a"], N)
    statistics.add(random_code(50, 3)[0], torch.zeros(50, dtype=torch.int64), 5)
    rate = statistics.frequency("a")
    assert 0 < float(rate.mean()) < 0.5
    torch.testing.assert_close(statistics.mean("a"), statistics.mean_active("a") * rate)


def test_t1_a_padding_entry_is_no_activation_wherever_it_points():
    values = torch.tensor([[2.0, 0.0, 0.0]])
    counts = []
    for padding in ([7, 0, 0], [7, 1, 5]):  # ReLU before the selection leaves other fillers than ReLU after it
        statistics = Statistics(["a"], N)
        statistics.add(SparseCode(values, torch.tensor([padding]).int(), N), torch.zeros(1, dtype=torch.int64), 0)
        counts.append(statistics.count("a"))
    assert torch.equal(counts[0], counts[1])
    assert counts[0].nonzero()[:, 0].tolist() == [7]


def test_t11_half_precision_codes_are_summed_in_fp32():
    statistics = Statistics(["a"], N)
    values, indices = torch.full((5000, 1), 3.0, dtype=torch.float16), torch.zeros(5000, 1, dtype=torch.int32)
    for _ in range(3):
        statistics.add(SparseCode(values, indices, N), torch.zeros(5000, dtype=torch.int64), 0)
    assert float(statistics.total("a")[0]) == 45000  # a half sum would stop growing at 8192


def test_merging_is_the_same_as_seeing_everything():
    one, first, second = Statistics(["a", "b"], N), Statistics(["a"], N), Statistics(["b", "a"], N)
    for seed, timestep, concept, part in ((0, 10.0, "a", first), (1, 20.0, "b", second), (2, 10.0, "a", second)):
        code, _ = random_code(11, seed, signed=True)
        for statistics in (one, part):
            statistics.add(code, torch.full((11,), statistics.concepts.index(concept)), timestep)
    merged = first.merge(second)
    assert merged.concepts == ("a", "b")
    assert merged.timesteps == one.timesteps == (10.0, 20.0)
    for concept in ("a", "b"):
        for timestep in (10.0, 20.0, None):
            assert merged.rows(concept, timestep) == one.rows(concept, timestep)
            assert torch.equal(merged.count(concept, timestep), one.count(concept, timestep))
            assert torch.equal(merged.maximum(concept, timestep), one.maximum(concept, timestep))
            torch.testing.assert_close(merged.total(concept, timestep), one.total(concept, timestep))


def test_a_timestep_is_found_by_the_nearest_so_that_step_counts_may_differ():
    statistics = Statistics(["a"], N, timesteps=[1, 501, 981])
    assert [statistics.nearest(t) for t in (0, 250, 251, 252, 999)] == [1, 1, 1, 501, 981]
    with pytest.raises(ValueError, match="empty"):
        Statistics(["a"], N).nearest(3)


def test_the_footprint_is_said_before_it_is_allocated(capsys):
    statistics = Statistics(["a", "b"], 20480, timesteps=range(3))
    said = capsys.readouterr().err
    assert said.startswith("Statistics: 2 concepts x 3 timesteps x 20480 latents take 1.4 MiB.")
    held = sum(t.nbytes for b in statistics._blocks.values() for t in (b.total, b.count, b.maximum, b.rows))
    assert statistics.footprint() == held


def test_saved_statistics_come_back_and_a_killed_save_leaves_the_old_ones(tmp_path, monkeypatch):
    statistics = Statistics(["a", "b"], N)
    statistics.add(random_code(11, 0)[0], torch.zeros(11, dtype=torch.int64), 7.5)
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert (loaded.concepts, loaded.timesteps, loaded.n_latents) == (("a", "b"), (7.5,), N)
    for name in ("total", "count", "maximum", "mean_active"):
        assert torch.equal(getattr(loaded, name)("a"), getattr(statistics, name)("a"))

    replace = folders_module.os.replace

    def killed(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    statistics.add(random_code(11, 1)[0], torch.zeros(11, dtype=torch.int64), 9)
    monkeypatch.setattr(folders_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        statistics.save(tmp_path)
    monkeypatch.undo()
    assert Statistics.load(tmp_path).timesteps == (7.5,)
    statistics.save(tmp_path)
    assert Statistics.load(tmp_path).timesteps == (7.5, 9.0)
    assert len(list(tmp_path.iterdir())) == 2  # nothing left over


def test_statistics_of_another_sae_with_as_many_latents_are_refused(pipe, sae, tmp_path):
    other = SAE(sae.config).requires_grad_(False).eval()
    statistics = Statistics(["fox", "cat"], sae.n_latents)
    with attach(pipe, CollectStatistics(sae, statistics, ["fox", "cat"])):
        pixels(pipe, ["a fox", "a cat"], steps=1)
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.decoder == statistics.decoder != ()
    theirs = Statistics(["fox", "cat"], sae.n_latents)
    with attach(pipe, CollectStatistics(other, theirs, ["fox", "cat"])):
        pixels(pipe, ["a fox", "a cat"], steps=1)
    for use in (CollectStatistics, Erase.from_statistics, clamp_latents):
        with pytest.raises(ValueError, match="statistics are of another SAE with as many latents"):
            use(other, loaded, "fox" if use is not CollectStatistics else ["fox"])
    with pytest.raises(ValueError, match="only statistics of one SAE are counted together"):
        loaded.merge(theirs)
    with pytest.raises(FileExistsError, match="of other concepts or another SAE"):
        theirs.save(tmp_path)
    # In another precision it is the same SAE; of statistics that were counted by hand it is not known.
    for dtype in (torch.float16, torch.bfloat16):
        CollectStatistics(copy.deepcopy(sae).to(dtype), loaded, ["fox"])
    assert loaded.merge(Statistics(["dog"], sae.n_latents)).decoder == loaded.decoder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, tensors: config.pop("concepts"), "'concepts'"),
        (lambda config, tensors: config.update(timesteps=[]), "0.count more than its timesteps"),
        (lambda config, tensors: config.update(timesteps=["x"]), "timestep='x'"),
        (
            lambda config, tensors: config.update(n_latents=N + 1),
            rf"total is \[2, {N}\] of torch.float32, not \[2, {N + 1}\]",
        ),
        (lambda config, tensors: tensors.pop("0.rows"), "'0.rows'"),
        (lambda config, tensors: tensors.update({"0.rows": tensors["0.rows"][:1]}), r"rows is \[1\]"),
        (lambda config, tensors: tensors.update({"0.total": tensors["0.total"] * torch.nan}), "total holds NaN"),
        (lambda config, tensors: tensors.update({"0.count": -1 - tensors["0.count"]}), "counted less than 0 times"),
    ],
)
def test_damaged_statistics_are_one_sentence(tmp_path, change, said):
    statistics = Statistics(["a", "b"], N)
    statistics.add(random_code(11, 0)[0], torch.zeros(11, dtype=torch.int64), 7.5)
    statistics.save(tmp_path / "whole")
    config, tensors = folders_module.read_folder(tmp_path / "whole", "statistics")
    change(config, tensors)
    folders_module.write_folder(tmp_path / "damaged", "statistics", config, tensors)
    with pytest.raises(ValueError, match=f"holds damaged statistics .*{said}.*; collect them again"):
        Statistics.load(tmp_path / "damaged")


def test_tensors_that_changed_after_they_were_saved_are_refused(tmp_path):
    statistics = Statistics(["a", "b"], N)
    statistics.add(random_code(11, 0)[0], torch.zeros(11, dtype=torch.int64), 7.5)
    statistics.save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(its contents are others than were saved\)"):
        Statistics.load(tmp_path)


def test_errors_name_the_mistake(tmp_path):
    statistics = Statistics(["a", "b"], N, timesteps=[4])
    with pytest.raises(ValueError, match="concept='z' is not in these statistics, which have a, b"):
        statistics.mean("z")
    with pytest.raises(ValueError, match=r"timestep=5 has no statistics \(there are: 4\)"):
        statistics.mean("a", 5)
    with pytest.raises(ValueError, match="one or more different names"):
        Statistics("a", N)
    with pytest.raises(ValueError, match="12 latents, these statistics 37"):
        statistics.add(SparseCode(torch.ones(1, 1), torch.zeros(1, 1).int(), 12), torch.zeros(1).int(), 0)
    with pytest.raises(ValueError, match="one SAE"):
        statistics.merge(Statistics(["a"], 12))
    with pytest.raises(FileNotFoundError, match=r"no statistics\.json"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_call_counts_the_conditional_rows_of_each_prompt(pipe, sae, guidance):
    statistics, record = Statistics(["fox", "animal"], sae.n_latents), Record(sae)
    concepts = [("fox", "animal"), None, "animal"]
    with attach(pipe, CollectStatistics(sae, statistics, concepts), record) as run:
        prompts = ["a fox", "a b", "a cat"]
        pixels(pipe, prompts, num_images_per_prompt=2, guidance_scale=guidance, height=48, width=80)
    codes = run[record]
    assert statistics.timesteps == tuple(sorted(codes.timesteps.values()))
    for step, timestep in codes.timesteps.items():
        of_images = [codes.codes(step, image).dense().double() for image in range(6)]
        fox, animal = torch.cat(of_images[:2]), torch.cat(of_images[:2] + of_images[4:])
        torch.testing.assert_close(statistics.mean("fox", timestep), fox.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.mean("animal", timestep), animal.mean(0), rtol=1e-5, atol=1e-6)


def test_collecting_does_not_depend_on_the_batch_size(pipe):
    # A threshold's codes are continuous in the activations: a batch's rounding must not decide between two latents.
    torch.manual_seed(1)
    sae = SAE(SAEConfig(d_model=32, n_latents=128, activation="relu", hookpoint=AT)).requires_grad_(False).eval()
    prompts = {"fox": ["a fox", "fox b", "c"], "cat": ["a cat", "c"]}
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 48, "width": 48}
    one = collect_statistics(pipe, sae, prompts, batch_size=1, **options)
    three = collect_statistics(pipe, sae, prompts, batch_size=3, **options)
    assert one.timesteps == three.timesteps
    for concept in prompts:
        assert one.rows(concept) == three.rows(concept) == len(prompts[concept]) * 36 * 2
        torch.testing.assert_close(one.mean(concept), three.mean(concept), rtol=1e-3, atol=1e-4)


def test_at_a_text_encoder_no_step_is_taken_and_what_all_of_them_give_is_counted(pipe, monkeypatch):
    torch.manual_seed(2)
    sae = SAE(SAEConfig(d_model=32, n_latents=N, k=5, hookpoint="text_encoder.encoder.layers.0")).eval()
    prompts = {"fox": ["a fox", "fox b"], "cat": ["a cat"]}
    concepts = {prompt: concept for concept, its in prompts.items() for prompt in its}
    drawn = Statistics(prompts, N)
    with attach(pipe, CollectStatistics(sae, drawn, concepts)):
        for prompt in concepts:
            pipe(prompt, num_inference_steps=3, output_type="latent")
    steps = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    quick = collect_statistics(pipe, sae, prompts, batch_size=1, num_inference_steps=3)
    assert steps == []
    assert quick.timesteps == drawn.timesteps
    for concept in prompts:
        assert quick.rows(concept) == drawn.rows(concept) > 0
        assert torch.equal(quick.total(concept), drawn.total(concept))


@pytest.mark.parametrize("kind", [Statistics, Histograms])
def test_a_call_that_was_interrupted_is_not_counted(pipe, sae, kind):
    def interrupt(pipe, step, timestep, kept):
        raise KeyboardInterrupt

    def call(seed, **options):
        pipe(
            "a fox",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        )

    both, twice = kind(["fox", "cat"], 128), kind(["fox", "cat"], 128)
    with attach(pipe, CollectStatistics(sae, both, ["fox"])):
        call(0)
        with pytest.raises(KeyboardInterrupt):
            call(1, callback_on_step_end=interrupt)
        call(1)
    for seed in (0, 1):
        with attach(pipe, CollectStatistics(sae, twice, ["fox"])):
            call(seed)
    assert both.rows("fox") == twice.rows("fox") == 2 * 2 * 64
    assert torch.equal(both.count("fox"), twice.count("fox"))
    assert torch.equal(both.total("fox"), twice.total("fox"))
    assert both.rows("cat") == 0


def test_a_prompt_that_is_listed_twice_is_drawn_twice(pipe, sae):
    prompts, call = {"fox": ["a fox", "a cat", "a fox"], "cat": ["a cat"]}, {"num_inference_steps": 1}
    statistics = collect_statistics(pipe, sae, prompts, **call)
    record, scores = Record(sae), []
    for seed, prompt in enumerate(["a fox", "a fox", "a cat"]):
        with attach(pipe, record) as run:
            pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
        scores.append(run[record].scores()[0].double())
    assert (scores[0] != scores[1]).any()
    torch.testing.assert_close(statistics.mean("fox"), torch.stack(scores).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.mean("cat"), scores[2], rtol=1e-5, atol=1e-6)


def test_prompts_and_concepts_must_match(pipe, sae):
    statistics = Statistics(["fox"], sae.n_latents)
    with attach(pipe, CollectStatistics(sae, statistics, ["fox"])), pytest.raises(ValueError, match="1 entries for 2"):
        pixels(pipe, ["a fox", "a cat"])
    collect = CollectStatistics(sae, statistics, {"a fox": "fox"})
    with attach(pipe, collect), pytest.raises(ValueError, match="nothing about the prompt 'a cat'"):
        pixels(pipe, ["a fox", "a cat"])
    text, negative = pipe.encode_prompt(["a fox", "a cat"], "cpu", 1, True)

    def embedded(run):
        pipe(prompt_embeds=text, negative_prompt_embeds=negative, num_inference_steps=1)

    def loop_of_ones_own(run):  # in which nobody says how many
        with run.call(), torch.no_grad():
            pipe.unet(torch.zeros(2, 4, 16, 16), 1, text)

    for concepts, do in ((["fox"], embedded), (["fox"] * 3, embedded), (["fox"], loop_of_ones_own)):
        collect = CollectStatistics(sae, statistics, concepts)
        with attach(pipe, collect) as run, pytest.raises(ValueError, match="entries for 2"):
            do(run)
    assert statistics.rows("fox") == 0
    with pytest.raises(ValueError, match=r"prompts\['fox'\]='a fox' must be a list"):
        collect_statistics(pipe, sae, {"fox": "a fox"})


def test_t12_an_sae_whose_codes_depend_on_the_batch_is_refused():
    config = SAEConfig(d_model=32, n_latents=64, activation="batch_topk", k=4, hookpoint=AT)
    training = SAE(config).train()
    with pytest.raises(ValueError, match=r"call sae\.eval\(\) first"):
        Record(training)
    Record(training.eval())  # top-k of each row alone
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = training.encode(x).dense(), torch.cat([training.encode(row[None]).dense() for row in x])
    torch.testing.assert_close(together, alone)
    assert ((together != 0).sum(1) <= 4).all()
