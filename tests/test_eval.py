"""Claims about eval.py, held against slow loops, closed forms, scipy, and the authors' own figures."""
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.special
import scipy.stats
import torch
from PIL import Image

import eval as judge


def random_code(rng, n=120, L=30, k=5):
    indices = np.stack([rng.permutation(L)[:k] for _ in range(n)])
    return judge.sparse_code(indices, np.maximum(rng.standard_normal((n, k)) + 0.5, 0), L)


# -- latents and labels ------------------------------------------------------------------------------------------------

def test_a_silenced_latent_is_not_in_the_code():
    code = judge.sparse_code(np.array([[2, 0], [1, 2]]), np.array([[0.5, 0.0], [0.0, 2.0]]), 4)
    assert code.nnz == 2 and code.toarray().tolist() == [[0, 0, 0.5, 0], [0, 0, 2, 0]]


def test_activation_patterns_by_hand():
    a = judge.sparse_code(np.array([[0, 1], [0, 2]]), np.ones((2, 2)), 5)
    b = judge.sparse_code(np.array([[0, 3], [0, 1]]), np.ones((2, 2)), 5)
    expected = {"latents": 5, "alive_in": [1, 2, 2], "dead": {"a": 2, "b": 2}}
    assert judge.activation_patterns({"a": a, "b": b}) == expected


@pytest.mark.parametrize("top", [3, None])
def test_label_counts_are_those_of_a_slow_loop(top):
    rng = np.random.default_rng(0)
    code, labels = random_code(rng), rng.random((120, 7)) < 0.2
    counts, used = judge.label_counts(code, labels, top)
    dense = code.toarray()
    for j in range(30):
        rows = [i for i in np.argsort(-dense[:, j], kind="stable") if dense[i, j] > 0 and labels[i].any()][:top]
        np.testing.assert_array_equal(counts[j], labels[rows].sum(0))
        assert used[j] == len(rows)


@pytest.mark.parametrize("which, top", [("all", None), ("top50", 50)])
def test_counts_and_jaccard_at_every_depth_are_the_authors(which, top, golden):
    z, cfg = golden("jaccard")
    labels = np.zeros((300, cfg["classes"]), bool)
    row_of = {sample: i for i, sample in enumerate(z["in.sample_indices"].tolist())}
    for i, sample in enumerate(z["in.original_indices"].tolist()):
        if sample in row_of:
            labels[i] = z["in.labels"][row_of[sample]] > 0
    known = np.isin(z["in.original_indices"], z["in.sample_indices"])
    both = {s: judge.label_counts(sp.csr_matrix(z[f"in.codes_{s}"]), labels, top, known) for s in cfg["streams"]}
    counts, n_top = ({s: v[i] for s, v in both.items()} for i in (0, 1))
    np.testing.assert_array_equal(np.stack(list(counts.values()), 1), z[f"out.{which}.counts"])
    levels = judge.taxonomy_levels(cfg["label_codes_column_order"], cfg["parent_of"])
    assert len(levels) == cfg["max_depth"] + 1
    for depth, level in enumerate(levels):
        found = judge.jaccard({s: judge.lift(c, level) for s, c in counts.items()}, n_top)
        assert found["jaccard_all"] == pytest.approx(z[f"out.{which}.mean_all_latents.f64"][depth], abs=1e-9)
        alive_twice = z[f"out.{which}.mean_latents_with_2plus_active_streams.f64"][depth]
        assert found["jaccard"] == pytest.approx(alive_twice, abs=1e-9)
    # On purpose otherwise: with their label order the hierarchy is permuted, which only depths 0 and 5 survive.
    if which == "all":
        wrong = z["out.all_notebook_label_order.mean_all_latents.f64"]
        assert abs(wrong[2] - z["out.all.mean_all_latents.f64"][2]) > 1e-3


