"""The page: its parts, what each click does by way of the `Explorer`, and how it is served. The one file that needs Gradio."""

from __future__ import annotations

import functools
import html
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from PIL import Image
from starlette.requests import ClientDisconnect

from sparsefeat.arguments import whole
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
    "uce": "UCE: in the weights that read the text",
    "cad": "CAD: in the weights that draw it",
    "sld": "SLD: by guidance away from it",
    "exchange": "exchange: another in its place, by latents of the text encoder's SAE",
    "saeuron": "SAeUron: by latents of the text encoder's SAE",
}
FIT = """() => {
  const fit = () => window.editor?.tools?.get("zoom")?.set_zoom("fit");
  if (!window.fitted) window.fitted = new ResizeObserver(() => setTimeout(fit, 100));
  window.fitted.observe(document.querySelector("#before"));
  setTimeout(fit, 100);
}"""
"""Gradio's canvas shows a new image at the zoom of the size that it had before the last change of its size."""
CSS = (Path(__file__).parent / "page.css").read_text()

P = ParamSpec("P")


@dataclass
class Tab:
    """What one browser tab has: the run it looks at, its edits, the latents in the gallery, the one that is chosen.

    What is clicked writes into it when it is done. A feature may be chosen while another is drawn, so nothing writes more
    than it changed.
    """

    session: str | None = None
    """Gradio's name of it."""
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


def one_run(
    handler: Callable[Concatenate[Page, Tab, P], dict[Any, Any]],
) -> Callable[Concatenate[Page, Tab, P], dict[Any, Any]]:
    """`one_sentence`, of what runs the pipeline for a tab: what was warned of on the way stands below what came of it."""
    told = one_sentence(handler)

    @functools.wraps(handler)
    def handle(page: Page, tab: Tab, *given: P.args, **more: P.kwargs) -> dict[Any, Any]:
        page.at_work = tab
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                shown = told(page, tab, *given, **more)
        finally:
            page.at_work = None
        said = dict.fromkeys(str(one.message) for one in warned if issubclass(one.category, UserWarning))
        return {**shown, page.status: shown[page.status] + "".join(status(one, "warning") for one in said)}

    return handle


def status(sentence: str, kind: str = "done") -> str:
    return f'<p class="{kind}" role="status">{html.escape(sentence)}</p>'


