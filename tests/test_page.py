"""Claims about the page one explores, held against numpy in a real browser; without Chromium its parts alone."""
import base64
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import data
import eval as judge
import repsae

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = ["<script>window.hacked = 1</script>", "\"><img src=x onerror='parent.hacked = 1'>", "it's \\ & </title>", "D"]

# A frame shows one address after the other; what it holds then is collected, to be read by --dump-dom.
DRIVER = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>
const steps = STEPS, found = [], frame = document.createElement("iframe");
frame.style.cssText = "width:390px;height:900px";
function facts() {
  const page = frame.contentDocument, all = (root, what) => [...root.querySelectorAll(what)];
  const text = what => page.querySelector(what) && page.querySelector(what).textContent;
  return {list: all(page, "tr[data-latent]").map(row => Number(row.dataset.latent)),
    chosen: text("tr[aria-current] b"), heading: text("article h3"), article: text("article"), count: text(".side .note"),
    cells: Object.fromEntries(all(page, "tr[data-latent]").map(row => [row.dataset.latent,
      Object.fromEntries(all(row, "td[class]").map(cell => [cell.className, cell.textContent]))])),
    sheet: all(page, "section[data-run]").map(part => [part.dataset.run, Number(part.dataset.latent),
      all(part, ".cards").map(row => all(row, ".card").map(card => Number(card.dataset.row)))]),
    curves: all(page, "details figure").map(part => [part.querySelector("figcaption").textContent,
      all(part, "path[style]").map(line => line.getAttribute("d").match(/[ML]/g).length)]),
    odd: all(page, "#odd .card").map(card => Number(card.dataset.row)),
    streams: all(page, "article section[data-stream]").map(part => ({name: part.dataset.stream,
      words: part.querySelector("h4").textContent, rows: all(part, ".card").map(card => Number(card.dataset.row)),
      edited: !!part.closest("#edited"), values: all(part, ".card small:nth-child(2)").map(v => v.textContent),
      shares: all(part, "dd small").map(v => v.textContent), labels: all(part, "dt").map(v => v.textContent)})),
    titles: all(page, ".card").map(card => card.title).join("\\n"), options: all(page, "option").map(o => o.textContent),
    images: all(page, "img").length, scripts: all(page, "script").length, hacked: window.hacked || frame.contentWindow.hacked,
    wide: page.documentElement.scrollWidth};
}
function next() {
  if (!steps.length) {
    found.push(frame.contentWindow.performance.getEntriesByType("navigation")[0].loadEventEnd);
    document.getElementById("found").textContent = JSON.stringify(found);
    return;
  }
  const step = steps.shift(), before = frame.contentWindow.location.hash;
  if (step.startsWith("key ")) frame.contentWindow.dispatchEvent(new KeyboardEvent("keydown", {key: step.slice(4)}));
  else frame.contentWindow.location.hash = step;
  setTimeout(() => { found.push(facts()); next(); }, 50);
}
frame.onload = () => { frame.onload = null; next(); };
frame.src = "REPORT";
document.body.append(frame);
</script>"""


def browse(report, steps):
    """What the page holds after each of the steps, an address or "key ArrowDown"; what the console said; load time in ms."""
    with tempfile.TemporaryDirectory() as folder:
        driver = pathlib.Path(folder, "driver.html")
        driver.write_text(DRIVER.replace("STEPS", json.dumps(steps)).replace("REPORT", report.as_uri()))
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
             "--disable-web-security", "--enable-logging=stderr", f"--user-data-dir={folder}/profile", "--dump-dom",
             "--virtual-time-budget=60000", driver.as_uri()], capture_output=True, text=True, timeout=240)
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S).group(1)
    for code, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(code, letter)
    *found, loaded = json.loads(text)
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line], loaded


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on planted streams whose labels, captions and ids are hostile, and what numpy makes of its codes."""
    folder = tmp_path_factory.mktemp("page")
    planted = data.planted_streams(500, {"x": 16, "y_txt": 12, "z": 10})
    kingdom = planted.labels.reshape(500, 4, 12).sum(2).argmax(1)
    rng = np.random.default_rng(0)
    np.savez(folder / "f.npz", **planted.streams, labels=kingdom, label_names=np.array(EVIL), split=planted.split,
             captions=np.array([f"{EVIL[i % 3]} caption {i}" for i in range(500)]), ids=np.array([EVIL[1]] * 500),
             images=rng.integers(0, 255, (500, 8, 8, 3), dtype=np.uint8))
    repsae.main(["sparc", "--data", str(folder / "f.npz"), "--latents", "40", "--k", "4", "--batch", "64", "--lr", "3e-3",
                 "--epochs", "8", "--null", "--out", str(folder / EVIL[0].replace("/", "|"))])
    run = next(path for path in folder.iterdir() if path.is_dir())
    coded = repsae.Coded(str(run), repsae.parse(["latents", str(run)])[1])
    rows = coded.features.rows("test", "val")
    return {"report": run / "report.html", "coded": coded, "rows": rows, "labels": coded.features.label_matrix(rows),
            "codes": {mode: coded.codes(rows, mode) for mode in ("joint", "alone")}}


