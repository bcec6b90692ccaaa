"""Every rule beside a denoising loop in plain PyTorch, of what the denoiser is given for each prompt in runs of its own."""

from __future__ import annotations

import math

import pytest
import torch

import sparsefeat as sf
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

STEPS, GUIDANCE = 3, 4.0
FOX, RED, BLUE, DOG = "fox", "red fox", "blue dog", "dog"
UNETS = {
    "sd": lambda: tiny_sd(),
    "sd, v": lambda: with_v(tiny_sd()),
    "sd, Euler": lambda: tiny_sd("euler"),
    "sdxl": tiny_sdxl,
}
KINDS = [*UNETS, "sd3", "flux", "flux, two passes"]


def with_v(pipe):
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


class Loop:
    """A pipeline, and a loop of our own over its denoiser."""

    def __init__(self, kind: str):
        self.kind = kind
        self.pipe = UNETS[kind]() if kind in UNETS else families()[kind.partition(",")[0]].build()
        pipe = self.pipe
        self.name = "unet" if kind in UNETS else "transformer"
        self.root = getattr(pipe, self.name)
        self.argument = "sample" if kind in UNETS else "hidden_states"
        self.call = {"num_inference_steps": STEPS, "output_type": "latent"}
        if kind not in UNETS:
            side = 16 if kind == "sd3" else 32
            self.call |= {"max_sequence_length": 12 if kind == "sd3" else 16, "height": side, "width": side}
        self.two_passes = kind == "flux, two passes"
        self.guided = kind != "flux"
        shape = {"sd3": (1, 16, 8, 8), "flux": (1, 16, 64)}.get(kind.partition(",")[0], (1, 4, 16, 16))
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        self.given = {}

    def guidance(self):
        if self.kind == "flux":
            return {"guidance_scale": 3.5}
        if self.two_passes:
            return {"guidance_scale": 3.5, "true_cfg_scale": GUIDANCE, "negative_prompt": ""}
        return {"guidance_scale": GUIDANCE, "negative_prompt": ""}

    def run(self, prompt, *instruments, **more):
        arguments = {**self.call, **self.guidance(), "latents": self.latents.clone(), **more}
        if not instruments:
            return self.pipe(prompt, **arguments).images
        with sf.attach(self.pipe, *instruments):
            return self.pipe(prompt, **arguments).images

    def recorded(self, prompt):
        """What the denoiser is given at each step of an unguided run."""
        if prompt not in self.given:
            seen = []
            hook = self.root.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
            unguided = {} if self.kind.startswith("flux") else {"guidance_scale": 1.0}
            more = {"guidance_scale": 3.5} if self.kind.startswith("flux") else {}
            self.pipe(prompt, latents=self.latents.clone(), **self.call, **unguided, **more)
            hook.remove()
            self.given[prompt] = seen
        return self.given[prompt]

    def predict(self, i, prompt, x):
        args, kwargs = self.recorded(prompt)[i]
        if args:
            return self.root(x, *args[1:], **kwargs)[0]
        return self.root(**{**kwargs, self.argument: x})[0]

    @torch.no_grad()
    def by_hand(self, prompt, combine, move=None):
        """`combine(predict, i, x)` gives (conditional, unconditional) predictions."""
        for each in (prompt, "", FOX, RED, BLUE, DOG):  # none is recorded in the loop: it is one scheduler
            self.recorded(each)
        scheduler = self.pipe.scheduler
        scheduler._step_index = scheduler._begin_index = None
        x = self.latents * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else self.latents
        for i, t in enumerate(scheduler.timesteps):
            scale = scheduler.scale_model_input(torch.ones(1), t).item() if self.name == "unet" else 1.0
            given = scale * x
            if move is not None:
                given = move(i, float(t), given)
                x = given / scale
            with_it, without = combine(lambda p, at=given, i=i: self.predict(i, p, at), i, given)
            out = without + GUIDANCE * (with_it - without) if self.guided else with_it
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x


