"""Tuning tables: their format, which entry a shape gets, what it changes, and the command that measures them. Every
table here is made up."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sparsefeat_kernels
import torch
from sparsefeat_kernels import force_triton, sparse_decode, topk_encode, tuning_table
from sparsefeat_kernels.decode import sparse_decode as decode_module
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode import topk as encode_module
from sparsefeat_kernels.encode.gpu import groups, tiles, topk
from sparsefeat_kernels.tuning import measure as tuning
from sparsefeat_kernels.tuning.measure import Configuration, Shape
from sparsefeat_kernels.tuning_table import FOLDER, Entry, Table, packaged_table, read_table, tuned

needs_triton = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")

PRODUCT = {"BLOCK_ROWS": 16, "BLOCK_LATENTS": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}


def entry(**changes: Any) -> dict[str, Any]:
    found = {"op": "topk_encode", "rows": 4, "d": 8, "n_latents": 256, "k": 2, "dtype": "float32", "design": "A"}
    return found | {"blocks": PRODUCT, "median_ms": 0.5} | changes


def table(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {"device": "Made-up 1", "capability": [9, 0], "backend": "cuda", "date": "2026-01-02", "versions": {}}
    return found | {"entries": list(entries)} | changes


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def forgotten():
    """What was read is kept by device and file name: not from one test to the next."""
    for cache in (tuning_table._table_of, tuning_table._nearest):
        cache.cache_clear()
    yield
    for cache in (tuning_table._table_of, tuning_table._nearest):
        cache.cache_clear()


# ----------------------------------------------------------------------------------------------------------- format


def test_a_table_comes_back_as_it_was_written(tmp_path: Path):
    wanted = Table("Made-up 1", (9, 0), "cuda", "2026-01-02", {"torch": "2.9"}, (Entry(**entry()), Entry(**entry(k=9))))
    assert read_table(write(tmp_path / "t.json", wanted.as_json() | {"measured": [], "missing": []})) == wanted


WRONG = {
    "op and design": entry(op="top"),
    "op and design must": entry(design="B"),
    "rows": entry(rows=0),
    "n_latents": entry(n_latents=2.5),
    "dtype": entry(dtype="half-float"),
    "blocks must be": entry(blocks=PRODUCT | {"GROUP": 4}),
    "BLOCK_ROWS": entry(blocks=PRODUCT | {"BLOCK_ROWS": 24}),
    "BLOCK_D": entry(blocks=PRODUCT | {"BLOCK_D": 2048}),
    "num_stages": entry(blocks=PRODUCT | {"num_stages": 0}),
    "median_ms": entry(median_ms="fast"),
    "TypeError": entry() | {"color": 1},
}


@pytest.mark.parametrize("named", WRONG)
def test_a_wrong_entry_is_refused_with_the_file_and_what_is_wrong(named: str, tmp_path: Path):
    path = write(tmp_path / "mine.json", table(entry(), WRONG[named]))
    with pytest.raises(ValueError, match=rf"mine\.json.*{named}.*tune again"):
        read_table(path)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.json is no tuning table"):
        read_table(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("A is faster")
    with pytest.raises(ValueError, match=r"text\.json is no tuning table"):
        read_table(tmp_path / "text.json")
    with pytest.raises(ValueError, match=r"lacks\.json is no tuning table: KeyError: 'device'"):
        read_table(write(tmp_path / "lacks.json", {"entries": [], "capability": [9, 0]}))


def test_every_packaged_table_is_valid():
    for path in FOLDER.glob("*.json"):
        assert read_table(path).entries, path


# ------------------------------------------------------------------------------------------------------------ lookup


def nearest(sizes: tuple[int, ...], *entries: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    whole = Table("Made-up 1", (9, 0), "cuda", "2026-01-02", {}, tuple(Entry(**e) for e in entries))
    found = whole.nearest("topk_encode", dtype, sizes)
    return None if found is None else found.median_ms


def test_the_entry_of_the_nearest_shape_counted_in_doublings():
    few, many = entry(rows=256, median_ms=1.0), entry(rows=4096, median_ms=2.0)
    assert nearest((256, 8, 256, 2), few, many) == 1.0
    assert nearest((1000, 8, 256, 2), few, many) == 1.0  # 1.97 doublings from 256, 2.03 halvings from 4096
    assert nearest((1050, 8, 256, 2), few, many) == 2.0
    # rows are a doubling off here, k two there
    assert nearest((512, 8, 256, 2), entry(rows=512, k=8, median_ms=3.0), few) == 1.0


def test_no_entry_of_another_dtype_or_op_or_far_away():
    assert nearest((4, 8, 256, 2), entry(), dtype=torch.bfloat16) is None
    assert nearest((4, 8, 256, 2)) is None
    assert nearest((64, 8, 256, 2), entry()) == 0.5  # four doublings
    assert nearest((65, 8, 256, 2), entry()) is None
    blocks = {"BLOCK_K": 4, "BLOCK_D": 64, "num_warps": 1}
    assert nearest((4, 8, 256, 2), entry(op="sparse_decode", design="A", blocks=blocks)) is None


def test_the_packaged_table_is_the_devices_own_or_one_of_its_capability(tmp_path: Path):
    write(tmp_path / "a.json", table(device="Made-up 1"))
    write(tmp_path / "b.json", table(device="Made-up 2"))
    write(tmp_path / "c.json", table(device="Made-up 3", backend="hip"))

    def device(name: str, capability: tuple[int, int] = (9, 0), of: str = "cuda") -> str | None:
        found = packaged_table(name, capability, of, tmp_path)
        return None if found is None else found.device

    assert device("Made-up 2") == "Made-up 2"
    assert device("Made-up 9") == "Made-up 1"
    assert device("Made-up 9", of="hip") == "Made-up 3"
    assert device("Made-up 1", (8, 0)) is None


def test_without_a_table_for_the_device_there_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    W = torch.empty(256, 8)
    monkeypatch.delenv("SPARSEFEAT_TUNING", raising=False)
    assert tuned("topk_encode", W, 4, 2) is None
    monkeypatch.setenv("SPARSEFEAT_TUNING", str(write(tmp_path / "t.json", table(entry()))))
    assert tuned("topk_encode", W, 4, 2) == Entry(**entry())
    assert tuned("topk_encode", W, 0, 2) is None
    monkeypatch.setenv("SPARSEFEAT_TUNING", "")
    assert tuned("topk_encode", W, 4, 2) is None
    monkeypatch.setenv("SPARSEFEAT_TUNING", str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match=r"gone\.json is no tuning table"):
        tuned("topk_encode", W, 4, 2)


# -------------------------------------------------------------------------------------------------- what it changes


def problem() -> tuple[torch.Tensor, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(-3, 4, size, generator=g).float().to(device) for size in ((4, 8), (256, 8), (256,), (8,))
    )


def launched(module: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, options) of what runs from here on."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Watched:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: (calls.append((self.name, options)), self.kernel[grid](*args, **options))

    for name in names:
        monkeypatch.setattr(module, name, Watched(name))
    return calls


@needs_triton
@pytest.mark.parametrize(("k", "rows"), [(2, [32]), (30, [])])  # the second is left to plain torch
def test_topk_encode_runs_the_blocks_of_the_table(
    k: int, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = launched(groups, ["_topk_encode_product_kernel"], monkeypatch)
    monkeypatch.setattr(topk, "takes_stored", lambda *_: False)  # as where that kernel is not proven
    inputs = problem()
    expected = encode_module.reference(*(t.double() for t in inputs), k)
    path = write(tmp_path / "t.json", table(entry(blocks=PRODUCT | {"BLOCK_ROWS": 32})))
    monkeypatch.setenv("SPARSEFEAT_TUNING", str(path))
    with force_triton():
        values, indices = topk_encode(*inputs, k)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(indices, expected[1])
    assert [options["BLOCK_ROWS"] for _, options in calls] == rows


@needs_triton
def test_sparse_decode_runs_the_blocks_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = launched(decode_module, ["_sparse_decode_sum_kernel"], monkeypatch)
    blocks = {"BLOCK_K": 2, "BLOCK_D": 4, "num_warps": 1}
    path = write(tmp_path / "t.json", table(entry(op="sparse_decode", design="A", blocks=blocks)))
    monkeypatch.setenv("SPARSEFEAT_TUNING", str(path))
    _, W, _, b = problem()
    values = torch.ones(4, 2, device=W.device)
    indices = torch.tensor([[1, 2]] * 4, dtype=torch.int32, device=W.device)
    with force_triton():
        assert torch.equal(sparse_decode(values, indices, W, b), (W[1] + W[2] + b).expand(4, 8))
    assert [{name: options[name] for name in blocks} for _, options in calls] == [blocks]


# ------------------------------------------------------------------------------------------------------- the command


def small(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Two shapes and two configurations each, for the interpreter."""
    tried = {
        "topk_encode": [Configuration("A", PRODUCT), Configuration("A", PRODUCT | {"BLOCK_LATENTS": 128})],
        "sparse_decode": [Configuration("A", {"BLOCK_K": 2, "BLOCK_D": 16, "num_warps": 1})],
    }
    monkeypatch.setattr(tuning, "configurations", lambda op, shape: tried[op])
    monkeypatch.setattr(tuning, "LEAST_ROUNDS", 1)
    return [Shape(3, 8, 128, 2, "float32"), Shape(3, 8, 100, 1, "float32")]


