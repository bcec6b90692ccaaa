# %% [markdown]
# # Features of twenty prompts
#
# Draw twenty prompts, list the latents that were most active in each, find those that belong to one style, and look at them.

# %%
import torch

import sparsefeat as sf
from sparsefeat.assets import block_sae_folder, load_pipeline
from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.features import search
from sparsefeat.report import contact_sheet, overlay

STEPS = 20
pipe, sae = load_pipeline(), sf.load_sae(block_sae_folder())
prompts = [canvas.prompt(name, style) for name in ("fox", "owl", "key", "pizza", "rocket") for style in canvas.STYLES]

# %% [markdown]
# One call draws all. `Record` keeps the code of each image. `Examples` and `Statistics` are filled on the way: they say which
# images excite a latent most, and how active it is for each style.

# %%
style_of = {prompt: canvas.STYLES[i % 4] for i, prompt in enumerate(prompts)}
record, examples = sf.Record(sae), sf.Examples(sae.n_latents, top=4)
statistics = sf.Statistics(canvas.STYLES, sae.n_latents)
collect = [
    sf.CollectExamples(sae, examples, {prompt: tuple(prompt.split()) for prompt in prompts}),
    sf.CollectStatistics(sae, statistics, style_of),
]
with sf.attach(pipe, record, *collect) as run:
    images = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images

# %%
for i, prompt in enumerate(prompts):
    top = run[record].top(5, image=i)
    print(f"{prompt:32}", *(f"{latent.latent}: {latent.score:.2f}" for latent in top), sep="  ")

# %% [markdown]
# Where the strongest latent of each image is active:

# %%
strongest = [run[record].top(1, image=i)[0].latent for i in range(len(prompts))]
maps = [overlay(images[i], run[record].map(latent, image=i)) for i, latent in enumerate(strongest)]
contact_sheet(
    [[images[i], maps[i]] for i in range(0, len(prompts), 4)],
    prompts[::4],
    [["drawn", f"latent {strongest[i]}"] for i in range(0, len(prompts), 4)],
)

# %% [markdown]
# Which latents belong to the style "mono"? `auc` is how well a latent tells its images from the others; `p` is how often chance
# does as well. Believe a small `p`.

# %%
for found in search(statistics, "mono", 3, examples=examples):
    shown = [example.prompt for example in examples.of(found.latent)]
    print(f"latent {found.latent}: auc {found.auc:.2f}, p {found.p:.2f}", *shown, sep="\n    ")
