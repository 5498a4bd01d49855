"use strict";
/* The page one explores: what latents mean, and what a sample's code says, stream by stream.
   Read first: `A`, the address, from which all that is shown follows; `codes`; `latentTable`; then
   the views. It reads one JSON payload (eval.explorer) and asks for nothing. Text of files becomes
   text nodes, never markup. Letters: i sample of this page, j latent, s, t streams, c label. */
(() => {
const P = JSON.parse(document.getElementById("payload").textContent);
const TOP = 50;                          // samples that define a latent's meaning (thesis 5.3.5)
const FEWEST = 5;                        // active samples below which a share says little
const KINDS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array};

// An element, its attributes and listeners, and its children: every string becomes a text node.
function h(tag, attributes, ...children) {
  const kind = /^(svg|path|text)$/.test(tag) ? "2000/svg" : "1999/xhtml";
  const made = document.createElementNS(`http://www.w3.org/${kind}`, tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.flat(9).filter(child => child !== null));
  return made;
}
const shown = v => v === null ? "–" : v.toFixed(v >= 100 ? 0 : 3);
const percent = v => `${(100 * v).toFixed(1)} %`;
const total = values => values.reduce((a, b) => a + b, 0);
const caption = i => (P.texts.captions || [])[i] || "";
const note = (...words) => h("p", {class: "note"}, ...words);
// Positions of the n best values that are not null, ties to the lower.
const best = (values, n, up = 1) => [...values.keys()].filter(k => values[k] !== null)
  .sort((a, b) => up * (values[b] - values[a]) || a - b).slice(0, n);
const cached = {};
const once = (key, make) => cached[key] ??= make();     // what takes time, when first asked for

// -- Arrays ---------------------------------------------------------------------------------------
function levels(packed) {                // whole numbers, as they were packed
  if (packed.levels) return packed.levels;
  const text = atob(packed.data), bytes = new Uint8Array(text.length);
  for (let p = 0; p < text.length; p++) bytes[p] = text.charCodeAt(p);
  return packed.levels = new KINDS[packed.type](bytes.buffer);
}
const numbers = packed => packed.numbers ||=
  new Float32Array(levels(packed)).map(v => v * (packed.scale || 1));
// A sparse matrix by rows: entries start[n] .. start[n + 1] of row n, each of a column `at`.
function sparse(group, part, places) {
  const [lengths, steps, all] = [group.lengths, group.steps, group.values[part]].map(levels);
  const {scale} = group.values[part], start = new Uint32Array(lengths.length + 1);
  const [at, value, place] = [Uint32Array, Float32Array, Uint32Array].map(A => new A(all.length));
  let [from, byte, kept] = [0, 0, 0];
  for (let n = 0; n < lengths.length; n++) {
    for (let column = -1, end = from + lengths[n]; from < end; from++) {
      while (steps[byte] === 255) column += steps[byte++];       // and the step goes on
      at[kept] = column += steps[byte++];
      value[kept] = all[from] * scale;
      if (places) place[kept] = places[from];
      if (all[from]) kept++;             // what is 0 here, another stream of the group has
    }
    start[n + 1] = kept;
  }
  return {start, at, value, place, sorted: new Uint8Array(lengths.length)};
}
const slice = (m, n, name) => m[name].subarray(m.start[n], m.start[n + 1]);
// The same of a latent, greatest first, ties to the lower sample: brought there when first asked.
function top(m, j, name = "value") {
  const order = m.sorted[j]++ ? [] : best(slice(m, j, "value"), Infinity);
  for (const row of ["at", "value", "place"].map(key => slice(m, j, key)))
    row.set(order.map(e => row[e]));
  return slice(m, j, name);
}
const entries = (m, n) => Array.from(slice(m, n, "at"), (j, e) => [j, m.value[m.start[n] + e]]);
const count = (m, n) => m.start[n + 1] - m.start[n];
function turned(m) {                     // the entries of each column, in the order of the rows
  const columns = Array.from(ROWS, () => []);
  for (let j = 0; j + 1 < m.start.length; j++)
    for (const [i, v] of entries(m, j)) columns[i].push([j, v]);
  return columns;
}
const ROWS = levels(P.rows), N = ROWS.length, KNOWN = levels(P.known), NAMES = P.label_names;
const labels = P.labels && sparse(P.labels, 0);
const LABELS = Array.from(ROWS, (_, i) => labels ? [...slice(labels, i, "at")] : []);
const told = i => Array.from(LABELS[i], c => NAMES[c]).join(", ") || `sample ${ROWS[i]}`;
// Of each stream the `latents`, rows of samples, and the `samples`, each a list of [latent, value].
const codes = (run, mode) => once(`${run.name} ${mode} codes`, () => run.streams.map((name, s) => {
  const joint = run.codes[mode].length === 1, group = run.codes[mode][joint ? 0 : s];
  const part = joint ? s : 0, places = group.values[part + (joint ? run.streams.length : 1)];
  const latents = sparse(group, part, places && levels(places));
  return {name, latents, get samples() { return latents.turned ||= turned(latents); }};
}));

// -- Numbers of latents and of samples ------------------------------------------------------------
function profile(m, j, counts) {         // adds the labels of its top samples; returns their number
  let n = 0;
  for (const i of count(m, j) > TOP ? top(m, j, "at") : slice(m, j, "at")) {
    if (n < TOP) LABELS[i].forEach(c => counts[c]++);
    n += KNOWN[i];
  }
  return Math.min(n, TOP);
}
function described(run, streams, j) {    // a latent's line of the table
  const counts = new Uint32Array(NAMES.length), all = streams.map(one => one.latents);
  const active = total(all.map(m => count(m, j))), n = total(all.map(m => profile(m, j, counts)));
  const sum = total(all.map(m => total(slice(m, j, "value"))));
  const most = Math.max(...counts), purity = n < FEWEST ? null : most / n;
  const label = purity >= 0.3 ? counts.indexOf(most) : -1;       // thesis A.3
  return {j, alive: all.filter(m => count(m, j)).length, frequency: active / (N * all.length),
          mean: active ? sum / active : null, purity, agreement: run.agreement.latents[j],
          stable: run.stability?.[j] ?? null, label, name: run.names[j] || NAMES[label] || ""};
}
const latentTable = (run, mode) => once(`${run.name} ${mode} table`, () => Array.from(
  {length: run.latents}, (_, j) => described(run, codes(run, mode), j)));
// What one finds it by: a latent's name, and labels and captions of its top samples.
const searched = (run, j) => once(`${run.name} ${j} text`, () => [latentTable(run, "alone")[j].name,
  ...codes(run, "alone").flatMap(one => Array.from(top(one.latents, j, "at").subarray(0, 8),
    i => `${told(i)} ${caption(i)}`))].join("\n").toLowerCase());

// -- The address: all that is shown ---------------------------------------------------------------
const OF_LIST = {run: "0", mode: "alone", up: "", find: "", alive: "", label: "", more: "50",
                 sort: P.runs[0].streams.length > 1 || !NAMES.length ? "agreement" : "purity"};
const DEFAULTS = {...OF_LIST, latent: "", sample: "", view: "", stream: "0", edit: ""};
let A = DEFAULTS, list = [], listed = "";
const address = changes => `#${new URLSearchParams(        // of what is shown after these changes
  Object.entries({...A, ...changes}).filter(([k, v]) => String(v) !== DEFAULTS[k]))}`;
const go = changes => { location.hash = address(changes); };
const beside = changes => address({latent: "", sample: "", edit: "", view:      // of another thing
  "latent" in changes && A.view === "configurations" ? A.view : "", ...changes});

// -- Pieces ---------------------------------------------------------------------------------------
function picture(i, place) {             // its part of the sheet, or the name of one that is lost
  const {lost, columns} = P.sheet, [height, width] = P.grid || [1, 1];
  if (lost[i] !== undefined) return h("span", {class: "words"}, lost[i]);
  const frame = place && h("i", {style: `width:${100 / width}%;height:${100 / height}%;left:${
    100 / width * ((place - 1) % width)}%;top:${100 / height * Math.floor((place - 1) / width)}%`});
  return h("span", {class: "thumb", role: "img", "aria-label": told(i), style:
    `background-position:${-56 * (i % columns)}px ${-56 * Math.floor(i / columns)}px`},
  frame || "");
}
function card(i, stream, words, place, mark) {
  const textual = !P.sheet || /txt|text|words|caption/i.test(stream) && caption(i);
  return h("a", {href: beside({sample: ROWS[i]}), class: mark ? "card partner" : "card",
                 title: `${told(i)}. ${caption(i)}`, "data-row": ROWS[i]},
    textual ? h("span", {class: "words"}, caption(i) || told(i)) : picture(i, place),
    h("small", {}, words), mark ? h("small", {}, mark) : null);
}
const cards = (...all) => h("div", {class: "cards"}, ...all);
const streamed = (name, words, ...all) => h("section", {class: "stream", "data-stream": name},
  h("h4", {}, name, h("small", {}, words)), ...all);
const chip = (run, j, words) => h("a", {href: beside({latent: j}), class: "chip"}, h("b", {}, j),
  ` ${latentTable(run, A.mode)[j].name} `, h("small", {}, words));
const meter = (share, words) => [h("span", {class: "meter", style: `width:${
  Math.min(100, 100 * share)}%`}), h("small", {}, words)];
const shares = rows => h("dl", {class: "profile"}, rows.map(([c, share, words]) =>
  [h("dt", {title: NAMES[c]}, NAMES[c]), h("dd", {}, meter(share, words))]));
function binned(values, top, n) {
  const bins = new Array(n).fill(0);
  for (const v of values) if (v <= top) bins[Math.min(n - 1, Math.floor(v / top * n))]++;
  return bins;
}
const drawing = (width, height, name, kind, ...all) => h("svg", {viewBox: `0 0 ${width} ${height}`,
  class: kind, role: "img", "aria-label": name}, all);
const said = (x, y, kind, v) => h("text", {x, y, class: kind}, v);
const axes = (x, y, right, most, last) => [h("path", {d: `M${x} ${y}.5H${right}`, class: "axis"}),
  said(x - 4, 14, "end", most), said(x - 4, y, "end", 0), said(x, y + 14, "", 0),
  said(right, y + 14, "end", last)];
const strokes = (kind, bins, most, step, x, y, height) => h("path", {class: kind, d: bins.map(
  (v, b) => v ? `M${x + step * (b + 0.5)} ${y}v${-height * Math.min(1, v / most)}` : "").join("")});
// How many samples reach which activation, and in grey what all latents of the null do.
function histogram(values, twin, name) {
  const top = values[0], own = binned(values, top, 20), most = Math.max(...own);
  const grey = binned(twin ? numbers(twin) : [], top, 20);
  return drawing(210, 80, `${name}: ${values.length} samples, up to ${shown(top)}`, "histogram",
    strokes("null", grey, most * total(grey) / values.length, 9, 22, 62, 54),
    strokes("own", own, most, 9, 22, 62, 54), axes(22, 62, 202, most, shown(top)));
}
function spark(run, j) {                 // the same in the list, all streams together
  const all = codes(run, A.mode).flatMap(one => [...slice(one.latents, j, "value")]);
  const bins = binned(all, Math.max(...all), 16);
  return drawing(64, 16, "", "spark", strokes("", bins, Math.max(...bins), 4, 0, 15, 14));
}
// Lines {name: [[x, y], ...]} from 0 up; a single point shows by its round ends.
function chart(title, lines) {
  const all = Object.values(lines).flat();
  const most = [0, 1].map(k => Math.max(0, ...all.map(point => point[k])) || 1);
  const at = ([x, y]) => `${50 + 380 * x / most[0]} ${165 - 145 * y / most[1]}`;
  const ink = n => `hsl(${210 + 67 * n} 55% 50%)`;
  return h("figure", {}, h("figcaption", {}, title, Object.keys(lines).map((name, n) =>
    h("b", {style: `color:${ink(n)}`}, ` ${name}`))), drawing(440, 185, title, "chart",
    axes(50, 165, 430, +most[1].toFixed(3), `step ${most[0]}`),
    Object.values(lines).map((line, n) => h("path", {style: `stroke:${ink(n)}`,
      d: `M${[line[0], ...line].map(at).join("L")}`}))));
}

// -- The list -------------------------------------------------------------------------------------
const COLUMNS = {                        // key: heading, what it says, text of a cell
  j: ["latent", "its number, and the label of most of its top samples"],
  frequency: ["active", "share of samples and streams where it is active", percent],
  mean: ["mean", "mean activation where it is active", shown],
  purity: ["purity", "share of its label among the 50 top samples of each stream", shown],
  agreement: ["agrees", "overlap of where it is active, between streams that chose alone", shown],
  stable: ["stable", "cosine with its partner in runs from other seeds", shown],
  alive: ["alive", "in how many streams it is ever active", String]};
function filtered(run) {
  const words = A.find.toLowerCase(), M = run.streams.length, way = A.up ? 1 : -1;
  const key = l => l[A.sort] ?? way * 1e9;                       // what has none comes last
  const lives = {all: n => n === M, some: n => n && n < M, one: n => n === 1}[A.alive] || Boolean;
  return latentTable(run, A.mode).filter(l => lives(l.alive) &&
    (!words || searched(run, l.j).includes(words)) && (!A.label || l.label === Number(A.label)))
    .sort((a, b) => way * (key(a) - key(b)) || b.frequency - a.frequency || a.j - b.j);
}
const asked = (label, found, type, settings) => h("label", {}, label, h("input", {type,
  onchange: e => found(e.target.value), ...settings}));
const choose = (name, label, options) => h("label", {}, label, h("select", {name, onchange: e =>
  go({[name]: e.target.value})}, options.map(([value, text]) =>
  h("option", {value, selected: A[name] === String(value) ? "" : null}, text))));
function heading(k) {
  const arrow = A.sort !== k ? "" : A.up ? " ↑" : " ↓", up = arrow === " ↓" ? "1" : "";
  return h("th", {class: k, "aria-sort": arrow ? A.up ? "ascending" : "descending" : null},
    h("a", {title: COLUMNS[k][1], href: address({sort: k, up})}, COLUMNS[k][0], arrow));
}
function listView(run) {
  const several = run.streams.length > 1, [first, ...keys] = Object.keys(COLUMNS).filter(k =>
    (several || k !== "alive") && latentTable(run, A.mode).some(l => l[k] !== null));
  list = filtered(run);
  const rows = list.slice(0, A.more).map(l => h("tr", {"data-latent": l.j},
    h("th", {}, h("a", {href: beside({latent: l.j})}, h("b", {}, l.j), ` ${l.name}`)),
    h("td", {}, spark(run, l.j)), keys.map(k => h("td", {class: k}, COLUMNS[k][2](l[k])))));
  return [h("form", {class: "filters", onsubmit: e => e.preventDefault()},
    asked("Name, label, caption", find => go({find}), "search", {value: A.find}),
    NAMES.length ? choose("label", "Label", [["", "any"], ...NAMES.map((v, c) => [c, v])]) : null,
    several ? choose("alive", "Alive in", [["", "any stream"], ["all", "all streams"],
      ["some", "some, not all"], ["one", "one alone"]]) : null),
  note(`${list.length} of ${run.latents} latents`), h("div", {class: "list"},
    h("table", {class: "latents"}, h("thead", {}, h("tr", {}, heading(first), h("th"),
      keys.map(heading))), h("tbody", {}, rows)), list.length > rows.length ?
      h("a", {class: "more", href: address({more: Number(A.more) + 400})}, "show more") : null)];
}

// -- A latent -------------------------------------------------------------------------------------
function firesWith(run, j) {             // samples of both / of either, the best 6
  const both = new Uint32Array(run.latents), streams = codes(run, A.mode);
  const size = k => total(streams.map(one => count(one.latents, k)));
  for (const {latents: m} of streams) {
    const own = new Uint8Array(N);
    for (const i of slice(m, j, "at")) own[i] = 1;
    for (let k = 0; k < both.length; k++) for (const i of slice(m, k, "at")) both[k] += own[i];
  }
  const share = Array.from(both, (n, k) => k === j || !n ? null : n / (size(k) + size(j) - n));
  return best(share, 6).map(k => chip(run, k, percent(share[k])));
}
function latentStream(run, j, {name, latents: m}, s) {
  const values = top(m, j), n = values.length, counts = new Uint32Array(NAMES.length);
  const middle = Math.max(8, Math.floor(n / 2) - 3), used = profile(m, j, counts);
  if (!n) return streamed(name, " never active");
  const some = (from, to) => cards(Array.from(top(m, j, "at").subarray(from, to), (i, e) =>
    card(i, name, shown(values[from + e]), m.place[m.start[j] + from + e])));
  return streamed(name, ` ${n} of ${N} samples`, h("div", {}, some(0, 8),
    n > middle ? h("small", {}, "middling") : null, some(middle, middle + 6)),
  h("div", {}, histogram(values, run.null && run.null[A.mode][s], name),
    shares(best(counts, 5).filter(c => counts[c]).map(c => [c, counts[c] / used, counts[c]]))));
}
function latentView(run, j) {
  const l = latentTable(run, A.mode)[j], near = run.near[j];
  if (!l) return [note(`There is no latent ${A.latent}.`)];
  return [h("h3", {}, `Latent ${j} `, h("em", {}, l.name)),
    note(`${A.mode}: alive in ${l.alive} of ${run.streams.length}, purity ${shown(l.purity)}, ` +
      `agreement alone ${shown(l.agreement)}`, run.null ? ` (${shown(run.null.agreement)} in the ` +
      "mean of the null, whose latents are the grey)" : null, ". Under a sample its activation; " +
      "bars: samples by activation", P.grid ? "; a frame: the patch where it is strongest." : "."),
    codes(run, A.mode).map((stream, s) => latentStream(run, j, stream, s)),
    h("h4", {}, "Fires with"), h("p", {class: "chips", id: "with"}, firesWith(run, j)),
    h("h4", {}, "Nearest rows of the dictionary"), h("p", {class: "chips", id: "near"},
      near.filter(k => k !== j).map(k => chip(run, k, "")))];
}

// -- A sample -------------------------------------------------------------------------------------
function partners(run, i, s) {           // what its code in stream s is nearest to in the others
  const streams = codes(run, A.mode), own = streams[s].samples[i], query = new Map(own);
  const length = z => Math.hypot(...z.map(([, v]) => v));
  return streams.filter((_, t) => t !== s).map(({name, samples: m}) => {
    const similar = Float64Array.from(m, z => total(z.map(([j, v]) => v * (query.get(j) || 0))) /
      Math.max(1e-24, length(own) * length(z)));
    const rank = similar.filter(v => v >= similar[i]).length;      // ties count against it
    return streamed(name, ` true partner: rank ${rank} of ${N}, cosine ${shown(similar[i])}`,
      cards([...new Set([...best(similar, 6), i])].map(k =>
        card(k, name, shown(similar[k]), 0, k === i ? "partner" : ""))));
  });
}
function bars(run, i) {                  // its latents, those of most streams first
  const streams = codes(run, A.mode), found = new Map();
  streams.forEach(({samples, latents}, s) => samples[i].forEach(([j, v]) => {
    if (!found.has(j)) found.set(j, new Array(streams.length).fill(0));
    found.get(j)[s] = v / top(latents, j)[0];
  }));
  const all = [...found], spread = all.map(([, v]) => 100 * v.filter(Boolean).length + total(v));
  return [note(`${all.length} latents, ${all.filter(([, v]) => v.every(Boolean)).length} of them ` +
    "in every stream; as shares of the most that each reaches there"),
  h("div", {class: "scroll"}, h("table", {class: "bars"}, h("thead", {}, h("tr", {},
    h("th", {}, "latent"), streams.map(one => h("th", {}, one.name)))),
  h("tbody", {}, best(spread, 24).map(n => h("tr", {}, h("th", {}, chip(run, all[n][0], "")),
    all[n][1].map(v => h("td", {}, v ? meter(v, v.toFixed(2)) : "")))))))];
}
function sampleView(run, i) {
  if (i < 0) return [note(`Sample ${A.sample} is not on this page.`)];
  const s = Math.min(A.stream, run.streams.length - 1), words = ["ids", "groups"].map(
    key => P.texts[key] ? ` ${key.slice(0, -1)} ${P.texts[key][i]}` : "");
  return [h("h3", {}, `Sample ${ROWS[i]} `, h("em", {}, told(i))),
    cards(P.sheet ? picture(i) : null, h("p", {}, caption(i), h("small", {}, words))),
    h("h4", {}, "Its latents"), bars(run, i), run.streams.length > 1 ?
      [h("h4", {}, "Nearest by code, asked ", choose("stream", "by ", run.streams.map(
        (name, t) => [t, name]))), partners(run, i, s)] : [],
    h("h4", {}, "Edit its code"), editor(run, i, s)];
}

// -- Editing: exact, since decoding is linear, x = b + sum over latents of v_j W_j (Eq. 10-12) ----
function decoded({W, b}, t, code) {
  const rows = numbers(W[t]), x = Float64Array.from(numbers(b[t])), d = x.length;
  for (const [j, v] of code) for (let n = 0; n < d; n++) x[n] += v * rows[j * d + n];
  return x;
}
function nearestTo(edit, t, x) {         // cosines of x (d,) with all samples' features (N, d)
  const X = numbers(edit.x[t]), d = x.length, length = Math.hypot(...x);
  return Float64Array.from(ROWS, (_, i) => {
    const row = X.subarray(i * d, (i + 1) * d), dot = row.reduce((sum, v, n) => sum + v * x[n], 0);
    return dot / Math.max(1e-24, length * Math.hypot(...row));
  });
}
function probed(edit, t, x) {            // what a linear probe of the labels makes of it
  const [W, b] = edit.probe[t].map(numbers), C = b.length;
  const score = Array.from(b, (v, c) => x.reduce((sum, one, n) => sum + one * W[n * C + c], v));
  const e = score.map(v => Math.exp(v - Math.max(...score)));
  return P.one_label ? e.map(v => v / total(e)) : score.map(v => 1 / (1 + Math.exp(-v)));
}
function editedStream(edit, t, name, own, changed) {
  const [was, now] = [own, new Map([...own, ...changed])].map(code => decoded(edit, t, code));
  const similar = nearestTo(edit, t, now), first = best(nearestTo(edit, t, was), 6);
  const [before, after] = edit.probe ? [was, now].map(x => probed(edit, t, x)) : [[], []];
  return streamed(name, "", cards(best(similar, 6).map(k =>
    card(k, name, shown(similar[k]), 0, first.includes(k) ? "" : "new"))),
  shares(best(after, 4).map(c => [c, after[c], `${shown(after[c])} (was ${shown(before[c])})`])));
}
function editor(run, i, s) {
  if (typeof run.edit === "string") return note(run.edit);
  const {samples: m, latents} = codes(run, A.mode)[s], own = new Map(m[i]);
  const changed = new Map(A.edit.split(",").map(v => v.split(":").map(Number)).filter(
    ([j, v]) => latentTable(run, A.mode)[j] && isFinite(v)));
  const most = j => top(latents, j)[0] || 1;
  const results = h("div", {id: "edited"});
  const show = () => results.replaceChildren(...run.streams.map((name, t) =>
    editedStream(run.edit, t, name, own, changed)));
  const slider = j => {
    const value = changed.get(j) ?? own.get(j), out = h("output", {}, shown(value));
    return h("label", {}, chip(run, j, ""), out, h("input", {type: "range", min: 0, step: "any",
      max: 2 * most(j), value, "aria-label": `latent ${j}`, oninput: e => {
        A.edit = [...changed.set(j, Number(e.target.value))].map(pair => pair.join(":")).join();
        out.textContent = shown(changed.get(j));
        history.replaceState(null, "", address({}));
        show();
      }}));
  };
  const strongest = best([...own.values()], 10).map(n => [...own.keys()][n]);
  const added = j => go({edit: [A.edit, `${j}:${most(Number(j))}`].filter(Boolean).join()});
  show();
  return [note(`What the code of ${run.streams[s]} decodes to: samples nearest by cosine, and ` +
    "what a linear probe of the labels says. ", h("a", {href: address({edit: ""})}, "undo all")),
  asked("add latent ", added, "number", {min: 0, max: run.latents - 1}),
  h("div", {class: "sliders"}, Array.from(new Set([...strongest, ...changed.keys()]), slider)),
  results];
}

// -- Where streams differ (thesis 6.5.1), and all samples -----------------------------------------
const strips = (run, mode, j, n) => codes(run, mode).map(({name, latents: m}) => cards(
  h("small", {class: "name"}, name), h("small", {}, count(m, j) ? "" : "never active"),
  Array.from(top(m, j, "at").subarray(0, n), i => card(i, name, ""))));
function disagreements(run) {
  const {latents, samples} = run.agreement;
  return [h("h3", {}, "Disagreements"), note("Overlap between streams that chose alone, " +
    "the mean over pairs: 0 is nothing in common, 1 the same."),
  h("h4", {}, "Samples coded most differently"), h("div", {class: "cards", id: "odd"},
    best(samples, 18, -1).map(i => card(i, "", shown(samples[i])))),
  h("h4", {}, "Latents that fire for different samples"), best(latents, 8, -1).map(j =>
    h("section", {"data-latent": j}, chip(run, j, shown(latents[j])), strips(run, "alone", j, 5)))];
}
// Latents x configurations x streams on one sheet (thesis Fig. 5.2, A.1-A.3).
function configurations() {
  const chosen = A.latent === "" ? list.slice(0, 3).map(l => l.j) : [Number(A.latent)];
  return [h("h3", {}, "Configurations"), note("The same number in every configuration; a latent " +
    "chosen in the list, or the first three there. Top samples of every stream."),
  chosen.map(j => P.runs.filter(run => j in latentTable(run, A.mode)).map(run => h("section",
    {"data-run": run.name, "data-latent": j}, h("h4", {}, `Latent ${j}, ${run.name}`, h("small",
      {}, ` agreement alone ${shown(run.agreement.latents[j])}`)), strips(run, A.mode, j, 8))))];
}
function samplesView(run) {
  if (A.sample !== "") return sampleView(run, ROWS.indexOf(Number(A.sample)));
  const words = A.find.toLowerCase(), found = [...ROWS.keys()].filter(i =>
    `${told(i)} ${caption(i)}`.toLowerCase().includes(words));
  return [h("h3", {}, "Samples"), note(`${found.length} of ${N}`),
    cards(found.slice(0, 240).map(i => card(i, "", told(i))))];
}

// -- All of it ------------------------------------------------------------------------------------
const tools = h("div", {class: "tools"}), training = h("details");
const detail = h("article", {"aria-label": "What is chosen"});
const side = h("section", {class: "side", "aria-label": "List of latents"});
const VIEWS = {latents: latentView, samples: samplesView, disagreements, configurations};
function render() {
  A = {...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1)))};
  const run = P.runs[Number(A.run)] || P.runs[0], modes = Object.keys(run.codes).sort();
  if (!modes.includes(A.mode)) A.mode = "alone";
  const wanted = Object.keys(OF_LIST).map(k => A[k]).join();
  if (wanted !== listed) side.replaceChildren(...listView(run));
  listed = wanted;                       // else it stays where one has scrolled to
  const name = A.sample !== "" ? "samples" : A.view in VIEWS ? A.view : "latents";
  const j = A.latent === "" && list.length ? list[0].j : Number(A.latent);
  const tab = (text, here, href) => h("a", {href, "aria-current": here ? "true" : null}, text);
  const views = Object.keys(VIEWS).filter(key => key === "disagreements" ? run.streams.length > 1 :
    key !== "configurations" || P.runs.length > 1);
  tools.replaceChildren(h("nav", {"aria-label": "Views"}, views.map(key =>
    tab(key, name === key, beside({view: key === "latents" ? "" : key})))),
  h("nav", {"aria-label": "Who chose the latents"}, modes.map(mode =>
    tab(mode, A.mode === mode, address({mode, edit: ""})))),
  P.runs.length > 1 ? choose("run", "Configuration ", P.runs.map((one, r) => [r, one.name])) : "");
  for (const row of side.querySelectorAll("tr[data-latent]"))
    row.toggleAttribute("aria-current", /^[lc]/.test(name) && Number(row.dataset.latent) === j);
  detail.replaceChildren(...VIEWS[name](run, j).flat(9));
  training.hidden = !run.curves;
  training.replaceChildren(h("summary", {}, "Training"),
    ...Object.entries(run.curves || {}).map(([title, lines]) => chart(title, lines)));
}
addEventListener("keydown", e => {       // to the next or the last latent of the list, or sample
  const step = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[e.key];
  if (!step || e.ctrlKey || e.metaKey || e.altKey || /INPUT|SELECT/.test(e.target.tagName)) return;
  const all = A.sample ? [...ROWS] : list.map(l => l.j), now = A.sample || A.latent;
  const at = (now ? all.indexOf(Number(now)) : 0) + step;
  e.preventDefault();
  if (at in all) location.hash = beside(A.sample ? {sample: all[at]} :
    {latent: all[at], more: Math.max(A.more, at + 1)});
});
addEventListener("hashchange", () => {
  const before = A.latent + A.sample + A.view;
  render();
  side.querySelector("tr[aria-current]")?.scrollIntoView({block: "nearest"});
  if (innerWidth < 960 && before !== A.latent + A.sample + A.view) detail.scrollIntoView();
});
onbeforeprint = () => document.querySelectorAll("details").forEach(part => part.open = true);
if (P.sheet) document.head.append(h("style", {}, `.thumb { background: url("${P.sheet.url}"); ` +
  `background-size: ${56 * P.sheet.columns}px; ` +
  `image-rendering: ${P.sheet.side < 24 ? "pixelated" : "auto"}; }`));
document.getElementById("explorer").append(h("h2", {}, "Explore"),
  note(`${N} of ${P.judged} judged samples, those that latents like most. Arrow keys move on.`),
  tools, h("div", {class: "split"}, side, detail), training);
render();
})();
