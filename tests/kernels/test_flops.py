"""The FLOP formulas against hand counts, as FlopCounterMode sees them: forward, and backward where there is one."""

from collections.abc import Callable

import pytest
import sparsefeat_kernels as kernels
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROWS, D, N, K, F = 3, 4, 7, 2, 5
ops = torch.ops.sparsefeat


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()


def encoder() -> tuple[Tensor, ...]:
    return normal(ROWS, D), normal(N, D), normal(N), normal(D)


def code() -> tuple[Tensor, Tensor]:
    return torch.ones(ROWS, K).requires_grad_(), torch.tensor([[0, 3], [2, 1], [4, 0]], dtype=torch.int32)


def aux_code() -> tuple[Tensor, Tensor]:
    return torch.ones(ROWS, 1).requires_grad_(), torch.tensor([[1], [2], [0]], dtype=torch.int32)


def edit() -> tuple[Tensor, ...]:
    return *code(), torch.arange(F), normal(F, D), *(torch.ones(F) for _ in range(5)), torch.ones(ROWS)


def counted(run: Callable[[], Tensor], backward: bool = False) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        out = run()
        if backward:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return {str(op).removeprefix("sparsefeat."): n for op, n in counts.items() if "sparsefeat" in str(op)}


ENCODE, GATHER, EDIT = 2 * ROWS * N * D, 2 * ROWS * K * D, 2 * ROWS * F * D
zero = torch.tensor(0.0)


def prefiltered() -> torch.Tensor:
    x, W_enc, b_enc, b_pre = encoder()
    return kernels.topk_encode(x, W_enc, b_enc, b_pre, K, prepared=kernels.prepare_encoder(W_enc, b_enc))[0]


FORWARD = {
    "topk_encode": (lambda: kernels.topk_encode(*encoder(), K)[0], ENCODE),
    "topk_encode_prefiltered": (prefiltered, ENCODE),
    "auxk_encode": (lambda: kernels.auxk_encode(*encoder(), K, torch.arange(2), 1)[0], ENCODE),
    "threshold_encode": (lambda: kernels.threshold_encode(*encoder(), zero, K)[0], ENCODE),
    "threshold_encode_csr": (lambda: kernels.threshold_encode_csr(*encoder(), zero)[0], ENCODE),
    "sparse_decode": (lambda: kernels.sparse_decode(*code(), normal(N, D), normal(D)), GATHER),
    "auxk_decode": (
        lambda: kernels.auxk_decode(*code(), *aux_code(), torch.arange(5), normal(N, D), normal(D))[0],
        2 * ROWS * (K + 1) * D,
    ),
    "auxk_decode_grad_values": (
        lambda: ops.auxk_decode_grad_values(normal(ROWS, D), *aux_code(), torch.arange(5), normal(N, D)),
        2 * ROWS * 1 * D,
    ),
    "auxk_weight_gradient": (
        lambda: kernels.auxk_weight_gradient(
            *code(), normal(ROWS, D), *aux_code(), None, torch.arange(5), normal(D), N
        )[0],
        2 * ROWS * (K + 1) * D,
    ),
    "sparse_decode_grad_values": (
        lambda: ops.sparse_decode_grad_values(normal(ROWS, D), *code(), normal(N, D)),
        GATHER,
    ),
    "weight_gradient": (lambda: kernels.weight_gradient(*code(), normal(ROWS, D), normal(D), N)[0], GATHER),
    "sparse_edit_delta": (lambda: kernels.sparse_edit_delta(*edit()), EDIT),
    "sparse_edit": (lambda: kernels.sparse_edit(normal(ROWS, D), *edit()), EDIT),
}


@pytest.mark.parametrize("name", FORWARD)
def test_an_op_counts_as_two_flops_a_multiply_add(name: str):
    run, flops = FORWARD[name]
    with torch.no_grad():
        assert counted(run) == {name: flops}


BACKWARD = {
    # The gradients of x (a decode) and of the weights; that of b_pre is a product with W_enc, which torch counts.
    "topk_encode": {"topk_encode": ENCODE, "sparse_decode": GATHER, "weight_gradient": GATHER},
    "threshold_encode": {"threshold_encode": ENCODE, "sparse_decode": GATHER, "weight_gradient": GATHER},
    "sparse_decode": {"sparse_decode": GATHER, "sparse_decode_grad_values": GATHER, "weight_gradient": GATHER},
    "sparse_edit_delta": {
        "sparse_edit_delta": EDIT,
        "sparse_edit_grad_values": EDIT,
        "sparse_edit_grad_directions": EDIT,
    },
    "sparse_edit": {"sparse_edit": EDIT, "sparse_edit_grad_values": EDIT, "sparse_edit_grad_directions": EDIT},
}


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_count_through_the_ops_they_call(name: str):
    assert counted(FORWARD[name][0], backward=True) == BACKWARD[name]


def test_the_csr_gradient_counts_its_entries():
    x, W_enc, b_enc, b_pre = encoder()
    entries = kernels.threshold_encode_csr(x, W_enc, b_enc, b_pre, zero)[0].shape[0]
    assert counted(FORWARD["threshold_encode_csr"][0], backward=True) == {
        "threshold_encode_csr": ENCODE,
        "threshold_encode_csr_grad_x": 2 * entries * D,
        "threshold_encode_csr_grad_weights": 2 * entries * D,
    }


def test_matching_pursuit_counts_its_choices_and_its_steps():
    x, atoms = normal(ROWS, D).detach(), normal(N, D).detach()
    choices = 3 * 2 * ROWS * N * D
    residuals = 2 * ROWS * D * (0 + 1 + 2)
    inner_products_and_sums = 2 * (2 * ROWS * D * (1 + 2 + 3))
    lengths = 3 * 2 * 2 * ROWS * D
    for method, flops in {
        "matching": choices + residuals,
        "gradient": choices + residuals + inner_products_and_sums + lengths,
    }.items():
        run = lambda method=method: kernels.matching_pursuit(x, atoms, 3, method)[0]  # noqa: E731
        assert counted(run) == {"matching_pursuit": flops}


def test_meta_tensors_count_published_shapes_without_computing():
    with torch.device("meta"):
        x, W_enc, b_enc, b_pre = (
            torch.empty(4096, 1280),
            torch.empty(20480, 1280),
            torch.empty(20480),
            torch.empty(1280),
        )
    assert counted(lambda: kernels.topk_encode(x, W_enc, b_enc, b_pre, 32)[0]) == {
        "topk_encode": 2 * 4096 * 20480 * 1280
    }