STEPS = ["latent=7&mode=alone", "latent=7&mode=joint", "sort=frequency", "sort=purity&up=1&label=1", "find=caption%2041",
         "alive=some", "sample=SAMPLE", "sample=SAMPLE&stream=1&mode=joint", "sample=SAMPLE&edit=LATENT:0,3:0.5",
         "view=disagreements", "sort=frequency&latent=", "key ArrowDown", "latent=999", "view=samples&find=caption%2041"]


@pytest.fixture(scope="module")
def seen(made):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    code = made["codes"]["alone"]["x"]
    sample = int(np.flatnonzero(np.diff(code.indptr) > 2)[0])
    made["sample"], made["strongest"] = sample, int(code.indices[code.indptr[sample]:][code[[sample]].data.argmax()])
    steps = [step.replace("SAMPLE", str(made["rows"][sample])).replace("LATENT", str(made["strongest"])) for step in STEPS]
    found, console, loaded = browse(made["report"], steps)
    return {**dict(zip(STEPS, found)), "console": console, "loaded": loaded}


def close(text, number):
    return abs(float(text) - number) < 1e-3


def test_the_page_says_nothing_on_the_console_and_asks_for_nothing(made, seen):
    assert seen["console"] == []
    text = made["report"].read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-" in text
    assert not re.search(r'(src|href)=["\']?(?!data:)[a-z]+:|@import|fetch\(|https?://(?!www\.w3)', text)


@pytest.mark.parametrize("mode", ["alone", "joint"])
def test_a_latent_shows_its_top_samples_of_every_stream(mode, made, seen):
    shown = seen[f"latent=7&mode={mode}"]
    assert shown["heading"].startswith("Latent 7") and len(shown["streams"]) == 3
    for part in shown["streams"]:
        column = made["codes"][mode][part["name"]][:, [7]].toarray().ravel()
        order = np.argsort(-column, kind="stable")[:min(8, (column > 0).sum())]
        assert [close(v, column[i]) for v, i in zip(part["values"], order)] == [True] * len(order)
        assert len(set(part["rows"][:len(order)]) ^ set(made["rows"][order])) <= 2          # but for ties in 16 bits
        if len(order):
            counts, n = judge.label_counts(made["codes"][mode][part["name"]], made["labels"])
            assert int(part["shares"][0]) == counts[7].max() and f"{(column > 0).sum()} of {len(column)}" in part["words"]


def test_lists_are_sorted_and_filtered(made, seen):
    codes = made["codes"]["alone"].values()
    frequency = np.mean([code.getnnz(axis=0) for code in codes], 0) / len(made["rows"])
    alive = np.sum([code.getnnz(axis=0) > 0 for code in codes], 0)
    listed = seen["sort=frequency"]["list"]
    assert sorted(listed) == np.flatnonzero(alive).tolist() and (np.diff(frequency[listed]) <= 1e-12).all()
    assert seen["alive=some"]["list"] and set(seen["alive=some"]["list"]) == set(np.flatnonzero((alive > 0) & (alive < 3)))
    counts, n = map(sum, zip(*(judge.label_counts(code, made["labels"]) for code in codes)))
    purity, label = counts.max(1) / np.maximum(n, 1), counts.argmax(1)
    one = seen["sort=purity&up=1&label=1"]
    assert one["list"] and (np.diff(purity[one["list"]]) >= -1e-12).all()
    assert set(one["list"]) == set(np.flatnonzero((label == 1) & (purity >= .3) & (n >= 5)))
    assert all(close(cells["purity"], purity[int(j)]) for j, cells in one["cells"].items())
    named = [f"{EVIL[i % 3]} caption {i}" for i in made["rows"]]
    best = [judge.top_samples(code, 8) for code in codes]
    holds = {j for j in range(40) for ranks in best if any("caption 41" in named[i] for i in ranks[[j]].indices)}
    assert set(seen["find=caption%2041"]["list"]) == holds and 0 < len(holds) < len(listed)


