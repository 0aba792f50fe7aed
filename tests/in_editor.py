"""What a person does and sees in the graph editor, beyond opening graphs and running them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Locator, sync_playwright

from dev.host import browser as chromium
from dev.host import editor
from dev.host.editor import ARGUMENTS

NODE = """(path) => {
  const ids = String(path).split(":");
  let graph = app.graph;
  for (const id of ids.slice(0, -1)) graph = graph.getNodeById(id).subgraph;
  const node = graph.getNodeById(ids.at(-1));
  return %s;
}"""


# What is the same whichever way nodes are drawn.
either_way = pytest.mark.parametrize("page", ["classic"], indirect=True)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium for the tests; without one they are skipped, or fail where there has to be one."""
    program = chromium.find()
    if program is None:
        missing = "there is no Chromium; run python -m dev.host.browser"
        pytest.fail(missing) if chromium.required() else pytest.skip(missing)
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield opened
        opened.close()


class Editor(editor.Editor):
    """One page with the editor, with hands and eyes."""

    def node(self, path: int | str, expression: str) -> Any:
        """A JavaScript expression of `node`, found as the host names nodes: 12:3."""
        return self.page.evaluate(NODE % expression, str(path))

    def of_type(self, kind: str) -> list[int]:
        """The ids of the nodes of a type."""
        return [n["id"] for n in self.serialized()["nodes"] if n["type"] == kind]

    def set_widget(self, path: int | str, name: str, value: object) -> None:
        """Changes a widget's value as the person does, and has the editor notice."""
        self.page.evaluate(
            """([path, name, value]) => {
              const node = app.graph.getNodeById(path);
              const widget = node.widgets.find((w) => w.name === name);
              widget.value = value;
              widget.callback?.(value);
              app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
            }""",
            [str(path), name, value],
        )

    def widget(self, path: int | str, name: str) -> Any:
        """A widget's value."""
        return self.node(path, f"node.widgets.find((w) => w.name === {json.dumps(name)}).value")

    def command(self, name: str) -> None:
        """Runs one of the editor's commands, as its menus and keys do."""
        self.page.evaluate("(name) => app.extensionManager.command.execute(name)", name)

    def panel(self, path: int | str) -> str:
        """What a node's panel says, if it is on the screen."""
        text: str = self.node(
            path,
            """(() => {
              const panel = node.widgets.find((w) => w.name === "omini2_panel").element;
              const shown = panel.isConnected && panel.getBoundingClientRect().height > 10;
              return shown ? panel.innerText : "";
            })()""",
        )
        return text

    def wait_for_panel(self, path: int | str, words: str) -> str:
        """The panel's text once it contains some words."""
        for _ in range(100):
            text = self.panel(path)
            if words in text:
                return text
            self.page.wait_for_timeout(50)
        raise AssertionError(f"node {path} says {text!r}, not {words!r}")

    def notices(self, path: int | str) -> list[str]:
        """The paragraphs of what is said at a node, once there is something."""
        card = self.notice(path)
        card.wait_for(timeout=5000)
        return card.inner_text().split("\n")

    def notice(self, path: int | str) -> Locator:
        """The card at a node."""
        return self.page.locator(f"[data-testid=omini2_notice][data-at='{path}']")

    def fit(self) -> None:
        """The whole graph on the screen."""
        self.page.evaluate(
            """() => {
              const nodes = app.graph.nodes.map((n) => n.boundingRect);
              const left = Math.min(...nodes.map((b) => b[0])) - 40;
              const top = Math.min(...nodes.map((b) => b[1])) - 90;
              const right = Math.max(...nodes.map((b) => b[0] + b[2])) + 40;
              const bottom = Math.max(...nodes.map((b) => b[1] + b[3])) + 40;
              const { clientWidth: w, clientHeight: h } = app.canvas.canvas;
              const ds = app.canvas.ds;
              const [bar, tabs] = [60, 70]; // the editor's own, beside and above the graph
              const wide = (w - bar) / (right - left);
              ds.scale = Math.min(wide, (h - tabs) / (bottom - top), 1);
              ds.offset[0] = bar / ds.scale - left;
              ds.offset[1] = tabs / ds.scale - top;
              app.canvas.setDirty(true, true);
              const frame = () => new Promise((drawn) => requestAnimationFrame(drawn));
              return frame().then(frame);
            }"""
        )

    def look_at(self, node: int | str) -> None:
        """One node, near enough to read it: from afar the editor leaves text out."""
        self.page.evaluate(
            """(id) => {
              const node = app.canvas.graph.getNodeById(id);
              app.canvas.ds.scale = 0.9;
              app.canvas.ds.offset[0] = 900 - node.pos[0];
              app.canvas.ds.offset[1] = 160 - node.pos[1];
              app.canvas.setDirty(true, true);
            }""",
            str(node),
        )

    def screenshot(self, name: str) -> None:
        """Keeps a picture of the page for people to look at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            path = self.folder / f"{name}.{self.renderer}.jpg"  # in half of a PNG's time
            self.page.screenshot(path=path, quality=80)
        except Error as error:
            print(f"no screenshot of {name}: {error}")