def test_jaccard_by_hand():
    counts = {"a": np.array([[2, 1], [0, 0], [3, 0]]), "b": np.array([[1, 1], [4, 0], [0, 3]]),
              "c": np.array([[2, 1], [4, 0], [0, 0]])}
    n_top = {s: c.sum(1) for s, c in counts.items()}
    found = judge.jaccard(counts, n_top)
    assert found["pairs"] == {"a / b": pytest.approx((2 / 3 + 0) / 2), "a / c": 1.,
                              "b / c": pytest.approx((2 / 3 + 1) / 2)}
    per_latent = [(2 / 3 + 1 + 2 / 3) / 3, 1., 0.]
    assert found["jaccard"] == pytest.approx(np.mean(per_latent)) == found["jaccard_all"]
    counts["a"][2] = n_top["a"][2] = 0
    assert judge.jaccard(counts, n_top)["jaccard"] == pytest.approx(np.mean(per_latent[:2]))
    assert judge.jaccard(counts, n_top)["jaccard_all"] == pytest.approx(np.mean(per_latent))


def test_at_the_root_every_label_is_the_same_and_a_shallow_label_stays_itself():
    levels = judge.taxonomy_levels(["x", "y", "s"], {"r": None, "g": "r", "x": "g", "y": "g", "s": "r"})
    assert [len(set(level.tolist())) for level in levels] == [1, 2, 3]
    assert levels[1][0] == levels[1][1] != levels[1][2] == levels[2][2]


def test_a_latent_is_named_when_three_tenths_of_its_samples_agree():
    counts, n_top = np.array([[3, 7], [3, 2], [2, 2], [0, 0]]), np.array([10, 10, 10, 0])
    names, purity = judge.concept_names(counts, n_top, ["x", "y"])
    assert names == ["y", "x", None, None] and purity.tolist() == [0.7, 0.3, 0.2, 0]


# -- reconstruction ----------------------------------------------------------------------------------------------------

def test_the_mean_predictor_scores_zero_and_a_perfect_one_scores_one():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1., 10, 0.1, 3]) + 100
    mean = x.double().mean(0).expand(50, 4)
    parts = (slice(i, i + 20) for i in range(0, 50, 20))
    found = judge.reconstruction(({"t": x[i]}, {("t", "mean"): mean[i], ("t", "t"): x[i], ("t", "zero"): 0 * x[i]})
                                 for i in parts)
    r2 = found["r2"]["t"]
    assert r2["mean"] == pytest.approx(0, abs=1e-8) and r2["t"] == 1 and r2["zero"] < -1
    assert found["nmse"]["t"]["zero"] == pytest.approx(1) and found["nmse"]["t"]["t"] == 0


def test_r2_and_nmse_are_their_formulas():
    rng = np.random.default_rng(0)
    x, x_hat = rng.standard_normal((2, 40, 3))
    x[7] = 0
    found = judge.reconstruction([({"t": torch.tensor(x)}, {("t", "s"): torch.tensor(x_hat)})])
    unexplained = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert found["r2"]["t"]["s"] == pytest.approx(1 - unexplained, abs=1e-12)
    keep = np.arange(40) != 7
    assert found["nmse"]["t"]["s"] == pytest.approx((((x - x_hat) ** 2).sum(1)[keep] / (x ** 2).sum(1)[keep]).mean())


def test_a_constant_stream_has_no_r2():
    assert judge.reconstruction([({"t": torch.ones(5, 2)}, {("t", "s"): torch.zeros(5, 2)})])["r2"]["t"]["s"] is None


def test_the_ceiling_is_that_of_least_squares_and_nothing_for_unrelated_streams():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 5))
    streams = {"a": a + 3, "b": a @ rng.standard_normal((5, 4)) + rng.standard_normal((4000, 4)) - 2,
               "c": rng.standard_normal((4000, 3))}
    train, test = ({s: x[i] for s, x in streams.items()} for i in (slice(0, 3000), slice(3000, 4000)))
    found = judge.ridge_ceiling(train, test)
    for t in "ab":
        for s in "ab":
            if s != t:
                X = np.c_[train[s], np.ones(3000)]
                x_hat = np.c_[test[s], np.ones(1000)] @ np.linalg.lstsq(X, train[t], rcond=None)[0]
                expected = 1 - ((test[t] - x_hat) ** 2).sum() / ((test[t] - test[t].mean(0)) ** 2).sum()
                assert found[t][s] == pytest.approx(expected, abs=1e-3)
    assert abs(found["a"]["c"]) < 0.01 and abs(found["c"]["b"]) < 0.01 and found["a"]["b"] > 0.4


