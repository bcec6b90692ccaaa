"""The ops as figures: inputs, references, what counts as right, what it costs, ours and plain dense PyTorch.

`build(op, shape, dtype, device)` makes a `Figure` for `measure`. The repository's bench/ adds other libraries to the
same figures; `sparsefeat bench` measures these on the machine it runs on (`measure_here`).

Formulas of cost. FLOPs: a multiply-add is two. Bytes: inputs read once and outputs written once, but the rows of a
dictionary that a code gathers count as often as they are gathered (rows k d); where the dictionary fits a cache, a
share of the ceiling above 1 is possible, and so it is where fewer bits do the work (a bf16 product that finds the
candidates of an fp32 one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sparsefeat_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.evaluation.measure import DENSE, OURS, Ceilings, Figure, Provider, measure
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.sae.module import _PREPARED
from sparsefeat.training.objectives import training_loss

PREPARED = f"{OURS}, weights prepared"
AUXK = 1 / 32
EDITED = 8
GAMMA = -2.0  # SAeUron's multipliers are negative
GROUPS = 8

CHECKED_ROWS = 32
CHECKED_LATENTS = 1024
LATENT_TILE = 1 << 15  # fp64 copies of encoder rows, a tile at a time: 200 MiB at d = 768

# What an answer may differ from the fp64 reference by. Pre-activations: as a share of the row's largest (fp32: some
# hundred times the rounding of a sum of 4096; half: one rounding of the output and of x - b_pre each). Outputs: relative.
PREACTIVATION = {"float64": 2**-40, "float32": 2**-16, "bfloat16": 2**-6, "float16": 2**-9}
OUTPUT = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
HALF = ("bfloat16", "float16")
# Gradients of a step, relative, fp32: a latent that changes places with its tie is one term of rows * k.
GRADIENT = 1e-2
# In half precision every second row has such a tie: direction and length are compared instead.
COSINE = 0.97


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def itemsize(name: str) -> int:
    return torch_dtype(name).itemsize


def checked_rows(rows: int) -> Tensor:
    """Rows that are compared: evenly spread, the first and the last among them, so that every chunk is seen."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long().unique()


