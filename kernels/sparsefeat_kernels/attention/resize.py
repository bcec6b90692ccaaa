"""resize_add_: maps enlarged to a common grid and added up, without a tensor of the enlarged ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import block_bytes, implementation, jit, ops, register, row_chunks, tl
from ..products import product
from ..threads import conducted, each, shares, threads, together
from .scores import BLOCK_BYTES, check_device

__all__ = ["resize_add_"]


def resize_add_(sums: Tensor, maps: Tensor, weight: Tensor | None = None, clamp: bool = False) -> None:
    """Resize maps to the grid of `sums`, bicubic, and add them up, in place.

        sums[t] += sum over m of weight[m] f(resize(maps[m, t]))      f(x) = max(x, 0) with clamp, else x

    Without the clamp the resize is linear: maps are added up first and resized once. With it, this is DAAM's mean over
    layers and heads, m.

    Args:
        sums: [t, height, width] float32 or float64; strides are free.
        maps: [m, t, h, w] in sums' dtype; strides are free. h, w, height and width are at least 1 where there are maps.
        weight: [m] floating; default 1 each.
        clamp: whether each resized map is clamped at zero before it is added.

    The resize is that of `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: the cubic kernel with
    a = -0.75 at half-pixel centres, without antialiasing, borders repeated. Maps are added in order, in sums' dtype: the
    same bits every run. NaN in a map makes the pixels around it NaN. No gradients.

    Cost: 40 m t height width FLOPs; reads 16 numbers of a map for every pixel (from the cache), reads and writes sums once.
    [m, t, height, width] is never held: scratch none on a GPU, 1 MiB or one map on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> sums = torch.zeros(1, 1, 2)
        >>> resize_add_(sums, torch.tensor([[[[3.0, 1.0]]], [[[-1.0, 1.0]]]]), clamp=True)
        >>> sums
        tensor([[[3., 2.]]])

    Source: Tang et al., "What the DAAM", ACL 2023, equation 4; Keys, "Cubic convolution interpolation", 1981.
    """
    ops.resize_add_(sums, maps, weight, clamp)


def reference(sums: Tensor, maps: Tensor, weight: Tensor | None, clamp: bool) -> Tensor:
    """The meaning of resize_add_: the new sums, by a matrix for each side. Dense, any dtype."""
    rows, columns = (_matrix(maps.shape[2 + i], sums.shape[1 + i]).to(maps) for i in (0, 1))
    resized = torch.einsum("Hh,mthw,Ww->mtHW", rows, maps, columns)
    resized = resized.clamp(min=0) if clamp else resized
    weight = maps.new_ones(len(maps)) if weight is None else weight.to(maps.dtype)
    return sums + torch.einsum("mthw,m->thw", resized, weight)


def _matrix(taken: int, made: int) -> Tensor:
    """[made, taken]: how much of each position goes into each, fp64."""
    matrix = torch.zeros(made, taken, dtype=torch.float64)
    for i in range(made):
        x = (i + 0.5) * taken / made - 0.5
        left = int(x // 1)
        for j in range(left - 1, left + 3):
            distance = abs(x - j)
            if distance <= 1:
                share = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                share = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3
            matrix[i, min(max(j, 0), taken - 1)] += share
    return matrix


def _check(sums: Tensor, maps: Tensor, weight: Tensor | None) -> None:
    if maps.dim() != 4:
        raise ValueError(f"maps must be [m, t, h, w], got shape {tuple(maps.shape)}")
    if sums.dim() != 3 or sums.shape[0] != maps.shape[1]:
        raise ValueError(f"sums must be [{maps.shape[1]}, height, width] to match maps, got shape {tuple(sums.shape)}")
    if maps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"maps must be float32 or float64, got {maps.dtype}")
    if sums.dtype != maps.dtype:
        raise TypeError(f"sums must have maps' dtype {maps.dtype}, got {sums.dtype}")
    if any(stride == 0 and size > 1 for stride, size in zip(sums.stride(), sums.shape, strict=True)):
        raise ValueError(f"sums is written in place and must not be expanded, got strides {tuple(sums.stride())}")
    check_device("sums", sums, maps)
    if sums.numel() and maps.shape[0] and not maps.numel():
        raise ValueError(f"maps must have at least one row and column to be resized, got shape {tuple(maps.shape)}")
    if weight is not None:
        if tuple(weight.shape) != (maps.shape[0],):
            raise ValueError(f"weight must have shape ({maps.shape[0]},), one entry a map, got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}")
        check_device("weight", weight, maps)


# --------------------------------------------------------------------------------------------------------------- CPU


# The longest side of a map that is resized by a product for each side: on one core of an AMD EPYC the pixels of 64 x 8 maps
# of 32 x 32 at 64 x 64 take 2.5 ms, and 13 as torch resizes, which reads 16 numbers a pixel by their addresses. The products
# grow with the side.
LONGEST_SIDE = 256
# Of enlarged maps, from which on a thread of its own is worth waking.
CONDUCTED_BYTES = 4 << 20


def _resize_add_cpu(sums: Tensor, maps: Tensor, weight: Tensor | None, clamp: bool) -> None:
    factors = maps.new_ones(len(maps)) if weight is None else weight.to(maps.dtype)
    if not clamp:  # linear: added up first, and resized once
        maps, factors = torch.einsum("m,mthw->thw", factors, maps)[None], maps.new_ones(1)
    large = len(maps) * sums.numel() * sums.element_size() >= CONDUCTED_BYTES
    (conducted(_resize_in_blocks) if large else _resize_in_blocks)(sums, maps, factors, clamp)


def _resize_in_blocks(sums: Tensor, maps: Tensor, factors: Tensor, clamp: bool) -> None:
    tokens, height, width = sums.shape
    most = max(1, block_bytes(maps, BLOCK_BYTES) // (height * width * sums.element_size()))

    def some(of: slice) -> None:
        """All maps of a few tokens, in order."""
        own = maps[:, of]
        resize = _resizing(own, height, width)
        for block in row_chunks(len(own), own.shape[1], most):
            resized = resize(own[block])
            if clamp:
                resized = resized.clamp(min=0)
            sums[of] += (factors[block] @ resized.flatten(1)).view(-1, height, width)

    together(each(some, shares(tokens, max(threads(), -(-tokens // most)))))


def _resizing(maps: Tensor, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """What makes [m, t, height, width] of a few of these maps."""
    h, w = maps.shape[2:]
    if (h, w) == (height, width):
        return lambda some: some
    # In a product NaN would reach a whole map, not its surroundings alone.
    if maps.device.type != "cpu" or max(h, w) > LONGEST_SIDE or not bool(maps.sum().isfinite()):
        return lambda some: F.interpolate(some, size=(height, width), mode="bicubic")
    down, across = _parts(h, height, maps.dtype), _parts(w, width, maps.dtype)

    def by_products(some: Tensor) -> Tensor:
        tall = product(some.mT.reshape(-1, h), down).view(-1, w, height)
        return product(tall.mT.reshape(-1, w), across).view(*some.shape[:2], height, width)

    return by_products


def _parts(taken: int, made: int, dtype: torch.dtype) -> Tensor:
    """[made, taken]: how much of each position torch puts into each."""
    return F.interpolate(torch.eye(taken, dtype=dtype)[None, None], size=(made, taken), mode="bicubic")[0, 0]


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _tap_share(distance):
    """The cubic kernel with a = -0.75 at distances of 0 to 2."""
    near = (1.25 * distance - 2.25) * distance * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    return tl.where(distance <= 1, near, far)


@jit
def _resize_add_kernel(
    sums_ptr,
    maps_ptr,
    weight_ptr,
    n_maps,
    height,
    width,
    rows,
    columns,
    stride_sums_token,
    stride_sums_row,
    stride_sums_column,
    stride_maps_map,
    stride_maps_token,
    stride_maps_row,
    stride_maps_column,
    WEIGHTED: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """A block of pixels of one token, all maps in order."""
    token = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    # Where the pixel's centre lies among the map's positions.
    at_y = (y.to(tl.float32) + 0.5) * (rows / height) - 0.5
    at_x = (x.to(tl.float32) + 0.5) * (columns / width) - 0.5
    top, left = tl.floor(at_y), tl.floor(at_x)
    total = tl.zeros([BLOCK_PIXELS], tl.float32)
    for m in range(0, n_maps):
        map_ptr = maps_ptr + tl.cast(m, tl.int64) * stride_maps_map + token * stride_maps_token
        resized = tl.zeros([BLOCK_PIXELS], tl.float32)
        for i in tl.static_range(0, 4):
            row = tl.minimum(tl.maximum(top.to(tl.int64) - 1 + i, 0), rows - 1)
            share_y = _tap_share(tl.abs(at_y - (top - 1 + i)))
            line = tl.zeros([BLOCK_PIXELS], tl.float32)
            for j in tl.static_range(0, 4):
                column = tl.minimum(tl.maximum(left.to(tl.int64) - 1 + j, 0), columns - 1)
                values = tl.load(map_ptr + row * stride_maps_row + column * stride_maps_column, mask=inside, other=0.0)
                line += values * _tap_share(tl.abs(at_x - (left - 1 + j)))
            resized += line * share_y
        if CLAMP:
            resized = tl.where(resized < 0, 0.0, resized)  # NaN stays
        if WEIGHTED:
            resized *= tl.load(weight_ptr + m)
        total += resized
    ptrs = sums_ptr + token * stride_sums_token + y * stride_sums_row + x * stride_sums_column
    tl.store(ptrs, tl.load(ptrs, mask=inside) + total, mask=inside)


def _resize_add_triton(sums: Tensor, maps: Tensor, weight: Tensor | None, clamp: bool) -> None:
    tokens, height, width = sums.shape
    factors = sums if weight is None else weight.float().contiguous()
    block = 256
    with torch.cuda.device_of(sums):
        for chunk in row_chunks(tokens, 1, 65535):  # the grid's second dimension ends there
            _resize_add_kernel[(-(-height * width // block), chunk.stop - chunk.start)](
                sums[chunk], maps[:, chunk], factors, maps.shape[0], height, width, *maps.shape[2:], *sums.stride(),
                *maps.stride(), WEIGHTED=weight is not None, CLAMP=clamp, BLOCK_PIXELS=block, num_warps=4,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


def _resize_add(sums: Tensor, maps: Tensor, weight: Tensor | None, clamp: bool) -> None:
    _check(sums, maps, weight)
    if sums.numel() and maps.shape[0]:
        run = _resize_add_triton if implementation("resize_add", sums) == "triton" else _resize_add_cpu
        run(sums, maps, weight, clamp)


def _resize_add_fake(sums: Tensor, maps: Tensor, weight: Tensor | None, clamp: bool) -> None:
    _check(sums, maps, weight)


register(
    "resize_add_",
    "(Tensor(a!) sums, Tensor maps, Tensor? weight, bool clamp) -> ()",
    _resize_add,
    fake=_resize_add_fake,
    mutates=("sums",),
)
