"""The editor in a browser, for the tests of this folder."""

from collections.abc import Iterator
from typing import Any

import pytest
from in_editor import Editor, open_browser

from dev.host.server import Server
from dev.paths import ROOT


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Closed behind this folder: beside Playwright's own loop no other test could run one."""
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="package", params=["classic", "nodes2"])
def page(request: pytest.FixtureRequest, server: Server, browser: Any) -> Iterator[Editor]:
    """One page for all tests of a way to draw nodes: loading it takes seconds."""
    editor = Editor(browser, server, request.param, ROOT / "test_output" / "editor")
    assert "\n".join(editor.errors) == ""
    yield editor
    editor.page.close()


@pytest.fixture
def editor(page: Editor) -> Iterator[Editor]:
    """The page, and afterwards that nothing went wrong in it."""
    page.errors.clear()
    yield page
    page.page.evaluate("() => app.extensionManager.toast.removeAll?.()")
    assert "\n".join(page.errors) == ""
