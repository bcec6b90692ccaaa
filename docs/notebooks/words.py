# %% [markdown]
# # Heat maps of four prompts, as pictures
#
# Where did each image attend to each word of its prompt? No SAE is needed.

# %%
import torch

import sparsefeat as sf
from sparsefeat.assets import load_pipeline
from sparsefeat.report import contact_sheet

STEPS = 20
pipe, maps = load_pipeline(), sf.HeatMaps()
prompts = [
    "a noto emoji of a fox",
    "a twemoji emoji of an owl",
    "a fluent emoji of a castle",
    "a mono emoji of a key",
]
with sf.attach(pipe, maps) as run:
    images = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images

# %% [markdown]
# A row for each prompt, a column for each word that says something:

# %%
words = [[word for word in prompt.split() if word not in ("a", "an", "of")] for prompt in prompts]
rows = [[image, *(run[maps].word(word, image=i).overlay(image) for word in words[i])] for i, image in enumerate(images)]
sheet = contact_sheet(rows, prompts, [["drawn", *of] for of in words])
sheet

# %% [markdown]
# As files: the sheet, and each map by itself.

# %%
sheet.save("words.png")
for i, of in enumerate(words):
    for word in of:
        run[maps].word(word, image=i).overlay(images[i]).save(f"{i}-{word}.png")

# %% [markdown]
# As numbers: `values` is a tensor [height, width]; `mask` is True where the scaled map is high.

# %%
fox = run[maps].word("fox", image=0)
print(fox.values.shape, fox.mask(0.4).sum())