class Page:
    """The page of one explorer. `asked` is what stands in its fields at first."""

    def __init__(self, explorer: Explorer, asked: Asked):
        self.explorer, self.asked = explorer, asked
        self.at_work: Tab | None = None
        """Whose run is going on."""
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
            self.seed = gr.Number(self.asked.seed, label="Seed", min_width=90)
            self.steps = gr.Number(self.asked.steps, label="Steps", min_width=90)
            self.guidance = gr.Number(self.asked.guidance, label="Guidance (empty: the pipeline's own)", min_width=90)
        self.status = gr.HTML(status("Write a prompt and press Draw."), elem_id="status")

    def _pictures(self) -> None:
        gr.HTML(
            "<p>Paint on the first image where an edit acts. The second is of the same prompt and noise, with the edits.</p>",
            elem_id="hint",
        )
        with gr.Row(elem_id="pictures"):
            self.before = gr.ImageEditor(
                label="Before",
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
                label="After",
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
                self.first = gr.Number(1, label="First step", min_width=90, elem_id="first")
                self.last = gr.Number(self.asked.steps, label="Last step", min_width=90, elem_id="last")
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
            self.status, self.before, self.after, self.features, self.steering, self.about, self.how, self.strength,
            self.first, self.last, self.examples, self.words, self.word, self.list, self.code,
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
            drawn = event(self.on_draw, [self.tab, *asked, self.folder, self.loaded], **heavy)
            drawn.then(None, js=FIT, api_visibility="private")
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
        self.stop.click(self.on_stop, [self.tab], queue=False, api_visibility="private")
        self.blocks.load(self.on_open, [self.tab], queue=False, api_visibility="private")
        self.blocks.unload(self.on_close)

    # What clicks do -----------------------------------------------------------------------------------------------------

    @one_run
    def on_draw(
        self, tab: Tab, prompt: str, seed: Any, steps: Any, guidance: Any, folder: str, loaded: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        drawn = self.explorer.draw(_asked(prompt, seed, steps, guidance), _told(progress))
        after = drawn.image if not tab.edits else self.explorer.edited(drawn.asked, tab.edits, _told(progress))
        try:
            words, said = [tuple(one) for one in self.explorer.word_maps(drawn)], "Choose a feature below."
        except ValueError as error:
            words, said = [], str(error)
        shown = tuple(self.explorer.features(drawn, tab.sae))
        tab.drawn, tab.shown, tab.chosen = drawn, shown, None
        return {
            **self._shown(tab, after, folder, loaded, said),
            self.before: {"background": enlarge(drawn.image, SIDE), "layers": [], "composite": None},
            self.features: captions(shown),
            self.steering: gr.update(visible=False),
            self.words: words,
            self.last: drawn.asked.steps,
        }

    @one_run
    def on_steer(
        self, tab: Tab, folder: str, loaded: bool, editor: Any, how: str, where: str, strength: float, first: Any, last: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        drawn = tab.run()
        if tab.chosen is None:
            raise ValueError("no feature is chosen; click one in the gallery")
        if strength is None:
            raise ValueError("how much is empty; write a number, or move the slider")
        first, last = _whole("the first step", first), _whole("the last step", last)
        mask = None
        if where == PAINTED:
            mask = painted((editor or {}).get("layers") or [], drawn.image.size)
            if mask is None:
                raise ValueError("nothing is painted; paint on the left image, or choose everywhere")
        steps = None if (first, last) == (1, drawn.asked.steps) else (first, last)
        amount = None if how == REMOVE else float(strength) * tab.chosen.usual
        edit = LatentEdit(tab.sae, tab.chosen.latent, amount, steps, mask)
        return self._edited(tab, with_edit(tab.edits, edit), folder, loaded, progress)

    @one_run
    def on_erase(
        self, tab: Tab, folder: str, loaded: bool, word: str, method: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        edits = with_edit(tab.edits, WordEdit(word.strip(), method))
        return self._edited(tab, edits, folder, loaded, progress)

    @one_run
    def on_list(
        self, tab: Tab, folder: str, loaded: bool, kept: list[str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        edits = tuple(edit for edit in tab.edits if self._label(edit) in kept)
        return self._edited(tab, edits, folder, loaded, progress)

    @one_run
    def on_more(
        self, tab: Tab, prompt: str, seed: Any, steps: Any, guidance: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:  # fmt: skip
        asked = _asked(prompt or "-", seed, steps, guidance)
        n = self.explorer.survey(MORE_IMAGES, asked, _told(progress))
        said = status(f"{n} images were looked at. Names need some tens of them.")
        if tab.drawn is None:
            return {self.status: said}
        self._look(tab)
        return {**self._chosen(tab), self.status: said, self.features: captions(tab.shown)}

    @one_run
    def on_save(self, tab: Tab, folder: str, loaded: bool) -> dict[Any, Any]:
        place = self.explorer.save(folder, tab.run().asked, tab.edits)
        return {self.status: status(f"Saved in {place}: sf.load_instrument opens it, and edit.py holds the lines.")}

    @one_sentence
    def on_sae(self, tab: Tab, sae: int) -> dict[Any, Any]:
        tab.sae, tab.chosen = sae, None
        if tab.drawn is not None:
            self._look(tab)
        return {self.features: captions(tab.shown), self.steering: gr.update(visible=False)}

    @one_sentence
    def on_find(self, tab: Tab, said: str) -> dict[Any, Any]:
        tab.chosen = self.explorer.feature(tab.run(), tab.sae, said)
        return self._chosen(tab)

    @one_sentence
    def on_choose(self, tab: Tab, event: gr.SelectData) -> dict[Any, Any]:
        tab.chosen = tab.shown[event.index]
        return self._chosen(tab)

    @one_sentence
    def on_word(self, tab: Tab, event: gr.SelectData) -> dict[Any, Any]:
        return {self.word: event.value["caption"]}

    @one_sentence
    def on_lines(self, tab: Tab, folder: str, loaded: bool) -> dict[Any, Any]:
        return {} if tab.drawn is None else {self.code: self._lines(tab, folder, loaded)}

    def on_stop(self, tab: Tab) -> None:
        """Ends the run of this tab; another's goes on."""
        if self.at_work is tab:
            self.explorer.stop()

    def on_open(self, tab: Tab, request: gr.Request) -> None:
        tab.session = request.session_hash

    def on_close(self, request: gr.Request) -> None:
        """The tab was closed: nobody waits for its run."""
        if self.at_work is not None and self.at_work.session == request.session_hash:
            self.explorer.stop()

    # What is shown ------------------------------------------------------------------------------------------------------

    def _look(self, tab: Tab) -> None:
        """Anew at the latents of the tab's image, and at the one that is chosen."""
        tab.shown = tuple(self.explorer.features(tab.run(), tab.sae))
        tab.chosen = tab.chosen and self.explorer.feature(tab.run(), tab.sae, tab.chosen.latent)

    def _edited(
        self, tab: Tab, edits: tuple[Edit, ...], folder: str, loaded: bool, progress: gr.Progress
    ) -> dict[Any, Any]:
        drawn = tab.run()
        image = drawn.image if not edits else self.explorer.edited(drawn.asked, edits, _told(progress))
        said = "Done." if edits else "No edit is at work."
        if edits and image.tobytes() == drawn.image.tobytes():
            said = "The edits changed nothing of this image."
        tab.edits = edits
        return self._shown(tab, image, folder, loaded, said)

    def _shown(self, tab: Tab, after: Image.Image, folder: str, loaded: bool, said: str) -> dict[Any, Any]:
        labels = [self._label(edit) for edit in tab.edits]
        return {
            self.status: status(said),
            self.after: enlarge(after, SIDE),
            self.list: gr.update(choices=labels, value=labels),
            self.code: self._lines(tab, folder, loaded),
        }

    def _chosen(self, tab: Tab) -> dict[Any, Any]:
        """The panel of the chosen latent, with the edit that it has."""
        if tab.chosen is None:
            return {}
        feature = tab.chosen
        own = LatentEdit(tab.sae, feature.latent, 0.0)
        edit = next((edit for edit in tab.edits if edit.key == own.key), own)
        assert isinstance(edit, LatentEdit)
        times = 0.0 if edit.amount is None else edit.amount / feature.usual
        first, last = edit.steps or (1, tab.run().asked.steps)
        return {
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
        logging.getLogger("uvicorn.error").addFilter(_not_of_a_closed_tab)
        return address


def _not_of_a_closed_tab(record: logging.LogRecord) -> bool:
    """A tab that is closed while it sends what was painted is no error."""
    return record.exc_info is None or record.exc_info[0] is not ClientDisconnect


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
    return Asked(prompt, _whole("the seed", seed, 0), _whole("steps", steps), guidance)


def _whole(name: str, given: Any, low: int = 1) -> int:
    """A number of a field; beyond 2^53 a browser has no odd ones, and would send another."""
    if given is None:
        raise ValueError(f"{name} is empty; write a whole number")
    return whole(name, int(given) if isinstance(given, float) and given.is_integer() else given, low, 2**53 - 1)


def _told(progress: gr.Progress) -> Callable[[str, int, int], None]:
    return lambda what, step, n_steps: progress((step, n_steps), desc=what, unit="steps")
