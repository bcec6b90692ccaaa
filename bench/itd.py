"""ItD's selection at its published size, 768 -> 524,288 latents with k = 64: `python -m bench.itd`.

Selecting the latents of 50 prompts (25 to erase, 25 to keep, M = 128) in a text encoder of Stable Diffusion 1.4's size,
by `InterpretThenDeactivate.fit` and by the dense way: one prompt at a time, all of its pre-activations, top-k, the largest
over tokens. Both select the same latents, or nothing is timed. Each in a fresh process; memory is what the process needed
beyond the weights of the SAE and the encoder at its highest, everything it keeps included. Weights are random.

Writes bench/results/itd.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.run import RESULTS
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import resident_peak_beyond, versions
from sparsefeat.whole import write_json

D_MODEL, N_LATENTS, K, TOP_M = 768, 524_288, 64, 128
HOOKPOINT = "text_encoder.encoder.layers.8"
WAYS = ("sparsefeat", "dense, a prompt at a time")


def the_prompts() -> tuple[list[str], list[str]]:
    """25 to erase and 25 to keep, of 8 to 12 tokens."""
    from sparsefeat.assets import emojicanvas as canvas

    styles = list(canvas.STYLES)
    prompts = [f"{canvas.prompt(name, styles[i % len(styles)])} number {i}" for i, name in enumerate(canvas.OBJECTS)]
    return prompts[:25], prompts[25:50]


def build(n_latents: int) -> tuple[Any, Any]:
    """A pipeline with a text encoder of 12 layers and width 768, and the SAE of its layer 8."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from sparsefeat.assets import load_pipeline
    from sparsefeat.sae import SAE, SAEConfig

    torch.manual_seed(0)
    pipe = load_pipeline()
    small = pipe.text_encoder.config
    names = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = CLIPTextConfig(
        hidden_size=D_MODEL, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        **{name: getattr(small, name) for name in names},
    )  # fmt: skip
    pipe.text_encoder = CLIPTextModel(config).eval()
    with torch.device("meta"):
        sae = SAE(SAEConfig(D_MODEL, n_latents, k=K, hookpoint=HOOKPOINT))
    W_enc = torch.randn(n_latents, D_MODEL).div_(D_MODEL**0.5)
    tensors = {"W_enc": W_enc, "W_dec": W_enc.clone(), "b_enc": torch.randn(n_latents) * 0.1}
    tensors |= {"b_pre": torch.randn(D_MODEL) * 0.1, "b_out": torch.randn(D_MODEL) * 0.1}
    sae.load_state_dict(tensors, assign=True)
    return pipe, sae.eval()


def select(way: str, pipe: Any, sae: Any) -> Tensor:
    from sparsefeat.erasure import InterpretThenDeactivate

    erase, remain = the_prompts()
    if way == WAYS[0]:
        return InterpretThenDeactivate.fit(pipe, sae, erase, remain, top_m=TOP_M, gate=False).latents
    chosen = torch.zeros(sae.n_latents, dtype=torch.bool)
    for prompts, value in ((erase, True), (remain, False)):
        for prompt in prompts:
            chosen[dense_top(pipe, sae, prompt)] = value
    return chosen.nonzero()[:, 0]


def dense_top(pipe: Any, sae: Any, prompt: str) -> Tensor:
    """What the equations say, in plain PyTorch: top-M of the largest value over the tokens but the first."""
    ids = pipe.tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
    x = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[9][0]
    top = torch.addmm(sae.b_enc, x - sae.b_pre, sae.W_enc.T).topk(K)
    z = torch.zeros(len(x), sae.n_latents).scatter_(1, top.indices, top.values.relu())
    largest = z[1:].amax(0)
    best = largest.topk(TOP_M)
    return best.indices[best.values > 0]


@torch.no_grad()
def one(connection: Any, way: str, n_latents: int, threads: int) -> None:
    torch.set_num_threads(threads)
    pipe, sae = build(n_latents)
    pipe.text_encoder(torch.zeros(1, 8, dtype=torch.long))
    found: dict[str, Any] = {}

    def first() -> None:
        began = time.perf_counter()
        found["latents"] = select(way, pipe, sae)
        found["first_s"] = time.perf_counter() - began

    found["peak_bytes"] = resident_peak_beyond(first)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        select(way, pipe, sae)
        times.append(time.perf_counter() - began)
    connection.send({**found, "latents": found["latents"].tolist(), "median_s": sorted(times)[1]})


def in_fresh_process(way: str, n_latents: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=one, args=(there, way, n_latents, torch.get_num_threads()))
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-latents", type=int, default=N_LATENTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "itd.json")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    measured = {way: in_fresh_process(way, arguments.n_latents) for way in WAYS}
    if measured[WAYS[0]]["latents"] != measured[WAYS[1]]["latents"]:
        raise SystemExit("the two ways do not select the same latents: nothing is reported")
    records = []
    for way, of_way in measured.items():
        chosen = of_way.pop("latents")
        ratio = measured[WAYS[1]]["median_s"] / of_way["median_s"]
        records.append({"way": way, **of_way, "selected": len(chosen), "times_faster_than_dense": ratio})
        print(f"{way}: {of_way['median_s']:.2f} s (the first time {of_way['first_s']:.2f} s), "
              f"{of_way['peak_bytes'] / 2**20:,.0f} MiB beyond the weights, {len(chosen)} latents")  # fmt: skip
    print(f"{records[0]['times_faster_than_dense']:.2f} times faster")
    shape = {"prompts": 50, "d_model": D_MODEL, "n_latents": arguments.n_latents, "k": K, "top_m": TOP_M}
    result = {"shape": shape, "device": device_name(), "date": date.today().isoformat(), "versions": versions()}
    write_json(arguments.out, {**result, "rows": records})


if __name__ == "__main__":
    main()
