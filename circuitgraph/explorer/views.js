"use strict";
// What each view shows and where. A view is a function of the state and returns a scene for `drawScene`.

const MOST_DRAWN = 3000; // edges at once

const state = {
  view: "overview",
  chosen: null, // a node, or null
  group: null, // a group whose card is open, or null
  colour: "kind",
  filters: null, // set by `firstFilters`
  centre: null,
  grown: new Set(), // nodes whose neighbours are shown
  perPort: 3,
  featuresAround: false, // whether only features are shown as neighbours
  path: { from: null, through: null, to: null },
};

function presentKinds() {
  return [...new Set(NODES.kind)];
}

function presentPorts() {
  return DATA.ports.filter((_, p) => EDGES.port.includes(p));
}

function firstFilters() {
  return {
    nEdges: Math.min(DATA.n_first, N_EDGES),
    featuresOnly: DATA.first.features_only,
    withFirst: !DATA.first.skip_first, // whether the first position of a prompt is shown
    kinds: new Set(presentKinds()),
    ports: new Set(presentPorts()),
    layers: [0, d3.max(NODES.layer)],
    leastCount: DATA.first.least_count,
    leastInfluence: 0,
  };
}

// Nodes without a layer (input, output) pass any range of layers.
function nodePasses(i, filters) {
  const layer = NODES.layer[i];
  if (layer >= 0 && (layer < filters.layers[0] || layer > filters.layers[1])) return false;
  if (filters.featuresOnly && NODES.kind[i] !== "feature") return false;
  if (!filters.withFirst && NODES.position[i] === 0) return false;
  return filters.kinds.has(NODES.kind[i]);
}

function edgesThatPass(filters) {
  const passes = NODES.name.map((_, i) => nodePasses(i, filters));
  return d3.range(N_EDGES).filter((e) => {
    if (!passes[EDGES.source[e]] || !passes[EDGES.target[e]]) return false;
    if (!filters.ports.has(portOf(e)) || EDGES.count[e] < filters.leastCount) return false;
    return filters.leastInfluence <= 0 || strengthOf(e) >= filters.leastInfluence;
  });
}

// A node and an edge as they are drawn
function makeNode(i, x, y, radius, room) {
  const name = NODES.name[i];
  const node = { key: `n${i}`, i, name, text: name, kind: NODES.kind[i], subtitle: subtitleOf(i) };
  const influence = NODES.influence[i];
  node.about = influence === null ? [] : [`influence ${showNumber(influence)}`];
  return Object.assign(node, { x, y, radius, room, importance: influence ?? 0 });
}

function makeEdge(e, width) {
  const port = portOf(e);
  const bend = { q: -22, k: 22 }[port] ?? 0;
  const edge = {
    key: `e${e}`,
    name: edgeName(e),
    source: `n${EDGES.source[e]}`,
    target: `n${EDGES.target[e]}`,
  };
  return Object.assign(edge, { port, bend, width, weight: EDGES.weight[e], members: [e] });
}

function widthOfShare(e) {
  return 1 + 7 * Math.sqrt(EDGES.share[e]);
}

const mostStrength = d3.max(d3.range(N_EDGES), strengthOf) || 1;

function widthOfStrength(strength) {
  return 0.8 + 6 * Math.sqrt(Math.min(1, strength / mostStrength));
}

// Overview: the skeleton, where depth and order put it. The pixels of a step across and of a step up are set
// when the page opens and by Fit, so that what is shown fills the canvas; a filter leaves them.
let unit = null;

function setUnit(nodes) {
  const [left, right] = d3.extent(nodes, (i) => NODES.x[i]);
  const [bottom, top] = d3.extent(nodes, (i) => NODES.y[i]);
  const size = canvasSize();
  const step = (space, range, least, most) => Math.min(most, Math.max(least, space / Math.max(range, 1e-9)));
  unit = { x: step(size.width - 180, right - left, 3, 160), y: step(size.height - 90, top - bottom, 5, 160) };
}

function firstNodes() {
  const edges = edgesThatPass(state.filters).slice(0, DATA.n_first);
  return edges.flatMap((e) => [EDGES.source[e], EDGES.target[e]]);
}

