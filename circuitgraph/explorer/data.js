"use strict";
// The tables of the graph, and questions that they answer. Nodes and edges are numbers: rows of a table.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NODES = DATA.nodes;
const EDGES = DATA.edges;
const N_NODES = NODES.name.length;
const N_EDGES = EDGES.source.length;
const HAS_INFLUENCE = EDGES.influence !== null;

const nodeOf = new Map(NODES.name.map((name, i) => [name, i]));
const parentEdges = NODES.name.map(() => []); // edges into each node, the largest share first
const childEdges = NODES.name.map(() => []); // edges out of each node, the largest influence first

for (let e = 0; e < N_EDGES; e++) {
  parentEdges[EDGES.target[e]].push(e);
  childEdges[EDGES.source[e]].push(e); // the table is ordered by influence already
}
for (const edges of parentEdges) {
  edges.sort((a, b) => EDGES.share[b] - EDGES.share[a] || a - b);
}

// Influence, or share in a graph that has no influence.
function strengthOf(e) {
  return HAS_INFLUENCE ? EDGES.influence[e] : EDGES.share[e];
}

function portOf(e) {
  return DATA.ports[EDGES.port[e]];
}

function edgeName(e) {
  const port = portOf(e);
  const suffix = ["q", "k", "v"].includes(port) ? `<${port}>` : "";
  return `${NODES.name[EDGES.source[e]]}->${NODES.name[EDGES.target[e]]}${suffix}`;
}

// What stands beside a node's name: its short name, its label or its token.
function subtitleOf(i) {
  if (NODES.short_name[i] || NODES.label[i]) return NODES.short_name[i] || NODES.label[i];
  const isToken = ["embed", "pos_embed", "logits"].includes(NODES.kind[i]);
  return isToken && NODES.token[i] ? showToken(NODES.token[i]) : "";
}

// A token with its spaces and line breaks made visible.
function showToken(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎");
}

// Nodes that a text is found in, the best first: name, then start of a name, then anywhere.
function searchNodes(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const found = [];
  for (let i = 0; i < N_NODES; i++) {
    const name = NODES.name[i].toLowerCase();
    const texts = [name, NODES.label[i], NODES.short_name[i], NODES.token[i]];
    if (!texts.some((one) => one.toLowerCase().includes(wanted))) continue;
    let rank = 3;
    if (name === wanted) rank = 0;
    else if (name.startsWith(wanted)) rank = 1;
    else if (NODES.token[i].trim().toLowerCase() === wanted) rank = 2;
    found.push({ i, rank });
  }
  found.sort((a, b) => a.rank - b.rank || (NODES.influence[b.i] ?? 0) - (NODES.influence[a.i] ?? 0));
  return found.map((one) => one.i);
}

// The first `n` edges of each port.
function firstByPort(edges, n) {
  const taken = new Map();
  return edges.filter((e) => {
    const count = taken.get(EDGES.port[e]) ?? 0;
    taken.set(EDGES.port[e], count + 1);
    return count < n;
  });
}

// The path from one node to another with the largest product of shares, as edges; null where there is none.
// Edges point forward in the order of nodes, so one pass over the nodes in between finds it.
function strongestPath(from, to) {
  const best = new Map([[from, 1]]);
  const last = new Map();
  for (let i = from; i < to; i++) {
    if (!best.has(i)) continue;
    for (const e of childEdges[i]) {
      const product = best.get(i) * EDGES.share[e];
      const target = EDGES.target[e];
      if (product > (best.get(target) ?? 0)) {
        best.set(target, product);
        last.set(target, e);
      }
    }
  }
  if (from !== to && !last.has(to)) return null;
  const path = [];
  for (let i = to; i !== from; i = EDGES.source[path[0]]) path.unshift(last.get(i));
  return path;
}

function productOfShares(path) {
  return path.reduce((product, e) => product * EDGES.share[e], 1);
}

// What a table holds under the name of a node, which may be any string.
function lookUp(table, i) {
  return Object.hasOwn(table, NODES.name[i]) ? table[NODES.name[i]] : undefined;
}

// Numbers as texts.
function showNumber(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return d3.format(".2~e")(x).replace("−", "-");
  return d3.format(".3~r")(x).replace("−", "-");
}

function showShare(x) {
  if (x > 0 && x < 0.001) return "<0.1 %";
  return `${(100 * x).toFixed(1)} %`;
}

function showCount(n) {
  return d3.format(",")(n);
}
