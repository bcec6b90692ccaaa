"""sm_90: its kernels, compiled without a GPU."""

import ctypes
from typing import Any

import pytest
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

from bench import pretended_driver
from tests.kernels.test_ahead_of_time import PRODUCTS, CompiledInFull

# Of the integer units, an entry of a product. topk_encode: 3.6 for the three best of 16, 1 for the key, 2 for a sign and its
# place; threshold_encode: a comparison, a bit, and half of an instruction to join it. The smaller tile's programs wait for each other's, so that there is
# time for twice as many.
MOST_OF_EPILOGUE = {"_topk_encode_product_kernel": 6.0, "_threshold_encode_product_kernel": 4.0}


class TestSm90(CompiledInFull):
    architecture = "sm_90"

    def test_a_driver_takes_every_launch(self, rows: list[dict[str, Any]]):
        if not any("launched" in row for row in rows):
            pytest.skip("no compiler of C is installed")
        assert all(row["launched"] for row in rows)

    def test_encoders_multiply_by_warp_groups_and_their_epilogues_stay_short(self, rows: list[dict[str, Any]]):
        products = [row for row in rows if row["kernel"] in PRODUCTS and row["dtype"] == "bfloat16"]
        assert {(row["kernel"], row["large"]) for row in products} == {(p, large) for p in PRODUCTS for large in (0, 1)}
        for row in products:
            assert row["warp_groups"] == row["products"] > 0, (
                row
            )  # counted in all kernels together, and in this one alone
            most = MOST_OF_EPILOGUE[row["kernel"]] + 2 * row["signed"]
            assert 0 < row["epilogue"] <= most * (1 if row["large"] else 2), row


@pytest.mark.skipif(
    not (TRITON_AVAILABLE and pretended_driver.compiler()), reason="Triton or a compiler of C is not installed"
)
@pytest.mark.parametrize(
    ("address", "apart", "height", "taken"),
    [(1 << 20, 2560, 128, True), (1 << 20, 2568, 128, False), ((1 << 20) + 8, 2560, 128, False), (1 << 20, 2560, 512, False),
     (1 << 20, 2544, 128, False)],
)  # fmt: skip
def test_that_driver_refuses_tiles_that_the_copy_engine_cannot_read(tmp_path, address, apart, height, taken):
    """Of bf16 [4096, 1280]: rows begin at multiples of 16 bytes and do not overlap, a tile has 256 rows at most."""
    built = tmp_path / "driver.so"
    pretended_driver.build(built)
    found = ctypes.CDLL(str(built)).cuTensorMapEncodeTiled(
        ctypes.c_void_p(1 << 12), 9, 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(1280, 4096),
        (ctypes.c_uint64 * 1)(apart), (ctypes.c_uint32 * 2)(64, height), (ctypes.c_uint32 * 2)(1, 1), 0, 3, 2, 0,
    )  # fmt: skip
    assert (found == 0) == taken