# -- probes ------------------------------------------------------------------------------------------------------------

def test_the_solver_is_exact_where_scikit_learn_stops_short(golden):
    z, cfg = golden("probe")
    for i in range(len(cfg["cases"])):
        x, y = z[f"in.case{i}.x"].astype(np.float64), z[f"in.case{i}.y"]
        w, b = judge.logistic_1d(x, y)
        u = w * x + b
        found = [w, b, (np.logaddexp(0, u) - y * u).mean()]
        np.testing.assert_allclose(found, z[f"out.case{i}.exact_wb_loss.f64"], rtol=1e-6, atol=1e-7,
                                   err_msg=cfg["cases"][i]["what"])


def test_many_problems_at_once_agree_with_scipy_on_each():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 80)) * rng.choice([0.1, 1, 30], (6, 1)), rng.random((6, 80)) < 0.4
    weight = rng.integers(0, 4, (6, 80))
    w, b = judge.logistic_1d(x, y, weight)
    for i in range(6):
        def cost(p):
            u = p[0] * x[i] + p[1]
            e = weight[i] * (1 / (1 + np.exp(-u)) - y[i])
            loss = (weight[i] * (np.logaddexp(0, u) - y[i] * u)).sum()
            return p[0] ** 2 / 2 + loss, np.array([p[0] + (e * x[i]).sum(), e.sum()])
        best = scipy.optimize.minimize(cost, np.zeros(2), jac=True, method="L-BFGS-B",
                                       options={"ftol": 1e-15, "gtol": 1e-10})
        np.testing.assert_allclose([w[i], b[i]], best.x, atol=1e-6)


def test_probe_tasks_and_losses_are_the_authors(golden):
    z, cfg = golden("probe")
    labels = z["in.labels"] > 0
    # On purpose otherwise: a label with exactly 50 positives is a task (the text's "at least 50").
    assert [t for t, _ in judge.probe_tasks(labels)] == [0, 1, 2, 3, 4, 6, 7] and labels[:, 2].sum() == 50
    tasks = [task for task in judge.probe_tasks(labels) if task[0] != 2]
    assert [t for t, _ in tasks] == z["out.real.task"].tolist()
    for t, parts in tasks:
        for part in ("train", "val", "test"):
            assert set(parts[part][0]) == set(z[f"out.split.task{t}.{part}"])
            np.testing.assert_array_equal(parts[part][1], labels[parts[part][0], t])
    code = sp.csr_matrix(z["in.codes"])
    for name, binary in (("real", False), ("binary", True)):
        # Their candidates come from all rows, test included; ours from training positives. Given theirs, all else
        # agrees.
        found = judge.probe(code, tasks, binary=binary, chosen=z[f"out.{name}.candidates"])["tasks"]
        np.testing.assert_array_equal([r["latent"] for r in found], z[f"out.{name}.latent"])
        # scikit-learn's solver stops up to 1e-3 short of the optimum
        for part in ("val", "test"):
            np.testing.assert_allclose([r[part] for r in found], z[f"out.{name}.{part}_loss.f64"], atol=1e-4)


def test_candidates_come_from_training_positives_and_the_perfect_latent_wins():
    rng = np.random.default_rng(0)
    labels = np.zeros((400, 1), bool)
    labels[:150] = True
    dense = (rng.random((400, 40)) < 0.3) * rng.random((400, 40))
    dense[:, 7] = labels[:, 0] * (0.5 + rng.random(400))
    tasks = judge.probe_tasks(labels)
    leak = dense.copy()                                      # a latent that is right on the held-out rows only
    leak[:, 9] = 0
    held = np.concatenate([tasks[0][1][p][0] for p in ("val", "test")])
    leak[held, 9] = labels[held, 0]
    for code in (dense, leak):
        for binary in (True, False):
            found = judge.probe(sp.csr_matrix(code), tasks, binary=binary)
            assert found["tasks"][0]["latent"] == 7 and found["loss"] < 0.2
    chance = judge.probe(sp.csr_matrix((rng.random((400, 40)) < 0.3).astype(float)), tasks)["loss"]
    assert 0.6 < chance < 0.8


