"use strict";
// Draws a scene: nodes and edges with places. Every view makes a scene; this is the only code that draws one.
// All looks are attributes, not style sheets, so that an exported drawing keeps them.

const DASHES = { q: "7 3", k: "1.5 3", in: "9 3 2 3", all: "18 3" }; // v, mlp and logits are solid
const SHAPES = {
  embed: d3.symbolSquare,
  pos_embed: d3.symbolSquare,
  const: d3.symbolSquare,
  mlp: d3.symbolTriangle,
  error: d3.symbolDiamond,
  logits: d3.symbolSquare,
  group: d3.symbolStar,
};
const COMMUNITY_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"];
const OTHER_COLOUR = "#BBBBBB";
const FONT = "system-ui, sans-serif";

const svg = d3.select("#drawing");
svg.attr("font-family", FONT);
const layers = Object.fromEntries(
  ["axis", "edges", "nodes", "labels"].map((name) => [name, svg.append("g").attr("class", name)]),
);
const zoom = d3.zoom().scaleExtent([0.05, 40]).on("zoom", placeMarks);
svg.call(zoom).on("dblclick.zoom", null);
svg.on("click", (event) => {
  if (event.target === svg.node()) chooseNode(null);
});

let scene = { nodes: [], edges: [], rows: [], columns: [] };

function canvasSize() {
  const box = document.getElementById("canvas").getBoundingClientRect();
  return { width: Math.max(box.width, 50), height: Math.max(box.height, 50) };
}

function colourOf(node) {
  if (node.colour) return node.colour;
  if (state.colour !== "community") return DATA.colours.kind[NODES.kind[node.i]] ?? OTHER_COLOUR;
  return communityColour(NODES.community[node.i]);
}

function communityColour(community) {
  return COMMUNITY_COLOURS[community] ?? OTHER_COLOUR;
}

function signColour(weight) {
  return weight >= 0 ? DATA.colours.sign.raises : DATA.colours.sign.lowers;
}

function shapeOf(node) {
  const shape = SHAPES[node.kind] ?? d3.symbolCircle;
  return d3.symbol(shape, 3.6 * node.radius ** 2)();
}

// Draw the scene. `keep` leaves the zoom as it is; otherwise all of the scene is brought into sight.
function drawScene(keep) {
  const size = canvasSize();
  svg
    .attr("width", size.width)
    .attr("height", size.height)
    .attr("viewBox", `0 0 ${size.width} ${size.height}`);
  const byKey = new Map(scene.nodes.map((node) => [node.key, node]));
  for (const edge of scene.edges) {
    edge.from = byKey.get(edge.source);
    edge.to = byKey.get(edge.target);
  }
  drawEdges();
  drawNodes();
  drawAxis();
  if (!keep) fitScene();
  placeMarks();
  markChosen();
}

function drawEdges() {
  const marks = layers.edges.selectAll("g.edge").data(scene.edges, (edge) => edge.key);
  marks.exit().remove();
  const added = marks.enter().append("g").attr("class", "edge").attr("fill", "none");
  added.append("path").attr("class", "line").attr("stroke-linecap", "butt");
  added.append("path").attr("class", "target").attr("stroke", "transparent").attr("stroke-width", 11);
  added.on("pointerenter", (event, edge) => hoverEdge(event, edge)).on("pointerleave", hideHover);
  const all = added
    .merge(marks)
    .attr("data-name", (edge) => edge.name)
    .attr("data-port", (edge) => edge.port);
  all
    .select("path.line")
    .attr("stroke", (edge) => signColour(edge.weight))
    .attr("stroke-width", (edge) => edge.width)
    .attr("stroke-dasharray", (edge) => DASHES[edge.port] ?? null)
    .attr("stroke-opacity", 0.6);
}

