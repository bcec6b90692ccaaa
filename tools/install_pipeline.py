"""Copy a trained pipeline into the package, whole or not at all.

python tools/install_pipeline.py build/training/unet     # to sparsefeat/assets/pipeline
python tools/install_pipeline.py build/training/joint    # to sparsefeat/assets/joint, as its class says
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from sparsefeat.assets.embedded import JOINT, PIPELINE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"{folder} holds no pipeline; train it with `python tools/train_pipeline.py`")
    index = json.loads((folder / "model_index.json").read_text())
    place = JOINT if index["_class_name"] == "StableDiffusion3Pipeline" else PIPELINE
    fresh = place.with_suffix(".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh)
    for path in fresh.rglob("*config.json"):  # where a part was loaded from is nobody's business but this machine's
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    its_index = fresh / "model_index.json"  # transformers before 5 reads a tokenizer.json into the fast class alone
    its_index.write_text(its_index.read_text().replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'))
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    print(f"{place.name}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
