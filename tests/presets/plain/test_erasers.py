"""SAeUron and ItD: by hand-worked numbers, a complete SAE, and identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.presets.plain import itd, saeuron
from tests.presets.plain.dense import (
    DenseSAE,
    decode,
    random_sae,
    relu_then_topk,
    topk_then_relu,
)
from tests.presets.plain.small import (
    ROUNDING,
    SD_BLOCK,
    complete_sae,
    run,
    watched,
)


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