def relative(answer: Tensor, reference: Tensor) -> float:
    difference = (answer.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


# ----------------------------------------------------------------------------------------------------- SAEs: the inputs


@dataclass(frozen=True)
class SAECase:
    """Activations and an SAE of unit encoder and decoder rows; `b` is subtracted before encoding and added after.

    values, indices: a code of k distinct latents a row. dead: the latents AuxK is over, twice d_model of them.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b: Tensor
    k: int
    values: Tensor
    indices: Tensor
    dead: Tensor
    dtype: str
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        return checked_rows(len(self.x)).to(self.x.device)

    @cached_property
    def preactivations(self) -> Tensor:
        """fp64 [checked rows, n_latents], a tile of latents at a time."""
        centred = self.x[self.rows].double() - self.b.double()
        tiles = zip(self.W_enc.split(LATENT_TILE), self.b_enc.split(LATENT_TILE), strict=True)
        return torch.cat([centred @ w.double().T + b.double() for w, b in tiles], dim=1)

    @cached_property
    def dense_code(self) -> Tensor:
        return self.values.new_zeros(len(self.x), len(self.W_dec)).scatter_(1, self.indices.long(), self.values)

    @cached_property
    def is_dead(self) -> Tensor:
        mask = torch.zeros(len(self.W_enc), dtype=torch.bool, device=self.x.device)
        mask[self.dead] = True
        return mask

    @cached_property
    def training_reference(self) -> dict[str, Tensor]:
        W_enc, b_enc, W_dec, b = (t.double() for t in (self.W_enc, self.b_enc, self.W_dec, self.b))
        return dense_step(self.x.double(), W_enc, b_enc, W_dec, b, self.k, self.is_dead)


def sae_case(
    rows: int, d_model: int, n_latents: int, k: int, dtype: str, device: str, seed: int, dead_norm: float = 1.0
) -> SAECase:
    """Random activations, weights and codes. dead_norm: of the dead latents' encoder rows; well below 1 they are never
    among the k largest, and stay dead."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    def unit_rows() -> Tensor:
        w = normal(n_latents, d_model)
        return w.div_(w.norm(dim=1, keepdim=True))

    # One latent from each of k stretches of the dictionary: distinct, and anywhere in memory.
    stretch = n_latents // k
    indices = torch.randint(stretch, (rows, k), generator=g, device=device) + torch.arange(k, device=device) * stretch
    n_dead = min(2 * d_model, n_latents // 2)
    dead = torch.randperm(n_latents, generator=g, device=device)[:n_dead].sort().values
    W_enc = unit_rows()
    W_enc[dead] *= dead_norm
    small = [(0.1 * normal(size)).to(torch_dtype(dtype)) for size in (n_latents, d_model)]
    values = normal(rows, k).abs_().add_(0.1).to(torch.float64 if dtype == "float64" else torch.float32)
    return SAECase(
        normal(rows, d_model).to(torch_dtype(dtype)), W_enc.to(torch_dtype(dtype)), small[0],
        unit_rows().to(torch_dtype(dtype)), small[1], k,
        values, indices.int(), dead, dtype,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- SAEs: what is right


def code_fault(case: SAECase, answer: Any) -> str:
    """`answer`: values and indices, or the dense code. A tolerance-aware comparison of sets: every latent that is in
    has its value, and no latent left out is more than the tolerance above one that is in."""
    if isinstance(answer, Tensor):
        values, indices = answer[case.rows].topk(case.k)
    else:
        values, indices = (t[case.rows] for t in answer)
    a, values, indices = case.preactivations, values.double(), indices.long()
    if tuple(values.shape) != (len(case.rows), case.k):
        return f"the code has shape {tuple(values.shape)}"
    if not values.isfinite().all():
        return "values are not finite"
    tolerance = PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    chosen = a.gather(1, indices)
    off = ((chosen.relu() - values).abs() / tolerance).amax()
    if off > 1:
        return f"a value is {float(off):.1f} tolerances off"
    ordered = indices.sort(1).values
    if ((ordered.diff(dim=1) == 0) & (values.sort(1).values[:, 1:] > 0)).any():
        return "a latent was chosen twice"
    left_out = a.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    missed = (left_out - chosen.amin(1, keepdim=True)).relu() / tolerance
    if missed.amax() > 1:
        return f"a latent that was left out is {float(missed.amax()):.1f} tolerances above one that is in"
    return ""


def reconstruction_fault(case: SAECase, answer: Tensor) -> str:
    """Against the reconstruction in fp64. Latents within the tolerance of the k-th may be in or out: what they could
    change is allowed for, row by row."""
    a = case.preactivations
    top, indices = a.topk(case.k)
    reference = (top.relu()[:, None] @ case.W_dec[indices].double())[:, 0] + case.b.double()
    near = (a - top[:, -1:]).abs() <= PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    near &= near.sum(1, keepdim=True) > 1
    slack = (torch.where(near, a.relu(), 0)).sum(1) * case.W_dec.double().norm(dim=1).amax()
    errors = (answer[case.rows].double() - reference).norm(dim=1)
    allowed = OUTPUT[case.dtype] * reference.norm(dim=1) + slack
    worst = (errors / allowed).amax()
    return "" if worst <= 1 else f"a row is {float(worst):.1f} tolerances off"


def decode_fault(case: SAECase, answer: Tensor) -> str:
    gathered = case.W_dec[case.indices[case.rows].long()].double()
    reference = (case.values[case.rows].double()[:, None] @ gathered)[:, 0] + case.b.double()
    return output_fault(answer[case.rows], reference, case.dtype)


def output_fault(answer: Tensor, reference: Tensor, dtype: str) -> str:
    off = relative(answer, reference) / OUTPUT[dtype]
    return "" if off <= 1 else f"the answer is {off:.1f} tolerances off"


def training_fault(case: SAECase, answer: Mapping[str, Any]) -> str:
    """The loss and its gradients, of CHECKED_LATENTS latents. Encoder rows of dead ones are left out: some libraries'
    AuxK does not reach them."""
    reference = case.training_reference
    spread = torch.linspace(0, len(case.W_enc) - 1, min(len(case.W_enc), CHECKED_LATENTS), device=case.x.device)
    every = spread.round().long().unique()
    live = every[~case.is_dead[every]]
    pairs = {
        "W_dec": (answer["W_dec"][every], reference["W_dec"][every]),
        "W_enc": (answer["W_enc"][live], reference["W_enc"][live]),
        "b_enc": (answer["b_enc"][live], reference["b_enc"][live]),
    }
    half = case.dtype in HALF
    if abs(float(answer["loss"]) / float(reference["loss"]) - 1) > (0.02 if half else 1e-3):
        return f"the loss is {float(answer['loss']):.5f}, not {float(reference['loss']):.5f}"
    for name, (got, wanted) in pairs.items():
        cosine = float(F.cosine_similarity(got.double().flatten(), wanted.flatten(), dim=0))
        ratio = float(got.double().norm() / wanted.norm())
        if half and (cosine < COSINE or abs(ratio - 1) > 0.05):
            return f"the gradient of {name} has cosine {cosine:.3f} and {ratio:.3f} of the length"
        if not half and relative(got, wanted) > GRADIENT:
            return f"the gradient of {name} is {relative(got, wanted):.4f} off"
    return ""


# ----------------------------------------------------------------------------------------------- SAEs: dense PyTorch


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> Tensor:
    """What SAELens computes: every pre-activation, the k largest of a row, and zeros elsewhere."""
    values, indices = ((x - b) @ W_enc.T + b_enc).topk(k, sorted=False)
    return values.new_zeros(len(x), len(W_enc)).scatter_(1, indices, values.relu())


def dense_step(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int, is_dead: Tensor
) -> dict[str, Tensor]:
    """Loss and gradients of `sparsefeat.training.objectives`, from dense codes."""
    W_enc, b_enc, W_dec, b = (t.detach().requires_grad_() for t in (W_enc, b_enc, W_dec, b))
    with torch.enable_grad():
        loss = dense_loss(x, W_enc, b_enc, W_dec, b, k, is_dead)
        names = ("W_enc", "b_enc", "W_dec", "b")
        gradients = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b))
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def dense_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int, is_dead: Tensor) -> Tensor:
    a = (x - b) @ W_enc.T + b_enc
    values, indices = a.topk(k, sorted=False)
    x_hat = torch.zeros_like(a).scatter(1, indices, values.relu()) @ W_dec + b
    variance = (x - x.mean(0)).square().sum()
    n_dead, wanted = int(is_dead.sum()), x.shape[1] // 2
    values, indices = torch.where(is_dead, a, -torch.inf).topk(min(wanted, n_dead), sorted=False)
    guess = torch.zeros_like(a).scatter(1, indices, values.relu()) @ W_dec
    missed = (guess - (x - x_hat).detach()).square().sum()
    return ((x - x_hat).square().sum() + AUXK * min(n_dead / wanted, 1.0) * missed) / variance


