"""The model families this package knows. A new one is a file with a `Family` and a line here."""

from __future__ import annotations

from torch import nn

from sparsefeat.pipeline.families.allegro import Allegro
from sparsefeat.pipeline.families.audio import AceStep, StableAudio
from sparsefeat.pipeline.families.aura_flow import AuraFlow
from sparsefeat.pipeline.families.autoencoder import Autoencoder
from sparsefeat.pipeline.families.bria import Bria
from sparsefeat.pipeline.families.cogvideox import CogVideoX
from sparsefeat.pipeline.families.cogview import CogView3, CogView4
from sparsefeat.pipeline.families.cosmos import Cosmos
from sparsefeat.pipeline.families.family import Family
from sparsefeat.pipeline.families.flux import Flux
from sparsefeat.pipeline.families.flux2 import Flux2
from sparsefeat.pipeline.families.flux3 import Flux3
from sparsefeat.pipeline.families.hidream import HiDream
from sparsefeat.pipeline.families.hunyuan_dit import HunyuanDiT
from sparsefeat.pipeline.families.hunyuan_image import HunyuanImage
from sparsefeat.pipeline.families.hunyuan_video import HunyuanVideo
from sparsefeat.pipeline.families.kandinsky import Kandinsky5
from sparsefeat.pipeline.families.kandinsky3 import Kandinsky3
from sparsefeat.pipeline.families.krea2 import Krea2
from sparsefeat.pipeline.families.latte import Latte
from sparsefeat.pipeline.families.longcat import LongCatImage
from sparsefeat.pipeline.families.ltx import LTX
from sparsefeat.pipeline.families.ltx2 import LTX2
from sparsefeat.pipeline.families.lumina import Lumina
from sparsefeat.pipeline.families.lumina2 import Lumina2
from sparsefeat.pipeline.families.mochi import Mochi
from sparsefeat.pipeline.families.motif_video import MotifVideo
from sparsefeat.pipeline.families.omnigen import OmniGen
from sparsefeat.pipeline.families.pixart import PixArt
from sparsefeat.pipeline.families.prior import Prior
from sparsefeat.pipeline.families.prx import PRX
from sparsefeat.pipeline.families.qwen_image import QwenImage
from sparsefeat.pipeline.families.sana import Sana
from sparsefeat.pipeline.families.sana_video import SanaVideo
from sparsefeat.pipeline.families.sd3 import SD3
from sparsefeat.pipeline.families.stable_cascade import StableCascade
from sparsefeat.pipeline.families.text_encoder import TextEncoder
from sparsefeat.pipeline.families.unet import UNet
from sparsefeat.pipeline.families.unknown import Unknown, UnknownDenoiser
from sparsefeat.pipeline.families.wan import Wan
from sparsefeat.pipeline.families.z_image import ZImage

# The first that claims a component has it, so the general ones come last.
FAMILIES: tuple[Family, ...] = (
    SD3(),
    Flux(),
    PixArt(),
    Sana(),
    QwenImage(),
    Flux2(),
    Flux3(),
    AuraFlow(),
    Lumina(),
    Lumina2(),
    HunyuanDiT(),
    ZImage(),
    CogVideoX(),
    Wan(),
    LTX(),
    HunyuanVideo(),
    Kandinsky5(),
    Allegro(),
    Bria(),
    AceStep(),
    StableAudio(),
    CogView3(),
    CogView4(),
    Cosmos(),
    HiDream(),
    HunyuanImage(),
    Kandinsky3(),
    Krea2(),
    Latte(),
    LongCatImage(),
    LTX2(),
    Mochi(),
    MotifVideo(),
    OmniGen(),
    Prior(),
    PRX(),
    SanaVideo(),
    StableCascade(),
    UNet(),
    UnknownDenoiser(),
    TextEncoder(),
    Autoencoder(),
    Unknown(),
)


def family_of(root: nn.Module) -> Family:
    """The family of one component of a pipeline; `Unknown` where none claims it."""
    root = getattr(root, "_orig_mod", root)  # torch.compile's wrapper
    return next(family for family in FAMILIES if family.claims(root))


def is_known(module: nn.Module) -> bool:
    """Whether it is one of the models that families name by their classes, and nothing that only looks like one."""
    kind = type(module)
    if kind not in _known:  # asked of every component and every block of it whenever something is attached
        _known[kind] = any(family.names(kind) for family in FAMILIES)
    return _known[kind]


_known: dict[type[nn.Module], bool] = {}
