"use strict";
/* The page one explores: what latents mean, and what a sample's code says, stream by stream.

   Read first: `address` (all that is shown follows from it), `codes`, `latentTable`, then the views.
   It reads one JSON payload (eval.explorer) and asks for nothing else. Text of files becomes text
   nodes alone, never markup. Letters: i sample of this page, j latent, s stream, v activation. */
(() => {
const P = JSON.parse(document.getElementById("payload").textContent);
const TOP = 50;                          // samples that define a latent's meaning (thesis 5.3.5)
const FEWEST = 5;                        // active samples below which a mean or a name says little
const KINDS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, u8: BigUint64Array,
               i2: Int16Array};
const INKS = ["#3182ce", "#dd6b20", "#38a169", "#805ad5", "#d53f8c", "#718096"];

// -- Elements: every string becomes a text node ---------------------------------------------------

function element(made, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
  made.append(...children.flat(9).filter(child => child !== null && child !== undefined));
  return made;
}
const html = (tag, properties, ...children) =>
  element(document.createElement(tag), properties, children);
const svg = (tag, properties, ...children) =>
  element(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
const shown = v => v === null || !isFinite(v) ? "–" : v >= 100 ? v.toFixed(0) : v.toFixed(3);
const percent = v => (100 * v).toFixed(1) + " %";

// -- Arrays, decoded when they are first asked for ------------------------------------------------

function raw(packed) {                   // whole numbers, as they were packed
  if (!packed.raw) {
    const text = atob(packed.data), bytes = new Uint8Array(text.length);
    for (let p = 0; p < text.length; p++) bytes[p] = text.charCodeAt(p);
    packed.raw = new KINDS[packed.type](bytes.buffer);
  }
  return packed.raw;
}
function numbers(packed) {
  if (!packed.scale) return raw(packed);
  packed.numbers ||= Float32Array.from(raw(packed), v => v * packed.scale);
  return packed.numbers;
}
const cached = new Map();
function once(key, make) {
  if (!cached.has(key)) cached.set(key, make());
  return cached.get(key);
}

// A sparse matrix by rows: entries start[i] .. start[i + 1] of row i have column, value (and place).
function sparse(group, part, places) {
  const lengths = raw(group.lengths), gaps = raw(group.gaps), packed = group.values[part];
  const all = raw(packed), scale = packed.scale || 1, token = places && raw(places);
  const start = new Uint32Array(lengths.length + 1), column = new Uint32Array(all.length);
  const level = new Uint16Array(all.length), place = new Uint16Array(token ? all.length : 0);
  let p = 0, from = 0, to = 0;
  for (let i = 0; i < lengths.length; i++) {
    for (let j = 0, left = lengths[i]; left; left--, from++) {
      while (gaps[p] === 255) j += gaps[p++];
      j += gaps[p++];
      if (!all[from]) continue;          // another stream of the group has it
      column[to] = j;
      if (token) place[to] = token[from];
      level[to++] = all[from];
    }
    start[i + 1] = to;
  }
  return {start, column: column.subarray(0, to), level, scale, place, value: e => level[e] * scale};
}
// The same by columns, the greatest value of each first, ties to the lower row: by two counting sorts.
function turned(m, width) {
  const entries = m.column.length, by = new Uint32Array(65537), order = new Uint32Array(entries);
  for (let e = 0; e < entries; e++) by[65536 - m.level[e]]++;
  for (let v = 1; v < by.length; v++) by[v] += by[v - 1];
  for (let e = entries - 1; e >= 0; e--) order[--by[65536 - m.level[e]]] = e;
  const rowOf = new Uint32Array(entries), start = new Uint32Array(width + 1);
  for (let i = 0; i + 1 < m.start.length; i++) rowOf.fill(i, m.start[i], m.start[i + 1]);
  for (let e = 0; e < entries; e++) start[m.column[e] + 1]++;
  for (let j = 0; j < width; j++) start[j + 1] += start[j];
  const next = start.slice(), row = new Uint32Array(entries), value = new Float32Array(entries);
  const place = new Uint16Array(m.place.length);
  for (const e of order) {
    const at = next[m.column[e]]++;
    row[at] = rowOf[e];
    value[at] = m.value(e);
    if (place.length) place[at] = m.place[e];
  }
  return {start, row, value, place};
}

const ROWS = raw(P.rows), N = ROWS.length, KNOWN = raw(P.known), NAMES = P.label_names;
const rowOf = new Map(Array.from(ROWS, (row, i) => [Number(row), i]));
const labels = P.labels && sparse(P.labels, 0);
const labelsOf = i => labels ? labels.column.subarray(labels.start[i], labels.start[i + 1]) : [];
const told = i => Array.from(labelsOf(i), c => NAMES[c]).join(", ") || `sample ${ROWS[i]}`;

function codes(run, mode) {              // of each stream: by samples, and by latents
  return once(`${run.name} ${mode} codes`, () => run.streams.map((name, s) => {
    const joint = run.codes[mode].length === 1, group = run.codes[mode][joint ? 0 : s];
    const part = joint ? s : 0, M = joint ? run.streams.length : 1;
    const samples = sparse(group, part, group.values[M + part]);
    return {name, samples, latents: turned(samples, run.latents)};
  }));
}

// -- Numbers of latents and of samples ------------------------------------------------------------

// How often labels occur in the top samples of latent j of a stream: counts (C,), and their number.
function profile(stream, j) {
  const counts = new Uint32Array(NAMES.length), {start, row} = stream.latents;
  let n = 0;
  for (let e = start[j]; e < start[j + 1] && n < TOP; e++) {
    if (!KNOWN[row[e]]) continue;
    n++;
    for (const c of labelsOf(row[e])) counts[c]++;
  }
  return {counts, n};
}
// Overlap of two activity patterns of sum 1: sum of minima over sum of maxima, 0 .. 1.
function overlap(keysA, a, keysB, b, scratch) {
  let sumA = 0, sumB = 0, least = 0;
  for (const v of a) sumA += v;
  for (const v of b) sumB += v;
  for (let e = 0; e < a.length; e++) scratch[keysA[e]] = a[e] / sumA;
  for (let e = 0; e < b.length; e++) least += Math.min(scratch[keysB[e]], b[e] / sumB);
  for (let e = 0; e < a.length; e++) scratch[keysA[e]] = 0;
  return least / (2 - least);
}
function meanOverlap(parts, scratch) {   // over all pairs of [keys, values]; null without a pair
  let total = 0, pairs = 0;
  for (let s = 0; s < parts.length; s++) {
    for (let t = 0; t < s; t++, pairs++) total += overlap(...parts[s], ...parts[t], scratch);
  }
  return pairs ? total / pairs : null;
}
function agreements(run) {               // of every latent, between streams that chose alone
  return once(`${run.name} agreement`, () => {
    const scratch = new Float64Array(N), streams = codes(run, "alone").map(one => one.latents);
    return Array.from({length: run.latents}, (_, j) => meanOverlap(streams.filter(
      m => m.start[j + 1] - m.start[j] >= FEWEST).map(m => [
      m.row.subarray(m.start[j], m.start[j + 1]),
      m.value.subarray(m.start[j], m.start[j + 1])]), scratch));
  });
}
function sampleAgreements(run) {
  return once(`${run.name} samples`, () => {
    const scratch = new Float64Array(run.latents), streams = codes(run, "alone");
    return Array.from({length: N}, (_, i) => meanOverlap(streams.map(one => one.samples).filter(
      m => m.start[i + 1] > m.start[i]).map(m => [
      m.column.subarray(m.start[i], m.start[i + 1]),
      Array.from(m.level.subarray(m.start[i], m.start[i + 1]))]), scratch));
  });
}
function latentTable(run, mode) {
  return once(`${run.name} ${mode} table`, () => {
    const streams = codes(run, mode), agree = agreements(run);
    return Array.from({length: run.latents}, (_, j) => {
      const counts = new Uint32Array(NAMES.length);
      let active = 0, sum = 0, alive = 0, n = 0;
      for (const stream of streams) {
        const {start, value} = stream.latents;
        if (start[j + 1] === start[j]) continue;
        alive++;
        active += start[j + 1] - start[j];
        for (let e = start[j]; e < start[j + 1]; e++) sum += value[e];
        if (!NAMES.length) continue;
        const one = profile(stream, j);
        n += one.n;
        one.counts.forEach((v, c) => { counts[c] += v; });
      }
      const best = counts.reduce((b, v, c) => v > counts[b] ? c : b, 0);
      const purity = n >= FEWEST ? counts[best] / n : null;
      return {j, alive, frequency: active / (N * streams.length), mean: active ? sum / active : null,
              purity, label: purity !== null && purity >= 0.3 ? best : -1, agreement: agree[j],
              name: run.names[j] || (purity !== null && purity >= 0.3 ? NAMES[best] : "")};
    });
  });
}
function searchText(run, j) {            // what a filter looks in: name, labels and captions
  return once(`${run.name} ${j} text`, () => [j, latentTable(run, "alone")[j].name,
    ...codes(run, "alone").flatMap(({latents: m}) => Array.from(
      m.row.subarray(m.start[j], Math.min(m.start[j] + 8, m.start[j + 1])),
      i => `${told(i)} ${(P.texts.captions || [])[i] || ""}`))].join("\n").toLowerCase());
}

// -- The address: all that is shown ---------------------------------------------------------------

const DEFAULTS = {run: "0", mode: "alone", sort: NAMES.length ? "purity" : "agreement", up: "",
                  find: "", alive: "", label: "", latent: "", sample: "", stream: "0", edit: "",
                  view: "", more: "100"};
let A = {}, list = [];
function parse() {
  A = {...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1)))};
  const run = P.runs[A.run] || P.runs[0];
  if (!run.codes[A.mode]) A.mode = "alone";
  return run;
}
function address(changes) {              // "#..." of what is shown after these changes
  const next = new URLSearchParams();
  for (const [name, value] of Object.entries({...A, ...changes})) {
    if (name in DEFAULTS && String(value) !== DEFAULTS[name]) next.set(name, value);
  }
  return "#" + next;
}
const go = changes => { location.hash = address(changes); };
const toLatent = j => address({latent: j, sample: "", edit: "", view: ""});
const toSample = i => address({sample: ROWS[i], latent: "", edit: "", view: ""});