def test_agreement_is_the_overlap_of_what_streams_do_alone(made, seen):
    def overlap(a, b):
        a, b = a / a.sum(), b / b.sum()
        return np.minimum(a, b).sum() / np.maximum(a, b).sum()
    dense = [code.toarray() for code in made["codes"]["alone"].values()]
    for j, cells in seen["sort=frequency"]["cells"].items():
        own = [z[:, int(j)] for z in dense if (z[:, int(j)] > 0).sum() >= 5]
        pairs = [overlap(own[s], own[t]) for s in range(len(own)) for t in range(s)]
        assert close(cells["agreement"], np.mean(pairs)) if pairs else cells["agreement"] == "–"
    rows = [np.mean([overlap(dense[s][i], dense[t][i]) for s in range(3) for t in range(s) if dense[s][i].any()
                     and dense[t][i].any()] or [1]) for i in range(len(made["rows"]))]
    assert seen["view=disagreements"]["odd"][0] in made["rows"][np.argsort(rows)[:2]]


@pytest.mark.parametrize("step, s, mode", [("sample=SAMPLE", 0, "alone"), ("sample=SAMPLE&stream=1&mode=joint", 1, "joint")])
def test_a_sample_finds_its_partners_with_the_rank_that_retrieval_gives(step, s, mode, made, seen):
    codes, i = made["codes"][mode], made["sample"]
    asked, parts = list(codes)[s], [part for part in seen[step]["streams"] if not part["edited"]]
    assert [part["name"] for part in parts] == [t for t in codes if t != asked]
    for part in parts:
        rank = judge.retrieval_ranks(codes[asked], codes[part["name"]])[i]
        assert f"rank {rank} of {len(made['rows'])}" in part["words"] and made["rows"][i] in part["rows"]
        near, similar = judge.nearest(codes[asked][[i]], codes[part["name"]], 6)
        assert all(close(v, w) for v, w in zip(part["values"], similar[0]))


def test_training_is_drawn_from_the_log_and_the_null_s_agreement_stands_by_a_latent_s(made, seen):
    log = (made["report"].parent / "log.csv").read_text().splitlines()
    shown = seen["latent=7&mode=alone"]
    (loss, lines), (dead, others) = shown["curves"]
    assert loss.startswith("mean NMSE") and loss.endswith(" self cross") and dead.endswith(" x y_txt z")
    assert lines + others == [len(log)] * 5                  # one line is the heading, and the first point stands twice
    payload = json.loads(re.search(r'id="payload">(.*?)</script>', made["report"].read_text(), re.S).group(1))
    null = payload["runs"][0]["null"]["agreement"]
    assert f"({null:.3f} in the mean of the null" in shown["article"] and 0 < null < 1


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_latents_stand_on_one_sheet_for_all_streams_and_configurations(made, tmp_path):
    coded, codes = made["coded"], made["codes"]
    features, rows, one = repsae.explored(coded.model, coded.features, coded.flags)
    other = {**one, "codes": {"alone": codes["joint"], "joint": codes["alone"]}}
    page = judge.Page("two")
    page.explore(judge.explorer(features, rows, {"one": one, "other": other}, 300))
    page.write(lambda name: tmp_path / name)
    first, all_ = browse(tmp_path / "report.html", ["view=configurations&latent=7", "view=configurations&sort=frequency"])[0]
    assert [part[:2] for part in first["sheet"]] == [["one", 7], ["other", 7]] and first["chosen"] == "7"
    assert max(first["wide"], all_["wide"]) <= 390
    for (_, j, shown), mode in zip(first["sheet"], ("alone", "joint")):
        for own, code in zip(shown, codes[mode].values()):
            column = code[:, [j]].toarray().ravel()
            order = np.argsort(-column, kind="stable")[:min(8, (column > 0).sum())]
            assert len(own) == len(order) and len(set(own) ^ set(rows[order])) <= 2         # but for ties in 16 bits
    assert [part[1] for part in all_["sheet"]] == np.repeat(all_["list"][:3], 2).tolist()


