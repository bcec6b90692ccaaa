"""Another default device of torch's changes nothing of an SAE's code, and what keeps its counts on the CPU refuses it."""

import pytest
import torch
from sparsefeat_kernels import prepare_encoder, topk_encode

import sparsefeat as sf
from tests.pipeline.instruments import BLOCK, Watch
from tests.sae.dense import CASES, random_sae
from tests.tiny import pixels, tiny_sd


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_codes_and_reconstructions_are_the_same(case):
    sae = random_sae(*case)
    x = torch.randn(50, sae.d_model, generator=torch.Generator().manual_seed(1))

    def computed() -> list[torch.Tensor]:
        code = sae.encode(x)
        return [code.dense(), code.select([3, 1]), sae.decode(code, like=x)]

    plain = computed()
    with torch.device("meta"):
        inside = computed()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_encoder_is_prepared_where_its_weights_are(threads):
    torch.manual_seed(0)
    x, W, b = torch.randn(64, 24), torch.randn(300, 24), torch.randn(300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.device("meta"):
            prepared = prepare_encoder(W, b)
            again = prepare_encoder(W, b, into=prepared)
            code = topk_encode(x, W, b, torch.zeros_like(x[0]), 4, prepared=again)
    finally:
        torch.set_num_threads(before)
    kept = prepare_encoder(W, b).rounded
    assert again.rounded is not None
    assert kept is not None
    assert all(torch.equal(a, b) for a, b in zip(again.rounded, kept, strict=True))
    pre = x.double() @ W.double().T + b.double()
    assert torch.equal(code[1].sort().values.long(), pre.topk(4).indices.sort().values)


def test_attaching_calling_and_training_say_what_to_do():
    pipe, watch = tiny_sd(), Watch(BLOCK)
    words = r"torch's default device is meta, .*; torch\.set_default_device\('cpu'\)"
    with torch.device("meta"), pytest.raises(RuntimeError, match=words):
        sf.attach(pipe, watch)
    assert "_sparsefeat_wiring" not in vars(type(pipe))
    with sf.attach(pipe, watch) as run:
        with torch.device("meta"), pytest.raises(RuntimeError, match=words):
            pixels(pipe)
        pixels(pipe)
        assert run[watch] > 0
    sae, rows = sf.SAE(sf.SAEConfig(d_model=8, n_latents=16, k=2)), torch.randn(64, 8)
    with torch.device("meta"), pytest.raises(RuntimeError, match=words):
        sf.SAETrainer(sae, rows, sf.TrainConfig(steps=1, batch_size=8))