function drawNodes() {
  const marks = layers.nodes.selectAll("path.node").data(scene.nodes, (node) => node.key);
  marks.exit().remove();
  const added = marks
    .enter()
    .append("path")
    .attr("class", "node")
    .attr("tabindex", 0)
    .attr("cursor", "pointer");
  added.on("click", (event, node) => clickNode(node));
  added.on("keydown", (event, node) => {
    if (event.key === "Enter") clickNode(node);
  });
  added.on("pointerenter", (event, node) => hoverNode(event, node)).on("pointerleave", hideHover);
  added
    .merge(marks)
    .order()
    .attr("data-name", (node) => node.name)
    .attr("d", shapeOf)
    .attr("fill", colourOf)
    .attr("stroke", "white")
    .attr("stroke-width", 1);
  const labels = layers.labels.selectAll("text.of-node").data(scene.nodes, (node) => node.key);
  labels.exit().remove();
  const texts = labels.enter().append("text").attr("class", "of-node").attr("pointer-events", "none");
  texts.attr("paint-order", "stroke").attr("stroke", "white").attr("stroke-width", 3).attr("fill", "#222");
  texts.append("tspan").attr("class", "name").attr("font-size", 11);
  texts.append("tspan").attr("class", "second").attr("font-size", 10).attr("fill", "#555");
  const both = texts.merge(labels);
  both.select(".name").text((node) => node.text);
  both.select(".second").text((node) => shorten(node.subtitle, node.room));
  drawEdgeTexts();
}

function drawEdgeTexts() {
  const written = scene.edges.filter((edge) => edge.text);
  const notes = layers.labels.selectAll("text.of-edge").data(written, (edge) => edge.key);
  notes.exit().remove();
  const newNotes = notes
    .enter()
    .append("text")
    .attr("class", "of-edge")
    .attr("font-size", 11)
    .attr("fill", "#555");
  newNotes.merge(notes).text((edge) => edge.text);
}

function shorten(text, room) {
  const letters = [...(text ?? "")];
  return letters.length <= room ? letters.join("") : `${letters.slice(0, room - 1).join("")}…`;
}

// Rows are depth; columns are the tokens of a prompt.
function drawAxis() {
  const rows = layers.axis.selectAll("text.row").data(scene.rows, (row) => row.text);
  rows.exit().remove();
  const added = rows.enter().append("text").attr("class", "row").attr("x", 6);
  added.attr("font-size", 10).attr("fill", "#777").attr("dominant-baseline", "middle");
  added.merge(rows).text((row) => row.text);
  const columns = layers.axis.selectAll("text.column").data(scene.columns, (column) => column.key);
  columns.exit().remove();
  const tokens = columns.enter().append("text").attr("class", "column").attr("text-anchor", "middle");
  tokens.attr("font-size", 12).attr("fill", "#222");
  tokens.merge(columns).text((column) => column.text);
}

// Put marks where the zoom has them. Marks and texts keep their size.
function placeMarks() {
  const view = d3.zoomTransform(svg.node());
  const size = canvasSize();
  for (const node of scene.nodes) {
    node.px = view.applyX(node.x);
    node.py = view.applyY(node.y);
  }
  layers.nodes.selectAll("path.node").attr("transform", (node) => `translate(${node.px},${node.py})`);
  layers.edges.selectAll("g.edge").selectAll("path").attr("d", drawCurve);
  placeLabels(size);
  placeAxis(view, size);
  countOutside(size);
}

// The button says how many nodes are drawn out of sight.
function countOutside(size) {
  const isOutside = (node) => node.px < 0 || node.py < 0 || node.px > size.width || node.py > size.height;
  const outside = scene.nodes.filter(isOutside).length;
  document.getElementById("fit").textContent = outside ? `Fit (${outside} out of sight)` : "Fit";
}

// A curve that leaves its writer upwards and reaches its reader from below. Edges between nodes that stand
// above each other bend aside, and edges by different ports run beside each other.
function drawCurve() {
  const edge = d3.select(this.parentNode).datum();
  const { px: x0, py: y0 } = edge.from;
  const { px: x1, py: y1 } = edge.to;
  const inwards = x0 > canvasSize().width / 2 + 1 ? -1 : 1;
  const aside =
    inwards * Math.max(0, 1 - Math.abs(x1 - x0) / 40) * Math.min(0.22 * Math.abs(y1 - y0), 80) + edge.bend;
  const rise = -Math.max(0.45 * Math.abs(y1 - y0), Math.min(24, 0.12 * Math.abs(x1 - x0)));
  if (edge.straight) return `M${x0},${y0}L${x1},${y1}`;
  return `M${x0},${y0}C${x0 + aside},${y0 + rise} ${x1 + aside},${y1 - rise} ${x1},${y1}`;
}