// -- Pieces ---------------------------------------------------------------------------------------

function picture(i, place) {             // its part of the sheet, or the name of one that is lost
  const sheet = P.sheet;
  if (sheet.lost[i] !== undefined) return html("span", {class: "words"}, sheet.lost[i]);
  const at = [i % sheet.columns, Math.floor(i / sheet.columns)].map(v => `${-56 * v}px`);
  const thumb = html("span", {class: "thumb", role: "img", "aria-label": told(i)});
  thumb.style.backgroundPosition = at.join(" ");
  if (place && P.grid) {                 // the patch where the latent is strongest
    const mark = html("i"), [height, width] = P.grid;
    mark.style.cssText = `left:${100 * ((place - 1) % width) / width}%;width:${100 / width}%;` +
      `top:${100 * Math.floor((place - 1) / width) / height}%;height:${100 / height}%`;
    thumb.append(mark);
  }
  return thumb;
}
function card(i, stream, note, place, mark) {
  const caption = (P.texts.captions || [])[i];
  const words = /txt|text|words|caption/i.test(stream) && caption;
  const face = words || !P.sheet ? html("span", {class: "words"}, caption || told(i)) :
    picture(i, place);
  return html("a", {href: toSample(i), class: mark ? "card partner" : "card",
                    title: `${told(i)}${caption ? `: ${caption}` : ""}`, "data-row": ROWS[i]},
              face, html("small", {}, note), mark ? html("small", {}, mark) : null);
}
// Bars over 0 .. top, in grey bars of the null scaled to the same number.
function histogram(values, null_, name) {
  const top = values.reduce((a, b) => Math.max(a, b), 0) || 1, bins = 20;
  const own = new Array(bins).fill(0), grey = new Array(bins).fill(0);
  for (const v of values) own[Math.min(bins - 1, Math.floor(v / top * bins))]++;
  let others = 0;
  if (null_) {
    raw(null_.counts).forEach((count, b) => {
      const at = Math.floor((b + 0.5) / 256 * null_.top / top * bins);
      if (at < bins) { grey[at] += count; others += count; }
    });
  }
  const most = Math.max(...own, 1), x = b => 22 + b * 9, y = v => 62 - 54 * Math.min(1, v / most);
  const bar = (v, b, kind) => v ? svg("rect", {class: kind, x: x(b), y: y(v), width: 8,
                                               height: 62 - y(v)}) : null;
  return svg("svg", {viewBox: "0 0 210 80", class: "histogram", role: "img",
                     "aria-label": `${name}: ${values.length} samples, activations up to ${shown(top)}`},
    grey.map((v, b) => bar(others ? v * values.length / others : 0, b, "null")),
    own.map((v, b) => bar(v, b, "own")),
    svg("path", {d: "M22 62.5H202", class: "axis"}),
    svg("text", {x: 18, y: 14, class: "end"}, most), svg("text", {x: 18, y: 62, class: "end"}, "0"),
    svg("text", {x: 22, y: 76}, "0"), svg("text", {x: 202, y: 76, class: "end"}, shown(top)));
}
function spark(run, mode, j) {           // a latent's activations, all streams, for the list
  const bins = new Array(16).fill(0), all = codes(run, mode).map(one => one.latents);
  const top = Math.max(...all.map(m => m.start[j] < m.start[j + 1] ? m.value[m.start[j]] : 0));
  for (const m of all) {
    for (let e = m.start[j]; e < m.start[j + 1]; e++) {
      bins[Math.min(15, Math.floor(m.value[e] / top * 16))]++;
    }
  }
  const most = Math.max(...bins, 1);
  return svg("svg", {viewBox: "0 0 64 16", class: "spark", "aria-hidden": "true"}, svg("path", {
    d: bins.map((v, b) => v ? `M${b * 4 + 1.5} 16V${(15 - 14 * v / most).toFixed(1)}` : "").join("")}));
}
const meter = (share, kind) => {
  const bar = html("span", {class: `meter ${kind || ""}`});
  bar.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return bar;
};
// A chart of lines {name: [[x, y]]}; a single point is a dot, ticks are whole where values are.
function curves(lines, xName, yName) {
  const points = Object.values(lines).flat(), whole = points.every(([, y]) => Number.isInteger(y));
  const right = Math.max(...points.map(p => p[0]), 1), top = Math.max(...points.map(p => p[1])) || 1;
  const x = v => 46 + 400 * v / right, y = v => 150 - 130 * v / top;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map(v => whole ? Math.round(v * top) : v * top);
  const text = v => whole ? String(v) : v.toPrecision(2);
  return svg("svg", {viewBox: `0 0 470 ${190 + 16 * Math.ceil(Object.keys(lines).length / 4)}`,
                     class: "curves", role: "img", "aria-label": `${yName} over ${xName}`},
    svg("text", {x: 4, y: 10}, yName), svg("text", {x: 446, y: 180, class: "end"}, xName),
    [...new Set(ticks)].map(v => [svg("path", {d: `M46 ${y(v)}H446`, class: "axis"}),
                                  svg("text", {x: 42, y: y(v) + 4, class: "end"}, text(v))]),
    svg("text", {x: 46, y: 166}, "0"), svg("text", {x: 446, y: 166, class: "end"}, right),
    Object.entries(lines).map(([name, line], n) => [
      line.length > 1 ?
        svg("polyline", {points: line.map(p => [x(p[0]), y(p[1])].join()).join(" "),
                         stroke: INKS[n % 6]}) :
        svg("circle", {cx: x(line[0][0]), cy: y(line[0][1]), r: 3, fill: INKS[n % 6]}),
      svg("text", {x: 46 + 104 * (n % 4), y: 198 + 16 * Math.floor(n / 4), fill: INKS[n % 6]}, name)]));
}
function training() {
  const line = key => P.log.map(row => [row.step, row[key]]);
  const loss = Object.fromEntries(["self", "cross"].filter(k => P.log.some(row => row[k])).map(
    k => [k, line(k)]));
  const dead = Object.keys(P.log[0]).filter(k => k.startsWith("dead_"));
  return html("details", {}, html("summary", {}, "Training"), html("div", {class: "pair"},
    curves(loss, "step", "mean NMSE of the batch (lower is better)"),
    curves(Object.fromEntries(dead.map(k => [k.slice(5), line(k)])), "step",
           "latents that have not fired for long (dead; lower is better)")));
}

