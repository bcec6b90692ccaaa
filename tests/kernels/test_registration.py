"""The ops as citizens of torch: opcheck on both implementations, torch.compile, and what importing them brings in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sparsefeat_kernels as kernels
import torch


@pytest.fixture
def memory() -> None:
    """Real memory: here torch traces the programs that allocate."""


def calls(device: str) -> dict[str, tuple]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(device).requires_grad_()

    indices = torch.tensor([[0, 3], [2, 1], [4, 0]], dtype=torch.int32, device=device)
    values, rows = normal(3, 2), torch.zeros(3, dtype=torch.int32, device=device)
    latents, rule = torch.tensor([0, 2], device=device), [normal(2).detach() for _ in range(5)]
    tables = torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 5)
    csr = normal(4).detach(), indices.view(-1)[:4], torch.tensor([0, 1, 4, 4], device=device)
    edit = (values, indices, latents, normal(2, 4), *rule, normal(3).detach())
    query, key = normal(2, 4, 3, 5).detach(), normal(2, 2, 6, 5).detach()
    maps, lse = torch.zeros(2, 3, 6, device=device), torch.ones(2, 4, 3, device=device)
    kept, chosen, group = torch.ones(2, 6, dtype=torch.bool, device=device), latents, torch.tensor([-1, 1]).to(device)
    weighted = (0.5, kept, normal(4).detach(), group)
    return {
        "attention_map_": (maps[..., :2].clone(), query, key, *weighted, chosen),
        "attention_with_map_": (maps, query, key, key[..., :3], *weighted, None),
        "attention_map": (query.clone().requires_grad_(), key.clone().requires_grad_(), *weighted[:-1], chosen),
        "attention_map_gradient": (maps[..., :2].clone(), query, key, *weighted[:-1], chosen),
        "attention_tap_": (maps, query, key, lse, *weighted),
        "concept_attention": (query, query, query, *(query[:, :, :2],) * 2, 0.5),
        "concept_map_": (maps[..., :2].clone(), query, query[:, :, :2], normal(4).detach(), group, True),
        "resize_add_": (maps.clone(), maps[None, ..., :2], normal(1).detach(), True),
        "attention_rows": (query, key, 0.5, kept, kept[0]),
        "attention_column_sums_": (maps[:, 0].clone(), query, key, lse, *weighted),
        "topk_encode": (normal(3, 4), normal(5, 4), normal(5), normal(4), 2, "relu"),
        "auxk_encode": (
            *(normal(3, 4), normal(5, 4), normal(5), normal(4)),
            2,
            torch.tensor([1, 2, 4], device=device),
            2,
            "relu",
            None,
            None,
        ),
        "auxk_decode": (
            values,
            indices,
            values,
            indices,
            torch.tensor([0, 1, 2, 3, 4]).to(device),
            normal(5, 4),
            normal(4),
        ),
        "auxk_decode_grad_values": (
            *(normal(3, 4).detach(), values.detach(), indices),
            torch.tensor([0, 1, 2, 3, 4], device=device),
            normal(5, 4).detach(),
        ),
        "auxk_weight_gradient": (
            *(values.detach(), indices, normal(3, 4).detach()),
            *(values.detach(), indices, normal(3, 4).detach()),
            torch.tensor([0, 1, 2, 3, 4], device=device),
            normal(4).detach(),
            5,
        ),
        "topk_encode_prefiltered": (
            *(normal(3, 4), normal(5, 4), normal(5), normal(4)),
            torch.zeros(5, 32, dtype=torch.bfloat16, device=device),
            torch.zeros(3, 5, device=device),
            2,
            "relu",
        ),
        "threshold_encode": (
            normal(3, 4),
            normal(5, 4),
            normal(5),
            normal(4),
            torch.rand(5, generator=g).to(device),
            4,
        ),
        "threshold_encode_csr": (normal(3, 4), normal(5, 4), normal(5), normal(4), torch.tensor(0.5, device=device)),
        "threshold_encode_csr_grad_x": (*csr, normal(5, 4).detach()),
        "threshold_encode_csr_grad_weights": (*csr, normal(3, 4).detach(), normal(4).detach(), 5),
        "matching_pursuit": (normal(3, 4).detach(), normal(5, 4).detach(), 2, "gradient", True),
        "sparse_decode": (values, indices, normal(5, 4), normal(4)),
        "sparse_decode_grad_values": (normal(3, 4).detach(), values.detach(), indices, normal(5, 4).detach()),
        "weight_gradient": (values.detach(), indices, normal(3, 4).detach(), normal(4).detach(), 5),
        "sparse_edit_delta": edit,
        "sparse_edit": (normal(3, 4), *edit),
        "feature_stats_": (*(t.to(device) for t in tables), values.detach(), indices, rows),
    }


@pytest.mark.parametrize("name", calls("cpu"))
def test_opcheck(path: str, name: str):
    torch.library.opcheck(getattr(torch.ops.sparsefeat, name).default, calls(path)[name])


def answers(name: str, dtype: torch.dtype, given: tuple[Any, ...] | None = None) -> list[torch.Tensor]:
    """What an op gives, and what it writes into, for inputs of a dtype; its gradients."""
    arguments = [
        a.detach().to(dtype, copy=True) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in given or calls("cpu")[name]
    ]
    written = [a for a in arguments[:3] if name.endswith("_") and isinstance(a, torch.Tensor)]
    if name.endswith("_"):  # tables, sums and maps are float32
        arguments[: len(written)] = written = [a.float() if a.is_floating_point() else a for a in written]
    else:
        arguments = [
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
        ]
    found = getattr(torch.ops.sparsefeat, name)(*arguments)
    found = [found] if isinstance(found, torch.Tensor) else [t for t in found or () if isinstance(t, torch.Tensor)]
    if differentiable := [t for t in found if t.requires_grad]:
        inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        total = sum(t.float().square().sum() for t in differentiable)
        try:
            found += [g for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None]
        except RuntimeError as error:  # some are themselves the gradient of another
            if "no autograd formula" not in str(error):
                raise
    return [*found, *written]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", calls("cpu"))
def test_autocast_does_not_reach_into_an_op(name: str, dtype: torch.dtype):
    try:
        plain = answers(name, dtype)
    except TypeError as refusal:
        if dtype == torch.float32:  # every op takes it
            raise
        pytest.skip(f"{dtype}: {refusal}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = answers(name, dtype)
    assert [t.dtype for t in inside] == [t.dtype for t in plain]
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", calls("cpu"))
def test_the_default_dtype_does_not_reach_into_an_op(name: str, default: torch.dtype):
    plain, given = answers(name, torch.float32), calls("cpu")[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        inside = answers(name, torch.float32, given)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_reach_into_an_encoder_that_rounds_first(dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=g).to(dtype) for size in ((300, 512), (8192, 512), (8192,), (512,))]

    def codes() -> list[torch.Tensor]:
        csr = kernels.threshold_encode(*inputs, torch.tensor(80.0, dtype=torch.float32), 64)
        return [*kernels.topk_encode(*inputs, 9), *csr]

    plain = codes()
    torch.set_default_dtype(torch.float64)
    try:
        inside = codes()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_training_step_compiles_to_one_graph():
    g = torch.Generator().manual_seed(0)
    sizes = ((6, 4), (9, 4), (9,), (4,), (9, 4))
    inputs = [torch.randn(size, generator=g) for size in sizes]
    latents, one = torch.tensor([1, 2]), torch.ones(2)
    bounds = -torch.inf * one, torch.inf * one, -torch.inf * one

    def step(x, W_enc, b_enc, b_pre, W_dec):
        values, indices = kernels.topk_encode(x, W_enc, b_enc, b_pre, 3)
        y = kernels.sparse_decode(values, indices, W_dec, b_pre)
        y = kernels.sparse_edit(y, values, indices, latents, W_dec[latents], one * 2, one, *bounds, torch.ones(6))
        count = torch.zeros(1, 9, dtype=torch.int32)
        kernels.feature_stats_(
            torch.zeros(1, 9), count, torch.zeros(1, 9), values.detach(), indices, torch.zeros(6, dtype=torch.int32)
        )
        return (y - x).square().sum(), count

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = [t.clone().requires_grad_() for t in inputs]
        loss, count = run(*tensors)
        loss.backward()
        results.append((loss.detach(), count, *(t.grad for t in tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_importing_the_kernels_imports_only_torch_triton_and_the_standard_library():
    program = """
import sys
import torch
try:
    import triton, triton.language
except ImportError:
    pass
before = set(sys.modules)
import sparsefeat_kernels
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(roots - set(sys.stdlib_module_names) - {"torch", "triton", "sparsefeat_kernels"}))
print(sorted({"diffusers", "transformers", "sparsefeat", "numpy.testing"} & set(sys.modules)))
"""
    assert run_python(program) == "[]\n[]\n"


def test_without_triton_everything_works_on_the_cpu_path():
    program = """
import sys
sys.modules["triton"] = None
import torch, sparsefeat_kernels as kernels
with kernels.force_triton():
    print(kernels.topk_encode(torch.ones(1, 2), torch.eye(2), torch.arange(2.0), torch.zeros(2), 1))
"""
    assert run_python(program) == "(tensor([[2.]]), tensor([[1]], dtype=torch.int32))\n"


def run_python(program: str) -> str:
    folder = str(Path(kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": folder}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
