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
  drawHistogram(card, i);
  drawContexts(card, i);
  for (const [title, texts] of Object.entries(lookUp(DATA.cards, i) ?? {})) drawTexts(card, title, texts);
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
  if (NODES.position[i] === 0)
    element(card, "p", "hint", "At the first position, where attention gathers whatever the text says (a sink).");
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
  if (NODES.cost[i] !== null) facts["cost of cutting it"] = `${showNumber(NODES.cost[i])} nats`;
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

// How large the activation is where the feature is active
function drawHistogram(card, i) {
  const histogram = lookUp(DATA.histograms, i);
  if (!histogram?.counts.length) return;
  const { counts, range } = histogram;
  element(card, "h3", "", `Activations where active: ${showCount(d3.sum(counts))} positions`);
  const size = { width: 230, height: 44 };
  const step = size.width / counts.length;
  const tallest = d3.max(counts);
  const box = d3.select(card).append("svg").attr("class", "histogram").attr("role", "img");
  box.attr("width", size.width).attr("height", size.height + 14).attr("font-size", 10).attr("fill", "#666");
  const bars = box.selectAll("rect").data(counts).join("rect");
  bars
    .attr("x", (_, place) => place * step)
    .attr("width", step - 1)
    .attr("y", (count) => size.height * (1 - count / tallest))
    .attr("height", (count) => size.height * (count / tallest))
    .attr("fill", DATA.colours.kind.feature);
  const ends = [
    { x: 0, anchor: "start", text: showNumber(range[0]) },
    { x: size.width, anchor: "end", text: showNumber(range[1]) },
  ];
  const texts = box.selectAll("text").data(ends).join("text").attr("y", size.height + 11);
  texts
    .attr("x", (end) => end.x)
    .attr("text-anchor", (end) => end.anchor)
    .text((end) => end.text);
}

// Where the feature is most active, with its token marked
function drawContexts(card, i) {
  const contexts = lookUp(DATA.contexts, i);
  if (!contexts) return;
  element(card, "h3", "", "Most active at");
  const list = element(card, "ul", "texts contexts");
  for (const [before, token, after, activation] of contexts) {
    const item = element(list, "li", "", before.replace(/\n/g, "⏎"));
    element(item, "mark", "", token.replace(/\n/g, "⏎"));
    item.append(after.replace(/\n/g, "⏎"));
    element(item, "span", "subtitle", showNumber(activation));
  }
}

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
    const title = `Parents by port ${port}, by share: ${showCount(inGraph)}${all}`;
    drawEdgeList(card, title, edges, EDGES.source, { direction: "parents", port }, PARENT_COLUMNS);
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
    const by = HAS_INFLUENCE ? "influence" : "share";
    const title = `Children by port ${port}, by ${by}: ${showCount(edges.length)}`;
    const columns = HAS_INFLUENCE ? CHILD_COLUMNS : PARENT_COLUMNS;
    drawEdgeList(card, title, edges, EDGES.target, { direction: "children", port }, columns);
  }
}

// A table shows the column that it is ordered by: the last.
const PARENT_COLUMNS = [
  ["weight", (e) => showNumber(EDGES.weight[e])],
  ["share", (e) => showShare(EDGES.share[e])],
];
const CHILD_COLUMNS = [PARENT_COLUMNS[0], ["influence", (e) => showNumber(EDGES.influence[e])]];

function drawEdgeList(card, title, edges, ends, data, columns) {
  element(card, "h3", "", title);
  if (!edges.length) return;
  const table = element(card, "table", "edges");
  Object.assign(table.dataset, data);
  const head = element(table, "tr");
  for (const name of ["node", ...columns.map(([name]) => name)]) element(head, "th", "", name);
  const addRows = (from, to) => edges.slice(from, to).forEach((e) => drawEdgeRow(table, e, ends[e], columns));
  addRows(0, FIRST_ROWS);
  if (edges.length <= FIRST_ROWS) return;
  const more = button(card, `${showCount(edges.length - FIRST_ROWS)} more`, () => {
    addRows(FIRST_ROWS, edges.length);
    more.remove();
  });
  more.className = "more";
}

function drawEdgeRow(table, e, i, columns) {
  const row = element(table, "tr");
  row.title = describeEdge(e);
  const name = element(row, "td");
  button(name, NODES.name[i], () => goTo(i)).className = "node";
  const subtitle = subtitleOf(i);
  if (subtitle) element(name, "span", "subtitle", subtitle);
  for (const [column, show] of columns) {
    const cell = element(row, "td", `number ${column}`, show(e));
    if (column === "weight") cell.style.color = signColour(EDGES.weight[e]);
    if (column === "share") cell.style.setProperty("--share", `${100 * EDGES.share[e]}%`);
  }
}