// Labels of the most important nodes, as many as stand free of other labels and of nodes.
const MOST_LABELS = 250;

function placeLabels(size) {
  if (scene.side) return placeSideLabels();
  const marks = scene.nodes.map((node) => ({ node, ...boxAround(node, node.radius) }));
  const inSight = scene.nodes.filter(
    (node) => node.px > 0 && node.py > 0 && node.px < size.width && node.py < size.height,
  );
  const order = d3
    .sort(inSight, (node) => (node.i === state.chosen ? -Infinity : -node.importance))
    .slice(0, MOST_LABELS);
  const placed = new Map();
  for (const node of order) {
    const isFree = (box) => marks.every((mark) => mark.node === node || !overlap(mark, box));
    const places = labelPlaces(node);
    const place = places.find((one) => isFree(one.box)) ?? (node.i === state.chosen ? places[0] : null);
    if (!place) continue;
    placed.set(node.key, place);
    marks.push({ node: null, ...place.box });
  }
  const texts = layers.labels.selectAll("text.of-node");
  texts.attr("display", (node) => (placed.has(node.key) ? null : "none"));
  const shown = texts.filter((node) => placed.has(node.key));
  shown.attr("text-anchor", (node) => placed.get(node.key).anchor);
  shown.attr("transform", (node) => `translate(${placed.get(node.key).x},${placed.get(node.key).y})`);
  shown.select(".name").attr("x", 0).attr("y", 0);
  shown.select(".second").attr("x", 0).attr("y", 12);
}