def test_a_label_that_most_samples_have_is_balanced_the_other_way():
    labels = np.ones((300, 1), bool)
    labels[:60] = False
    (_, parts), = judge.probe_tasks(labels)
    y = np.concatenate([parts[p][1] for p in parts])
    assert len(y) == 120 and y.sum() == 60
    labels[40:60] = True
    assert judge.probe_tasks(labels) == []


# -- retrieval ---------------------------------------------------------------------------------------------------------

def test_ranks_and_recalls_are_the_authors(golden):
    z, cfg = golden("retrieval")
    for i in range(len(cfg["cases"])):
        q, r = z[f"in.case{i}.query"], z[f"in.case{i}.reference"]
        for a, b in ((q, r), (sp.csr_matrix(q), sp.csr_matrix(r))):
            np.testing.assert_array_equal(judge.retrieval_ranks(a, b, chunk=31), z[f"out.case{i}.ranks"])
        found = judge.retrieval({"q": q, "r": r})["q -> r"]
        for name, value in found.items():
            assert value == pytest.approx(z[f"out.case{i}.{name}"].item(), abs=1e-6)


def test_a_tie_counts_against_the_query_and_a_zero_code_never_wins():
    x = np.array([[1., 0], [1, 0], [0, 1], [0, 0]])
    for form in (np.asarray, sp.csr_matrix):
        assert judge.retrieval_ranks(form(x), form(x)).tolist() == [2, 2, 1, 4]


def test_only_streams_of_one_width_are_compared():
    assert judge.retrieval({"a": np.eye(3), "b": np.ones((3, 2))}) == {}


# -- planted truth -----------------------------------------------------------------------------------------------------

def test_recovery_counts_each_concept_and_each_latent_once():
    eye = np.eye(6)
    truth = {"a": eye[:4], "b": np.where([[1], [1], [1], [0]], eye[[1, 2, 3, 0]], 0)}
    learned = {"a": eye[[3, 2, 1, 0, 5]], "b": eye[[3, 3, 2, 1, 1]]}
    # a: all four. b sees concepts 0-2 (as e1, e2, e3): all three. One latent for both: concept 1 is row 2 of each,
    # concept 0 is row 3 of each, concept 2 is row 1 of each.
    assert judge.recovery(learned, truth) == {"a": {"found": 4, "of": 4}, "b": {"found": 3, "of": 3},
                                              "same latent": {"found": 3, "of": 3}}
    twice = {"a": np.stack([eye[0], eye[0], eye[4]])}
    assert judge.recovery(twice, {"a": np.stack([eye[0], eye[0]])})["a"] == {"found": 2, "of": 2}
    assert judge.recovery({"a": eye[[0]]}, {"a": np.stack([eye[0], eye[0]])})["a"] == {"found": 1, "of": 2}


# -- tables and pictures -----------------------------------------------------------------------------------------------

def test_every_string_in_a_report_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    page = judge.html_table(["", evil], [[evil, evil]]) + judge.svg_lines({evil: [(0, 1), (1, 2)]}, evil, evil)
    code = judge.sparse_code(np.zeros((60, 1), int), np.ones((60, 1)), 2)
    page += judge.gallery({evil: code}, np.ones((60, 1), bool), [evil], lambda i: str(i))
    judge.write_report(tmp_path / "r.html", evil, [(evil, page)])
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "latent 0" in text


def test_a_picture_that_cannot_be_read_leaves_its_name(tmp_path):
    from PIL import Image
    Image.new("RGB", (300, 200), "red").save(tmp_path / "x.png")
    assert judge.thumbnail(tmp_path / "x.png").startswith('<img alt="" src="data:image/jpeg;base64,')
    assert judge.thumbnail(tmp_path / "none<.png") == "none&lt;.png"


