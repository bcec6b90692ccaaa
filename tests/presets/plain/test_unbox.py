"""SDXL-Unbox's edits and transport between pictures: by hand-worked numbers, a complete SAE, and identities."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.presets.plain import unbox
from tests.presets.plain.dense import (
    random_sae,
)
from tests.presets.plain.sites import at_steps
from tests.presets.plain.small import (
    ROUNDING,
    SDXL_BLOCK,
    SDXL_OTHER,
    complete_sae,
    run,
    unguided,
    watched,
)
from tests.tiny import tiny_sdxl


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
