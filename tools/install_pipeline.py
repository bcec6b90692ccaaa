"""Copy a trained pipeline into the package, whole or not at all.

python tools/install_pipeline.py build/training/unet     # to sparsefeat/assets/pipeline
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from sparsefeat.assets.embedded import PIPELINE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"{folder} holds no pipeline; train it with `python tools/train_pipeline.py`")
    fresh = PIPELINE.with_name("pipeline.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh)
    for path in fresh.rglob("*config.json"):  # where a part was loaded from is nobody's business but this machine's
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    index = fresh / "model_index.json"  # transformers before 5 reads a tokenizer.json into the fast class alone
    index.write_text(index.read_text().replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'))
    shutil.rmtree(PIPELINE, ignore_errors=True)
    fresh.rename(PIPELINE)
    size = sum(path.stat().st_size for path in PIPELINE.rglob("*") if path.is_file())
    print(f"{PIPELINE.name}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