// -- The list -------------------------------------------------------------------------------------

const COLUMNS = {                        // key: heading, what it says, cell
  j: ["latent", "its number, and the label of most of its top samples"],
  frequency: ["active", "share of samples and streams in which it is active", l => percent(l.frequency)],
  mean: ["mean", "mean activation where it is active", l => shown(l.mean)],
  purity: ["purity", "share of that label among the 50 top samples of each stream", l => shown(l.purity)],
  agreement: ["agreement", "overlap of where it is active in two streams that chose alone; 1 is the same",
              l => shown(l.agreement)],
  alive: ["alive", "streams in which it is ever active", l => l.alive]};

function filtered(run) {
  const words = A.find.toLowerCase(), M = run.streams.length, order = A.up ? 1 : -1;
  const keep = {"": l => l.alive, all: l => l.alive === M, some: l => l.alive && l.alive < M,
                one: l => l.alive === 1, none: l => !l.alive}[A.alive] || (l => l.alive);
  const found = latentTable(run, A.mode).filter(l => keep(l) &&
    (A.label === "" || l.label === Number(A.label)) &&
    (!words || searchText(run, l.j).includes(words)));
  const key = l => l[A.sort] ?? -Infinity;
  return found.sort((a, b) => {
    const empty = (key(b) === -Infinity) - (key(a) === -Infinity);
    return empty ? -empty : order * (key(a) - key(b)) || b.frequency - a.frequency || a.j - b.j;
  });
}
function listView(run) {
  list = filtered(run);
  const one = run.streams.length === 1;
  const keys = Object.keys(COLUMNS).filter(k => !(one && /agreement|alive/.test(k)) &&
                                                (NAMES.length || k !== "purity"));
  const heads = keys.map(k => {
    const active = A.sort === k, to = address({sort: k, up: active && !A.up ? "1" : "", more: "100"});
    return html("th", {class: k, "aria-sort": active ? A.up ? "ascending" : "descending" : null},
                html("a", {href: to, title: COLUMNS[k][1]}, COLUMNS[k][0],
                     active ? A.up ? " ↑" : " ↓" : ""));
  });
  heads.splice(1, 0, html("th", {class: "spark"}, ""));
  const rows = list.slice(0, Number(A.more)).map(l => html("tr", {"data-latent": l.j},
    html("th", {}, html("a", {href: toLatent(l.j)}, html("b", {}, l.j), ` ${l.name}`)),
    html("td", {class: "spark"}, spark(run, A.mode, l.j)),
    keys.slice(1).map(k => html("td", {class: k}, COLUMNS[k][2](l)))));
  const choose = (name, label, options) => html("label", {}, label, html("select", {
    name, onchange: e => go({[name]: e.target.value, more: "100"})}, options.map(([value, text]) =>
    html("option", {value, selected: A[name] === String(value)}, text))));
  return [html("form", {class: "filters", onsubmit: e => e.preventDefault()},
    html("label", {}, "Find", html("input", {type: "search", value: A.find, name: "find",
      placeholder: "name, label, caption", onchange: e => go({find: e.target.value, more: "100"})})),
    NAMES.length ? choose("label", "Label", [["", "any"], ...NAMES.map((v, c) => [c, v])]) : null,
    one ? null : choose("alive", "Alive in", [["", "any stream"], ["all", "all streams"],
      ["some", "some, not all"], ["one", "one alone"]])),
  html("p", {class: "note", id: "count"}, `${list.length} of ${run.latents} latents`),
  html("div", {class: "list"}, html("table", {class: "latents"}, html("thead", {}, html("tr", {}, heads)),
    html("tbody", {}, rows)), list.length > rows.length ?
    html("a", {class: "more", href: address({more: Number(A.more) + 400})}, "show more") : null)];
}

