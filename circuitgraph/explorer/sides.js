"use strict";
// Two graphs side by side. A click on a node shows its partner, a click on a community its nodes in both.

const page = JSON.parse(document.getElementById("data").textContent);
const SIZE = { width: 640, height: 560, margin: 34 };
const circles = [[], []];
const lines = [[], []];

function byId(name) {
  return document.getElementById(name);
}

function draw(parent, tag, attributes, text) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  if (text !== undefined) shape.textContent = text;
  parent.append(shape);
  return shape;
}

function write(parent, tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

// A function that maps the numbers of an axis to pixels.
function scale(values, from, to) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  return value => from + (to - from) * (value - low) / span;
}

function colourOf(node) {
  const community = page.communities[node.match];
  return community ? community.colour : "#ffffff";
}

function drawGraph(side) {
  const { nodes, edges, name } = page.sides[side];
  const svg = byId(`graph-${side}`);
  svg.setAttribute("viewBox", `0 0 ${SIZE.width} ${SIZE.height}`);
  byId(`name-${side}`).textContent = name;
  const x = scale(nodes.map(node => node.x), SIZE.margin, SIZE.width - SIZE.margin);
  const y = scale(nodes.map(node => node.y), SIZE.height - SIZE.margin, SIZE.margin);
  for (const edge of edges) {
    const [from, to] = [nodes[edge.source], nodes[edge.target]];
    const ends = { x1: x(from.x), y1: y(from.y), x2: x(to.x), y2: y(to.y) };
    const sign = edge.weight < 0 ? "lowers" : "raises";
    lines[side].push(draw(svg, "line", { ...ends, class: sign, "stroke-width": 0.5 + 4 * edge.width }));
  }
  nodes.forEach((node, place) => {
    const circle = draw(svg, "circle", {
      cx: x(node.x), cy: y(node.y), r: 6, fill: colourOf(node),
      tabindex: 0, role: "button", "aria-label": node.name, "data-name": node.name,
    });
    draw(circle, "title", {}, node.name);
    circle.addEventListener("click", () => chooseNode(side, place));
    circle.addEventListener("keydown", event => {
      if (event.key === "Enter") chooseNode(side, place);
    });
    circles[side].push(circle);
  });
}

function writeCard(side, place) {
  const card = byId(`card-${side}`);
  card.replaceChildren();
  if (place === null) return;
  const node = page.sides[side].nodes[place];
  write(card, "h3", node.name);
  const community = node.community < 0 ? "in no community" : `community ${node.community}`;
  write(card, "p", node.label ? `${community}; ${node.label}` : community);
  if (!node.contexts.length) return;
  write(card, "div", "Most active on the marked words:");
  const list = write(card, "ol", "");
  for (const [before, word, after] of node.contexts) {
    const item = write(list, "li", `${before} `);
    write(item, "mark", word);
    item.append(` ${after}`);
  }
}

// Which nodes stand out: a place for each side or null, or a rule for nodes.
function mark(chosen, isNear) {
  for (const side of [0, 1]) {
    const { nodes, edges } = page.sides[side];
    circles[side].forEach((circle, place) => {
      circle.classList.toggle("chosen", place === chosen[side]);
      circle.classList.toggle("far", !isNear(nodes[place]));
    });
    lines[side].forEach((line, i) => {
      const ends = [edges[i].source, edges[i].target];
      line.classList.toggle("near", ends.includes(chosen[side]));
    });
  }
}

function chooseNode(side, place) {
  const node = page.sides[side].nodes[place];
  const chosen = side === 0 ? [place, node.partner] : [node.partner, place];
  pressButton(null);
  mark(chosen, () => true);
  writeCard(0, chosen[0]);
  writeCard(1, chosen[1]);
  byId("match").textContent = node.says;
}

function pressButton(pressed) {
  for (const button of byId("communities").children) {
    button.setAttribute("aria-pressed", button === pressed);
  }
}

function drawCommunities() {
  page.communities.forEach((community, number) => {
    const button = write(byId("communities"), "button", "");
    const dot = write(button, "span", "");
    dot.className = "dot";
    dot.style.background = community.colour;
    button.append(community.text);
    button.setAttribute("aria-pressed", false);
    button.addEventListener("click", () => {
      pressButton(button);
      mark([null, null], node => node.match === number);
      writeCard(0, null);
      writeCard(1, null);
      byId("match").textContent = community.says;
    });
  });
}

drawGraph(0);
drawGraph(1);
drawCommunities();
