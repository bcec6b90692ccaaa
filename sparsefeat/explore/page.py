"""The page: its parts, what each click does by way of the `Explorer`, and how it is served. The one file that needs Gradio."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from PIL import Image

from sparsefeat.explore.edits import Edit, LatentEdit, WordEdit, painted, with_edit
from sparsefeat.explore.explorer import Asked, Explorer, Feature, Stopped, Unedited
from sparsefeat.report import enlarge

SIDE = 512
"""Pixels of the pictures one paints on."""
STRONGEST = 30.0
"""Of the slider, in multiples of a latent's usual activation."""
MORE_IMAGES = 16
EVERYWHERE, PAINTED = "everywhere", "where I painted"
ADD, REMOVE = "add it", "take it out"
METHODS = {
    "uce": "in the weights that read the text (UCE)",
    "cad": "in the weights that draw it (CAD)",
    "sld": "by guidance away from it (SLD)",
    "exchange": "another concept in its place, by latents of the text encoder's SAE",
    "saeuron": "by latents of the text encoder's SAE (SAeUron)",
}
CSS = (Path(__file__).parent / "page.css").read_text()

P = ParamSpec("P")


@dataclass(frozen=True)
class Tab:
    """What one browser tab has: the run it looks at, its edits, the latents in the gallery, the one that is chosen."""

    drawn: Unedited | None = None
    edits: tuple[Edit, ...] = ()
    sae: int = 0
    shown: tuple[Feature, ...] = ()
    chosen: Feature | None = None

    def run(self) -> Unedited:
        if self.drawn is None:
            raise ValueError("there is no image yet; write a prompt and press Draw")
        return self.drawn


