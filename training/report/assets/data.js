// What the page shows: points of curves, and samples. They lie in the page, packed, or come from a server that follows runs.
"use strict";

const MOST_POINTS = 4000, MOST_SAMPLES = 2000;

// Of every `stride` steps the lowest and the highest value stay, where they are: no spike is lost. NaN: no value at that step.
function thinned(steps, values, stride) {
  const kept = {steps: [], values: []}, keep = i => { kept.steps.push(steps[i]); kept.values.push(values[i]); };
  for (let from = 0, to; from < steps.length; from = to) {
    const bucket = Math.floor(steps[from] / stride);
    let low = -1, high = -1;
    for (to = from; to < steps.length && Math.floor(steps[to] / stride) === bucket; to++) {
      if (Number.isNaN(values[to])) continue;
      if (low < 0 || values[to] < values[low]) low = to;
      if (high < 0 || values[to] > values[high]) high = to;
    }
    if (low < 0) { keep(from); continue; }
    keep(Math.min(low, high));
    if (low !== high) keep(Math.max(low, high));
  }
  return kept;
}

// Evaluations come every few steps: their points stand in a line of their own.
const sparse = key => /^eval/.test(key);

class Run {
  constructor(name) {
    Object.assign(this, {name, state: "", age: null, total: null, notes: [], config: "", versions: {}, summary: {}, examples: []});
    this.clear();
  }

  clear() {
    this.series = new Map();
    this.ends = new Map();
    this.last = null;
    this.heads = {step: [], row: [], sample: [], kind: [], reward: [], kl: [], gap: [], length: [], at: []};
    this.texts = [];
    this.missed = false;
  }

  add(steps, columns) {
    const named = new Map(Object.entries(columns));
    for (const key of named.keys()) if (!this.series.has(key)) this.series.set(key, {steps: [], values: [], stride: 1});
    for (const [key, one] of this.series) {
      const values = named.get(key);
      steps.forEach((step, i) => {
        const value = values ? values[i] ?? NaN : NaN;
        if (Number.isNaN(value) && (sparse(key) || !one.steps.length)) return;
        one.steps.push(step);
        one.values.push(value);
      });
      while (one.steps.length > MOST_POINTS) { one.stride *= 2; Object.assign(one, thinned(one.steps, one.values, one.stride)); }
    }
    if (steps.length) this.last = steps[steps.length - 1];
  }

  // A metric's points, with the evaluations before the first step and after the last one.
  points(key) {
    const own = this.series.get(key) || {steps: [], values: []};
    const more = (this.ends.get(key) || []).filter(([step]) => !own.steps.some((at, i) => at === step && !Number.isNaN(own.values[i])));
    if (!more.length) return own;
    const all = own.steps.map((step, i) => [step, own.values[i]]).concat(more).sort((a, b) => a[0] - b[0]);
    return {steps: all.map(point => point[0]), values: all.map(point => point[1])};
  }

  value(key) {
    const {values} = this.points(key);
    for (let i = values.length - 1; i >= 0; i--) if (!Number.isNaN(values[i])) return values[i];
    return null;
  }

  about(given) {
    const {ends, ...rest} = given;
    Object.assign(this, rest);
    this.ends = new Map(Object.entries(ends));
  }

  // The newest samples, as many as the page holds.
  addSamples(heads, texts, most) {
    for (const name of Object.keys(this.heads)) if (heads[name]) this.heads[name].push(...heads[name]);
    this.texts.push(...texts);
    const over = this.texts.length - most;
    if (over <= 0) return;
    this.missed = true;
    for (const column of [...Object.values(this.heads), this.texts]) column.splice(0, over);
  }
}

// Panels of several answers: a metric that comes later joins its panel.
function addPanels(page, panels) {
  for (const panel of panels) {
    const name = panel.group + "\n" + panel.title, known = page.panels.get(name);
    if (known) Object.assign(known, {keys: [...new Set([...known.keys, ...panel.keys])], target: panel.target});
    else page.panels.set(name, {...panel});
  }
}

async function unpack(id) {
  const text = document.getElementById(id).textContent, bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// The data lie in the page.
class Stored {
  live = false;

  constructor() {
    this.chunks = new Map();
    this.texted = new Map();
  }

  async begin(page) {
    const index = await unpack("index");
    page.title = index.title;
    page.bars = index.bars;
    this.size = index.chunk;
    page.runs = index.runs.map(one => {
      const run = new Run(one.name), {metrics, heads, name, ...about} = one;
      run.add(metrics.step, metrics.columns);
      run.about(about);
      run.heads = heads;
      return run;
    });
    addPanels(page, index.panels);
  }

  texts(run) {
    if (!this.texted.has(run)) this.texted.set(run, unpack(`texts-${run}`));
    return this.texted.get(run);
  }

  async row(run, index) {
    const name = `rows-${run}-${Math.floor(index / this.size)}`;
    if (!this.chunks.has(name)) {
      if (this.chunks.size > 16) this.chunks.delete(this.chunks.keys().next().value);
      this.chunks.set(name, unpack(name));
    }
    return (await this.chunks.get(name))[index % this.size];
  }
}

// A server tells what is new: a place in each run's files goes there, what stands after it comes back.
class Followed {
  live = true;
  connected = true;
  drawn = 0;

  constructor() {
    this.places = new Map();
    this.id = "";
  }

  async begin(page) {
    this.page = page;
    page.bars = [];
    page.runs = [];
    await this.ask();
  }

  // Whether there is more to read at once.
  async ask() {
    const asked = [`id=${this.id}`, ...[...this.places].map(([run, place]) => `at=${run}.${place}`)].join("&");
    const answer = await fetch(`data?${asked}`);
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const {id, runs, panels} = await answer.json();
    if (this.id && id !== this.id) location.reload();
    this.id = id;
    for (const told of runs) {
      while (this.page.runs.length <= told.run) this.page.runs.push(new Run(""));
      const run = this.page.runs[told.run];
      if (told.again) run.clear();
      if (told.about) run.about(told.about);
      if (told.metrics) { run.add(told.metrics.step, told.metrics.columns); run.written = Date.now() - 1000 * told.age; }
      if (told.missed) run.missed = true;
      if (told.texts) run.addSamples(told.heads, told.texts, Math.max(100, Math.floor(MOST_SAMPLES / this.page.runs.length)));
      this.places.set(told.run, told.place);
    }
    addPanels(this.page, panels);
    this.page.title = this.page.runs.map(run => run.name).join(", ");
    return {news: runs.length > 0, more: runs.some(told => told.more)};
  }

  async follow(told) {
    for (;;) {
      const before = this.connected;
      let found = {news: false, more: false};
      try {
        found = await this.ask();
        this.connected = true;
      } catch (error) {
        this.connected = false;
        await new Promise(done => setTimeout(done, 1500));
      }
      // Amid a long way only now and then.
      if (before !== this.connected || (found.news && (!found.more || performance.now() - this.drawn > 700))) {
        this.drawn = performance.now();
        told();
      }
      if (found.news && !found.more) await new Promise(done => setTimeout(done, 300));
    }
  }

  async texts(run) { return this.page.runs[run].texts; }

  async row(run, index) {
    const answer = await fetch(`row?run=${run}&at=${this.page.runs[run].heads.at[index]}`);
    return answer.ok ? answer.json() : null;
  }
}
