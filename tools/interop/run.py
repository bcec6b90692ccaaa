"""Make every fixture again with the libraries' own packages, compare live, and write docs/interop.json.

    make interop                                                      # the environments, this, and the page
    .venv-peers/bin/python -m tools.interop.run [--orbax PYTHON]      # PYTHON: of an environment with orbax and jax

A format passes when its script writes files of the same form as the committed ones, sparsefeat's code and reconstruction
are within 1e-5 of what the package computed of files just written, and the package, opening what sparsefeat writes of
every fixture that the format can express (whosever format it was in), computes what sparsefeat does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefeat.sae import SAE, load_sae
from sparsefeat.sae.formats import FORMATS
from sparsefeat.sae.formats.format import Format
from tools.interop.fixture import FIXTURES

RESULTS = FIXTURES.parents[3] / "docs" / "interop.json"
# A script of its own environment: orbax's jax is kept away from the other libraries.
ORBAX = "fae"
TOLERANCE = 1e-5
# What a package says of itself may differ from run to run.
BY_ANOTHER_RUN = {"made_by.json"}
# orbax calls its files after their contents.
BY_CONTENTS = "tree"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--orbax", help="the Python of an environment with orbax-checkpoint and jax")
    orbax = parser.parse_args().orbax
    foreign = [f for f in FORMATS if f.name != "sparsefeat"]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        remade = {f.name: remake(f.name, made / f.name, orbax) for f in foreign}
        results = [check(f, made, remade[f.name], foreign) for f in foreign]
    failed = [f"{r['format']}: {problem}" for r in results for problem in r.pop("problems")]
    environment = {"python": platform.python_version(), "torch": version("torch").split("+")[0]}
    RESULTS.write_text(json.dumps({"command": "make interop", **environment, "formats": results}, indent=2) + "\n")
    print(f"wrote {RESULTS}")
    if failed:
        raise SystemExit("\n".join(failed))


def remake(name: str, folder: Path, orbax: str | None) -> str | None:
    """Run the format's script into `folder`; the reason if it could not be."""
    folder.mkdir(parents=True)
    if name != ORBAX:
        importlib.import_module(f"tools.interop.{name}").make(folder)
    elif orbax is None:
        return "no --orbax environment"
    else:
        done = subprocess.run([orbax, "-m", f"tools.interop.{name}", str(folder)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"tools/interop/{name}.py failed:\n{done.stderr}")
    return None


def check(found: Format, made: Path, not_remade: str | None, foreign: list[Format]) -> dict[str, Any]:
    folder = FIXTURES / found.name if not_remade else made / found.name
    problems = [] if not_remade else list(form_differences(folder, FIXTURES / found.name))
    read = [difference(load(case), expected(case)) for case in cases(folder)]
    package = next((m["package"] for m in map(made_by, cases(folder)) if m["package"]), None)
    written = check_written(found, made, foreign) if found.write is not None else None
    largest = max(read)
    if not largest < TOLERANCE:
        problems.append(f"reads what differs by {largest}")
    if written and not written["largest_difference"] < 10 * TOLERANCE:  # folded biases are rounded once more
        problems.append(f"writes what differs by {written['largest_difference']}")
    return {
        "format": found.name,
        "title": found.title,
        "package": package,
        "version": version(package) if package else None,
        "cases": [case.name for case in cases(folder)],
        "described_cases": [case.name for case in cases(folder) if is_described(made_by(case))],
        "read_difference": largest,
        "remade": not_remade is None,
        "written": written,
        "problems": problems,
    }


def check_written(found: Format, made: Path, foreign: list[Format]) -> dict[str, Any]:
    """Write every fixture of every format in this one, and let its package compute; ourselves where there is none."""
    assert found.write is not None
    module = importlib.import_module(f"tools.interop.{found.name}") if found.name != ORBAX else None
    peer = getattr(module, "open_with_peer", None)
    largest, n_written, n_refused = 0.0, 0, 0
    for source in foreign:
        for case in cases(made / source.name):
            sae = load(case)
            with tempfile.TemporaryDirectory() as temporary:
                target = Path(temporary)
                try:
                    found.write(target, sae.config, sae.state_dict())
                except ValueError:
                    n_refused += 1
                    continue
                x = expected(case)["x"]
                if peer is not None:
                    code, reconstruction = peer(target, x)
                    theirs = {"x": x, "code": code, "reconstruction": reconstruction}
                    largest = max(largest, difference(sae, theirs))
                else:
                    largest = max(largest, difference(load_sae(target, k=sae.config.k), expected(case)))
                n_written += 1
    return {
        "read_by": "the package" if peer is not None else "sparsefeat",
        "written": n_written,
        "refused": n_refused,
        "largest_difference": largest,
    }


def cases(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/expected.safetensors"))


def made_by(case: Path) -> dict[str, Any]:
    return json.loads((case / "made_by.json").read_text())


def is_described(made: dict[str, Any]) -> bool:
    """Whether files or outputs follow the format's description instead of a package."""
    return made["package"] is None or made.get("form") == "described"


def expected(case: Path) -> dict[str, Tensor]:
    return load_file(case / "expected.safetensors")


def load(case: Path) -> SAE:
    described = made_by(case)
    place = case / described["file"] if described.get("file") else case
    sae = load_sae(place, k=described.get("k"))
    return sae.at_timestep(described["timestep"]) if "timestep" in described else sae


@torch.no_grad()
def difference(sae: SAE, theirs: dict[str, Tensor]) -> float:
    """The largest, over the dense code and the reconstruction."""
    code, reconstruction = sae.encode(theirs["x"]).dense(), sae(theirs["x"])
    return max(
        float((code - theirs["code"].float()).abs().max()),
        float((reconstruction - theirs["reconstruction"].float()).abs().max()),
    )


def form_differences(remade: Path, committed: Path) -> Iterator[str]:
    """Files, tensors, shapes, dtypes and JSON keys that are not the same; numbers may depend on torch's version."""
    if [case.name for case in cases(remade)] != [case.name for case in cases(committed)]:
        yield f"cases {[c.name for c in cases(remade)]} are not the committed {[c.name for c in cases(committed)]}"
        return
    for case in cases(remade):
        for file in sorted(path for path in case.rglob("*") if path.is_file() and not left_out(path)):
            other = committed / case.name / file.relative_to(case)
            if not other.is_file():
                yield f"{case.name}/{file.name} is not among the committed files"
            elif form(file) != form(other):
                yield f"{case.name}/{file.name} has another form than the committed one"


def left_out(file: Path) -> bool:
    return file.name in BY_ANOTHER_RUN or BY_CONTENTS in file.parts


def form(file: Path) -> Any:
    if file.suffix == ".json":
        return sorted(json.loads(file.read_text()))
    if file.suffix == ".safetensors":
        return shapes(load_file(file))
    if file.suffix in (".pt", ".pth"):
        return shapes(torch.load(file, weights_only=True))
    return file.name


def shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, dict):
        return {name: shapes(inside) for name, inside in sorted(value.items(), key=lambda item: str(item[0]))}
    return type(value).__name__


if __name__ == "__main__":
    sys.exit(main())
