// Unpacks what the page holds (gzip in base64, no network) and draws it: results, curves, viewer, settings.
"use strict";

async function unpack(id) {
  const text = document.getElementById(id).textContent, bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function themeButton() {
  const root = document.documentElement, button = document.getElementById("theme");
  button.onclick = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };
}

function table(head, rows) {
  const made = element("table", {class: "numbers"});
  made.append(element("thead", {}, element("tr", {}, ...head.map(text => element("th", {text})))));
  const cell = value => typeof value === "number" ? element("td", {class: "number", title: exact(value), text: short(value)})
    : element("td", {dir: "auto", text: visible(exact(value)).shown});
  for (const row of rows) made.append(element("tr", {}, ...row.map(cell)));
  return element("div", {class: "wide"}, made);
}

function results(page) {
  const body = document.getElementById("results-body"), names = [...new Set(page.runs.flatMap(run => Object.keys(run.summary)))];
  if (!names.length) return;
  document.getElementById("results").hidden = false;
  const pairs = names.filter(name => name.endsWith("_before") && names.includes(name.replace(/_before$/, "_after")));
  const head = ["run"], cells = page.runs.map(run => [run.name]);
  for (const name of pairs) {
    head.push(name.replaceAll("_", " "), name.replace(/_before$/, "_after").replaceAll("_", " "));
    page.runs.forEach((run, i) => cells[i].push(run.summary[name] ?? null, run.summary[name.replace(/_before$/, "_after")] ?? null));
  }
  const paired = new Set(pairs.flatMap(name => [name, name.replace(/_before$/, "_after")]));
  for (const name of names.filter(one => !paired.has(one))) {
    head.push(name.replaceAll("_", " "));
    page.runs.forEach((run, i) => cells[i].push(run.summary[name] ?? null));
  }
  body.append(table(head, cells));
  for (const run of page.runs) {
    if (!run.examples.length) continue;
    const more = element("details", {}, element("summary", {text: `${run.name}: responses at the first and the last step`}));
    more.append(table(["step", "reward", "prompt", "response"], run.examples));
    body.append(more);
  }
}

function curves(page) {
  const holder = document.getElementById("panels"), smooth = document.getElementById("smooth"), color = i => `var(--c${i % 8})`;
  if (!page.panels.length && !page.bars.length) return;
  document.getElementById("curves").hidden = false;
  const many = page.runs.filter(run => run.metrics.step.length).length > 1;
  if (many) document.getElementById("legend").append(...page.runs.map((run, i) => {
    const swatch = element("span", {class: "swatch"});
    swatch.style.borderTopColor = color(i);
    return element("span", {}, swatch, run.name + "  ");
  }));
  const dashes = ["none", "6 3", "2 3", "9 3 2 3"];
  const made = page.panels.map(panel => {
    const series = page.runs.flatMap((run, r) => panel.keys.map((key, k) => ({
      label: many ? `${key} · ${run.name}` : key, color: color(many ? r : k), dash: many ? dashes[k % 4] : "none", steps: run.metrics.step, values: run.metrics.columns[key],
    }))).filter(one => one.values);
    return [element("div", {class: "panel"}), holderOf => drawPanel(holderOf, panel.title, series, panel.target, Number(smooth.value))];
  }).concat(page.bars.map(bars => [element("div", {class: "panel"}), holderOf => drawBars(holderOf, bars.title, bars.labels, bars.counts)]));
  holder.append(...made.map(([panel]) => panel));
  const draw = () => made.forEach(([panel, into]) => into(panel));
  let width = 0, due = 0;
  new ResizeObserver(() => {
    if (holder.clientWidth === width) return;
    width = holder.clientWidth;
    cancelAnimationFrame(due);
    due = requestAnimationFrame(draw);
  }).observe(holder);
  smooth.oninput = draw;
}

function settings(page) {
  const body = document.getElementById("settings-body");
  for (const run of page.runs) {
    if (!run.config && !Object.keys(run.versions).length) continue;
    document.getElementById("settings").hidden = false;
    const versions = Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ");
    body.append(element("details", {open: ""}, element("summary", {text: run.name}), element("p", {class: "hint", text: versions}), element("pre", {text: run.config})));
  }
}

unpack("index").then(async page => {
  document.getElementById("title").textContent = page.title;
  themeButton();
  results(page);
  curves(page);
  settings(page);
  if (page.runs.some(run => run.heads.step.length)) {
    document.getElementById("viewer").hidden = false;
    await new Viewer(page, unpack).chooseRun();
  }
  document.body.dataset.ready = "true";
});