def as_sae(case: SAECase) -> SAE:
    """A trainable SAE that shares the case's weights."""
    config = SAEConfig(d_model=case.x.shape[1], n_latents=len(case.W_enc), activation="topk", k=case.k)
    with torch.device("meta"):
        sae = SAE(config)
    weights = {"W_enc": case.W_enc, "b_enc": case.b_enc, "W_dec": case.W_dec, "b_pre": case.b, "b_out": case.b}
    for name, tensor in weights.items():
        setattr(sae, name, torch.nn.Parameter(tensor.detach()))
    return sae.train()


def forget_step(state: tuple[SAECase, SAE]) -> None:
    """Gradients' memory and prepared weights: both are as large as the weights."""
    kernels.release_gradient_memory()
    _PREPARED.pop(state[1], None)


def our_step(state: tuple[SAECase, SAE]) -> dict[str, Tensor]:
    case, sae = state
    with torch.no_grad():
        sae.b_enc.add_(0.0)  # an optimiser's step would change the weights: nothing made from them may be kept
    loss = training_loss(sae, case.x, case.is_dead, auxk=AUXK).total
    gradients = torch.autograd.grad(loss, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_pre, sae.b_out))
    return {"loss": loss.detach(), **dict(zip(("W_enc", "b_enc", "W_dec"), gradients[:3], strict=True))}


# ----------------------------------------------------------------------------------------------------- SAEs: providers


def prepare_weights(case: SAECase) -> tuple[SAECase, Any]:
    return case, kernels.prepare_encoder(case.W_enc, case.b_enc)