def check(loop, rule, combine, prompt=FOX, **options):
    expected = loop.by_hand(prompt, combine)
    plain = loop.run(prompt)
    found = loop.run(prompt, sf.ScoreEdit(rule, **options))
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (plain - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_composition_of_prompts(kind):
    loop = Loop(kind)

    def combine(predict, i, x):
        own, without = predict(FOX), predict("")
        return own + 0.8 * (predict(BLUE) - without) - 0.5 * (predict(DOG) - without), without

    check(loop, sf.Compose({BLUE: 0.8, DOG: -0.5}), combine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slider_is_added_to_what_guidance_makes(kind):
    def combine(predict, i, x):
        change = 2.0 * (predict(RED) - predict(DOG))
        return predict(FOX) + change, predict("") + change

    check(Loop(kind), sf.Slider(RED, DOG, 2.0), combine)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_scaling_of_a_concept(kind):
    def combine(predict, i, x):
        change = 2.0 * (1 - i / (STEPS - 1)) ** 1.5 * (predict(RED) - predict(""))
        return predict(FOX) + change, predict("") + change

    check(Loop(kind), sf.ScaleConcept(RED, omega=2.0, gamma=1.5), combine)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux, two passes"])
def test_concept_algebra_beside_an_eigendecomposition(kind):
    span = [RED, BLUE, DOG]

    def combine(predict, i, x):
        own = predict(FOX)
        columns = torch.stack([predict(p).flatten() for p in span], 1).double()
        columns = (columns - columns.mean(1, keepdim=True)) / math.sqrt(3)
        values, vectors = torch.linalg.eigh(columns.T @ columns)  # the small side
        values, vectors = values.flip(0), vectors.flip(1)
        k = int(((values.cumsum(0) / values.sum()) > 0.9).nonzero()[0]) + 1
        basis = columns @ vectors[:, :k] / values[:k].sqrt()
        wanted = (predict(BLUE) - own).flatten().double()
        return own + (basis @ (basis.T @ wanted)).float().view_as(own), predict("")

    check(Loop(kind), sf.ConceptAlgebra(BLUE, span), combine)


@pytest.mark.parametrize("kind", ["sd", "sd, v", "sdxl", "sd3"])
def test_an_anagram_of_two_turned_views(kind):
    def combine(predict, i, x):
        quarter, upside = x.transpose(-1, -2).flip(-2), x.flip(-1).flip(-2)
        pairs = [(FOX, BLUE, DOG), ("", "", "")]
        means = []
        for own, first, second in pairs:
            back = predict(first, quarter).flip(-2).transpose(-1, -2)
            means.append((predict(own) + back + predict(second, upside).flip(-1).flip(-2)) / 3)
        return means[0], means[1]

    check(Loop(kind), sf.Views({"rotate90": BLUE, "rotate180": DOG}), combine)


def chain_of(loop, rule, kind):
    """Langevin of two steps by hand at every step's level, and the composition."""
    generator = torch.Generator().manual_seed(3)

    def compose(predict, i, x):
        own, without = predict(FOX), predict("")
        return own + 0.8 * (predict(BLUE) - without), without

    def move(i, t, x):
        if kind == "sd3":
            sigma = t / 1000
        else:
            sigma = float((1 - loop.pipe.scheduler.alphas_cumprod[int(t)]).sqrt())
        alpha = 1 - sigma if kind == "sd3" else math.sqrt(1 - sigma**2)
        for _ in range(2):
            with_it, without = compose(lambda p, x=x: loop.predict(i, p, x), i, x)
            out = without + GUIDANCE * (with_it - without)
            noise = {"sd3": x + alpha * out, "sd, v": alpha * out + sigma * x}.get(kind, out)
            fresh = torch.randn(x.shape[1:], generator=generator)[None]
            x = x - 0.5 * 0.1 * sigma * noise + math.sqrt(0.1) * sigma * fresh
        return x

    return loop.by_hand(FOX, compose, move)


@pytest.mark.parametrize("kind", ["sd", "sd, v", "sdxl", "sd3"])
def test_langevin_corrections_by_hand(kind):
    loop = Loop(kind)
    expected = chain_of(loop, None, kind)
    edit = sf.ScoreEdit(sf.Compose({BLUE: 0.8}), corrections=sf.Langevin(steps=2, size=0.1, seed=3))
    found = loop.run(FOX, edit)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()  # Euler's fractional timesteps
    again = loop.run(FOX, edit)
    assert torch.equal(found, again)


@pytest.mark.parametrize("chain", [sf.Langevin(400, 0.05), sf.Hamiltonian(100, 4, 0.2, 0.5)])
def test_a_chain_stays_in_the_density_that_its_score_is_of(chain):
    mean, spread, sigma = 2.0, 0.7, 0.7
    x = torch.full((1, 4000), -3.0)
    moved = chain.moved(x, lambda x: (mean - x) / spread**2, sigma, [torch.Generator().manual_seed(0)])
    # The chain's own error in the variance is below its step size squared over four; the sample's is 2 %.
    assert abs(moved.mean() - mean) < 0.06
    assert abs(moved.std() / spread - 1) < 0.06


@pytest.mark.parametrize(
    "rule",
    [
        sf.Compose({BLUE: 0.0}),
        sf.Slider(RED, BLUE, 0.0),
        sf.ScaleConcept(RED, 0.0),
        sf.ConceptAlgebra(RED, [RED, BLUE], gamma=0.0),
    ],
)
def test_strength_zero_changes_no_bit_and_runs_nothing(rule):
    pipe = tiny_sd()
    before = pixels(pipe, FOX)
    runs = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    with sf.attach(pipe, sf.ScoreEdit(rule)):
        assert (pixels(pipe, FOX) == before).all()
    hook.remove()
    assert len(runs) == 2


def test_a_prompt_composed_with_itself_negated_and_a_mask_of_zeros_change_no_bit():
    pipe = tiny_sd()
    before = pixels(pipe, [FOX, DOG], num_images_per_prompt=2)
    edit = sf.ScoreEdit(sf.Compose({BLUE: 1.0}), mask=torch.zeros(8, 8))
    with sf.attach(pipe, edit):
        assert (pixels(pipe, [FOX, DOG], num_images_per_prompt=2) == before).all()


def test_what_a_model_of_one_stream_predicts_is_edited_too():
    family = families()["lumina2"]
    if not family.available:
        pytest.skip(f"this diffusers has no {family.pipeline}")
    pipe = family.build()
    plain = family.call(pipe, ["a fox"], guidance=True)
    with sf.attach(pipe, sf.ScoreEdit(sf.Compose({"a cat": 0.5}), mask=torch.zeros(8, 8))):
        assert torch.equal(family.call(pipe, ["a fox"], guidance=True), plain)
    with sf.attach(pipe, sf.ScoreEdit(sf.Compose({"a cat": 0.5}))):
        assert not torch.equal(family.call(pipe, ["a fox"], guidance=True), plain)


def test_a_batch_is_what_its_images_are_alone_and_windows_and_masks_hold():
    pipe = tiny_sd()
    options = {"steps": (0.0, 0.5), "mask": torch.eye(16)}
    edit = sf.ScoreEdit(sf.ConceptAlgebra(RED, [RED, BLUE, DOG]), **options)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 2, "output_type": "latent"}
    with sf.attach(pipe, edit):
        both = pipe([FOX, DOG], latents=latents.clone(), **call).images
        alone = torch.cat(
            [pipe(p, latents=latents[i : i + 1].clone(), **call).images for i, p in enumerate([FOX, DOG])]
        )
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-4)