def test_a_chart_of_one_point_or_none_is_drawn():
    assert "polyline" in judge.svg_lines({"a": [(1, 2)]}, "x", "y")
    assert "nothing" in judge.svg_lines({"a": [(1, None)]}, "x", "y")


# -- classifiers on features -------------------------------------------------------------------------------------------

def test_knn_is_the_slow_loop_over_neighbours():
    rng = np.random.default_rng(0)
    train, y, test = rng.standard_normal((40, 5)), rng.integers(0, 3, 40), rng.standard_normal((7, 5))
    found = judge.knn(train, y, test, ks=(3, 10, 500), temperature=0.2, n_classes=3, chunk=4)
    for i, t in enumerate(test):
        similarity = np.array([t @ v / np.linalg.norm(t) / np.linalg.norm(v) for v in train])
        order = np.argsort(-similarity)
        for k in (3, 10, 500):
            votes = np.zeros(3)
            for j in order[:k]:
                votes[y[j]] += np.exp(similarity[j] / 0.2)
            np.testing.assert_allclose(found[k][i], votes / votes.sum(), rtol=1e-4)


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    positive, score = rng.random(60) < 0.3, rng.integers(0, 9, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert judge.auc(positive, score) == pytest.approx(np.mean(pairs), abs=1e-12)
    u = scipy.stats.mannwhitneyu(score[positive], score[~positive]).statistic
    assert judge.auc(positive, score) == pytest.approx(u / positive.sum() / (~positive).sum(), abs=1e-12)


def test_scores_by_hand():
    truth, p = np.array([0, 0, 0, 1]), np.array([[.9, .1], [.8, .2], [.4, .6], [.3, .7]])
    found = judge.scores(truth, p)
    assert found == {"accuracy": 0.75, "balanced accuracy": pytest.approx((2 / 3 + 1) / 2), "F1": pytest.approx((4 / 5 + 2 / 3) / 2), "AUC": 1.0}
    assert judge.scores(np.zeros(3, int), np.ones((3, 1)))["AUC"] is None


def test_the_linear_probe_is_at_the_minimum_that_scipy_finds():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((80, 4)) * [1, 5, 0.1, 1] + 3, rng.integers(0, 3, 80)
    x[:, 3] = 2                                              # a constant feature
    mean, std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    z = np.hstack([(x - mean) / std, np.ones((80, 1))])

    def loss(w):
        w = w.reshape(5, 3)
        logits = z @ w
        return (scipy.special.logsumexp(logits, 1) - logits[np.arange(80), y]).sum() + (w[:-1] ** 2).sum() / 2
    w = scipy.optimize.minimize(loss, np.zeros(15), method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14}).x.reshape(5, 3)
    np.testing.assert_allclose(judge.logistic_probe(x, y, x), scipy.special.softmax(z @ w, 1), atol=1e-4)


# -- comparing models, heat maps -----------------------------------------------------------------------------------------

def test_the_sgd_probe_learns_what_is_linear_and_repeats_itself():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((600, 5)), rng.standard_normal(5)
    y = (x @ w > 0).astype(int)
    p = judge.sgd_probe(x[:400] * 10, y[:400], x[400:] * 10)
    assert judge.scores(y[400:], p)["accuracy"] > 0.95 and np.allclose(p.sum(1), 1)
    torch.manual_seed(5)
    assert np.array_equal(p, judge.sgd_probe(x[:400] * 10, y[:400], x[400:] * 10))


