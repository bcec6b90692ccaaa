"""What commands print."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer


def print_json(document: Any) -> None:
    """As JSON, whatever the output's encoding: what that has no letter for is escaped as JSON does."""
    plain = not (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    typer.echo(json.dumps(document, indent=1, ensure_ascii=plain))
