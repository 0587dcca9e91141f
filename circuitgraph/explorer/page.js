"use strict";
// Joins the controls with the state, and starts the page.

const byId = (id) => document.getElementById(id);

// Search
let matches = [];
let marked = 0;

function drawMatches() {
  const list = byId("found");
  const found = searchNodes(byId("search").value);
  matches = found.slice(0, 12);
  list.replaceChildren();
  list.hidden = byId("search").value.trim() === "";
  matches.forEach((i, place) => {
    const item = element(list, "li", "", "");
    item.role = "option";
    item.ariaSelected = String(place === marked);
    element(item, "b", "", NODES.name[i]);
    const token = NODES.position[i] >= 0 ? `${showToken(NODES.token[i])} at ${NODES.position[i]}` : "";
    element(item, "span", "subtitle", subtitleOf(i) || token);
    item.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      takeMatch(i);
    });
  });
  if (found.length > matches.length)
    element(list, "li", "hint", `and ${showCount(found.length - matches.length)} more`);
  if (!found.length) element(list, "li", "hint", "no node with this name, label or token");
}

function closeSearch() {
  byId("found").hidden = true;
  byId("search").blur();
}

function takeMatch(i) {
  byId("search").value = "";
  closeSearch();
  if (state.view === "path" || state.view === "pinned") state.view = "overview";
  goTo(i);
}

function bindSearch() {
  const field = byId("search");
  field.addEventListener("input", () => {
    marked = 0;
    drawMatches();
  });
  field.addEventListener("blur", () => (byId("found").hidden = true));
  field.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && matches.length) {
      event.preventDefault();
      marked = (marked + step + matches.length) % matches.length;
      drawMatches();
    }
    if (event.key === "Enter" && matches.length) takeMatch(matches[marked]);
  });
}

function takesText(target) {
  return target.matches("textarea, select, input:not([type=checkbox], [type=range])");
}

function bindKeys() {
  document.addEventListener("keydown", (event) => {
    const isTyping = takesText(document.activeElement);
    if (event.key === "/" && !isTyping) {
      event.preventDefault();
      byId("search").focus();
    }
    if (event.key !== "Escape") return;
    hideHover();
    if (isTyping) {
      byId("search").value = "";
      byId("found").hidden = true;
      document.activeElement.blur();
    } else chooseNode(null);
  });
}

// Filters
const nMost = Math.min(N_EDGES, MOST_DRAWN);
const stepOf = (n) => (nMost > 1 ? (100 * Math.log(n)) / Math.log(nMost) : 0);
const edgesOf = (step) => Math.round(nMost ** (step / 100));

function drawChoices(id, names, chosen) {
  const place = byId(id);
  place.replaceChildren();
  for (const name of names) {
    const label = element(place, "label");
    const tick = element(label, "input");
    tick.type = "checkbox";
    tick.value = name;
    tick.checked = chosen.has(name);
    label.append(` ${name}`);
    tick.addEventListener("change", () => {
      if (tick.checked) chosen.add(name);
      else chosen.delete(name);
      show(true);
    });
  }
}

function drawFilters() {
  const filters = state.filters;
  byId("n-edges").value = stepOf(filters.nEdges);
  byId("n-edges-number").value = filters.nEdges;
  byId("features-only").checked = filters.featuresOnly;
  byId("with-first").checked = filters.withFirst;
  byId("layer-from").value = filters.layers[0];
  byId("layer-to").value = filters.layers[1];
  byId("least-count").value = filters.leastCount;
  byId("least-influence").value = filters.leastInfluence;
  drawChoices("kinds", presentKinds(), filters.kinds);
  drawChoices("ports", presentPorts(), filters.ports);
}

function bindNumber(id, set) {
  byId(id).addEventListener("input", () => {
    const value = Number(byId(id).value);
    if (byId(id).value === "" || !Number.isFinite(value) || value < 0) return;
    set(value);
    show(true);
  });
}

function setCount(n) {
  state.filters.nEdges = Math.min(Math.max(1, Math.round(n)), nMost);
}

