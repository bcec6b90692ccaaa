"""Every kernel, compiled without a GPU at published shapes with the launcher's own configuration and specialisation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sparsefeat_kernels
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "_attention_column_join_kernel",
    "_attention_column_kernel",
    "_attention_flash_kernel",
    "_attention_map_kernel",
    "_attention_rows_kernel",
    "_attention_tap_kernel",
    "_feature_stats_join_kernel",
    "_feature_stats_scan_kernel",
    "_prefilter_entries_kernel",
    "_prefilter_finish_kernel",
    "_prefilter_groups_kernel",
    "_prefilter_rescore_kernel",
    "_prefilter_rows_kernel",
    "_sparse_decode_grad_values_kernel",
    "_sparse_decode_sum_kernel",
    "_sparse_edit_row_kernel",
    "_threshold_encode_compact_kernel",
    "_threshold_encode_place_kernel",
    "_threshold_encode_product_kernel",
    "_topk_candidates_again_kernel",
    "_topk_candidates_finish_kernel",
    "_topk_candidates_product_kernel",
    "_topk_candidates_select_kernel",
    "_encoder_bias_kernel",
    "_topk_encode_product_kernel",
    "_topk_encode_select_kernel",
    "_weight_gradient_partial_kernel",
    "_weight_gradient_segment_kernel",
}
# Design B's two: of the tiles, and of the rows that are computed again.
CANDIDATES = {"_topk_candidates_again_kernel", "_topk_candidates_product_kernel"}
ATTENTION = {name for name in KERNELS if name.startswith("_attention") and "join" not in name}
# Shared memory a program may ask for: of sm_80 163 KiB, but 99 KiB on the smaller GPUs of that generation.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 99 << 10, "gfx942": 64 << 10}
# What a tuning table of the very device chose may have all of it.
TUNED_SHARED_LIMIT = SHARED_LIMIT | {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each architecture's compiler made of the kernels. One process an architecture, side by side."""
    processes = {}
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        packages = str(Path(sparsefeat_kernels.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": packages, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(Path(__file__).with_name("ahead_of_time.py")), str(folder), architecture]
        with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        processes[architecture] = process, folder
    found = {}
    for architecture, (process, folder) in processes.items():
        assert process.wait() == 0, (folder / "errors").read_text()
        found[architecture] = [json.loads(line) for line in (folder / "output").read_text().splitlines()]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(compiled: dict[str, list[dict[str, Any]]], architecture: str):
    rows = compiled[architecture]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= (TUNED_SHARED_LIMIT if row.get("tuned") else SHARED_LIMIT)[architecture], row


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_register_is_spilled(compiled: dict[str, list[dict[str, Any]]], architecture: str):
    for row in compiled[architecture]:
        assert row["spills"] == 0, row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_products_run_on_matrix_units(compiled: dict[str, list[dict[str, Any]]], architecture: str):
    products = [
        row
        for row in compiled[architecture]
        if row["kernel"].endswith("_encode_product_kernel") or row["kernel"] in ATTENTION | CANDIDATES
    ]
    assert all(row["matrix_unit"] for row in products if row["dtype"] == "bfloat16")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_loads_of_the_large_tensors_are_128_bits_wide(compiled: dict[str, list[dict[str, Any]]], architecture: str):
    large = (ATTENTION | CANDIDATES) | {
        "_prefilter_rescore_kernel",
        "_sparse_decode_sum_kernel",
        "_threshold_encode_product_kernel",
        "_topk_encode_product_kernel",
        "_topk_encode_select_kernel",
    }
    for row in compiled[architecture]:
        assert row["kernel"] not in large or row["wide_loads"] > 0, row