def our_encode(case: SAECase, prepared: Any = None) -> tuple[Tensor, Tensor]:
    weights = (case.W_enc, case.b_enc, case.b)
    return kernels.topk_encode(case.x, *weights, case.k, prepared=prepared)


def our_forward(case: SAECase, prepared: Any = None) -> Tensor:
    return kernels.sparse_decode(*our_encode(case, prepared), case.W_dec, case.b)


def with_prepared(run: Callable[..., Any]) -> list[Provider]:
    note = "the weights' bf16 copy and norms are kept between calls"
    return [Provider(PREPARED, lambda state: run(*state), prepare_weights, note=note)]


def product_fault(case: SAECase, answer: Tensor) -> str:
    wanted = case.preactivations
    off = ((answer[case.rows].double() - wanted).abs() / (PREACTIVATION[case.dtype] * wanted.abs().amax())).amax()
    return "" if off <= 1 else f"the product is {float(off):.1f} tolerances off"


PRODUCT = Provider(
    "the product alone",
    lambda case: F.linear(case.x, case.W_enc, case.extra["bias"]),
    lambda case: (case.extra.setdefault("bias", case.b_enc - case.W_enc @ case.b), case)[1],
    check=product_fault,
    bound=True,
    note="F.linear, which writes [rows, n_latents]: no code is selected",
)


def _encode_providers() -> list[Provider]:
    return [
        Provider(OURS, our_encode),
        *with_prepared(our_encode),
        PRODUCT,
        Provider(DENSE, lambda c: dense_encode(c.x, c.W_enc, c.b_enc, c.b, c.k)),
    ]


def _decode_providers() -> list[Provider]:
    def dense(case: SAECase) -> Tensor:
        return case.extra["code"] @ case.W_dec + case.b

    def dense_inputs(case: SAECase) -> SAECase:
        case.extra["code"] = case.dense_code.to(case.W_dec.dtype)
        return case

    return [
        Provider(OURS, lambda c: kernels.sparse_decode(c.values, c.indices, c.W_dec, c.b)),
        Provider(DENSE, dense, dense_inputs),
    ]


def _forward_providers() -> list[Provider]:
    return [
        Provider(OURS, our_forward),
        *with_prepared(our_forward),
        Provider(DENSE, lambda c: dense_encode(c.x, c.W_enc, c.b_enc, c.b, c.k) @ c.W_dec + c.b),
    ]


def _training_providers() -> list[Provider]:
    return [
        Provider(OURS, our_step, lambda case: (case, as_sae(case)), forget=forget_step),
        Provider(DENSE, lambda c: dense_step(c.x, c.W_enc, c.b_enc, c.W_dec, c.b, c.k, c.is_dead)),
    ]


# Edit: EDITED latents of every row's code are multiplied by GAMMA.


def _edited(case: SAECase) -> Tensor:
    return case.indices[0, :EDITED].long()


def _edit_inputs(case: SAECase) -> SAECase:
    latents = _edited(case)
    one = torch.ones(len(latents), device=case.x.device)
    rule = (GAMMA * one, 0 * one, -torch.inf * one, torch.inf * one, -torch.inf * one)
    weight = torch.ones(len(case.x), device=case.x.device)
    case.extra["edit"] = (latents, case.W_dec[latents], *rule, weight)
    return case


def _dense_edit(case: SAECase) -> Tensor:
    """SAeUron's way: the difference of two dense reconstructions."""
    code = case.extra["code"]
    changed = code.clone()
    changed[:, case.extra["latents"]] *= GAMMA
    return case.x + (changed @ case.W_dec - code @ case.W_dec)


def _dense_edit_inputs(case: SAECase) -> SAECase:
    case.extra.update(code=case.dense_code.to(case.W_dec.dtype), latents=_edited(case))
    return case


def edit_fault(case: SAECase, answer: Tensor) -> str:
    latents, rows = _edited(case), case.rows
    hit = case.indices[rows].long()[:, :, None] == latents
    z = (case.values[rows].double()[:, :, None] * hit).sum(1)
    reference = case.x[rows].double() + (GAMMA - 1) * z @ case.W_dec[latents].double()
    return output_fault(answer[rows], reference, case.dtype)


def _edit_providers() -> list[Provider]:
    return [
        Provider(OURS, lambda c: kernels.sparse_edit(c.x, c.values, c.indices, *c.extra["edit"]), _edit_inputs),
        Provider(DENSE, _dense_edit, _dense_edit_inputs),
    ]


