"""The long description: the README, with links that lead somewhere from an index's page too. All else is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def long_description(readme: str, repository: str | None) -> str:
    """Relative links lead into the repository where its address is known. Where it is not, a link is its text alone, and a
    picture is left out."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if repository is not None:
            return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"
        return "" if picture else text

    return LINK.sub(absolute, readme)


def repository() -> str | None:
    """`Repository` of [project.urls]."""
    found = re.search(r'^Repository = "(\S+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return found and found[1]


if __name__ == "__main__":
    setup(
        long_description=long_description((ROOT / "README.md").read_text("utf-8"), repository()),
        long_description_content_type="text/markdown",
    )
