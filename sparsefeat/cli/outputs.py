"""What commands print."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
