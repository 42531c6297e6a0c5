"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Strings among the children become text nodes, so no text can turn into markup.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const isNumber = (x) => typeof x === "number";  // NaN travels as null
const fixed = (x, digits = 2) => (isNumber(x) ? x.toFixed(digits).replace("-", "−") : "–");
const signed = (x, digits = 2) => (isNumber(x) && x > 0 ? "+" : "") + fixed(x, digits);
const percent = (x) => fixed(100 * x, 1) + " %";
const compact = (x) => {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(x) >= size) return +(x / size).toPrecision(3) + unit;
  const short = +x.toPrecision(3), small = x && Math.abs(x) < 1e-3;
  return (small ? short.toExponential() : String(short)).replaceAll("-", "−");
};
const duration = (s) =>
  s >= 5400 ? +(s / 3600).toPrecision(3) + " h" : s >= 90 ? +(s / 60).toPrecision(3) + " min"
    : +s.toPrecision(3) + " s";

function showTip(x, y, ...children) {
  const tip = $("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8);
  const above = y + 18 + tip.offsetHeight > innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, above ? y - tip.offsetHeight - 12 : y + 18) + "px";
}
const hideTip = () => { $("tip").hidden = true; };
addEventListener("scroll", hideTip, true);