function placeOf(i) {
  return { x: NODES.x[i] * unit.x, y: -NODES.y[i] * unit.y };
}

const mostInfluence =
  d3.max(
    d3.range(N_NODES).filter((i) => NODES.kind[i] !== "logits"),
    (i) => NODES.influence[i] ?? 0,
  ) || 1;

function placedNode(i) {
  const { x, y } = placeOf(i);
  const radius = 4 + 6 * Math.sqrt(Math.min(1, (NODES.influence[i] ?? 0) / mostInfluence));
  const node = makeNode(i, x, y, radius, 16);
  return DATA.is_prompt ? Object.assign(node, textsInColumn(i)) : node;
}

// In the graph of a prompt the column says which token it is, so that a label need not.
function textsInColumn(i) {
  const token = showToken(NODES.token[i]);
  if (NODES.kind[i] === "embed") return { text: "", subtitle: "" };
  if (NODES.kind[i] === "logits") return { text: token, subtitle: showNumber(NODES.more.probability?.[i]) };
  return { text: NODES.name[i].split("@")[0] };
}

function axes() {
  const rows = DATA.rows.map((row) => ({ text: row.text, y: -row.y * unit.y }));
  if (!DATA.is_prompt) return { rows, columns: [] };
  const inputs = d3.range(N_NODES).filter((i) => NODES.kind[i] === "embed");
  const columns = inputs.map((i) => ({ key: i, text: showToken(NODES.token[i]), x: placeOf(i).x }));
  return { rows, columns };
}

function overviewScene() {
  const passing = edgesThatPass(state.filters);
  const skeleton = passing.slice(0, Math.min(state.filters.nEdges, MOST_DRAWN));
  const edges = [...skeleton, ...edgesOfChosen(skeleton)];
  const shown = new Set(edges.flatMap((e) => [EDGES.source[e], EDGES.target[e]]));
  if (state.chosen !== null) shown.add(state.chosen);
  const drawn = edges.map((e) => makeEdge(e, widthOfStrength(strengthOf(e))));
  const size = HAS_INFLUENCE ? "influence" : "share";
  const part = d3.sum(skeleton, strengthOf) / (d3.sum(passing, strengthOf) || 1);
  const only = state.filters.featuresOnly ? " that join two features" : "";
  const sink = DATA.is_prompt && !state.filters.withFirst ? " The first position, the attention sink, is hidden." : "";
  const reading = skeleton.length
    ? `${showCount(skeleton.length)} edges of largest ${size}${only}: ${showShare(part)} of that of the ` +
      `${showCount(passing.length)} that pass the filters.${sink} ${DATA.left_out[0]}`
    : "";
  const empty = "No edge passes these filters. Reset brings all edges back.";
  return {
    nodes: [...shown].map(placedNode),
    edges: drawn,
    ...axes(),
    reading,
    empty,
    fades: true,
    beside: !DATA.is_prompt && !NODES.kind.includes("feature"),
    largest: 2,
  };
}

// A chosen node that the skeleton lacks comes with its strongest edges.
function edgesOfChosen(skeleton) {
  const i = state.chosen;
  if (i === null || skeleton.some((e) => EDGES.source[e] === i || EDGES.target[e] === i)) return [];
  const parents = parentEdges[i].filter((e) => nodePasses(EDGES.source[e], state.filters));
  const children = childEdges[i].filter((e) => nodePasses(EDGES.target[e], state.filters));
  return [...firstByPort(parents, 2), ...children.slice(0, 4)];
}

function mayStandAround(i) {
  return !state.featuresAround || NODES.kind[i] === "feature";
}

