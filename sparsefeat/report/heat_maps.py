"""Pictures of heat maps: all words side by side, one word over steps or layers, and moving over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsefeat.arguments import number, whole
from sparsefeat.attention import HeatMap, HeatMapRecording
from sparsefeat.report.figures import contact_sheet, enlarge, overlay

By = Literal["step", "layer"]

# As many columns as can still be told apart on a screen.
MOST_COLUMNS = 8


def words_sheet(picture: Image.Image, maps: Mapping[str, Any]) -> Image.Image:
    """The picture, and beside it the map [h, w] of each word over it, a few in a row."""
    tiles = [("", enlarge(picture)), *((word, overlay(picture, values)) for word, values in maps.items())]
    columns = min(len(tiles), 5)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return contact_sheet(
        [[tile for _, tile in row] for row in rows], [""] * len(rows), [[word for word, _ in row] for row in rows]
    )


def sheet_by(
    picture: Image.Image, recording: HeatMapRecording, words: Sequence[str], by: By, image: int = 0
) -> Image.Image:
    """A row for each word, a column for each step (or layer), at most eight of them evenly chosen.

    Raises ValueError where the recording did not keep them apart, `HeatMaps(keep=["steps"])`.
    """
    every: tuple[Any, ...] = _kept(recording, by)
    columns = min(MOST_COLUMNS, len(every))
    chosen = [every[round(i * (len(every) - 1) / max(columns - 1, 1))] for i in range(columns)]
    rows = [[overlay(picture, _one(recording, word, by, part, image)) for part in chosen] for word in words]
    captions = [f"step {part}" if by == "step" else _short(part) for part in chosen]
    return contact_sheet(rows, list(words), [captions for _ in words])


def over_steps(
    picture: Image.Image, recording: HeatMapRecording, word: str, image: int = 0, summed: bool = True
) -> list[Image.Image]:
    """A frame for each step: the word's map up to it (`summed`), or of it alone. All are scaled alike, by the largest
    value of all of them, so that what grows is seen to grow.
    """
    steps = _kept(recording, "step")
    maps = torch.stack([_one(recording, word, "step", step, image) for step in steps])
    if summed:
        maps = maps.cumsum(0) / torch.arange(1, len(maps) + 1, device=maps.device)[:, None, None]
    low, high = maps.min(), maps.max()
    scaled = ((maps - low) / (high - low)).cpu() if high > low else torch.zeros_like(maps).cpu()
    return [overlay(picture, one, limits=(0.0, 1.0)) for one in scaled]


def over_frames(video: Sequence[Image.Image] | np.ndarray, heat: HeatMap) -> list[Image.Image]:
    """The frames of a video, each with the map of the latent frame that it was decoded from laid over it, all scaled alike.

    `video`: pictures, or [frames, height, width, 3] from 0 to 1, as a pipeline gives them: `.frames[0]`. Where the first
    frame has a latent frame of its own and the others share theirs evenly (CogVideoX, Wan, HunyuanVideo: 1 + 4 k frames),
    that is what is meant; else all share evenly.
    """
    if heat.values.ndim != 3:
        raise ValueError(
            f"heat is the map of an image, {list(heat.values.shape)}; lay it over one, heat.overlay(image)."
        )
    frames = [
        one if isinstance(one, Image.Image) else Image.fromarray((one * 255).round().astype(np.uint8)) for one in video
    ]
    latents, n = len(heat.values), len(frames)
    if n < latents:
        raise ValueError(f"video has {n} frames and heat {latents}; give all the frames that were made with it.")
    causal = latents > 1 and (n - 1) % (latents - 1) == 0
    of = [-(-i * (latents - 1) // (n - 1)) if causal else i * latents // n for i in range(n)]
    scaled = heat.scaled().cpu()
    return [overlay(frame, scaled[at], limits=(0.0, 1.0)) for frame, at in zip(frames, of, strict=True)]


def save_animation(frames: Sequence[Image.Image], path: Path | str, seconds: float = 0.2) -> Path:
    """Write frames as a GIF that repeats, or as an MP4, by the path's ending; `seconds` a frame.

    An MP4 is written by diffusers' `export_to_video`, which needs imageio and ffmpeg: pip install imageio imageio-ffmpeg.

    Raises ValueError for another ending or no frame, ImportError where an MP4 cannot be written.
    """
    path, seconds = Path(path), number("seconds", seconds, 0, above=True)
    if not frames:
        raise ValueError("frames is empty; give one picture at least.")
    if path.suffix.lower() == ".gif":
        first, *others = [frame.convert("RGB") for frame in frames]
        first.save(path, save_all=True, append_images=others, duration=round(1000 * seconds), loop=0, optimize=True)
    elif path.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video  # takes seconds, and only a film needs it

        even = [frame.convert("RGB").crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in frames]
        try:
            # Blocks of 16, the default, would stretch other sizes.
            export_to_video(even, str(path), fps=1 / seconds, macro_block_size=2)
        except (ImportError, AttributeError, RuntimeError) as missing:  # imageio, its ffmpeg plugin, or ffmpeg itself
            raise ImportError(
                f"{path.name} cannot be written without imageio and ffmpeg: pip install imageio imageio-ffmpeg, or take a "
                ".gif"
            ) from missing
    else:
        raise ValueError(f"path={str(path)!r} ends in {path.suffix!r}; an animation is a .gif or an .mp4.")
    return path


def _kept(recording: HeatMapRecording, by: By) -> tuple[Any, ...]:
    if by not in ("step", "layer"):
        raise ValueError(f"by={by!r} is not known; use 'step' or 'layer'.")
    kept = recording.steps if by == "step" else recording.layers
    if not kept:
        raise ValueError(f"{by}s were not kept apart in this recording; record with HeatMaps(keep=['{by}s']).")
    return kept


def _one(recording: HeatMapRecording, word: str, by: By, part: Any, image: int) -> Tensor:
    whole("image", image, 0)
    values = recording.word(
        word, image, step=part if by == "step" else None, layer=part if by == "layer" else None
    ).values
    if values.ndim != 2:
        raise ValueError(f"the map of {word!r} is of {len(values)} frames; sheets are of images.")
    return values


def _short(path: str) -> str:
    """`unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2` -> `up 1 attentions 0 0`."""
    parts = path.split(".")[1:-1]
    said = [part.removesuffix("_blocks").replace("transformer", "") for part in parts]
    return " ".join(part for part in said if part)
