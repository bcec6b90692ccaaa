"""What is installed: every package listed, the kernels alone importable, assets within their budget."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def listed_packages() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].split())


def packages_on_disk() -> set[str]:
    found = set()
    for base in (ROOT / "sparsefeat", ROOT / "kernels" / "sparsefeat_kernels"):
        for init in base.rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(base.parent).parts))
    return found


def test_every_package_on_disk_is_listed_for_installation():
    assert listed_packages() == packages_on_disk()


def test_importing_sparsefeat_loads_neither_torch_nor_diffusers():
    code = "import sys, sparsefeat; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_every_public_name_resolves_and_an_unknown_one_lists_them():
    import sparsefeat

    for name in sparsefeat.__all__:
        assert getattr(sparsefeat, name) is not None
    with pytest.raises(AttributeError, match="load_sae"):
        sparsefeat.load_say  # noqa: B018


def test_embedded_assets_stay_within_28_mebibytes():
    total = sum(path.stat().st_size for path in (ROOT / "sparsefeat" / "assets").rglob("*") if path.is_file())
    assert total <= 28 * 2**20, f"{total / 2**20:.1f} MiB"


def test_every_file_that_says_a_version_or_a_python_says_the_same():
    import sparsefeat

    project = (ROOT / "pyproject.toml").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = {
        sparsefeat.__version__,
        *re.findall(r'^version = "(.*)"$', project, re.MULTILINE),
        *re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE),
        re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0],
    }
    assert len(versions) == 1
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == pythons
    assert ".ci/run" in workflow
    assert f'requires-python = ">={pythons[0]}"' in project
    for guide in ("README.md", "docs/stability.md"):
        assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / guide).read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("sparsefeat-*.whl"))


def test_the_source_distribution_holds_what_its_tests_need_and_runs_them(tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    for part in ("bench", "docs", "kernels", "sparsefeat", "tests", "tools"):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and not {"__pycache__", ".hypothesis"} & set(path.parts):
                assert (unpacked / path.relative_to(ROOT)).is_file(), path
    # In a process of its own, in the unpacked folder: its tests, its package.
    (unpacked / "tests" / "test_where_it_is.py").write_text(
        "import sparsefeat, sparsefeat_kernels, tests.tiny\n"
        "def test_it_is_the_unpacked_one():\n"
        f"    assert {str(unpacked)!r} in sparsefeat.__file__ and {str(unpacked)!r} in sparsefeat_kernels.__file__\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_where_it_is.py", "tests/steering/test_where.py"]
    run = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_wheel_holds_both_packages_their_types_and_every_asset(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "sparsefeat/py.typed" in names
    assert "sparsefeat_kernels/py.typed" in names
    for path in (ROOT / "sparsefeat").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names, path
    assert any(name.endswith("licenses/NOTICE") for name in names)


def test_the_metadata_has_no_link_that_leads_nowhere_and_the_guides_are_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    body = metadata.partition("\n\n")[2]
    assert "# sparsefeat" in body
    assert [t for t in re.findall(r"\]\(([^)]+)\)", body) if not t.startswith(("http", "#"))] == []
    guides = {name.rpartition("/")[2] for name in names if "/share/doc/sparsefeat/" in name}
    assert guides == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_links_are_absolute_where_the_repository_has_an_address():
    made = importlib.util.spec_from_file_location("setup_of_sparsefeat", ROOT / "setup.py")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    text = "![p](docs/demo.png) [`docs/a.md`](docs/a.md) [there](https://example.org) [here](#top)"
    assert module.long_description(text, "https://example.org/s") == (
        "![p](https://example.org/s/raw/HEAD/docs/demo.png) [`docs/a.md`](https://example.org/s/blob/HEAD/docs/a.md)"
        " [there](https://example.org) [here](#top)"
    )
    assert module.long_description(text, None) == " `docs/a.md` [there](https://example.org) [here](#top)"


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-3.10.txt"])
def test_every_requirement_of_every_extra_is_pinned_to_what_the_package_allows(constraints, wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(
            next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        ).decode()
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    assert {"explore", "docs", "collect"} <= set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    lines = (ROOT / constraints).read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    assert {r.name for r in required if pinned.get(canonicalize_name(r.name), "0") not in r.specifier} == set()


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    """Unpacked elsewhere, with this environment's dependencies, the command finds its code and its assets there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); import sparsefeat, sparsefeat_kernels, sparsefeat.cli as cli;"
        "assert 'site' in sparsefeat.__file__ and 'site' in sparsefeat_kernels.__file__, sparsefeat.__file__;"
        "cli.app(['sae', 'info'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "unet." in run.stdout


# What type checkers see ----------------------------------------------------------------------------------------------

