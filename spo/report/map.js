// The map of a tree: across runs the tokens, down run the trajectories.
function drawMap() {
  const { tree, root, nodes } = shown, drawn = nodes.filter((n) => n !== root && !isProbe(n));
  const top = new Map(), bottom = new Map(), start = new Map([[root, 0]]);
  let rows = 0;
  const place = [[root, false]];
  while (place.length) {  // depth first, without recursion: chains may be long
    const [n, done] = place.pop(), kids = tree.children[n].filter((c) => !isProbe(c));
    if (done) { bottom.set(n, rows); continue; }
    top.set(n, rows);
    place.push([n, true]);
    if (!kids.length) rows += 1;
    for (const c of kids.slice().reverse()) place.push([c, false]);
  }
  for (const n of drawn) {
    const above = tree.parent[n];
    start.set(n, above === root ? 0 : start.get(above) + tree.tokens[above]);
  }
  const longest = Math.max(1, ...drawn.map((n) => start.get(n) + tree.tokens[n]));
  const width = Math.max(200, $("map").clientWidth - 4), h = Math.max(3, Math.min(20, 300 / rows));
  const gap = h > 5 ? 1 : h > 3.5 ? 0.5 : 0, unit = (width - 26) / longest;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${rows * h}`, height: rows * h, role: "img",
    "aria-label": "Map of the tree; the list below holds the same nodes" });
  shown.cells = new Map();
  for (const n of drawn) {
    const x = start.get(n) * unit, w = Math.max(2, tree.tokens[n] * unit - gap);
    const y = top.get(n) * h, tall = Math.max(0.5, (bottom.get(n) - top.get(n)) * h - gap);
    const cell = svg("rect", { x, y, width: w, height: tall, "data-n": n });
    plot.append(tint(cell, credit(n), "cell"));
    shown.cells.set(n, cell);
    if (w > 48 && tall > 12) plot.append(tint(svg("text", { x: x + 8, y: y + tall / 2 + 4 },
      signed(credit(n))), credit(n), "celltext"));
    if (isLeaf(n) && isNumber(tree.reward[n])) {
      const right = tree.reward[n] > 0, sign = right ? TICK : CROSS, end = x + w + 4;
      if (h >= 11) plot.append(svg("text", { class: "mapend", x: end, y: y + tall / 2 + 4 }, sign));
      else if (right)
        plot.append(svg("rect", { class: "mapdot", x: end, y, width: 5, height: tall }));
    }
  }
  shown.outlines = plot.appendChild(svg("g"));
  $("map").replaceChildren(plot);
}

function markPath() {
  const drawn = pathOf(shown.selected).filter((n) => shown.cells.has(n));
  shown.outlines.replaceChildren(...drawn.map((n) => {
    const copy = shown.cells.get(n).cloneNode();
    copy.setAttribute("class", n === shown.selected ? "picked" : "onpath");
    return copy;
  }));
  const picked = shown.cells.get(shown.selected), map = $("map");
  if (!picked) return;
  const y = +picked.getAttribute("y"), height = map.clientHeight;
  if (y < map.scrollTop || y > map.scrollTop + height) map.scrollTop = y - height / 2;
}