// Neighbours: parents below, children above, as far as the reader has grown them.
function growNeighbours() {
  const generation = new Map([[state.centre, 0]]);
  const host = new Map();
  const edges = new Set();
  const add = (i, e, level, from) => {
    edges.add(e);
    if (generation.has(i)) return;
    generation.set(i, level);
    host.set(i, from);
  };
  for (const i of state.grown) {
    if (!generation.has(i)) continue; // what led to it was taken away
    const level = generation.get(i);
    const parents = parentEdges[i].filter((e) => mayStandAround(EDGES.source[e]));
    const children = childEdges[i].filter((e) => mayStandAround(EDGES.target[e]));
    for (const e of firstByPort(parents, state.perPort)) add(EDGES.source[e], e, level - 1, i);
    for (const e of firstByPort(children, state.perPort)) add(EDGES.target[e], e, level + 1, i);
  }
  return { generation, host, edges };
}

// Pixels between neighbours, and between their rows: as the canvas has room for
function neighbourSteps(levels) {
  const size = canvasSize();
  const longest = d3.max(levels.values(), (row) => row.length);
  const across = (size.width - 140) / Math.max(longest - 1, 1);
  const up = (size.height - 110) / Math.max(levels.size - 1, 1);
  return { x: Math.min(130, Math.max(56, across)), y: Math.min(260, Math.max(90, up)) };
}

// Nodes are added in the order of their strength.
function strongestInTheMiddle(nodes) {
  const left = nodes.filter((_, place) => place % 2 === 1);
  const right = nodes.filter((_, place) => place % 2 === 0);
  return [...left.reverse(), ...right];
}

function neighboursScene() {
  const empty = "Search a node, or click one in the overview, to see its neighbours.";
  if (state.centre === null) return { nodes: [], edges: [], rows: [], columns: [], reading: "", empty };
  const { generation, host, edges } = growNeighbours();
  const levels = d3.group(generation.keys(), (i) => generation.get(i));
  const step = neighbourSteps(levels);
  const x = new Map();
  for (const level of d3.sort(levels.keys(), (one) => Math.abs(one))) {
    const byHost = d3.group(levels.get(level), (i) => host.get(i));
    const hosts = d3.sort(byHost.keys(), (one) => x.get(one) ?? 0);
    const row = hosts.flatMap((one) => strongestInTheMiddle(byHost.get(one)));
    row.forEach((i, place) => x.set(i, (place - (row.length - 1) / 2) * step.x));
  }
  const nodes = [...generation.keys()].map((i) => {
    const isGrown = state.grown.has(i);
    const node = makeNode(
      i,
      x.get(i),
      -generation.get(i) * step.y,
      isGrown ? 9 : 6,
      Math.floor(step.x / 6.5),
    );
    const importance = i === state.centre ? Infinity : 1 / (1 + Math.abs(generation.get(i)));
    return Object.assign(node, { importance, beside: isGrown });
  });
  const drawn = [...edges].map((e) => makeEdge(e, widthOfShare(e)));
  const size = HAS_INFLUENCE ? "influence" : "share";
  const reading =
    `${NODES.name[state.centre]} in the middle, below it the parents of largest share by each port, ` +
    `above it the children of largest ${size}: at most ${state.perPort} by each port.`;
  return { nodes, edges: drawn, rows: [], columns: [], reading, empty, largest: 1.3 };
}

// Path: a chain from below to above, through a node in between if one is named
function pathScene() {
  const { from, through, to } = state.path;
  const scene = { nodes: [], edges: [], rows: [], columns: [], reading: "", side: true, largest: 1.4 };
  if (from === null || to === null) {
    return { ...scene, empty: "Name two nodes above, or choose them with Path from and to on a card." };
  }
  const stops = through === null ? [from, to] : [from, through, to];
  const names = stops.map((i) => NODES.name[i]);
  const way = `from ${names[0]} to ${names.at(-1)}${through === null ? "" : ` through ${names[1]}`}`;
  const parts = d3.pairs(stops).map(([a, b]) => (a <= b ? strongestPath(a, b) : null));
  if (parts.includes(null)) return { ...scene, empty: `No path leads ${way} along the edges of this page.` };
  const path = parts.flat();
  const chain = [from, ...path.map((e) => EDGES.target[e])];
  const nodes = chain.map((i, place) => makeNode(i, 0, -place * 76, 8, 60));
  const edges = path.map((e) => {
    const text = `${portOf(e)}: share ${showShare(EDGES.share[e])}, weight ${showNumber(EDGES.weight[e])}`;
    return Object.assign(makeEdge(e, widthOfShare(e)), { text, straight: true });
  });
  const length = `${countOf(path, "edge")}, product of shares ${showNumber(productOfShares(path))}`;
  const reading = `The strongest path ${way}: ${length}. ${DATA.left_out[0]}`;
  return { ...scene, nodes, edges, reading };
}

