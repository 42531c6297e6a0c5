const PROMPT = 0, LENGTH = 2;  // Forest.finish
const ENDS = ["prompt", "stop token", "token limit", "branches"];
const PAGE = 200;  // children built at once, so that a wide star does not freeze the page
const TICK = "✓", CROSS = "✗";

const shown = { tree: null, root: 0, nodes: [], max: 0, chain: false, selected: -1 };
const items = new Map();  // key of an outline item → its <li>, once built

const piecesText = (pieces) => pieces.map((p) => (isNumber(p[1]) ? p[0] : p)).join("");
const oneLine = (text, length) => text.slice(0, length).replace(/\s*\n\s*/g, " ↵ ");
const nodeText = (n) => piecesText(shown.tree.text[n]);
const isLeaf = (n) => !shown.tree.children[n].length;
// In a chain the probes only estimate a value; the trunk is what trains.
const isProbe = (n) => shown.chain && shown.tree.in_value[n] && !shown.tree.trained[n];
// Credit of a node; prompts and probes get none.
const credit = (n) => (shown.tree.parent[n] < 0 || isProbe(n) ? null : shown.tree.advantage[n]);

function outcome(n) {
  const { reward, finish } = shown.tree, r = reward[n], cut = finish[n] === LENGTH ? " cut" : "";
  if (isNumber(r)) return (r >= 1 ? TICK + " " : r <= 0 ? CROSS + " " : "") + +r.toFixed(2) + cut;
  return isLeaf(n) && finish[n] !== PROMPT ? "ungraded" + cut : "";
}

// Tint an element by an advantage; its sign is always written next to it or in it.
function tint(node, advantage, classes) {
  const t = isNumber(advantage) && shown.max ? Math.min(1, Math.abs(advantage) / shown.max) : 0;
  const depth = t > 0.875 ? " high" : t > 0.575 ? " mid" : "";  // where black and white text swap
  node.setAttribute("class", `${classes} ${advantage < 0 ? "neg" : "pos"}${depth}`);
  node.style.setProperty("--t", (100 * t).toFixed(0) + "%");
  node.style.setProperty("--wash", (42 * t).toFixed(0) + "%");
  return node;
}

function pathOf(n) {
  const path = [];
  for (; n >= 0; n = shown.tree.parent[n]) path.unshift(n);
  return path;
}

function mean(numbers) {
  const finite = numbers.filter(isNumber);
  return finite.length ? finite.reduce((a, b) => a + b) / finite.length : null;
}

// The outline.

function itemsUnder(n) {
  const kids = shown.tree.children[n], probes = kids.filter(isProbe);
  const nodes = kids.filter((c) => !isProbe(c)).map((c) => ({ key: "n" + c, node: c }));
  return probes.length ? [{ key: "p" + n, probes }, ...nodes] : nodes;
}

const childItems = (item) => (item.probes
  ? item.probes.map((c) => ({ key: "n" + c, node: c })) : itemsUnder(item.node));

function buildItem(item, level) {
  const { tree } = shown, n = item.node, cells = [];
  if (item.probes) {
    const value = fixed(mean(item.probes.map((c) => tree.value[c])));
    cells.push(el("span", { class: "text quiet" }, `${item.probes.length} probes, mean ${value}`));
  } else {
    const chip = el("span", {}, isNumber(credit(n)) ? signed(credit(n)) : "");
    cells.push(el("span", { class: "text" }, oneLine(nodeText(n), 240) || "(empty)"),
      tint(chip, credit(n), isNumber(credit(n)) ? "num chip" : "num"),
      el("span", { class: "num wide" }, fixed(tree.value[n])),
      el("span", { class: "num wide" }, String(tree.tokens[n])),
      el("span", { class: "ends" }, outcome(n)));
  }
  const twisty = el("span", { class: "twisty", "aria-hidden": "true" });
  const row = el("div", { class: "row" + (isProbe(n) ? " probe" : "") }, ...cells);
  const li = el("li", { role: "treeitem", tabindex: -1, "aria-selected": "false" }, row);
  li.setAttribute("aria-level", level);
  cells[0].prepend(twisty);
  cells[0].style.setProperty("--level", level - 1);
  Object.assign(li, { item, level });
  if (childItems(item).length) li.setAttribute("aria-expanded", "false");
  items.set(item.key, li);
  return li;
}

