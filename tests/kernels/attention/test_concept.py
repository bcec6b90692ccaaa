"""concept_attention and concept_map_ against their dense references in fp64."""

import pytest
import torch
from sparsefeat_kernels import concept_attention, concept_map_
from sparsefeat_kernels.attention import concept
from sparsefeat_kernels.attention.concept import reference
from sparsefeat_kernels.attention.concept_map import reference as reference_map
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# batch, heads, concepts, n, d, e
SHAPES = {
    "odd": (2, 3, 7, 19, 3, 5),
    "many concepts": (1, 2, 65, 33, 8, 8),
    "wide": (1, 2, 5, 17, 72, 40),
    "blocks of keys": (1, 2, 3, 530, 8, 8),
    "no image": (1, 2, 3, 0, 4, 4),
    "one": (1, 1, 1, 1, 1, 1),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """query, key, value, image_key, image_value; heads side by side in memory, as modules have them."""
    batch, heads, c, n, d, e = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((c, d), (c, d), (c, e), (n, d), (n, e))
    made = [torch.randn(batch, rows, heads, width, generator=g, dtype=torch.float64) for rows, width in sizes]
    return [t.to(dtype).to(device).transpose(1, 2) for t in made]


def skip_in_interpreter(dtype: torch.dtype, path: str, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_concepts_attend_to_themselves_and_the_image(path: str, shape, dtype, request):
    skip_in_interpreter(dtype, path, request)
    tensors = problem(shape, dtype, path)
    for scale in (None, 0.7):
        expected = reference(*(t.double() for t in tensors), shape[4] ** -0.5 if scale is None else scale)
        out = concept_attention(*tensors, scale)
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_strides_give_the_same_attention(path: str, dtype, request):
    skip_in_interpreter(dtype, path, request)
    for shape in ((2, 3, 7, 19, 5, 5), (1, 2, 3, 4, 8, 6)):
        tensors = problem(shape, dtype, path)
        expected = reference(*(t.double() for t in tensors), shape[4] ** -0.5)
        for strided in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, 3)[..., ::2]):
            out = concept_attention(*(strided(t) for t in tensors))
            torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("which", [1, 3], ids=["of the concepts", "of the image"])
def test_keys_whose_scores_all_overflow_downwards_take_no_part(path: str, which: int):
    tensors = problem((2, 3, 4, 6, 5, 5), torch.float32, path)
    tensors[0] = tensors[0].abs() + 1
    tensors[which] = torch.full_like(tensors[which], -3e38)
    out = concept_attention(*tensors, 2.0)
    others = [t.double() for t in tensors]
    others[which] = torch.full_like(others[which], -torch.inf)
    torch.testing.assert_close(out.double(), reference(*others, 2.0), rtol=1e-5, atol=1e-5)