// Pinned: the nodes that the reader has chosen, and groups of them, with the edges between them
function pinnedScene() {
  const groupOf = new Map();
  const nodes = notes.groups.map((group, g) => {
    for (const i of group.members) groupOf.set(i, `g${g}`);
    const places = group.members.map(placeOf);
    const centre = { x: d3.mean(places, (place) => place.x), y: d3.mean(places, (place) => place.y) };
    const subtitle = countOf(group.members, "node");
    const node = {
      key: `g${g}`,
      group: g,
      i: -1,
      name: group.name,
      text: group.name,
      kind: "group",
      subtitle,
      colour: "#444",
      ...centre,
    };
    return Object.assign(node, {
      radius: 11,
      room: 20,
      importance: Infinity,
      about: group.note ? [group.note] : [],
    });
  });
  for (const i of notes.pinned) {
    if (groupOf.has(i)) continue;
    groupOf.set(i, `n${i}`);
    nodes.push(Object.assign(placedNode(i), { about: notes.texts.has(i) ? [notes.texts.get(i)] : [] }));
  }
  const edges = edgesBetween(groupOf);
  const counts = [
    countOf(notes.pinned, "pinned node"),
    countOf(notes.groups, "group"),
    countOf(edges, "edge"),
  ];
  const summed = notes.groups.length
    ? " The edge of a group sums all edges of its members, and its colour is the sign of the sum."
    : "";
  const reading = nodes.length ? `${counts.join(", ")} between them.${summed}` : "";
  const empty = "Nothing is pinned. Click a node and press Pin on its card.";
  return { nodes, edges, ...axes(), reading, empty, largest: 4, fades: true };
}

function countOf(things, name) {
  return `${showCount(things.length)} ${name}${things.length === 1 ? "" : "s"}`;
}

function edgesBetween(groupOf) {
  const single = [];
  const joint = new Map();
  for (const i of groupOf.keys()) {
    for (const e of childEdges[i]) {
      const ends = [groupOf.get(i), groupOf.get(EDGES.target[e])];
      if (ends[1] === undefined || ends[0] === ends[1]) continue;
      if (ends.every((end) => end.startsWith("n"))) single.push(makeEdge(e, widthOfStrength(strengthOf(e))));
      else joint.set(ends.join(), [...(joint.get(ends.join()) ?? []), e]);
    }
  }
  const summed = [...joint].map(([ends, members]) => {
    const [source, target] = ends.split(",");
    const width = widthOfStrength(d3.sum(members, strengthOf));
    const weight = d3.sum(members, (e) => EDGES.weight[e]);
    return {
      key: ends,
      name: `${source}->${target}`,
      source,
      target,
      port: "all",
      bend: 0,
      width,
      weight,
      members,
    };
  });
  return [...single, ...summed];
}

const SCENES = { overview: overviewScene, neighbours: neighboursScene, path: pathScene, pinned: pinnedScene };

// Show the view. The texts come first, because they leave the canvas its height.
function show(keep) {
  scene = SCENES[state.view]();
  const isEmpty = !scene.nodes.length || !scene.reading;
  d3.select("#reading").text(scene.reading);
  d3.select("#empty")
    .attr("hidden", isEmpty ? null : "")
    .text(scene.empty);
  d3.selectAll("#stage > form").attr("hidden", function () {
    return this.dataset.view === state.view ? null : "";
  });
  d3.selectAll("#tabs button").attr("aria-selected", function () {
    return this.dataset.view === state.view;
  });
  drawLegend();
  drawScene(keep);
}

function openView(view) {
  const keep = view === state.view;
  state.view = view;
  hideHover();
  show(keep);
}