// -- A latent -------------------------------------------------------------------------------------

const linked = (run, j, note) => html("a", {href: toLatent(j), class: "chip"}, html("b", {}, j),
  ` ${latentTable(run, A.mode)[j].name} `, html("small", {}, note));

function together(run, j) {              // latents active in the same samples and streams
  const both = new Uint32Array(run.latents), streams = codes(run, A.mode), size = k =>
    streams.reduce((n, {latents: m}) => n + m.start[k + 1] - m.start[k], 0);
  for (const {latents: m, samples} of streams) {
    for (let e = m.start[j]; e < m.start[j + 1]; e++) {
      const i = m.row[e];
      for (let f = samples.start[i]; f < samples.start[i + 1]; f++) both[samples.column[f]]++;
    }
  }
  return Array.from(both, (n, k) => [k, n / Math.max(1, size(k) + size(j) - n)])
    .filter(([k, share]) => k !== j && share > 0).sort((a, b) => b[1] - a[1]).slice(0, 6);
}
function latentView(run, j) {
  const l = latentTable(run, A.mode)[j], near = raw(run.near), width = near.length / run.latents;
  const rows = codes(run, A.mode).map((stream, s) => {
    const m = stream.latents, from = m.start[j], n = m.start[j + 1] - from;
    if (!n) return html("section", {class: "stream"}, html("h4", {}, stream.name), "never active");
    const middle = Math.max(8, Math.floor(n / 2) - 3), counts = profile(stream, j);
    const cards = (first, last) => Array.from({length: Math.max(0, Math.min(last, n) - first)},
      (_, e) => card(m.row[from + first + e], stream.name, shown(m.value[from + first + e]),
                     m.place[from + first + e]));
    const common = Array.from(counts.counts, (v, c) => [v, c]).filter(([v]) => v)
      .sort((a, b) => b[0] - a[0]).slice(0, 5);
    const more = cards(middle, middle + 6);
    return html("section", {class: "stream", "data-stream": stream.name},
      html("h4", {}, stream.name, html("small", {}, ` ${n} of ${N} samples`)),
      html("div", {class: "top"}, html("div", {class: "cards"}, cards(0, 8)),
        more.length ? [html("small", {class: "note"}, "middling"), html("div", {class: "cards"}, more)] :
          null),
      html("figure", {}, histogram(Array.from(m.value.subarray(from, from + n)),
        ((run.null || {})[A.mode] || [])[s], stream.name),
      html("dl", {class: "profile", title: `labels of its ${counts.n} top samples`}, common.map(
        ([v, c]) => [html("dt", {}, NAMES[c]), html("dd", {}, meter(v / counts.n), `${v}`)]))));
  });
  return [html("h3", {}, `Latent ${j} `, html("em", {}, l.name)),
    html("p", {class: "note"}, `${A.mode}: alive in ${l.alive} of ${run.streams.length}, purity ` +
      `${shown(l.purity)}, agreement alone ${shown(l.agreement)}. Under a sample its activation; ` +
      "bars: how many samples reach which activation" +
      ((run.null || {})[A.mode] ? ", in grey all latents of the null, scaled to as many" : "") +
      (P.grid ? "; a frame: the patch where it is strongest" : "") + "."),
    rows, html("h4", {}, "Fires with"), html("p", {class: "chips", id: "together"},
      together(run, j).map(([k, share]) => linked(run, k, percent(share)))),
    html("h4", {}, "Nearest rows of the dictionary"), html("p", {class: "chips", id: "near"},
      Array.from(near.subarray(j * width, (j + 1) * width)).filter(k => k !== j).slice(0, 6)
        .map(k => linked(run, k, "")))];
}

