"""What holds in every transformer pipeline: which rows are which patch of which image, which condition they have, and
that both streams are read and edited where they are. Family by family what is particular is in files of their own.
"""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import Delta, Hookpoint, attach, hookpoints
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, WatchAttention, push, same, zero

# The last block of each: after it tokens no longer see each other.
LAST = {
    "aura_flow": "transformer.single_transformer_blocks.1",
    "bria": "transformer.single_transformer_blocks.1",
    "chroma": "transformer.single_transformer_blocks.1",
    "cogview3": "transformer.transformer_blocks.1",
    "cogview4": "transformer.transformer_blocks.1",
    "flux": "transformer.single_transformer_blocks.1",
    "flux2": "transformer.single_transformer_blocks.1",
    "hidream": "transformer.single_stream_blocks.1",
    "hunyuan_dit": "transformer.blocks.3",
    "krea2": "transformer.transformer_blocks.1",
    "lumina": "transformer.layers.1",
    "lumina2": "transformer.layers.1",
    "ovis": "transformer.single_transformer_blocks.1",
    "pixart": "transformer.transformer_blocks.1",
    "qwen_image": "transformer.transformer_blocks.1",
    "sana": "transformer.transformer_blocks.1",
    "sd3": "transformer.transformer_blocks.1",
    "z_image": "transformer.layers.1",
}
FAMILIES = {name: family for name, family in families().items() if name in LAST and family.available}
JOINT = {name: f for name, f in FAMILIES.items() if any(block.stream == "text" for block in f.blocks)}


@pytest.fixture(scope="module")
def pipes():
    return {name: family.build() for name, family in FAMILIES.items()}


def at(instrument, *hookpoints):
    """The instrument at these (path, stream) or (path, stream, io)."""
    instrument._hookpoints = tuple(Hookpoint(path, *(io or ["output"]), stream) for path, stream, *io in hookpoints)
    return instrument


