"""What a smoke run on a GPU makes the default there: `python -m bench.gpu prove --out FOLDER`, from the results of smoke.

An op whose every check passed, and of which every time of the kernels is below plain torch's, is written to
sparsefeat_kernels/proven.json with the name of the record, which goes to bench/results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsefeat_kernels import dispatch

from bench.gpu import times
from bench.run import file_name
from sparsefeat.whole import write_json

RESULTS = Path(__file__).parents[1] / "results"
PROVEN = Path(dispatch.__file__).with_name("proven.json")


def proven_ops(smoke: Mapping[str, Any]) -> dict[str, str]:
    """Of every op that was timed: "" where it is right and faster, else why its kernels are not the default."""
    return {op: _reason(op, smoke) for op in smoke.get("times", {}) if op != "training_step"}


def _owner(kind: str) -> str:
    """Of a line of the summary. The checks of an op are named after it: "sparse_edit", "sparse_edit_delta", "topk_encode,
    bias kept"; kernels with a name of their own, "topk_encode_stored", have those that begin so."""
    return max((op for op in times.OPS if op in kind), key=len, default="")


def _reason(op: str, smoke: Mapping[str, Any]) -> str:
    said = {kind: what for kind, what in smoke["summary"].items() if _owner(kind) == op}
    wrong = [f"{kind}: {what}" for kind, what in said.items() if what != "passed"]
    if wrong or op not in said:
        return wrong[0] if wrong else "not checked"
    for shape, found in smoke["times"][op].items():
        took = {record["provider"]: record["median_ms"] for record in found["records"] if record["checked"]}
        plain, kernels = took.get(times.PLAIN), took.get(times.KERNELS)
        if plain is None or kernels is None:
            return f"not timed at {shape}"
        if kernels >= plain:
            return f"{kernels:.3f} ms at {shape} where plain torch takes {plain:.3f} ms"
    return ""


def prove(out: Path, results: Path = RESULTS, proven: Path = PROVEN) -> dict[str, str]:
    smoke = json.loads((out / "smoke.json").read_text())
    if smoke["machine"]["rehearsal"]:
        raise SystemExit(f"{out / 'smoke.json'} is of a rehearsal, which proves nothing; run smoke on a GPU")
    name = f"smoke-{file_name(smoke['machine']['device'])}.json"
    found = proven_ops(smoke)
    known = json.loads(proven.read_text())
    of = known[smoke["machine"]["backend"]]
    for op, reason in found.items():
        if reason:  # a record of the same card that says so takes back what it said before
            of.pop(op, None) if of.get(op) == name else None
        else:
            of[op] = name
        print(f"{op:24s}{reason or 'right and faster: the default'}")
    write_json(results / name, smoke)
    write_json(proven, known)
    return found