function addPage(group, list, level) {
  const built = group.querySelectorAll(":scope > li:not(.more)").length;
  group.append(...list.slice(built, built + PAGE).map((item) => buildItem(item, level)));
  const left = list.length - built - PAGE;
  if (left <= 0) return;
  const button = el("button", {}, `Show more (${left} left)`);
  const more = el("li", { class: "more", role: "none" }, button);
  more.next = () => { more.remove(); addPage(group, list, level); };
  button.addEventListener("click", more.next);
  group.append(more);
}

function open(li) {
  if (li.getAttribute("aria-expanded") !== "false") return;
  const list = childItems(li.item), group = el("ul", { role: "group" });
  li.setAttribute("aria-expanded", "true");
  // The trunk of a chain runs straight down instead of one step in per segment.
  const trunk = shown.chain && li.item.node !== undefined && shown.tree.parent[li.item.node] >= 0;
  addPage(group, list, li.level + (trunk ? 0 : 1));
  li.append(group);
  for (const item of list)
    if (trunk && !item.probes && items.has(item.key)) open(items.get(item.key));
}

function close(li) {
  if (li.getAttribute("aria-expanded") !== "true") return;
  for (const inner of li.querySelectorAll("li")) if (inner.item) items.delete(inner.item.key);
  li.lastElementChild.remove();
  li.setAttribute("aria-expanded", "false");
}

const toggleItem = (li) => (li.getAttribute("aria-expanded") === "false" ? open(li) : close(li));

function openAll() {
  const queue = [items.get("n" + shown.root)];
  while (queue.length) {
    const li = queue.pop();
    if (!li.item.probes) open(li);
    queue.push(...[...li.querySelectorAll(":scope > ul > li")].filter((c) => c.item));
  }
}

// Open what leads to a node and return its <li>.
function reveal(n) {
  for (const step of pathOf(n)) {
    const parent = shown.tree.parent[step];
    if (parent < 0) continue;
    open(items.get("n" + parent));
    const above = items.get((isProbe(step) ? "p" : "n") + parent);
    open(above);
    while (!items.has("n" + step)) above.querySelector(":scope > ul > .more").next();
  }
  return items.get("n" + n);
}