@needs_triton
def test_a_measured_table_has_the_fastest_right_answer_of_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, out = small(monkeypatch), tmp_path / "t.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with force_triton():
        measured = tuning.tune(out, tuning.OPS, wanted, device, 60.0, 0.0)
    content = json.loads(out.read_text())
    assert read_table(out) == measured
    assert [(e.op, e.n_latents) for e in measured.entries] == [
        ("topk_encode", 128), ("sparse_decode", 128), ("topk_encode", 100), ("sparse_decode", 100),
    ]  # fmt: skip
    assert content["missing"] == []
    for found in measured.entries:
        times = [
            m["median_ms"] for m in content["measured"] if (m["op"], m["n_latents"]) == (found.op, found.n_latents)
        ]
        assert found.median_ms == min(times)
    assert len(content["measured"]) == 6


@needs_triton
@pytest.mark.parametrize("wrong", ["values", "missed", "twice", "raises"])
def test_a_wrong_answer_is_not_timed_however_fast(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = small(monkeypatch)[:1]
    right = tuning.topk_encode_triton

    def broken(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = right(*args, **options)
        if options["blocks"] is not PRODUCT:
            return values, indices
        if wrong == "raises":
            raise RuntimeError("out of resources: shared memory")
        if wrong == "values":
            values = values + 1e-4
        if wrong == "twice":
            values, indices = values[:, :1].expand(-1, 2), indices[:, :1].expand(-1, 2)
        if wrong == "missed":  # the third instead of the second
            three = right(*args[:4], 3, "relu", blocks=options["blocks"])
            values, indices = three[0][:, [0, 2]], three[1][:, [0, 2]]
        return values, indices

    monkeypatch.setattr(tuning, "topk_encode_triton", broken)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with force_triton():
        measured = tuning.tune(tmp_path / "t.json", ("topk_encode",), wanted, device, 60.0, 0.0)
    assert [found.blocks["BLOCK_LATENTS"] for found in measured.entries] == [128]
    a = json.loads((tmp_path / "t.json").read_text())["measured"][0]
    says = {
        "values": "a value is wrong",
        "missed": "a latent was missed",
        "twice": "chosen twice",
        "raises": "shared memory",
    }
    assert a["blocks"] == PRODUCT
    assert says[wrong] in a["fault"]


class Graph:
    """Of a call: its replays are counted apart."""

    def __init__(self, run: Any) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1


def test_a_gpu_is_timed_by_replays_of_graphs(monkeypatch: pytest.MonkeyPatch):
    graphs, launched = [], []
    monkeypatch.setattr(tuning, "captured", lambda run: graphs.append(Graph(run)) or graphs[-1])
    calls = {0: lambda: launched.append(0), 2: lambda: launched.append(2)}
    timed, replayed = tuning.timed_calls(calls, "cuda")
    for run in timed.values():
        run()
    assert replayed
    assert [graph.replays for graph in graphs] == [1, 1]
    assert [graph.run for graph in graphs] == list(calls.values())
    assert (list(timed), launched) == ([0, 2], [])
    assert tuning.timed_calls(calls, "cpu") == (calls, False)


def test_where_one_call_cannot_be_captured_all_are_timed_as_they_are_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = {0: lambda: None, 1: lambda: None}

    def captured(run: Any) -> Graph:
        if run is calls[1]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph(run)

    monkeypatch.setattr(tuning, "captured", captured)
    assert tuning.timed_calls(calls, "cuda") == (calls, False)
    assert "timed with what the host takes: no graph of a call (RuntimeError: operation not" in capsys.readouterr().out


@needs_triton
def test_shapes_after_the_time_is_over_are_listed_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, out = small(monkeypatch), tmp_path / "t.json"
    measured = tuning.tune(out, ("topk_encode",), wanted, "cpu", -1.0)
    assert measured.entries == ()
    assert [m["n_latents"] for m in json.loads(out.read_text())["missing"]] == [128, 100]


def test_published_shapes_are_measured_the_defaults_first(monkeypatch: pytest.MonkeyPatch):
    of_saeuron = next(iter(tuning.shapes()))
    assert of_saeuron == Shape(4096, 1280, 20480, 32, "bfloat16")
    for dtype in ("bfloat16", "float32"):
        found = tuning.configurations("topk_encode", replace(of_saeuron, dtype=dtype))
        x, W = (torch.empty(rows, 1280, dtype=getattr(torch, dtype), device="meta") for rows in (4096, 20480))
        assert found[0].blocks == tiles.default_tile(x, W)
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "has_warp_groups", lambda: True)
    assert tuning.configurations("topk_encode", of_saeuron)[1].blocks == tiles.default_tile(x.bfloat16(), W.bfloat16())
    assert tuning.configurations("topk_encode", replace(of_saeuron, n_latents=5120, k=160)) == []
    for shape in tuning.shapes():
        for op in tuning.OPS:
            for found in tuning.configurations(op, shape):  # each can stand in a table
                Entry(op, shape.rows, shape.d, shape.n_latents, shape.k, shape.dtype, found.design, found.blocks, 1.0)


@pytest.mark.parametrize(
    ("rows", "d", "n_latents", "dtype", "large"),
    [(1, 1280, 20480, "bfloat16", True), (384, 1280, 5120, "bfloat16", False), (385, 1280, 5120, "float16", True),
     (4096, 1280, 20480, "float32", False), (4096, 1281, 20480, "bfloat16", False)],
)  # fmt: skip
def test_the_large_tile_is_the_default_of_sm_90_where_it_pays(
    rows: int, d: int, n_latents: int, dtype: str, large: bool, monkeypatch: pytest.MonkeyPatch
):
    """Of 132 multiprocessors more than half have one; of rows that begin at multiples of 16 bytes."""
    x, W = (torch.empty(size, d, dtype=getattr(torch, dtype), device="meta") for size in (rows, n_latents))
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "multiprocessors", lambda _: 132)
    for warp_groups in (False, True):
        monkeypatch.setattr(tiles, "has_warp_groups", lambda of=warp_groups: of)
        assert (tiles.default_tile(x, W) == tiles.LARGE_TILE) == (large and warp_groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path: Path):
    with pytest.raises(SystemExit, match="a tuning table is measured on a GPU, and torch finds none"):
        tuning.main(["--out", str(tmp_path / "t.json")])
    assert list(tmp_path.iterdir()) == []


@needs_triton
def test_other_processes_compile_what_will_run_without_a_gpu(tmp_path: Path):
    program = """
from sparsefeat_kernels.tuning.measure import Configuration, Shape, compile_ahead
shape = Shape(128, 64, 256, 2, "bfloat16")
product = {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
compile_ahead(("cuda", 90, 32), "topk_encode", shape, Configuration("A", product))
"""
    packages = str(Path(sparsefeat_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": packages, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert kernels == {
        "_encoder_bias_kernel", "_topk_encode_product_kernel", "_topk_encode_repair_kernel",
        "_topk_encode_select_kernel",
    }  # fmt: skip
