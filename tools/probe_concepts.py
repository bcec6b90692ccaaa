"""Why the joint pipeline's concept maps mark nothing: what its attentions give to image and text.

    python tools/probe_concepts.py

Of each block, on real scenes of trained pairs, one denoising pass each:

* image: the share of an object's places whose attention output is nearest to that object's mean, of fifty means that are
  taken on EmojiCanvas' drawings. Chance is 2 %.
* words: how well the image's outputs times the output of the prompt's own word tell the object's places from all others,
  as the area under the curve. Chance is 0.5.
* concepts: the same of the concept's map, with the other object and "background" beside it.
* cosine: between the outputs of the scene's two words.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.assets import JOINT, emojicanvas, emojiscenes, load_pipeline
from sparsefeat.attention import HeatMaps, token_indices, tokens_of
from sparsefeat.evaluation import scenes
from sparsefeat.features import area_under_curve
from sparsefeat.pipeline import AttentionCall, Call, Context, Instrument, attach
from sparsefeat.pipeline.image_to_image import image_to_image

N_SCENES, SEED = 24, 1_000


class Outputs(Instrument):
    """What each joint attention gave to the image and to the text, [batch, positions, width] before their projection."""

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        blocks = range(len(pipe.transformer.transformer_blocks))
        return tuple(f"transformer.transformer_blocks.{i}.attn" for i in blocks)

    def begin_call(self, call: Call) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        output = call.output.transpose(1, 2).flatten(2)
        self.seen.append({stream: output[:, slice(*span)] for stream, span in call.streams.items()})

    def end_call(self, call: Call) -> list[dict[str, Tensor]]:
        return self.seen


def places(masks: Tensor) -> Tensor:
    """Bool [objects, 256]: the image tokens that an object covers more than half of."""
    return F.interpolate(masks[None], size=(16, 16), mode="area")[0].flatten(1) > 0.5


def means_of_objects(pipe: Any) -> Tensor:
    """[blocks, objects, width]: the image's outputs where an object is, over its drawings."""
    outputs, sums = Outputs(), 0
    with attach(pipe, outputs) as run:
        for chunk in scenes.in_batches(scenes.real_drawings(), scenes.BATCH):
            inside = torch.stack([places(masks)[0] for masks in scenes.called(pipe, chunk)]).float()
            of_chunk = torch.zeros(len(run[outputs]), len(emojicanvas.OBJECTS), run[outputs][0]["image"].shape[-1] + 1)
            for block, seen in enumerate(run[outputs]):
                summed = torch.einsum("bp,bpw->bw", inside, seen["image"])
                rows = torch.cat([summed, inside.sum(1, keepdim=True)], 1)
                of_chunk[block].index_add_(0, torch.tensor([one.objects[0] for one in chunk]), rows)
            sums = sums + of_chunk
    return sums[..., :-1] / sums[..., -1:]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    own = load_pipeline(JOINT)
    pipe = image_to_image(own)[0]
    means = means_of_objects(pipe)
    middle = means.mean(1, keepdim=True)
    found = []  # [image, words, concepts, cosine] of every object and block
    for picture in scenes.real(N_SCENES, emojiscenes.TRAIN, SEED):
        outputs, maps = Outputs(), HeatMaps(concepts=[*picture.words, "background"], keep=["layers"])
        with attach(pipe, outputs, maps) as run:
            masks = places(scenes.called(pipe, [picture])[0])
        tokens = tokens_of(own.tokenizer, picture.prompt)
        where = [list(token_indices(tokens, picture.prompt, word)) for word in picture.words]
        for block, seen in enumerate(run[outputs]):
            image = seen["image"][0]
            words = torch.stack([seen["text"][0, one].mean(0) for one in where])
            layer = run[maps].layers[block]
            likeness = F.normalize(image - middle[block], dim=1) @ F.normalize(means[block] - middle[block], dim=1).T
            for k, inside in enumerate(masks):
                concept = run[maps].word(picture.words[k], layer=layer).values.flatten()
                fits = image @ words[k]
                found.append(
                    [
                        block,
                        float((likeness[inside].argmax(1) == picture.objects[k]).float().mean()),
                        area_under_curve(fits[inside], fits[~inside]),
                        area_under_curve(concept[inside], concept[~inside]),
                        float(F.cosine_similarity(words[0], words[1], dim=0)),
                    ]
                )
    rows = torch.tensor(found)
    print("block  image  words  concepts  cosine")
    for block in range(len(means)):
        image, words, concepts, cosine = rows[rows[:, 0] == block, 1:].mean(0).tolist()
        print(f"{block:5}  {image:5.2f}  {words:5.2f}  {concepts:8.2f}  {cosine:6.2f}")


if __name__ == "__main__":
    main()
