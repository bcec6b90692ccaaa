"""CB-AE and Concept Controller beside plain hooks: the edits, one step of learning, and that an edit is read as what was set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsefeat as sf
from sparsefeat.steering import ConceptModel, learn_concepts
from tests.families import families
from tests.pipeline.state import everything
from tests.tiny import tiny_sd

AT = "unet.mid_block"
CALL = {"num_inference_steps": 4, "height": 32, "width": 32}
LABELLED = {
    "a red fox": {"colour": "red", "animal": "fox"},
    "a blue fox": {"colour": "blue", "animal": "fox"},
    "a cat": {"animal": "cat"},
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def seen_at(pipe, at=AT, **call):
    """What the module gives at every step, without guidance."""
    found = []
    name, _, inner = at.partition(".")
    hook = getattr(pipe, name).get_submodule(inner).register_forward_hook(lambda m, i, o: found.append(o))
    pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", guidance_scale=1.0, **CALL, **call)
    hook.remove()
    return found


@pytest.fixture(scope="module")
def model(pipe):
    """With random networks."""
    _, width, *grid = seen_at(pipe)[0].shape
    torch.manual_seed(3)
    concepts = {"colour": ("red", "blue", "grey"), "animal": ("fox", "cat")}
    made = ConceptModel.new(sf.Hookpoint.parse(AT), concepts, width, tuple(grid), decoder=True)
    for network in (made.encoder, made.decoder):
        network.requires_grad_(False).eval()
        for layer in network:
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return made


def through(network, x):
    """The layers by hand, in numpy's order of things: linear, leaky, normalised."""
    layers = list(network)
    for i in range(0, len(layers), 3):
        x = x @ layers[i].weight.T + layers[i].bias
        if i + 2 < len(layers):
            norm = layers[i + 2]
            x = torch.where(x > 0, x, 0.1 * x)
            x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return x


def drawn_with(pipe, edit, steps, **call):
    """Latents, with the middle's rows [positions, channels] put through `edit` in some steps by a plain hook."""
    times = []

    def exchange(module, given, output):
        times.append(len(times))
        if times[-1] not in steps:
            return None
        rows = output[-1].movedim(0, -1).reshape(-1)  # the conditional half is last
        after = edit(rows[None])[0].reshape(*output.shape[2:], -1).movedim(-1, 0)
        return torch.cat([output[:-1], after[None]])

    hook = pipe.unet.mid_block.register_forward_hook(exchange)
    found = pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", **CALL, **call).images
    hook.remove()
    return found


def drawn_by(pipe, instrument, **call):
    with sf.attach(pipe, instrument):
        return pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", **CALL, **call).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_setting_exchanges_the_largest_logit_and_decodes(pipe, model, guidance):
    def edit(w):
        logits = through(model.encoder, w)
        own = logits[0, :3].tolist()
        largest = own.index(max(own))
        own[largest], own[2] = own[2], own[largest]
        logits = torch.cat([torch.tensor([own]), logits[:, 3:]], 1)
        return 0.75 * through(model.decoder, logits) + 0.25 * w

    state = everything(pipe)
    found = drawn_by(pipe, model.set({"colour": "grey"}, strength=0.75, steps=(0.5, 1.0)), guidance_scale=guidance)
    assert everything(pipe) == state
    wanted = drawn_with(pipe, edit, (2, 3), guidance_scale=guidance)
    plain = drawn_with(pipe, edit, (), guidance_scale=guidance)
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-3 * (plain - wanted).abs().max()


def test_pushing_goes_by_the_sign_of_the_gradient_and_not_by_its_sum(pipe, model):
    def edit(w):
        delta = torch.zeros_like(w)
        for _ in range(3):
            leaf = delta.clone().requires_grad_()
            with torch.enable_grad():
                logits = through(model.encoder, w + leaf)
                loss = -logits[0, 3:5].log_softmax(0)[1]
                (slope,) = torch.autograd.grad(loss, leaf)
            delta = -2.0 * slope.sign()
        return w + delta

    found = drawn_by(
        pipe, model.push({"animal": "cat"}, epsilon=2.0, iterations=3, steps=(0.5, 1.0)), guidance_scale=1.0
    )
    wanted = drawn_with(pipe, edit, (2, 3), guidance_scale=1.0)
    plain = drawn_with(pipe, edit, (), guidance_scale=1.0)
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()
    # A slope that is nothing but rounding has either sign: a few entries in a thousand may differ.
    assert (found - wanted).norm() <= 0.05 * (plain - wanted).norm()