// -- A sample -------------------------------------------------------------------------------------

function cosines(query, m) {             // of a dense code (L,) with every sample's
  const out = new Float64Array(N), length = Math.hypot(...query);
  for (let i = 0; i < N; i++) {
    let dot = 0, square = 0;
    for (let e = m.start[i]; e < m.start[i + 1]; e++) {
      dot += m.value(e) * query[m.column[e]];
      square += m.value(e) ** 2;
    }
    out[i] = dot / Math.max(length * Math.sqrt(square), 1e-24);
  }
  return out;
}
const ranked = similar => Array.from(similar.keys()).sort((a, b) => similar[b] - similar[a] || a - b);

function partners(run, i, s) {           // what sample i, as stream s codes it, finds in the others
  const streams = codes(run, A.mode), m = streams[s].samples, query = new Float64Array(run.latents);
  for (let e = m.start[i]; e < m.start[i + 1]; e++) query[m.column[e]] = m.value(e);
  return streams.filter((_, t) => t !== s).map(stream => {
    const similar = cosines(query, stream.samples), order = ranked(similar);
    const rank = similar.reduce((n, v) => n + (v >= similar[i]), 0);
    return html("section", {class: "stream", "data-stream": stream.name},
      html("h4", {}, stream.name, html("small", {"data-rank": rank},
        ` true partner: rank ${rank} of ${N}, cosine ${shown(similar[i])}`)),
      html("div", {class: "cards"}, [...new Set([...order.slice(0, 6), i])].map(k =>
        card(k, stream.name, shown(similar[k]), 0, k === i ? "partner" : ""))));
  });
}
function bars(run, i) {                  // its latents in every stream, those of all streams first
  const streams = codes(run, A.mode), found = new Map();
  streams.forEach(({samples: m, latents}, s) => {
    for (let e = m.start[i]; e < m.start[i + 1]; e++) {
      const j = m.column[e], cells = found.get(j) || new Array(streams.length).fill(0);
      cells[s] = m.value(e) / latents.value[latents.start[j]];
      found.set(j, cells);
    }
  });
  const count = cells => cells.filter(v => v).length, sum = cells => cells.reduce((a, b) => a + b);
  const rows = [...found].sort((a, b) => count(b[1]) - count(a[1]) || sum(b[1]) - sum(a[1]));
  return [html("p", {class: "note"}, `${rows.length} latents, as shares of the most they reach; ` +
    `${rows.filter(r => count(r[1]) === streams.length).length} are active in every stream.`),
  html("div", {class: "scroll"}, html("table", {class: "bars"}, html("thead", {}, html("tr", {},
    html("th", {}, "latent"), streams.map(one => html("th", {}, one.name)))),
  html("tbody", {}, rows.slice(0, 24).map(([j, cells]) => html("tr", {}, html("th", {},
    html("a", {href: toLatent(j)}, html("b", {}, j), ` ${latentTable(run, A.mode)[j].name}`)),
  cells.map(v => html("td", {}, meter(v), v ? html("small", {}, v.toFixed(2)) : ""))))))) ];
}
function sampleView(run, i) {
  const caption = (P.texts.captions || [])[i], s = Number(A.stream) || 0;
  return [html("h3", {}, `Sample ${ROWS[i]} `, html("em", {}, told(i))),
    html("div", {class: "cards"}, P.sheet ? picture(i) : null, html("p", {}, caption || "",
      (P.texts.groups || [])[i] ? html("small", {}, ` group ${P.texts.groups[i]}`) : "",
      (P.texts.ids || [])[i] ? html("small", {}, ` ${P.texts.ids[i]}`) : "")),
    run.streams.length > 1 ? [html("h4", {}, "Its latents, stream by stream"), bars(run, i),
      html("h4", {}, "Nearest by code, asked by ", streamChoice(run)), partners(run, i, s)] :
      [html("h4", {}, "Its latents"), bars(run, i)],
    html("h4", {}, "Edit its code"), editor(run, i, Math.min(s, run.streams.length - 1))];
}
const streamChoice = run => html("select", {"aria-label": "stream that asks", onchange: e =>
  go({stream: e.target.value, edit: ""})}, run.streams.map((name, s) =>
  html("option", {value: s, selected: String(s) === A.stream}, name)));

