"""Every kernel, compiled without a GPU at published shapes with the launcher's own configuration and specialisation.

What is checked of one architecture; each has a file of its own, test_ahead_of_time_*.py, so that test processes share them out.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sparsefeat_kernels
import torch
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

KERNELS = {
    "_auxk_dense_kernel",
    "_auxk_picked_kernel",
    "_attention_column_join_kernel",
    "_attention_column_kernel",
    "_attention_flash_kernel",
    "_attention_gradient_keys_kernel",
    "_attention_gradient_rows_kernel",
    "_attention_map_kernel",
    "_attention_rows_kernel",
    "_attention_tap_kernel",
    "_concept_attention_join_kernel",
    "_concept_attention_kernel",
    "_concept_map_kernel",
    "_resize_add_kernel",
    "_entry_keys_kernel",
    "_feature_stats_join_kernel",
    "_feature_stats_scan_kernel",
    "_sparse_decode_grad_values_kernel",
    "_sparse_decode_sum_kernel",
    "_sparse_edit_row_kernel",
    "_threshold_encode_compact_kernel",
    "_threshold_encode_product_kernel",
    "_encoder_bias_kernel",
    "_topk_encode_product_kernel",
    "_topk_encode_repair_kernel",
    "_topk_encode_select_kernel",
    "_topk_encode_stored_kernel",
    "_weight_gradient_entries_kernel",
    "_weight_gradient_join_kernel",
    "_weight_gradient_segment_kernel",
}
ATTENTION = {name for name in KERNELS if name.startswith(("_attention", "_concept")) and "join" not in name}
ENCODERS = {name for name in KERNELS if "encode" in name}
PRODUCTS = {name for name in ENCODERS if name.endswith("_product_kernel")}
# Shared memory a program may ask for: 99 KiB on the smaller GPUs, which sm_80 stands for as well. Every sm_100 has 227.
SHARED_LIMIT = dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_120"), 99 << 10) | {
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
# What a tuning table of the very device chose may have all of it.
TUNED_SHARED_LIMIT = SHARED_LIMIT | {"sm_80": 163 << 10, "sm_90": 227 << 10}


SCRIPT = Path(__file__).with_name("ahead_of_time.py")
ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "ahead_of_time"
PACKAGES = Path(sparsefeat_kernels.__file__).parents[1]


def environment(cache: Path) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(PACKAGES), str(ROOT)])
    return found | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def digest(architecture: str) -> str:
    """Of all that a compiler's answer depends on."""
    asked = os.environ.get("AHEAD_OF_TIME", "")
    of = hashlib.sha256(f"{architecture} {asked} {importlib.metadata.version('triton')} {torch.__version__}".encode())
    for path in (
        SCRIPT,
        *sorted((ROOT / "bench").glob("pretended_driver.*")),
        ROOT / "bench" / "sass.py",
        *sorted(Path(sparsefeat_kernels.__file__).parent.rglob("*.*")),
    ):
        if path.suffix in (".py", ".json", ".c"):
            of.update(path.read_bytes())
    return of.hexdigest()[:16]


def compiled_for(architecture: str, folder: Path) -> list[dict[str, Any]]:
    """What the compiler made of the kernels, in a process of its own; kept in build/ for as long as nothing changes, of each
    Triton that takes its turn."""
    program = f"{architecture}-{importlib.metadata.version('triton')}"
    kept = KEPT / f"{program}-{digest(architecture)}.jsonl"
    if not kept.is_file():
        command = [sys.executable, str(SCRIPT), str(folder), architecture]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(folder))
        assert done.returncode == 0, done.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(done.stdout)
        for older in kept.parent.glob(f"{program}-*.jsonl"):
            older.unlink(missing_ok=True)
        temporary.replace(kept)
    return [json.loads(line) for line in kept.read_text().splitlines()]


class Compiled:
    """Of one architecture."""

    architecture: str
    kernels = KERNELS

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        if not TRITON_AVAILABLE:
            pytest.skip("Triton is not installed")
        return compiled_for(cls.architecture, tmp_path_factory.mktemp(cls.architecture))

    def test_every_kernel_compiles_and_fits(self, rows: list[dict[str, Any]]):
        assert {row["kernel"] for row in rows} == self.kernels
        for row in rows:
            limits = TUNED_SHARED_LIMIT if row.get("tuned") or row.get("large") else SHARED_LIMIT
            assert row["shared"] <= limits[self.architecture], row

    def test_encoders_spill_no_register(self, rows: list[dict[str, Any]]):
        found = [row for row in rows if row["kernel"] in ENCODERS]
        assert len(found) > 5
        for row in found:
            assert row["spills"] == 0, row

    def test_encoders_read_their_tiles_by_the_copy_engine_where_there_is_one(self, rows: list[dict[str, Any]]):
        products = [row for row in rows if row["kernel"] in PRODUCTS]
        assert {row["kernel"] for row in products} == PRODUCTS
        copies = self.architecture in ("sm_90", "sm_100", "sm_120")
        assert all((row.get("copies", 0) > 0) == copies for row in products)

    def test_the_large_tile_runs_by_itself_on_sm_90_alone(self, rows: list[dict[str, Any]]):
        found = {(row["kernel"], row["large"]) for row in rows if row["kernel"] in PRODUCTS and not row.get("tuned")}
        sizes = (False, True) if self.architecture == "sm_90" else (False,)
        assert found == {(kernel, large) for kernel in PRODUCTS for large in sizes}

    def test_half_precision_products_run_on_matrix_units(self, rows: list[dict[str, Any]]):
        products = [row for row in rows if row["kernel"] in PRODUCTS | ATTENTION]
        assert all(row["matrix_unit"] for row in products if row["dtype"] == "bfloat16")


class CompiledInFull(Compiled):
    """Of an architecture that the kernels are made for."""

    def test_no_register_is_spilled(self, rows: list[dict[str, Any]]):
        for row in rows:
            assert row["spills"] == 0, row

    def test_loads_of_the_large_tensors_are_128_bits_wide(self, rows: list[dict[str, Any]]):
        large = (
            ATTENTION
            | PRODUCTS
            | {
                "_sparse_decode_sum_kernel",
                "_topk_encode_repair_kernel",
                "_topk_encode_select_kernel",
                "_topk_encode_stored_kernel",
            }
        )
        for row in rows:
            assert row["kernel"] not in large or row["wide_loads"] > 0, row


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
def test_no_kernel_is_compiled_again_because_the_number_of_rows_is_another(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "again"], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_what_one_triton_made_is_kept_while_another_has_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def compile(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        made.append(importlib.metadata.version("triton"))
        return subprocess.CompletedProcess(command, 0, json.dumps({"by": made[-1]}), "")

    monkeypatch.setattr(subprocess, "run", compile)
    monkeypatch.setattr(sys.modules[__name__], "KEPT", tmp_path)
    source = "the kernels"
    monkeypatch.setattr(sys.modules[__name__], "digest", lambda _: f"{importlib.metadata.version('triton')} {source}")
    for version in ("3.6.0", "3.7.1", "3.6.0", "3.7.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        assert compiled_for("sm_90", tmp_path) == [{"by": version}]
    assert made == ["3.6.0", "3.7.1"]
    source = "the kernels, changed"
    compiled_for("sm_90", tmp_path)
    assert len(list(tmp_path.glob("*"))) == 2  # of the older kernels nothing is left
