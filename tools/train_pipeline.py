"""Train the embedded text-to-image pipeline: text encoder and UNet together, on the fifty objects in four styles.

    python tools/train_pipeline.py               # resumable

A `StableDiffusionPipeline` in miniature: a 2-layer CLIP text model of width 128 over a small vocabulary, a UNet of
channels (64, 128) with cross-attention at both levels, latents 16x16x4 of the autoencoder that
`tools/train_autoencoder.py` made. v-prediction, zero terminal SNR, trailing timesteps, 10 % empty prompts, averaged
weights. Each checkpoint also exports the pipeline to `build/training/pipeline` in fp16, so it can be tried any time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_autoencoder import OUT as VAE
from train_autoencoder import ROOT
from training_run import Averaged, TrainingRun, half
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sparsefeat.assets import emojicanvas

RUN = ROOT / "build" / "training" / "pipeline.pt"
OUT = ROOT / "build" / "training" / "pipeline"
LATENTS = ROOT / "build" / "training" / "latents.pt"
BATCH = 32
N_VARIANTS = 32  # augmented encodings of each drawing
PEAK_LR = 1e-3
MAX_TOKENS = 16


def prompt_words() -> list[str]:
    """Every word a prompt of the embedded pipeline may use."""
    prompts = [emojicanvas.prompt(name, style) for name in emojicanvas.OBJECTS for style in (*emojicanvas.STYLES, None)]
    return sorted({word for prompt in prompts for word in prompt.split()})


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that make each word of the vocabulary one token; other words fall apart into letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([" ".join(prompt_words())], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted({*letters, *(f"{letter}</w>" for letter in letters), *model["vocab"]})
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads: 32 channels each
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def encoded_variants() -> torch.Tensor:
    """Latents [style, object, variant, 4, 16, 16] of the drawings, lightly shifted and scaled."""
    if LATENTS.is_file():
        return torch.load(LATENTS, weights_only=True)
    vae = AutoencoderTiny.from_pretrained(VAE).eval()
    images = torch.from_numpy(emojicanvas.load().on_white()).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    n_styles, n_objects = images.shape[:2]
    flat = images.flatten(0, 1)
    generator = torch.Generator().manual_seed(1)
    variants = []
    for variant in range(N_VARIANTS):
        theta = torch.zeros(len(flat), 2, 3)
        scale = 1 / (0.88 + 0.14 * torch.rand(len(flat), generator=generator))
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = (torch.rand(len(flat), 2, generator=generator) - 0.5) * (4 * 2 / 64)
        if variant == 0:  # the drawing as it is
            theta[:, 0, 0] = theta[:, 1, 1] = 1
            theta[:, :, 2] = 0
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        moved = F.grid_sample(flat - 1, grid, align_corners=False) + 1
        with torch.no_grad():
            variants.append(vae.encoder(moved))
    latents = torch.stack(variants, 1).unflatten(0, (n_styles, n_objects))
    LATENTS.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents, LATENTS)
    return latents


def learning_rate(step: int, n_steps: int) -> float:
    """200 steps of warm-up, then a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / 200)
    progress = min(1.0, step / n_steps)
    return PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Joint(torch.nn.Module):
    """Text encoder and UNet, trained as one."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text, self.unet = text, unet


def export(average: Averaged, tokenizer: CLIPTokenizer) -> None:
    """Write the averaged weights as a pipeline folder in fp16."""
    joint = Joint(build_text_encoder(tokenizer), build_unet())
    joint.load_state_dict(average.shadow)
    vae = AutoencoderTiny.from_pretrained(VAE)
    for module in (joint.text, joint.unet, vae):
        module.load_state_dict(half(module.state_dict()), strict=True)
        module.half()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=joint.text,
        tokenizer=tokenizer,
        unet=joint.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(OUT, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4900)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    arguments = parser.parse_args()

    tokenizer = build_tokenizer()
    latents = encoded_variants()
    n_styles, n_objects = latents.shape[:2]

    def tokenize(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    # Token rows: every full prompt, then object without style, style without object, and the empty prompt.
    names, styles = emojicanvas.OBJECTS, emojicanvas.STYLES
    full = tokenize([emojicanvas.prompt(n, s) for s in styles for n in names]).unflatten(0, (n_styles, n_objects))
    object_only = tokenize([emojicanvas.prompt(n) for n in names])
    style_only = tokenize([emojicanvas.prompt(None, s) for s in styles])
    empty = tokenize([""])

    # On a CPU the flash kernel's backward takes 27 % of a step of this small model; plain products halve the step.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.manual_seed(0)
    joint = Joint(build_text_encoder(tokenizer), build_unet()).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(joint.parameters(), lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    average = Averaged(joint, 0.999)
    run = TrainingRun(RUN, arguments.steps, {"joint": joint, "optimizer": optimizer, "average": average})
    unet = joint.unet if arguments.no_compile else torch.compile(joint.unet)
    alphas = build_scheduler().alphas_cumprod
    smoothed = None
    for step, bar in run.steps(on_checkpoint=lambda: export(average, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps)
        s, o = torch.randint(n_styles, (BATCH,)), torch.randint(n_objects, (BATCH,))
        clean = latents[s, o, torch.randint(N_VARIANTS, (BATCH,))]
        kind = torch.rand(BATCH)[:, None]
        tokens = torch.where(kind < 0.10, empty, full[s, o])
        tokens = torch.where((kind >= 0.10) & (kind < 0.18), object_only[o], tokens)
        tokens = torch.where((kind >= 0.18) & (kind < 0.21), style_only[s], tokens)
        timesteps = torch.randint(1000, (BATCH,))
        signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = (signal * clean + sigma * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = joint.text(tokens).last_hidden_state
            predicted = unet(noisy, timesteps, hidden, return_dict=False)[0].float()
        loss = F.mse_loss(predicted, signal * noise - sigma * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(joint.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
    export(average, tokenizer)
    print(f"exported {Path(OUT).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
