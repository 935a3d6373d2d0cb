// The rollout viewer: pick a sample, see every token colored by a quantity, with the stored numbers on hover. What models
// wrote only ever becomes text nodes.
"use strict";

const ORDERS = {
  "as stored": null,
  "worst reward": ["reward", 1],
  "best reward": ["reward", -1],
  "largest KL": ["kl", -1],
  "largest gap": ["gap", -1],
  "longest": ["length", -1],
};

function signed(values) { return values.some(v => v > 0) && values.some(v => v < 0); }

// Orange above zero, blue below; as opaque as the value is large. One rule for light and dark.
function colorOf(value, largest) {
  if (value === null || value === undefined || !largest) return "transparent";
  const strength = Math.round(Math.min(Math.abs(value) / largest, 1) * 0.75 * 1000) / 1000;
  return value >= 0 ? `rgba(232, 119, 34, ${strength})` : `rgba(38, 120, 230, ${strength})`;
}

// What has no shape of its own is shown by name, so that control characters and direction marks cannot reorder the page.
function visible(text) {
  let odd = text === "";
  const shown = text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, character => {
    odd = true;
    if (character === "\n") return "\u21b5\n";
    if (character === "\t") return "\u21e5\t";
    return "\u27e8U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
  return {shown: shown || "\u2205", odd};
}

const NEWEST = "newest";

class Viewer {
  constructor(page, source) {
    this.page = page;
    this.source = source;
    this.order = [];
    this.at = 0;
    this.token = -1;
    this.wanted = null;
    const of = id => document.getElementById(id);
    [this.run, this.step, this.sort, this.search, this.quantity, this.list, this.sample, this.tip, this.count] =
      ["run", "step", "sort", "search", "quantity", "list", "sample", "tip", "count"].map(of);
    this.sort.replaceChildren(...Object.keys(ORDERS).map(name => new Option(name)));
    this.run.onchange = () => this.chooseRun();
    this.step.onchange = this.sort.onchange = () => this.choose();
    this.search.oninput = () => this.choose();
    this.quantity.onchange = () => this.paint();
    of("controls").onsubmit = event => event.preventDefault();
    this.list.onclick = event => {
      const item = event.target.closest("li");
      if (item) this.move(Number(item.dataset.place));
    };
    this.list.onkeydown = this.sample.onkeydown = event => {
      const to = {ArrowDown: this.at + 1, ArrowUp: this.at - 1, ...(event.currentTarget === this.list ? {Home: 0, End: this.order.length - 1} : {})}[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.move(to);
    };
    // Not pointerover: that also comes when the text moves under a pointer that lies still, and would undo the keyboard.
    this.sample.onpointermove = event => { const token = event.target.closest(".token"); token ? this.hover(token) : this.hide(); };
    this.sample.onpointerleave = () => this.hide();
    this.sample.onclick = event => { const token = event.target.closest(".token"); if (token) this.hover(token); };
  }

  // Runs and samples may have come; what is looked at stays. Where the newest step is followed, its samples are shown.
  async update() {
    const runs = this.page.runs.map((one, i) => i).filter(i => this.page.runs[i].heads.step.length);
    if (!runs.length) return;
    const before = this.run.value, shown = this.shown;
    if (runs.join() !== [...this.run.options].map(option => option.value).join()) {
      this.run.replaceChildren(...runs.map(i => new Option(visible(this.page.runs[i].name).shown, i)));
      document.getElementById("run-label").hidden = runs.length < 2;
    }
    if (before === "" || !runs.includes(Number(before))) return this.chooseRun();
    this.run.value = before;
    const step = this.step.value;
    this.steps();
    this.step.value = step;
    if (this.step.selectedIndex < 0) return this.chooseRun();
    const place = this.heads.at ? this.heads.at.indexOf(shown) : -1;
    if (step !== NEWEST) return this.choose(place);
    if (this.newest !== this.heads.step.reduce((a, b) => Math.max(a, b), 0)) return this.choose();
  }

  get heads() { return this.page.runs[this.run.value].heads; }

  steps() {
    const steps = [...new Set(this.heads.step)].sort((a, b) => a - b);
    this.step.replaceChildren(...(this.source.live ? [new Option(NEWEST)] : []), new Option("all", ""), ...steps.map(step => new Option(step)));
    for (const option of this.sort.options) {
      const by = ORDERS[option.value];
      option.hidden = option.disabled = Boolean(by) && this.heads[by[0]].every(value => value === null);
    }
    return steps;
  }

  async chooseRun() {
    const steps = this.steps();
    if (this.source.live) this.step.value = NEWEST;
    else if (steps.length > 1) this.step.value = steps[steps.length - 1];
    await this.choose();
  }

  // `index`: the sample that is looked at, and stays where it is still among them.
  async choose(index = -1) {
    const run = this.run.value, heads = this.heads, step = this.step.value;
    let rows = heads.step.map((_, i) => i);
    this.newest = heads.step.reduce((a, b) => Math.max(a, b), 0);
    if (step !== "") rows = rows.filter(i => heads.step[i] === (step === NEWEST ? this.newest : Number(step)));
    const words = this.search.value.trim().toLowerCase(), asked = {};
    this.wanted = asked;
    const texts = await this.source.texts(run);
    if (this.wanted !== asked) return;
    if (words) rows = rows.filter(i => (texts[i][0] + "\n" + texts[i][1]).toLowerCase().includes(words));
    const by = ORDERS[this.sort.value];
    if (by) {
      const [name, sign] = by, value = i => heads[name][i] === null ? Infinity : sign * heads[name][i];
      rows.sort((a, b) => value(a) - value(b) || a - b);
    }
    this.order = rows;
    const place = rows.indexOf(index);
    if (index < 0 || place < 0) return this.go(0);
    this.at = place;
    this.showList(texts);
  }

  // A person moves: the step that was followed is held from then on.
  move(place) {
    if (this.step.value === NEWEST) this.step.value = this.newest;
    return this.go(place);
  }

  async go(place) {
    this.at = Math.min(Math.max(place, 0), Math.max(this.order.length - 1, 0));
    this.token = -1;
    this.hide();
    const run = this.run.value, index = this.order[this.at], texts = await this.source.texts(run), at = this.heads.at;
    this.shown = at && index !== undefined ? at[index] : null;
    const shown = this.shown;
    this.showList(texts);
    if (index === undefined) { this.current = null; this.sample.replaceChildren(element("p", {class: "hint", text: "no sample"})); return; }
    const [prompt_text, completion] = texts[index], row = await this.source.row(run, index).catch(() => null);
    if (this.run.value !== run || (at ? this.shown !== shown : this.order[this.at] !== index)) return;
    if (!row) { this.current = null; this.sample.replaceChildren(element("p", {class: "hint", text: "this sample is no longer there"})); return; }
    this.current = {prompt_text, completion, ...row};
    this.showSample();
  }

  showList(texts) {
    const heads = this.heads, from = Math.max(0, Math.min(this.at - 30, this.order.length - 60)), shown = this.order.slice(from, from + 60);
    this.count.textContent = `${this.order.length ? this.at + 1 : 0} of ${this.order.length} samples`
      + (this.page.runs[this.run.value].missed ? "; older ones are left out here, steerl report has them all" : "");
    this.list.replaceChildren(...shown.map((index, i) => {
      const figures = [`step ${heads.step[index]}`, `row ${heads.row[index]}.${heads.sample[index]}`];
      if (heads.kind[index]) figures.push(visible(heads.kind[index]).shown);
      for (const name of ["reward", "kl", "gap"]) if (heads[name][index] !== null) figures.push(`${name} ${short(heads[name][index])}`);
      const item = element("li", {role: "option", "data-place": from + i, "aria-selected": String(from + i === this.at)});
      item.append(element("span", {text: figures.join("  ")}), element("span", {class: "text", dir: "auto", text: visible(texts[index][1].slice(0, 120)).shown.replaceAll("\n", " ")}));
      return item;
    }));
    const chosen = this.list.querySelector('[aria-selected="true"]');
    if (chosen) this.list.scrollTop = chosen.offsetTop - this.list.offsetTop - this.list.clientHeight / 2;
  }

  showSample() {
    const row = this.current, facts = element("div", {class: "facts"});
    for (const [name, value] of Object.entries(row.facts)) {
      const said = one => typeof one === "number" ? short(one) : exact(one), all = value && typeof value === "object" ? Object.entries(value) : [];
      const [text, whole] = [said, exact].map(as => all.length ? all.map(([k, v]) => `${k} ${as(v)}`).join(", ") : as(value));
      if (text !== "") facts.append(element("span", {}, visible(name).shown + " ", element("b", {dir: "auto", title: visible(whole).shown, text: visible(text).shown})));
    }
    const names = Object.keys(row.quantities), before = this.quantity.value;
    this.quantity.replaceChildren(...names.map(name => new Option(visible(name).shown, name)));
    if (names.includes(before)) this.quantity.value = before;
    const response = row.turns.length ? row.turns.flatMap((turn, i) => this.turn(turn, i)) : [
      element("h3", {text: row.action_mask.length ? "response (underlined: what the row was fed)" : "response"}),
      this.tokens(row.tokens, row.ids, "response", row.action_mask)];
    this.sample.replaceChildren(facts, element("h3", {text: "prompt"}), this.tokens(row.prompt_tokens, row.prompt_ids, "prompt"),
      ...response, element("div", {class: "scale"}));
    this.paint();
  }

  // What the policy said, and what it was told then: the tokens up to its next turn.
  turn(turn, i) {
    const row = this.current, next = row.turns[i + 1] ? row.turns[i + 1].first : row.ids.length;
    const head = element("h3", {class: "turn"}, `turn ${i + 1}`), part = (from, to) => this.tokens(row.tokens, row.ids, "response", row.action_mask, from, to);
    if (turn.reward !== null) head.append(element("span", {text: `reward ${exact(turn.reward)}`}));
    for (const call of turn.calls) head.append(element("span", {dir: "auto", text: visible(call).shown}));
    const shown = [head, part(turn.first, turn.end)];
    for (const error of turn.errors) shown.push(element("p", {class: "error", dir: "auto", text: visible(error).shown}));
    if (turn.end < next) {
      const told = part(turn.end, next);
      told.classList.add("told");
      shown.push(element("h3", {class: "told", text: turn.cut ? "told, cut" : "told"}), told);
    }
    return shown;
  }

  tokens(texts, ids, part, drawn = [], from = 0, to = texts.length) {
    const holder = element("div", {class: "tokens", dir: "auto", "data-part": part});
    texts.slice(from, to).forEach((text, place) => {
      const {shown, odd} = visible(text), i = from + place;
      const kind = (odd ? "token odd" : "token") + (drawn[i] === false ? " fed" : "");
      holder.append(element("span", {class: kind, "data-part": part, "data-place": i, "data-id": ids[i], text: shown}));
    });
    return holder;
  }

  paint() {
    const row = this.current;
    if (!row) return;
    const values = row.quantities[this.quantity.value] || [], largest = values.reduce((a, v) => Math.max(a, Math.abs(v ?? 0)), 0);
    for (const token of this.sample.querySelectorAll('.token[data-part="response"]')) token.style.backgroundColor = colorOf(values[token.dataset.place], largest);
    const scale = this.sample.querySelector(".scale"), bar = element("i"), both = signed(values), below = !both && values.some(v => v < 0);
    const [left, right] = both ? [-largest, largest] : below ? [-largest, 0] : [0, largest];
    bar.style.background = `linear-gradient(to right, ${colorOf(left, largest)}, ${both ? "transparent," : ""} ${colorOf(right, largest)})`;
    scale.replaceChildren(visible(this.quantity.value).shown + " ", exact(left), bar, exact(right));
  }

  hover(token) {
    const row = this.current, i = Number(token.dataset.place), response = token.dataset.part === "response";
    const lines = [["token", JSON.stringify((response ? row.tokens : row.prompt_tokens)[i])], ["id", token.dataset.id], ["position", i]];
    if (response) for (const [name, values] of Object.entries(row.quantities)) lines.push([name, exact(values[i])]);
    const table = element("table");
    for (const [name, value] of lines) table.append(element("tr", {}, element("td", {text: visible(name).shown}), element("td", {"data-name": name, text: visible(String(value)).shown})));
    this.tip.replaceChildren(table);
    this.tip.hidden = false;
    for (const other of this.sample.querySelectorAll(".at")) other.classList.remove("at");
    token.classList.add("at");
    this.token = [...this.sample.querySelectorAll(".token")].indexOf(token);
    const place = token.getBoundingClientRect(), size = this.tip.getBoundingClientRect();
    this.tip.style.left = Math.max(4, Math.min(place.left, innerWidth - size.width - 4)) + "px";
    const above = place.top - size.height - 6;
    this.tip.style.top = (above > 4 ? above : Math.min(place.bottom + 6, innerHeight - size.height - 4)) + "px";
  }

  hide() {
    this.tip.hidden = true;
    for (const other of this.sample.querySelectorAll(".at")) other.classList.remove("at");
  }

  moveStep(by) {
    if (this.step.value === NEWEST) this.step.value = this.newest;
    const options = [...this.step.options], place = options.findIndex(option => option.selected) + by;
    if (place < 0 || place >= options.length) return;
    this.step.selectedIndex = place;
    this.choose();
  }

  moveToken(by) {
    const tokens = this.sample.querySelectorAll(".token");
    if (!tokens.length || !this.current) return;
    const first = this.current.prompt_tokens.length, from = this.token < 0 ? first - (by > 0 ? 1 : 0) : this.token;
    const token = tokens[Math.min(Math.max(from + by, 0), tokens.length - 1)];
    token.scrollIntoView({block: "nearest"});
    this.hover(token);
  }

  nextColor() {
    if (!this.quantity.options.length) return;
    this.quantity.selectedIndex = (this.quantity.selectedIndex + 1) % this.quantity.options.length;
    this.paint();
  }
}
