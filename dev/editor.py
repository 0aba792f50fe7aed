"""The host's graph editor in a real browser, as a person uses it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, sync_playwright

from dev import browser as chromium
from dev.server import Server

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
RUN_LIMIT = 60_000  # ms, for a run of a few seconds
SIZE = {"width": 2000, "height": 1200}  # from where a whole graph can still be read

# The editor's own complaints: it asks its makers about packages and releases, which the server
# forbids, and its small map is left without listeners when a subgraph is opened.
NOT_OURS = ("Content Security Policy", "cleanup event listeners for graph that was never set up")

# What the editor says about itself to whoever sees it for the first time.
HIDDEN = 'localStorage.setItem("vueNodesBannerDismissed", "true");'

# Runs in the page. What each run sends is kept, so that a test can look at it afterwards.
PREPARE = """() => {
  const seen = (window.omini2Seen = []);
  const kinds = ["progress_state", "omini2.run", "omini2.warning", "execution_success",
    "execution_error", "execution_interrupted"];
  for (const kind of kinds) {
    app.api.addEventListener(kind, ({ detail }) => seen.push({ kind, detail }));
  }
}"""
NODE = """(path) => {
  const ids = String(path).split(":");
  let graph = app.graph;
  for (const id of ids.slice(0, -1)) graph = graph.getNodeById(id).subgraph;
  const node = graph.getNodeById(ids.at(-1));
  return %s;
}"""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium for the tests; without one they are skipped, or fail where there has to be one."""
    program = chromium.find()
    if program is None:
        missing = "there is no Chromium; run python -m dev.browser"
        pytest.fail(missing) if chromium.required() else pytest.skip(missing)
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield opened
        opened.close()


class Editor:
    """One page with the editor; collects whatever goes wrong in it."""

    def __init__(
        self,
        browser: Browser,
        server: Server,
        renderer: str,
        folder: Path,
        sharpness: float = 1,
        known: str = "Omini2ApplyLoRA",
    ) -> None:
        """
        Args:
            known: a node that the editor knows once it is ready.
        """
        self.server, self.renderer, self.folder, self.known = server, renderer, folder, known
        self.errors: list[str] = []
        self.set("Comfy.VueNodes.Enabled", renderer == "nodes2")
        self.set("Comfy.TutorialCompleted", True)
        self.page: Page = browser.new_page(viewport=SIZE, device_scale_factor=sharpness)
        self.page.add_init_script(HIDDEN)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}"))
        self.page.route("**/*", self._offline)
        self.open()

    def set(self, name: str, value: object) -> None:
        """Changes a setting on the server, before the page asks for it."""
        request = urllib.request.Request(
            f"{self.server.address}/settings/{name}",
            data=json.dumps(value).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        urllib.request.urlopen(request).close()

    def open(self) -> None:
        """Loads the page, or loads it again; the editor's own complaints then are not ours."""
        earlier = list(self.errors)
        self.page.goto(self.server.address)
        self.page.wait_for_function(
            "(known) => window.app?.vueAppReady && app.graph && app.extensionManager"
            " && Object.keys(LiteGraph.registered_node_types).includes(known)"
            " && app.extensionManager.workflow.activeWorkflow",
            arg=self.known,
        )
        self.page.evaluate(PREPARE)
        now = [each for each in self.errors if each not in earlier and "omini2" in each.lower()]
        self.errors[:] = earlier + now

    def _console(self, message: ConsoleMessage) -> None:
        source = message.location.get("url", "")
        foreign = any(words in message.text for words in NOT_OURS)
        # It looks for a help page in its language first.
        foreign |= "404" in message.text and source.endswith("/en.md")
        if message.type == "error" and not foreign:
            self.errors.append(f"{message.text} ({source})")

    def _offline(self, route: Any) -> None:
        """Nothing outside of this machine takes part in a test."""
        if route.request.url.startswith((self.server.address, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    # --- graphs --------------------------------------------------------------------------------

    def load(self, graph: dict[str, Any], name: str | None = None) -> None:
        """Opens a graph as a new workflow."""
        self.page.evaluate(
            "([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name]
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")

    def serialized(self) -> dict[str, Any]:
        """The graph as the editor would save it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

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

    # --- runs ----------------------------------------------------------------------------------

    def run(self, limit: int = RUN_LIMIT) -> list[dict[str, Any]]:
        """Queues the open graph and waits for its end, so many ms at most; what the server sent."""
        self.page.evaluate("() => { window.omini2Seen.length = 0; return app.queuePrompt(0); }")
        ends = '["execution_success", "execution_error", "execution_interrupted"]'
        self.page.wait_for_function(
            f"() => window.omini2Seen.some(({{ kind }}) => {ends}.includes(kind))",
            timeout=limit,
        )
        seen: list[dict[str, Any]] = self.page.evaluate("() => window.omini2Seen")
        failed = [each["detail"] for each in seen if each["kind"] == "execution_error"]
        assert not failed, failed[0]["exception_message"]
        return seen

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

    # --- pictures ------------------------------------------------------------------------------

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
            self.page.screenshot(path=self.folder / f"{name}.{self.renderer}.png")
        except Error as error:
            print(f"no screenshot of {name}: {error}")
