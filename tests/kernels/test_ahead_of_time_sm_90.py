"""sm_90: its kernels, compiled without a GPU."""

from typing import Any

from tests.kernels.test_ahead_of_time import CompiledInFull

# Of the integer units, an entry of topk_encode's product: 3.6 for the three best of 16, 1 for the key. The smaller tile's
# programs wait for each other's, so that there is time for twice as many.
MOST_OF_EPILOGUE = {True: 6.0, False: 12.0}


class TestSm90(CompiledInFull):
    architecture = "sm_90"

    def test_topk_encode_multiplies_by_warp_groups_and_its_epilogue_stays_short(self, rows: list[dict[str, Any]]):
        products = [row for row in rows if row["kernel"] == "_topk_encode_product_kernel"]
        assert {row["large"] for row in products} == {True, False}
        for row in products:
            assert row["warp_groups"] > 0, row
            assert 0 < row["epilogue"] <= MOST_OF_EPILOGUE[row["large"]], row