# Statistics: sum, count and maximum of every latent, in GROUPS groups of rows.


def _tables(case: SAECase) -> tuple[SAECase, Tensor, list[Tensor]]:
    device, size = case.x.device, (GROUPS, len(case.W_enc))
    group = torch.arange(len(case.x), device=device) % GROUPS
    zeros = torch.zeros(size, device=device)
    return case, group, [zeros, torch.zeros(size, dtype=torch.int32, device=device), zeros.clone()]


def _our_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    kernels.feature_stats_(total, count, maximum, case.values, case.indices, group)
    return [total, count, maximum]


def _dense_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    z = case.dense_code
    total.index_add_(0, group, z)
    count.index_add_(0, group, (z != 0).int())
    maximum.index_reduce_(0, group, z, "amax")
    return [total, count, maximum]


def _scattered_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    keys = (group[:, None] * total.shape[1] + case.indices).view(-1)
    values = case.values.reshape(-1)
    total.view(-1).scatter_add_(0, keys, values)
    count.view(-1).scatter_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
    maximum.view(-1).scatter_reduce_(0, keys, values, "amax")
    return [total, count, maximum]


def statistics_fault(case: SAECase, answer: list[Tensor]) -> str:
    wanted = [t.cpu() for t in _scattered_statistics(_tables(case))]
    total, count, maximum = (t.cpu() for t in answer)
    if not torch.equal(count, wanted[1]) or not torch.equal(maximum, wanted[2]):
        return "counts or maxima are not right"
    return output_fault(total, wanted[0], "float32")


def _statistics_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_statistics, _tables, lambda state, tables: [t.clone() for t in tables]),
        Provider(DENSE, _dense_statistics, _tables, lambda state, tables: [t.clone() for t in tables],
                 note="from a dense code that is given"),
        Provider("scatter_add_ + scatter_reduce_", _scattered_statistics, _tables,
                 lambda state, tables: [t.clone() for t in tables]),
    ]  # fmt: skip


# The gradient of a decoder: z^T x.


def _dense_gradient(case: SAECase) -> tuple[Tensor, Tensor]:
    z = case.extra["code"]
    return z.T @ (case.x - case.b), z.sum(0)


def gradient_fault(case: SAECase, answer: tuple[Tensor, Tensor]) -> str:
    latents = checked_rows(len(case.W_enc)).to(case.x.device)
    z = case.dense_code[:, latents].double()
    return output_fault(answer[0][latents], z.T @ (case.x.double() - case.b.double()), case.dtype)


def _gradient_providers() -> list[Provider]:
    def ours(case: SAECase) -> tuple[Tensor, Tensor]:
        return kernels.weight_gradient(case.values, case.indices, case.x, case.b, len(case.W_enc))

    def forget(_: SAECase) -> None:
        kernels.release_gradient_memory()

    return [Provider(OURS, ours, forget=forget), Provider(DENSE, _dense_gradient, _dense_edit_inputs)]


# Threshold encoding (JumpReLU): a threshold that k latents a row pass on average.


def _threshold(case: SAECase) -> float:
    return float(case.preactivations.topk(case.k).values[:, -1].mean())


def threshold_inputs(case: SAECase) -> tuple[SAECase, Tensor]:
    return case, torch.tensor(_threshold(case), device=case.x.device, dtype=case.x.dtype)