# A user's file: what is right passes, and each kind of mistake is an error on its own line.
USERS_FILE = """\
import numpy as np
import sparsefeat as sf
from sparsefeat.assets import JOINT, load_pipeline

sae = sf.load_sae("folder")
class Own(sf.Instrument):
    def hookpoints(self) -> tuple[str, ...]:
        return ("unet.mid_block",)
    def end_call(self, call: object) -> float:
        return 1.0
rec, maps, steer, own = sf.Record(sae), sf.HeatMaps(), sf.Steer(sae, scale={1: 2.0}), Own()
with sf.attach(object(), rec, maps, steer, own) as run:
    reveal_type(run)
    reveal_type(run[rec])
    reveal_type(run.calls[0][maps])
    reveal_type(run[own])
reveal_type(load_pipeline())
reveal_type(load_pipeline(JOINT))
load_pipeline(JOINT)("a fox", num_inference_steps=2)
sf.presets.sdxl_unbox.icon(sae, 3)
sf.Steer(sae, add={1: 2.0}, mask=np.zeros((8, 8)))
sf.Steer(sae, add={1: 2.0}, mask=[[0.0, 1.0]])
sf.Record(3)  # wrong
sf.Steer(sae, scal={1: 2.0})  # wrong
sf.nothing  # wrong
"""


def test_type_checkers_are_told_of_the_names_that_are_imported_lazily():
    import sparsefeat

    tree = ast.parse((ROOT / "sparsefeat" / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    told = {
        (alias.asname, alias.name, statement.module)
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    homes = {name: sparsefeat._HOME[name] for name in sparsefeat.__all__ if name != "__version__"}
    assert told == {(n, n, home.removesuffix(f".{n}") if n == "presets" else home) for n, home in homes.items()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that has the wheel, and beside it what is installed here (torch, diffusers)."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


CHECKERS = {
    "mypy": ["--ignore-missing-imports", "--python-executable"],
    "pyright": ["--pythonpath"],
}
# No type of ours is from these, and mypy would read them for half a minute: what it says is the same.
UNREAD = ["transformers", "torch._dynamo", "torch._inductor", "torch.distributed", "torch.fx", "peft", "gradio"]


def needs_pyright() -> None:
    if shutil.which("node") is None:
        pytest.skip("no node on this machine, which pyright runs on")
    started = subprocess.run([sys.executable, "-m", "pyright", "--version"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"pyright is not to be had here: {started.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_knows_every_name_of_the_wheel_and_refuses_mistakes(checker, installed, tmp_path, pytestconfig):
    """What mypy learnt of torch and diffusers is kept for the next run; the wheel is read anew."""
    import sparsefeat

    if checker == "pyright":
        needs_pyright()
    names = [name for name in sparsefeat.__all__ if name != "__version__"]
    (tmp_path / "users.py").write_text(USERS_FILE + "".join(f"reveal_type(sf.{name})\n" for name in names))
    unread = ",".join(f"mypy-{library}.*" for library in UNREAD)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[{unread}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", checker, *CHECKERS[checker], str(installed), "users.py"]
    kept = os.environ | {"MYPY_CACHE_DIR": str(pytestconfig.cache.mkdir("mypy"))}
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=kept).stdout

    errors = {int(line) for line in re.findall(r"users\.py:(\d+)(?::\d+)?(?: -|:) error: ", output)}
    assert errors == {n for n, line in enumerate(USERS_FILE.splitlines(), 1) if line.endswith("# wrong")}, output
    revealed = re.findall(r'(?:Revealed type|Type of "[^"]*") is "(.*)"', output)
    assert len(revealed) == len(names) + 6, output
    of_run, pipelines = [name.rpartition(".")[2] for name in revealed[:4]], revealed[4:6]
    assert of_run == ["Session", "Recording", "HeatMapRecording", "float"]
    assert ["StableDiffusion3Pipeline" in pipeline for pipeline in pipelines] == [False, True]
    assert all("StableDiffusionPipeline" in pipeline and "dummy" not in pipeline for pipeline in pipelines)
    assert {"Any", "Unknown"}.isdisjoint(revealed), output


@pytest.mark.parametrize("package", ["sparsefeat", "sparsefeat_kernels"])
def test_of_what_is_public_a_type_checker_knows_the_types_of_nineteen_in_twenty(package, installed, tmp_path):
    """Of the wheel's own: torch and other libraries are not typed throughout, whatever we write. Pyright takes some seconds."""
    needs_pyright()
    command = [sys.executable, "-m", "pyright", "--verifytypes", package, "--ignoreexternal", "--outputjson"]
    found = {
        **os.environ,
        "PATH": f"{installed.parent}{os.pathsep}{os.environ['PATH']}",
    }  # --pythonpath is not heard here
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=found).stdout
    complete = json.loads(output[output.index("{") :])["typeCompleteness"]
    assert complete["exportedSymbolCounts"]["withKnownType"] > 300
    assert complete["completenessScore"] >= 0.95
