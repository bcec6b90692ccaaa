"""The derivations themselves: by hand-worked numbers, by what a complete SAE has to give, and by identities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import flux as flux_family
from tests.presets.plain import flux, itd, saeuron, steerers, unbox
from tests.presets.plain.dense import (
    DenseSAE,
    decode,
    keep_largest,
    preactivations,
    random_sae,
    relu_then_topk,
    topk_then_relu,
)
from tests.presets.plain.sites import at_steps, module_at
from tests.tiny import tiny_sd, tiny_sdxl

SD_BLOCK = "unet.up_blocks.1.attentions.1"  # 32 channels on 8 x 8
SDXL_BLOCK = "unet.up_blocks.0.attentions.0"  # 32 channels on 4 x 4
SDXL_OTHER = "unet.mid_block.attentions.0"  # the same
FLUX_BLOCK = "transformer.transformer_blocks.1"
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}  # one rounding to float32 of what float64 computed


def complete_sae(d: int) -> DenseSAE:
    """Latent i is the positive part of channel i, latent d + i the negative part: nothing is lost."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    zero = torch.zeros(d)
    return DenseSAE(both, both, zero, torch.zeros(2 * d), zero, k=2 * d)


@contextmanager
def watched(pipe: Any, path: str, index: int = 0) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Entered inside an edit: of every call of the module (input, output before the edit, output after it)."""
    module, calls, before = module_at(pipe, path), [], []

    def tensor(output: Any) -> torch.Tensor:
        return (output[index] if isinstance(output, tuple) else output).clone()

    def after(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(((args[0] if args else kwargs["hidden_states"]).clone(), before.pop(), tensor(output)))

    first = module.register_forward_hook(lambda _m, _a, output: before.append(tensor(output)), prepend=True)
    last = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield calls
    finally:
        first.remove()
        last.remove()


def run(pipe: Any, prompt: str = "a fox", steps: int = 2, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", "guidance_scale": 5.0}
    return pipe(prompt, **{**options, **call}).images


def unguided(pipe: Any, prompt: str = "a fox", **call: Any) -> torch.Tensor:
    return run(pipe, prompt, guidance_scale=0.0, **call)


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def flux_pipe() -> Any:
    return flux_family.build(embedded=False)


class TestDense:
    def test_of_equal_values_the_lowest_index_is_kept(self):
        kept = keep_largest(torch.tensor([[2.0, 3.0, 2.0, -1.0], [-4.0, -2.0, -3.0, -2.0]]), 2)
        assert kept.tolist() == [[2, 3, 0, 0], [0, -2, 0, -2]]

    def test_an_affine_code_worked_by_hand(self):
        E, D = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[1.0, 1], [0, 1], [2, 0]])
        sae = DenseSAE(E, D, torch.tensor([1.0, 0]), torch.tensor([0.0, -1, 0.5]), torch.tensor([10.0, 20]), k=2)
        x = torch.tensor([3.0, 1.0])  # pre = (2, 2 - 1, 2 + 1 + 0.5)
        assert preactivations(sae, x).tolist() == [2, 1, 3.5]
        assert topk_then_relu(sae, x).tolist() == [2, 0, 3.5]
        assert decode(sae, topk_then_relu(sae, x)).tolist() == [10 + 2 + 7, 20 + 2]

    def test_both_orders_of_relu_and_top_k_give_the_same_dense_code(self):
        sae = random_sae(12, 7, k=9)
        x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
        code = topk_then_relu(sae, x)
        assert ((code > 0).sum(dim=1) < 9).any()
        torch.testing.assert_close(code, relu_then_topk(sae, x), rtol=0, atol=0)


class TestSites:
    @pytest.mark.parametrize("scheduler", ["ddim", "euler"])
    def test_the_step_counts_from_zero_in_every_run(self, scheduler: str):
        pipe, seen = tiny_sd(scheduler), []
        with at_steps(pipe, SD_BLOCK, lambda _x, _y, step: seen.append(step)):
            run(pipe, steps=3)
            run(pipe, steps=2)
        assert seen == [0, 1, 2, 0, 1]

    def test_the_step_of_flux(self, flux_pipe: Any):
        seen = []
        with at_steps(flux_pipe, FLUX_BLOCK, lambda _x, _y, step: seen.append(step), index=1):
            flux_family.call(flux_pipe, ["a fox"], guidance=False, steps=4)
        assert seen == [0, 1, 2, 3]

    def test_no_hook_is_left(self, sd: Any):
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in sd.unet.modules()]
        with unbox.ablate(sd, SD_BLOCK):
            run(sd)
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in sd.unet.modules()]


class TestUnbox:
    @pytest.mark.parametrize(("cfg", "signs"), [("both", (-1, 1)), ("cond", (0, 1)), ("turbo", (1, 1))])
    def test_the_map_times_the_direction_is_added_by_halves(self, sdxl: Any, cfg: str, signs: tuple):
        sae = random_sae(20, 32, k=4)
        M = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
        with unbox.add_on_area(sdxl, SDXL_BLOCK, sae, 5, M, cfg), watched(sdxl, SDXL_BLOCK) as calls:
            run(sdxl)
        for _, before, after in calls:
            assert before.shape == (2, 32, 4, 4)
            for row, channel, h, w in [(0, 3, 1, 2), (1, 3, 1, 2), (1, 31, 3, 0), (0, 0, 0, 3)]:
                added = signs[row] * float(M[h, w]) * float(sae.D[5, channel])
                assert float(after[row, channel, h, w] - before[row, channel, h, w]) == pytest.approx(added, abs=1e-5)

    def test_an_empty_map_changes_no_bit(self, sdxl: Any):
        plain = run(sdxl)
        with unbox.add_on_area(sdxl, SDXL_BLOCK, random_sae(20, 32, k=4), 0, torch.zeros(4, 4), "both"):
            assert torch.equal(run(sdxl), plain)

    def test_a_batch_in_bfloat16_is_edited_by_halves_and_rounded_once(self):
        pipe, sae = tiny_sdxl(dtype=torch.bfloat16), random_sae(20, 32, k=4)
        M = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))  # the image is wider than high
        with unbox.add_on_area(pipe, SDXL_BLOCK, sae, 5, M, "both"), watched(pipe, SDXL_BLOCK) as calls:
            run(pipe, ["a fox", "cat"], height=64, width=128)
        added = torch.stack([row * M.double() for row in sae.D[5].double()])
        for _, before, after in calls:
            assert before.shape == (4, 32, 4, 8)
            for row, sign in enumerate((-1, -1, 1, 1)):
                assert torch.equal(after[row], (before[row].double() + sign * added).bfloat16())

    def test_only_the_named_steps_are_edited(self, sdxl: Any):
        edit = unbox.add_on_area(sdxl, SDXL_BLOCK, random_sae(20, 32, k=4), 1, torch.ones(4, 4), "turbo", steps=[1])
        with edit, watched(sdxl, SDXL_BLOCK) as calls:
            unguided(sdxl, steps=3)
        assert [torch.equal(before, after) for _, before, after in calls] == [True, False, True]

    def test_a_painted_map_is_the_share_of_each_cell(self):
        mask = torch.zeros(8, 8)
        mask[:4, :2] = 1  # half of the first cell of 4 x 4
        assert unbox.painted(mask, (2, 2), mean=20.0, strength=-3.0).tolist() == [[-30, 0], [0, 0]]

    def test_an_icon_is_the_input_plus_one_direction(self, sdxl: Any):
        sae = random_sae(20, 32, k=4)
        with unbox.icon(sdxl, SDXL_BLOCK, sae, 7, 4.0, "base"), watched(sdxl, SDXL_BLOCK) as calls:
            run(sdxl)
        for came_in, _, after in calls:
            assert torch.equal(after[0], came_in[0])
            torch.testing.assert_close(after[1], came_in[1] + 4 * sae.D[7][:, None, None], **ROUNDING)
        with unbox.icon(sdxl, SDXL_BLOCK, sae, 7, 4.0), watched(sdxl, SDXL_BLOCK) as calls:
            unguided(sdxl)
        for came_in, _, after in calls:
            torch.testing.assert_close(after, came_in + 4 * sae.D[7][:, None, None], **ROUNDING)

    def test_an_icon_of_nothing_is_the_ablation(self, sdxl: Any):
        with unbox.icon(sdxl, SDXL_BLOCK, random_sae(20, 32, k=4), 7, 0.0):
            nothing = unguided(sdxl)
        with unbox.ablate(sdxl, SDXL_BLOCK):
            assert torch.equal(unguided(sdxl), nothing)
        assert not torch.allclose(nothing, unguided(sdxl))

    def test_a_complete_sae_reconstructs_the_run(self, sdxl: Any):
        with unbox.reconstruct(sdxl, SDXL_BLOCK, complete_sae(32)):
            torch.testing.assert_close(run(sdxl), run(tiny_sdxl()), rtol=1e-4, atol=1e-4)

    def test_an_incomplete_sae_loses_the_error(self, sdxl: Any):
        sae = random_sae(20, 32, k=4)
        with unbox.reconstruct(sdxl, SDXL_BLOCK, sae), watched(sdxl, SDXL_BLOCK) as calls:
            run(sdxl)
        came_in, before, after = (tensor[1, :, 2, 3].double() for tensor in calls[1])
        pre = sae.E.double() @ (before - came_in - sae.b_pre.double()) + sae.b_lat.double()
        best = sorted(range(20), key=lambda i: -pre[i])[:4]
        expected = came_in + sae.b_pre + sum(max(pre[i], 0) * sae.D[i].double() for i in best)
        torch.testing.assert_close(after, expected, **ROUNDING)

    @pytest.mark.parametrize("cfg", ["turbo", "base"])
    def test_top_features_add_steps_and_average_positions_of_the_conditional_rows(self, sdxl: Any, cfg: str):
        generate = {"turbo": unguided, "base": run}[cfg]
        features = unbox.top_features(sdxl, SDXL_BLOCK, complete_sae(32), lambda: generate(sdxl), cfg)
        with watched(sdxl, SDXL_BLOCK) as calls:
            generate(sdxl)
        diffs = [(after.double() - came_in.double())[-1] for came_in, _, after in calls]
        expected = sum(diff.clamp(min=0).mean(dim=(1, 2)) for diff in diffs)
        assert features.shape == (1, 64)
        torch.testing.assert_close(features[0, :32], expected, **ROUNDING)


class TestTransport:
    everything = torch.ones(4, 4, dtype=torch.bool)

    def carry(self, pipe: Any, saes: dict, first: torch.Tensor, second: torch.Tensor, **options: Any) -> Any:
        return unbox.transport(pipe, saes, lambda p: unguided(pipe, p), "a cat", "fox 3", first, second, **options)

    def diffs(self, pipe: Any, prompt: str) -> torch.Tensor:
        """[steps, h, w, d]."""
        with watched(pipe, SDXL_BLOCK) as calls:
            unguided(pipe, prompt)
        return torch.cat([(y.double() - x.double()).permute(0, 2, 3, 1) for x, _, y in calls])

    def test_all_latents_of_a_complete_sae_carry_the_whole_difference(self, sdxl: Any):
        carried = self.carry(sdxl, {SDXL_BLOCK: complete_sae(32)}, self.everything, self.everything, k_transfer=64)
        expected = self.diffs(sdxl, "a cat") - self.diffs(sdxl, "fox 3")
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(carried.deltas[SDXL_BLOCK], expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("norms", ["block", "all"])
    def test_adaptively_the_block_then_writes_what_it_wrote_for_the_source(self, sdxl: Any, norms: str):
        options = {"k_transfer": 64, "mode": "sae_adaptive", "adaptive_norms": norms}
        carried = self.carry(sdxl, {SDXL_BLOCK: complete_sae(32)}, self.everything, self.everything, **options)
        source = self.diffs(sdxl, "a cat")
        edited = []

        def replay(came_in: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor:
            edited.append(step)
            return came_in.double() + source[step][None].permute(0, 3, 1, 2)

        with at_steps(sdxl, SDXL_BLOCK, replay):
            torch.testing.assert_close(carried.latents, unguided(sdxl, "fox 3"), rtol=1e-5, atol=1e-5)
        assert edited == [0, 1]

    def test_the_score_is_the_difference_of_shares_over_all_blocks(self, sdxl: Any):
        saes = {SDXL_BLOCK: random_sae(20, 32, k=4), SDXL_OTHER: random_sae(24, 32, k=4, seed=1)}
        carried = self.carry(sdxl, saes, self.everything, self.everything, k_transfer=3)
        assert carried.score.shape == (44,)
        assert float(carried.score.sum()) == pytest.approx(0, abs=1e-12)
        assert float(carried.score.abs().sum()) <= 2
        order = np.argsort(carried.score.numpy(), kind="stable")
        assert carried.removed.tolist() == order[:3].tolist()
        assert carried.score[carried.added].tolist() == sorted(carried.score.tolist(), reverse=True)[:3]

    @pytest.mark.parametrize("mode", ["sae", "sae_adaptive", "sae_adaptive over all blocks"])
    def test_every_cell_of_two_blocks_by_hand(self, sdxl: Any, mode: str):
        saes = {SDXL_BLOCK: random_sae(20, 32, k=4), SDXL_OTHER: random_sae(24, 32, k=5, seed=1)}
        for path, sae in saes.items():  # decoder rows of unequal norms
            saes[path] = replace(sae, D=sae.D * (1 + torch.arange(sae.n)[:, None] / 10))
        first, second = torch.zeros(2, 4, 4, dtype=torch.bool)
        first[0], second[:, 1] = True, True  # one cell is in both
        runs = []

        def generate(prompt: str) -> torch.Tensor:
            with watched(sdxl, SDXL_BLOCK) as one, watched(sdxl, SDXL_OTHER) as other:
                latents = unguided(sdxl, prompt)
            runs.append({SDXL_BLOCK: one, SDXL_OTHER: other})
            return latents

        def code(path: str, which: int, step: int, h: int, w: int) -> list[float]:
            sae, (came_in, before, _) = saes[path], runs[which][path][step]
            diff = before[0, :, h, w].double() - came_in[0, :, h, w].double()
            pre = (sae.E.double() @ (diff - sae.b_pre.double()) + sae.b_lat.double()).tolist()
            best = sorted(range(sae.n), key=lambda i: -pre[i])[: sae.k]
            return [max(value, 0.0) if i in best else 0.0 for i, value in enumerate(pre)]

        carried = unbox.transport(
            sdxl, saes, generate, "a cat", "fox 3", first, second, k_transfer=12, multiplier=1.5, mode=mode.split()[0],
            adaptive_norms="all" if mode.endswith("blocks") else "block",
        )  # fmt: skip
        shares = []
        for which, mask in enumerate((first, second)):
            sums = sum(
                torch.tensor([*code(SDXL_BLOCK, which, 0, h, w), *code(SDXL_OTHER, which, 0, h, w)])
                for h, w in mask.nonzero().tolist()
            )
            shares.append(sums / sums.sum())
        torch.testing.assert_close(carried.score.float(), shares[0] - shares[1], rtol=1e-5, atol=1e-6)

        S = {SDXL_BLOCK: [i for i in carried.added if i < 20], SDXL_OTHER: [i - 20 for i in carried.added if i >= 20]}
        T = {
            SDXL_BLOCK: [i for i in carried.removed if i < 20],
            SDXL_OTHER: [i - 20 for i in carried.removed if i >= 20],
        }
        assert all(S.values())
        assert all(T.values())
        ratio = {}
        for path in saes:
            over = saes if mode.endswith("blocks") else [path]
            norms = [sum(float(saes[p].D[i].norm()) for p in over for i in chosen[p]) for chosen in (S, T)]
            ratio[path] = norms[0] / norms[1] if mode != "sae" else 1.0
        assert mode == "sae" or min(abs(value - 1) for value in ratio.values()) > 1e-3
        for path, sae in saes.items():
            for step, h, w in itertools.product(range(2), range(4), range(4)):
                expected = torch.zeros(32, dtype=torch.float64)
                if first[h, w]:
                    z = code(path, 0, step, h, w)
                    expected += 1.5 * sum((z[i] * sae.D[i].double() for i in S[path]), torch.zeros(32))
                if second[h, w]:
                    z = code(path, 1 if mode == "sae" else 2, step, h, w)
                    expected -= 1.5 * ratio[path] * sum((z[i] * sae.D[i].double() for i in T[path]), torch.zeros(32))
                _, before, after = runs[2][path][step]
                moved = (after - before)[0, :, h, w].double()
                torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)
                torch.testing.assert_close(carried.deltas[path][step, h, w], expected, rtol=1e-6, atol=1e-7)

    def test_nothing_is_written_outside_the_masks(self, sdxl: Any):
        first, second = torch.zeros(2, 4, 4, dtype=torch.bool)
        first[0, 1:3], second[2:, 3] = True, True
        saes = {SDXL_BLOCK: random_sae(20, 32, k=4)}
        both = self.carry(sdxl, saes, first, second, k_transfer=10).deltas[SDXL_BLOCK]
        assert both[:, first | second].abs().min(dim=-1).values.max() > 0
        assert not both[:, ~(first | second)].any()
        into_target = self.carry(sdxl, saes, first, second, k_transfer=10, subtract_target_add_source=False)
        assert not into_target.deltas[SDXL_BLOCK][:, ~second].any()

    def test_masks_of_other_sizes_get_one_vector_a_step(self, sdxl: Any):
        first, second = torch.zeros(2, 4, 4, dtype=torch.bool)
        first[0], second[2, :3] = True, True
        saes = {SDXL_BLOCK: random_sae(20, 32, k=4)}
        delta = self.carry(sdxl, saes, first, second, k_transfer=10).deltas[SDXL_BLOCK]
        for mask in (first, second):
            cells = delta[:, mask]
            torch.testing.assert_close(cells, cells[:, :1].expand_as(cells))

    @pytest.mark.parametrize(("statistic", "expected"), [("mean", 2.0), ("q95", 3.85), ("max", 4.0)])
    def test_the_statistics_worked_by_hand(self, statistic: str, expected: float):
        values = torch.tensor([[0.0], [1.0], [3.0], [4.0]], dtype=torch.float64)  # q95: 0.95 * 3 = 2.85 of the order
        assert float(unbox._statistic(values, statistic)) == pytest.approx(expected)

    def test_one_cell_is_its_own_statistic(self, sdxl: Any):
        cell = torch.zeros(4, 4, dtype=torch.bool)
        cell[2, 1] = True
        saes = {SDXL_BLOCK: random_sae(20, 32, k=4)}
        spatial = self.carry(sdxl, saes, cell, cell, k_transfer=5, multiplier=2.0)
        for options in ({"maintain_spatial": False, "statistic": "max"}, {"subtract_target_add_source": False}):
            other = self.carry(sdxl, saes, cell, cell, k_transfer=5, multiplier=2.0, **options)
            torch.testing.assert_close(other.deltas[SDXL_BLOCK], spatial.deltas[SDXL_BLOCK])


class TestSAeUron:
    @pytest.mark.parametrize(("percentile", "picked"), [(99.999, 1), (99.995, 2), (99.99, 3)])
    def test_a_quantile_picks_the_published_number_of_20480(self, percentile: float, picked: int):
        scores = torch.randn(1, 20480, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        chosen = saeuron.select(scores, percentile)
        assert set(chosen[0].nonzero()[:, 0].tolist()) == set(scores[0].topk(picked).indices.tolist())

    def test_the_quantile_interpolates_and_the_choice_is_strict(self):
        values = torch.tensor([4.0, 1.0, 3.0, 2.0])
        assert saeuron.quantile(values, 50) == 2.5
        assert saeuron.quantile(values, 100) == 4
        assert saeuron.select(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 50).tolist() == [[False] * 4]

    def test_scores_and_threshold_worked_by_hand(self):
        stats = {
            "a": torch.tensor([[[4.0, 0.0]], [[2.0, 2.0]]]),  # two prompts, one step: mean (3, 1), shares 3/4, 1/4
            "b": torch.tensor([[[0.0, 6.0]]]),
            "c": torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]]),  # b and c pooled: (2, 2), shares 1/2, 1/2
        }
        assert saeuron.score(stats, "a")[0].tolist() == pytest.approx([0.25, -0.25], abs=1e-8)
        assert saeuron.threshold(stats)[0].tolist() == pytest.approx([(3 + 0 + 3) / 3, (1 + 6 + 0) / 3])

    def test_the_code_is_multiplied_by_gamma_and_by_the_mean(self):
        z = torch.tensor([2.0, 0.5, 3.0, 1.0])
        selected = torch.tensor([True, True, False, True])
        mu, m = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, 1.0])
        assert saeuron.edited_code(z, selected, mu, m, gamma=-3.0).tolist() == [2 * -3 * 0.5, 0.5, 3, 1]

    def test_statistics_are_means_over_the_conditional_rows(self, sd: Any):
        stats = saeuron.statistics(sd, SD_BLOCK, complete_sae(32), {"fox": ["a fox", "fox 3"]}, lambda p: run(sd, p))
        assert stats["fox"].shape == (2, 2, 64)
        with watched(sd, SD_BLOCK) as calls:
            run(sd, "fox 3")
        for step, (_, _, output) in enumerate(calls):
            expected = output[1].double().clamp(min=0).mean(dim=(1, 2))
            torch.testing.assert_close(stats["fox"][1, step, :32], expected, **ROUNDING)

    @pytest.fixture
    def concepts(self) -> dict[str, torch.Tensor]:
        """Statistics of [3 prompts, 2 steps, 20 latents] in which latents 3 and 4 belong to "a" and 4 and 5 to "b"."""
        chance = torch.Generator().manual_seed(5)
        stats = {name: 0.01 * torch.rand(3, 2, 20, generator=chance) for name in "abc"}
        stats["a"][..., [3, 4]] += torch.tensor([0.2, 0.3])
        stats["b"][..., [4, 5]] += torch.tensor([0.5, 0.2])
        stats["c"][..., 6] += 10  # so the shares of the others are small among "all but this one"
        return stats

    def edited(self, pipe: Any, sae: DenseSAE, concepts: dict, names: list[str], **options: Any) -> list:
        edit = saeuron.erase(pipe, SD_BLOCK, sae, concepts, names, percentile=90, gamma=-2.0, **options)
        with edit, watched(pipe, SD_BLOCK) as calls:
            run(pipe)
        return calls

    def test_the_released_error_reflects_every_position(self, sd: Any, concepts: dict):
        sae = random_sae(20, 32, k=6)
        keep, released = (
            self.edited(sd, sae, concepts, ["a"], error=error)[0] for error in ("keep", "saeuron_released")
        )
        x = keep[1].double().permute(0, 2, 3, 1)
        assert torch.equal(keep[1], released[1])
        difference = released[2].double().permute(0, 2, 3, 1) - keep[2].double().permute(0, 2, 3, 1)
        expected = 2 * (decode(sae, relu_then_topk(sae, x)) - x)
        torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-5)
        assert (expected.abs().amax(dim=-1) > 1e-3).all()

    def test_both_halves_move_along_the_selected_directions_only(self, sd: Any, concepts: dict):
        sae = random_sae(20, 32, k=6)
        for _, before, after in self.edited(sd, sae, concepts, ["a"]):
            moved = (after.double() - before.double()).permute(0, 2, 3, 1)
            assert (moved.abs().amax(dim=(1, 2, 3)) > 1e-3).all()
            plane = sae.D[[3, 4]].double()
            coefficients = torch.linalg.lstsq(plane.T, moved.reshape(-1, 32).T).solution
            torch.testing.assert_close(coefficients.T @ plane, moved.reshape(-1, 32), rtol=0, atol=1e-5)

    def test_a_latent_of_two_concepts_takes_the_mean_of_the_last(self, sd: Any, concepts: dict):
        sae = random_sae(20, 32, k=6)
        m = saeuron.threshold(concepts)[0]
        for names in (["a", "b"], ["b", "a"]):
            _, before, after = self.edited(sd, sae, concepts, names)[0]
            x = before.double().permute(0, 2, 3, 1).reshape(-1, 32)
            z = relu_then_topk(sae, x)
            factor = torch.ones_like(z)
            for name, latents in [(name, {"a": (3, 4), "b": (4, 5)}[name]) for name in names]:
                for i in latents:
                    factor[:, i] = -2.0 * float(concepts[name][:, 0, i].double().mean())
            delta = torch.where(z > m, z * (factor - 1), 0) @ sae.D.double()
            torch.testing.assert_close(after.double().permute(0, 2, 3, 1).reshape(-1, 32), x + delta, **ROUNDING)

    def test_scaling_a_latent_by_one_leaves_the_reconstruction(self, sd: Any):
        sae = random_sae(20, 32, k=6)
        with saeuron.scale_latent(sd, SD_BLOCK, sae, 3, 1.0), watched(sd, SD_BLOCK) as calls:
            run(sd)
        _, before, after = calls[0]
        expected = decode(sae, relu_then_topk(sae, before.permute(0, 2, 3, 1)))
        torch.testing.assert_close(after.double().permute(0, 2, 3, 1), expected, **ROUNDING)


class TestSteerers:
    sd_site = (steerers.TextSite("text_encoder.text_model.encoder.layers.1", "tokenizer"),)
    sdxl_sites = (
        steerers.TextSite("text_encoder.text_model.encoder.layers.1", "tokenizer"),
        steerers.TextSite("text_encoder_2.text_model.encoder.layers.1", "tokenizer_2"),
    )
    flux_site = (steerers.TextSite("text_encoder_2.encoder.block.1", "tokenizer_2"),)

    def test_the_vector_sums_every_positive_latent_at_each_position(self, sd: Any):
        sae = random_sae(20, 32, k=2, tied=False)
        (v,) = steerers.concept_vector(sd, sae, self.sd_site, "cat", -0.5)
        ids = sd.tokenizer("cat", padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = sd.text_encoder(ids, output_hidden_states=True).hidden_states[2][0].double()
        assert v.shape == (16, 32)
        for p in (0, 1, 15):
            active = [
                float(e @ (hidden[p] - sae.b_pre.double()) + b) for e, b in zip(sae.E.double(), sae.b_lat, strict=True)
            ]
            assert sum(a > 0 for a in active) > 2  # more than the k of its training
            expected = -0.5 * sum(a * d for a, d in zip(active, sae.D.double(), strict=True) if a > 0)
            torch.testing.assert_close(v[p], expected, **ROUNDING)

    def test_the_prompt_gains_what_the_negative_prompt_loses(self, sd: Any):
        vectors = steerers.concept_vector(sd, random_sae(20, 32, k=2), self.sd_site, "cat", 0.7)
        with steerers.steer(sd, self.sd_site, vectors), watched(sd, self.sd_site[0].layer) as calls:
            run(sd, ["a fox", "fox"], negative_prompt=["dog", "c"])
        assert len(calls) == 2
        for (_, before, after), sign in zip(calls, (1, -1), strict=True):
            assert before.shape == (2, 16, 32)
            torch.testing.assert_close(
                after.double() - before.double(), (sign * vectors[0]).expand(2, 16, 32), rtol=0, atol=1e-5
            )

    def test_the_vector_of_two_encoders_goes_back_to_each(self, sdxl: Any):
        plain = sdxl.encode_prompt("a fox", negative_prompt="dog")  # leaves transformers' recording hooks in place
        vectors = steerers.concept_vector(sdxl, random_sae(70, 56, k=2), self.sdxl_sites, "cat", 0.7)
        assert [v.shape[1] for v in vectors] == [32, 24]
        with steerers.steer(sdxl, self.sdxl_sites, vectors):
            steered = sdxl.encode_prompt("a fox", negative_prompt="dog")
        both = torch.cat(vectors, dim=1)  # the layers are the last but one, whose outputs are the embeddings
        torch.testing.assert_close(steered[0][0].double() - plain[0][0].double(), both, rtol=0, atol=1e-5)
        torch.testing.assert_close(steered[1][0].double() - plain[1][0].double(), -both, rtol=0, atol=1e-5)
        assert not torch.allclose(steered[2], plain[2])  # the pooled text is of the steered layers too

    def test_without_a_negative_prompt_sdxl_encodes_once(self, sdxl: Any):
        vectors = steerers.concept_vector(sdxl, random_sae(70, 56, k=2), self.sdxl_sites, "cat", 0.7)
        with steerers.steer(sdxl, self.sdxl_sites, vectors):
            _, negative, _, _ = sdxl.encode_prompt("a fox")
        assert not negative.any()

    def test_flux_is_steered_once(self, flux_pipe: Any):
        vectors = steerers.concept_vector(flux_pipe, random_sae(40, 32, k=2), self.flux_site, "cat", -0.3, length=16)
        edit = steerers.steer(flux_pipe, self.flux_site, vectors, signs=(1.0,))
        with edit, watched(flux_pipe, self.flux_site[0].layer) as calls:
            flux_family.call(flux_pipe, ["a fox"], guidance=False)
        ((_, before, after),) = calls
        torch.testing.assert_close(after.double() - before.double(), vectors[0][None], rtol=0, atol=1e-5)

    def test_strength_zero_changes_no_bit(self, sd: Any):
        vectors = steerers.concept_vector(sd, random_sae(20, 32, k=2), self.sd_site, "cat", 0.0)
        with steerers.steer(sd, self.sd_site, vectors):
            steered = run(sd)
        assert torch.equal(steered, run(sd))


class TestItD:
    layer = "text_encoder.text_model.encoder.layers.1"
    sae = random_sae(60, 32, k=12)

    def watch(self, pipe: Any, F: list[int], prompts: list[str], **options: Any) -> tuple[list[bool], list]:
        edit = itd.deactivate(pipe, self.layer, self.sae, F, prompts, **options)
        with edit as edited, watched(pipe, self.layer) as calls:
            run(pipe, prompts)
        return edited, calls

    def test_the_first_token_selects_nothing(self):
        x = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.7]])
        assert itd.top_latents(complete_sae(3), x, M=1) == {1}
        assert itd.top_latents(complete_sae(3), x, M=2) == {1, 2}

    def test_silent_latents_are_taken_only_as_the_released_code_would(self):
        x = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        assert itd.top_latents(complete_sae(3), x, M=3) == {2}
        assert itd.top_latents(complete_sae(3), x, M=3, only_active=False) == {0, 1, 2}

    def test_what_remains_is_not_erased(self, sd: Any):
        erase, remain = ["cat", "a cat"], ["fox 3"]
        F = itd.select(sd, self.layer, self.sae, erase, remain, M=8)
        kept = itd.top_latents(self.sae, itd.layer_output(sd, self.layer, "fox 3"), 8)
        alone = itd.select(sd, self.layer, self.sae, erase, [], M=8)
        assert F
        assert sorted(set(alone) - kept) == F != alone
        assert itd.select(sd, self.layer, self.sae, erase, erase, M=8) == []

    def test_the_error_worked_by_hand(self):
        x, edited = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [3.0, 1.0]])
        assert itd.error(edited, x) == (1 + 1 + 9 + 1) / 4
        assert itd.error(edited, x, "max_token") == 5

    def test_an_impossible_threshold_changes_no_bit(self, sd: Any):
        edited, calls = self.watch(sd, [1, 2, 3], ["a cat", "fox"], tau=1e9)
        assert edited == [False, False]
        assert all(torch.equal(before, after) for _, before, after in calls)

    @pytest.mark.parametrize(("F", "strength"), [([], -8.0), ([1, 2, 3, 4], 1.0)])
    def test_nothing_to_erase_leaves_the_reconstruction(self, sd: Any, F: list[int], strength: float):
        _, calls = self.watch(sd, F, ["a cat"], tau=None, strength=strength)
        _, before, after = calls[0]
        torch.testing.assert_close(after.double(), decode(self.sae, topk_then_relu(self.sae, before)), **ROUNDING)

    def test_every_position_but_the_first_is_edited_in_the_prompts_call_only(self, sd: Any):
        F = itd.select(sd, self.layer, self.sae, ["cat"], [], M=20)
        edited, calls = self.watch(sd, F, ["cat"], tau=None)
        assert edited == [True]
        _, before, after = calls[0]
        unedited = decode(self.sae, topk_then_relu(self.sae, before))[0]
        moved = (after[0].double() - unedited).abs().amax(dim=1)
        assert moved[0] < 1e-6
        assert (moved[1:] > 1e-3).all()  # 16 positions, 3 of them the text's own
        assert torch.equal(calls[1][1], calls[1][2])

    def test_erased_prompts_pass_their_own_gate(self, sd: Any):
        erase = ["cat", "a cat", "c a t"]
        F = itd.select(sd, self.layer, self.sae, erase, [], M=8)
        for reduce in ("mean", "max_token"):
            tau = itd.tau(sd, self.layer, self.sae, F, erase, reduce=reduce)
            edited, _ = self.watch(sd, F, erase, tau=tau, gate_reduce=reduce)
            assert edited == [True] * 3
        mean, most = (itd.tau(sd, self.layer, self.sae, F, erase, reduce=reduce) for reduce in ("mean", "max_token"))
        assert most > mean

    def test_padding_does_not_decide(self, sd: Any):
        F = itd.select(sd, self.layer, self.sae, ["cat"], [], M=20)
        own = itd.tau(sd, self.layer, self.sae, F, ["cat"]) / 0.99
        assert self.watch(sd, F, ["cat"], tau=own * 0.9999)[0] == [True]
        assert self.watch(sd, F, ["cat"], tau=own * 1.0001)[0] == [False]
        _, calls = self.watch(sd, F, ["cat"], tau=None)
        padded = itd.error(calls[0][2][0].double(), calls[0][1][0])
        assert abs(padded / own - 1) > 0.01
        between = (padded + own) / 2
        decisions = [self.watch(sd, F, ["cat"], tau=between, gate_tokens=t)[0] for t in ("unpadded", "all")]
        assert decisions == [[own > padded], [padded > own]]


class TestFlux:
    d = 16

    @pytest.fixture
    def pca(self) -> flux.PCA:
        chance = torch.Generator().manual_seed(6)
        P = torch.linalg.qr(torch.randn(self.d, self.d, generator=chance, dtype=torch.float64)).Q
        return flux.PCA(P, torch.randn(self.d, generator=chance), 0.5 + torch.rand(self.d, generator=chance))

    @pytest.fixture
    def signed(self) -> DenseSAE:
        """Complete: latent i is component i, of either sign."""
        eye, ones = torch.eye(self.d), torch.ones(self.d)
        return DenseSAE(eye, eye, 0.2 * ones, torch.zeros(self.d), 0.2 * ones, k=self.d)

    def test_a_complete_sae_gives_the_input_back_where_nothing_is_clipped(self, pca: flux.PCA, signed: DenseSAE):
        y = torch.randn(7, self.d, generator=torch.Generator().manual_seed(7))
        assert flux.normalised(pca, y).abs().max() < 10
        torch.testing.assert_close(flux.reconstruction(signed, pca, y), y.double())

    def test_a_component_past_ten_deviations_is_clipped(self, pca: flux.PCA, signed: DenseSAE):
        y = pca.P @ (pca.mu.double() + pca.sigma.double() * torch.eye(self.d)[2] * -25)
        clipped = pca.P @ (pca.mu.double() + pca.sigma.double() * torch.eye(self.d)[2] * -10)
        torch.testing.assert_close(flux.reconstruction(signed, pca, y), clipped)

    def test_the_largest_values_are_not_the_largest_magnitudes(self, pca: flux.PCA, signed: DenseSAE):
        sae = DenseSAE(signed.E, signed.D, torch.zeros(self.d), signed.b_lat, signed.b_out, k=2)
        u = torch.tensor([1.0, -5.0, 0.5] + [-0.25] * (self.d - 3), dtype=torch.float64)
        y = pca.P @ (pca.mu.double() + pca.sigma.double() * u)
        assert flux.codes(sae, pca, y).nonzero()[:, 0].tolist() == [0, 2]
        by_magnitude = flux.codes(sae, pca, y, "magnitude")
        assert by_magnitude.nonzero()[:, 0].tolist() == [0, 1]
        assert float(by_magnitude[1]) == pytest.approx(-5)

    def test_too_few_positive_values_leave_negative_codes(self, pca: flux.PCA, signed: DenseSAE):
        sae = DenseSAE(signed.E, signed.D, torch.zeros(self.d), signed.b_lat, signed.b_out, k=2)
        u = torch.tensor([1.0, -0.5] + [-1.0] * (self.d - 2), dtype=torch.float64)
        code = flux.codes(sae, pca, pca.P @ (pca.mu.double() + pca.sigma.double() * u))
        assert code[:3].tolist() == pytest.approx([1, -0.5, 0])

    def test_the_files_biases_leave_its_b_pre_in_a_centred_reconstruction(self, pca: flux.PCA):
        eye, b_pre, b_post = torch.eye(self.d), torch.full((self.d,), 0.1), torch.full((self.d,), 0.4)
        sae = flux.of_file(eye, eye, b_pre, b_post, k=self.d)
        centre = pca.P @ pca.mu.double()  # u = 0: pre = b_pre - b_post, uhat = b_pre - b_post + b_post
        torch.testing.assert_close(
            flux.normalised(pca, flux.reconstruction(sae, pca, centre)), b_pre.double(), rtol=0, atol=1e-7
        )

    def test_a_file_holds_the_encoder_by_columns(self):
        W_enc, W_dec = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(11))
        sae = flux.of_file(W_enc.T, W_dec, torch.zeros(3), torch.zeros(3), k=2)
        assert torch.equal(sae.E, W_enc)
        assert torch.equal(sae.D, W_dec)

    def test_the_direction_moves_the_normalised_input_by_the_decoders_row(self, pca: flux.PCA):
        sae = random_sae(24, self.d, k=3)
        y = torch.randn(self.d, generator=torch.Generator().manual_seed(8)).double()
        moved = flux.normalised(pca, y + flux.direction(sae, pca, 5)) - flux.normalised(pca, y)
        torch.testing.assert_close(moved, sae.D[5].double())
        assert torch.equal(flux.direction(sae, pca, 5, "normalised"), sae.D[5].double())

    def test_the_files_moments_give_the_deviations(self):
        v = torch.randn(1000, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 2
        v[:, 2] = 5.0
        pca = flux.of_moments(torch.eye(3), v.mean(dim=0), (v**2).mean(dim=0))
        torch.testing.assert_close(pca.scale, torch.tensor([*v.std(dim=0, unbiased=False)[:2], 1e-3]))

    @pytest.mark.parametrize(("size", "grid"), [("square", (4, 4)), ("wide", (4, 8))])
    def test_a_rectangle_of_the_image_is_steered_on_the_first_five_steps(self, flux_pipe: Any, size: str, grid: tuple):
        v = torch.randn(self.d, generator=torch.Generator().manual_seed(10)).double()
        edit = flux.steer(flux_pipe, FLUX_BLOCK, v, 2.0, grid, (1, 3, 2, 4))
        with edit, watched(flux_pipe, FLUX_BLOCK, 1) as image, watched(flux_pipe, FLUX_BLOCK, 0) as text:
            flux_family.call(flux_pipe, ["a fox"], guidance=False, steps=7, size=size)
        assert all(torch.equal(before, after) for _, before, after in text)
        assert [torch.equal(before, after) for _, before, after in image] == [False] * 5 + [True] * 2
        _, before, after = image[0]
        inside = {h * grid[1] + w for h in (1, 2) for w in (2, 3)}
        for token in range(grid[0] * grid[1]):
            expected = 2 * v if token in inside else torch.zeros(self.d).double()
            torch.testing.assert_close((after - before)[0, token].double(), expected, rtol=0, atol=1e-5)

    def test_the_image_stream_is_the_blocks_second_output(self, flux_pipe: Any):
        with flux.image_stream(flux_pipe, FLUX_BLOCK) as found, watched(flux_pipe, FLUX_BLOCK, 1) as calls:
            flux_family.call(flux_pipe, ["a fox"], guidance=False, steps=2, size="wide")
        assert [tensor.shape for tensor in found] == [(1, 32, 16)] * 2
        assert all(torch.equal(tensor, after) for tensor, (_, _, after) in zip(found, calls, strict=True))
