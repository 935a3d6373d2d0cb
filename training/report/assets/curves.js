// Curves: one SVG per panel, drawn at its real width; a crosshair under the pointer says the numbers.
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

// Numbers as they were stored; what stands in a legend says it whole under the pointer.
const exact = value => (value === null || value === undefined || Number.isNaN(value) ? "none" : typeof value === "number" ? String(value) : typeof value === "string" ? value : JSON.stringify(value));

// Three figures after the point; a letter or a power of ten for what is large or tiny. Whole numbers as they are.
function short(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size >= 1e15 || size < 1e-3) return value.toExponential(3);
  for (const [least, unit, name] of [[1e12, 1e12, "T"], [1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]]) if (size >= least) return (value / unit).toFixed(3) + name;
  return size < 0.1 ? value.toPrecision(3) : value.toFixed(3);
}

// The same on an axis, without zeros at the end.
const brief = value => short(Number(value.toPrecision(6))).replace(/(\.\d*?)0+(?=$|[a-zA-Z])/, "$1").replace(/\.(?=$|[a-zA-Z])/, "");

// Round numbers between two others; `least`: apart.
function ticks(low, high, count, least = 0) {
  const rough = Math.max((high - low) / Math.max(count, 1), least), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0, mass = 0;
  return values.map(value => {
    if (Number.isNaN(value)) return NaN;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

function range(numbers, empty) {
  let low = Infinity, high = -Infinity;
  for (const value of numbers) if (!Number.isNaN(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  return low > high ? empty : [low, high];
}

// A line through the points, broken where there is no value.
function line(steps, values, x, y) {
  let path = "", open = false;
  values.forEach((value, i) => {
    if (!Number.isNaN(value)) path += `${open ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    open = !Number.isNaN(value);
  });
  return path;
}

// A ring around every point, or around what stands alone.
function rings(steps, values, every, x, y) {
  const alone = i => Number.isNaN(values[i - 1] ?? NaN) && Number.isNaN(values[i + 1] ?? NaN);
  return values.map((value, i) => Number.isNaN(value) || !(every || alone(i)) ? "" : `M${(x(steps[i]) - 2.5).toFixed(1)} ${y(value).toFixed(1)}a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0`).join("");
}

function valueAt(points, step) {
  let found = NaN;
  for (let i = points.steps.lastIndexOf(step); i >= 0 && points.steps[i] === step && Number.isNaN(found); i--) found = points.values[i];
  return found;
}

const MOST_KEYS = 12;

// series: [{label, key, color, dash, rings, points, last}]; a target is a dashed line across.
function drawPanel(holder, title, series, target, weight) {
  const at = holder.step ?? null, focused = holder.contains(document.activeElement);
  const svg = shape("svg", {role: "img", "aria-label": named(title), tabindex: "0"}), keys = element("div", {class: "keys"});
  const width = Math.max(holder.clientWidth - 24, 160), height = 190;
  const box = {left: 54, right: 10, top: 8, bottom: 22};
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  let [first, last] = range(series.flatMap(one => one.points.steps), [0, 1]);
  if (first === last) last = first + 1;
  const stride = Math.max(1, Math.ceil((last - first) / (width - box.left - box.right)));
  const drawn = series.map(one => {
    const {steps, values} = one.points, shown = smoothed(values, one.rings ? 0 : weight);
    return {...one, shown: stride > 1 ? thinned(steps, shown, stride) : {steps, values: shown}};
  });
  let [low, high] = range(drawn.flatMap(one => one.shown.values).concat(target === null ? [] : [target]), [0, 1]);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const x = step => box.left + (step - first) / (last - first) * (width - box.left - box.right);
  const y = value => height - box.bottom - (value - low) / (high - low) * (height - box.top - box.bottom);
  for (const value of ticks(low, high, 5)) {
    svg.append(shape("line", {class: "axis", x1: box.left, x2: width - box.right, y1: y(value), y2: y(value)}));
    const label = shape("text", {class: "tick", x: box.left - 5, y: Math.max(y(value) + 4, 10), "text-anchor": "end"});
    label.textContent = brief(value);
    svg.append(label);
  }
  for (const step of ticks(first, last, width / 90, 1)) {
    svg.append(shape("line", {class: "axis", x1: x(step), x2: x(step), y1: height - box.bottom, y2: height - box.bottom + 4}));
    const label = shape("text", {class: "tick steps", x: x(step), y: height - 6, "text-anchor": x(step) > width - 22 ? "end" : "middle"});
    label.textContent = step;
    svg.append(label);
  }
  if (target !== null) svg.append(shape("line", {class: "target", x1: box.left, x2: width - box.right, y1: y(target), y2: y(target)}));
  for (const one of drawn) {
    const {steps, values} = one.shown, curve = shape("path", {class: "curve", d: line(steps, values, x, y), "data-label": one.label, "stroke-dasharray": one.dash});
    const points = shape("path", {class: "curve points", d: rings(steps, values, one.rings, x, y), "data-of": one.label});
    curve.style.stroke = points.style.stroke = one.color;
    svg.append(curve, points);
  }
  const cross = shape("line", {class: "cross", y1: box.top, y2: height - box.bottom, visibility: "hidden"});
  svg.append(cross);
  holder.replaceChildren(element("h4", {dir: "auto", text: named(title)}), svg, keys);
  legend(holder, keys, drawn, target, cross, x);
  // What steps there are is not asked before a pointer comes.
  let known = null;
  const all = () => known ??= [...new Set(series.flatMap(one => one.points.steps))].sort((a, b) => a - b);
  const near = event => {
    const place = svg.getBoundingClientRect(), wanted = first + ((event.clientX - place.left) / place.width * width - box.left) / (width - box.left - box.right) * (last - first);
    holder.show(all().reduce((best, step) => Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best, all()[0] ?? null));
  };
  svg.onpointermove = near;
  svg.onpointerdown = near;
  svg.onpointerleave = () => holder.show(null);
  svg.onkeydown = event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key], steps = all();
    if (!move || !steps.length) return;
    event.preventDefault();
    event.stopPropagation();
    const now = holder.step ?? null, place = now === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(now);
    holder.show(steps[Math.min(Math.max(place + move, 0), steps.length - 1)]);
  };
  if (focused) svg.focus({preventScroll: true});
  svg.onblur = () => { if (svg.isConnected) holder.show(null); };
  holder.show(at);
}

// holder.show(step) moves the crosshair there and says the numbers; null: the last ones. Many curves are named by their metrics.
function legend(holder, keys, drawn, target, cross, x) {
  holder.show = step => {
    holder.step = step;
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) { cross.setAttribute("x1", x(step)); cross.setAttribute("x2", x(step)); }
    const many = drawn.length > MOST_KEYS && step === null;
    const shown = many ? [...new Map(drawn.map(one => [one.key, {...one, label: one.key}])).values()] : drawn;
    keys.replaceChildren(...(step === null ? [] : [element("span", {}, "step ", element("b", {text: step}))]), ...shown.map(one => {
      const value = step === null ? one.last : valueAt(one.points, step), swatch = element("span", {class: "swatch"});
      swatch.style.borderTopColor = many ? "currentColor" : one.color;
      if (one.dash !== "none") swatch.style.borderTopStyle = "dashed";
      const none = value === null || Number.isNaN(value);
      return element("span", {}, swatch, many ? named(one.label) : one.label + " ", ...(many ? [] : [element("b", {text: none ? "none" : short(value), title: exact(value)})]));
    }), ...(target === null ? [] : [element("span", {text: "target " + exact(target)})]));
  };
}

function drawBars(holder, title, labels, counts) {
  holder.replaceChildren(element("h4", {dir: "auto", text: named(title)}));
  const width = Math.max(holder.clientWidth - 24, 160), height = 190, top = Math.max(...counts, 1), wide = (width - 20) / counts.length;
  const svg = shape("svg", {role: "img", "aria-label": named(title), viewBox: `0 0 ${width} ${height}`});
  counts.forEach((count, i) => {
    const tall = count / top * (height - 46), bar = shape("rect", {class: "bars", x: 10 + i * wide + 1, width: Math.max(wide - 2, 1), y: height - 22 - tall, height: tall});
    const name = shape("title", {});
    name.textContent = named(`${labels[i]}: ${count}`);
    bar.append(name);
    svg.append(bar);
    if (counts.length <= 8 || i % Math.ceil(counts.length / 6) === 0) {
      const label = shape("text", {class: "tick", x: 10 + i * wide + wide / 2, y: height - 7, "text-anchor": "middle"});
      label.textContent = named(labels[i]);
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
