// Curves: one SVG per panel, drawn at its real width; a crosshair under the pointer says the exact numbers.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "text") made.textContent = value;
    else if (key in made && typeof value === "function") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Numbers as they were stored. Axis labels and legends are shortened; what stands in a legend says it whole under the pointer.
const exact = value => (value === null || value === undefined ? "none" : typeof value === "number" ? String(value) : typeof value === "string" ? value : JSON.stringify(value));

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0, mass = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

// series: [{label, color, dash, steps, values}]; a target is a dashed line across.
function drawPanel(holder, title, series, target, weight) {
  holder.replaceChildren(element("h3", {text: title}));
  const svg = shape("svg", {role: "img", "aria-label": title, tabindex: "0"});
  holder.append(svg);
  const width = Math.max(holder.clientWidth - 24, 160), height = 190;
  const box = {left: 50, right: 8, top: 8, bottom: 22};
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const drawn = series.map(one => ({...one, shown: smoothed(one.values, weight)}));
  const points = drawn.flatMap(one => one.shown.filter(value => value !== null)).concat(target === null ? [] : [target]);
  const steps = drawn.flatMap(one => one.steps);
  let [low, high] = [points.reduce((a, b) => Math.min(a, b), Infinity), points.reduce((a, b) => Math.max(a, b), -Infinity)];
  if (!points.length) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  let [first, last] = [steps.reduce((a, b) => Math.min(a, b), Infinity), steps.reduce((a, b) => Math.max(a, b), -Infinity)];
  if (first === last) last = first + 1;
  const x = step => box.left + (step - first) / (last - first) * (width - box.left - box.right);
  const y = value => height - box.bottom - (value - low) / (high - low) * (height - box.top - box.bottom);
  for (const value of ticks(low, high, 5)) {
    svg.append(shape("line", {class: "axis", x1: box.left, x2: width - box.right, y1: y(value), y2: y(value)}));
    const label = shape("text", {class: "tick", x: box.left - 5, y: y(value) + 4, "text-anchor": "end"});
    label.textContent = short(value);
    svg.append(label);
  }
  for (const step of ticks(first, last, width / 90).filter(Number.isInteger)) {
    const label = shape("text", {class: "tick", x: x(step), y: height - 6, "text-anchor": "middle"});
    label.textContent = step;
    svg.append(label);
  }
  if (target !== null) svg.append(shape("line", {class: "target", x1: box.left, x2: width - box.right, y1: y(target), y2: y(target)}));
  for (const one of drawn) {
    let path = "", open = false;
    one.shown.forEach((value, i) => {
      if (value === null) { open = false; return; }
      path += `${open ? "L" : "M"}${x(one.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      open = true;
      // A ring where no line would lead to or from: an evaluation every few steps.
      if ((one.shown[i - 1] ?? null) === null && (one.shown[i + 1] ?? null) === null) path += "m-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0";
    });
    const curve = shape("path", {class: "curve", d: path, "data-label": one.label, "stroke-dasharray": one.dash});
    curve.style.stroke = one.color;
    svg.append(curve);
  }
  const keys = element("div", {class: "keys"});
  holder.append(keys);
  const cross = shape("line", {class: "cross", y1: box.top, y2: height - box.bottom, visibility: "hidden"});
  svg.append(cross);
  const all = [...new Set(steps)].sort((a, b) => a - b);
  let at = null;
  const show = step => {
    at = step;
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) { cross.setAttribute("x1", x(step)); cross.setAttribute("x2", x(step)); }
    keys.replaceChildren(...drawn.map(one => {
      const place = step === null ? one.values.length - 1 : one.steps.indexOf(step);
      const swatch = element("span", {class: "swatch"});
      swatch.style.borderTopColor = one.color;
      if (one.dash !== "none") swatch.style.borderTopStyle = "dashed";
      return element("span", {}, swatch, one.label + " ", element("b", {text: place < 0 || one.values[place] === null ? "none" : short(one.values[place]), title: place < 0 ? "none" : exact(one.values[place])}));
    }), ...(target === null ? [] : [element("span", {text: "target " + exact(target)})]), ...(step === null ? [] : [element("span", {text: "step " + step})]));
  };
  const near = event => {
    const wanted = first + ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width * width - box.left) / (width - box.left - box.right) * (last - first);
    show(all.reduce((best, step) => Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best, all[0]));
  };
  svg.onpointermove = near;
  svg.onpointerdown = near;
  svg.onpointerleave = () => show(null);
  svg.onblur = () => show(null);
  svg.onkeydown = event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const place = at === null ? (move > 0 ? -1 : all.length) : all.indexOf(at);
    show(all[Math.min(Math.max(place + move, 0), all.length - 1)]);
  };
  show(null);
}

function drawBars(holder, title, labels, counts) {
  holder.replaceChildren(element("h3", {text: title}));
  const width = Math.max(holder.clientWidth - 24, 160), height = 190, top = Math.max(...counts, 1), wide = (width - 20) / counts.length;
  const svg = shape("svg", {role: "img", "aria-label": title, viewBox: `0 0 ${width} ${height}`});
  counts.forEach((count, i) => {
    const tall = count / top * (height - 46), bar = shape("rect", {class: "bars", x: 10 + i * wide + 1, width: Math.max(wide - 2, 1), y: height - 22 - tall, height: tall});
    const name = shape("title", {});
    name.textContent = `${labels[i]}: ${count}`;
    bar.append(name);
    svg.append(bar);
    if (counts.length <= 8 || i % Math.ceil(counts.length / 6) === 0) {
      const label = shape("text", {class: "tick", x: 10 + i * wide + wide / 2, y: height - 7, "text-anchor": "middle"});
      label.textContent = labels[i];
      svg.append(label);
    }
    if (counts.length <= 8) {
      const number = shape("text", {class: "tick", x: 10 + i * wide + wide / 2, y: height - 26 - tall, "text-anchor": "middle"});
      number.textContent = count;
      svg.append(number);
    }
  });
  holder.append(svg);
}
