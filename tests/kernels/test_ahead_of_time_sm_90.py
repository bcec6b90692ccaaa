"""sm_90: its kernels, compiled without a GPU."""

from typing import Any

import pytest

from tests.kernels.test_ahead_of_time import PRODUCTS, CompiledInFull

# Of the integer units, an entry of a product. topk_encode: 3.6 for the three best of 16, 1 for the key; threshold_encode: a
# comparison, a bit, and half of an instruction to join it. The smaller tile's programs wait for each other's, so that there is
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
            assert 0 < row["epilogue"] <= MOST_OF_EPILOGUE[row["kernel"]] * (1 if row["large"] else 2), row