function bindFilters() {
  bindNumber("n-edges", (step) => {
    setCount(edgesOf(step));
    byId("n-edges-number").value = state.filters.nEdges;
  });
  bindNumber("n-edges-number", (n) => {
    setCount(n);
    byId("n-edges").value = stepOf(state.filters.nEdges);
  });
  bindNumber("layer-from", (layer) => (state.filters.layers[0] = layer));
  bindNumber("layer-to", (layer) => (state.filters.layers[1] = layer));
  bindNumber("least-count", (count) => (state.filters.leastCount = count));
  bindNumber("least-influence", (influence) => (state.filters.leastInfluence = influence));
  bindNumber("per-port", (n) => (state.perPort = Math.max(1, Math.round(n))));
  byId("features-only").addEventListener("change", (event) => {
    state.filters.featuresOnly = event.target.checked;
    show(true);
  });
  byId("with-first").addEventListener("change", (event) => {
    state.filters.withFirst = event.target.checked;
    show(true);
  });
  byId("features-around").addEventListener("change", (event) => {
    state.featuresAround = event.target.checked;
    show();
  });
  byId("colour").addEventListener("change", (event) => {
    state.colour = event.target.value;
    show(true);
  });
  byId("reset").addEventListener("click", () => {
    state.filters = firstFilters();
    drawFilters();
    show(true);
  });
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
}

// Path
function setPathEnd(end, i) {
  state.path[end] = i;
  byId(`path-${end}`).value = NODES.name[i];
  openView("path");
}

function bindPath() {
  const names = byId("names");
  const order = d3.sort(d3.range(N_NODES), (i) => -(NODES.influence[i] ?? 0)).slice(0, 1000);
  for (const i of order) element(names, "option").value = NODES.name[i];
  byId("path").addEventListener("submit", () => {
    for (const end of ["from", "through", "to"]) {
      const name = byId(`path-${end}`).value.trim();
      state.path[end] = nodeOf.get(name) ?? null;
      byId(`path-${end}`).setCustomValidity(name && !nodeOf.has(name) ? "no node has this name" : "");
      byId(`path-${end}`).reportValidity();
    }
    show();
  });
  for (const end of ["from", "through", "to"]) {
    byId(`path-${end}`).addEventListener("input", (event) => event.target.setCustomValidity(""));
  }
}

// The legend explains what the view shows: colours and shapes of nodes, colour, style and width of edges.
function legendItems() {
  const kinds = [...new Set(scene.nodes.map((node) => node.kind))].filter((kind) => kind !== "group");
  const items = [];
  for (const kind of kinds) {
    const fill = state.colour === "kind" ? DATA.colours.kind[kind] : OTHER_COLOUR;
    items.push({ text: kind, shape: SHAPES[kind] ?? d3.symbolCircle, fill });
  }
  if (scene.nodes.some((node) => node.kind === "group"))
    items.push({ text: "group", shape: SHAPES.group, fill: "#444" });
  if (state.colour === "community") {
    const present = new Set(scene.nodes.filter((node) => node.i >= 0).map((node) => NODES.community[node.i]));
    const named = COMMUNITY_COLOURS.map((_, c) => c).filter((c) => present.has(c));
    for (const c of named)
      items.push({ text: `community ${c}`, shape: d3.symbolCircle, fill: communityColour(c) });
    items.push({ text: "other or no community", shape: d3.symbolCircle, fill: OTHER_COLOUR });
  }
  const isShare = state.view === "neighbours" || state.view === "path" || !HAS_INFLUENCE;
  items.push({ text: "raises its reader", stroke: DATA.colours.sign.raises });
  items.push({ text: "lowers it", stroke: DATA.colours.sign.lowers });
  const ports = presentPorts();
  const solid = ports.filter((port) => !DASHES[port]);
  if (solid.length) items.push({ text: `port ${solid.join(", ")}`, stroke: "#3b3b3b", width: 2 });
  for (const port of ports.filter((one) => DASHES[one]))
    items.push({ text: `port ${port}`, stroke: "#3b3b3b", width: 2, dash: DASHES[port] });
  if (scene.edges.some((edge) => edge.port === "all"))
    items.push({ text: "all ports", stroke: "#3b3b3b", width: 2, dash: DASHES.all });
  items.push({ text: isShare ? "width: share of the reader’s port" : "width: influence of the edge" });
  if (["overview", "pinned"].includes(state.view) && HAS_INFLUENCE)
    items.push({ text: "size: influence of the node" });
  return items;
}