@pytest.mark.parametrize("decoder", [True, False])
def test_one_batch_of_learning_is_that_of_the_formulas(pipe, decoder):
    prompts = {name: LABELLED[name] for name in ("a red fox", "a blue fox", "a cat")}
    how = {"epochs": 1, "batch": 3, "seed": 6, "lr": 1e-3, "steps": [2]}
    state = everything(pipe)
    learned = learn_concepts(pipe, AT, prompts, decoder=decoder, guidance_scale=1.0, **how, **CALL)
    assert everything(pipe) == state
    assert learned.concepts == {"colour": ("red", "blue"), "animal": ("fox", "cat")}

    generator = torch.Generator().manual_seed(6)
    texts = [list(prompts)[i] for i in torch.randperm(3, generator=generator)]
    clean = torch.cat(
        [
            pipe(
                t, generator=torch.Generator().manual_seed(6 + i), output_type="latent", guidance_scale=1.0, **CALL
            ).images
            for i, t in enumerate(texts)
        ]
    )
    (
        torch.randperm(1, generator=generator),
        torch.randint(1, (), generator=generator),
        torch.randint(1, (), generator=generator),
    )
    noise = torch.randn(clean.shape, generator=generator)
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[2]
    kept = float(pipe.scheduler.alphas_cumprod[t])
    x = math.sqrt(kept) * clean + math.sqrt(1 - kept) * noise
    text = pipe.encode_prompt(texts, "cpu", 1, False)[0].detach()
    seen = {}

    def x0(w=None):
        def hook(module, given, output):
            seen["w"] = output.detach().movedim(1, -1).flatten(1)
            return None if w is None else w.view(len(w), *output.shape[2:], -1).movedim(-1, 1)

        handle = pipe.unet.mid_block.register_forward_hook(hook)
        said = pipe.unet(x, t, text)[0]
        handle.remove()
        return (x - math.sqrt(1 - kept) * said) / math.sqrt(kept)

    plain = x0().detach()
    w = seen["w"]
    torch.manual_seed(6)
    _, width, height, side = pipe.unet.config.block_out_channels[-1], *seen_at(pipe)[0].shape[1:]
    mine = ConceptModel.new(sf.Hookpoint.parse(AT), learned.concepts, width, (height, side), decoder)
    y = {
        c: torch.tensor([vs.index(prompts[one][c]) if c in prompts[one] else -100 for one in texts])
        for c, vs in learned.concepts.items()
    }

    def told(logits, labels):
        return F.cross_entropy(logits[:, :2], labels["colour"]) + F.cross_entropy(logits[:, 2:4], labels["animal"])

    parameters = [p for n in (mine.encoder, mine.decoder) if n is not None for p in n.parameters()]
    adam = [torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.99)) for _ in range(2)]
    logits = mine.encoder(w)
    loss = told(logits, y)
    if decoder:
        back = mine.decoder(logits)
        image = x0(back)
        loss = loss + ((back - w) ** 2).mean() + ((image - clean) ** 2).mean() + ((image - plain) ** 2).mean()
    adam[0].zero_grad()
    loss.backward()
    adam[0].step()
    if decoder:
        concept = ("colour", "animal")[int(torch.randint(2, (), generator=generator))]
        value = int(torch.randint(2, (), generator=generator))
        logits = mine.encoder(w)
        block = [0, 1] if concept == "colour" else [2, 3]
        swapped = logits[:, block]
        flip = swapped.argmax(1) != value
        swapped = torch.where(flip[:, None], swapped.flip(1), swapped)
        logits = torch.cat(
            [swapped, logits[:, 2:]] if concept == "colour" else [logits[:, :2], swapped, logits[:, 4:]], 1
        )
        loss = told(mine.encoder(mine.decoder(logits)), {**y, concept: torch.full((3,), value)})
        adam[1].zero_grad()
        loss.backward()
        adam[1].step()
    pipe.unet.zero_grad(set_to_none=True)
    torch.manual_seed(6)
    begun = ConceptModel.new(sf.Hookpoint.parse(AT), learned.concepts, width, (height, side), decoder)
    for which in ("encoder", "decoder")[: 1 + decoder]:
        ours, theirs = getattr(learned, which).state_dict(), getattr(mine, which).state_dict()
        before = getattr(begun, which).state_dict()
        for name in ours:
            if ours[name].is_floating_point():
                change = (theirs[name] - before[name]).norm()
                # Adam's first step is the gradient's sign: entries whose gradient is rounding noise may differ
                assert (ours[name] - theirs[name]).norm() <= 0.05 * change + 1e-7, name