// -- Editing: exact, since decoding is linear: x = b + sum over latents of v_j W_j (Eq. 10-12) -----

function decoded(edit, t, code) {
  const W = numbers(edit.W[t]), x = Float64Array.from(numbers(edit.b[t])), d = x.length;
  for (const [j, v] of code) for (let c = 0; c < d; c++) x[c] += v * W[j * d + c];
  return x;
}
function nearestTo(edit, t, x) {         // cosines of x with every sample's features of stream t
  const X = numbers(edit.x[t]), d = x.length, length = Math.hypot(...x);
  return Float64Array.from({length: N}, (_, i) => {
    let dot = 0, square = 0;
    for (let c = 0; c < d; c++) { dot += X[i * d + c] * x[c]; square += X[i * d + c] ** 2; }
    return dot / Math.max(length * Math.sqrt(square), 1e-24);
  });
}
function probed(edit, t, x) {            // what the linear probe of stream t makes of it
  const [W, b] = edit.probe[t].map(numbers), C = b.length;
  const score = Array.from(b, (v, c) => x.reduce((sum, value, d) => sum + value * W[d * C + c], v));
  if (!P.one_label) return score.map(v => 1 / (1 + Math.exp(-v)));
  const top = Math.max(...score), e = score.map(v => Math.exp(v - top));
  return e.map(v => v / e.reduce((a, b) => a + b));
}
function editor(run, i, s) {
  const edit = run.edit, m = codes(run, A.mode)[s].samples, latents = codes(run, A.mode)[s].latents;
  if (typeof edit === "string") return html("p", {class: "note", id: "edit"}, edit);
  const own = new Map(), changed = new Map(A.edit.split(",").filter(v => v).map(
    v => v.split(":").map(Number)).filter(([j, v]) => j < run.latents && isFinite(v)));
  for (let e = m.start[i]; e < m.start[i + 1]; e++) own.set(m.column[e], m.value(e));
  const strongest = [...own].sort((a, b) => b[1] - a[1]).slice(0, 10).map(([j]) => j);
  const results = html("div", {id: "edited", "aria-live": "polite"});
  const show = () => {
    const code = new Map([...own, ...changed]);
    results.replaceChildren(...run.streams.map((name, t) => {
      const before = decoded(edit, t, own), after = decoded(edit, t, code);
      const similar = nearestTo(edit, t, after), first = ranked(nearestTo(edit, t, before)).slice(0, 6);
      const shares = edit.probe && [before, after].map(x => probed(edit, t, x));
      const most = shares ? [...shares[1].keys()].sort((a, b) => shares[1][b] - shares[1][a] ||
        a - b).slice(0, 4) : [];
      return html("section", {class: "stream", "data-stream": name}, html("h4", {}, name),
        html("div", {class: "cards"}, ranked(similar).slice(0, 6).map(k => card(k, name,
          shown(similar[k]), 0, first.includes(k) ? "" : "new"))),
        html("dl", {class: "profile"}, most.map(c => [html("dt", {}, NAMES[c]), html("dd", {},
          meter(shares[1][c]), `${shown(shares[1][c])} (was ${shown(shares[0][c])})`)])));
    }));
  };
  const slider = j => {
    const most = 2 * Math.max(own.get(j) || 0, latents.value[latents.start[j]] || 0, 1e-6);
    const value = changed.get(j) ?? own.get(j) ?? 0, told = html("output", {}, shown(value));
    return html("label", {}, html("b", {}, j), ` ${latentTable(run, A.mode)[j].name} `,
      html("input", {type: "range", min: 0, max: most, step: most / 400, value, oninput: e => {
        changed.set(j, Number(e.target.value));
        told.textContent = shown(changed.get(j));
        A.edit = [...changed].map(pair => pair.join(":")).join(",");
        history.replaceState(null, "", address({}));
        show();
      }}), told);
  };
  show();
  return [html("p", {class: "note"}, `What ${run.streams[s]}'s code decodes to in every stream: the `
    + "samples nearest to it by cosine, and what a linear probe of the labels makes of it. "
    + "Set a latent to 0 to silence it. ", html("a", {href: address({edit: ""})}, "undo all"), " ",
  html("label", {}, "add latent ", html("input", {type: "number", min: 0, max: run.latents - 1,
    onchange: e => go({edit: [...[...changed].map(pair => pair.join(":")), `${e.target.value}:` +
      (latents.value[latents.start[e.target.value]] || 0)].join(",")})}))),
  html("div", {class: "sliders"}, [...new Set([...strongest, ...changed.keys()])].map(slider)), results];
}

