"""The host's graph editor in a real browser, as a person uses it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page

from dev.host.server import Server

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOAD_LIMIT = 120_000  # ms, for the page, beside other work
RUN_LIMIT = 60_000  # ms, for a run of a few seconds
LOAD_LIMIT = 120_000  # ms, for the page, where others have the machine
SIZE = {"width": 2000, "height": 1200}  # from where a whole graph can still be read

# The editor's own complaints: it asks its makers about packages and releases and other sites about
# models, which is forbidden here, and its small map is left without listeners when a subgraph is
# opened.
NOT_OURS = (
    *("Content Security Policy", "cleanup event listeners for graph that was never set up"),
    *("Error fetching file size", "net::ERR_FAILED"),
)

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
        self.page.goto(self.server.address, timeout=LOAD_LIMIT)
        self.page.wait_for_function(
            "(known) => window.app?.vueAppReady && app.graph && app.extensionManager"
            " && Object.keys(LiteGraph.registered_node_types).includes(known)"
            " && app.extensionManager.workflow.activeWorkflow",
            arg=self.known,
            timeout=LOAD_LIMIT,
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

    def load(self, graph: dict[str, Any], name: str | None = None) -> None:
        """Opens a graph as a new workflow."""
        self.page.evaluate(
            "([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name]
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")

    def serialized(self) -> dict[str, Any]:
        """The graph as the editor would save it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def run(self, limit: int = RUN_LIMIT) -> list[dict[str, Any]]:
        """Queues the open graph and waits for its end, so many ms at most; what the server sent."""
        self.page.evaluate("() => { window.omini2Seen.length = 0; return app.queuePrompt(0); }")
        ends = '["execution_success", "execution_error", "execution_interrupted"]'
        self.page.wait_for_function(
            f"() => window.omini2Seen.some(({{ kind }}) => {ends}.includes(kind))", timeout=limit
        )
        seen: list[dict[str, Any]] = self.page.evaluate("() => window.omini2Seen")
        failed = [each["detail"] for each in seen if each["kind"] == "execution_error"]
        assert not failed, failed[0]["exception_message"]
        return seen