def test_an_edited_code_decodes_exactly(made, seen):
    coded, i = made["coded"], made["sample"]
    code = made["codes"]["alone"]["x"][[i]].toarray().ravel()
    code[made["strongest"]], code[3] = 0, 0.5
    features = repsae.normalised(coded.model, coded.features, made["rows"], "cpu")
    train = repsae.normalised(coded.model, coded.features, coded.features.rows("train")[:2000], "cpu")
    parts = [part for part in seen["sample=SAMPLE&edit=LATENT:0,3:0.5"]["streams"] if part["edited"]]
    assert len(parts) == 3
    for part in parts:
        t = part["name"]
        x = code @ coded.model.W_dec[t].detach().numpy() + coded.model.b_pre[t].detach().numpy()
        _, similar = judge.nearest(x[None], features[t], 6)
        assert all(close(v, w) for v, w in zip(part["values"], similar[0]))
        W, b = judge.logistic_fit(train[t], coded.features.labels[coded.features.rows("train")[:2000]], 4)
        p = np.sort(torch.softmax(torch.as_tensor(x @ W + b), 0).numpy())[::-1]
        assert all(abs(float(v.split()[0]) - w) < 5e-3 for v, w in zip(part["shares"], p))


def test_strings_of_files_are_shown_and_never_run(made, seen):
    for step, shown in seen.items():
        if step in STEPS:
            assert (shown["images"], shown["scripts"], shown.get("hacked")) == (0, 2, None), step
    assert set(EVIL) <= set(seen["latent=7&mode=alone"]["options"])
    assert all(f"{evil} caption" in seen["view=samples&find=caption%2041"]["titles"]
               for evil in EVIL[:3] if any(EVIL[i % 3] == evil and "41" in f"{i}"[:2] for i in made["rows"]))


def test_a_telephone_a_keyboard_and_a_wrong_address_will_do(made, seen):
    assert all(shown["wide"] <= 390 for step, shown in seen.items() if step in STEPS)
    assert seen["key ArrowDown"]["chosen"] == str(seen["sort=frequency"]["list"][1])
    assert "There is no latent 999" in seen["latent=999"]["article"] and seen["loaded"] < 20000


def test_without_a_script_the_verdict_and_the_tables_are_there(made):
    text = re.sub(r"<script.*?</script>", "", made["report"].read_text(), flags=re.S)
    verdict = json.loads((made["report"].parent / "metrics.json").read_text())["verdict"]
    assert judge.html.escape(verdict["trust"]) in text and text.count("<table") > 4 and "<noscript>" in text
    assert text.index("verdict") < text.index('class="numbers"') < text.index('id="explorer"') < text.index("<table")


def test_the_page_of_latents_begins_with_the_verdict_on_the_run(made, tmp_path):
    run = made["report"].parent
    verdict = json.loads((run / "metrics.json").read_text())["verdict"]
    for name, content in (("a", None), ("b", "[]"), ("c", '{"verdict": {"level": "2"}}')):
        if content:
            (run / "metrics.json").write_text(content)
        repsae.main(["latents", str(run), "--out", str(tmp_path / name)])
        text = (tmp_path / name / "report.html").read_text()
        assert (judge.html.escape(verdict["trust"]) in text) == (content is None)
    (run / "metrics.json").write_text(json.dumps({"verdict": verdict}))


# -- without a browser -------------------------------------------------------------------------------------------------