def one_sentence(
    handler: Callable[Concatenate[Page, P], dict[Any, Any]],
) -> Callable[Concatenate[Page, P], dict[Any, Any]]:
    """What cannot be done is said in the status line, and everything else on the page stays as it is."""

    @functools.wraps(handler)
    def handle(page: Page, *given: P.args, **more: P.kwargs) -> dict[Any, Any]:
        try:
            return handler(page, *given, **more)
        except (Stopped, ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
            said = str(error).partition("\n")[0] or type(error).__name__
            return {page.status: status(said, "stopped" if isinstance(error, Stopped) else "error")}

    return handle


def status(sentence: str, kind: str = "done") -> str:
    return f'<p class="{kind}" role="status">{html.escape(sentence)}</p>'


class Page:
    """The page of one explorer. `asked` is what stands in its fields at first."""

    def __init__(self, explorer: Explorer, asked: Asked):
        self.explorer, self.asked = explorer, asked
        theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        self.look = {"theme": theme, "css": CSS}
        with gr.Blocks(title="sparsefeat explore", analytics_enabled=False) as self.blocks:
            self.tab = gr.State(Tab())
            gr.HTML(f"<h1>sparsefeat explore</h1><p>{html.escape(type(explorer.pipe).__name__)}</p>")
            self._question()
            self._pictures()
            with gr.Tab("Features"):
                self._features()
            with gr.Tab("Words"):
                self._words()
            with gr.Tab("Save"):
                self._saving()
            self._wire()

    # The parts ----------------------------------------------------------------------------------------------------------

    def _question(self) -> None:
        with gr.Row(elem_id="question"):
            self.prompt = gr.Textbox(self.asked.prompt, label="Prompt", scale=6, min_width=300, elem_id="prompt")
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=90)
        with gr.Accordion("Seed, steps, guidance", open=False), gr.Row():
            self.seed = gr.Number(self.asked.seed, label="Seed", precision=0, min_width=90)
            self.steps = gr.Number(self.asked.steps, label="Steps", precision=0, min_width=90)
            self.guidance = gr.Number(self.asked.guidance, label="Guidance (empty: the pipeline's own)", min_width=90)
        self.status = gr.HTML(status("Write a prompt and press Draw."), elem_id="status")

    def _pictures(self) -> None:
        with gr.Row(elem_id="pictures"):
            self.before = gr.ImageEditor(
                label="Before. Paint where an edit acts",
                type="pil",
                image_mode="RGBA",
                sources=(),
                transforms=(),
                brush=gr.Brush(default_size=48, colors=["#ff3ea5"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=48),
                layers=gr.LayerOptions(allow_additional_layers=False),
                buttons=[],
                canvas_size=(SIDE, SIDE),
                height=SIDE + 60,
                elem_id="before",
                min_width=300,
            )
            self.after = gr.Image(
                label="After. The same prompt and noise, with the edits",
                interactive=False,
                format="png",
                buttons=["download"],
                height=SIDE + 60,
                elem_id="after",
                min_width=300,
            )

    def _features(self) -> None:
        with gr.Row():
            self.at = gr.Dropdown(
                [(name, i) for i, name in enumerate(self.explorer.hookpoints)],
                value=0,
                label="SAE at",
                visible=len(self.explorer.saes) > 1,
                elem_id="at",
            )
            self.find = gr.Textbox(label="Find a latent by number or name (Enter)", elem_id="find")
            self.more = gr.Button(
                f"Look at {MORE_IMAGES} more images", visible=bool(self.explorer.prompts), elem_id="more"
            )
        self.features = gallery("The latents that are most active. Choose one", "features", 6)
        with gr.Column(visible=False, elem_id="steering") as self.steering:
            self.about = gr.HTML(elem_id="about")
            with gr.Row():
                self.how = gr.Radio([ADD, REMOVE], value=ADD, label="What", elem_id="how")
                self.where = gr.Radio([EVERYWHERE, PAINTED], value=EVERYWHERE, label="Where", elem_id="where")
            self.strength = gr.Slider(
                -STRONGEST, STRONGEST, 0, step=0.5, label="How much, times its usual activation", elem_id="strength"
            )
            with gr.Row():
                self.first = gr.Number(1, label="First step", precision=0, min_width=90, elem_id="first")
                self.last = gr.Number(self.asked.steps, label="Last step", precision=0, min_width=90, elem_id="last")
            self.apply = gr.Button("Steer", variant="primary", elem_id="apply")
            self.examples = gallery("Images that excite it most, of those seen so far", "examples", 6)

    def _words(self) -> None:
        self.words = gallery("Where the image attended to each word. Choose one to erase it", "words", 6)
        with gr.Row():
            self.word = gr.Textbox(label="Erase a concept by its word", elem_id="word")
            methods = [(METHODS[method], method) for method in self.explorer.methods]
            default = "exchange" if "exchange" in self.explorer.methods else "uce"
            self.method = gr.Dropdown(methods, value=default, label="How", elem_id="method")
            self.erase = gr.Button("Erase", variant="primary", elem_id="erase", min_width=90)

    def _saving(self) -> None:
        self.list = gr.CheckboxGroup([], label="Edits at work. Clear a box to take one out", elem_id="edits")
        with gr.Row():
            self.folder = gr.Textbox("edit", label="Save in a new folder", elem_id="folder")
            self.save = gr.Button("Save", variant="primary", elem_id="save", min_width=90)
        self.loaded = gr.Checkbox(False, label="The lines load the saved folder whole", elem_id="loaded")
        self.code = gr.Code(
            language="python", label="The same in Python. Save first: masks and erasures are read from there", lines=8
        )

    def _wire(self) -> None:
        asked = [self.prompt, self.seed, self.steps, self.guidance]
        steered = [self.before, self.how, self.where, self.strength, self.first, self.last]
        every = [
            self.tab, self.status, self.before, self.after, self.features, self.steering, self.about, self.how,
            self.strength, self.first, self.last, self.examples, self.words, self.word, self.list, self.code,
        ]  # fmt: skip
        # What runs the pipeline waits for one another; all of it goes to the same outputs.
        heavy: dict[str, Any] = {
            "outputs": every,
            "show_progress_on": self.after,  # what is painted stays in sight
            "concurrency_id": "pipeline",
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        light: dict[str, Any] = {"outputs": every, "show_progress": "hidden", "api_visibility": "private"}
        lines = [self.tab, self.folder, self.loaded]
        for event in (self.draw.click, self.prompt.submit):
            event(self.on_draw, [self.tab, *asked, self.folder, self.loaded], **heavy)
        for event in (self.apply.click, self.strength.release):
            event(self.on_steer, [*lines, *steered], **heavy)
        for event in (self.erase.click, self.word.submit):
            event(self.on_erase, [*lines, self.word, self.method], **heavy)
        self.list.input(self.on_list, [*lines, self.list], **heavy)
        self.more.click(self.on_more, [self.tab, *asked], **heavy)
        for event in (self.save.click, self.folder.submit):
            event(self.on_save, lines, **heavy)
        self.at.input(self.on_sae, [self.tab, self.at], **light)
        self.find.submit(self.on_find, [self.tab, self.find], **light)
        self.features.select(self.on_choose, [self.tab], **light)
        self.words.select(self.on_word, [self.tab], **light)
        for event in (self.folder.change, self.loaded.change):
            event(self.on_lines, lines, **light)
        self.stop.click(self.explorer.stop, queue=False, api_visibility="private")

    # What clicks do -----------------------------------------------------------------------------------------------------

    @one_sentence
    def on_draw(
        self, tab: Tab, prompt: str, seed: Any, steps: Any, guidance: Any, folder: str, loaded: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        drawn = self.explorer.draw(_asked(prompt, seed, steps, guidance), _told(progress, "drawing"))
        after = (
            drawn.image if not tab.edits else self.explorer.edited(drawn.asked, tab.edits, _told(progress, "editing"))
        )
        tab = self._with_features(replace(tab, drawn=drawn, chosen=None))
        try:
            words, said = [tuple(one) for one in self.explorer.word_maps(drawn)], "Choose a feature below."
        except ValueError as error:
            words, said = [], str(error)
        last = drawn.asked.steps
        return {
            **self._shown(tab, after, folder, loaded, said),
            self.before: {"background": enlarge(drawn.image, SIDE), "layers": [], "composite": None},
            self.features: captions(tab.shown),
            self.steering: gr.update(visible=False),
            self.words: words,
            self.last: last,
        }

    @one_sentence
    def on_steer(
        self, tab: Tab, folder: str, loaded: bool, editor: Any, how: str, where: str, strength: float, first: Any, last: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        drawn = tab.run()
        if tab.chosen is None:
            raise ValueError("no feature is chosen; click one in the gallery")
        if first is None or last is None:
            raise ValueError("the first or the last step is empty; write both")
        mask = None
        if where == PAINTED:
            mask = painted((editor or {}).get("layers") or [], drawn.image.size)
            if mask is None:
                raise ValueError("nothing is painted; paint on the left image, or choose everywhere")
        steps = None if (int(first), int(last)) == (1, drawn.asked.steps) else (int(first), int(last))
        amount = None if how == REMOVE else float(strength) * tab.chosen.usual
        edit = LatentEdit(tab.sae, tab.chosen.latent, amount, steps, mask)
        return self._edited(tab, with_edit(tab.edits, edit), folder, loaded, progress)

    @one_sentence
    def on_erase(
        self, tab: Tab, folder: str, loaded: bool, word: str, method: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        edits = with_edit(tab.edits, WordEdit(word.strip(), method))
        return self._edited(tab, edits, folder, loaded, progress)

    @one_sentence
    def on_list(
        self, tab: Tab, folder: str, loaded: bool, kept: list[str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        edits = tuple(edit for edit in tab.edits if self._label(edit) in kept)
        return self._edited(tab, edits, folder, loaded, progress)

    @one_sentence
    def on_more(
        self, tab: Tab, prompt: str, seed: Any, steps: Any, guidance: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        asked = _asked(prompt or "-", seed, steps, guidance)
        n = self.explorer.survey(MORE_IMAGES, asked, _told(progress, "looking at other images"))
        said = status(f"{n} images were looked at. Names need some tens of them.")
        if tab.drawn is None:
            return {self.status: said}
        tab = self._with_features(tab)
        return {**self._chosen(tab), self.status: said, self.features: captions(tab.shown)}

    @one_sentence
    def on_save(self, tab: Tab, folder: str, loaded: bool) -> dict[Any, Any]:
        place = self.explorer.save(folder, tab.run().asked, tab.edits)
        return {self.status: status(f"Saved in {place}: sf.load_instrument opens it, and edit.py holds the lines.")}

    @one_sentence
    def on_sae(self, tab: Tab, sae: int) -> dict[Any, Any]:
        tab = replace(tab, sae=sae, chosen=None)
        if tab.drawn is not None:
            tab = self._with_features(tab)
        return {self.tab: tab, self.features: captions(tab.shown), self.steering: gr.update(visible=False)}

    @one_sentence
    def on_find(self, tab: Tab, said: str) -> dict[Any, Any]:
        return self._chosen(replace(tab, chosen=self.explorer.feature(tab.run(), tab.sae, said)))

    @one_sentence
    def on_choose(self, tab: Tab, event: gr.SelectData) -> dict[Any, Any]:
        return self._chosen(replace(tab, chosen=tab.shown[event.index]))

    @one_sentence
    def on_word(self, tab: Tab, event: gr.SelectData) -> dict[Any, Any]:
        return {self.word: event.value["caption"]}

    @one_sentence
    def on_lines(self, tab: Tab, folder: str, loaded: bool) -> dict[Any, Any]:
        return {} if tab.drawn is None else {self.code: self._lines(tab, folder, loaded)}

    # What is shown ------------------------------------------------------------------------------------------------------

    def _with_features(self, tab: Tab) -> Tab:
        shown = tuple(self.explorer.features(tab.run(), tab.sae))
        chosen = tab.chosen and self.explorer.feature(tab.run(), tab.sae, tab.chosen.latent)
        return replace(tab, shown=shown, chosen=chosen)

    def _edited(
        self, tab: Tab, edits: tuple[Edit, ...], folder: str, loaded: bool, progress: gr.Progress
    ) -> dict[Any, Any]:
        drawn = tab.run()
        image = drawn.image if not edits else self.explorer.edited(drawn.asked, edits, _told(progress, "editing"))
        said = "Done." if edits else "No edit is at work."
        if edits and image.tobytes() == drawn.image.tobytes():
            said = "The edits changed nothing of this image."
        return self._shown(replace(tab, edits=edits), image, folder, loaded, said)

    def _shown(self, tab: Tab, after: Image.Image, folder: str, loaded: bool, said: str) -> dict[Any, Any]:
        labels = [self._label(edit) for edit in tab.edits]
        return {
            self.tab: tab,
            self.status: status(said),
            self.after: enlarge(after, SIDE),
            self.list: gr.update(choices=labels, value=labels),
            self.code: self._lines(tab, folder, loaded),
        }

    def _chosen(self, tab: Tab) -> dict[Any, Any]:
        """The panel of the chosen latent, with the edit that it has."""
        if tab.chosen is None:
            return {self.tab: tab}
        feature = tab.chosen
        own = LatentEdit(tab.sae, feature.latent, 0.0)
        edit = next((edit for edit in tab.edits if edit.key == own.key), own)
        assert isinstance(edit, LatentEdit)
        times = 0.0 if edit.amount is None else edit.amount / feature.usual
        first, last = edit.steps or (1, tab.run().asked.steps)
        return {
            self.tab: tab,
            self.steering: gr.update(visible=True),
            self.about: about(feature),
            self.how: REMOVE if edit.amount is None else ADD,
            self.strength: round(max(-STRONGEST, min(STRONGEST, times)), 1),
            self.first: first,
            self.last: last,
            self.examples: [tuple(one) for one in self.explorer.examples_of(tab.sae, feature.latent)],
        }

    def _label(self, edit: Edit) -> str:
        """An edit as the list says it; no two are alike."""
        if isinstance(edit, WordEdit):
            return f"erase “{edit.word}” ({edit.method})"
        what = "taken out" if edit.amount is None else f"{edit.amount:+.3g}"
        when = "" if edit.steps is None else f", steps {edit.steps[0]} to {edit.steps[1]}"
        return f"latent {edit.latent} of {self.explorer.hookpoints[edit.sae]}: {what}{when}{', painted' * (edit.mask is not None)}"

    def _lines(self, tab: Tab, folder: str, loaded: bool) -> str:
        return self.explorer.lines(
            tab.run().asked, tab.edits, str(Path(folder or "edit").expanduser().absolute()), loaded=loaded
        )

    def serve(self, port: int | None = None) -> str:
        """Serve it on this machine alone, in threads of its own; the address."""
        self.blocks.queue()
        _, address, _ = self.blocks.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, pwa=False, **self.look,
        )  # fmt: skip
        return address


def gallery(label: str, name: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        label=label, columns=columns, height="auto", allow_preview=False, object_fit="contain", interactive=False,
        buttons=[], elem_id=name, elem_classes="pictures", format="webp",
    )  # fmt: skip


def captions(features: tuple[Feature, ...]) -> list[tuple[Image.Image, str]]:
    return [(f.picture or text_card(), f"{f.latent} · {f.name}" if f.name else str(f.latent)) for f in features]


@functools.cache
def text_card() -> Image.Image:
    """In the place of a map, for a latent of the text."""
    return Image.new("RGB", (256, 256), "#8a8f98")


def about(feature: Feature) -> str:
    name = f" · {html.escape(feature.name)}" if feature.name else ""
    return (
        f"<h2>Latent {feature.latent}{name}</h2><p>Mean activation {feature.score:.3g}, largest {feature.maximum:.3g}, "
        f"active at {feature.frequency:.1%} of positions. Usual activation {feature.usual:.3g}: {feature.usual_of}.</p>"
    )


def _asked(prompt: str, seed: Any, steps: Any, guidance: Any) -> Asked:
    if seed is None or steps is None:
        raise ValueError("seed or steps is empty; write a whole number")
    return Asked(prompt, int(seed), int(steps), None if guidance is None else float(guidance))


def _told(progress: gr.Progress, what: str) -> Callable[[int, int], None]:
    return lambda step, n: progress((step, n), desc=what, unit="steps")
