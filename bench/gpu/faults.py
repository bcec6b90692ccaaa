"""What is wrong with an op's answer, against fp64: "" if nothing is. By Triton, or by plain torch, on whatever device there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels.attention.columns import reference as reference_column_sums
from sparsefeat_kernels.attention.concept import reference as concept_reference
from sparsefeat_kernels.attention.concept_map import reference as concept_map_reference
from sparsefeat_kernels.attention.map import reference as map_reference
from sparsefeat_kernels.attention.map_gradient import reference as map_gradient_reference
from sparsefeat_kernels.attention.resize import reference as resize_reference
from sparsefeat_kernels.attention.rows import reference as rows_reference
from sparsefeat_kernels.attention.tap import reference as tap_reference
from sparsefeat_kernels.decode.auxk_decode import reference as auxk_reference
from sparsefeat_kernels.decode.sparse_edit import reference as edit_reference
from sparsefeat_kernels.encode.gpu.topk import topk_encode_triton, way
from sparsefeat_kernels.encode.topk import reference as topk_reference
from sparsefeat_kernels.gradient.weight_gradient import reference as gradient_reference
from torch import Tensor

from sparsefeat.measure.answers import HALF, PREACTIVATION, output_fault
from sparsefeat.measure.figures import build
from sparsefeat.measure.ops.encode import code_fault, threshold_fault, threshold_inputs
from sparsefeat.measure.ops.training import COSINE
from sparsefeat.measure.sae_case import SAECase, sae_case
from sparsefeat.measure.timing import OURS

Shape = Mapping[str, int]
WIDE = {"float64": torch.float64}  # of sums and values; float32 for all others


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def by_triton(run: Callable[[], Any], wanted: bool = True) -> Any:
    """`run` with the op's Triton kernels, or by plain torch, whatever is the default on this device."""
    with kernels.force_triton(wanted):
        return run()


def figure_fault(op: str, shape: Shape, dtype: str, triton: bool) -> str:
    """What is wrong with our answer of one figure."""
    figure = build(op, shape, dtype, device())
    provider = next(p for p in figure.providers if p.name == OURS)
    with torch.set_grad_enabled(figure.gradients):
        # The third call of a kind is the first that is made again (sparsefeat_kernels/replay.py), here on other memory.
        before = [provider.prepare(figure.inputs(seed)) for seed in ((1, 2) if triton and device() == "cuda" else ())]
        for state in before:
            by_triton(partial(provider.run, state))
        inputs = figure.inputs(0)
        state = provider.prepare(inputs)
        answer = by_triton(lambda: provider.canonical(state, provider.run(state)), triton)
        return (provider.check or figure.check)(inputs, answer)


def case_of(shape: Shape, dtype: str, seed: int = 1) -> SAECase:
    return sae_case(**shape, dtype=dtype, device=device(), seed=seed)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def worst(answers: Any, references: Any, dtype: str) -> str:
    answers = (answers,) if isinstance(answers, Tensor) else answers
    references = (references,) if isinstance(references, Tensor) else references
    for place, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if fault := output_fault(answer, reference, dtype):
            return f"output {place}: {fault}"
    return ""