function focusItem(li, move = true) {
  for (const old of $("outline").querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
  li.tabIndex = 0;
  if (move) {
    li.focus({ preventScroll: true });
    li.firstElementChild.scrollIntoView({ block: "nearest" });
  }
  if (li.item.node !== undefined) select(li.item.node);
}

function onOutlineKey(event) {
  const li = event.target.closest("[role=treeitem]");
  if (!li || event.target.tagName === "BUTTON") return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const visible = [...$("outline").querySelectorAll("[role=treeitem]")], at = visible.indexOf(li);
  const isOpen = li.getAttribute("aria-expanded");
  let to;
  if (event.key === "ArrowDown") to = visible[at + 1];
  else if (event.key === "ArrowUp") to = visible[at - 1];
  else if (event.key === "Home") to = visible[0];
  else if (event.key === "End") to = visible.at(-1);
  else if (event.key === "ArrowRight" && isOpen === "true") to = visible[at + 1];
  else if (event.key === "ArrowRight") open(li);
  else if (event.key === "ArrowLeft" && isOpen === "true") close(li);
  else if (event.key === "ArrowLeft") to = li.parentElement.closest("[role=treeitem]");
  else if (event.key === "Enter" || event.key === " ") toggleItem(li);
  else return;
  event.preventDefault();
  if (to) focusItem(to);
}

// The chooser.

function extreme(sign) {
  const score = (n) => (isNumber(credit(n)) ? sign * credit(n) : -Infinity);
  return shown.nodes.reduce((best, n) => (score(n) > score(best) ? n : best), shown.root);
}

function showRoot(tree, root) {
  const nodes = tree.byRoot.get(root);
  Object.assign(shown, { tree, root, nodes, selected: -1,
    chain: nodes.some((n) => tree.parent[n] >= 0 && tree.trained[n] && !tree.in_value[n]) });
  shown.max = nodes.reduce((max, n) => Math.max(max, Math.abs(credit(n) ?? 0)), 1e-6);
  items.clear();
  const probes = nodes.filter(isProbe);
  const leaves = nodes.filter((n) => isNumber(tree.reward[n]) && !isProbe(n));
  const trained = nodes.filter((n) => tree.trained[n]), answer = tree.answers[tree.prompt[root]];
  const flat = trained.filter((n) => Math.abs(tree.advantage[n]) <= 1e-6);
  const right = leaves.filter((n) => tree.reward[n] > 0).length;
  const facts = [[String(nodes.length - 1 - probes.length), "segments"]];
  if (probes.length) facts.push([String(probes.length), "probes"]);
  facts.push([`${right} of ${leaves.length}`, "trajectories rewarded"],
    [`${flat.length} of ${trained.length}`, "trained segments with zero advantage"],
    [fixed(tree.temperature, 1), "temperature"]);
  if (answer !== undefined) facts.push([oneLine(answer, 80), "expected answer"]);
  $("summary").replaceChildren(...facts.map(([figure, text]) =>
    el("span", {}, el("b", {}, figure), " " + text)));
  $("scale").hidden = shown.max <= 1e-6;
  $("scale").replaceChildren(signed(-shown.max), ...[-1, -0.6, -0.3, 0, 0.3, 0.6, 1].map((t) =>
    tint(el("i"), t * shown.max, "cellbox")), signed(shown.max));
  const top = buildItem({ key: "n" + root, node: root }, 1);
  $("outline").replaceChildren(top);
  open(top);
  $("hint").hidden = !nodes.some((n) => tree.text[n].some((p) => isNumber(p[1])));
  drawMap();
  focusItem(reveal(extreme(1)), false);
}

function prepare(tree) {
  tree.children = tree.parent.map(() => []);
  tree.byRoot = new Map();
  const rootOf = [];
  tree.parent.forEach((p, n) => {
    rootOf[n] = p < 0 ? n : rootOf[p];
    if (p < 0) tree.byRoot.set(n, []);
    else tree.children[p].push(n);
    tree.byRoot.get(rootOf[n]).push(n);
  });
}

function drawTrees() {
  $("trees").hidden = false;
  const choices = [];
  for (const tree of data.trees) {
    prepare(tree);
    const group = el("optgroup", { label: tree.title });
    for (const root of tree.byRoot.keys()) {
      const value = isNumber(tree.value[root]) ? ` · value ${fixed(tree.value[root])} ·` : " ·";
      const text = oneLine(piecesText(tree.text[root]).trim(), 70);
      const title = `${tree.prompt[root] + 1}${value}  ${text}`;
      group.append(el("option", { value: choices.length }, title));
      choices.push([tree, root]);
    }
    $("chooser").append(group);
  }
  const go = (i) => {
    $("chooser").value = i;
    $("previous").disabled = i === 0;
    $("next").disabled = i === choices.length - 1;
    showRoot(...choices[i]);
  };
  $("chooser").addEventListener("change", () => go(+$("chooser").value));
  $("previous").addEventListener("click", () => go(+$("chooser").value - 1));
  $("next").addEventListener("click", () => go(+$("chooser").value + 1));
  $("gain").addEventListener("click", () => focusItem(reveal(extreme(1))));
  $("loss").addEventListener("click", () => focusItem(reveal(extreme(-1))));
  $("expand").addEventListener("click", openAll);
  $("collapse").addEventListener("click", () => {
    const top = items.get("n" + shown.root);
    close(top);
    open(top);
    focusItem(top, false);
  });
  $("outline").addEventListener("keydown", onOutlineKey);
  $("outline").addEventListener("click", (event) => {
    const li = event.target.closest("[role=treeitem]");
    if (!li || event.target.tagName === "BUTTON") return;
    if (event.target.closest(".twisty") || li.item.probes)
      toggleItem(li);
    focusItem(li);
  });
  const cellOf = (event) => event.target.getAttribute("data-n");
  $("map").addEventListener("click", (event) => {
    if (cellOf(event)) focusItem(reveal(+cellOf(event)), false);
  });
  $("map").addEventListener("pointermove", (event) => {
    if (!cellOf(event)) return hideTip();
    const n = +cellOf(event), { tree } = shown;
    showTip(event.clientX, event.clientY, el("div", { class: "tiphead" },
      `advantage ${signed(credit(n))}, value ${fixed(tree.value[n])}, ${tree.tokens[n]} tokens`),
    el("div", {}, oneLine(nodeText(n), 140)));
  });
  $("path").addEventListener("pointerover", (event) => {
    const p = event.target.getAttribute("data-p");
    p ? showTip(event.clientX, event.clientY, `probability ${p}`) : hideTip();
  });
  for (const host of ["map", "path"]) $(host).addEventListener("pointerleave", hideTip);
  let width = 0;
  new ResizeObserver(() => {
    if (width === (width = $("map").clientWidth)) return;
    drawMap();
    markPath();
  }).observe($("map"));
  go(0);
}

if (data.trees.some((tree) => tree.parent.length)) drawTrees();
