"""What is measured while training, as JSON lines, as CSV, and for TensorBoard.

`metrics.jsonl` is what is read again when a run goes on: entries of steps after the checkpoint are taken out of both files,
as they come again.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsefeat.whole import written_plainly

JSONL, CSV, TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"


class Metrics:
    """The entries of one SAE, one a measured step, the first `step` and `fvu` among them.

    folder: where they are written; None keeps them in memory. tensorboard: also for it, which must be installed.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.folder = folder
        self.entries: list[dict[str, float]] = []
        self._board: Any = None
        if tensorboard and folder is not None:
            self._board = board_writer()(str(folder / TENSORBOARD))

    def resume(self, step: int) -> None:
        """Read what was written up to this step, and forget what came after."""
        if self.folder is None or not (self.folder / JSONL).is_file():
            return
        text = (self.folder / JSONL).read_text(encoding="utf-8")
        self.entries = [entry for entry in _readable(text) if entry["step"] <= step]
        self._rewrite()

    def add(self, entry: Mapping[str, float]) -> None:
        names = list(self.entries[0]) if self.entries else None
        self.entries.append(dict(entry))
        if self.folder is None:
            return
        with written_plainly(self.folder / JSONL):
            self.folder.mkdir(parents=True, exist_ok=True)
            if names is None:
                self._rewrite()
            else:
                with open(self.folder / JSONL, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                with open(self.folder / CSV, "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, names, extrasaction="ignore").writerow(entry)
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(entry["step"]))
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _rewrite(self) -> None:
        """Each file is the old or the new one whenever the run is killed."""
        assert self.folder is not None
        unfinished = {name: self.folder / f".{name}.unfinished" for name in (JSONL, CSV)}
        with open(unfinished[JSONL], "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in self.entries)
        with open(unfinished[CSV], "w", encoding="utf-8", newline="") as table:
            if self.entries:
                writer = csv.DictWriter(table, list(self.entries[0]), extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.entries)
        for name, path in unfinished.items():
            path.replace(self.folder / name)


def board_writer() -> Any:
    """TensorBoard's class that writes; raises ValueError where it is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=True needs TensorBoard: pip install tensorboard.") from None


def _readable(text: str) -> Iterator[dict[str, float]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the line a killed run was writing
