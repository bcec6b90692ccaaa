"""The table of docs/attention.md, from what its tests do: `python tools/write_attention.py` runs them (a minute) and writes
docs/attention.json and the page; with --check it compares the page with the file alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "attention.md", ROOT / "docs" / "attention.json"
BEGIN, END = "<!-- the table: tools/write_attention.py -->", "<!-- end of the table -->"
TESTS = {
    "test_joint_maps_are_those_of_a_plain_softmax": "joint",
    "test_what_stands_in_quotes_comes_before_the_prompt_and_padding_behind_it": "joint",
    "test_query_query_maps_are_those_of_queries_before_the_rotary_embedding": "query_query",
    "test_cross_maps_are_those_of_a_plain_softmax_at_one_resolution": "cross",
    "test_maps_are_those_of_the_definition": "concept",
}


def passed() -> dict[str, list[str]]:
    """For each kind the families whose test passed."""
    files = ["tests/attention/test_families.py", "tests/attention/test_concepts.py"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", *files, f"--junit-xml={report}"], cwd=ROOT, check=True)
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, list[str]] = {kind: [] for kind in TESTS.values()}
    for case in cases:
        name, _, family = case.attrib["name"].rstrip("]").partition("[")
        if name in TESTS and not list(case):  # neither skipped nor failed
            found[TESTS[name]].append(family)
    return found


def table(results: dict[str, Any]) -> str:
    sys.path.insert(0, str(ROOT))
    from tests.families import families

    known, by_kind = families(), results["passed"]
    concept = {re.sub(r",.*", "", name).replace("sd3.5", "sd3") for name in by_kind["concept"]}
    lines = ["| models | `kind=` | text→image too | per frame |", "|---|---|---|---|"]
    for name in sorted({*by_kind["cross"], *by_kind["joint"]}, key=lambda name: known[name].title.casefold()):
        kinds = ["cross"] if name in by_kind["cross"] else ["joint", "text_renormalised"]
        kinds += ["query_query"] if name in by_kind["query_query"] else []
        kinds += ["concept"] if name in concept else []
        video = any(block.square is not None and len(block.square) == 3 for block in known[name].blocks)
        said = ", ".join(f"`{kind}`" for kind in kinds)
        both, frames = "yes" if name in by_kind["joint"] else "", "yes" if video else ""
        lines.append(f"| {known[name].title} | {said} | {both} | {frames} |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    if not check:
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        RESULTS.write_text(json.dumps({"versions": versions, "passed": passed()}, indent=1) + "\n")
    written = page(json.loads(RESULTS.read_text()))
    if not check:
        PAGE.write_text(written)
    elif written != PAGE.read_text():
        raise SystemExit("docs/attention.md is not what docs/attention.json says: run python tools/write_attention.py")


if __name__ == "__main__":
    main()