def patches(latents, grid):
    """Latents as [images, h, w, values of a patch], from the packed tokens or from the feature map."""
    height, width = grid
    if latents.ndim == 3:
        return latents.unflatten(1, grid)
    high, wide = latents.shape[-2] // height, latents.shape[-1] // width
    return latents.unfold(2, high, high).unfold(3, wide, wide).permute(0, 2, 3, 1, 4, 5).flatten(3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("size", ["square", "wide"])
def test_an_edit_of_one_row_changes_its_patch_of_its_image_and_nothing_else(pipes, name, guidance, size):
    family, pipe = FAMILIES[name], pipes[name]
    block = next(b for b in family.blocks if b.grid(size) is not None)
    image, y, x = 2, 1, block.grid(size)[1] - 2

    def one_row(activations, context):
        rows = torch.zeros_like(activations.rows).view(context.batch, *context.grid, -1)
        for entry in range(context.batch):
            if context.condition[entry] == "cond" and context.prompt_index[entry] == image:
                rows[entry, y, x] = torch.linspace(-30, 30, rows.shape[-1])
        return Delta(rows.flatten(0, -2))

    call = {"guidance": guidance, "images_per_prompt": 2, "size": size, "steps": 1}
    plain = family.call(pipe, ["red fox", "blue cat"], **call)
    with attach(pipe, Edit(one_row, LAST[name])):
        edited = family.call(pipe, ["red fox", "blue cat"], **call)
    changed = (patches(plain, block.grid(size)) != patches(edited, block.grid(size))).any(-1)
    assert changed.nonzero().tolist() == [[image, y, x]]


def texts(pipe, run):
    """The text embeddings of each run of the denoiser."""
    seen = []

    def keep(module, args, kwargs):
        names = ("encoder_hidden_states", "encoder_hidden_states_t5")
        seen.append(next((kwargs[name] for name in names if name in kwargs), args[2] if len(args) > 2 else None))

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_and_prompts_of_rows_are_those_of_the_text_they_were_given(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    prompts, negative = ["red fox", "blue cat"], "snow dog"
    # What the denoiser is given for a prompt when it is given nothing else; the other one of two is the negative's.
    known = {p: texts(pipe, lambda p=p: family.call(pipe, [p], guidance=False, steps=1))[0][0] for p in prompts}
    both = texts(pipe, lambda: family.call(pipe, prompts[:1], guidance=True, steps=1, negative_prompt=[negative]))
    (known[negative],) = (e for entries in both for e in entries if not torch.allclose(e, known[prompts[0]], atol=1e-4))
    watch = Watch(LAST[name])
    arguments = {"guidance": True, "images_per_prompt": 2, "negative_prompt": [negative] * 2}
    with attach(pipe, watch):
        runs = texts(pipe, lambda: family.call(pipe, prompts, **arguments))
    assert len(runs) == len(watch.contexts) == 2 * len(family.layout)
    for given, context in zip(runs, watch.contexts, strict=True):
        expected = {text: [torch.allclose(e, what, atol=1e-4) for e in given] for text, what in known.items()}
        assert expected[negative] == [condition == "uncond" for condition in context.condition]
        for position, prompt in enumerate(prompts):
            assert expected[prompt] == [
                condition == "cond" and image // 2 == position
                for condition, image in zip(context.condition, context.prompt_index, strict=True)
            ]
        assert sorted(set(context.prompt_index)) == [0, 1, 2, 3]
    assert [context.step for context in watch.contexts] == [0] * len(family.layout) + [1] * len(family.layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_listed_hookpoint_says_what_will_be_found_there(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    listing = [info for info in hookpoints(pipe) if info.hookpoint.path.startswith("transformer.")]
    assert listing
    watches = [at(Watch(), (info.hookpoint.path, info.stream)) for info in listing]
    with attach(pipe, *watches):
        family.call(pipe, ["red fox"], guidance=False, steps=1)
    for info, watch in zip(listing, watches, strict=True):
        context = watch.contexts[0]
        assert info.width == watch.rows[0].shape[1], info
        assert info.stream == context.stream, info
        assert (context.grid is None) == (info.stream == "text"), info
        assert info.published == ()
    known = {(info.hookpoint.path, info.stream): info.width for info in listing}
    assert {(block.path, block.stream): block.width for block in family.blocks}.items() <= known.items()


@pytest.mark.parametrize("name", FAMILIES)
def test_listed_grids_are_those_of_the_default_size(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    listed = {info.hookpoint.path: info.grid for info in hookpoints(pipe) if info.stream == "image"}
    # By hand: the pixels of `__call__` behind the VAE's 4, or the latent's side in a config, over the patch; FLUX's
    # kind has 128 latents packed by two. Z-Image and Krea 2 say their size nowhere but in their code.
    side = {"sana": 1024 // 4, "aura_flow": 1024 // 4 // 2, "krea2": None, "z_image": None, "hidream": 8 // 2}.get(
        name, 64
    )
    if name in ("cogview3", "cogview4", "hunyuan_dit", "lumina", "lumina2", "pixart", "sd3"):
        side = pipe.transformer.config.sample_size // pipe.transformer.config.patch_size
    expected = None if side is None else (side, side)
    for block in family.blocks:
        if block.stream == "image":
            assert listed[block.path] == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", [zero, same])
def test_neutral_edits_of_every_block_and_stream_are_bit_identical(pipes, name, rule):
    family, pipe = FAMILIES[name], pipes[name]
    everywhere = [(b.path, b.stream, io) for b in family.blocks for io in ("output", "input")]
    call = {"guidance": True, "images_per_prompt": 2, "size": "wide"}
    plain = family.call(pipe, ["red fox"], **call)
    with attach(pipe, at(Edit(rule), *everywhere)):
        assert torch.equal(family.call(pipe, ["red fox"], **call), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_of_any_block_and_stream_reaches_the_image_and_leaves_with_the_session(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    plain = family.call(pipe, ["red fox"], guidance=True)
    for block in family.blocks:
        for io in ("output", "input"):
            with attach(pipe, at(Edit(push()), (block.path, block.stream, io))):
                assert not torch.equal(family.call(pipe, ["red fox"], guidance=True), plain), (block, io)
    assert torch.equal(family.call(pipe, ["red fox"], guidance=True), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_difference_is_output_minus_input_of_the_same_stream(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    for stream in ("image", "text") if name in JOINT else ("image",):
        path = next(b.path for b in family.blocks if b.stream == stream)
        taken, given, diff = (at(Watch(), (path, stream, io)) for io in ("input", "output", "diff"))
        with attach(pipe, taken, given, diff):
            family.call(pipe, ["red fox"], guidance=True, size="wide")
        for before, after, difference in zip(taken.rows, given.rows, diff.rows, strict=True):
            assert difference.abs().max() > 0
            assert torch.equal(difference, after - before)


@pytest.mark.parametrize("name", JOINT)
def test_a_text_edit_leaves_the_image_of_its_block_alone_and_the_other_way_round(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    for path in dict.fromkeys(b.path for b in family.blocks if b.stream == "text" and not b.path.endswith("context")):
        if not {"image", "text"} <= {b.stream for b in family.blocks if b.path == path}:
            continue
        for edited, other in (("text", "image"), ("image", "text")):
            before = [at(Watch(), (path, stream)) for stream in (edited, other)]
            after = [at(Watch(), (path, stream)) for stream in (edited, other)]
            with attach(pipe, *before, at(Edit(push()), (path, edited)), *after):
                family.call(pipe, ["red fox"], guidance=False, steps=1, size="wide")
            assert (before[0].rows[0] != after[0].rows[0]).any(1).all()
            assert torch.equal(before[1].rows[0], after[1].rows[0])


def went_on(module, kept):
    """A hook that keeps what the module's attention gave: what goes into its last projection, if it has one."""
    last = getattr(module, "to_out", None)
    if last is None:
        return module.register_forward_hook(lambda module, args, output: kept.append(output))
    last = last[0] if isinstance(last, torch.nn.ModuleList) else last
    return last.register_forward_pre_hook(lambda module, args: kept.append(args[0]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].attentions])
def test_a_tap_on_one_attention_sees_its_queries_keys_and_values(pipes, name):
    family, pipe = FAMILIES[name], pipes[name]
    grid = next(block.wide for block in family.blocks if block.wide)
    arguments = {"guidance": True, "size": "wide", "steps": 1}
    plain = family.call(pipe, ["red fox"], **arguments)
    for path in family.attentions:
        watch, kept = WatchAttention(path), []
        with attach(pipe, watch):
            handle = went_on(pipe.transformer.get_submodule(path.removeprefix("transformer.")), kept)
            assert torch.equal(family.call(pipe, ["red fox"], **arguments), plain)
            handle.remove()
        assert len(watch.seen) == len(family.layout)
        for (call, context), given in zip(watch.seen, kept, strict=True):
            assert context.grid == grid
            assert call.query.shape[0] == len(context.condition) == context.batch
            queries = call.query.shape[2]
            start, stop = call.streams.get("image", (0, queries))
            assert stop - start == grid[0] * grid[1]
            if "text" in call.streams:  # the streams share the queries out between them
                (first, middle), (again, last) = sorted(call.streams.values())
                assert (first, middle, last) == (0, again, queries)
            # Attention by hand from what the tap saw is what the module goes on with.
            scores = call.query.double() @ call.key.double().mT * call.scale
            if call.mask is not None:
                masked = call.mask.dtype == torch.bool
                scores = scores.masked_fill(~call.mask, -torch.inf) if masked else scores + call.mask
            by_hand = (scores.softmax(-1) @ call.value.double()).transpose(1, 2).flatten(2)
            if given.shape[1] != queries:  # the image's alone go to this projection
                by_hand = by_hand[:, start:stop]
            assert torch.allclose(by_hand, given[..., : by_hand.shape[-1]].double(), atol=1e-4)