def test_an_image_is_inverted_and_its_concept_scaled():
    pipe = tiny_sd()
    image = pipe(FOX, num_inference_steps=2).images[0]
    inversion = sf.Inversion.of(pipe, image, FOX, steps=STEPS)
    assert inversion.latents.shape == (STEPS, 1, 4, 16, 16)
    # DDIM backwards by hand: from the least noise to the most.
    x = pipe.vae.encode(pipe.image_processor.preprocess(image)).latents * pipe.vae.config.scaling_factor
    import diffusers

    back = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    back.set_timesteps(STEPS)
    text = pipe.encode_prompt(FOX, "cpu", 1, False)[0]
    for t in back.timesteps:
        with torch.no_grad():
            x = back.step(pipe.unet(x, t, text).sample, t, x).prev_sample
    torch.testing.assert_close(inversion.start, x, rtol=1e-3, atol=1e-4)
    rule = sf.ScaleConcept(RED, omega=2.0, exit_steps=2, inversion=inversion)
    loop = Loop("sd")
    loop.latents = inversion.start

    def combine(predict, i, x):
        s = 2.0 * (1 - i / (STEPS - 1)) ** 3.0
        change = s * (predict(RED) - predict(""))
        if i < 2:
            change = change + s * (predict(RED, 0.5 * (x + inversion.latents[i])) - predict(RED))
        return predict("") + change, predict("") + change

    check(loop, rule, combine, prompt="")


def test_a_saved_edit_is_the_same_edit(tmp_path):
    pipe = tiny_sd()
    edits = [
        sf.ScoreEdit(sf.Compose({BLUE: 0.7}), corrections=sf.Hamiltonian(1, 1), steps=[0]),
        sf.ScoreEdit(sf.Slider(RED, BLUE, 1.5), steps=(0.0, 0.5), mask=torch.eye(8)),
        sf.ScoreEdit(sf.Views({"flip": BLUE})),
    ]
    for i, edit in enumerate(edits):
        edit.save(tmp_path / str(i))
        images = []
        for one in (edit, sf.load_instrument(tmp_path / str(i))):
            with sf.attach(pipe, one):
                images.append(pixels(pipe, FOX))
        assert (images[0] == images[1]).all()


def test_what_is_wrong_is_said_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="weights="):
        sf.Compose({})
    with pytest.raises(ValueError, match=r"weights\['a'\]=nan"):
        sf.Compose({"a": math.nan})
    with pytest.raises(ValueError, match="span="):
        sf.ConceptAlgebra("a", ["b"])
    with pytest.raises(ValueError, match="views="):
        sf.Views({"sideways": "a"})
    with pytest.raises(ValueError, match="belong together"):
        sf.ScaleConcept("a", exit_steps=3)
    with pytest.raises(ValueError, match="rule is str"):
        sf.ScoreEdit("a fox")
    embeds = pipe.encode_prompt(FOX, "cpu", 1, True)
    with sf.attach(pipe, sf.ScoreEdit(sf.Slider(RED, BLUE))), pytest.raises(ValueError, match="with prompt="):
        pixels(pipe, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    flux = Loop("flux")
    with pytest.raises(ValueError, match="packed into tokens"):
        flux.run(FOX, sf.ScoreEdit(sf.Views({"flip": BLUE})))
    qwen = families()["qwen_image"]
    if qwen.available:
        tiny = qwen.build()
        with sf.attach(tiny, sf.ScoreEdit(sf.Slider("red fox", "dog"))), pytest.raises(ValueError, match=r"becomes \["):
            qwen.call(tiny, ["fox"], guidance=False)