function boxAround(node, r) {
  return { left: node.px - r, right: node.px + r, top: node.py - r, bottom: node.py + r };
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

// Where a label may stand: below its node, to the right of it, or above it; the baseline of its first line.
function labelPlaces(node) {
  const subtitle = [...(node.subtitle ?? "")].length;
  const width = 6.3 * Math.max(node.text.length, Math.min(subtitle, node.room)) + 4;
  const height = subtitle ? 25 : 13;
  const place = (anchor, x, top, left) => {
    return { anchor, x, y: top + 10, box: { left, right: left + width, top, bottom: top + height } };
  };
  const centred = (top) => place("middle", node.px, top, node.px - width / 2);
  const beside = node.px + node.radius + 4;
  const all = [
    centred(node.py + node.radius + 1),
    centred(node.py - node.radius - height),
    place("start", beside, node.py - height / 2, beside),
  ];
  return scene.beside || node.beside ? all.reverse() : all;
}

function placeSideLabels() {
  const texts = layers.labels.selectAll("text.of-node").attr("display", null).attr("text-anchor", "start");
  texts.attr("transform", (node) => `translate(${node.px + node.radius + 8},${node.py + 4})`);
  texts.select(".name").attr("x", 0).attr("y", 0);
  texts
    .select(".second")
    .attr("x", (node) => 7 * node.text.length + 10)
    .attr("y", 0);
  const notes = layers.labels.selectAll("text.of-edge");
  notes
    .attr("x", (edge) => (edge.from.px + edge.to.px) / 2 + 16)
    .attr("y", (edge) => (edge.from.py + edge.to.py) / 2 + 4);
}

function placeAxis(view, size) {
  let free = Infinity; // rows are listed upwards
  const rows = layers.axis.selectAll("text.row");
  rows
    .attr("y", (row) => view.applyY(row.y))
    .attr("display", (row) => {
      const y = view.applyY(row.y);
      const isShown = y < free - 12 && y > 8 && y < size.height - 8;
      if (isShown) free = y;
      return isShown ? null : "none";
    });
  let right = -Infinity;
  const columns = layers.axis.selectAll("text.column").attr("y", size.height - 8);
  columns
    .attr("x", (column) => view.applyX(column.x))
    .attr("display", (column) => {
      const x = view.applyX(column.x);
      const half = 4 * column.text.length;
      const isShown = x - half > right && x > 0 && x < size.width;
      if (isShown) right = x + half;
      return isShown ? null : "none";
    });
}

// Bring all of a scene into sight.
function fitScene() {
  if (!scene.nodes.length) return;
  const size = canvasSize();
  const [left, right] = d3.extent(scene.nodes, (node) => node.x);
  const [top, bottom] = d3.extent(scene.nodes, (node) => node.y);
  const margin = { x: scene.rows.length ? 90 : 70, y: 45 };
  const across = (size.width - 2 * margin.x) / Math.max(right - left, 1);
  const down = (size.height - 2 * margin.y) / Math.max(bottom - top, 1);
  const scale = Math.min(across, down, scene.largest ?? 1);
  const shift = d3.zoomIdentity.translate(size.width / 2, size.height / 2).scale(scale);
  svg.call(zoom.transform, shift.translate(-(left + right) / 2, -(top + bottom) / 2));
}

// Bring one node into the middle if it is out of sight.
function showNode(i) {
  const node = scene.nodes.find((one) => one.i === i);
  if (!node) return;
  const size = canvasSize();
  const isVisible = node.px > 20 && node.px < size.width - 20 && node.py > 20 && node.py < size.height - 20;
  if (!isVisible) svg.call(zoom.translateTo, node.x, node.y);
}

// The chosen node has a ring, and what it is not joined to fades.
function markChosen() {
  const isJoined = new Set();
  for (const edge of scene.edges) {
    if (edge.from.i === state.chosen) isJoined.add(edge.to.key);
    if (edge.to.i === state.chosen) isJoined.add(edge.from.key);
  }
  const isHere = scene.nodes.some((node) => node.i === state.chosen);
  const fades = isHere && scene.fades;
  const touches = (edge) => edge.from.i === state.chosen || edge.to.i === state.chosen;
  layers.edges.selectAll("g.edge").attr("opacity", (edge) => (!fades || touches(edge) ? 1 : 0.15));
  const stays = (node) => !fades || node.i === state.chosen || isJoined.has(node.key);
  layers.nodes
    .selectAll("path.node")
    .attr("opacity", (node) => (stays(node) ? 1 : 0.3))
    .attr("stroke", (node) => (node.i === state.chosen ? "#222" : "white"))
    .attr("stroke-width", (node) => (node.i === state.chosen ? 2.5 : 1));
  layers.labels.selectAll("text.of-node").attr("opacity", (node) => (stays(node) ? 1 : 0.35));
}

// What stands beside the pointer
function hoverEdge(event, edge) {
  const lines = edge.members.slice(0, 6).map(describeEdge);
  if (edge.members.length > 6) lines.push(`and ${edge.members.length - 6} more`);
  showHover(event, lines);
}

function hoverNode(event, node) {
  showHover(event, [node.name, node.subtitle, ...(node.about ?? [])].filter(Boolean));
}

function describeEdge(e) {
  const parts = [
    `port ${portOf(e)}`,
    `weight ${showNumber(EDGES.weight[e])}`,
    `share ${showShare(EDGES.share[e])}`,
  ];
  if (HAS_INFLUENCE) parts.push(`influence ${showNumber(EDGES.influence[e])}`);
  const ends = `${NODES.name[EDGES.source[e]]} → ${NODES.name[EDGES.target[e]]}`;
  return `${ends}: ${parts.join(", ")}, at ${showCount(EDGES.count[e])} positions`;
}

function showHover(event, lines) {
  const hover = d3.select("#hover").attr("hidden", null);
  hover
    .selectAll("div")
    .data(lines)
    .join("div")
    .text((line) => line);
  const [x, y] = d3.pointer(event, document.getElementById("canvas"));
  const size = canvasSize();
  const box = hover.node().getBoundingClientRect();
  hover.style("left", `${Math.max(0, Math.min(x + 12, size.width - box.width))}px`);
  hover.style("top", `${y + 12 + box.height < size.height ? y + 12 : Math.max(0, y - box.height - 12)}px`);
}

function hideHover() {
  d3.select("#hover").attr("hidden", "");
}
