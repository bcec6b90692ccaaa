"""What a smoke run on a GPU makes the default there: `python -m bench.gpu prove --out FOLDER`, from the results of smoke.

An op whose every check passed, and of which every time of the kernels is below plain torch's, is written to
sparsefeat_kernels/proven.json with the name of the record, which goes to bench/results, and a digest of the kernels: a test
fails where they are others by now.
"""

from __future__ import annotations

import ast
import functools
import hashlib
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
KERNELS = {"attention_map_gradient": "attention_gradient", "attention_column_sums": "attention_column"}


def proven_ops(smoke: Mapping[str, Any]) -> dict[str, str]:
    """Of every op that was timed: "" where it is right and faster, else why its kernels are not the default."""
    return {op: _reason(op, smoke) for op in smoke.get("times", {}) if op != "training_step"}


def owner(kind: str) -> str:
    """The op of a line of the summary, whose checks are named after it: "sparse_edit", "sparse_edit_delta", "topk_encode,
    bias kept". Of two the longer name: "topk_encode_stored" is no check of topk_encode."""
    return max((op for op in times.OPS if op in kind), key=len, default="")


def _kernel_owner(name: str) -> str:
    """The op of a kernel, whose name begins with it, or with what `KERNELS` says."""
    return max((op for op in times.OPS if name.startswith(f"_{KERNELS.get(op, op)}_")), key=len, default="")


def _reason(op: str, smoke: Mapping[str, Any]) -> str:
    said = {kind: what for kind, what in smoke["summary"].items() if owner(kind) == op}
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


@functools.cache
def _jitted(source: str) -> list[ast.FunctionDef]:
    """What Triton compiles of a file."""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return [node for node in functions if {"jit", "jit_over_rows"} & set(map(ast.unparse, node.decorator_list))]


def kernels_digest(op: str, package: Path = PROVEN.parent) -> str:
    """Of the kernels that are named after an op, and of all that these call; comments, docstrings and layout do not count.
    Not in it are kernels of other names that an op launches besides, as the sort's keys, and how it launches."""
    functions = {node.name: node for path in sorted(package.rglob("*.py")) for node in _jitted(path.read_text())}
    wanted = [name for name in functions if name.endswith("_kernel") and _kernel_owner(name) == op]
    for name in wanted:  # which grows
        called = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        wanted += sorted(called & functions.keys() - set(wanted))
    digest = hashlib.sha256()
    for name in sorted(wanted):
        node = functions[name]
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        digest.update(f"{name} {ast.dump(node.args)} {[ast.dump(line) for line in body]}\n".encode())
    return digest.hexdigest()[:12] if wanted else ""


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
            of.pop(op, None) if of.get(op, {}).get("record") == name else None
        else:
            of[op] = {"record": name, "kernels": kernels_digest(op)}
        print(f"{op:24s}{reason or 'right and faster: the default'}")
    write_json(results / name, smoke)
    write_json(proven, known)
    return found
