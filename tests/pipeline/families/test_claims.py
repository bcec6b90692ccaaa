"""Every denoiser that the installed diffusers exports is claimed by a family or refused, by name; none is taken for
something that it is not.
"""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest
from torch import nn

from sparsefeat.pipeline import Hookpoint, attach
from sparsefeat.pipeline.families.family import UnknownRowsError
from sparsefeat.pipeline.families.registry import FAMILIES, family_of
from tests.pipeline.instruments import Watch

# What diffusers 0.42.1 exports and no family knows: a hookpoint there has to state its rows.
REFUSED = {
    "AnyFlowFARTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "BriaFibo2Transformer2DModel",
    "ChronoEditTransformer3DModel",
    "ControlNetXSAdapter",
    "Cosmos3OmniTransformer",
    "CosmosControlNetModel",
    "DreamLiteTransformer2DModel",
    "DreamLiteUNetModel",
    "EasyAnimateTransformer3DModel",
    "ErnieImageTransformer2DModel",
    "FluxMultiControlNetModel",
    "GlmImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HunyuanDiT2DMultiControlNetModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "Ideogram4Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky6SRTransformer3DModel",
    "Kandinsky6Transformer3DModel",
    "LongCatAudioDiTTransformer",
    "MiniMaxH3Transformer3DModel",
    "MiniMaxMusic3RVQDepthDecoder",
    "MiniMaxMusic3Transformer1DModel",
    "MotionAdapter",
    "MultiControlNetModel",
    "NucleusMoEImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "QwenImageMultiControlNetModel",
    "RFD4ProteinaTransformer",
    "SD3MultiControlNetModel",
    "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel",
    "StableAudio3DiTModel",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "UNet1DModel",
    "UNetControlNetXSModel",
    "UVit2DModel",
    "WanAnimate2Transformer3DModel",
    "ZImageControlNetModel",
}


def exported() -> dict[str, type]:
    """The models that run in the steps, by where diffusers keeps them."""
    found = {}
    for name in dir(diffusers):
        try:
            cls = getattr(diffusers, name)
        except (ImportError, RuntimeError):
            continue
        model = inspect.isclass(cls) and issubclass(cls, nn.Module)
        if model and re.match(r"diffusers\.models\.(transformers|unets|controlnets)\.", cls.__module__):
            found[name] = cls
    return found


def claimed(cls: type) -> bool:
    return any(cls.__name__ in family.classes for family in FAMILIES)


def test_every_denoiser_of_diffusers_is_claimed_or_refused_by_name():
    models = exported()
    assert len(models) > 20
    assert {name for name, cls in models.items() if not claimed(cls)} - REFUSED == set()
    assert {name for name in REFUSED & models.keys() if claimed(models[name])} == set()


def test_no_family_names_a_class_that_diffusers_does_not_have():
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        pytest.skip("older versions lack some models")
    names = [name for family in FAMILIES for name in family.classes]
    assert len(names) == len(set(names))
    assert set(names) - exported().keys() == {"PixArtControlNetAdapterModel"}  # which it has and does not export


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_a_denoiser_that_asks_for_its_rows(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    cls = exported()[name]
    model = cls.__new__(cls)  # its family is told by its class
    nn.Module.__init__(model)
    model.transformer_blocks = nn.ModuleList([nn.Linear(4, 4)])
    family = family_of(model)
    assert family.runs_in_steps

    class Pipe:
        def __init__(self):
            self.transformer = model

        def __call__(self):
            return None

    with pytest.raises(UnknownRowsError, match="state the rows"):
        attach(Pipe(), Watch("transformer.transformer_blocks.0"))
    attach(Pipe(), Watch(Hookpoint("transformer.transformer_blocks.0", rows=(0, None)))).close()
