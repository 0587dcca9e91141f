"use strict";
// What the reader adds: pinned nodes, groups of them with a name, and notes. It is kept by the browser,
// under the hash of the graph, and can be saved to a file.

const FORMAT = "circuitgraph-view";
const notes = { pinned: [], groups: [], texts: new Map() };
const ticked = new Set(); // pinned nodes that are ticked for a group

function togglePin(i) {
  if (notes.pinned.includes(i)) unpin(i);
  else notes.pinned.push(i);
  notesChanged();
}

function unpin(i) {
  notes.pinned = notes.pinned.filter((one) => one !== i);
  ticked.delete(i);
  for (const group of notes.groups) group.members = group.members.filter((one) => one !== i);
  notes.groups = notes.groups.filter((group) => group.members.length);
  state.group = null;
}

function groupTicked() {
  const field = document.getElementById("group-name");
  const members = notes.pinned.filter((i) => ticked.has(i));
  const name = field.value.trim();
  if (members.length < 2 || !name) {
    say(members.length < 2 ? "Tick two pinned nodes at least." : "Give the group a name.");
    return;
  }
  for (const group of notes.groups) group.members = group.members.filter((i) => !ticked.has(i));
  notes.groups = notes.groups.filter((group) => group.members.length);
  notes.groups.push({ name, members, note: "" });
  ticked.clear();
  state.group = null;
  notesChanged();
}

function ungroup(group) {
  notes.groups = notes.groups.filter((one) => one !== group);
  state.group = null;
  notesChanged();
}

function notesChanged() {
  keepNotes();
  drawPins();
  drawCard();
  if (state.view === "pinned") show();
}

// What is saved names nodes, so that it can be read and edited.
function writeNotes() {
  const nameOf = (i) => NODES.name[i];
  return {
    format: FORMAT,
    version: 1,
    graph: DATA.hash,
    title: DATA.title,
    pinned: notes.pinned.map(nameOf),
    groups: notes.groups.map((group) => ({ ...group, members: group.members.map(nameOf) })),
    notes: Object.fromEntries([...notes.texts].map(([i, text]) => [nameOf(i), text])),
  };
}

// Take over what was saved. Names that this graph lacks are left out; their number is returned.
function readNotes(saved) {
  if (saved?.format !== FORMAT) throw new Error("it is not a view that this page saved");
  let lost = 0;
  const find = (names) => {
    const known = (Array.isArray(names) ? names : []).filter((name) => nodeOf.has(name));
    lost += (names?.length ?? 0) - known.length;
    return known.map((name) => nodeOf.get(name));
  };
  const pinned = find(saved.pinned);
  const groups = (saved.groups ?? []).map((group) => {
    return { name: String(group.name), members: find(group.members), note: String(group.note ?? "") };
  });
  const texts = Object.entries(saved.notes ?? {}).filter(([name]) => nodeOf.has(name));
  const members = groups.flatMap((group) => group.members);
  notes.pinned = [...new Set([...pinned, ...members])];
  notes.groups = groups.filter((group) => group.members.length);
  notes.texts = new Map(texts.map(([name, text]) => [nodeOf.get(name), String(text)]));
  ticked.clear();
  state.group = null;
  return lost;
}

function keepNotes() {
  try {
    localStorage.setItem(`${FORMAT}-${DATA.hash}`, JSON.stringify(writeNotes()));
  } catch {
    // A browser may forbid it; the file remains.
  }
}

function recallNotes() {
  try {
    const kept = localStorage.getItem(`${FORMAT}-${DATA.hash}`);
    if (kept) readNotes(JSON.parse(kept));
  } catch {
    // What can't be read is as if it were not there.
  }
}

async function loadNotes(file) {
  try {
    const saved = JSON.parse(await file.text());
    const lost = readNotes(saved);
    const other = saved.graph === DATA.hash ? "" : ", which was saved for another graph";
    const missing = lost ? ` ${lost} of its names are not in this graph.` : "";
    say(`Loaded ${file.name}${other}.${missing}`);
    notesChanged();
    openView("pinned");
  } catch (error) {
    say(`${file.name} can't be loaded: ${error.message}.`);
  }
}

function say(text) {
  document.getElementById("said").textContent = text;
}

// The list of pins
function drawPins() {
  const place = document.getElementById("pins");
  const said = document.getElementById("said")?.textContent ?? "";
  place.replaceChildren();
  element(place, "h2", "", `Pinned: ${notes.pinned.length}`);
  const list = element(place, "ul", "pinned");
  for (const [g, group] of notes.groups.entries()) drawGroupRow(list, group, g);
  const grouped = new Set(notes.groups.flatMap((group) => group.members));
  for (const i of notes.pinned.filter((one) => !grouped.has(one))) drawPinRow(list, i);
  if (notes.pinned.length >= 2) drawGrouping(place);
  const actions = element(place, "div", "actions");
  button(
    actions,
    "Save",
    () => download(exportName("pins", "json"), JSON.stringify(writeNotes(), null, 1), "application/json"),
    "Save pins, groups and notes to a file",
  );
  button(
    actions,
    "Load",
    () => document.getElementById("view-file").click(),
    "Load a file that was saved here",
  );
  element(place, "p", "hint", said).id = "said";
}

function drawGrouping(place) {
  const row = element(place, "div", "actions");
  const name = element(row, "input");
  name.id = "group-name";
  name.placeholder = "name of the group";
  button(row, "Group ticked", groupTicked);
}

function drawPinRow(list, i) {
  const row = element(list, "li");
  const tick = element(row, "input");
  tick.type = "checkbox";
  tick.checked = ticked.has(i);
  tick.setAttribute("aria-label", `Tick ${NODES.name[i]} for a group`);
  tick.addEventListener("change", () => (tick.checked ? ticked.add(i) : ticked.delete(i)));
  button(row, NODES.name[i], () => goTo(i)).className = "node";
  const text = notes.texts.get(i) || subtitleOf(i);
  element(row, "span", "subtitle", text);
  button(row, "×", () => togglePin(i), "Unpin").className = "close";
}

function drawGroupRow(list, group, g) {
  const row = element(list, "li", "group");
  button(row, group.name, () => openGroup(g)).className = "node";
  element(row, "span", "subtitle", group.note || countOf(group.members, "node"));
  button(row, "×", () => ungroup(group), "Ungroup").className = "close";
}

function openGroup(g) {
  state.chosen = null;
  state.group = g;
  markChosen();
  drawCard();
}

function drawGroupCard(card, group) {
  const head = element(card, "div", "head");
  element(head, "h2", "", group.name);
  button(head, "×", () => chooseNode(null), "Close (Escape)").className = "close";
  const note = element(card, "textarea", "note");
  note.placeholder = "note";
  note.value = group.note;
  note.addEventListener("change", () => {
    group.note = note.value;
    notesChanged();
  });
  const list = element(card, "ul", "pinned");
  for (const i of group.members) {
    const row = element(list, "li");
    button(row, NODES.name[i], () => goTo(i)).className = "node";
    element(row, "span", "subtitle", subtitleOf(i));
  }
}

function drawNote(card, i) {
  const note = element(card, "textarea", "note");
  note.placeholder = "note";
  note.rows = 1;
  note.value = notes.texts.get(i) ?? "";
  note.setAttribute("aria-label", `Note on ${NODES.name[i]}`);
  note.addEventListener("change", () => {
    if (note.value) notes.texts.set(i, note.value);
    else notes.texts.delete(i);
    if (note.value && !notes.pinned.includes(i)) notes.pinned.push(i);
    keepNotes();
    drawPins();
  });
}
