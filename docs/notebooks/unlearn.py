# %% [markdown]
# # Fit, save, load and measure an erasure
#
# Make the pipeline stop drawing foxes, and count what became of foxes and of everything else.

# %%
import torch

import sparsefeat as sf
from sparsefeat.assets import cross_attention_sae_folders, load_pipeline
from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.evaluation.before_after import before_after
from sparsefeat.evaluation.judge import judge_images, load_judge
from sparsefeat.report import contact_sheet

STEPS = 20
pipe = load_pipeline()
saes = [sf.load_sae(folder) for folder in cross_attention_sae_folders()]
call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}

# %% [markdown]
# Fit: one erasure for each SAE, at three places where the text comes into the image.

# %%
concepts = ("fox", "owl", "rocket")
prompts = {name: [canvas.prompt(name, style) for style in canvas.STYLES] for name in concepts}
fitted = [
    sf.Erase.fit(pipe, sae, "fox", prompts, n_latents=8, gamma=-1.0, magnitude="scale", batch_size=16, **call)
    for sae in saes
]

# %% [markdown]
# Save, and load again:

# %%
for i, one in enumerate(fitted):
    one.save(f"no-fox/{i}")
erase = [sf.load_instrument(f"no-fox/{i}") for i in range(len(fitted))]

# %% [markdown]
# Draw foxes and other things, without and with it, from the same noise:

# %%
names = ["fox"] * 4 + ["owl", "key", "castle", "red-heart"]
asked = [canvas.prompt(name, canvas.STYLES[i % 4]) for i, name in enumerate(names)]


def draw():
    return pipe(asked, generator=torch.Generator().manual_seed(1), **call).images


before = draw()
with sf.attach(pipe, *erase):
    after = draw()
contact_sheet([before, after], ["before", "after"], [names, names])

# %% [markdown]
# Measure: a judge that was trained on real drawings says what it sees. Eight images show how it is done; take hundreds to
# conclude anything.

# %%
judge = load_judge()
seen = [judge_images(judge, images).objects for images in (before, after)]
wanted = torch.tensor([canvas.OBJECTS.index(name) for name in names])
counts = before_after(*seen, wanted, [name == "fox" for name in names])
print(f"foxes seen: {counts.seen_before} before, {counts.seen_after} after, of {counts.n_targets}")
print(f"others right: {counts.right_before} before, {counts.right_after} after, of {counts.n_others}")