def test_pairs_of_models_are_tested_by_the_textbook_formulas():
    runs = {"a": [0.9, 0.8, 0.95, 0.85, 0.9], "b": [0.7, 0.75, 0.8, 0.72, 0.74], "c": [0.71, 0.74, 0.81, 0.7, 0.76]}
    pairs = {(p["a"], p["b"]): p for p in judge.compare(runs)}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    gap = np.array(runs["a"]) - runs["b"]
    t = gap.mean() / (gap.std(ddof=1) / 5 ** 0.5)
    # Student's t with 4 degrees of freedom: P(|T| > t) = 1 - s (1 + (1 - s^2) / 2), s = t / sqrt(t^2 + 4)
    s = t / (t * t + 4) ** 0.5
    assert pairs["a", "b"]["t_p"] == pytest.approx(1 - s * (1 + (1 - s * s) / 2), rel=1e-9)
    assert pairs["a", "b"]["d"] == pytest.approx(t / 5 ** 0.5) and pairs["a", "b"]["difference"] == pytest.approx(gap.mean())
    assert pairs["a", "b"]["wilcoxon_p"] == pytest.approx(2 / 2 ** 5)                       # all five one way: the least there is
    low, middle, high = sorted(p["t_p"] for p in pairs.values())
    assert [p["holm_p"] for p in sorted(pairs.values(), key=lambda p: p["t_p"])] == pytest.approx(
        [3 * low, max(3 * low, 2 * middle), max(3 * low, 2 * middle, high)])
    assert judge.beaten(pairs.values()) == {"a": ["b", "c"]}


def test_runs_that_differ_by_a_constant_get_no_p():
    pair, = judge.compare({"a": [0.5, 0.6], "b": [0.4, 0.5]})
    assert pair["t_p"] is None and pair["difference"] == pytest.approx(0.1) and judge.beaten([pair]) == {}
    lacking, = judge.compare({"a": [0.5, None], "b": [0.4, 0.5]})
    assert lacking["difference"] is None and lacking["t_p"] is None and judge.beaten([lacking]) == {}
    assert judge.mean_std([1., 2., 3.]) == "2.000 ± 1.000" and judge.mean_std([0.5, None]) == "0.500 ± 0.000" and judge.mean_std([None]) == "-"


def test_grad_cam_of_a_linear_model_is_its_weighted_channels():
    """score_c = mean over places of w_c . a: the gradient is w_c / (h w), so the map is relu(sum_d w_cd a_d), scaled."""
    layer = torch.nn.Identity()
    w = torch.tensor([[1., -2., 0.5], [-1., 1., 1.]])

    def model(x):
        return layer(x).mean((2, 3)) @ w.T
    x = torch.randn(4, 3, 5, 6)
    for classes in (None, [1, 1, 0, 0]):
        heat = judge.grad_cam(model, layer, lambda a: a.permute(0, 2, 3, 1), x.clone(), classes)
        chosen = model(x).argmax(1) if classes is None else torch.tensor(classes)
        expected = torch.einsum("bdhw,bd->bhw", x, w[chosen]).clamp(min=0)
        low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
        np.testing.assert_allclose(heat, (expected - low) / (high - low), atol=1e-5)
    assert (judge.grad_cam(model, layer, lambda a: a.permute(0, 2, 3, 1), -torch.ones(1, 3, 2, 2), [1]) == 0).all()


def test_overlays_colour_high_red_and_low_blue_in_the_right_place():
    grey = Image.new("RGB", (40, 20), (128, 128, 128))
    out = np.asarray(judge.overlay(grey, np.array([[0., 1.]]), 1.)).astype(int)
    assert out[10, 39, 0] > 180 > out[10, 0, 0] and out[10, 0, 2] > out[10, 39, 2] and out.shape == (20, 40, 3)
    boxes = judge.box_overlay(grey, [[0, 0, 20, 20], [40, 20, 20, 20]], np.array([0.1, 0.9]), 2., 1.)
    colours = judge.heat_colours(np.array([[0.5, 1.]]))[0]
    pixels = np.asarray(boxes)
    assert tuple(pixels[5, 5]) == tuple(colours[0]) and tuple(pixels[15, 25]) == tuple(colours[1]) and tuple(pixels[5, 35]) == (128, 128, 128)
    sheet = judge.contact_sheet([[grey, grey]] * 3, ["a", "b"], 50)
    assert sheet.size == (2 * 58 + 8, 3 * 58 + 28)