function drawLegend() {
  const width = byId("legend").clientWidth || 400;
  const box = d3.select("#legend").selectAll("svg").data([0]).join("svg");
  box.attr("width", width).attr("font-family", FONT).attr("font-size", 11).attr("fill", "#333");
  box.selectAll("g").remove();
  let x = 6;
  let y = 12;
  for (const item of scene.nodes.length ? legendItems() : []) {
    const group = box.append("g");
    const hasMark = Boolean(item.fill || item.stroke);
    if (item.fill)
      group
        .append("path")
        .attr("d", d3.symbol(item.shape, 70)())
        .attr("fill", item.fill)
        .attr("transform", "translate(5,0)");
    if (item.stroke) {
      const line = group
        .append("line")
        .attr("x2", 26)
        .attr("stroke", item.stroke)
        .attr("stroke-width", item.width ?? 4);
      line.attr("stroke-dasharray", item.dash ?? null);
    }
    const from = item.fill ? 14 : hasMark ? 31 : 0;
    const text = group.append("text").attr("x", from).attr("dy", "0.34em").text(item.text);
    const length = from + text.node().getComputedTextLength();
    if (x + length > width) {
      x = 6;
      y += 17;
    }
    group.attr("transform", `translate(${x},${y})`);
    x += length + 16;
  }
  box.attr("height", scene.nodes.length ? y + 9 : 0);
}

// Export: the drawing and its legend, as they are seen
function exportName(what, suffix) {
  const parts = [DATA.file, what];
  if (what === "neighbours") parts.push(NODES.name[state.centre] ?? "");
  if (what === "path" && state.path.to !== null)
    parts.push(`${NODES.name[state.path.from]}-to-${NODES.name[state.path.to]}`);
  const name = parts.filter(Boolean).join("-");
  return `${name.replace(/[^A-Za-z0-9._-]+/g, "_").slice(0, 120)}.${suffix}`;
}

function download(name, content, type) {
  const link = document.createElement("a");
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function drawExport() {
  const size = canvasSize();
  const legend = d3.select("#legend svg");
  const height = size.height + Number(legend.attr("height"));
  const copy = d3.create("svg").attr("xmlns", "http://www.w3.org/2000/svg").attr("font-family", FONT);
  copy.attr("width", size.width).attr("height", height).attr("viewBox", `0 0 ${size.width} ${height}`);
  copy.append("title").text(`${DATA.title}: ${state.view}`);
  copy.append("desc").text(scene.reading);
  copy.append("rect").attr("width", "100%").attr("height", "100%").attr("fill", "white");
  const inner = copy.append(() => svg.node().cloneNode(true)).attr("id", null);
  inner.selectAll("path.target").remove();
  inner.selectAll("[display=none]").remove();
  copy.append(() => legend.node().cloneNode(true)).attr("y", size.height);
  return { text: new XMLSerializer().serializeToString(copy.node()), width: size.width, height };
}

function exportSvg() {
  download(exportName(state.view, "svg"), drawExport().text, "image/svg+xml");
}

function exportPng() {
  const drawn = drawExport();
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * drawn.width;
    canvas.height = 2 * drawn.height;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(exportName(state.view, "png"), blob, "image/png"));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawn.text)}`;
}

function bindButtons() {
  for (const tab of document.querySelectorAll("#tabs button")) {
    tab.addEventListener("click", () => {
      if (tab.dataset.view === "neighbours" && state.chosen !== null) centreOn(state.chosen);
      else openView(tab.dataset.view);
    });
  }
  byId("fit").addEventListener("click", () => {
    const nodes = scene.nodes.filter((node) => node.i >= 0).map((node) => node.i);
    if (state.view === "overview" && nodes.length) setUnit(nodes);
    show();
  });
  byId("svg").addEventListener("click", exportSvg);
  byId("png").addEventListener("click", exportPng);
  byId("view-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) loadNotes(file);
  });
  new ResizeObserver(() => show(true)).observe(byId("canvas"));
  window.addEventListener("resize", () => show());
}

function drawOrigin() {
  for (const [heading, text] of DATA.origin) {
    element(byId("origin"), "dt", "", heading);
    element(byId("origin"), "dd", "", text);
  }
  element(byId("origin"), "dt", "", "page");
  element(byId("origin"), "dd", "", DATA.left_out.join(" "));
}

function start() {
  state.filters = firstFilters();
  const hasCommunities = NODES.community.some((community) => community >= 0);
  for (const name of hasCommunities ? ["community", "kind"] : ["kind"])
    element(byId("colour"), "option", "", name).value = name;
  state.colour = byId("colour").value;
  for (const id of ["features-only", "features-around"])
    byId(id).parentElement.hidden = !NODES.kind.includes("feature");
  byId("with-first").parentElement.hidden = !DATA.is_prompt;
  byId("colour").parentElement.hidden = !hasCommunities;
  byId("filters").open = window.innerWidth >= 1000 && window.innerHeight >= 700;
  recallNotes();
  drawFilters();
  bindSearch();
  bindKeys();
  bindFilters();
  bindPath();
  bindButtons();
  drawOrigin();
  drawCard();
  drawPins();
  setUnit(firstNodes());
  show();
}

start();
