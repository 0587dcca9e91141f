"""What a reader does on a page of the explorer, one step after another, in a file or in a notebook.

`view` is what Playwright calls a page or a frame. Files that are saved belong to the page around it.
"""

import json
import re
from dataclasses import dataclass
from xml.etree import ElementTree

SIZES = [(1400, 900), (800, 600)]
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Walk:
    """The nodes of a graph that a reader asks about."""

    node: str  # it has parents by port k
    start: str
    end: str
    pinned: list[str]  # four, of which the first three become a group


def find(view, name):
    """Search a node and open its card."""
    view.locator("#search").fill(name)
    assert view.locator("#found li[role=option] b").first.inner_text() == name
    view.locator("#search").press("Enter")
    assert view.locator("#card h2").inner_text() == name


def drawn(view, what="path.node"):
    return view.locator(f"#drawing {what}").evaluate_all("marks => marks.map(mark => mark.dataset.name)")


def pinned(view):
    return view.locator("#pins ul.pinned button.node").all_inner_texts()


def click_largest_parent(view, graph, node):
    """Click the first parent by port k, which the graph says is the largest."""
    find(view, node)
    view.locator("table.edges[data-direction=parents][data-port=k] button").first.click()
    largest = graph.parents(node, port="k")["source"].iloc[0]
    assert view.locator("#card h2").inner_text() == largest


def follow_path(view, walk):
    """Find the strongest path from one end of the graph to the other through the node."""
    find(view, walk.node)
    view.locator("#card").get_by_role("button", name="through").click()
    view.locator("#path-from").fill(walk.start)
    view.locator("#path-to").fill(walk.end)
    view.get_by_role("button", name="Find").click()
    path = drawn(view)
    assert path[0] == walk.start and path[-1] == walk.end and walk.node in path
    view.get_by_role("tab", name="Overview").click()


def look_at_features(view, graph):
    """Show features only, then all nodes again; a graph without features offers no such filter."""
    kind = graph.nodes.set_index("name")["kind"]
    only = view.locator("#features-only")
    if "feature" not in set(kind):
        assert only.is_hidden()
        return
    view.get_by_role("button", name="Reset").click()
    view.locator("#card .close").click()
    only.check()
    names = drawn(view)
    assert names and set(kind[names]) == {"feature"}
    only.uncheck()
    assert set(kind[drawn(view)]) - {"feature"}


def group_three(view, names):
    for name in names:
        find(view, name)
        view.locator("#card").get_by_role("button", name="Pin", exact=True).click()
    for name in names[:3]:
        view.get_by_label(f"Tick {name} for a group").check()
    view.locator("#group-name").fill("the three")
    view.get_by_role("button", name="Group ticked").click()
    assert pinned(view) == ["the three", names[3]]


def save_pins(view, page, folder, names):
    """Save pins and groups to a file, and read it."""
    with page.expect_download() as saving:
        view.locator("#pins").get_by_role("button", name="Save").click()
    path = folder / "view.json"
    saving.value.save_as(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["groups"] == [{"name": "the three", "members": names[:3], "note": ""}]
    return path


def load_pins(view, path, names):
    """Bring back what was saved, after everything was taken away."""
    while view.locator("#pins .close").count():
        view.locator("#pins .close").first.click()
    assert pinned(view) == []
    view.locator("#view-file").set_input_files(path)
    view.locator("#pins .group").wait_for()
    assert pinned(view) == ["the three", names[3]]
    assert set(drawn(view)) == {"the three", names[3]}


def save_drawing(view, page, folder):
    """Save the drawing as SVG: it holds the nodes that are on the screen."""
    view.get_by_role("tab", name="Overview").click()
    with page.expect_download() as saving:
        view.get_by_role("button", name="SVG").click()
    assert re.fullmatch(r"[\w.-]+-overview\.svg", saving.value.suggested_filename)
    saving.value.save_as(folder / "drawing.svg")
    root = ElementTree.parse(folder / "drawing.svg").getroot()
    marks = [mark for mark in root.iter(f"{SVG}path") if mark.get("class") == "node"]
    assert {mark.get("data-name") for mark in marks} == set(drawn(view))


def take(view, page, graph, walk, folder):
    """All steps."""
    click_largest_parent(view, graph, walk.node)
    follow_path(view, walk)
    look_at_features(view, graph)
    group_three(view, walk.pinned)
    path = save_pins(view, page, folder, walk.pinned)
    load_pins(view, path, walk.pinned)
    save_drawing(view, page, folder)