def test_an_edit_is_read_as_what_was_set(pipe):
    # At 50 epochs an edit is half learned, and rounding decides which half.
    learned = learn_concepts(pipe, AT, LABELLED, epochs=150, batch=3, lr=1e-3, steps=[3], guidance_scale=1.0, **CALL)
    w = seen_at(pipe)[3].movedim(1, -1).flatten(1)
    assert float(learned.read(w)["colour"].sum()) == pytest.approx(1)
    for colour, index in (("red", 0), ("blue", 1)):
        set_to = learned.decoder(learned.exchanged(learned.encoder(w), "colour", index))
        assert float(learned.read(set_to)["colour"][0, index]) > 0.5
        pushed = learned.push({"colour": colour}, epsilon=0.5, iterations=10)
        assert pushed.model is learned


def test_a_classifier_s_labels_and_gradients_are_used(pipe):
    """Of a classifier that is never sure, nothing is learned but what needs no label, and its own part of the edit's loss."""
    heard = []

    def classifier(images):
        heard.append((images.shape, images.requires_grad))
        return {
            "colour": torch.zeros(len(images), 2),
            "animal": images.mean((1, 2, 3))[:, None] * torch.tensor([[90.0, -90.0]]),
        }

    prompts = {"a": {"colour": "x", "animal": "fox"}, "b": {"colour": "y", "animal": "cat"}}
    learn_concepts(pipe, AT, prompts, classifier=classifier, epochs=1, batch=2, steps=[3], guidance_scale=1.0, **CALL)
    assert heard == [((2, 3, 32, 32), False), ((2, 3, 32, 32), True)]


def test_edits_are_saved_with_their_networks(pipe, model, tmp_path):
    for edit in (
        model.set({"colour": "blue"}),
        model.push({"animal": "cat", "colour": "red"}, epsilon=0.2, iterations=2),
    ):
        folder = tmp_path / type(edit).__name__
        edit.save(folder)
        again = sf.load_instrument(folder)
        assert torch.equal(drawn_by(pipe, edit), drawn_by(pipe, again))
        assert again.model.concepts == model.concepts


def test_flux_has_them_in_its_image_rows():
    pipe = families()["flux"].build()
    call = {**CALL, "max_sequence_length": 16}
    at = "transformer.transformer_blocks.1"
    learned = learn_concepts(pipe, at, LABELLED, epochs=2, batch=2, **call)
    plain = pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", **call).images
    with sf.attach(pipe, learned.set({"animal": "cat"})):
        edited = pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", **call).images
    assert edited.isfinite().all()
    assert not torch.equal(plain, edited)


def test_wrong_inputs_are_refused_in_a_sentence(pipe, model):
    with pytest.raises(ValueError, match="at least two values of every concept"):
        learn_concepts(pipe, AT, {"a fox": {"animal": "fox"}, "a red fox": {"animal": "fox"}}, **CALL)
    with pytest.raises(ValueError, match="has none of this call's 4 steps"):
        learn_concepts(pipe, AT, LABELLED, steps=[7], **CALL)
    with pytest.raises(ValueError, match="use one of red, blue, grey"):
        model.set({"colour": "green"})
    with pytest.raises(ValueError, match="none of the concepts"):
        model.push({"size": "small"})
    with pytest.raises(ValueError, match="draw at the size"), sf.attach(pipe, model.set({"colour": "red"})):
        pipe("a fox", **{**CALL, "height": 64})
    alone = ConceptModel(model.at, model.concepts, model.width, model.grid, model.encoder)
    with pytest.raises(ValueError, match="no decoder"):
        alone.set({"colour": "red"})
