"""The pipeline that looks at an image instead of making one: encodes it, gives it noise, denoises it from there."""

from __future__ import annotations

from typing import Any

WITH_ONE = "SD, SDXL, SD3, FLUX.1, Qwen-Image, Z-Image, CogVideoX"


def image_to_image(pipe: Any) -> tuple[Any, str]:
    """diffusers' image-to-image pipeline around the same models, without a bar of its own, and what its call names the image:
    "image", or "video".

    Raises:
        ValueError: there is none; what is to be done instead is for the caller to say.
    """
    import diffusers  # takes seconds, and whoever has a pipeline has it already

    name = type(pipe).__name__
    videos = name.startswith("CogVideoX")
    of = diffusers.CogVideoXVideoToVideoPipeline if videos else diffusers.AutoPipelineForImage2Image
    try:
        twin = of.from_pipe(pipe)
    except ValueError:
        twin = None
    # Editing pipelines (Kontext, FLUX.2, Qwen-Image-Edit) put the image beside the one that is made.
    if twin is None or not (videos or "Img2Img" in type(twin).__name__):
        raise ValueError(f"diffusers has no image-to-image pipeline of {name}'s models, which noises an image")
    twin.set_progress_bar_config(disable=True)
    return twin, "video" if videos else "image"
