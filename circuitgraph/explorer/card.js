"use strict";
// The card of a node: what is known about it, its parents and its children. All texts are set as text.

const FIRST_ROWS = 6;

function element(parent, name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function button(parent, text, act, title) {
  const made = element(parent, "button", "", text);
  made.type = "button";
  if (title) made.title = title;
  made.addEventListener("click", act);
  return made;
}

function clickNode(node) {
  if (node.group !== undefined) {
    openGroup(node.group);
    return;
  }
  if (state.view === "neighbours" && node.i !== state.centre) {
    if (state.grown.has(node.i)) state.grown.delete(node.i);
    else state.grown.add(node.i);
    state.chosen = node.i;
    show();
  }
  chooseNode(node.i);
}

// Open the card of a node, or close it with null.
function chooseNode(i) {
  state.chosen = i;
  state.group = null;
  if (state.view === "overview") show(true);
  markChosen();
  placeMarks();
  drawCard();
}

// Go to a node from a list: it is brought into sight, or into the middle.
function goTo(i) {
  if (state.view === "neighbours") return centreOn(i);
  chooseNode(i);
  showNode(i);
}

function centreOn(i) {
  state.centre = i;
  state.grown = new Set([i]);
  state.view = "neighbours";
  state.chosen = i;
  show();
  drawCard();
}

function drawCard() {
  const card = document.getElementById("card");
  card.replaceChildren();
  if (state.group !== null) return drawGroupCard(card, notes.groups[state.group]);
  if (state.chosen === null) {
    element(
      card,
      "p",
      "hint",
      "Click a node, or press / to search. Its card opens here: what it is, what it reads and who reads it.",
    );
    return;
  }
  const i = state.chosen;
  drawHead(card, i);
  drawFacts(card, i);
  for (const [title, texts] of Object.entries(DATA.cards[NODES.name[i]] ?? {})) drawTexts(card, title, texts);
  drawNote(card, i);
  drawParents(card, i);
  drawChildren(card, i);
  card.scrollTop = 0;
}

function drawHead(card, i) {
  const head = element(card, "div", "head");
  element(head, "h2", "", NODES.name[i]);
  button(head, "×", () => chooseNode(null), "Close (Escape)").className = "close";
  if (NODES.short_name[i]) element(card, "p", "short", NODES.short_name[i]);
  if (NODES.label[i]) element(card, "p", "label", NODES.label[i]);
  const actions = element(card, "div", "actions");
  button(actions, "Neighbours", () => centreOn(i), "Put it in the middle of its neighbours");
  button(
    actions,
    notes.pinned.includes(i) ? "Unpin" : "Pin",
    () => togglePin(i),
    "Keep it in the list below",
  );
  const path = element(card, "div", "actions");
  element(path, "span", "hint", "Path");
  for (const end of ["from", "through", "to"]) button(path, end, () => setPathEnd(end, i));
}

function drawFacts(card, i) {
  const facts = { kind: NODES.kind[i] };
  if (NODES.layer[i] >= 0) facts.layer = NODES.layer[i];
  if (NODES.position[i] >= 0) facts.position = NODES.position[i];
  if (NODES.token[i]) facts.token = showToken(NODES.token[i]);
  if (NODES.influence[i] !== null) facts.influence = showNumber(NODES.influence[i]);
  if (NODES.community[i] >= 0) facts.community = NODES.community[i];
  for (const [name, values] of Object.entries(NODES.more)) {
    const value = values[i];
    if (value === null || value === "") continue;
    facts[FACTS[name] ?? name.replace(/_/g, " ")] = typeof value === "number" ? showNumber(value) : value;
  }
  const list = element(card, "dl", "facts");
  for (const [name, value] of Object.entries(facts)) {
    element(list, "dt", "", name);
    element(list, "dd", "", String(value));
  }
}

const FACTS = { mean_activation: "mean activation, where active", kept: "share of its input that is kept" };

function drawTexts(card, title, texts) {
  element(card, "h3", "", title);
  const isShort = texts.every((text) => text.length <= 16);
  const list = element(card, "ul", isShort ? "tokens" : "texts");
  for (const text of texts) element(list, "li", "", isShort ? showToken(text) : text);
}

function drawParents(card, i) {
  const byPort = d3.group(parentEdges[i], portOf);
  for (const port of DATA.ports) {
    const edges = byPort.get(port) ?? [];
    const inGraph = DATA.all.parents[port]?.[i] ?? 0;
    if (!inGraph) continue;
    const held = d3.sum(edges, (e) => EDGES.share[e]);
    const all =
      edges.length === inGraph ? "" : `; the page holds ${edges.length}, ${showShare(held)} of the port`;
    const title = `Parents by port ${port}: ${showCount(inGraph)}${all}`;
    drawEdgeList(card, title, edges, EDGES.source, { direction: "parents", port });
  }
  if (!parentEdges[i].length) element(card, "p", "hint", "It reads nothing in this graph.");
}

function drawChildren(card, i) {
  const byPort = d3.group(childEdges[i], portOf);
  const inGraph = DATA.all.children[i];
  const held = childEdges[i].length;
  if (!inGraph) element(card, "p", "hint", "No node of this graph reads it.");
  else if (held < inGraph)
    element(
      card,
      "p",
      "hint",
      `The page holds ${showCount(held)} of the ${showCount(inGraph)} edges to its readers.`,
    );
  for (const [port, edges] of byPort) {
    drawEdgeList(card, `Children by port ${port}: ${showCount(edges.length)}`, edges, EDGES.target, {
      direction: "children",
      port,
    });
  }
}

function drawEdgeList(card, title, edges, ends, data) {
  element(card, "h3", "", title);
  if (!edges.length) return;
  const table = element(card, "table", "edges");
  Object.assign(table.dataset, data);
  const head = element(table, "tr");
  for (const name of ["node", "weight", "share"]) element(head, "th", "", name);
  const addRows = (from, to) => edges.slice(from, to).forEach((e) => drawEdgeRow(table, e, ends[e]));
  addRows(0, FIRST_ROWS);
  if (edges.length <= FIRST_ROWS) return;
  const more = button(card, `${showCount(edges.length - FIRST_ROWS)} more`, () => {
    addRows(FIRST_ROWS, edges.length);
    more.remove();
  });
  more.className = "more";
}

function drawEdgeRow(table, e, i) {
  const row = element(table, "tr");
  row.title = describeEdge(e);
  const name = element(row, "td");
  button(name, NODES.name[i], () => goTo(i)).className = "node";
  const subtitle = subtitleOf(i);
  if (subtitle) element(name, "span", "subtitle", subtitle);
  const weight = element(row, "td", "number", showNumber(EDGES.weight[e]));
  weight.style.color = signColour(EDGES.weight[e]);
  const share = element(row, "td", "number share", showShare(EDGES.share[e]));
  share.style.setProperty("--share", `${100 * EDGES.share[e]}%`);
}
