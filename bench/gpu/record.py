"""The folder of a run on a GPU, its clock, and what is done: one JSON file, complete after every step."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefeat.whole import write_json


@dataclass
class Record:
    """`name` in `out`. What is left of an earlier run there is gone on with."""

    out: Path
    name: str
    budget: float
    spent: float = 0.0  # of the budget, before this process began

    def __post_init__(self) -> None:
        self.began = time.monotonic() - self.spent
        self.path = self.out / self.name
        self.out.mkdir(parents=True, exist_ok=True)
        for half_written in self.out.glob(f"{self.name}.*.tmp"):  # of a process that was killed
            half_written.unlink(missing_ok=True)
        self.read()

    def read(self) -> None:
        self.done: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def keep(self, stage: str, what: Any) -> None:
        self.done[stage] = what
        write_json(self.path, self.done)
