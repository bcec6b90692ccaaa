"""`python -m bench.gpu smoke --out FOLDER`, then `python -m bench.gpu full --out FOLDER`: see smoke.py and full.py. At home,
`python -m bench.gpu prove --out FOLDER`: see prove.py. Where diffusers is installed, `python -m bench.gpu pipelines --out FOLDER`:
see pipelines.py.

Needs torch, triton, numpy, matplotlib, pillow, pyyaml, safetensors and huggingface_hub, and hypothesis, pytest and
pytest-benchmark for the tests; the package need not be installed.
Other libraries are measured where they can be imported: PYTHONPATH may name a folder of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import torch

from bench.gpu import full, prove, repeats, smoke


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    of = parser.add_subparsers(dest="command", required=True)
    first = of.add_parser("smoke", help="is every op right, and what do the most wanted ones take: 150 s")
    first.add_argument("--rehearse", action="store_true", help="on a CPU, interpreted, with tiny shapes")
    first.add_argument("--only", nargs="+", default=(), metavar="OP", help="ops whose names begin so")
    second = of.add_parser("full", help="every figure, tests, tuning, scaling: seven minutes")
    second.add_argument("--only", choices=full.STAGES, action="append", help="one stage; may be given more than once")
    second.add_argument(
        "--stage", choices=full.STAGES, help="take one stage in this process, as --only does in another"
    )
    second.add_argument("--spent", type=float, default=0.0, metavar="SECONDS", help="of the budget, before")
    second.add_argument("--resume", type=Path, metavar="FOLDER", help="results of an earlier run to go on from")
    third = of.add_parser("draw", help="tables and plots of what full measured")
    fourth = of.add_parser("prove", help="make the default what smoke found right and faster")
    fifth = of.add_parser("pipelines", help="what instruments cost a pipeline")
    of.add_parser("once", help="every op once on small inputs: what a sanitizer watches")
    for command, budget in ((first, None), (second, full.BUDGET_S)):
        command.add_argument("--budget", type=float, default=budget, metavar="SECONDS")
    for command in (first, second, third, fourth, fifth):
        command.add_argument("--out", type=Path, metavar="FOLDER", help="where the results are; otherwise $OUT says it")
    arguments = parser.parse_args(given)
    if arguments.command == "once":
        repeats.one_of_each("cuda" if torch.cuda.is_available() else "cpu")
        return
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if out is None:
        parser.error("--out is needed: a folder for the results")
    if arguments.command in ("draw", "prove"):
        full.draw(out) if arguments.command == "draw" else prove.prove(out)
        return
    if arguments.command == "pipelines":
        if importlib.util.find_spec("diffusers") is None:
            parser.error("pipelines needs diffusers: install it, or name a folder with it in PYTHONPATH")
        from bench.gpu.pipelines import pipelines  # diffusers, which the others do without

        pipelines(out)
        return
    if arguments.command == "smoke":
        rehearse = arguments.rehearse or not torch.cuda.is_available()
        if not smoke.smoke(out, arguments.budget, arguments.only, rehearse):
            raise SystemExit(1)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: python -m bench.run measures a CPU")
    full.full(out, arguments.budget, arguments.spent, arguments.only or (), arguments.stage, arguments.resume)


if __name__ == "__main__":
    main()
