"""The parts of the two embedded pipelines, untrained: vocabulary, text encoders, denoisers, schedulers, assembly.

`UNET` is a `StableDiffusionPipeline`, `JOINT` a `StableDiffusion3Pipeline` whose transformer attends over image and
text together. Both denoise 16x16x4 latents of one autoencoder and read the same vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from training_data import NOTHING, Batch
from training_run import half
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sparsefeat.assets import emojicanvas, emojiscenes

MAX_TOKENS = 32
WIDTH = 128

# What `StableDiffusion3Pipeline` appends to the text by default where it has no third encoder: zeros.
ZERO_TOKENS = 256


def prompt_words() -> list[str]:
    """Every word and mark that a prompt of the embedded pipelines may use."""
    prompts = [emojicanvas.prompt(name, style) for name in emojicanvas.OBJECTS for style in (*emojicanvas.STYLES, None)]
    prompts += [emojiscenes.caption((0, 1, 2), 0).replace(",", " ,")]
    prompts += [emojiscenes.caption((0, 1), 0, relation) for relation in emojiscenes.RELATIONS]
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


def _clip_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Denoiser(Protocol):
    """What training needs of a family: a module from latents and tokens to a loss, and the pipeline made of it."""

    def loss(self, batch: Batch) -> Tensor: ...

    def pipeline(self, tokenizer: CLIPTokenizer, vae: AutoencoderTiny) -> Any: ...

    def load(self, folder: Path) -> None: ...


def spread(n: int, device: torch.device) -> Tensor:
    """`n` numbers of [0, 1), one from each n-th part of it, in random order: which takes noise out of the gradient
    and gives every place in the batch, whatever stands there, all of [0, 1)."""
    order = torch.randperm(n, device=device)
    return ((order + torch.rand(n, device=device)) / n).clamp(max=1 - 2**-24)


TOLD = 0.1  # the weight of the cross-entropy beside the denoiser's own error


class Regions(nn.Module):
    """Cross-entropy of what one layer says is drawn where, of training alone.

    Features that are told what they must hold are learned much sooner (the idea of REPA, arXiv 2410.06940, with the
    exact masks in place of another model's features).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NOTHING + 1))
        self.seen: list[Tensor] = []
        layer.register_forward_hook(lambda *args: self.seen.append(args[-1]))

    def forward(self, batch: Batch) -> Tensor:
        """After the layer ran: its last output, fp [n, WIDTH, 16, 16] or the image tokens of a pair (text, image)."""
        output = self.seen.pop()
        tokens = output[1] if isinstance(output, tuple) else output.flatten(2).mT
        return TOLD * F.cross_entropy(self.head(tokens).float().flatten(0, 1), batch.regions.flatten())


class UNetDenoiser(nn.Module):
    """CLIP text model of 2 layers and a UNet of channels (64, 128) with cross-attention at both levels.

    v-prediction (Salimans and Ho 2022), zero terminal SNR and trailing timesteps (Lin et al. 2023).
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text = CLIPTextModel(_clip_config(tokenizer, WIDTH, 2))
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4),  # diffusers' name for the number of heads: 32 channels each
            norm_num_groups=16,
        )
        self.regions = Regions(self.unet.up_blocks[0])
        self.register_buffer("alphas", self.scheduler().alphas_cumprod, persistent=False)

    @staticmethod
    def scheduler() -> DDIMScheduler:
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

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of v at uniform timesteps, and what the first block up is told."""
        clean, tokens = batch.clean, batch.tokens
        timesteps = (spread(len(clean), clean.device) * 1000).long()
        alphas: Tensor = self.alphas  # type: ignore[assignment]
        signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = (signal * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
        hidden = self.text(tokens).last_hidden_state
        predicted = self.unet(noisy, timesteps, hidden, return_dict=False)[0].float()
        return F.mse_loss(predicted, signal * noise - sigma * clean) + self.regions(batch)

    def pipeline(self, tokenizer: CLIPTokenizer, vae: AutoencoderTiny) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=self.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def load(self, folder: Path) -> None:
        load_module(self.unet, folder / "unet")
        load_text(self.text, self.tokenizer, folder / "text_encoder", folder / "tokenizer")


class RepeatedZeros:
    """Joint attention of SD3's blocks in which the text's last token stands for `n` equal ones.

    The zeros that the pipeline appends have no positions, so they stay equal through all blocks: attending to one with
    log(n) added to its score is attending to n of them, at a fraction of the sequence's length. For training alone;
    the exported model has diffusers' own processor.
    """

    def __init__(self, n: int) -> None:
        self.bias = math.log(n)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        n_image = hidden_states.shape[1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        cq, ck, cv = (heads(f(encoder_hidden_states)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        q, k = attn.norm_q(q), attn.norm_k(k)
        cq, ck = attn.norm_added_q(cq), attn.norm_added_k(ck)
        q, k, v = (torch.cat(pair, 2) for pair in ((q, cq), (k, ck), (v, cv)))
        mask = q.new_zeros(k.shape[2])
        mask[-1] = self.bias
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask.expand(1, 1, q.shape[2], -1))
        mixed = mixed.transpose(1, 2).flatten(2)
        image = attn.to_out[0](mixed[:, :n_image])
        return (image, mixed[:, n_image:]) if attn.context_pre_only else (image, attn.to_add_out(mixed[:, n_image:]))


class JointDenoiser(nn.Module):
    """Two small CLIP text models and an `SD3Transformer2DModel` of 8 blocks at patch 1: 16x16 image tokens.

    Rectified flow (Liu et al. 2022) with the timesteps of SD3's training, logit-normal (Esser et al. 2024, arXiv
    2403.03206).
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        half_width = WIDTH // 2
        # The pipeline reads the layer before the last, and the pooled projection after it.
        self.text = CLIPTextModelWithProjection(_clip_config(tokenizer, half_width, 3))
        self.text_2 = CLIPTextModelWithProjection(_clip_config(tokenizer, half_width, 3))
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=8,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )
        self.regions = Regions(self.transformer.transformer_blocks[3])

    @staticmethod
    def scheduler() -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=2.0)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the velocity `noise - clean`, and what the fourth block is told."""
        clean, tokens = batch.clean, batch.tokens
        n = len(clean)
        normal = torch.erfinv((2 * spread(n, clean.device) - 1).clamp(-0.9999, 0.9999)) * math.sqrt(2)
        sigma = torch.sigmoid(normal + 0.5).view(-1, 1, 1, 1)  # shifted towards noise, where the text decides
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigma)
        texts = [model(tokens, output_hidden_states=True) for model in (self.text, self.text_2)]
        hidden = torch.cat([text.hidden_states[-2] for text in texts], -1)
        hidden = torch.cat([hidden, hidden.new_zeros(n, 1, WIDTH)], 1)
        pooled = torch.cat([text.text_embeds for text in texts], -1)
        predicted = self.transformer(noisy, hidden, pooled, sigma.view(-1) * 1000, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise - clean) + self.regions(batch)

    def train(self, mode: bool = True) -> JointDenoiser:
        if mode:
            self.transformer.set_attn_processor(RepeatedZeros(ZERO_TOKENS))
        return super().train(mode)

    def pipeline(self, tokenizer: CLIPTokenizer, vae: AutoencoderTiny) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler(),
            vae=vae,
            text_encoder=self.text,
            tokenizer=tokenizer,
            text_encoder_2=self.text_2,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def load(self, folder: Path) -> None:
        load_module(self.transformer, folder / "transformer")
        for model, suffix in ((self.text, ""), (self.text_2, "_2")):
            load_text(model, self.tokenizer, folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}")


FAMILIES: dict[str, type[UNetDenoiser] | type[JointDenoiser]] = {"unet": UNetDenoiser, "joint": JointDenoiser}


def _weights(folder: Path) -> dict[str, Tensor]:
    (path,) = sorted(folder.glob("*.safetensors"))
    return {name: value.float() for name, value in load_file(path).items()}


def load_module(module: nn.Module, folder: Path) -> None:
    module.load_state_dict(_weights(folder))


def load_text(model: nn.Module, tokenizer: CLIPTokenizer, encoder: Path, its_tokenizer: Path) -> None:
    """An exported text encoder, word by word and position by position: its vocabulary may be smaller, its prompts
    shorter. What it does not have stays as it is."""
    state, old = model.state_dict(), _weights(encoder)
    before = CLIPTokenizer.from_pretrained(str(its_tokenizer)).get_vocab()
    for name, value in old.items():
        if name not in state:
            raise ValueError(f"{encoder} has {name}, which this text encoder has not: it is another model's")
        if name.endswith("token_embedding.weight"):
            for word, index in tokenizer.get_vocab().items():
                if word in before:
                    state[name][index] = value[before[word]]
        elif name.endswith("position_embedding.weight"):
            state[name][: len(value)] = value[: len(state[name])]
        else:
            state[name] = value
    model.load_state_dict(state)


def export(denoiser: Denoiser, vae_folder: Path, out: Path) -> None:
    """Write a denoiser as a pipeline folder in fp16."""
    vae = AutoencoderTiny.from_pretrained(vae_folder)
    pipeline = denoiser.pipeline(build_tokenizer(), vae)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.load_state_dict(half(module.state_dict()), strict=True)
            module.half()
    pipeline.save_pretrained(out, safe_serialization=True)