// -- Where streams differ (thesis 6.5.1), and all samples -----------------------------------------

function disagreements(run) {
  const agree = agreements(run), every = sampleAgreements(run), least = (all, most) =>
    Array.from(all.keys()).filter(n => all[n] !== null).sort((a, b) => all[a] - all[b]).slice(0, most);
  return [html("h3", {}, "Disagreements"), html("p", {class: "note"}, "Overlap between streams that " +
    "chose alone, over all pairs of them: 0 is nothing in common, 1 the same."),
  html("h4", {}, "Samples whose codes differ most"), html("div", {class: "cards", id: "odd"},
    least(every, 18).map(i => card(i, "", shown(every[i])))),
  html("h4", {}, "Latents that fire for different samples"), least(agree, 8).map(j =>
    html("section", {class: "stream odd", "data-latent": j}, linked(run, j, shown(agree[j])),
      codes(run, "alone").map(({name, latents: m}) => html("div", {class: "cards"},
        html("small", {class: "name"}, name), Array.from(m.row.subarray(m.start[j],
          Math.min(m.start[j] + 5, m.start[j + 1])), i => card(i, name, ""))))))];
}
function samplesView() {
  const words = A.find.toLowerCase(), found = Array.from(ROWS.keys()).filter(i => !words ||
    `${told(i)} ${(P.texts.captions || [])[i] || ""}`.toLowerCase().includes(words));
  return [html("h3", {}, "Samples"), html("p", {class: "note"}, `${found.length} of ${N}` +
    (words ? ` with "${A.find}"` : "")), html("div", {class: "cards"}, found.slice(0, 240).map(
    i => card(i, "", told(i))))];
}

