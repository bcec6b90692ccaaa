"""The derivations themselves: by hand-worked numbers, by what a complete SAE has to give, and by identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import flux as flux_family
from tests.presets.plain import flux, steerers, unbox
from tests.presets.plain.dense import (
    DenseSAE,
    decode,
    keep_largest,
    preactivations,
    random_sae,
    relu_then_topk,
    topk_then_relu,
)
from tests.presets.plain.sites import at_steps
from tests.presets.plain.small import (
    FLUX_BLOCK,
    ROUNDING,
    SD_BLOCK,
    run,
    watched,
)
from tests.tiny import tiny_sd


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