def unproved(case: SAECase) -> SAECase:
    """The same with latents that are alike by the three, in one group: every row's best are as good as what its groups leave
    out, and are computed again."""
    W = case.W_enc.clone()
    whole = W[: len(W) // 64 * 64].view(-1, 8, 8, W.shape[1])
    whole[:, 1:3] = whole[:, :1]
    return replace(case, W_enc=W)


def unproved_fault(sizes: Shape, dtype: str) -> str:
    case = unproved(case_of(sizes, dtype))
    return code_fault(case, encoded_in_groups(case))


def encoded_in_groups(case: SAECase) -> tuple[Tensor, Tensor]:
    """By the three best of every 16 latents, whichever way topk_encode takes."""
    return topk_encode_triton(case.x, case.W_enc, case.b_enc, case.b, case.k, "relu")


def stored_fault(sizes: Shape, dtype: str) -> str:
    """Of topk_encode where it stores the pre-activations."""
    case = case_of(sizes, dtype)
    taken = by_triton(lambda: way(case.x, len(case.W_enc), case.k))
    if taken != "stored":
        return f"pre-activations are not stored: {taken}"
    return code_fault(case, by_triton(lambda: kernels.topk_encode(case.x, case.W_enc, case.b_enc, case.b, case.k)))


def ties(sizes: Shape, dtype: str, triton: bool) -> str:
    """Small integers, whose sums are exact in any order and tie constantly, and infinite biases: the reference's own answer."""
    g = torch.Generator().manual_seed(8)
    rows, d, n, k = (sizes[name] for name in ("rows", "d_model", "n_latents", "k"))
    drawn = [torch.randint(-2, 3, size, generator=g) for size in ((rows, d), (n, d), (n,), (d,))]
    x, W, b_enc, b_pre = (t.to(device(), getattr(torch, dtype)) for t in drawn)
    b_enc[::5] = -torch.inf
    for how in ("relu", "raw", "signed"):
        found = by_triton(partial(kernels.topk_encode, x, W, b_enc, b_pre, k, how), triton)
        wanted = topk_reference(*(t.double() for t in (x, W, b_enc, b_pre)), k, how)
        if not torch.equal(found[1], wanted[1]) or not torch.equal(found[0].double(), wanted[0]):
            return f"{how}: not the reference's answer"
    return ""


def with_bias(case: SAECase) -> tuple[SAECase, kernels.PreparedEncoder]:
    """The bias is of the weights alone, and so is not timed."""
    return case, by_triton(lambda: kernels.prepare_encoder(case.W_enc, case.b_enc, case.b))


def encoded_with_bias(state: tuple[SAECase, kernels.PreparedEncoder]) -> tuple[Tensor, Tensor]:
    case, prepared = state
    return by_triton(lambda: kernels.topk_encode(case.x, case.W_enc, case.b_enc, case.b, case.k, prepared=prepared))


def bias_fault(sizes: Shape, dtype: str) -> str:
    case = case_of(sizes, dtype)
    return code_fault(case, encoded_with_bias(with_bias(case)))


def selection(sizes: Shape, dtype: str, how: str, triton: bool) -> str:
    case = case_of(sizes, dtype)
    weights = (case.W_enc, case.b_enc, case.b, case.k, how)
    values, indices = by_triton(lambda: kernels.topk_encode(case.x, *weights), triton)
    values, indices, a = values[case.rows].double(), indices[case.rows].long(), case.preactivations
    tolerance = PREACTIVATION[dtype] * a.abs().amax(1, keepdim=True)
    chosen, score = a.gather(1, indices), a.abs() if how == "signed" else a
    if ((chosen - values).abs() > tolerance).any():
        return "a value is wrong"
    left_out = score.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    wrong = left_out - score.gather(1, indices).amin(1, keepdim=True) > tolerance
    return "a latent was missed" if wrong.any() else ""


def not_finite(sizes: Shape, dtype: str, triton: bool) -> str:
    """A row with NaN is NaN and has the indices 0 to k - 1; no other row is touched by it."""
    case = case_of(sizes, dtype)
    weights = (case.W_enc, case.b_enc, case.b, case.k)
    clean = by_triton(lambda: kernels.topk_encode(case.x, *weights), triton)
    x = case.x.clone()
    x[len(x) // 2, 1] = torch.nan
    values, indices = by_triton(lambda: kernels.topk_encode(x, *weights), triton)
    broken = torch.arange(len(x), device=x.device) == len(x) // 2
    if not values[broken].isnan().all() or indices[broken].flatten().tolist() != list(range(case.k)):
        return "a row with NaN is not NaN in all k values"
    same = torch.equal(values[~broken], clean[0][~broken]) and torch.equal(indices[~broken], clean[1][~broken])
    return "" if same else "NaN in one row changed another"


def threshold_csr(sizes: Shape, dtype: str, triton: bool) -> str:
    """The code, and the gradients of what threshold_encode and threshold_encode_csr have in common."""
    case = case_of(sizes, dtype)
    threshold = threshold_inputs(case)[1]
    n, most = len(case.W_enc), min(8 * case.k, len(case.W_enc))
    row = torch.arange(len(case.x), device=case.x.device)

    def dense(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        return values.new_zeros(len(case.x), n).index_put((rows, indices.long()), values, accumulate=True)

    def padded(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor) -> Tensor:
        values, indices, _ = kernels.threshold_encode(x, W_enc, b_enc, b, threshold, most)
        return dense(values.flatten(), indices.flatten(), row.repeat_interleave(most))

    def listed(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor) -> Tensor:
        values, indices, offsets = kernels.threshold_encode_csr(x, W_enc, b_enc, b, threshold)
        return dense(values, indices, row.repeat_interleave(offsets.diff()))

    def exact(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor) -> Tensor:
        a = (x - b) @ W_enc.T + b_enc
        return torch.where(a > threshold.double().clamp_min(0), a, 0)

    def of(encode: Callable[..., Tensor], wide: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        tensors = [double(t) if wide else t for t in (case.x, case.W_enc, case.b_enc, case.b)]
        learned = [t.detach().requires_grad_() for t in tensors]
        z = encode(*learned)
        return z.detach(), torch.autograd.grad((z * z.detach()).sum(), learned)

    with torch.enable_grad():
        wanted = of(exact, wide=True)[1]
        for name, encode in (("threshold_encode", padded), ("threshold_encode_csr", listed)):
            z, found = by_triton(partial(of, encode, wide=False), triton)
            if fault := threshold_fault(case, z[case.rows]) or far_gradients(found, wanted, dtype):
                return f"{name}: {fault}"
    return ""


def auxk(sizes: Shape, dtype: str, triton: bool) -> str:
    case = case_of(sizes, dtype)
    k_aux = max(1, len(case.dead) // 3)
    weights = (case.W_enc, case.b_enc, case.b, case.k, case.dead, k_aux)
    *code, aux_values, aux_indices = by_triton(lambda: kernels.auxk_encode(case.x, *weights), triton)
    if fault := code_fault(case, tuple(code)):
        return fault
    place = torch.searchsorted(case.dead, aux_indices.long())
    if not torch.equal(case.dead[place.clamp(max=len(case.dead) - 1)], aux_indices.long()):
        return "a latent of the auxiliary code is not dead"
    among = replace(case, W_enc=case.W_enc[case.dead], b_enc=case.b_enc[case.dead], k=k_aux)
    return code_fault(among, (aux_values, place))


def aux_code(case: SAECase) -> tuple[Tensor, Tensor]:
    """Of as many dead latents as a training step has, a row."""
    g = torch.Generator(case.x.device).manual_seed(3)
    k_aux = max(1, len(case.dead) // 4)
    chosen = torch.rand(len(case.x), len(case.dead), generator=g, device=case.x.device).argsort(1)[:, :k_aux]
    values = torch.rand(chosen.shape, generator=g, device=case.x.device, dtype=case.values.dtype)
    return values, case.dead[chosen].int()


def aux_decode(sizes: Shape, dtype: str, triton: bool) -> str:
    case = case_of(sizes, dtype)
    inputs = (case.values, case.indices, *aux_code(case), case.dead, case.W_dec, case.b)
    answer = by_triton(lambda: kernels.auxk_decode(*inputs), triton)
    return worst(answer, auxk_reference(*map(double, inputs)), dtype)


def aux_gradient(sizes: Shape, dtype: str, triton: bool) -> str:
    case, n = case_of(sizes, dtype), sizes["n_latents"]
    aux_values, aux_indices = aux_code(case)
    inputs = (case.values, case.indices, case.x, aux_values, aux_indices, None, case.dead, case.b, n)
    weight, bias = by_triton(lambda: kernels.auxk_weight_gradient(*inputs), triton)
    x, b = case.x.double(), case.b.double()
    parts = [
        gradient_reference(v.double(), i, x, b, n) for v, i in ((case.values, case.indices), (aux_values, aux_indices))
    ]
    return worst((weight, bias), tuple(sum(pair) for pair in zip(*parts, strict=True)), dtype)


def gradients(sizes: Shape, dtype: str, triton: bool) -> str:
    """Of encode and decode, by every tensor that learns, against autograd of the dense computation in fp64."""
    case = case_of(sizes, dtype)
    towards = torch.randn(case.x.shape, generator=torch.Generator(case.x.device).manual_seed(5), device=case.x.device)

    def of(encode: Any, decode: Any, wide: bool) -> tuple[Tensor, ...]:
        tensors = [t.double() if wide else t for t in (case.x, case.W_enc, case.b_enc, case.b, case.W_dec)]
        x, W_enc, b_enc, b, W_dec = (t.detach().requires_grad_() for t in tensors)
        y = decode(*encode(x, W_enc, b_enc, b, case.k), W_dec, b)
        return torch.autograd.grad((y * towards.to(y.dtype)).sum(), (x, W_enc, b_enc, b, W_dec))

    with torch.enable_grad():
        wanted = of(dense_code, dense_decode, wide=True)
        found = by_triton(lambda: of(kernels.topk_encode, kernels.sparse_decode, wide=False), triton)
    return far_gradients(found, wanted, dtype)


def far_gradients(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: str) -> str:
    """By direction: a latent that changes places with its tie is a whole term."""
    least = COSINE if dtype in HALF else 1 - 1e-4
    for place, (got, exact) in enumerate(zip(found, wanted, strict=True)):
        cosine = float(torch.nn.functional.cosine_similarity(got.double().flatten(), exact.flatten(), dim=0))
        if not cosine >= least:
            return f"gradient {place} has cosine {cosine:.5f}"
    return ""


def dense_code(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = ((x - b) @ W_enc.T + b_enc).topk(k)
    return values.relu(), indices


def dense_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b: Tensor) -> Tensor:
    return values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values) @ W_dec + b


def edit_rules(case: SAECase) -> tuple[Tensor, ...]:
    """Eight latents of the first row: gains, offsets, bounds and gates that bind on some rows and not on others."""
    latents = case.indices[0, :8].long().repeat(3)[:8]
    at = torch.arange(8, device=case.x.device, dtype=torch.float32)
    rule = (at - 3, 0.1 * at, torch.full_like(at, -1.0), torch.full_like(at, 2.0), 0.3 * at - 0.5)
    weight = torch.linspace(0, 1, len(case.x), device=case.x.device)
    return latents, case.W_dec[latents], *rule, weight


def edit(sizes: Shape, dtype: str, triton: bool) -> str:
    """The edit, and the gradients of values and directions."""
    case = case_of(sizes, dtype)
    rules = edit_rules(case)

    def of(call: Any, wide: bool) -> tuple[Tensor, ...]:
        values, indices, *rest = (double(t) if wide else t for t in (case.values, case.indices, *rules))
        values, rest[1] = values.detach().requires_grad_(), rest[1].detach().requires_grad_()
        delta = call(values, indices, *rest)
        return (delta.detach(), *torch.autograd.grad(delta.square().sum(), (values, rest[1])))

    with torch.enable_grad():
        return worst(by_triton(lambda: of(kernels.sparse_edit_delta, False), triton), of(edit_reference, True), dtype)


def by_latent(sizes: Shape, _: str, triton: bool) -> str:
    """The order by latent against torch's stable sort; every seventh entry is padding."""
    case, n = case_of(sizes, "float32"), sizes["n_latents"]
    values = case.values.clone()
    values.view(-1)[::7] = 0
    row_ids, order, offsets = by_triton(lambda: kernels.latent_major(case.indices, values, n), triton)
    keys = torch.where(values != 0, case.indices.long(), n).flatten()
    wanted = keys.sort(stable=True)
    counts = torch.bincount(keys, minlength=n + 1)[:n].cumsum(0)
    owned = int(counts[-1])
    right = torch.equal(offsets[1:], counts) and torch.equal(order[:owned], wanted.indices[:owned])
    right = right and torch.equal(row_ids[:owned], wanted.indices[:owned] // values.shape[1])
    return "" if right else "entries are not in the order of their latents, then rows"


def heads_of(shape: tuple[int, ...], dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, n, t, d = shape
    g = torch.Generator(device()).manual_seed(2)

    def normal(length: int, of: int) -> Tensor:
        made = torch.randn(batch, length, of, d, generator=g, device=device())
        return made.to(getattr(torch, dtype)).transpose(1, 2)  # as modules have it: heads side by side

    return normal(n, heads), normal(t, key_heads), normal(t, key_heads)


def map_options(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A mask that leaves every row a key, weights of heads, groups of which one is passed over, and tokens."""
    batch, heads, _, _, t, _ = shape
    mask = torch.rand(batch, t, generator=torch.Generator().manual_seed(4)) < 0.8
    mask[:, 0] = True
    group = torch.arange(batch)
    group[-1] = -1
    made = mask, torch.linspace(0.1, 1, heads), group, torch.tensor([0, t - 1, t // 2])
    mask, weight, group, tokens = (tensor.to(device()) for tensor in made)
    return mask, weight, group, tokens


def maps(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    query, key, value = heads_of(shape, dtype)
    mask, weight, group, tokens = map_options(shape)
    started = torch.ones(shape[0], shape[3], len(tokens), device=device(), dtype=WIDE.get(dtype, torch.float32))
    alone, fused = started.clone(), started.clone()
    options = (None, mask, weight, group, tokens)
    by_triton(lambda: kernels.attention_map_(alone, query, key, *options), triton)
    out = by_triton(lambda: kernels.attention_with_map_(fused, query, key, value, *options), triton)
    scale = shape[-1] ** -0.5
    q, k, v = (t.double() for t in (query, key, value))
    wanted, wanted_out = map_reference(started.double(), q, k, v, scale, mask, weight.double(), group, tokens)
    return worst((alone, fused, out), (wanted, wanted, wanted_out), dtype)


def map_gradient(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    """The maps with gradients of queries and keys, of chosen tokens, against autograd through the reference."""
    query, key, _ = heads_of(shape, dtype)
    mask, weight, _, tokens = map_options(shape)
    g = torch.Generator(device()).manual_seed(6)
    grad = torch.randn(shape[0], shape[3], len(tokens), generator=g, device=device(), dtype=torch.float64)

    def of(call: Any, wide: bool) -> tuple[Tensor, ...]:
        q, k = ((t.double() if wide else t).detach().requires_grad_() for t in (query, key))
        made = call(q, k, shape[-1] ** -0.5, mask, weight.to(q.dtype if wide else weight.dtype), tokens)
        return (made.detach(), *torch.autograd.grad(made, (q, k), grad.to(made.dtype)))

    with torch.enable_grad():
        return worst(
            by_triton(lambda: of(kernels.attention_map, False), triton), of(map_gradient_reference, True), dtype
        )


def concept_outputs(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    """concept_attention of `t` concepts beside `n` positions."""
    image, query, value = heads_of(without_key_heads(shape), dtype)
    given = (query, query, value, image, image)
    out = by_triton(lambda: kernels.concept_attention(*given), triton)
    return worst(out, concept_reference(*(tensor.double() for tensor in given), shape[-1] ** -0.5), dtype)


def without_key_heads(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *shape[1:2], *shape[3:])


def concepts(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    """concept_map_ of the image's output and the concepts'."""
    batch, _, _, n, t, _ = shape
    image, out, _ = heads_of(without_key_heads(shape), dtype)
    _, weight, group, _ = map_options(shape)
    answers, references = [], []
    for softmax in (True, False):
        started = torch.ones(batch, n, t, device=device(), dtype=WIDE.get(dtype, torch.float32))
        into = started.clone()
        by_triton(partial(kernels.concept_map_, into, image, out, weight, group, softmax), triton)
        answers.append(into)
        doubles = (started.double(), image.double(), out.double(), weight.double())
        references.append(concept_map_reference(*doubles, group, softmax))
    return worst(tuple(answers), tuple(references), dtype)


def resized(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    """resize_add_: maps [m, t, h, w] onto another grid, with weights and the clamp; and without."""
    m, t, height, width = shape
    g = torch.Generator(device()).manual_seed(7)
    drawn = torch.randn(m, height, width, t, generator=g, device=device(), dtype=torch.float64)
    maps = drawn.to(getattr(torch, dtype)).permute(0, 3, 1, 2)
    weight = torch.linspace(-0.5, 2, m, device=device())
    answers, references = [], []
    for options in ((weight, True), (None, False)):
        sums = torch.ones(t, 2 * height + 1, 3 * width, device=device(), dtype=maps.dtype)
        into = sums.clone()
        by_triton(partial(kernels.resize_add_, into, maps, *options), triton)
        answers.append(into)
        references.append(resize_reference(sums.double().cpu(), maps.double().cpu(), _cpu(options[0]), options[1]))
    return worst(tuple(answer.cpu() for answer in answers), tuple(references), dtype)


def _cpu(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.double().cpu()


def rows(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    query, key, _ = heads_of(shape, dtype)
    mask, marked = map_options(shape)[0], torch.arange(shape[4], device=device()) < 3
    answer = by_triton(lambda: kernels.attention_rows(query, key, None, mask, marked), triton)
    return worst(answer, rows_reference(query.double(), key.double(), shape[-1] ** -0.5, mask, marked), dtype)


def added(op: Any, reference: Any, into: tuple[int, ...], shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    """Of an op that is given the log-sum-exp of every row, here the reference's, and adds to `into`."""
    query, key, _ = heads_of(shape, dtype)
    mask, weight, group, _ = map_options(shape)
    scale, wide = shape[-1] ** -0.5, WIDE.get(dtype, torch.float32)
    lse = rows_reference(query.double(), key.double(), scale, mask, None)[0].to(wide)
    sums = torch.zeros(into, device=device(), dtype=wide)
    by_triton(lambda: op(sums, query, key, lse, None, mask, weight, group), triton)
    given = (query.double(), key.double(), lse.double(), scale, mask, weight.double(), group)
    return worst(sums, reference(torch.zeros(into, device=device(), dtype=torch.float64), *given), dtype)


def tapped(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    into = shape[0], shape[3], shape[4]
    return added(kernels.attention_tap_, tap_reference, into, shape, dtype, triton)


def column_sums(shape: tuple[int, ...], dtype: str, triton: bool) -> str:
    into = shape[0], shape[4]
    return added(kernels.attention_column_sums_, reference_column_sums, into, shape, dtype, triton)
