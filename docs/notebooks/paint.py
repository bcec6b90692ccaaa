# %% [markdown]
# # Paint a feature, for the first half of the steps
#
# Take a feature of one picture and paint it into another, where you want it.

# %%
import numpy as np
import torch
from PIL import Image

import sparsefeat as sf
from sparsefeat.assets import cross_attention_sae_folders, load_pipeline
from sparsefeat.report import contact_sheet

STEPS = 20
pipe, sae = load_pipeline(), sf.load_sae(cross_attention_sae_folders()[-1])


def draw(prompt, *instruments):
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    with sf.attach(pipe, *instruments) as run:
        return pipe(prompt, **call).images[0], run


# %% [markdown]
# The feature: the latent that is most active in this picture. `maximum` says how strong it gets.

# %%
record = sf.Record(sae)
source, run = draw("a twemoji emoji of a red heart", record)
feature = run[record].top(1)[0]
print(feature)

# %% [markdown]
# The mask: 1 where the feature is added, 0 elsewhere; any height and width. This is the right half. From a picture:
# `np.asarray(Image.open("mask.png").convert("L")) / 255`.

# %%
mask = np.zeros((64, 64))
mask[:, 32:] = 1.0
target, _ = draw("a noto emoji of a fox", record)
sheet, labels = (
    [source, target, Image.fromarray((255 * mask).astype("uint8"))],
    ["from here", "into this", "at the white"],
)
for times in (2, 4, 8):
    edit = sf.Steer(
        sae,
        add={feature.latent: times * feature.maximum},
        mask=mask,
        steps=(0.0, 0.5),  # the first half of the steps
        condition="cond+uncond-",
    )
    sheet.append(draw("a noto emoji of a fox", edit)[0])
    labels.append(f"{times} times its maximum")
contact_sheet([sheet], [""], [labels])

# %% [markdown]
# Keep the edit. `sf.load_instrument("painted")` opens it.

# %%
edit.save("painted")
again, _ = draw("a noto emoji of a fox", sf.load_instrument("painted"))
assert again.tobytes() == sheet[-1].tobytes()