def _our_threshold(state: tuple[SAECase, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    case, threshold = state
    most = min(8 * case.k, len(case.W_enc))
    return kernels.threshold_encode(case.x, case.W_enc, case.b_enc, case.b, threshold, most)


def _dense_threshold(state: tuple[SAECase, Tensor]) -> Tensor:
    case, threshold = state
    a = (case.x - case.b) @ case.W_enc.T + case.b_enc
    return a * (a > threshold)


def _threshold_dense_rows(state: tuple[SAECase, Tensor], answer: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    case = state[0]
    values, indices, counts = (t[case.rows] for t in answer)
    z = values.new_zeros(len(case.rows), len(case.W_enc)).scatter_add_(1, indices.long(), values)
    return torch.where((counts > values.shape[1])[:, None], torch.nan, z)  # a row that overflowed is not right


def threshold_fault(case: SAECase, answer: Tensor) -> str:
    a, threshold = case.preactivations, float(threshold_inputs(case)[1])
    tolerance = PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    wanted = torch.where(a > threshold, a, 0)
    undecided = (a - threshold).abs() <= tolerance
    right = ((answer.double() - wanted).abs() <= tolerance) | (
        undecided & ((answer == 0) | (answer - a).abs().le(tolerance))
    )
    return "" if bool(right.all()) else "a latent is active that should not be, or has another value"


def _threshold_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_threshold, threshold_inputs, _threshold_dense_rows),
        PRODUCT,
        Provider(DENSE, _dense_threshold, threshold_inputs, lambda state, z: z[state[0].rows]),
    ]


# Matching pursuit over the decoder's rows (ITDA).


def _dense_pursuit(case: SAECase) -> tuple[Tensor, Tensor]:
    """Plain matching pursuit: k products with the whole dictionary, one atom a row each."""
    residual, values, indices = case.x.clone(), [], []
    for _ in range(case.k):
        c = residual @ case.W_dec.T
        best = c.abs().argmax(1)
        step = c.gather(1, best[:, None])
        residual -= step * case.W_dec[best]
        values.append(step)
        indices.append(best[:, None])
    return torch.cat(values, 1), torch.cat(indices, 1)


def pursuit_fault(case: SAECase, answer: tuple[Tensor, Tensor]) -> str:
    """Ways part at near-ties: what must agree is how much of every row is left."""
    rows = case.rows
    part = SAECase(
        case.x[rows].double(), case.W_enc, case.b_enc, case.W_dec.double(), case.b, case.k, case.values, case.indices,
        case.dead, case.dtype,
    )  # fmt: skip
    left = []
    for values, indices in (_dense_pursuit(part), tuple(t[rows] for t in answer)):
        spent = (values.double()[:, None] @ part.W_dec[indices.long()])[:, 0]
        left.append((part.x - spent).norm(dim=1))
    off = float(((left[1] - left[0]) / left[0]).abs().mean())
    return "" if off < 1e-3 else f"{off:.4f} more or less of the rows is left"


def _pursuit_providers() -> list[Provider]:
    def ours(case: SAECase) -> tuple[Tensor, Tensor]:
        return kernels.matching_pursuit(case.x, case.W_dec, case.k, "matching")

    return [Provider(OURS, ours), Provider(DENSE, _dense_pursuit)]


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionCase:
    """q, k, v [batch, heads, positions, width]. Cross-attention: maps over all keys, of all positions. Joint attention:
    the keys are `text` text tokens and then the image's; maps of the first `selected` of them, of the image's rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    text: int
    selected: int
    joint: bool
    dtype: str

    @property
    def image_rows(self) -> slice:
        return slice(self.text if self.joint else 0, None)

    def empty_maps(self) -> Tensor:
        positions = self.q[:, :, self.image_rows].shape[2]
        return torch.zeros(len(self.q), positions, self.selected, device=self.q.device)


def attention_case(
    batch: int, heads: int, n: int, t: int, d: int, selected: int, joint: bool, dtype: str, device: str, seed: int
) -> AttentionCase:
    g = torch.Generator(device).manual_seed(seed)

    def normal(length: int) -> Tensor:
        return torch.randn(batch, heads, length, d, generator=g, device=device).to(torch_dtype(dtype))

    q = normal(n + t if joint else n)
    k, v = (normal(n + t if joint else t) for _ in range(2))
    return AttentionCase(q, k, v, t, selected, joint, dtype)


def attention_fault(case: AttentionCase, answer: tuple[Tensor, Tensor]) -> str:
    out, maps = answer
    rows = checked_rows(maps.shape[1]).to(case.q.device)
    q = case.q[:, :, case.image_rows][:, :, rows].double()
    p = (q @ case.k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return output_fault(out[:, :, case.image_rows][:, :, rows], p @ case.v.double(), case.dtype) or output_fault(
        maps[:, rows], p[..., : case.selected].sum(1), case.dtype
    )


def _eager_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    p = (case.q @ case.k.transpose(-1, -2) * case.q.shape[-1] ** -0.5).softmax(-1)
    maps += p[:, :, case.image_rows, : case.selected].sum(1, dtype=torch.float32)
    return p @ case.v, maps


def _our_cross_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    return kernels.attention_with_map_(maps, case.q, case.k, case.v), maps


def _attention_and_lse(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash attention, with the log-sum-exp that it computes anyway."""
    if case.q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(case.q, case.k, case.v)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(case.q, case.k, case.v)[:2]


def _our_joint_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    out, lse = _attention_and_lse(case)
    rows = case.image_rows
    kernels.attention_tap_(maps, case.q[:, :, rows], case.k[:, :, : case.selected], lse[:, :, rows].float())
    return out, maps


def _plain_attention_fault(case: AttentionCase, answer: Tensor) -> str:
    maps = case.empty_maps()
    rows = checked_rows(maps.shape[1]).to(case.q.device)
    q = case.q[:, :, case.image_rows][:, :, rows].double()
    p = (q @ case.k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return output_fault(answer[:, :, case.image_rows][:, :, rows], p @ case.v.double(), case.dtype)


WITHOUT_MAPS = Provider(
    "SDPA without maps",
    lambda case: F.scaled_dot_product_attention(case.q, case.k, case.v),
    check=_plain_attention_fault,
    bound=True,
    note="the attention alone: no map comes out",
)


def _attention_providers(ours: Callable[[Any], Any]) -> list[Provider]:
    def with_maps(case: AttentionCase) -> tuple[AttentionCase, Tensor]:
        return case, case.empty_maps()

    def copied(state: Any, answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return answer[0], answer[1].clone()

    return [
        Provider(OURS, ours, with_maps, copied),
        WITHOUT_MAPS,
        Provider(DENSE, _eager_attention, with_maps, copied, note="eager: all probabilities in memory"),
    ]


# --------------------------------------------------------------------------------------------------------------- build


@dataclass(frozen=True)
class Op:
    """One op: its providers, what is right, and what it costs as (FLOPs, bytes) of the shape and the item size."""

    providers: Callable[[], list[Provider]]
    fault: Callable[[Any, Any], str]
    cost: Callable[[Mapping[str, int], int], tuple[float, float]]
    gradients: bool = False


def _encode_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    rows, d, n, k = (s[name] for name in ("rows", "d_model", "n_latents", "k"))
    return 2.0 * rows * n * d, size * (rows * d + n * d + n + d) + 8.0 * rows * k


def _decode_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    rows, d, k = (s[name] for name in ("rows", "d_model", "k"))
    return 2.0 * rows * k * d, size * (rows * k * d + rows * d + d) + 8.0 * rows * k


def _forward_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    (a, b), (c, d) = _encode_cost(s, size), _decode_cost(s, size)
    return a + c, b + d


def _training_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    """Both encodes and decodes, and three gathers of each code backwards: values, W_dec, W_enc."""
    rows, d, n, k = (s[name] for name in ("rows", "d_model", "n_latents", "k"))
    aux = {"rows": rows, "d_model": d, "n_latents": min(2 * d, n // 2), "k": min(d // 2, n // 2)}
    parts = [_forward_cost(s, size), _forward_cost(aux, size), *3 * [_decode_cost({**s, "k": k + aux["k"]}, size)]]
    return sum(p[0] for p in parts), sum(p[1] for p in parts) + 2.0 * size * n * d


def _edit_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    rows, d, k = (s[name] for name in ("rows", "d_model", "k"))
    return 2.0 * rows * EDITED * d, size * (2.0 * rows * d + EDITED * d) + 8.0 * rows * k


def _statistics_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    return 2.0 * s["rows"] * s["k"], 8.0 * s["rows"] * s["k"] + 24.0 * min(s["rows"] * s["k"], GROUPS * s["n_latents"])


def _gradient_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    flops, gathered = _decode_cost(s, size)
    return flops, gathered + size * s["n_latents"] * s["d_model"]


def _pursuit_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    flops, once = _encode_cost(s, size)
    return s["k"] * flops, once


def _cross_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 4.0 * b * h * n * t * d, size * b * h * d * (2.0 * n + 2 * t) + 8.0 * b * n * t


def _joint_cost(s: Mapping[str, int], size: int) -> tuple[float, float]:
    b, h, n, t, d, selected = (s[name] for name in ("batch", "heads", "n", "t", "d", "selected"))
    length = n + t
    return (
        4.0 * b * h * length**2 * d + 2.0 * b * h * n * selected * d,
        size * 4.0 * b * h * length * d + 8.0 * b * n * selected,
    )


OPS: dict[str, Op] = {
    "topk_encode": Op(_encode_providers, code_fault, _encode_cost),
    "sparse_decode": Op(_decode_providers, decode_fault, _decode_cost),
    "forward": Op(_forward_providers, reconstruction_fault, _forward_cost),
    "training_step": Op(_training_providers, training_fault, _training_cost, gradients=True),
    "sparse_edit": Op(_edit_providers, edit_fault, _edit_cost),
    "feature_stats": Op(_statistics_providers, statistics_fault, _statistics_cost),
    "weight_gradient": Op(_gradient_providers, gradient_fault, _gradient_cost),
    "threshold_encode": Op(_threshold_providers, threshold_fault, _encode_cost),
    "matching_pursuit": Op(_pursuit_providers, pursuit_fault, _pursuit_cost),
    "attention_map": Op(lambda: _attention_providers(_our_cross_attention), attention_fault, _cross_cost),
    "attention_tap": Op(lambda: _attention_providers(_our_joint_attention), attention_fault, _joint_cost),
}


def available() -> tuple[str, ...]:
    return tuple(OPS)


def build(op: str, shape: Mapping[str, int], dtype: str = "float32", device: str = "cpu") -> Figure:
    """The figure of an op: `shape` has rows, d_model, n_latents, k; of attention batch, heads, n, t, d, and for
    "attention_tap" selected."""
    if op not in available():
        raise ValueError(f"op {op!r} is not measured; choose one of {', '.join(available())}")
    what, size = OPS[op], itemsize(dtype)
    flops, moved = what.cost(shape, size)
    attention = op.startswith("attention")

    def inputs(seed: int) -> Any:
        if attention:
            joint = op == "attention_tap"
            full = {**shape, "selected": shape["selected"] if joint else shape["t"]}
            return attention_case(**full, joint=joint, dtype=dtype, device=device, seed=seed)
        dead_norm = 0.3 if op == "training_step" else 1.0
        return sae_case(**shape, dtype=dtype, device=device, seed=seed, dead_norm=dead_norm)

    providers = what.providers()
    if dtype != "float32" or (device == "cpu" and not kernels.bf16_products()):  # then it is the plain path again
        providers = [provider for provider in providers if provider.name != PREPARED]
    input_bytes = moved if attention else size * shape["n_latents"] * shape["d_model"]
    return Figure(
        op=op, shape=shape, dtype=dtype, device=device, inputs=inputs, providers=tuple(providers),
        check=what.fault, flops=flops, bytes=moved, input_bytes=int(input_bytes), gradients=what.gradients,
        recipe=(__name__, "build", {"op": op, "shape": dict(shape), "dtype": dtype, "device": device}),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- `sparsefeat bench`

SAEURON = {"rows": 1024, "d_model": 1280, "n_latents": 20480, "k": 32}

HERE: dict[str, Mapping[str, int]] = {
    "topk_encode": SAEURON,
    "sparse_decode": SAEURON,
    "forward": SAEURON,
    "training_step": {**SAEURON, "rows": 256},
    "sparse_edit": SAEURON,
    "feature_stats": SAEURON,
    "weight_gradient": SAEURON,
    "threshold_encode": SAEURON,
    "matching_pursuit": {"rows": 256, "d_model": 768, "n_latents": 16384, "k": 16},
    "attention_map": {"batch": 2, "heads": 8, "n": 1024, "t": 77, "d": 80},  # SD 1.5 at 32 x 32
    "attention_tap": {"batch": 1, "heads": 24, "n": 1024, "t": 333, "d": 64, "selected": 8},  # SD 3.5 at 512 x 512
}


def measure_here(
    ceilings: Ceilings, device: str, seconds: float = 1.0, only: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Each op against dense PyTorch on this machine: the records of one op at a time."""
    if only is not None and only not in available():
        raise ValueError(f"--only {only!r} is no op; choose one of {', '.join(available())}")
    dtype = "float32" if device == "cpu" else "bfloat16"
    for op in available():
        if only in (None, op) and not (op == "matching_pursuit" and dtype != "float32"):
            yield measure(build(op, HERE[op], dtype, device), ceilings, seconds)
