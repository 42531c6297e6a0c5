// The reader: facts of the selected node, and its path from the prompt as text.
function pieceNode(piece) {
  if (!isNumber(piece[1])) return piece;
  // A line break has no width to underline, so it gets a sign.
  return el("u", { "data-p": piece[1] }, /^[\r\n]/.test(piece[0]) ? "↵" + piece[0] : piece[0]);
}

function select(n) {
  const { tree } = shown, old = items.get("n" + shown.selected);
  if (old) old.setAttribute("aria-selected", "false");
  shown.selected = n;
  items.get("n" + n)?.setAttribute("aria-selected", "true");
  const role = tree.parent[n] < 0 ? "prompt" : isProbe(n) ? "probe"
    : tree.trained[n] ? "trained" : "not trained";
  const facts = [["Advantage", signed(credit(n), 3)], ["Value", fixed(tree.value[n], 3)],
    ["Reward", isNumber(tree.reward[n]) ? outcome(n) : "–"], ["Ends", ENDS[tree.finish[n]]],
    ["Tokens", String(tree.tokens[n])], ["Role", role]];
  if (tree.weight[n] !== 1) facts.push(["Weight", String(tree.weight[n])]);
  if (tree.born[n] >= 0) facts.push(["Weights version", String(tree.born[n])]);
  $("facts").replaceChildren(...facts.map(([name, fact]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, fact))));
  $("path").replaceChildren(...pathOf(n).map((step) => {
    const body = tree.text[step].map(pieceNode);
    if (tree.parent[step] < 0) return el("p", { class: "prompt" }, ...body);
    const sign = el("button", { tabindex: -1, title: "Select this segment",
      onclick: () => focusItem(reveal(step)) }, isProbe(step) ? "probe" : signed(credit(step)));
    tint(sign, credit(step), "chip");
    const classes = step === n ? "segment current" : "segment";
    return tint(el("span", {}, sign, ...body), credit(step), classes);
  }), ...(isLeaf(n) && outcome(n) ? [el("p", { class: "verdict" }, "Reward " + outcome(n))] : []));
  markPath();
}