// -- All of it ------------------------------------------------------------------------------------

const root = document.getElementById("explorer"), tools = html("div", {class: "tools"});
const side = html("section", {class: "side", "aria-label": "List of latents"});
const detail = html("article", {class: "detail", "aria-label": "What is chosen", tabindex: -1});
let drawn = "";

function render() {
  const run = parse(), modes = Object.keys(run.codes).sort();
  const listed = ["run", "mode", "sort", "up", "find", "alive", "label", "more"].map(k => A[k]).join("|");
  const tab = (text, changes, here) =>
    html("a", {href: address(changes), "aria-current": here ? "true" : null}, text);
  const view = A.sample !== "" ? "samples" : A.view;
  tools.replaceChildren(html("nav", {"aria-label": "Views"},
    tab("Latents", {view: "", sample: "", edit: ""}, view === ""),
    tab("Samples", {view: "samples", sample: "", latent: "", edit: ""}, view === "samples"),
    run.streams.length > 1 ? tab("Disagreements", {view: "disagreements", sample: "", latent: "",
                                                   edit: ""}, view === "disagreements") : ""),
  modes.length > 1 ? html("nav", {"aria-label": "Who chose the latents"},
    modes.map(mode => tab(mode, {mode, edit: ""}, A.mode === mode))) : "",
  P.runs.length > 1 ? html("label", {}, "Configuration ", html("select", {
    onchange: e => go({run: e.target.value})}, P.runs.map((one, r) =>
    html("option", {value: r, selected: one === run}, one.name)))) : "");
  if (listed !== drawn) side.replaceChildren(...listView(run));
  drawn = listed;
  const i = rowOf.get(Number(A.sample)), j = A.latent === "" ? (list[0] || {j: 0}).j : Number(A.latent);
  const chosen = view === "" && A.view === "" ? String(j) : "";
  for (const row of side.querySelectorAll("tr[data-latent]")) {
    const here = row.dataset.latent === chosen;
    row.classList.toggle("here", here);
    if (here) row.querySelector("a").setAttribute("aria-current", "true");
    else row.querySelector("a").removeAttribute("aria-current");
  }
  detail.replaceChildren(...[A.sample !== "" ? i === undefined ?
    html("p", {}, `Sample ${A.sample} is not on this page.`) : sampleView(run, i) :
    A.view === "samples" ? samplesView() : A.view === "disagreements" ? disagreements(run) :
    j < run.latents ? latentView(run, j) : html("p", {}, `There is no latent ${j}.`)].flat(9)
    .filter(part => part !== null));
}
function move(step) {                    // to the next or the last one, of the list or of all samples
  if (A.sample !== "") return go({sample: ROWS[Math.max(0, Math.min(N - 1,
    rowOf.get(Number(A.sample)) + step))], edit: ""});
  const at = A.latent === "" ? 0 : list.findIndex(l => l.j === Number(A.latent));
  const next = list[Math.max(0, Math.min(list.length - 1, at + step))];
  if (next) go({latent: next.j, view: "", more: Math.max(Number(A.more), at + 2)});
}
addEventListener("keydown", e => {
  const step = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[e.key];
  if (!step || e.ctrlKey || e.metaKey || e.altKey || /INPUT|SELECT/.test(e.target.tagName)) return;
  e.preventDefault();
  move(step);
  const row = side.querySelector("tr.here");
  if (row) row.scrollIntoView({block: "nearest"});
});
addEventListener("hashchange", () => {
  const before = A.latent + A.sample + A.view;
  render();
  if (innerWidth < 800 && before !== A.latent + A.sample + A.view) detail.scrollIntoView();
});
if (P.sheet) {
  const sheet = new CSSStyleSheet(), {url, columns} = P.sheet;
  sheet.insertRule(`.thumb{background-image:url("${url}");background-size:${56 * columns}px;` +
                   `image-rendering:${P.sheet.side < 24 ? "pixelated" : "auto"}}`);
  document.adoptedStyleSheets = [sheet];
}
root.append(html("h2", {}, "Explore"), html("p", {class: "note"}, N < P.judged ?
  `${N} of the ${P.judged} judged samples, those that latents like most; all counts are of these. ` :
  `All ${N} judged samples. `, "Arrow keys move through the list."), tools,
html("div", {class: "split"}, side, detail), P.log.length ? training() : "");
render();
})();