def test_an_image_of_several_parts_and_scores_far_apart(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(concept, "KEYS_A_PART", 32)
    tensors = problem((1, 2, 3, 90, 4, 6), torch.float32, path, seed=1)
    tensors[0] *= 60  # nothing overflows, and the largest key decides
    tensors[3][:, :, 70] *= 5
    expected = reference(*(t.double() for t in tensors), 0.5)
    torch.testing.assert_close(concept_attention(*tensors, 0.5).double(), expected, rtol=1e-4, atol=1e-4)
    tensors[0][0, 1, 2] = torch.nan
    out = concept_attention(*tensors, 0.5)
    assert out[0, 1, 2].isnan().all()
    assert not out[0, 0].isnan().any()
    assert not out[0, 1, :2].isnan().any()


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 19, 7), (1, 3, 1, 1, 1), (2, 2, 70, 18, 40)], ids=str)
def test_maps_are_products_of_outputs(path: str, shape, dtype, softmax):
    batch, heads, c, n, e = shape
    output, concepts = problem((batch, heads, c, n, e, e), dtype, path, seed=2)[3:1:-1]
    maps = torch.randn(2, n, c, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    maps = maps.to(torch.float64 if dtype == torch.float64 else torch.float32).to(path)
    weight = torch.linspace(0.5, 2, heads, device=path)
    for group in (None, torch.tensor([1, -1, 1][:batch], device=path), torch.tensor([5, 0, 0][:batch], device=path)):
        if group is None and batch > 2:
            group = torch.arange(batch, device=path)  # the third adds to none of the two
        for head_weight in (None, weight):
            into = maps.clone()
            concept_map_(into, output, concepts, head_weight, group, softmax)
            rows = torch.arange(batch) if group is None else group
            expected = reference_map(maps.double(), output.double(), concepts.double(), head_weight, rows, softmax)
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(into.double(), expected, rtol=tolerance, atol=tolerance * max(1, e))


def test_a_map_of_strides_and_a_row_of_nan(path: str):
    output, concepts = problem((1, 2, 3, 17, 4, 4), torch.float32, path, seed=4)[3:1:-1]
    output[0, 1, 5] = torch.nan
    maps = torch.zeros(1, 3, 17, device=path).transpose(1, 2)
    concept_map_(maps, output, concepts)
    assert maps[0, 5].isnan().all()
    clean = torch.cat([maps[0, :5], maps[0, 6:]])
    torch.testing.assert_close(clean.sum(-1), torch.ones(16, device=path))


def test_zero_sizes_give_nothing(path: str):
    tensors = problem((1, 2, 0, 5, 4, 4), torch.float32, path)
    assert concept_attention(*tensors).shape == (1, 2, 0, 4)
    maps = torch.ones(1, 5, 0, device=path)
    concept_map_(maps, tensors[3], tensors[2])
    untouched = torch.ones(0, 5, 3, device=path)
    concept_map_(untouched, tensors[3], torch.ones(1, 2, 3, 4, device=path))


def test_the_cost_is_what_the_docstrings_say():
    tensors = problem((2, 3, 4, 10, 5, 6), torch.float32, "cpu")
    with FlopCounterMode(display=False) as counted:
        concept_attention(*tensors)
        concept_map_(torch.zeros(2, 10, 4), tensors[4], tensors[2])
    assert counted.get_total_flops() == 2 * 2 * 3 * 4 * (4 + 10) * (5 + 6) + 2 * 2 * 3 * 10 * 4 * 6


ONES = problem((1, 2, 3, 5, 4, 4), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: ONES[0][0]}, r"query must be \[batch, heads, n, d\]"),
        ({1: ONES[0][:, :, :2]}, "key must have query's shape"),
        ({2: ONES[2][:, :1]}, r"value must be \[1, 2, 3, 'e'\]"),
        ({3: ONES[3][..., :3]}, r"image_key must be \[1, 2, n, 4\]"),
        ({4: ONES[4][:, :, :4]}, r"image_value must be \[1, 2, 5, 4\]"),
        ({4: ONES[4].double()}, "image_value must have query's dtype"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    tensors = [change.get(i, t) for i, t in enumerate(ONES)]
    with pytest.raises((ValueError, TypeError), match=said):
        concept_attention(*tensors)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(1, 5, 3), ONES[4][0], ONES[2]), r"output must be \[batch, heads, n, e\]"),
        ((torch.zeros(1, 5, 3), ONES[4], ONES[2][:, :1]), r"concepts must be \[1, 2, c, 4\]"),
        ((torch.zeros(1, 5, 3), ONES[4], ONES[2].half()), "concepts must have output's dtype"),
        ((torch.zeros(1, 4, 3), ONES[4], ONES[2]), r"maps must be \[groups, 5, 3\]"),
        ((torch.zeros(1, 5, 257), ONES[4], torch.ones(1, 2, 257, 4)), "at most 256"),
        ((torch.zeros(1, 5, 3), ONES[4], ONES[2], torch.ones(3)), "head_weight must have shape"),
        ((torch.zeros(1, 5, 3), ONES[4], ONES[2], None, torch.zeros(2).long()), "group must have shape"),
    ],
)
def test_what_does_not_fit_a_map_is_named(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        concept_map_(*arguments)
