"""The page: its tabs, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from apps.web.acting import QUIET
from apps.web.batch_tab import BatchTab
from apps.web.batches import Batches
from apps.web.checks import Checks
from apps.web.compare_tab import CompareTab
from apps.web.create_tab import CreateTab
from apps.web.device import Device
from apps.web.evaluate_tab import EvaluateTab
from apps.web.evaluations import Evaluations
from apps.web.recipes_tab import RecipesTab
from apps.web.search_tab import SearchTab
from apps.web.searches import Searches
from apps.web.site import Site
from apps.web.trials import Trials

HERE = Path(__file__).parent
CSS, SCRIPT = HERE / "style.css", HERE / "script.js"
FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


@dataclass
class App:
    """Everything behind the page."""

    site: Site
    device: Device = field(default_factory=Device)
    checks: Checks = field(default_factory=Checks)
    trials: Trials = field(init=False)
    batches: Batches = field(init=False)
    evaluations: Evaluations = field(init=False)
    searches: Searches = field(init=False)

    def __post_init__(self) -> None:
        self.trials = Trials(self.site, self.device)
        self.batches = Batches(self.site, self.device)
        self.evaluations = Evaluations(self.site, self.device)
        self.searches = Searches(self.site, self.device)

    def close(self) -> None:
        """Pause what runs, and end the worker."""
        self.batches.close()
        self.evaluations.close()
        self.device.close()


def build(app: App) -> gr.Blocks:
    """The page as Gradio blocks."""
    tabs = {
        "Create": CreateTab(app),
        "Compare": CompareTab(app),
        "Search": SearchTab(app),
        "Batch": BatchTab(app),
        "Evaluate": EvaluateTab(app),
        "Recipes": RecipesTab(app),
    }
    with gr.Blocks(
        title="accel", analytics_enabled=False, delete_cache=(3600, 24 * 3600)
    ) as blocks:
        gr.HTML(
            '<header class="ac-head"><h1>accel</h1>'
            "<p>Diffusion, faster, with what it costs.</p></header>"
        )
        with gr.Tabs() as bar:
            for name, tab in tabs.items():
                with gr.Tab(name, id=name) as one:
                    tab.build()
                tab.tab = one
        for name, tab in tabs.items():
            tab.wire(blocks)
            keep = f"() => {{ sessionStorage.setItem('accel-tab', {name!r}); }}"
            tab.tab.select(None, js=keep, **QUIET)
        # a page that is loaded again shows the tab that it showed
        blocks.load(
            lambda name: gr.Tabs(selected=name) if name in tabs else gr.skip(),
            gr.Textbox(visible=False), bar, js="() => window.tabBefore", **QUIET,
        )  # fmt: skip
    return blocks


def theme() -> gr.themes.Base:
    """Fonts that are there already, and one colour."""
    return gr.themes.Base(
        primary_hue=gr.themes.Color(
            "#eef4fa", "#dce8f3", "#b9d0e6", "#8fb2d4", "#5c8dbd", "#2f6aa3", "#1f4e79", "#1a4266",
            "#153551", "#10283d", "#0b1b2a",
        ),
        neutral_hue="slate",
        radius_size="md",
        font=FONT,
        font_mono=MONO,
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )  # fmt: skip
