// Hover details: reads the points of the lines from the SVG and shows the values nearest to the pointer.
"use strict";
const SCALE = 100000;
const FORMATS = {
  loss: v => Math.abs(v) < 1e6 ? v.toFixed(4) : v.toExponential(4),
  percent: v => (100 * v).toFixed(2) + "%",
  power: v => v === 0 ? "0" : v.toExponential(3),
  whole: v => Math.round(v).toLocaleString("en-US"),
  short: v => {
    if (Math.abs(v) >= 1e15) return v.toExponential(2);
    for (const suffix of ["", "k", "M", "G", "T"]) {
      if (Math.abs(v) < 1000 || suffix === "T") return String(+v.toPrecision(4)) + suffix;
      v /= 1000;
    }
  },
};
function element(parent, tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}
for (const area of document.querySelectorAll(".area")) {
  const svg = area.querySelector("svg");
  const [x0, x1] = svg.dataset.x.split(",").map(Number), [y0, y1] = svg.dataset.y.split(",").map(Number);
  const format = FORMATS[svg.dataset.value];
  let lines = null;
  const cursor = element(area, "div", "cursor"), tip = element(area, "div", "tip");
  const read = line => line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number));
  const hide = () => { cursor.style.display = tip.style.display = "none"; };
  area.addEventListener("pointerleave", hide);
  const show = event => {
    lines ??= [...svg.querySelectorAll("[data-name]")].map(line => [line, read(line)]);
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)), x = share * SCALE;
    const found = lines.map(([line, points]) => [line, nearest(points, x)]);
    if (!found.length) return;
    // The line with the point nearest to the pointer gives the place; sparse lines are named if they are near it.
    const place = found.reduce((a, b) => Math.abs(a[1][0] - x) <= Math.abs(b[1][0] - x) ? a : b)[1][0];
    tip.textContent = "";
    element(tip, "div", "", svg.dataset.xName + " " + FORMATS.whole(x0 + (x1 - x0) * place / SCALE));
    for (const [line, point] of found) {
      if (Math.abs(point[0] - place) > SCALE / 60) continue;
      const height = y0 + (1 - point[1] / SCALE) * (y1 - y0), row = element(tip, "div", "");
      element(row, "i", "").style.background = getComputedStyle(line).stroke;
      row.append(line.dataset.name + " ");
      element(row, "b", "", format(svg.dataset.log === "1" ? 10 ** height : height));
    }
    const distance = mark => Math.abs(parseFloat(mark.getAttribute("d").slice(1)) - x);
    const near = [...svg.querySelectorAll("[data-text]")].filter(mark => distance(mark) <= SCALE / 120).slice(0, 3);
    for (const mark of near) element(tip, "div", "", mark.dataset.text);
    tip.classList.toggle("wide", near.length > 0);
    cursor.style.display = tip.style.display = "block";
    cursor.style.left = 100 * place / SCALE + "%";
    const left = place / SCALE * box.width, width = tip.offsetWidth;
    tip.style.left = Math.max(0, left + 12 + width > box.width ? left - 12 - width : left + 12) + "px";
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
}
