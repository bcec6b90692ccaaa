"""What an earlier code of the same rows could save topk_encode on a CPU: `python -m bench.guess`. One thread, weights prepared.

Consecutive denoising steps share most of their codes, so that the step before gives a bound on a row's k-th largest value
without a search. Timed in turns on the same rows: the op; the op told the k-th largest value of every row beforehand, which
no guess can better; and the op with the bound that the k latents of the step before give, by the bf16 product, or its 2k
latents, which another encode has found. All must give the same code. Of random rows at a published shape, correlated with
those before, and of the embedded pipeline's steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from sparsefeat_kernels import prepare_encoder, topk_encode
from sparsefeat_kernels.encode import survivors
from torch import Tensor

import sparsefeat as sf
from sparsefeat.assets import load_pipeline, sae_folders
from sparsefeat.measure.sae_case import sae_case
from sparsefeat.pipeline import Activations

REPEATS = 9
PUBLISHED = {"rows": 1024, "d_model": 1280, "n_latents": 20480, "k": 32}
LIKE_BEFORE = 0.995  # correlation of the random rows with those before

Bound = Callable[[Tensor, slice, survivors.RoundedRows, Tensor], Tensor]


@contextmanager
def bounded_by(bound: Bound) -> Iterator[list[int]]:
    """The op takes a row's bound from `bound(product, which rows, they, groups' bounds)`; how many survive, call by call."""
    own, seen, counts = survivors.survivors_of, 0, []

    def told(p: Tensor, rows: survivors.RoundedRows, bounds: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal seen
        n_groups, here = bounds.shape[1], slice(seen, seen + len(p))
        seen = here.stop
        cut = survivors.cuts(bound(p, here, rows, bounds), rows, bounds)
        maxima = survivors.positive_maxima if float(cut.amin()) > 0 else survivors.group_maxima
        top = maxima(p.view(len(p), -1, n_groups))
        row, group = (top >= cut).nonzero(as_tuple=True)
        proved = rows.provable & (torch.bincount(row, minlength=len(p)) <= survivors.most_groups(n_groups, k))
        if not bool(proved.all()):
            row, group = row[proved[row]], group[proved[row]]
        found = survivors.entries_that_reach(cut, p, row, group)
        counts.append(len(found[0]))
        return *found, proved

    survivors.survivors_of = told  # type: ignore[assignment]
    try:
        yield counts
    finally:
        survivors.survivors_of = own  # type: ignore[assignment]


def known(values: Tensor) -> Bound:
    """The k-th largest itself, less what sums of another order may differ by."""
    last = values[:, -1]
    return lambda p, here, rows, bounds: (last - 1e-5 * values[:, 0].abs())[here]


def guessed(latents: Tensor, k: int) -> Bound:
    """The least that the products of these latents [rows, k or more], distinct in each row, leave for the k-th of them."""

    def bound(p: Tensor, here: slice, rows: survivors.RoundedRows, bounds: Tensor) -> Tensor:
        a, (b0, b1, b2) = p.gather(1, latents[here]).float(), bounds[:, latents[here] % bounds.shape[1]]
        margin = rows.lost[:, None] * b0 + rows.size[:, None] * b1 + b2 + 2.0**-8 * a.abs()
        lower = a - margin
        return lower.amin(1) if lower.shape[1] == k else lower.topk(k, sorted=False).values.amin(1)

    return bound


def compare(name: str, steps: Sequence[Tensor], weights: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    """`steps`: the rows of consecutive steps."""
    prepared = prepare_encoder(*weights[:2])

    def encode(x: Tensor, most: int = k) -> tuple[Tensor, Tensor]:
        return topk_encode(x, *weights, most, "raw", prepared=prepared)

    codes, wider = [encode(x) for x in steps], [encode(x, 2 * k)[1].long() for x in steps]
    names = "the op", "told the k-th", "by the step before", "by twice as many of it"
    taken: dict[str, list[float]] = {name: [] for name in names}
    survive: dict[str, int] = dict.fromkeys(taken, 0)
    shared, rows = 0, sum(len(x) for x in steps[1:])
    for repeat in range(REPEATS):
        for place in range(1, len(steps)):
            values, indices = codes[place]
            before = codes[place - 1][1].long()
            of_before = guessed(before, k), guessed(wider[place - 1], k)
            bounds = dict(zip(names[1:], (known(values), *of_before), strict=True))
            if not repeat:
                shared += int((indices[:, :, None] == before[:, None]).sum())
            for of in taken:
                if of in bounds:
                    with bounded_by(bounds[of]) as counts:
                        began = time.perf_counter()
                        answer = encode(steps[place])
                        taken[of].append(time.perf_counter() - began)
                    survive[of] += sum(counts)
                else:
                    began = time.perf_counter()
                    answer = encode(steps[place])
                    taken[of].append(time.perf_counter() - began)
                assert torch.equal(answer[1], indices), f"{of} gives another code"
    print(
        f"{name}: {len(steps) - 1} steps of {len(steps[0])} rows, {100 * shared / (rows * k):.0f} % of latents shared"
    )
    base = median(taken["the op"])
    for of, seconds in taken.items():
        survived = f", {survive[of] / (REPEATS * rows):.1f} latents of k = {k} survive" if survive[of] else ""
        print(f"  {of}: {median(seconds) * 1e6 / len(steps[1]):.1f} us a row, {median(seconds) / base:.2f}{survived}")


def embedded(images: int) -> None:
    class Rows(sf.Instrument):
        def __init__(self, sae: sf.SAE):
            self.at, self.kept = sf.Record(sae).hookpoints(), []

        def hookpoints(self) -> tuple[sf.Hookpoint, ...]:
            return self.at

        def at_hookpoint(self, activations: Activations, context: sf.Context) -> None:
            self.kept.append(activations.rows.clone())

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    saes = [sf.load_sae(folder).eval() for folder in sae_folders() if "blocks" in folder.name or "mid" in folder.name]
    instruments = [Rows(sae) for sae in saes]
    with sf.attach(pipe, *instruments):
        options = {"num_inference_steps": 20, "guidance_scale": 3.0, "num_images_per_prompt": images}
        pipe("a noto emoji of a fox", generator=torch.Generator().manual_seed(0), output_type="latent", **options)
    for sae, instrument in zip(saes, instruments, strict=True):
        steps = [sae.normalize(rows) for rows in instrument.kept[8:12]]
        compare(str(sae.config.hookpoint), steps, (sae.W_enc, sae.b_enc, sae.b_pre), sae.config.k or 1)


@torch.inference_mode(False)
@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    case = sae_case(**PUBLISHED, dtype="float32", device="cpu", seed=0)
    noise = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    before = LIKE_BEFORE * case.x + (1 - LIKE_BEFORE**2) ** 0.5 * noise
    compare("d 1280, 20,480 latents", (before, case.x), (case.W_enc, case.b_enc, case.b), case.k)
    embedded(images=8)


if __name__ == "__main__":
    main()