def test_packed_arrays_and_rows_can_be_read_back():
    def read(packed):
        return np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).astype(float) * (packed["scale"] or 1)
    rng = np.random.default_rng(0)
    for x in (rng.standard_normal(50), rng.random(50), np.array([3, 70000]), np.array([True, False]), np.zeros(0), np.zeros(3)):
        np.testing.assert_allclose(read(judge.packed(x)), x, atol=1e-4)
    a, b = (sp.random(20, 2000, .02, random_state=seed, format="csr") for seed in (0, 1))
    a = sp.vstack([sp.csr_matrix((1, 2000)), a, sp.csr_matrix(([7., 8., 9.], ([0, 0, 0], [254, 509, 1999])), (1, 2000))]).tocsr()
    b = sp.vstack([b, sp.csr_matrix((2, 2000))]).tocsr()
    packed = judge.packed_rows(a, b)
    lengths, steps = (read(packed[key]).astype(int) for key in ("lengths", "steps"))
    found, values, n = np.zeros((2, 22, 2000)), np.array([read(v) for v in packed["values"]]), 0
    steps = iter(steps)
    for row, length in enumerate(lengths):
        column = -1
        for _ in range(length):
            while (step := next(steps)) == 255:
                column += 255
            column += step
            found[:, row, column], n = values[:, n], n + 1
    assert n == values.shape[1] and list(steps) == []
    np.testing.assert_allclose(found, [a.toarray(), b.toarray()], atol=1e-3)


def test_a_run_of_several_seeds_lists_latents_by_how_stable_they_are(tmp_path):
    np.savez(tmp_path / "f.npz", **data.planted_streams(300, {"x": 8, "y": 6}).streams)
    repsae.main(["sparc", "--data", str(tmp_path / "f.npz"), "--latents", "12", "--k", "3", "--batch", "32", "--epochs", "3",
                 "--seeds", "2", "--no-null", "--out", str(tmp_path / "r")])
    coded = repsae.Coded(str(tmp_path / "r" / "seed42"), repsae.parse(["latents", str(tmp_path / "r" / "seed42")])[1])
    codes = coded.codes(coded.features.rows("test", "val")).values()
    found, alive = [], np.stack([code.getnnz(axis=0) > 0 for code in codes], 1)
    for seed in (42, 43):
        state = torch.load(tmp_path / "r" / f"seed{seed}" / "checkpoint.pt", weights_only=True)["model"]
        found.append({s: state[f"W_dec.{s}"].numpy() for s in "xy"})
    stable = judge.stability(found, alive)
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    (shown,), console, _ = browse(tmp_path / "r" / "report.html", ["sort=stable"])
    assert console == [] and (np.diff(stable[shown["list"]]) <= 0).all()
    assert all(close(cells["stable"], stable[int(j)]) for j, cells in shown["cells"].items()) and len(shown["cells"]) == 12


def test_the_strongest_token_is_the_slow_loops():
    code = sp.random(12, 5, .5, random_state=0, format="csr")
    dense = code.toarray().reshape(4, 3, 5)
    want = np.where(dense.max(1) > 0, dense.argmax(1) + 1, 0)
    assert (judge.strongest_tokens(code, 3).toarray() == want).all()


def test_samples_that_latents_like_most_go_in_first_and_a_page_stays_small(made, monkeypatch):
    codes = list(made["codes"]["alone"].values())
    order, n = judge.by_rank(codes, len(made["rows"])), len(made["rows"])
    tops = {int(code[:, [j]].toarray().argmax()) for code in codes for j in np.flatnonzero(code.getnnz(axis=0))}
    assert sorted(order) == list(range(n)) and tops == set(order[:len(tops)].tolist())
    coded = made["coded"]
    features, rows, shown = repsae.explored(coded.model, coded.features, coded.flags)
    few = judge.explorer(features, rows, {"a": shown}, 30)
    assert len(few["texts"]["captions"]) == 30 and few["judged"] == n
    monkeypatch.setattr(judge, "PAGE_BYTES", len(json.dumps(few)) * 2 // 3)
    assert len(json.dumps(judge.explorer(features, rows, {"a": shown}, 30))) <= judge.PAGE_BYTES
    monkeypatch.setattr(judge, "EDIT_NUMBERS", 10)
    assert "Left out" in judge.explorer(features, rows, {"a": shown}, 3)["runs"][0]["edit"]
