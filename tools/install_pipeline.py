"""Copy the trained pipeline into the package, whole or not at all.

python tools/install_pipeline.py             # from build/training/pipeline to sparsefeat/assets/pipeline
"""

from __future__ import annotations

import json
import shutil

from train_pipeline import OUT

from sparsefeat.assets.embedded import PIPELINE


def main() -> None:
    if not (OUT / "model_index.json").is_file():
        raise SystemExit(f"{OUT} holds no pipeline; train it with `python tools/train_pipeline.py`")
    fresh = PIPELINE.with_name("pipeline.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(OUT, fresh)
    for path in fresh.rglob("*config.json"):  # where a part was loaded from is nobody's business but this machine's
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    shutil.rmtree(PIPELINE, ignore_errors=True)
    fresh.rename(PIPELINE)
    size = sum(path.stat().st_size for path in PIPELINE.rglob("*") if path.is_file())
    print(f"{PIPELINE.name}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
