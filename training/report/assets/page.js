// Draws what there is: results, curves, rollouts, settings; and again when more comes.
"use strict";

const TOP = "at a glance";
const of = id => document.getElementById(id);
const color = i => `var(--c${i % 8})`, dashes = ["none", "6 3", "2 3", "9 3 2 3"];
const named = name => visible(name).shown;

function table(head, rows) {
  const cell = value => value instanceof Node ? element("td", {}, value) : typeof value === "number" ? element("td", {class: "number", title: exact(value), text: short(value)})
    : element("td", {dir: "auto", text: visible(exact(value)).shown});
  const made = element("table", {class: "numbers"}, element("thead", {}, element("tr", {}, ...head.map(text => element("th", {text: named(text)})))));
  for (const row of rows) made.append(element("tr", {}, ...row.map(cell)));
  return element("div", {class: "wide"}, made);
}

function ago(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 100 ? `${s} s` : s < 6000 ? `${Math.round(s / 60)} min` : s < 2e5 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

class Page {
  constructor(source) {
    this.source = source;
    this.title = "";
    this.runs = [];
    this.bars = [];
    this.panels = new Map();
    this.hidden = new Set();
    this.groups = new Map();
    this.holders = new Map();
    this.width = 0;
    this.viewer = new Viewer(this, source);
  }

  // -- results

  results() {
    const body = of("results-body"), names = [...new Set(this.runs.flatMap(run => Object.keys(run.summary)))];
    const live = this.source.live;
    of("results").hidden = !live && !names.length;
    if (of("results").hidden) return;
    const after = name => name.replace(/_before$/, "_after"), plain = name => name.replaceAll("_", " ");
    const pairs = names.filter(name => name.endsWith("_before") && names.includes(after(name))).flatMap(name => [name, after(name)]);
    const columns = [...pairs, ...names.filter(name => !pairs.includes(name))];
    const now = live ? ["reward/mean", "kl/ref"].filter(key => this.runs.some(run => run.series.has(key))) : [];
    const cells = this.runs.map((run, i) => [
      this.link(run, i), ...(live ? [element("span", {class: "state", "data-run": i})] : []),
      ...[...now.map(key => run.value(key)), ...columns.map(name => run.summary[name] ?? null)].map(value => live && value === null ? new Text("") : value),
    ]);
    const open = new Set([...body.querySelectorAll("details[open]")].map(one => one.dataset.name));
    body.replaceChildren(table(["run", ...(live ? ["state"] : []), ...now, ...columns.map(plain)], cells));
    this.runs.forEach((run, i) => {
      for (const note of run.notes) body.append(element("p", {class: "error", dir: "auto", text: named(`${run.name}: ${note}`)}));
      if (!run.examples.length) return;
      const more = element("details", {"data-name": i, ...(open.has(String(i)) ? {open: ""} : {})}, element("summary", {text: named(`${run.name}: responses at the first and the last step`)}));
      more.append(table(["step", "reward", "prompt", "response"], run.examples));
      body.append(more);
    });
    this.states();
  }

  // The run's name, in its color where there are several.
  link(run, i) {
    const made = element("span", {class: "run", dir: "auto"}, named(run.name));
    if (this.runs.length > 1) made.prepend(this.swatch(i));
    return made;
  }

  swatch(i) {
    const made = element("span", {class: "swatch"});
    made.style.borderTopColor = color(i);
    return made;
  }

  states() {
    for (const cell of document.querySelectorAll(".state")) {
      const run = this.runs[cell.dataset.run], steps = run.last === null ? "" : `, step ${run.last}${run.total ? ` of ${run.total}` : ""}`;
      cell.textContent = named(run.state) + steps + (run.written && !/^finished/.test(run.state) ? `, ${ago(Date.now() - run.written)} ago` : "");
      cell.dataset.state = run.state.split(" ")[0];
    }
    const link = of("link");
    link.hidden = !this.source.live || this.source.connected;
    link.textContent = "The server does not answer: it was stopped, or the tunnel is gone. Trying again.";
  }

  // -- curves

  curves() {
    of("curves").hidden = !this.panels.size && !this.bars.length;
    const drawn = this.runs.map((run, i) => i).filter(i => this.runs[i].series.size), many = drawn.length > 1;
    of("legend").replaceChildren(...(many ? drawn : []).map(i => element("button", {type: "button", "aria-pressed": String(!this.hidden.has(i)), title: "show or hide", onclick: () => {
      this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i);
      this.curves();
    }}, this.swatch(i), named(this.runs[i].name))));
    for (const panel of [...this.panels.values()].sort((a, b) => a.rank - b.rank)) {
      this.place(panel.group, panel.title, panel.keys, panel.rank, holder => {
        const series = drawn.filter(r => !this.hidden.has(r)).flatMap(r => panel.keys.map((key, k) => ({
          key, label: named(many ? `${key} · ${this.runs[r].name}` : key), color: color(many ? r : k), dash: dashes[(many ? k + Math.floor(r / 8) : Math.floor(k / 8)) % 4],
          rings: sparse(key), points: this.runs[r].points(key), last: this.runs[r].value(key),
        }))).filter(one => one.points.steps.length);
        drawPanel(holder, panel.title, series, panel.target, Number(of("smooth").value));
      });
    }
    this.bars.forEach((bars, i) => this.place(TOP, bars.title, [], i, holder => drawBars(holder, bars.title, bars.labels, bars.counts)));
    this.width = of("panels").clientWidth;
    this.find();
  }

  place(group, title, keys, rank, draw) {
    if (!this.groups.has(group)) {
      const grid = element("div", {class: "panels"}), said = element("span", {class: "hint"}), made = element("details", {class: "group"}, element("summary", {}, element("h3", {text: group}), said), grid);
      this.groups.set(group, {made, grid, said, rank, open: group === TOP});
      made.ontoggle = () => {
        const one = this.groups.get(group);
        if (!of("find").value.trim()) one.open = made.open;
        if (made.open) this.draw();
      };
      of("panels").append(...[...this.groups.values()].sort((a, b) => a.rank - b.rank).map(one => one.made));
    }
    const {grid} = this.groups.get(group), name = group + "\n" + title;
    if (!this.holders.has(name)) {
      const holder = Object.assign(element("div", {class: "panel"}), {group, rank});
      this.holders.set(name, holder);
      const next = [...grid.children].find(other => other.rank > rank);
      next ? grid.insertBefore(holder, next) : grid.append(holder);
    }
    Object.assign(this.holders.get(name), {title_: title, keys, draw});
  }

  // What is looked for is unfolded, all else is hidden; without words, groups are as they were left.
  find() {
    const words = of("find").value.trim().toLowerCase();
    let count = 0;
    for (const [group, one] of this.groups) {
      const panels = [...one.grid.children];
      for (const panel of panels) panel.hidden = words !== "" && ![group, panel.title_, ...panel.keys].join("\n").toLowerCase().includes(words);
      const shown = panels.filter(panel => !panel.hidden);
      count += shown.length;
      one.made.hidden = !shown.length;
      one.made.open = words ? true : one.open;
      one.said.textContent = panels.map(panel => panel.title_).map(named).join(" · ");
    }
    of("found").textContent = words ? `${count} of ${this.holders.size} panels` : "";
    this.told();
    this.draw();
  }

  told() { of("fold").textContent = [...this.groups.values()].every(one => one.open) ? "fold" : "unfold all"; }

  fold() {
    const open = ![...this.groups.values()].every(one => one.open);
    for (const [group, one] of this.groups) one.open = open || group === TOP;
    this.find();
  }

  draw() {
    for (const holder of this.holders.values()) if (!holder.hidden && this.groups.get(holder.group).made.open) holder.draw(holder);
  }

  // -- settings

  settings() {
    const body = of("settings-body"), open = new Map([...body.children].map(one => [one.dataset.name, one.open]));
    body.replaceChildren(...this.runs.flatMap((run, i) => {
      if (!run.config && !Object.keys(run.versions).length) return [];
      const versions = Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ");
      const shown = open.get(String(i)) ?? this.runs.length === 1;
      return [element("details", {"data-name": i, ...(shown ? {open: ""} : {})}, element("summary", {text: named(run.name)}), ...(versions ? [element("p", {class: "hint", text: named(versions)})] : []),
        element("pre", {text: run.config.replace(/[^\n\t]+/g, part => visible(part).shown)}))];
    }));
    of("settings").hidden = !body.children.length;
  }

  // -- all

  async update() {
    document.title = of("title").textContent = named(this.title);
    this.results();
    this.curves();
    this.settings();
    of("viewer").hidden = !this.runs.some(run => run.heads.step.length);
    await this.viewer.update();
  }

  theme() {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  }

  help() {
    const list = of("help").querySelector("dl");
    list.replaceChildren(...this.keys().filter(([, said]) => said).flatMap(([keys, said]) => [element("dt", {}, ...keys.map(key => element("kbd", {text: key === "ArrowLeft" ? "←" : key === "ArrowRight" ? "→" : key}))), element("dd", {text: said})]));
    of("help").showModal();
  }

  // [keys, what they do, how]
  keys() {
    const view = this.viewer, focus = id => { of(id).scrollIntoView({block: "center"}); of(id).focus(); };
    return this.known ??= [
      [["j", "n"], "next sample", () => view.move(view.at + 1)],
      [["k", "p"], "previous sample", () => view.move(view.at - 1)],
      [["[", "]"], "step before, step after", key => view.moveStep(key === "]" ? 1 : -1)],
      [["ArrowLeft", "ArrowRight"], "token before, token after", key => view.moveToken(key === "ArrowRight" ? 1 : -1)],
      [["c"], "next color", () => view.nextColor()],
      [["/"], "search the samples", () => focus("search")],
      [["m"], "find a metric", () => focus("find")],
      [["o"], "unfold or fold all groups of curves", () => this.fold()],
      [["t"], "light or dark", () => this.theme()],
      [["?"], "this list", () => this.help()],
      [["Escape"], "", () => view.hide()],
    ];
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || of("help").open || event.defaultPrevented) return;
    if (event.target.closest("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
    const found = this.keys().find(([keys]) => keys.includes(event.key));
    if (!found) return;
    event.preventDefault();
    found[2](event.key);
  }

  async begin() {
    of("theme").onclick = () => this.theme();
    of("keys").onclick = () => this.help();
    of("fold").onclick = () => this.fold();
    of("smooth").oninput = () => this.draw();
    of("find").oninput = () => this.find();
    document.addEventListener("keydown", event => this.key(event));
    new ResizeObserver(() => {
      if (of("panels").clientWidth === this.width) return;
      this.width = of("panels").clientWidth;
      requestAnimationFrame(() => this.draw());
    }).observe(of("panels"));
    await this.source.begin(this);
    await this.update();
    document.body.dataset.ready = "true";
    if (!this.source.live) return;
    let due = false;
    const news = () => {
      if (due) return;
      due = true;
      requestAnimationFrame(async () => { due = false; await this.update(); });
    };
    setInterval(() => this.states(), 1000);
    this.source.follow(news);
  }
}

const page = new Page(of("index") ? new Stored() : new Followed());
page.begin();
