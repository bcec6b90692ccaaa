"""The pages of the site that are made from what stands elsewhere: mkdocs calls `on_config` and `on_files` here (mkdocs.yml).

* `api/NAME.md`: the public names of a package, from its `__all__`; their text is their docstrings.
* `systems/NAME.md`: a page for each published system, from the tables of docs/presets.md.
* `notebooks/NAME.md`: the notebooks of docs/notebooks, which are py:percent files, to read and to download.
* contributing, security, changelog: the files of the root.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tests read the pages without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Of sparsefeat: packages with a list of public names, and modules that the guides use, whose own names are all public.
PACKAGES = (
    "pipeline", "sae", "features", "attention", "steering", "erasure", "attribution", "training", "assets", "report",
)  # fmt: skip
MODULES = (
    "assets.emojicanvas", "assets.emojiscenes", "evaluation.before_after", "evaluation.check", "evaluation.judge",
    "evaluation.segmentation", "evaluation.splice",
)  # fmt: skip
SOURCES = {"sparsefeat": ROOT / "sparsefeat", "sparsefeat_kernels": ROOT / "kernels" / "sparsefeat_kernels"}


# What the code says of itself -------------------------------------------------------------------------------------------


def source(module: str) -> Path:
    """The file of a module or package, by its dotted name."""
    top, _, rest = module.partition(".")
    path = SOURCES[top].joinpath(*rest.split(".")) if rest else SOURCES[top]
    package = path / "__init__.py"
    return package if package.is_file() else path.with_suffix(".py")


@dataclass(frozen=True)
class Package:
    """docstring: of the file. names: its `__all__`, or else what it defines without an underscore."""

    docstring: str
    names: tuple[str, ...]


def read(module: str) -> Package:
    tree = ast.parse(source(module).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names = tuple(ast.literal_eval(node.value))
            break
    else:
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = tuple(n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_"))
    return Package(ast.get_docstring(tree) or "", names)


def homes() -> dict[str, str]:
    """Every name of `sf` -> where it is defined: `_HOME` of sparsefeat/__init__.py."""
    for node in ast.parse(source("sparsefeat").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOME":
            return ast.literal_eval(node.value)
    raise ValueError("sparsefeat/__init__.py has no _HOME")


# The pages ----------------------------------------------------------------------------------------------------------------


def api_pages() -> Iterator[tuple[str, str]]:
    """(path, text) of each page of the reference, the index first."""
    of_sf = homes()
    modules = [*(f"sparsefeat.{place}" for place in (*PACKAGES, *MODULES)), "sparsefeat_kernels"]
    documented = {module: read(module).names for module in modules}
    rows = []
    for name, home in sorted(of_sf.items(), key=lambda item: item[0].lower()):
        if name == "presets":
            rows.append("| `sf.presets` | [the published systems](../presets.md) |")
            continue
        rows.append(f"| [`sf.{name}`][{home}.{name}] | `{home}` |")
    kernels = [f"| [`{name}`][sparsefeat_kernels.{name}] |" for name in documented["sparsefeat_kernels"]]
    yield (
        "api/index.md",
        "# All names\n\nWhat `import sparsefeat as sf` offers. Each is imported when it is first used.\n\n"
        "| name | from |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        "What `import sparsefeat_kernels` offers, which needs torch alone:\n\n| name |\n|---|\n" + "\n".join(kernels) + "\n",
    )  # fmt: skip
    for module, names in documented.items():
        parts = [f"# {module}\n\n{read(module).docstring}\n"]
        for name in names:
            shown = f"sf.{name}" if of_sf.get(name) == module else name
            parts.append(f"::: {module}.{name}\n    options:\n      heading: {shown}\n      toc_label: {name}\n")
        yield f"api/{module.removeprefix('sparsefeat.')}.md", "\n".join(parts)


def rows_of(text: str, header: str) -> Iterator[list[str]]:
    """The cells of each row of the tables of docs/presets.md whose head begins with `header`."""
    for table in re.split(rf"^{re.escape(header)}.*\n\|-.*\n", text, flags=re.MULTILINE)[1:]:
        for line in table.splitlines():
            if not line.startswith("|"):
                break
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def linked(here: str) -> str:
    """The names in code that `sf` has, as links to the reference."""
    of_sf = homes()

    def link(match: re.Match[str]) -> str:
        name = match[2]
        return f"[{match[0]}][{of_sf[name]}.{name}]" if name in of_sf and name != "presets" else match[0]

    return re.sub(r"`(sf\.)(\w+)[^`]*`", link, here)


def system_pages() -> Iterator[tuple[str, str]]:
    """(path, text): what a system does, what it is called here, and where its released code differs."""
    text = (DOCS / "presets.md").read_text()
    differences = list(rows_of(text, "| system | the released code | here |"))
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    modules = {name: source(f"sparsefeat.presets.{name}") for name in read("sparsefeat.presets").names}
    seen: set[str] = set()
    for system, does, here, *more in rows_of(text, "| system | what it does | here |"):
        name, _, paper = system.partition(" (")
        paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper.removesuffix(")"))
        parts = [f"# {name}\n", f"{does[0].upper()}{does[1:]}.{f' Published as {paper}.' if paper else ''}\n"]
        parts.append(f"**Here:** {linked(here)}\n")
        example = next((h for h in headings if re.search(rf"\b{re.escape(name.split()[0])}\b", h)), None)
        if example:
            parts.append(f"An example that runs: [{example}](../presets.md#{slug(example)}).\n")
        if more[:-1]:
            parts.append(f"**Published constants:** {more[0]}.\n")
        parts.append(
            f"Tested against a derivation from the paper's equations, not with the published weights: {more[-1]}.\n"
        )
        own = [row for row in differences if row[0] in (name, *re.split(", | and |:", name))]
        if own:
            parts.append("## Where the released code differs\n\n| the released code | here |\n|---|---|")
            parts += [f"| {released} | {ours} |" for _, released, ours in own]
            parts.append("")
        for module in modules:
            if f"presets.{module}" in here and module not in seen:
                seen.add(module)
                parts.append(f"## Reference\n\n::: sparsefeat.presets.{module}\n    options:\n      show_root_heading: false\n      heading_level: 3\n")  # fmt: skip
        yield f"systems/{slug(name)}.md", "\n".join(parts)


def notebook_pages() -> Iterator[tuple[str, str]]:
    """(path, text) of each notebook: its text cells as they are, its code cells as code."""
    for path in sorted((DOCS / "notebooks").glob("*.py")):
        cells = re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]
        parts = []
        for cell in cells:
            head, _, body = cell.partition("\n")
            if "[markdown]" in head:
                parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
            else:
                parts.append(f"```python\n{body.strip()}\n```")
        title, *rest = parts
        how = (
            f"To run it: `jupytext --to notebook docs/notebooks/{path.name}`, and open it in Jupyter; an editor that knows "
            "`# %%` cells opens the file as it is."
        )
        yield f"notebooks/{path.stem}.md", "\n\n".join([title, how, *rest]) + "\n"


def root_pages() -> Iterator[tuple[str, str]]:
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        yield name.lower(), (ROOT / name).read_text().replace("](docs/", "](")


SECTIONS = {
    "API reference": api_pages,
    "Published systems": system_pages,
    "Notebooks": notebook_pages,
}


# What mkdocs calls --------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for section in config.nav:
        for title, pages in section.items() if isinstance(section, dict) else ():
            if title in SECTIONS:
                pages += [
                    {text.partition("\n")[0].removeprefix("# ").removeprefix("sparsefeat."): path}
                    for path, text in SECTIONS[title]()
                ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for make in (*SECTIONS.values(), root_pages):
        for path, text in make():
            files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """What the guides call by its file, `docs/steering.md`, is a link here."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"(?<!\[)`docs/(\w+)\.md`", lambda m: f"[{m[1].replace('_', ' ')}]({up}{m[1]}.md)", markdown)
