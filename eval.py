"""Every number and every picture: arrays, callables in; plain dicts, tables and files out.

Read first   thesis 5.3.5, 5.4.1-5.4.5, A.1.3, A.3; sparc.txt 4.2-4.3 (Jaccard and R^2 are only
             written out there). For probes, paired tests, Grad-CAM: 3.2.3-3.2.4, 3.3.2.
Glossary     n samples evaluated . L latents . C labels . M streams . s source, t target
             code    scipy CSR matrix (n, L) of one stream's activations, positive entries only
             joint   codes whose support all streams chose together
             alone   each stream chose from itself only
             null    the same numbers for a model trained on streams whose rows were shuffled
                     against each other

Joint numbers flatter: a query and its reference carry the same index set, chosen from both, so that
retrieval and Jaccard are near 1 even under the null. Callers compute every cross-stream number both
ways. For the alone Jaccard the null is no control either, since its latents share labels by chance:
pairing each latent with another one is.

Deviations   from the authors' code: probe candidates are chosen on training positives only (theirs
             sees the test rows); as the text says, tasks need at least 50 positives (theirs: more
             than 50) and Jaccard takes the 50 top samples, over living latents and, as published,
             over all (the published figures took every active sample); the taxonomy is indexed by
             label (theirs permutes it at depths 1-4); retrieval ties count against the query. The
             linear probe is not chosen by the test set. Barcodes are divided by the number of a
             patient's images (CytoSAE Eq. 4; its code: by the number of latents); entropy counts
             all active images (`weighted`: as its code). Concept latents (thesis 5.4.4) are counted
             on training samples, not on those segmented, and fire with the concept more often than
             not, or are the ten likeliest. Relevancy maps start at the same layer everywhere. Small
             objects count in AP, AR and mIoU, as in the authors' code, not in sparc.txt. What
             Mammo-SAE leaves open about boxes (percentile, overlap, score) are arguments here.
Ours         the null, Jaccard's control, the linear baseline, the verdict.
"""
import base64
import collections
import errno
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import sys

import numpy as np
import scipy                                                 # its parts when they are first used
import scipy.sparse as sp
import torch
from PIL import Image, ImageDraw, ImageOps

PARTS = 20  # of the groups, each left out in turn: a jackknife
TOP = 50  # samples that define a latent's meaning (thesis 5.3.5, A.3)


def sparse_code(indices, values, n_latents):
    """(n, k) indices, -1 where a row has fewer, and values -> CSR (n, L) float32, without zeros."""
    n, k = indices.shape
    columns = np.maximum(np.asarray(indices, np.int32), 0).ravel()
    values = np.asarray(values, np.float32).flatten()        # a copy: eliminate_zeros writes to it
    code = sp.csr_matrix((values, columns, np.arange(0, n * k + 1, k)), (n, n_latents))
    code.eliminate_zeros()
    code.sort_indices()
    return code


# -- Which latents live, and what they mean ------------------------------------------------------

def activation_patterns(codes):
    """Thesis Table 5.1, from {stream: code}: `alive_in` [latents active in 0, 1, ..., M streams],
    `silent` {stream: latents never active}."""
    alive = np.stack([code.getnnz(axis=0) > 0 for code in codes.values()])                  # (M, L)
    return {"latents": alive.shape[1],
            "alive_in": np.bincount(alive.sum(0), minlength=len(codes) + 1).tolist(),
            "silent": {s: int((~a).sum()) for s, a in zip(codes, alive)}}


def top_samples(code, top=TOP):
    """Each latent's `top` most activating samples (all if None), best first, ties to the lower row:
    CSR (L, n) of ranks 1, 2, ..."""
    by_latent = code.tocsc()
    latent = np.repeat(np.arange(code.shape[1]), np.diff(by_latent.indptr))
    order = np.lexsort((by_latent.indices, -by_latent.data, latent))
    rank = np.arange(len(order)) - by_latent.indptr[latent] + 1
    keep = rank <= (top or np.inf)
    places = latent[keep], by_latent.indices[order][keep]
    return sp.csr_matrix((rank[keep], places), shape=code.shape[::-1])


def label_counts(code, labels, top=TOP, known=slice(None)):
    """How often each label occurs among each latent's `top` samples (all active ones if None):
    counts (L, C), and the number of samples behind them (L,), 0 where a latent is not active.
    labels (n, C) bool; known (n,) bool: the samples that count, those that were labelled."""
    best = top_samples(code[known], top).astype(bool)
    return best @ labels[known].astype(np.int32), np.diff(best.indptr)


def taxonomy_levels(label_names, parents):
    """For every depth from 0 (root) to the deepest label: (C, nodes), 1 where a label is lifted to
    a node; one above that depth stays itself. Label counts times it are counts of nodes. parents:
    {name: its parent or None}, or None: then the labels are the one level."""
    paths, parents = [[name] for name in label_names], parents or {}
    for path in paths:
        while parents.get(path[0]) is not None:
            path.insert(0, parents[path[0]])
    depths = range(max(map(len, paths)))
    lifted = np.array([[path[:depth + 1][-1] for path in paths] for depth in depths])
    return [(nodes[:, None] == np.unique(nodes)).astype(int) for nodes in lifted]


def jaccard(counts, n_top):
    """Generalised Jaccard similarity of label counts between streams (sparc.txt 4.2), by latent.

    counts: stream -> (L, C), n_top: stream -> (L,), from `label_counts`. A latent is alive in a
    stream where n_top > 0. Returns `jaccard`, the mean over latents alive in two streams or more of
    their mean over such pairs of streams; `jaccard_all`, the same with all other latents counted as
    0, as the published numbers do; `control`, the first with each latent paired with another of
    those alive in both streams, half of them further on; `pairs`, the first for each pair;
    `within`, half the 95 in 100 interval of the first for other latents as these."""
    pairs, L = list(itertools.combinations(counts, 2)), len(next(iter(counts.values())))
    own, other = (np.ma.masked_all((len(pairs), L)) for _ in range(2))
    for i, (s, t) in enumerate(pairs):
        both = np.flatnonzero((n_top[s] > 0) & (n_top[t] > 0))
        for score, partner in ((own, both), (other, np.roll(both, len(both) // 2))):
            a, b = counts[s][both], counts[t][partner]
            score[i, both] = np.minimum(a, b).sum(1) / np.maximum(np.maximum(a, b).sum(1), 1)
        if len(both) == 1:                                   # one alone has no other
            other[i] = np.ma.masked
    mean = own.mean(0)                                       # (L,) of the pairs where it is alive
    alive = mean.compressed()
    return {"jaccard": _mean(alive), "jaccard_all": float(mean.filled(0).mean()),
            "within": float(1.96 * alive.std() / len(alive) ** 0.5) if len(alive) else None,
            "pairs": {f"{s} / {t}": _mean(v.compressed()) for (s, t), v in zip(pairs, own)},
            "control": _mean(other.mean(0).compressed())}


def concept_names(counts, n_top, label_names):
    """Names of the latents, from `label_counts`: the dominant label of the top samples if its
    share, the purity, reaches 0.3 (thesis A.3), else None."""
    purity = counts.max(1) / np.maximum(n_top, 1)
    return [label_names[j] if p >= 0.3 else None for j, p in zip(counts.argmax(1), purity)]


def concept_alignment(codes, labels, label_names, parents, known=slice(None)):
    """Jaccard at every taxonomy depth (Table 5.2) and named latents, from {stream: code} and
    labels (n, C) bool; known as in `label_counts`."""
    counts, n_top, names, named = {}, {}, {}, {}
    for s, code in codes.items():
        counts[s], n_top[s] = label_counts(code, labels, known=known)
        names[s] = concept_names(counts[s], n_top[s], label_names)
        named[s] = collections.Counter(sorted(name for name in names[s] if name is not None))
    out = {"named": {s: v.total() for s, v in named.items()}, "latents_per_name": named}
    if len(codes) > 1:
        depths = [jaccard({s: c @ level for s, c in counts.items()}, n_top)
                  for level in taxonomy_levels(label_names, parents)]
        alike = [v[0] is not None and len(set(v)) == 1 for v in zip(*names.values())]
        kept = [{k: d[k] for k in ("jaccard", "jaccard_all", "control")} for d in depths]
        out.update(depths[-1], by_depth=kept, named_alike=sum(alike))
    return out


def monosemanticity(code, x):
    """How alike are samples that share a latent, in the eyes of another model? Of each latent (L,)
    the mean cosine of that model's features x (n, d) over all pairs of samples, weighted by the
    product of their activations (Pach et al. 2025); NaN where fewer than two are active.

    Features are centred (ours), so that pairs at random come to about 0. With unit vectors u and
    activations a the sum over pairs i != j is ||sum a_i u_i||^2 - sum ||a_i u_i||^2."""
    u, code = unit_rows(x - x.mean(0)), code.astype(np.float64)
    square = code.power(2)
    pairs = np.square(code.T @ u).sum(1) - square.T @ np.square(u).sum(1)                # (L,)
    weight = np.ravel(code.sum(0)) ** 2 - np.ravel(square.sum(0))
    several = code.getnnz(axis=0) > 1
    return np.where(several, pairs / np.where(several, weight, 1), np.nan)


def tell_monosemanticity(page, codes, others, seed=0):
    """Tell the mean `monosemanticity` of latents {stream: CSR (n, L)} in the eyes of `others` that
    had no part in them, {stream: features (n, d), NaN where missing}; and with shuffled samples."""
    found, rng = [], np.random.default_rng([seed, 13])
    for other, x in others.items():
        here = ~np.isnan(x).all(1)
        seen = x[here].astype(np.float64)
        for s, code in codes.items():
            pair = [monosemanticity(code[here], v) for v in (seen, rng.permutation(seen))]
            own, null = (v[~np.isnan(v)] for v in pair)      # of the same latents
            found.append({"latents of": f"{s}, judged by {other}", "cosine": _mean(own),
                          "samples shuffled": _mean(null),
                          "above it, % (chance 50)": _mean(100. * (own > null))})
    page.records(found, "Are samples that share a latent alike in other eyes?", "monosemanticity")


# -- How far a figure would move, were other samples judged ---------------------------------------
# `times` (1 + R, n) says how often each of n samples counts: in the first row once, in the others
# as drawn again. What is measured with it is an array (1 + R,): the figure, and its other draws.

def drawn_again(groups, draws=0, seed=0):
    """`times`, of samples of groups (n,), patients or the like, which stay whole: without a 20th of
    them in turn (a jackknife), or as many, drawn with replacement, `draws` times (a bootstrap)."""
    _, member = np.unique(groups, return_inverse=True)
    n, rng = member.max() + 1, np.random.default_rng([seed, 6])
    of_group = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)] or \
        [np.arange(n) % PARTS != part for part in range(min(n, PARTS))]
    return np.stack([np.ones(n, np.int32), *of_group])[:, member]


def half_interval(values, freedom, bootstrap=False):
    """Half the 95 in 100 interval (Student's t) of a figure from its draws, values (R,): see
    `drawn_again`. freedom: one less than there are groups, or parts of a jackknife."""
    spread = float(np.std(values)) * (1 if bootstrap else (len(values) - 1) ** 0.5)
    return float(scipy.stats.t.ppf(0.975, freedom)) * spread


def average(values, times=None):
    """The mean of values (n,); with `times` (R, n) of each draw, (R,), NaN of one without any."""
    if times is None:
        return float(np.mean(values))
    n = times.sum(1)
    return np.where(n, times @ values / n.clip(1), np.nan)


def taken(block, r):
    """Of what was measured with `times`, dicts of arrays (1 + R,) and of other things, draw r."""
    if isinstance(block, dict):
        return {key: taken(value, r) for key, value in block.items()}
    return plain(block[r]) if isinstance(block, np.ndarray) else block


# -- Reconstruction ------------------------------------------------------------------------------

def reconstruction(blocks, times=None):
    """R^2 (sparc.txt 4.3) and NMSE (thesis Eq. 13) of every target from every source: {"r2": {t:
    {s: value}}, "nmse": ...}, None where nothing varies, or is left; with `times` (1 + R,), NaN.

    blocks: iterable of (x, x_hat), x: t -> (b, d_t), x_hat: (t, s) -> (b, d_t), tensors; of t from
    s those samples count that have both (rows of NaN say that one is missing).
    R^2 is weighted by variance, around each dimension's mean over the samples that count:
    predicting that mean scores 0. NMSE leaves out samples of zeros."""
    total, done = collections.defaultdict(lambda: [0.] * 6), 0
    for x, x_hat in blocks:
        here = {t: ~v.isnan().all(1) for t, v in x.items()}
        b = len(next(iter(here.values())))
        count = torch.ones(1, b) if times is None else torch.from_numpy(times[:, done:done + b])
        for (t, s), v in x_hat.items():
            both = here[t] & here.get(s, here[t])
            now, weight = x[t][both].double(), count.to(v.device)[:, both].double()
            e, energy = (v[both] - x[t][both]).double().square().sum(1), now.square().sum(1)
            values = (torch.ones_like(e), now, energy, e, torch.where(energy > 0, e / energy, 0),
                      (energy > 0).double())
            total[t, s] = [v + weight @ value for v, value in zip(total[t, s], values)]
        done += b
    out = {"r2": {}, "nmse": {}}
    for (t, s), (n, x, square, error, ratio, some) in total.items():
        variance = square - x.square().sum(1) / n.clamp(min=1)
        r2 = torch.where(variance > 1e-12 * square, 1 - error / variance, torch.nan)
        for name, v in (("r2", r2), ("nmse", ratio / some)):
            out[name].setdefault(t, {})[s] = plain(v.item()) if times is None else v.cpu().numpy()
    return out


def linear_baseline(train, test, targets=None):
    """How much of stream t, any or one of `targets`, a linear map from stream s explains: R^2 on
    `test`, {t: {s: value}}, s != t. A code may pass it.

    train, test: {stream: (n, d)}, in the units that the model reconstructs, NaN where missing: for
    a pair the samples count that have both. Ridge regression with an intercept; its strength is
    the one that predicts every tenth training row best from the other rows."""
    strengths = 10. ** np.arange(-6, 3)
    out = {t: {s: None for s in train if s != t} for t in targets or train}
    for t, s in [(t, s) for t, row in out.items() for s in row]:
        both = ~np.isnan(train[s][:, 0] + train[t][:, 0])
        if both.sum() < 2:
            continue
        X, Y = (train[v][both].astype(np.float64) for v in (s, t))
        held = np.arange(len(X)) % 10 == 0
        errors = [((X[held] @ W + b - Y[held]) ** 2).sum()
                  for W, b in ridge(X[~held], Y[~held], strengths)]
        (W, b), = ridge(X, Y, strengths[[np.argmin(errors)]])
        fit = torch.from_numpy(test[s] @ W + b)
        seen = {v: torch.from_numpy(test[v]) for v in (s, t)}
        out[t].update(reconstruction([(seen, {(t, s): fit})])["r2"][t])
    return out


# -- 1-D logistic probes -------------------------------------------------------------------------

def logistic_1d(x, y):
    """The w, b (...) that minimise w^2/2 + sum log-loss(y, sigma(w x + b)), thesis Eq. 15 with L2,
    exact to rounding; x, y (..., n), y in {0, 1}. Newton's method with step halving."""
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), y)
    line, X = np.zeros((*x.shape[:-1], 2)), np.stack([x, np.ones_like(x)], -1)    # (..., n, 2)

    def cost(line):
        return line[..., 0] ** 2 / 2 + log_loss(*np.moveaxis(line, -1, 0), x, y).sum(-1)
    for _ in range(100):
        now = cost(line)
        p = scipy.special.expit((X @ line[..., None])[..., 0])
        gradient = ((p - y)[..., None] * X).sum(-2) + line * [1, 0]
        curvature = np.swapaxes(X, -1, -2) @ (X * (p * (1 - p))[..., None])
        move = np.linalg.solve(curvature + np.diag([1, 1e-12]), gradient[..., None])[..., 0]
        while (worse := cost(line - move) > now + 1e-12 * np.abs(now)).any():
            move = np.where(worse[..., None], move / 2, move)
        line = line - move
        if np.abs(gradient).max(initial=0) < 1e-9:
            break
    return tuple(np.moveaxis(line, -1, 0))


def log_loss(w, b, x, y):
    """-log p(y) in nats, p(1) = sigma(w x + b); w, b (...), x, y (..., n) -> (..., n)."""
    z = w[..., None] * x + b[..., None]
    return np.logaddexp(0, z) - y * z


def stratified_split(y, held_out, seed, groups=None):
    """Split positions 0..n-1 in two, classes in proportion: (kept, held out), with the sizes and
    draws of scikit-learn's StratifiedShuffleSplit, so that splits are the published ones; or whole
    groups (n,), each counted as the highest class of its samples."""
    if groups is not None:
        member = np.unique(groups, return_inverse=True)[1]
        kind = np.zeros(member.max() + 1, int)
        np.maximum.at(kind, member, y)
        return tuple(np.flatnonzero(np.isin(member, part))
                     for part in stratified_split(kind, held_out, seed))
    rng, n = np.random.RandomState(seed), len(y)
    left, take = np.bincount(y), []
    for size in (math.floor((1 - held_out) * n), math.ceil(held_out * n)):
        exact = left / left.sum() * size                     # of each class: largest rests first
        quota = np.floor(exact).astype(int)
        for r in np.unique(exact - quota)[::-1]:
            tied = np.flatnonzero(exact - np.floor(exact) == r)
            missing = size - quota.sum()
            if missing > 0:
                quota[rng.choice(tied, min(len(tied), missing), replace=False)] += 1
        take.append(quota)
        left = left - quota
    parts = [np.split(rng.permutation(np.flatnonzero(y == c)), [a, a + b])[:2]
             for c, (a, b) in enumerate(zip(*take))]
    return tuple(rng.permutation(np.concatenate(part)) for part in zip(*parts))


def probe_tasks(labels, known=True, groups=None):
    """Balanced binary tasks, thesis A.1.3: list of (label, {train / val / test: (rows, y)}).

    A task is a label with at least 50 positives; task t draws as many negatives (seed 1000 + t),
    or positives where they are more, and splits 70 / 15 / 15, classes in proportion (seeds
    2000 + t, 3000 + t). Rows that are not `known` (n,) bool are neither. With groups (n,) no group
    is in two parts, and a label of too few groups for both classes in each is no task."""
    tasks = []
    for t in range(labels.shape[1]):
        pos, neg = (np.flatnonzero(known & (labels[:, t] == c)) for c in (True, False))
        n = min(len(pos), len(neg))
        if n < 50:
            continue
        rng = np.random.RandomState(1000 + t)
        pos, neg = (v if len(v) == n else rng.choice(v, n, replace=False) for v in (pos, neg))
        rows, y = np.concatenate([pos, neg]), np.repeat([1, 0], n)
        of = None if groups is None else groups[rows]
        train, rest = stratified_split(y, 0.3, 2000 + t, of)
        val, test = stratified_split(y[rest], 0.5, 3000 + t, None if of is None else of[rest])
        parts = {"train": train, "val": rest[val], "test": rest[test]}
        if all(0 < y[i].sum() < len(i) for i in parts.values()):
            tasks.append((t, {k: (rows[i], y[i]) for k, i in parts.items()}))
    return tasks


def probe(code, tasks, binary=True, chosen=None, times=None):
    """1-D logistic probes (thesis 5.4.3, A.1.3): for each task the latent that predicts it best.

    The 20 latents most often active on a task's training positives (or those `chosen` for it) are
    each fitted on train, input z > 0 or z itself if not `binary`; the best on val is reported on
    test, ln 2 where there is none. Returns {"loss": mean test log-loss in nats, with `times`
    (1 + R,), "tasks": [{label, latent or None, val, test}]}."""
    active, chance = (code > 0).astype(np.float64), math.log(2)
    z, results, losses = active if binary else code.astype(np.float64), [], [chance] * len(tasks)
    for i, (label, parts) in enumerate(tasks):
        results.append({"label": int(label), "latent": None, "val": chance, "test": chance})
        rows, y = parts["train"]
        hits = active[rows[y == 1]].getnnz(axis=0)
        best = np.argsort(-hits, kind="stable")[:20]
        best = best[hits[best] > 0] if chosen is None else np.asarray(chosen[i])
        if len(best):
            line = logistic_1d(z[rows][:, best].toarray().T, y)             # of (candidates, rows)
            val, test = (log_loss(*line, z[held][:, best].toarray().T, truth)
                         for held, truth in (parts["val"], parts["test"]))
            j = int(np.argmin(val.mean(1).round(9)))         # of equals the first
            results[-1].update(latent=int(best[j]), val=average(val[j]), test=average(test[j]))
            losses[i] = average(test[j], times if times is None else times[:, parts["test"][0]])
    return {"loss": sum(losses) / len(losses) if losses else None, "tasks": results}


# -- Retrieval, and planted truth ----------------------------------------------------------------

def ridge(X, Y, strengths):
    """Yields (W, intercept) of ridge: Y (n, m) on X (n, d), strengths in mean eigenvalues of X."""
    mean = X.mean(0)
    values, V = np.linalg.eigh((X - mean).T @ (X - mean))
    values, scale = np.maximum(values, 0), max(values.mean(), 1e-30)
    VtY = V.T @ ((X - mean).T @ (Y - Y.mean(0)))
    for strength in strengths:
        W = V @ (VtY / (values + strength * scale)[:, None])
        yield W, Y.mean(0) - mean @ W


def unit_rows(x):
    """Rows of x, dense or CSR, scaled to length 1; zero rows stay zero."""
    length = (sp.linalg if sp.issparse(x) else np.linalg).norm(x, axis=1)
    return sp.diags_array(1 / np.maximum(length, 1e-12)) @ x


def cosines(query, reference, block=1024):
    """Yields (number of the first, their cosine similarities (b, m) with all references (m, d)) of
    `block` of the queries (q, d) at a time; both dense or both CSR."""
    q, r = unit_rows(query), unit_rows(reference).T
    for start in range(0, q.shape[0], block):
        similar = q[start:start + block] @ r
        yield start, similar.toarray() if sp.issparse(similar) else similar


def nearest(query, reference, n, groups=None, block=1024):
    """The n most similar references (cosine) of each query, best first: rows, similarities (q, n).
    query (q, d), reference (m, d), both dense or both CSR; at most m are found. groups: (q,), (m,);
    references of the query's own group do not count: row -1, similarity -inf where none is left."""
    n, rows, values = min(n, reference.shape[0]), [], []
    for start, similar in cosines(query, reference, block):
        if groups is not None:
            similar[groups[0][start:start + len(similar), None] == groups[1]] = -np.inf
        best = np.sort(np.argpartition(-similar, n - 1, axis=1)[:, :n], axis=1)
        value = np.take_along_axis(similar, best, 1)
        order = np.argsort(-value, axis=1, kind="stable")    # ties to the lower row
        values.append(np.take_along_axis(value, order, 1))
        rows.append(np.where(values[-1] > -np.inf, np.take_along_axis(best, order, 1), -1))
    return np.concatenate(rows), np.concatenate(values)


def retrieval_ranks(query, reference, block=1024):
    """Rank (1 = best) of reference i for query i by cosine similarity; both (n, d), dense or CSR.
    A tie counts against the query: an all-zero code, equally far from everything, ranks last."""
    return np.concatenate([(similar >= similar[:, start:].diagonal()[:, None]).sum(1)
                           for start, similar in cosines(query, reference, block)])


def retrieval(features, here=(), times=None):
    """Ordered pairs of streams of one width (thesis Table 5.5): {"s -> t": {R@1, R@5, R@10, MedR,
    MRR}}, from {stream: (n, d)}. here: {stream: (n,) bool} of those with gaps; queries and gallery
    are the samples that have both. MedR is the lower median. R@k depends on n: compare galleries
    of one size. `times` count queries alone: a reference drawn twice would tie with itself."""
    out, here = {}, {s: np.ones(x.shape[0], bool) for s, x in features.items()} | dict(here)
    for s, t in itertools.permutations(features, 2):
        both = here[s] & here[t]
        if features[s].shape[1] == features[t].shape[1] and both.any():
            ranks = retrieval_ranks(features[s][both], features[t][both])
            mine = None if times is None else times[:, both]
            out[f"{s} -> {t}"] = {**{f"R@{k}": average(ranks <= k, mine) for k in (1, 5, 10)},
                                  "MedR": int(np.sort(ranks)[(len(ranks) - 1) // 2]),
                                  "MRR": average(1 / ranks, mine)}
    return out


def recovery(dictionaries, truth):
    """How many planted concepts a model found: stream -> (L, d) learned and (C, d) true directions.
    As many as can have a latent of their own with cosine >= 0.9, of those that the stream sees;
    `same latent`: that is near in all streams at once, of those that every stream sees."""
    near = {s: unit_rows(truth[s]) @ unit_rows(np.asarray(D, np.float64)).T >= 0.9
            for s, D in dictionaries.items()}                # (C, L)
    seen = {s: truth[s].any(1) for s in near}
    if len(near) > 1:
        near["same latent"], seen["same latent"] = (np.all([*v.values()], 0) for v in (near, seen))
    return {s: {"found": int(v[scipy.optimize.linear_sum_assignment(v, maximize=True)].sum()),
                "of": int(seen[s].sum())} for s, v in near.items()}


def _mean(values):
    """The mean of what is not None, or None."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


# -- The table and the verdict of a run ----------------------------------------------------------

def headline(block):
    """The numbers of one mode ("joint" or "alone") that fit a column: name -> value or None; of
    `over_seeds` their mean and deviation, as text."""
    if "over" in block:
        heads = list(map(headline, block["over"]))
        return {key: mean_std([head.get(key) for head in heads]) for key in heads[0]}
    alive, L = block["activation"]["alive_in"], block["activation"]["latents"]
    M, out = len(alive) - 1, {"latents alive in all streams, %": 100 * alive[-1] / L}
    if M > 1:
        out["mixed: alive in some, %"] = 100 * sum(alive[1:M]) / L
    out["silent in all, %"] = 100 * alive[0] / L
    if "jaccard" in (concepts := block.get("concepts", {})):
        out.update({"Jaccard of top-50 labels": concepts["jaccard"],
                    "  its control: another latent": concepts["control"],
                    "Jaccard, other latents as 0": concepts["jaccard_all"],
                    "latents named alike in all streams": concepts["named_alike"]})
    for name in ("R@1", "MRR") if "retrieval" in block else ():
        out[f"retrieval {name}"] = _mean(v[name] for v in block["retrieval"].values())
    for name, matrix in (("R2", block["r2"]), ("NMSE", block["nmse"])):
        out[f"{name} self"] = mean_cell(matrix, True)
        if M > 1:
            out[f"{name} cross"] = mean_cell(matrix, False)
    if block.get("probe"):
        out["1-D probe loss (chance 0.693)"] = _mean(v["loss"] for v in block["probe"].values())
    return out


def within(block, times, freedom, anew=None):
    """Half the 95 in 100 interval of what in `headline` has one, of a block measured with `times`;
    freedom: see `half_interval`. anew: rows of a draw -> what latents are there, as
    `latent_metrics`, for a bootstrap; without it Jaccard's interval is for other latents."""
    drawn = (np.repeat(np.arange(len(counts)), counts) for counts in times[1:])
    heads = [headline({**taken(block, r), **(anew(rows) if anew else {})})
             for r, rows in enumerate(drawn, 1)]
    found = {} if anew else {"Jaccard of top-50 labels": block.get("concepts", {}).get("within")}
    for name in heads[0] if freedom > 0 else ():
        values = [head[name] for head in heads if head.get(name) is not None]
        if len(values) > 1 and np.ptp(values) > 1e-9 * np.abs(values).max():
            found[name] = half_interval(values, freedom, bool(anew))
    return found


HIGHER = {                                                   # rows of `headline`, by what is better
    "latents alive in all streams, %": "latents that some judged sample activates in every stream",
    "Jaccard of top-50 labels": "overlap of a latent's labels between two streams, of its 50 top "
    "samples in each; means what it has beyond its control",
    "Jaccard, other latents as 0": "the same, latents not alive in two streams as 0, as published",
    "latents named alike in all streams": "latents whose most frequent label is the same in every "
    "stream, and holds for 30 % of their top samples",
    "retrieval R@1": "share of samples whose own code in the other stream is the nearest",
    "retrieval MRR": "mean of 1 / rank of a sample's own code in the other stream",
    "R2 self": "share of a stream's variance that its own code rebuilds; 0 is its mean",
    "R2 cross": "the same from another stream's code",
    "its linear baseline": "the same by ridge regression from the other stream's raw features, "
    "which a code may pass"}
LOWER = {
    "mixed: alive in some, %": "active in some streams and never in the others: not shared",
    "silent in all, %": "latents that no judged sample activates",
    "its control: another latent": "each latent paired with another: what labels share by chance",
    "NMSE self": "squared error over the sample's squared length, from its own code (Eq. 13)",
    "NMSE cross": "the same from another stream's code",
    "1-D probe loss (chance 0.693)": "log-loss in nats of the best single latent of each label"}
MEANING = {name: f"{told}; {way} is better" for way, table in (("higher", HIGHER), ("lower", LOWER))
           for name, told in table.items()}
HEADLINES = ("R2 self", "R2 cross", "retrieval R@1", "Jaccard of top-50 labels",
             "latents alive in all streams, %", "1-D probe loss (chance 0.693)")
SHOWN = {"mixed %": "mixed: alive in some, %", "Jaccard": "Jaccard of top-50 labels",
         "control": "  its control: another latent", "R@1": "retrieval R@1", "cross R2": "R2 cross",
         "self R2": "R2 self", "probe": "1-D probe loss (chance 0.693)"}
WHY_BOTH_WAYS = (
    '<p class="note"><b>alone</b>: each stream chose its latents, as it must when it is the only '
    'one there. <b>joint</b>: the streams of a sample chose together; that alone makes Jaccard and '
    'retrieval high. <b>null</b>: the same model trained on streams whose rows were shuffled '
    'against each other. A joint number says what it has beyond its null, a Jaccard what it has '
    'beyond its control, where each latent is paired with another.</p>')


def verdict(metrics, again=None):
    """Three plain sentences on the metrics of a run: {"learned", "trust", "next", "level"}, level 0
    good, 1 with care, 2 not to be trusted. again: how to add the null, if one can."""
    own = {mode: {s: row[s] for s, row in metrics[mode]["r2"].items() if row[s] is not None}
           for mode in ("joint", "alone") if mode in metrics}
    mean = {mode: _mean(v.values()) for mode, v in own.items()}
    first = next(iter(own.values()))
    several = len(first) > 1 and "joint" in metrics
    given = "joint" not in metrics and "retrieval" in metrics["alone"]       # codes of others
    both = "train with --topk both" if metrics.get("topk") != "both" and not given else ""
    doubts = _doubts_of_fit(metrics, own, mean, both)
    if several or given:
        doubts += _doubts_of_sharing(metrics, again, both)
    levels, *words = zip((0, "", ""), *(doubt[1:] for doubt in doubts if doubt[0]))
    wrong, remedies = ("; ".join(filter(None, dict.fromkeys(each))) for each in words)
    level, cross = max(levels), fmt(mean_cell(metrics["alone"]["r2"]))
    learned = (f"{metrics['latents']} latents, {metrics['l0']:.3g} a sample, rebuild "
               f"{'the streams' if several else next(iter(first), 'nothing')} "
               f"at R2 {fmt(next(iter(mean.values())))}")
    if several:
        learned += (f" when they choose together and {fmt(mean['alone'])} when each chooses alone; "
                    f"one stream predicts another at R2 {cross} alone "
                    f"(linear baseline {fmt(mean_cell(metrics['linear_baseline']))})")
    if given:
        learned += f", from codes of others at {cross}"
    trust = ("Trust it", "Trust it with care", "Do not trust it")[level]
    remedies = remedies or "look at what the latents mean (latents RUN --stream NAME)"
    return {"learned": f"Learned: {learned}.", "level": level, "next": f"Next: {remedies}.",
            "trust": f"{trust}: {wrong or 'nothing measured here speaks against it'}."}


def _doubts_of_fit(metrics, own, mean, both):
    """How well each stream is rebuilt from its own code: a rule is (whether it holds, level, what
    is wrong, what to try). own {mode: {stream: R2}}, mean {mode: R2 or None}."""
    first, level = next(iter(own.values())), next(iter(mean.values()))
    if not first:
        return [(True, 2, "no stream varies among the judged samples, so that nothing can be "
                 "judged", "judge other samples")]
    below = {s: f"{v:.3g} {mode}" for mode in reversed(own) for s, v in own[mode].items() if v < 0}
    worst = min(first, key=first.get)
    others = [v for s, v in first.items() if s != worst] or [first[worst]]
    silent, joint = headline(metrics["alone"])["silent in all, %"], mean.get("joint", -np.inf)
    few, some = metrics.get("positives", 50), metrics["rows"] < metrics["of"]
    return [
        (below, 2, ", ".join(f"{s} is rebuilt worse than by predicting the mean (R2 {v})"
                             for s, v in below.items()),
         f"look at {', '.join(below)} for a few huge values, and leave the settings to their "
         "defaults"),
        (not below and level < 0.3, 1, f"little is rebuilt (R2 {level:.3f})",
         "raise --k, --latents or --epochs"),
        (not below and level >= 0.3 and first[worst] < np.median(others) - 0.25, 1,
         f"{worst} is rebuilt much worse than the rest (R2 {first[worst]:.3f})",
         f"look at {worst}, or leave it out with --streams"),
        (metrics["steps"] < 500, 1, f"{metrics['steps']} training steps are few",
         "raise --epochs, or lower --batch"),
        (silent > 50, 1, f"{silent:.0f} % of the latents are silent", "lower --latents"),
        (mean["alone"] < joint - 0.1, 1, "with one stream at hand much is lost (self R2 "
         f"{mean['alone']:.3f}, joint {joint:.3f})", both),
        (few < 50, 0, "the probe row is empty, because no label has 50 positives among the judged "
         f"samples (most: {few})", "judge all samples (eval RUN --eval-rows 0)" if some else "")]


def _doubts_of_sharing(metrics, again, both):
    """What streams share, which shuffled pairs and chance must not reach: as `_doubts_of_fit`."""
    mode = "joint" if "joint" in metrics else "alone"
    joint, alone, null = (headline(block)["R2 cross"] if block else None for block in (
        metrics[mode], metrics["alone"], metrics.get("null", {}).get(mode)))
    best = {s: max((v["R@1"] for pair, v in metrics["alone"]["retrieval"].items()
                    if s in pair.split(" -> ")), default=1) for s in metrics["alone"]["r2"]}
    lost = [s for s, share in best.items() if share <= 3 / metrics["rows"]]
    baseline = mean_cell(metrics.get("linear_baseline", {}))
    same_rows = "check that row i is the same sample in every stream"
    return [
        ("null" not in metrics, 1, f"the {mode} figures stand without their null", again or ""),
        (None not in (joint, null) and joint < null + 0.02, 2,
         f"{mode} cross R2 is no better than for shuffled pairs ({fmt(joint)}, null {fmt(null)})",
         same_rows),
        (lost, 1, f"alone, {', '.join(lost)} find no partners, or only by chance", same_rows),
        (lost, 1, "", both),
        (None not in (alone, baseline) and alone < baseline - 0.05, 1,
         "a linear map from stream to stream predicts more than the code does alone", both)]


def summary(metrics):
    """The table at the end of a run: (header, rows), joint beside alone, and the null if it ran."""
    columns = {mode: headline(metrics[mode]) for mode in ("joint", "alone") if mode in metrics}
    for mode, column in columns.items() if "bootstrap" in metrics else ():
        column.update({name: f"{fmt(column[name], name)} ± {fmt(half, name)}"
                       for name, half in metrics[mode]["within"].items()})
    columns.update({f"null {mode}": headline(v) for mode, v in metrics.get("null", {}).items()})
    names = list(next(iter(columns.values())))
    rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
    if "linear_baseline" in metrics:
        best = mean_cell(metrics["linear_baseline"])         # of both modes, and of no null
        cells = [best if mode in metrics else None for mode in columns]
        rows.insert(names.index("R2 cross") + 1, ["  its linear baseline", *cells])
    return ["", *columns], rows


def mean_cell(matrix, own=False):
    """The mean over {t: {s: value or None}} of those of a stream from itself, or from others."""
    return _mean(v for t, row in matrix.items() for s, v in row.items() if (s == t) == own)


# -- Tables and charts ---------------------------------------------------------------------------

def fmt(value, name=""):
    """A cell: three decimals, one if large or in %; whole numbers as they are; - for None, NaN."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 or "%" in name else f"{value:.3f}"
    return str(value)


def _cells(header, row):
    return [str(row[0]), *(fmt(v, f"{row[0]} {name}") for v, name in zip(row[1:], header[1:]))]


def text_table(header, rows):
    """Rows of cells as aligned plain text: the first column to the left, others to the right."""
    cells = [list(map(str, header)), *(_cells(header, row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = [str.ljust, *[str.rjust] * len(header)]
    lines = ["  ".join(side(*v) for side, *v in zip(sides, row, widths)).rstrip() for row in cells]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def html_table(header, rows, shade=False):
    """Rows of cells as HTML; with `shade` the style sheet colours numbers by their level."""
    head, body = "".join(f"<th>{html.escape(str(text))}</th>" for text in header), ""
    for row in rows:
        name, *texts = map(html.escape, _cells(header, row))
        levels = [f' style="--level:{v:.2f}"' if shade and isinstance(v, float) else ""
                  for v in row[1:]]
        cells = "".join(f"<td{level}>{text}</td>" for level, text in zip(levels, texts))
        body += f"<tr><th>{name}</th>{cells}</tr>"
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def grid_row(grids):
    """{name: {t: {s: value}}} -> HTML tables in a row, targets by sources (sparc.txt Table 3)."""
    shown = ""
    for name, matrix in grids.items():
        rows = [[t, *(row.get(s) for s in matrix)] for t, row in matrix.items()]
        table = html_table(["target \\ source", *matrix], rows, True)
        shown += f"<div><h3>{html.escape(name)}</h3>{table}</div>"
    return f'<div class="pair">{shown}</div>'


def svg_lines(series, x_label, y_label, x_names=None, zero=True, dots=False):
    """Line chart as inline SVG. series: name -> [(x, y)], without pairs whose y is None. x_names:
    text under x = 0, 1, ...; zero: the y axis starts at 0 or below; dots: points, not joined."""
    colours = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
    series = {name: [p for p in points if p[1] is not None] for name, points in series.items()}
    xs, ys = ([p[i] for line in series.values() for p in line] for i in (0, 1))
    if not xs:
        return "<p>nothing to draw</p>"
    w, h, x0, y0 = 640, 260, min(xs), min(0, *ys) if zero else min(ys)
    x1, y1 = (max(v) if max(v) > low else low + 1 for v, low in ((xs, x0), (ys, y0)))

    def text(x, y, words, kind=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(words)}</text>'

    def tick(v):
        return f"{v:,.0f}" if abs(v) >= 100 or v == int(v) else f"{v:.2g}"

    def at(x, y):
        return 60 + (w - 80) * (x - x0) / (x1 - x0), h - 40 - (h - 60) * (y - y0) / (y1 - y0)
    parts = [f'<svg viewBox="0 0 {w} {h + 18 * math.ceil(len(series) / 3)}" role="img" '
             f'aria-label="{html.escape(y_label)}">', text(w / 2, h - 6, x_label, "mid"),
             text(60, 12, y_label)]
    for y in np.linspace(y0, y1, 5):
        height = at(x0, y)[1]
        parts.append(f'<path d="M60 {height:.1f}H{w - 20}" class="grid"/>'
                     + text(54, height + 4, tick(y), "end"))
    ticks = enumerate(x_names) if x_names else ((x, tick(x)) for x in np.linspace(x0, x1, 5))
    parts += [text(at(x, y0)[0], h - 24, words, "mid") for x, words in ticks]
    for i, (name, line) in enumerate(series.items()):
        dashed = i >= len(colours) or "null" in name or "global" in name
        ink = f'stroke="{colours[i % len(colours)]}"' + ' stroke-dasharray="6 4"' * dashed
        places = ["{:.1f},{:.1f}".format(*at(*p)) for p in line]
        marks = f'<polyline points="{" ".join(places)}" {ink}/>'
        if len(line) == 1 or dots:
            marks = "".join('<circle cx="{:.1f}" cy="{:.1f}" r="{}" {}/>'.format(
                *at(*p), 1 if dots else 3, ink) for p in line)
        x, y = 60 + (w - 80) / 3 * (i % 3), h + 8 + 18 * (i // 3)
        parts.append(f'{marks}<path d="M{x:.1f} {y - 4}h18" {ink}/>' + text(x + 24, y, name))
    return "".join(parts) + "</svg>"


def strips(found):
    """{heading, or none: pictures, HTML}: those of each in a row below it."""
    return "".join(f"<h3>{html.escape(name)}</h3>" * bool(name)
                   + f'<div class="strip">{"".join(shown)}</div>' for name, shown in found.items())


# -- The page: one self-contained HTML file ------------------------------------------------------

class Page:
    """A result told once: on the terminal, in report.html and, as plain dicts, in metrics.json,
    which is written from `metrics`: who has more to put there than tables does so."""

    def __init__(self, title):
        self.title, self.sections, self.metrics, self.payload = title, [], {}, None

    def text(self, words, quiet=False):
        """A paragraph; quiet: in the report alone."""
        if not quiet:
            print(words)
        self.picture("", f"<p>{html.escape(words)}</p>")

    def table(self, header, rows, title="", key=None, quiet=False):
        """Rows of cells under a header, the first of a row its name. key: they also go into
        `metrics[key]`, as {name of the row: {column: value}}."""
        header, rows = list(map(str, header)), [[plain(cell) for cell in row] for row in rows]
        if not quiet:
            print("\n".join(["", *[title] * bool(title), text_table(header, rows), ""]))
        self.picture(title, html_table(header, rows))
        if key is not None:
            self.metrics[key] = {str(name): dict(zip(header[1:], cells)) for name, *cells in rows}

    def records(self, found, *told, **how):
        """`table` of a list of dicts of the same keys."""
        self.table(list(found[0]), [list(one.values()) for one in found], *told, **how)

    def picture(self, title, content):
        """A chart, any HTML: in the report alone, folded below what one explores."""
        if self.payload and title:
            title, content = "", (f"<details><summary>{html.escape(title)}</summary>{content}"
                                  "</details>")
        self.sections.append((title, content))

    def explore(self, payload):
        """What `explorer` made of runs, for assets/explorer.js to show here."""
        self.picture("", '<div id="explorer"></div><noscript>To explore, allow scripts.</noscript>')
        self.payload = payload

    def write(self, path, metrics=None):
        """report.html, one self-contained file that asks for nothing, without a style and a script
        where `assets` was not copied with this module; and, if there are any, metrics.json.
        metrics: more of them, a dict; path: name -> where that file goes."""
        self.metrics.update(metrics or {})
        if self.metrics:
            write_json(path("metrics.json"), self.metrics)
        assets = pathlib.Path(__file__).parent / "assets"
        style, code = (file.read_text("utf-8") if file.is_file() else "" for file in (
            assets / "report.css", assets / ("explorer.js" if self.payload else "")))
        allowed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        body = "".join(f"<h2>{html.escape(heading)}</h2>" * bool(heading) + content
                       for heading, content in self.sections)
        if code:                                             # "<" would let a text end the script
            data = json.dumps(self.payload, allow_nan=False).replace("<", "\\u003c")
            body += (f'<script type="application/json" id="payload">{data}</script>'
                     f"<script>{code}</script>")
        title = html.escape(self.title)
        write_text(path("report.html"), (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width,initial-scale=1"><meta http-equiv='
            '"Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f'style-src \'unsafe-inline\'; script-src \'sha256-{allowed}\'">'
            f'<title>{title}</title><style>{style}</style>'
            f'<main><h1>{title}</h1>{body}</main></html>\n'))


def plain(value):
    """A cell as JSON has it: numpy's numbers as Python's, NaN as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def _numbers(metrics):
    """Headlines of `summary`, HTML: alone, large, with its interval; beside it others, controls."""
    (header, rows), parts, half = summary(metrics), {}, metrics["alone"].get("within", {})
    for (name, *cells), (other, *values) in itertools.pairwise([*rows, [""]]):
        told = {mode: fmt(v, name) for mode, v in zip(header[1:], cells)}
        if other.startswith("  "):
            told[other.strip()] = fmt(values[header.index("alone") - 1])
        alone = f"<b>{told.pop('alone')}</b>" + (f" ± {fmt(half[name])}" if half.get(name) else "")
        beside = "".join(f" · <i>{mode} {v}</i>" for mode, v in told.items())
        parts[name] = (f"<div><dt>{html.escape(name)}</dt><dd>{alone} alone{beside}</dd>"
                       f"<dd>{html.escape(MEANING.get(name, ''))}</dd></div>")
    return (f'<dl class="numbers">{"".join(parts.get(name, "") for name in HEADLINES)}</dl>'
            '<p class="note">±: where 95 in 100 such figures would lie, were other samples judged '
            "by the same model, or other groups, where the file has any (Jaccard: other latents)."
            "</p>")


def tell_verdict(page, found):
    """The three sentences of `verdict`, on the page alone; returns them."""
    lines = [found[part] for part in ("learned", "trust", "next")]
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    page.picture("", f'<div class="verdict level{found["level"]:d}">{told}</div>')
    return lines


def tell_summary(page, metrics, quiet=False, payload=None):
    """The verdict on a run, first on the page and last on the terminal, its table and the planted
    concepts found. quiet: on the page alone; payload: what one explores, above the table."""
    lines = tell_verdict(page, found) if (found := metrics.get("verdict")) else []
    page.picture("", _numbers(metrics))
    if payload:
        page.explore(payload)
    page.table(*summary(metrics), "Result", quiet=quiet)
    there = metrics.get("samples", {})                       # of streams and pairs, where are gaps
    pairs = [n for name, n in there.items() if " / " in name]
    each = ", ".join(f"{name} in {n}" for name, n in there.items() if " / " not in name)
    gaps = f": {each}; two given streams in {min(pairs)} to {max(pairs)}" if pairs else ""
    drawn = metrics.get("bootstrap", 0)                      # times
    gaps += f"; ±: half the 95 in 100 interval, from {drawn} draws of them" * bool(drawn)
    page.text(f"{metrics['rows']} samples of the {metrics['split']} split{gaps}", quiet)
    names = [name.strip() for name, *_ in summary(metrics)[1]]
    told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(MEANING[name])}</dd>"
                   for name in names if name not in HEADLINES)
    page.picture("", f"<details><summary>What the rows mean</summary><dl>{told}</dl></details>"
                 + WHY_BOTH_WAYS)
    if "recovery" in metrics:
        rows = [{"cosine at least 0.9": s, **v} for s, v in metrics["recovery"].items()]
        page.records(rows, "Planted concepts recovered", quiet=quiet)
    if found and not quiet:
        colour = f"\033[3{(2, 3, 1)[found['level']]}m" * sys.stdout.isatty()
        print("\n" + colour + "\n".join(lines) + "\033[0m" * bool(colour))


def training_curves(rows):
    """Of the rows of log.csv what a page draws: {title: {name: [(step, value)]}}."""
    def lines(names):
        return {k.removeprefix("dead_"): [(int(row["step"]), float(row[k])) for row in rows]
                for k in names if any(float(row[k]) for row in rows) or k.startswith("dead_")}
    dead = [k for k in (rows[0] if rows else ()) if k.startswith("dead_")]
    return {"mean NMSE of the batch; lower is better:": lines(("self", "cross")),
            "dead, have not fired for long; lower is better:": lines(dead)}


def tell_run(page, metrics, settings):
    """What a run's report has beyond `tell_summary` and what one explores, folded."""
    blocks = {mode: metrics[mode] for mode in ("joint", "alone") if mode in metrics}
    grids = {mode: block["r2"] for mode, block in blocks.items()}
    if "linear_baseline" in metrics:
        grids["linear baseline"] = metrics["linear_baseline"]
    page.picture("R2 of every target from every source", grid_row(grids))
    rows = [{"": mode, **dict(enumerate(block["activation"]["alive_in"])),
             **{f"silent in {s}": n for s, n in block["activation"]["silent"].items()}}
            for mode, block in blocks.items()]
    page.records(rows, "Latents alive in so many streams", quiet=True)
    depths = {mode: block.get("concepts", {}).get("by_depth", []) for mode, block in blocks.items()}
    if len(depths["alone"]) > 1:
        rows = [[mode, *(d["jaccard"] for d in v)] for mode, v in depths.items()]
        page.table(["", *range(len(depths["alone"]))], rows,
                   "Jaccard by depth of the taxonomy (the last column: the labels)", quiet=True)
    if metrics["alone"].get("retrieval"):
        rows = [{"": f"{pair}, {mode}", **v} for mode, block in blocks.items()
                for pair, v in block["retrieval"].items()]
        page.records(rows, "Retrieval", quiet=True)
    page.table(["", ""], [[k, str(v)] for k, v in settings.items() if v is not None], "Settings",
               quiet=True)


def latent_metrics(codes, features, rows, drawn=slice(None)):
    """What thesis 5.4.1-5.4.2 say of the latents of codes {stream: CSR (n, L)}: "activation", and
    "concepts" where the rows have labels. drawn: the samples that count, some of them twice."""
    codes, rows = {s: code[drawn] for s, code in codes.items()}, rows[drawn]
    out = {"activation": activation_patterns(codes)}
    labels, known = features.label_matrix(rows), features.labelled[rows]
    if labels is not None and known.any():
        out["concepts"] = concept_alignment(codes, labels, features.label_names, features.parents,
                                            known)
    return out


def code_metrics(codes, features, rows, times=None):
    """What thesis 5.4.1-5.4.5 measure of the codes {stream: CSR (n, L)} of one mode:
    `latent_metrics`, "retrieval" of several streams, "probe" where the rows have labels."""
    out, here = latent_metrics(codes, features, rows), {s: features.has(s, rows) for s in codes}
    if len(codes) > 1:
        out["retrieval"] = {pair: v for pair, v in retrieval(codes, here, times).items()
                            if {*pair.split(" -> ")} - {*features.codes}}    # not of given ones
    if "concepts" not in out:
        return out
    labels, known = features.label_matrix(rows), features.labelled[rows]
    of = features.about["groups"][rows] if "groups" in features.about else None
    tasks = {s: probe_tasks(labels, known & here[s], of) for s in codes}
    found = {s: probe(code, tasks[s], times=times) for s, code in codes.items() if tasks[s]}
    return {**out, "probe": found} if found else out


# -- Many runs beside each other -----------------------------------------------------------------

def runs_table(results, columns):
    """{name: metrics} -> (header, rows): a row for each run and one for its null, cells "joint /
    alone". columns: {heading: name in `headline`}."""
    rows = []
    for name, metrics in results.items():
        for label, block in ((name, metrics), ("  its null", metrics.get("null"))):
            if block:
                heads = [headline(block[mode]) for mode in ("joint", "alone")]
                rows.append([label, *(" / ".join(fmt(head.get(key), key) for head in heads)
                                      for key in columns.values())])
    return ["joint / alone", *columns], rows


def tell_ablation(page, results):
    """The table of thesis 5.3.4; results {name: metrics}."""
    page.table(*runs_table(results, SHOWN),
               "Who chooses the latents, and how much of it survives alone")
    one = next(iter(results.values()))
    page.text(f"linear baseline of cross R2: {fmt(mean_cell(one['linear_baseline']))}; "
              f"{one['rows']} samples of the {one['split']} split")
    page.picture("", WHY_BOTH_WAYS)


def over_seeds(runs):
    """The metrics of one setting's runs from several seeds, [metrics], as those of one run, whose
    `headline` has means and deviations; the linear baseline's mean."""
    out = {**runs[0], **{mode: {**runs[0][mode], "over": [m[mode] for m in runs]}
                         for mode in ("joint", "alone") if mode in runs[0]}}
    out.update({key: mean_std([m[key] for m in runs]) for key in ("l0", "seconds")}, recovery={})
    if "null" in runs[0]:
        out["null"] = {mode: {"over": [m["null"][mode] for m in runs]} for mode in runs[0]["null"]}
    if "linear_baseline" in runs[0]:
        out["linear_baseline"] = {t: {s: _mean(m["linear_baseline"][t][s] for m in runs)
                                      for s in row} for t, row in out["linear_baseline"].items()}
    return out


def tell_seeds(page, results):
    """The table of `summary`, of one setting's runs from several seeds (see `over_seeds`)."""
    metrics, = results.values()
    page.table(*summary(metrics), f"Mean ± standard deviation of {len(metrics['alone']['over'])} "
               "seeds, which draw weights, order, and a split or data where none are given")
    page.picture("", WHY_BOTH_WAYS)


def stability(dictionaries, alive):
    """How near each latent of the first dictionary {stream: (L, d)} comes to its partner in the
    others, of runs from other seeds: (L,), the mean cosine of their rows over the streams where it
    is `alive` (L, M), over all if in none. Partners are the best one-to-one pairing by the sum over
    all streams (Hungarian, which takes the cube of L)."""
    first, *others = ([unit_rows(W) for W in of.values()] for of in dictionaries)
    alive, found = alive | ~alive.any(1, keepdims=True), []
    for other in others:
        _, partner = scipy.optimize.linear_sum_assignment(-sum(
            a @ b.T for a, b in zip(first, other)))
        each = np.stack([(a * b[partner]).sum(1) for a, b in zip(first, other)], 1)      # (L, M)
        found.append((each * alive).sum(1) / alive.sum(1))
    return np.mean(found, 0)


def tell_stability(page, found):
    """Whether shared latents are the more stable ones; found {setting: its runs, as `explorer` has
    them}, of which the first is told of its `stability`."""
    rows = []
    for name, runs in found.items():
        codes = runs[0]["codes"]["alone"].values()
        alive = np.stack([code.getnnz(axis=0) > 0 for code in codes], 1)
        stable = stability([run["dictionary"] for run in runs], alive)
        runs[0]["stability"] = stable.round(5).tolist()
        parts = [stable[alive.sum(1) == m] for m in range(len(codes) + 1)]
        cells = {m: f"{v.mean():.3f} of {len(v)}" if len(v) else "-" for m, v in enumerate(parts)}
        rows.append({"latents alive in so many streams": name or "cosine", **cells})
    page.records(rows, "Stability: cosine of a latent's dictionary rows with those of its partner "
                 "of another seed, in the streams where it is alive")


def tell_sweep(page, results, axes):
    """Runs {name: metrics}, ordered as the product of axes {setting: values}: a table, Global
    against Local TopK, R2 of sets of streams, a chart along the first numbers."""
    errors = {"self NMSE": "NMSE self", "cross NMSE": "NMSE cross"}
    page.table(*runs_table(results, errors | SHOWN))
    heads = {name: {mode: headline(m[mode]) for mode in ("joint", "alone")
                    if mode == "alone" or m["topk"] != "local"} for name, m in results.items()}
    rows = []
    for name, metrics in results.items():
        other = name.replace("global", "local", 1)
        if metrics["topk"] == "global" and other in results:
            a, b = (np.array([head[key] for key in errors.values()], float)      # None is NaN
                    for head in (heads[name]["joint"], heads[other]["alone"]))
            rows.append([name, *np.stack([a, b, a - b], 1).ravel()])
    if rows:
        page.table(["NMSE, each as trained", "self global", "self local", "gap", "cross global",
                    "cross local", "gap"], rows)
    for name, metrics in results.items() if "streams" in axes else ():
        page.picture(f"R2 of every target from every source: {name}",
                     grid_row({mode: metrics[mode]["r2"] for mode in heads[name]}))
    along = next((k for k, v in axes.items() if len(v) > 1 and not isinstance(v[0], str)), None)
    if along is None:
        return
    curves = {}
    for modes, values in zip(heads.values(), itertools.product(*axes.values())):
        one = dict(zip(axes, values))
        x = axes[along].index(one.pop(along))
        for (mode, head), what in itertools.product(modes.items(), ("self", "cross")):
            line = ", ".join(map(str, [what, *one.values(), mode]))
            curves.setdefault(line, []).append((x, head[f"NMSE {what}"]))
    page.picture("", svg_lines(curves, along, "NMSE", [f"{v:g}" for v in axes[along]]))


def tell_activations(page, results):
    """Kinds of sparse autoencoder of one stream; results {activation_revival: metrics}."""
    rows = []
    for name, metrics in results.items():
        stream, = metrics["alone"]["r2"]
        head, found = headline(metrics["alone"]), metrics.get("recovery", {}).get(stream)
        rows.append([name.replace("_", ", "), head["R2 self"], metrics["l0"],
                     head["silent in all, %"], found and f"{found['found']} of {found['of']}",
                     metrics["seconds"]])
    page.table(["activation, revival of the dead", "R2", "L0", "silent %", "concepts found",
                "seconds"], rows)


# -- The page that one explores: what assets/explorer.js reads ------------------------------------

PAGE_BYTES = 7_500_000  # of a payload: with tables and script the page stays under 8 MB
EDIT_NUMBERS = 10 ** 6  # of dictionaries and features, to edit by: more leave no room for codes


def packed(x):
    """An array in base64: whole numbers in their smallest type, others in 16 bits times a scale."""
    x, scale = np.asarray(x), None
    if x.dtype.kind == "f":
        kind = np.uint16 if x.min(initial=0) >= 0 else np.int16
        scale = float(np.abs(x).max(initial=0)) / np.iinfo(kind).max or 1.
        x = np.rint(x / scale)
    else:
        kind = np.min_scalar_type(int(x.max(initial=0)))
    data = base64.b64encode(np.ascontiguousarray(x, kind).tobytes()).decode()
    return {"type": np.dtype(kind).str[1:], "scale": scale, "data": data}


def packed_rows(*matrices):
    """Sparse matrices (n, m) of non-negative values by their common pattern: how many entries a row
    has, the steps from column to column, the first from -1, and the values of each matrix. A step
    is its rest by 255, after as many bytes 255 as it holds: nearly always one byte."""
    pattern = sum(v.astype(bool).astype(np.int32) for v in matrices).tocsr()
    pattern.sort_indices()
    row, column = pattern.nonzero()
    values = [np.asarray(v[row, column]).ravel() if len(row) else np.zeros(0) for v in matrices]
    step = np.where(np.diff(row, prepend=-1), column + 1, np.diff(column, prepend=0))
    steps = np.full((step // 255 + 1).sum(), 255, np.uint8)
    steps[np.cumsum(step // 255 + 1) - 1] = step % 255
    return {"lengths": packed(np.diff(pattern.indptr)), "steps": packed(steps),
            "values": [packed(v) for v in values]}


def by_rank(codes, n):
    """All n samples, those first that rank highest for any latent of the codes (n, L): in any
    number of the first every latent keeps its top samples, as far as these can be so many."""
    rank, ranks = np.full(n, n + 1), sp.vstack([top_samples(code, None) for code in codes])
    np.minimum.at(rank, ranks.indices, ranks.data)
    return np.argsort(rank, kind="stable")


def explorer(features, rows, runs, most=2000):
    """The payload of assets/explorer.js: at most `most` of the samples `rows` of features, and what
    `runs` make of them; fewer samples where the page would grow too large.

    runs: {name: dict} of `codes` {mode: {stream: CSR (n, L)}}, of tokens with `places` alike, 1 +
    the token where a latent is strongest; `null`, the same codes of the null, of which histograms
    are kept; `training_curves`; what decodes, `dictionary` {stream: (L, d)} and `bias` {stream:
    (d,)}; `seen`(rows) -> {stream: (len(rows), d)}, features as the model sees them; `probe`
    {stream: (weights (d, C), biases (C,))} of the labels or None; `names` {latent: name}."""
    codes = [code for run in runs.values() for code in run["codes"]["alone"].values()]
    order, picture = by_rank(codes, len(rows)), functools.cache(features.picture)
    while True:
        some = np.sort(order[:most])
        told = {**_shown_samples(features, rows[some], picture), "judged": len(rows),
                "runs": [{"name": name, **_shown_run(run, rows, some, EDIT_NUMBERS // len(runs))}
                         for name, run in runs.items()]}
        if (size := len(json.dumps(told))) <= PAGE_BYTES or len(some) < 2:
            return told
        most = int(len(some) * min(0.9, PAGE_BYTES / size))


def _shown_samples(features, rows, picture):
    """What the file tells of the samples, and their pictures as one sheet."""
    about, labels = features.about, features.label_matrix(rows)
    out = {"rows": packed(rows), "known": packed(features.labelled[rows]), "grid": features.grid,
           "label_names": list(features.label_names),
           "labels": labels if labels is None else packed_rows(sp.csr_matrix(labels)),
           "one_label": labels is not None and features.labels.ndim == 1,
           "texts": {key: [str(v) for v in about[key][rows]]
                     for key in ("captions", "ids", "groups") if key in about}}
    if "images" in about:
        pictures, columns = list(map(picture, rows)), math.ceil(len(rows) ** 0.5)
        side = min([64 if len(rows) <= 800 else 40, *(max(v.size) for v in pictures if v)])
        sheet = Image.new("RGB", (columns * side, columns * side), "grey")
        for i, v in enumerate(pictures):
            if v:
                place = i % columns * side, i // columns * side
                sheet.paste(ImageOps.fit(v, (side, side)), place)
        lost = {i: os.path.basename(str(about["images"][rows[i]]))
                for i, v in enumerate(pictures) if not v}
        out["sheet"] = {"url": image_url(sheet, 75 if side > 40 else 50), "columns": columns,
                        "side": side, "lost": lost}
    return out


def _shown_run(run, rows, some, most):
    """A run of `explorer`: codes of `some` of the `rows`; if `most` numbers do, what edits need."""
    D, codes, kept = run["dictionary"], {}, [run["codes"], run.get("places") or {}]
    for mode, of in run["codes"].items():                    # together they share their pattern
        groups = [list(of)] if mode == "joint" else [[s] for s in of]
        codes[mode] = [packed_rows(*(part[mode][s][some].T for part in kept if part for s in group))
                       for group in groups]                  # (L, n): the page begins with latents
    unit, null = unit_rows(np.concatenate([unit_rows(v) for v in D.values()], 1)), run.get("null")
    alone = [code[some] for code in run["codes"]["alone"].values()]
    out = {"latents": len(unit), "streams": list(D), "codes": codes, "names": run["names"] or {},
           "near": nearest(unit, unit, 7)[0].tolist(), "curves": run.get("curves"), "null": null,
           "agreement": {"latents": overlap([code.T.tocsr() for code in alone], 5),
                         "samples": overlap(alone)}, "stability": run.get("stability")}
    if null:                                                 # its activations as 400 of them
        out["null"] = {mode: [packed(np.quantile(np.r_[code.data, 0], np.linspace(0, 1, 400)))
                              for code in of.values()] for mode, of in null.items()}
        out["null"]["agreement"] = _mean(overlap([v.T.tocsr() for v in null["alone"].values()], 5))
    numbers = (len(unit) + len(some)) * sum(v.shape[1] for v in D.values())
    if numbers > most:
        return {**out, "edit": f"Left out: what it needs would take {numbers * 8 / 3e6:.1f} MB."}
    edit = {name: [packed(of[s]) for s in D] for name, of in (
        ("W", D), ("b", run["bias"]), ("x", run["seen"](rows[some])))}
    probe = run["probe"] and [[packed(v) for v in run["probe"][s]] for s in D]
    return {**out, "edit": {**edit, "probe": probe}}


def overlap(matrices, least=1):
    """How alike rows of non-negative matrices (n, m), scaled to sum 1, are: sum of minima / sum of
    maxima, the mean over pairs that have `least` entries there: a list (n,), None without pairs."""
    own = [(sp.diags_array(1 / np.maximum(np.ravel(z.sum(1)), 1e-30)) @ z.astype(float),
            z.getnnz(axis=1) >= least) for z in matrices]
    found = [np.ma.masked_all(len(own[0][1]))]
    for (a, some), (b, others) in itertools.combinations(own, 2):
        shared = 1 - np.ravel(abs(a - b).sum(1)) / 2         # minima of two rows of sum 1
        found.append(np.ma.array(shared / (2 - shared), mask=~(some & others)))
    return np.ma.stack(found).mean(0).round(5).tolist()


def strongest_tokens(code, T):
    """CSR (n * T, L) -> CSR (n, L): 1 + the token of a sample in which a latent is strongest."""
    found = code.tocoo()
    key = found.row // T * np.int64(code.shape[1]) + found.col
    order = np.lexsort((found.row, -found.data, key))
    _, first = np.unique(key[order], return_index=True)
    row, column = found.row[order[first]], found.col[order[first]]
    return sp.csr_matrix((row % T + 1, (row // T, column)), (code.shape[0] // T, code.shape[1]))


# -- Files, whole or not at all ------------------------------------------------------------------

def write_whole(write, path, content):
    """write(f, content) to a binary file of a temporary name, then renamed: a run that is killed
    and a write that fails, as on a full disk, leave the old file or none. The name is fresh, so
    that no file and no link of others is written to. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):    # not in the place of /dev/null
        raise OSError(errno.EEXIST, "not a plain file", path)
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    f = open(temporary, "xb")
    try:
        with f:
            write(f, content)
        os.replace(temporary, path)
    except BaseException as e:
        os.remove(temporary)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
            raise e.__context__                              # torch's words hide the system's
        raise


# Called with a path and the content. Of text half a character, as a file's name may have it, is
# written as its number; NaN, no JSON, is refused; torch, which would write a path, too, gets none.
write_text = functools.partial(
    write_whole, lambda f, text: f.write(text.encode(errors="backslashreplace")))
write_json = functools.partial(write_whole, lambda f, value: f.write(
    (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()))
write_torch = functools.partial(write_whole, lambda f, state: torch.save(state, f))
write_npz = functools.partial(write_whole, lambda f, arrays: np.savez(f, **arrays))
save_picture = functools.partial(write_whole, lambda f, image: image.save(f, "PNG"))


def write_npy(path, blocks, n):
    """An array of n rows as .npy, of `blocks` of rows that come one by one: never all in memory."""
    def write(f, blocks):
        first = next(blocks)
        np.lib.format.write_array_header_1_0(f, {
            "descr": first.dtype.str, "fortran_order": False, "shape": (n, *first.shape[1:])})
        f.writelines(block.tobytes() for block in itertools.chain([first], blocks))
    write_whole(write, path, iter(blocks))


def write_safetensors(path, arrays):
    """Float32 {name: array} as .safetensors: the length of a header, 8 bytes, little-endian; JSON
    that tells where each lies; the numbers, from a multiple of 8 on."""
    arrays, header, at = {k: np.ascontiguousarray(v, "<f4") for k, v in arrays.items()}, {}, 0
    for name, v in arrays.items():
        header[name] = {"dtype": "F32", "shape": v.shape, "data_offsets": [at, at + v.nbytes]}
        at += v.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_whole(lambda f, parts: f.writelines(parts), path,
                [len(text).to_bytes(8, "little"), text, *arrays.values()])


def saelens(model, stream):
    """The alone code of one stream as SAELens 6 reads it: (cfg.json, {name: array}).

    model: a module with the parameters, the buffers and the names of activation and norm that
    sae.py has. Raw features lead to the same codes, and to reconstructions in raw units: mean and
    deviation go into the weights; length 1 is "constant_norm_rescale" there, which scales back too
    (and makes NaN of a row of zeros). None if SAELens has no words for activation or norm."""
    kinds = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
    kind = "jumprelu" if model.by_batch else kinds.get(model.activation)         # as its own
    if not kind or model.norm not in ("none", "standard", "l2"):
        return None
    W, V, b_lat, b_pre = (of[stream].detach().cpu().double() for of in (
        model.W_enc, model.W_dec, model.b_lat, model.b_pre))
    (L, d), mean, std, rescale = W.shape, 0., 1., "none"
    if model.norm == "l2":                                   # theirs is sqrt(d) x / ||x||
        std, rescale = d ** 0.5, "constant_norm_rescale"
    if model.norm == "standard":
        mean, std = (getattr(model, f"{name}_{stream}").cpu().double() for name in ("mean", "std"))
    weights = {"W_enc": (W / std).T, "W_dec": V * std, "b_enc": b_lat, "b_dec": b_pre * std + mean}
    config = {"architecture": kind, "d_in": d, "d_sae": L, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": rescale,
              "reshape_activations": "none", "metadata": {"sae_lens_version": "6.0.0"}}
    if kind == "topk":
        config |= {"k": model.k, "rescale_acts_by_decoder_norm": False}
    if kind == "jumprelu":
        theta = model.kept_above if model.by_batch else model.log_threshold.exp()
        weights["threshold"] = theta.detach().cpu().expand(L)
    return config, {name: v.numpy() for name, v in weights.items()}


# -- Features judged by a classifier: k nearest neighbours, linear probe (thesis 3.2.3) ------------

def knn(train, labels, test, n_classes, ks=(10, 20, 100, 200), temperature=0.07):
    """Votes of the k nearest neighbours by cosine, weighted by exp(similarity / temperature) as in
    DINO: dict k -> (n, C), rows summing to 1. k larger than the training set is cut to it."""
    near, similarity = nearest(test, train, max(ks))
    weight = np.exp((similarity - similarity[:, :1]) / temperature)
    votes = {k: np.stack([(weight * (labels[near] == c))[:, :k].sum(1)
                          for c in range(n_classes)], 1) for k in ks}
    return {k: v / v.sum(1, keepdims=True) for k, v in votes.items()}


def scores(truth, probability):
    """Accuracy, balanced accuracy, F1 (macro), AUC (macro, one class against the rest) of (n, C)
    probabilities. A class that the truth lacks counts in none of them; AUC of one class is None."""
    guess, there = probability.argmax(1), np.unique(truth)
    recall = [(guess[truth == c] == c).mean() for c in there]
    curves = there[1:] if probability.shape[1] == 2 else there             # two classes share one
    areas = [auc(truth == c, probability[:, c]) for c in curves] if len(there) > 1 else []
    return {"accuracy": float((guess == truth).mean()), "balanced accuracy": float(np.mean(recall)),
            "F1": f1(truth, guess), "AUC": _mean(areas)}


def f1(truth, guess, weighted=False):
    """F1 averaged over the classes of the truth, alike or `weighted` by their frequencies."""
    classes, n = np.unique(truth, return_counts=True)
    each = [2 * ((guess == c) & (truth == c)).sum() / ((guess == c).sum() + (truth == c).sum())
            for c in classes]
    return float(np.average(each, weights=n if weighted else None))


def auc(positive, score):
    """Area under the ROC curve: the share of (positive, negative) pairs in order, ties half."""
    rank = scipy.stats.rankdata(score)
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(rank) - n)))


def logistic_fit(x, labels, n_classes, strength=1.):
    """Multinomial logistic regression by L-BFGS, of labels (n, C) bool one for each: the summed
    loss plus ||W||^2 / (2 strength), W of standardised x; weights (d, C), biases (C,) of raw x."""
    x = torch.as_tensor(x, dtype=torch.float64)
    mean, std = x.mean(0), x.std(0, unbiased=False)
    std[std <= 1.2e-7 * mean.abs()] = 1                      # constant up to float32's rounding
    x, y = (x - mean) / std, torch.as_tensor(labels)
    y, loss_of = (y.long(), torch.nn.functional.cross_entropy) if y.ndim == 1 else (
        y.double(), torch.nn.functional.binary_cross_entropy_with_logits)
    W = torch.zeros(x.shape[1] + 1, n_classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([W], max_iter=200, history_size=20, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = loss_of(x @ W[:-1] + W[-1], y, reduction="sum")
        loss = (loss + W[:-1].square().sum() / (2 * strength)) / len(x)
        loss.backward()
        return loss
    optimiser.step(closure)
    slope = W.detach()[:-1] / std[:, None]
    return slope.numpy(), (W.detach()[-1] - mean @ slope).numpy()


def logistic_probe(train, labels, test, n_classes, strength=1.):
    """Probabilities (n, C) of `test` by `logistic_fit` on `train`."""
    W, b = logistic_fit(train, labels, n_classes, strength)
    return torch.softmax(torch.as_tensor(np.asarray(test, np.float64) @ W + b), 1).numpy()


def pixel_probe(pixels, y, parts, n_classes):
    """`scores` of logistic regression on pixels (N, 3, S, S) uint8, at 32 x 32 at most, of the
    strength that the validation part chooses. parts: rows to learn from, choose by and test on."""
    side, (train, val, test) = min(32, pixels.shape[-1]), parts
    small = [torch.nn.functional.adaptive_avg_pool2d(part.float(), side)
             for part in torch.from_numpy(pixels).split(256)]
    x, held = torch.cat(small).flatten(1).numpy() / 255, np.concatenate([val, test])
    tried = [logistic_probe(x[train], y[train], x[held], n_classes, strength)
             for strength in 10. ** np.arange(-6, 1)]
    best = max(tried, key=lambda p: scores(y[val], p[:len(val)])["AUC"] or 0.)
    return scores(y[test], best[len(val):])


def label_tasks(labels, *parts):
    """What features are judged by, a list of (N,) int: the labels (N,) as they are; of labels
    (N, C) that hold at once each that every part (rows) both has and lacks."""
    if labels.ndim == 1:
        return [labels]
    return [y for y in labels.T.astype(int) if all(0 < y[rows].sum() < len(rows) for rows in parts)]


def judged_features(x_train, x_test, tasks, rows, n_classes, linear=None, ks=(10, 20, 100, 200)):
    """How well features tell labels apart: {"linear", "20-NN", ...: `scores`, means over tasks}.
    tasks: of `label_tasks`; rows: of x_train, x_test; linear: None or one like `logistic_probe`."""
    each = []
    for y in tasks:
        given = x_train, y[rows[0]], x_test
        ways = {"linear": linear(*given, n_classes)} if linear else {}
        ways.update({f"{k}-NN": p for k, p in knn(*given, n_classes, ks).items()})
        each.append({way: scores(y[rows[1]], p) for way, p in ways.items()})
    return {way: {k: _mean(one[way][k] for one in each) for k in each[0][way]} for way in each[0]}


def tell_dino(page, rows, others, measure):
    """Tell how DINO trained, of the `rows` of log.csv, and whether the k-NN that watched over it is
    ahead of the `others`, {name: k-NN}, if any; measure: what it is. Returns the last of all."""
    curves = {k: [(int(row["step"]), float(row[k])) for row in rows if row[k]]
              for k in ("loss", "entropy", "information", "knn")}
    found = {k: line[-1][1] for k, line in curves.items() if line}
    watched = curves.pop("knn")
    others = others if watched else {}                       # a mended log may have none
    ahead = [k for k, v in others.items() if v >= found["knn"]]
    found.update(zip(("knn_random", "knn_pixels"), others.values()))
    page.picture("Training", svg_lines(curves, "step", "nats"))
    if others:
        lines = {name: [(step, v) for step, _ in watched] for name, v in others.items()}
        page.picture("", svg_lines({**lines, "teacher": watched}, "step", f"20-NN, {measure}",
                                   zero=False))
    page.text("  ".join(f"{k} {v:.3f}" for k, v in found.items()))
    if others:
        page.text(f"Do not trust it yet: {' and '.join(ahead)} tell the labels as well by 20-NN - "
                  "train longer." if ahead else "It is ahead of both.")
    return found


# -- What a latent is (CytoSAE section 2) ----------------------------------------------------------

def pool_tokens(code, T=1, tau=0.):
    """Codes of tokens, CSR (n * T, L), -> of samples, both CSR (n, L): the mean over a sample's T
    tokens, and the number of its tokens above tau (CytoSAE Eq. 3-4, a_i)."""
    group = sp.kron(sp.eye(code.shape[0] // T), np.ones((1, T)), "csr").astype(np.float32)
    return group @ code / T, group @ (code > tau).astype(np.float32)


def latent_table(strength, count, labels=None, top=10, weighted=False, known=slice(None)):
    """What each latent is, from `pool_tokens`' strength and count (n, L): a dict of arrays (L,).

    frequency   share of samples in which any token is active
    mean        mean strength over those; NaN where there are none
    references  CSR (L, n): ranks 1, 2, ... of the `top` samples by count, then strength, the
                paper's reference images; with `weighted` by strength alone, as its code has them
    and, with labels (n, C) bool of the samples that are `known`, see `label_counts`:
    entropy     in nats, of the labels of the active samples: CytoSAE's "unique labels among
                activated images"; to have none is one more label. With `weighted`, as in its code,
                of the `top` samples weighted by strength; NaN for a latent that has fewer
    label, purity   the most frequent label among the active samples, -1 for none, and its share"""
    n, active = strength.shape[0], strength.getnnz(axis=0)
    mean = np.ravel(strength.sum(0)) / np.where(active, active, np.nan)
    score = strength.astype(np.float64) * (0.5 / max(strength.max(), 1e-30))  # for equal counts
    references = top_samples((score if weighted else score + count).tocsr(), top)
    out = {"frequency": active / n, "mean": mean, "references": references}
    if labels is None or not labels.shape[1]:
        return out
    told = np.c_[labels, ~labels.any(1)]                     # (n, C + 1)
    weight, used = label_counts(strength, told, None, known)
    seen = weight[:, :-1]
    if weighted:
        best = references.astype(bool).multiply(strength.T).tocsr()
        weight = best[:, known] @ told[known].astype(float)
        weight[np.diff(references.indptr) < top] = 0
    with np.errstate(invalid="ignore"):                      # NaN of zeros
        entropy = scipy.stats.entropy(weight, axis=1) + 0.   # not -0
    return {**out, "entropy": entropy, "purity": seen.max(1) / np.maximum(used, 1),
            "label": np.where(seen.any(1), seen.argmax(1), -1)}


def tell_latents(page, found, n, labels):
    """Tell, from `latent_table` of n samples, {run: table}, how many latents live, how many have a
    mean activation >= 10^t, and at what frequency (CytoSAE Fig. 2A); of the first run how many
    labels they fire for."""
    counts, clouds, (table, *others) = [], {}, found.values()
    for name, told in found.items():
        alive, mean = np.flatnonzero(told["frequency"]), told["mean"]
        counts.append({"run": name, "latents": len(mean), "alive": len(alive), **{
            f"mean >= 1e{t}": int((mean >= 10. ** t).sum()) for t in range(-6, 1)}})
        some = alive[::1 + len(alive) // 2000]
        parts = {name: some}
        if "entropy" in told and not others:
            third = np.floor(told["entropy"][some] / math.log(max(len(labels), 2)) * 3)
            parts = {f"entropy in the {word} third": some[third.clip(0, 2) == i]
                     for i, word in enumerate(("lowest", "middle", "highest"))}
        clouds.update({part: np.log10(np.stack([told["frequency"][j], mean[j]], 1)).tolist()
                       for part, j in parts.items()})
    page.records(counts, f"On {n} training samples", key="mean at least 10^t")
    page.picture("", svg_lines(clouds, "log10 of the share of samples", "log10 of the mean",
                               zero=False, dots=True))
    if "entropy" in table:
        page.metrics["mean entropy"] = _mean(table["entropy"][np.isfinite(table["entropy"])])
        page.text(f"mean label entropy {fmt(page.metrics['mean entropy'])} nats of ln "
                  f"{len(labels)} = {math.log(len(labels)):.3f}")


def latent_chart(lines, interest, unit, most=100):
    """Lines {name: (L,)} over the `most` latents of highest interest (L,), by their numbers."""
    shown = np.sort(np.argsort(-interest, kind="stable")[:most])
    return svg_lines({name: list(enumerate(v[shown])) for name, v in lines.items()},
                     f"{len(shown)} latents, by number", unit,
                     [str(j) if i % 10 == 0 else "" for i, j in enumerate(shown)])


def barcodes(count, groups, y):
    """CytoSAE Eq. 4: group (patient) barcodes a_p, the mean of its samples' counts. y (n,) int: the
    samples' labels, negative where unknown. Returns names (P,), CSR (P, L) and the label (P,) that
    all known samples of a group have, -1 where there is none, or there are several."""
    names, member = np.unique(groups, return_inverse=True)
    share = sp.csr_matrix((1 / np.bincount(member)[member], (member, np.arange(len(member)))))
    told = np.zeros((len(names), max(y.max(), 0) + 1), bool)
    told[member[y >= 0], y[y >= 0]] = True
    label = np.where(told.sum(1) == 1, told.argmax(1), -1)
    return names, (share @ count).tocsr().astype(np.float32), label


def barcode_f1(codes, y, mean, parts, exponents=range(-6, 1)):
    """CytoSAE Fig. 4A: weighted F1 of logistic regression on barcodes (P, L) CSR, of latents of
    mean activation >= 10^t: dict t -> {"latents", "f1": one value a fold}. parts: the test rows of
    each fold. The penalty is the paper's, C = (number of classes) * (training samples) / 100."""
    out = {}
    for t in exponents:
        used, found = np.flatnonzero(np.nan_to_num(mean) >= 10. ** t), []
        x = codes[:, used].toarray()
        for test in parts if len(used) else ():
            train = np.setdiff1d(np.arange(len(y)), test)
            strength = len(np.unique(y)) * len(train) / 100
            p = logistic_probe(x[train], y[train], x[test], int(y.max()) + 1, strength)
            found.append(f1(y[test], p.argmax(1), weighted=True))
        out[t] = {"latents": len(used), "f1": found}
    return out


def tell_barcodes(page, codes, y, names, mean, folds=(), pair=()):
    """Tell of barcodes (P, L) CSR with labels y (P,) the class means a_d, returned too, how well
    they classify (`barcode_f1`), and the 50 latents in which a `pair` of labels differs most."""
    means, there = class_means(codes, y), np.unique(y)
    found = page.metrics["barcodes"] = {"groups": len(y)}
    if len(there):
        page.picture("Barcodes", latent_chart(dict(zip(names[there], means)), means.std(0),
                                              "mean count of active patches", 80))
    if len(folds):
        found["f1"] = barcode_f1(codes, y, mean, folds)
        rows = [[f"1e{t}", v["latents"], mean_std(v["f1"])] for t, v in found["f1"].items()]
        page.table(["mean activation at least", "latents", "weighted F1"], rows, "Logistic "
                   f"regression on barcodes: {len(y)} groups, {len(folds)} stratified folds")
    if len(pair):
        difference = np.subtract(*means[np.searchsorted(there, pair)])
        order = np.argsort(-difference, kind="stable")
        more, less = order[:50], order[::-1][:50]
        found["differential"] = {names[pair[0]]: more[difference[more] > 0].tolist(),
                                 names[pair[1]]: less[difference[less] < 0].tolist()}
        both = means[np.searchsorted(there, pair)].T         # (L, 2): CytoSAE Fig. 5A
        rest = np.setdiff1d(order[::1 + len(order) // 2000], [*more, *less])
        parts = {"others": rest, **found["differential"]}
        page.picture("Mean counts", svg_lines({name: both[j].tolist() for name, j in parts.items()},
                                              *names[[*pair]], dots=True))
        page.table(["more active in", "latents (difference of the mean count)"], [
            [name, " ".join(f"{j} ({difference[j]:+.2f})" for j in v[:10])]
            for name, v in found["differential"].items()])
    return means


# -- What a latent does, and where (Mammo-SAE sections 2.2-3.3) ------------------------------------

def class_means(strength, y):
    """Mammo-SAE Eq. 2: mean activation over the samples (and positions) of each class, (C, L)."""
    means = [np.ravel(strength[y == c].astype(float).mean(0)) for c in np.unique(y)]
    return np.reshape(means, (-1, strength.shape[1]))


def intervention(strength, effect, base, y, means, ks=(
        0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)):
    """AUC with only, and without, the union of the k top latents of both classes (Mammo-SAE Eq.
    3-4), for the k below L, and L: a list of {"k", "latents" in it, "keep", "silence"}.

    strength (n, L) CSR, mean codes of samples; means (2, L) of the classes. Decoding, averaging
    over positions and a linear head commute: after an intervention at every position the score is
    base + sum_j z_j effect_j over the latents that are left. effect (L,): dictionary row times
    head; base: the head's score of the decoder's bias."""
    order, out = np.argsort(-means, axis=1, kind="stable"), []
    for k in sorted({min(k, len(effect)) for k in (*ks, len(effect))}):
        kept = np.isin(np.arange(len(effect)), order[:, :k])
        out.append({"k": int(k), "latents": int(kept.sum()),
                    "keep": auc(y, strength @ (effect * kept) + base),
                    "silence": auc(y, strength @ (effect * ~kept) + base)})
    return out


def bootstrap_auc(y, score, groups, rounds=1000, seed=0):
    """(AUC, 2.5 %, 97.5 %) of a score (n,) for y (n,) bool, whole groups (n,), patients, drawn."""
    drawn = (np.repeat(np.arange(len(y)), times) for times in drawn_again(groups, rounds, seed)[1:])
    found = [auc(y[rows], score[rows]) for rows in drawn if 0 < y[rows].sum() < len(rows)]
    interval = map(float, np.percentile(found, [2.5, 97.5])) if found else (None, None)
    return auc(y, score), *interval


def localisation(latents, heats, truth, iou=0.25):
    """Average precision of the heat maps of latents as detectors of boxes (Mammo-SAE Table 2): a
    list of {"latent", "AP", "AP, pictures with boxes": on those alone}. heats: of each picture
    (len(latents), h, w); truth: of each picture its true boxes."""
    found = [list(map(heat_boxes, maps)) for maps in heats]
    return [{"latent": int(j), "AP": average_precision(mine, truth, iou),
             "AP, pictures with boxes": average_precision(
                 [boxes if there else [] for boxes, there in zip(mine, truth)], truth, iou)}
            for j, mine in zip(latents, zip(*found))]


def heat_boxes(heat, side=224, percentile=95.):
    """Boxes around the hottest places of one picture: list of (score, x0, y0, x1, y1), in shares
    of the picture. A constant map has none.

    Mammo-SAE says "95th percentile" and "boxes"; what it leaves open is chosen so: heat (h, w) is
    enlarged bilinearly to `side` pixels, the percentile is that picture's, pixels at or above it
    count, those that touch, corners included, form a box, scored by the mean activation in it."""
    heat = np.asarray(Image.fromarray(np.float32(heat)).resize((side, side), Image.BILINEAR))
    # of a map that is 0 nearly everywhere the percentile is 0, and everything would be hot
    hot = (heat >= np.percentile(heat, percentile)) & (heat > heat.min())
    return [(float(heat[y, x].mean()), x.start / side, y.start / side, x.stop / side, y.stop / side)
            for y, x in scipy.ndimage.find_objects(scipy.ndimage.label(hot, np.ones((3, 3)))[0])]


def box_iou(a, b):
    """Intersection over union of two boxes x0, y0, x1, y1."""
    w, h = (max(0., min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area, other = ((v[2] - v[0]) * (v[3] - v[1]) for v in (a, b))
    return w * h / (area + other - w * h)


def average_precision(found, truth, iou=0.25):
    """Area under the precision-recall curve, see `curve_area`. found: for each picture a list of
    (score, x0, y0, x1, y1); truth: for each picture a list of boxes. Best score first, a box is
    right when its best-overlapping true box reaches `iou` and has no partner yet."""
    taken, right = set(), []
    boxes = [(b[0], i, b[1:]) for i, boxes in enumerate(found) for b in boxes]
    for _, picture, box in sorted(boxes, key=lambda v: -v[0]):
        overlaps = [box_iou(box, other) for other in truth[picture]]
        best = picture, int(np.argmax([*overlaps, 0]))
        right.append(max(overlaps, default=-1) >= iou and best not in taken)
        if right[-1]:
            taken.add(best)
    return curve_area(right, sum(map(len, truth)))


def heat_strip(image, boxes, heats, side=150):
    """A PIL image, its boxes (in shares of it) in red, beside heat maps (n, h, w) over it: HTML."""
    image.thumbnail((side, side))
    for box in boxes:
        corners = [v * pixels for v, pixels in zip(box, image.size * 2)]
        ImageDraw.Draw(image).rectangle(corners, outline="red", width=2)
    over = [overlay(image, heat / max(heat.max(), 1e-9)) for heat in heats]
    return f'<div class="strip">{"".join(map(embedded, [image, *over]))}</div>'


def separation(means):
    """How far apart class means (2, L) lie (Mammo-SAE Fig. 4), and the latent that differs most."""
    difference = means[1] - means[0]
    length, most = np.linalg.norm(means, axis=1).prod(), int(np.abs(difference).argmax())
    return {"distance": float(np.linalg.norm(difference)),
            "cosine": float(means[0] @ means[1] / max(length, 1e-30)),
            "latent": most, "difference": float(difference[most])}


# -- Few latents suffice, and words find them (the TotalSegmentator study) -------------------------

def r2_both(x, x_hat):
    """R2 of a reconstruction (n, d): weighted by the dimensions' variances, and their plain mean.
    Constant dimensions are left out; None where all are constant."""
    wrong, spread = ((x - x_hat) ** 2).sum(0), ((x - x.mean(0)) ** 2).sum(0)
    varies = spread > 1e-12 * (x ** 2).sum(0)                # else only by rounding
    if not varies.any():
        return {"variance-weighted": None, "uniform": None}
    return {"variance-weighted": float(1 - wrong[varies].sum() / spread[varies].sum()),
            "uniform": float(np.mean(1 - wrong[varies] / spread[varies]))}


def select_latents(code, y, n):
    """The n latents that tell the classes y (rows,) apart together, in order of choice (n,):
    orthogonal matching pursuit. To be called with training rows only. Each time the latent whose
    standardised column explains most of what is left of the classes' indicators is taken, among
    the 1,000 whose class means differ most, in standard deviations."""
    code = code.astype(float)                                # sums of float32 would be too coarse
    square, mean = (np.ravel(v.mean(0)) for v in (code.multiply(code), code))
    differ = class_means(code, y).std(0) / np.sqrt(np.maximum(square - mean ** 2, 0) + 1e-12)
    few = np.sort(np.argsort(-differ, kind="stable")[:1000])
    x, chosen = code[:, few].toarray(), []
    Z = x - x.mean(0)
    length = np.linalg.norm(Z, axis=0)                       # a latent that does not vary is 0
    Z = np.where(length > 1e-7 * np.linalg.norm(x, axis=0), Z / np.maximum(length, 1e-30), 0)
    R = (y[:, None] == np.unique(y)).astype(float)
    R -= R.mean(0)
    for _ in range(min(n, int(Z.any(0).sum()), len(y) - 1)):
        gain = ((Z.T @ R) ** 2).sum(1) / np.maximum((Z ** 2).sum(0), 1e-12)
        gain[chosen] = -1
        j = int(gain.argmax())
        q = Z[:, j] / max(np.linalg.norm(Z[:, j]), 1e-12)
        chosen.append(j)
        R, Z = R - np.outer(q, q @ R), Z - np.outer(q, q @ Z)
    return few[np.array(chosen, int)]


def kept_performance(dense, code, y, train, test, sizes=(1, 2, 5, 10, 20, 50), seed=0, draws=3):
    """Balanced accuracy of a linear probe on few latents, against all dense features and controls.

    dense (n, d), code (n, L) CSR, y (n,) int, train and test rows. For each size: the latents of
    `select_latents` (chosen on train), so many living latents drawn at random (mean of `draws`), so
    many principal components of the dense features. "kept, %" is None where the dense score is at
    chance or below. Returns {"rows": [...], "all": {"features", "latents", "chance"}, "chosen"}."""
    C, rng = int(y.max()) + 1, np.random.default_rng([seed, 7])

    def score(x):
        x = x.toarray() if sp.issparse(x) else x
        return scores(y[test], logistic_probe(x[train], y[train], x[test], C))["balanced accuracy"]
    mean = dense[train].mean(0)
    axes = np.linalg.svd(dense[train] - mean, full_matrices=False)[2]
    full, chance, rows = score(dense), 1 / len(np.unique(y[test])), []
    chosen = select_latents(code[train], y[train], max(sizes))
    alive = np.flatnonzero(code[train].getnnz(axis=0))
    small = code.shape[0] * len(alive) < 5e7                 # else it would not fit
    for n in sizes:
        best = score(code[:, chosen[:n]])
        drawn = [score(code[:, rng.permutation(alive)[:n]]) for _ in range(draws)]
        rows.append({"n": n, "best latents": best, "random latents": float(np.mean(drawn)),
                     "principal components": score((dense - mean) @ axes[:n].T),
                     "kept, %": 100 * (best - chance) / (full - chance)
                     if full > chance + 1e-9 else None})
    return {"rows": rows, "chosen": chosen.tolist(), "all": {
        "features": full, "latents": score(code[:, alive]) if small else None, "chance": chance}}


def retrieval_fidelity(dense, code, y, groups, ks=(1, 5, 10)):
    """Do sparse codes find the neighbours that dense features find? Rows of the same group are no
    neighbours. A list with, for each k: the overlap of the two lists and, with labels y (n,) int,
    the share of hits with the query's: sparse, dense, by chance among the same candidates."""
    groups, rows = np.unique(groups, return_inverse=True)[1], []
    lists = {name: nearest(x, x, max(ks), (groups, groups))[0]
             for name, x in (("sparse", code), ("dense", dense))}
    enough = (lists["dense"] >= 0).all(1)                    # queries with as many others
    lists = {name: v[enough] for name, v in lists.items()}
    if y is not None:                                        # what guessing among them finds
        both = sp.coo_matrix((np.ones(len(y)), (y, groups))).toarray()       # (C, groups), counts
        chance = (both.sum(1)[y] - both[y, groups]) / np.maximum(len(y) - both.sum(0)[groups], 1)
    for k in ks if enough.any() else ():
        both = [len(np.intersect1d(a[:k], b[:k])) / k for a, b in zip(*lists.values())]
        row = {"k": k, "overlap": float(np.mean(both))}
        if y is not None:
            row.update({f"precision, {name}": float((y[v[:, :k]] == y[enough][:, None]).mean())
                        for name, v in lists.items()})
            row["precision, chance"] = float(chance[enough].mean())
        rows.append(row)
    return rows


def shown_samples(column, top, rng):
    """Samples that show what a latent means, from its activations (n,): the `top` strongest, as
    many from the middle of the active ones, as many inactive ones by lot: dict kind -> rows."""
    active, silent = np.split(np.argsort(-column, kind="stable"), [(column > 0).sum()])
    middle = max(top, len(active) // 2 - top // 2)
    return {"top": active[:top], "middling": active[middle:][:top],
            "inactive": rng.permutation(silent)[:top]}


def naming_prompt(shown):
    """What to ask any language model for a latent's name; shown: {kind: its samples, dicts}. It is
    told no label, as a name must not copy its judge, and no path, which may hold the label."""
    told = {kind: [{k: v for k, v in one.items() if k not in ("sample", "label", "image")}
                   for one in samples] for kind, samples in shown.items()}
    return ("Below are samples that activate one latent of a sparse autoencoder strongly, samples "
            "that activate it moderately, and samples that do not. Name in at most five words what "
            f"the first have in common and the last lack. Answer with the name alone.\n{told}")


def name_weights(query, names):
    """{latent: Jaccard overlap of its name's words with those of a query}, above 0."""
    asked, *found = (set(re.findall(r"\w+", text.lower())) for text in (query, *names.values()))
    return {j: len(asked & v) / len(asked | v) for j, v in zip(names, found) if asked & v}


def search(strength, weights, rows):
    """Rows of codes (n, L) CSR, best first by a sum of latents {number: weight}, each as a share of
    its greatest value, so that they count alike."""
    code = strength[:, list(weights)]
    share = np.array(list(weights.values())) / np.maximum(code.max(axis=0).toarray()[0], 1e-12)
    return rows[np.argsort(-(code[rows] @ share), kind="stable")]


def search_precision(strength, weights, rows, y, named, top, seed=0, rounds=100):
    """For what share of the `top` rows found y (n,) bool is true, and the same `rounds` times for
    latents drawn from those `named`."""
    rng, found = np.random.default_rng([seed, 11]), []
    for _ in range(rounds + 1):
        found.append(float(y[search(strength, weights, rows)[:top]].mean()))
        drawn = rng.choice(list(named), len(weights), replace=False).tolist()
        weights = dict(zip(drawn, weights.values()))
    return found[0], found[1:]


# -- Back to pixels and words: relevancy maps (thesis 5.4.4, A.3-A.4) -----------------------------

def relevancy(attention, target):
    """Relevancy (B, T, T) of every token for every other (Chefer et al. 2021): R = 1, then R <- R +
    A R from the first layer on, with A the gradient times the attention, negative entries of each
    head cut to 0, averaged over heads. Row 0 without its first column is what a class token
    saw: exactly 0 for a target that nothing moves, such as latents of an absent concept.

    attention: of each layer (B, heads, T, T), what `target`, a sum of a scalar a sample, is of."""
    R = torch.eye(attention[0].shape[-1]).to(attention[0]).repeat(len(attention[0]), 1, 1)
    if not target.requires_grad:
        return R
    for a, g in zip(attention, torch.autograd.grad(target, attention, materialize_grads=True)):
        R = R + (g * a).detach().clamp(min=0).mean(1) @ R
    return R


def grad_cam(model, layer, to_map, x, score=None):
    """Grad-CAM (Selvaraju et al. 2017; thesis 3.2.4): where the output of `layer` raises the score,
    (B, h, w) in 0..1, and the scores. A channel weighs as much as its mean gradient; negative sums
    are cut to 0. to_map(output) -> (B, h, w, d) of the layer's output; score(the model's output
    (B, C)) -> (B,), by default the largest: a class, without a head a feature (as Vim4Path)."""
    kept = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with hook, torch.enable_grad():
        out = model(x.requires_grad_())                      # so that frozen weights do not matter
        values = out.max(1).values if score is None else score(out)
        gradient, = torch.autograd.grad(values.sum(), kept[0])
    a, g = to_map(kept[0].detach()), to_map(gradient)
    cam = (a * g.mean((1, 2), keepdim=True)).sum(-1).clamp(min=0)           # (B, h, w)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    heat = (cam - low) / (high - low).clamp(min=1e-12)
    return heat.cpu().numpy(), values.detach().cpu().numpy()


def kept_attention(model):
    """A transformer's attention modules, told to keep probabilities in `kept`; Mambas have none."""
    found = [m for m in model.modules() if hasattr(m, "keep")]
    for m in found:
        m.keep = True
    return found


def heat_maps(backbone, x, score, cam_layer, cam=False):
    """What in pictures x (B, 3, H, W) raises score(features (B, d)) -> (B,): relevancy of their
    patches (B, rows, columns), Grad-CAM without attention or with `cam`; and the scores. A picture
    whose score nothing moves gets all 0. backbone.features(x) -> (B, d), backbone.patch: a patch's
    side in pixels; cam_layer(x) -> (layer, to_map) of `grad_cam`."""
    layers = kept_attention(backbone)
    if cam or not layers:
        return grad_cam(backbone.features, *cam_layer(x), x, score)
    values = score(backbone.features(x))
    R = relevancy([m.kept for m in layers], values.sum())
    rows, columns = (side // backbone.patch for side in x.shape[2:])
    heat = R[:, 0, -rows * columns:].unflatten(1, (rows, columns))
    return heat.cpu().numpy(), values.detach().cpu().numpy()


def word_heat(clip, words, text, score):
    """[(word, relevance)] of a text for score(its feature (1, d)), as `heat_maps` for pictures.
    clip: encode_text(tokens), its `transformer` and `config`; words, its tokenizer: pieces(text),
    words([text], context) -> (1, T) tokens. Words that it does not know are left out."""
    layers, context = kept_attention(clip.transformer), clip.config["context"]
    known = words.pieces(text, strict=False)[:context - 2]   # without start and end
    tokens = words([text], context, strict=False).to(clip.logit_scale.device)
    target = score(clip.encode_text(tokens)).sum()
    R = relevancy([m.kept for m in layers], target)
    start, end = 1, len(known) + 1                           # the end's is the text's feature
    return word_scores(R[0, end, start:end].tolist(), [word for _, word in known])


def word_scores(relevance, pieces):
    """Relevance of pieces of a text, each of a word (number, text), -> [(word, score)]: pieces of a
    word added up, divided by the largest, 0 below 0.1 (thesis Fig. A.6 hides those)."""
    total = collections.Counter()
    for r, word in zip(relevance, pieces):
        total[word] += max(r, 0.)
    most = max(total.values(), default=0.) or 1.
    return [(text, v / most if v / most >= 0.1 else 0.) for (_, text), v in total.items()]


# -- What maps of concepts segment (thesis Table 5.4) --------------------------------------------

def concept_latents(codes, labels, least=50, known=slice(None)):
    """The latents J of each label (thesis 5.4.4, A.3), a list of C arrays: those active with it in
    `least` training samples or more, counted over all streams together; and of them those that have
    it in at least half of their samples, else the 10 with the largest share (ours: the count alone
    picks latents that fire for everything). labels, known: as in `label_counts`."""
    found = [label_counts(code, labels, None, known) for code in codes.values()]
    with_label, total = (sum(v) for v in zip(*found))        # (L, C), (L,)
    out = []
    for counts in with_label.T:
        often = np.flatnonzero(counts >= least)
        share = counts[often] / np.maximum(total[often], 1)
        mostly = often[share >= 0.5]
        out.append(mostly if len(mostly) else often[np.argsort(-share, kind="stable")[:10]])
    return out


def indicator(latents, n_latents):
    """(C, L) of 0 and 1: which of the L latents are in each of C lists."""
    found = [np.isin(np.arange(n_latents), own) for own in latents]
    return torch.from_numpy(np.reshape(found, (-1, n_latents)).astype(np.float32))


def weighted_code(code, weight):
    """score(features (B, d), numbers c (B,)) -> (B,): code(features) (B, L) times rows c of weight
    (C, L): a latent, a sum of latents, the similarity to another code."""
    return lambda f, c: (code(f) * weight[c]).sum(1)


def concept_scores(code, names, J, alive, seed=0):
    """What a map of a label may be a map of (thesis Table 5.4), and as many random others of the
    living latents: {target: (score(features (B, d), labels (B,)) -> (B,), its labels)}.

    code(features) -> (B, L) of the stream alone; names (C, L): the codes of the labels' names; J:
    of `concept_latents`; alive: numbers of the latents active in training."""
    rng, some = np.random.default_rng(seed), [c for c, own in enumerate(J) if len(own)]
    chance = [rng.permutation(np.setdiff1d(alive, own))[:len(own)] for own in J]
    own, other = (indicator(v, names.shape[1]).to(names) for v in (J, chance))
    return {"sum of concept latents": (weighted_code(code, own), some),
            "similarity to the name": (weighted_code(code, names), range(len(J))),
            "random latents": (weighted_code(code, other), some)}


def centre_prior(n=16):
    """(n, n) heat that falls from the middle."""
    y, x = np.mgrid[:n, :n] / (n - 1) - 0.5
    return np.exp(-8 * (x * x + y * y))


def heat_mask(heat, size, otsu):
    """A heat map (h, w) -> bool mask (H, W) by Otsu's threshold, otsu(uint8 values), on the map
    enlarged bilinearly to 224, scaled to 0..1, then to `size`, which the thesis leaves open and the
    authors' code does. None for a constant map: no prediction."""
    enlarged, h = torch.nn.functional.interpolate, torch.as_tensor(np.asarray(heat))
    h = enlarged(h.float()[None, None], (224, 224), mode="bilinear")
    if not float(h.max()) > float(h.min()):
        return None
    h = enlarged((h - h.min()) / (h.max() - h.min()), size, mode="bilinear")[0, 0].double().numpy()
    low, span = h.min(), np.ptp(h)
    t = otsu(np.minimum((h - low) / span * 256, 255).astype(np.uint8))
    return h >= low + (t + 0.5) / 256 * span                 # the bin's centre, as scikit-image


def curve_area(right, total, points=None):
    """Area under the precision-recall curve of detections (n,), best first, right or not, precision
    made non-increasing; or its mean at `points` recalls. None without anything to detect."""
    if not total:
        return None
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    envelope = np.r_[np.maximum.accumulate(precision[::-1])[::-1], 0]
    if points:
        return float(envelope[np.searchsorted(recall, np.linspace(0, 1, points))].mean())
    return float((np.diff(np.r_[0, recall]) * envelope[:-1]).sum())


def segmentation_scores(found, truth, iou=0.2, score=None, area=np.sum):
    """AP and AR of masks at one IoU, by size, and mIoU (thesis Table 5.4), as COCO's evaluator
    computes them; None where a size has no true mask.

    found, truth: (image, label) -> bool mask (H, W); found may lack some, or hold labels the image
    does not have, which count against it. score: dict like found, 1 for all by default. Precision
    is interpolated at 101 recalls and averaged over labels that have true masks of the size; sizes
    are areas of masks (`area` of a found one; the published figures took its box's)."""
    sizes = {"": (0, np.inf), " small": (0, 32 ** 2), " medium": (32 ** 2, 96 ** 2),
             " large": (96 ** 2, np.inf)}                    # areas in pixels, as COCO's
    overlap = {key: np.logical_and(m, truth[key]).sum() / np.logical_or(m, truth[key]).sum()
               for key, m in found.items() if key in truth}
    ranked = sorted(found, key=lambda key: (-(score[key] if score else 1), key[0]))
    right, out = {key: overlap.get(key, 0) >= iou for key in ranked}, {}
    for name, (low, high) in sizes.items():
        counted, each = {key for key, m in truth.items() if low <= m.sum() <= high}, []
        for label in sorted({label for _, label in counted}):
            hits = [right[key] for key in ranked if key[1] == label and (
                key in counted if right[key] else low <= area(found[key]) <= high)]
            total = sum(key[1] == label for key in counted)
            each.append((curve_area(hits, total, 101), sum(hits) / total))
        out[f"AP{name}"], out[f"AR{name}"] = (_mean(v[i] for v in each) for i in (0, 1))
    return {**out, "mIoU": _mean(overlap.get(key, 0.) for key in truth)}


def map_scores(maps, truth, otsu, silent=()):
    """What heat maps (picture, label) -> (h, w) segment of the true masks: of the labels that are
    there, as published, and of all, there or not; and how many of the pairs whose score is 0,
    `silent`, have a map that is not."""
    # of a label that is absent it counts alone whether there is a mask
    masks = {key: heat_mask(heat, truth[key].shape if key in truth else heat.shape, otsu)
             for key, heat in maps.items()}
    masks = {key: mask for key, mask in masks.items() if mask is not None}
    there = segmentation_scores({key: m for key, m in masks.items() if key in truth}, truth)
    absent = [key in masks for key in maps if key not in truth]
    return {**{name: v for name, v in there.items() if v is not None},   # of sizes that there are
            "AP, all asked": segmentation_scores(masks, truth)["AP"],
            "drawn though absent, %": 100. * sum(absent) / max(len(absent), 1),
            "absent": len(silent), "not 0": sum(int(maps[key].any()) for key in silent)}


def map_gallery(maps, asked, names, picture):
    """Heat maps {method: {(picture, label): (h, w)}} as HTML, for each label a table of the pairs
    `asked`, {(picture, label): is it there?}. picture(i) -> PIL image. Maps of zeros read "absent",
    or "silent" if it is there."""
    parts = []

    def cell(method, key):
        heat = maps[method].get(key)
        if heat is None or not heat.max() > 0:
            return "no latents" if heat is None else "silent" if asked[key] else "absent"
        return embedded(overlay(picture(key[0]).resize((112, 112)), heat / heat.max()))
    for c in sorted({c for _, c in asked}):
        keys = [key for key in asked if key[1] == c]
        rows = [["", *(embedded(picture(key[0]), 112) + "without it" * (not asked[key])
                       for key in keys)]]
        rows += [[html.escape(method), *(cell(method, key) for key in keys)] for method in maps]
        table = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
        parts.append(f'<h3>{html.escape(names[c])}</h3><table class="maps">{table}</table>')
    return "".join(parts)


def word_table(examples):
    """Captions with each word as dark as its relevance, HTML, from dicts of `concept`, `caption`,
    `here` (is it?) and `words`; a concept that moves nothing is absent, or its latents silent."""
    parts = []
    for e in examples:
        shown = " ".join(f'<span style="--level:-{score:.2f}">{html.escape(word)}</span>'
                         + f"<sub>{score:.2f}</sub>" * (score > 0) for word, score in e["words"])
        moved = any(score for _, score in e["words"])
        told = "" if moved else f" <b>{'silent' if e['here'] else 'absent'}</b>"
        parts.append(f"<p><b>{html.escape(e['concept'])}</b>: {shown}{told}</p>")
    return "".join(parts)


# -- Do two codes share latents (thesis 4.2-4.3)? --------------------------------------------------

def latent_correlations(a, b, same):
    """Correlations (P,) of pairs of latents of two codes (n, L_a), (n, L_b) of the same samples:
    of latent j with latent j if they are the `same`, else of the best one-to-one pairing
    (Hungarian). Latents active in fewer than 5 samples are left out, and of more than 4,096 to be
    paired the less frequent: the assignment takes their cube. No column becomes dense."""
    n, active = max(a.shape[0], 1), [code.getnnz(axis=0) for code in (a, b)]
    chosen = [np.flatnonzero(np.minimum(*active) >= 5)] * 2 if same else [
        np.sort(np.argsort(-v, kind="stable")[:min(4096, (v >= 5).sum())]) for v in active]
    a, b = (code[:, some].astype(float) for code, some in zip((a, b), chosen))
    (mean_a, mean_b), squares = ([np.ravel(code.sum(0)) / n for code in codes] for codes in (
        (a, b), (a.multiply(a), b.multiply(b))))
    deviation = [np.where(square - mean ** 2 > 1e-10 * square, square - mean ** 2, np.inf) ** 0.5
                 for square, mean in zip(squares, (mean_a, mean_b))]     # r = 0 if it is one value
    if same:
        return (np.ravel(a.multiply(b).sum(0)) / n - mean_a * mean_b) / np.multiply(*deviation)
    r = ((a.T @ b).toarray() / n - np.outer(mean_a, mean_b)) / np.outer(*deviation)
    return r[scipy.optimize.linear_sum_assignment(-r)]


def latents_in_common(r):
    """What correlations of pairs of latents (P,) say: how many reach .5, .7 and .9, the median."""
    return {"pairs": len(r), **{f"r >= {t}": int((r >= t).sum()) for t in (0.5, 0.7, 0.9)},
            "median r": float(np.median(r)) if len(r) else None,
            "shared, %": 100 * float((r >= 0.5).mean()) if len(r) else None}


# -- Is one model better than another (thesis 3.3.2)? ----------------------------------------------

def mean_std(values):
    """"0.893 ± 0.041" of several runs (standard deviation with n - 1) without None, or a dash."""
    values = [v for v in values if v is not None]
    spread = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"{np.mean(values):.3f} ± {spread:.3f}" if values else "-"


def compare(runs):
    """Every pair of models over the same runs: a list of {a, b, difference (mean of a - b), t_p
    (paired t-test), holm_p (after Holm's correction for the number of pairs), wilcoxon_p (signed
    ranks; with 5 runs never below 0.0625), d (mean difference / its standard deviation)}.

    runs: dict model -> (R,) numbers, run r with the same split and seed for all. Tests are
    two-sided; p is None where all differences are alike, or a run has none: nothing to test."""
    out = []
    for a, b in itertools.combinations(runs, 2):
        gap = np.subtract(*(np.asarray(runs[model], float) for model in (a, b)))
        mean, spread = gap.mean().item(), gap.std(ddof=1).item() if len(gap) > 1 else 0.
        pair = {"a": a, "b": b, "difference": plain(mean),   # a run may lack that number
                **dict.fromkeys(("t_p", "holm_p", "wilcoxon_p", "d"))}
        if spread > 1e-12:
            pair.update(t_p=float(scipy.stats.ttest_1samp(gap, 0).pvalue), d=mean / spread,
                        wilcoxon_p=float(scipy.stats.wilcoxon(gap).pvalue))
        out.append(pair)
    tested, worst = sorted((p for p in out if p["t_p"] is not None), key=lambda p: p["t_p"]), 0.
    for rank, pair in enumerate(tested):                     # Holm 1979, the smallest p first
        pair["holm_p"] = worst = max(worst, min(1., (len(tested) - rank) * pair["t_p"]))
    return out


def tell_models(page, found, tested):
    """The table of thesis 3.3.3, and who beats whom. found: model -> list of `scores`, one a run;
    tested: the models among them that are compared in pairs."""
    names, n = ["AUC", "accuracy", "balanced accuracy", "F1"], len(found[tested[0]])
    rows = [[model, *(mean_std([run[name] for run in runs]) for name in names)]
            for model, runs in found.items()]
    page.table(["model", *names], rows, f"{n} runs, mean ± standard deviation")
    page.metrics.update(scores=found, pairs={}, beats={})
    for name in names[:2] if n > 1 else ():
        pairs = compare({model: [run[name] for run in found[model]] for model in tested})
        clear = [p for p in pairs if p["t_p"] is not None and p["t_p"] < 0.05]
        won = {(p["a"], p["b"]) if p["difference"] > 0 else (p["b"], p["a"]) for p in clear}
        beats = {a: {b: int((a, b) in won) for b in tested if b != a} for a in tested}
        page.metrics["pairs"][name], page.metrics["beats"][name] = pairs, beats
        rows = [[f"{a} - {b}", *numbers] for a, b, *numbers in map(dict.values, pairs)]
        page.table(["pair", "mean difference", "p (paired t)", "p (Holm)", "p (Wilcoxon)",
                    "effect size d"], rows, f"{name}: pairs of models")
        wins = {a: [b for b in others if others[b]] for a, others in beats.items()}
        lines = [f"{a} beats {', '.join(b)}" for a, b in wins.items() if b]
        page.text(f"{name}, paired t-test at p < 0.05, {len(pairs)} pairs: "
                  f"{'; '.join(lines) or 'no model beats another'}.")
    page.text(f"{n} runs make a weak test: the Wilcoxon p cannot fall below {2 / 2 ** n:.4f}, and "
              "the runs' test parts overlap, so that the t-test takes them for more independent "
              "than they are." if n > 1 else "One run allows no test of which model is better.")


# -- Pictures with heat over them -----------------------------------------------------------------

def heat_colours(heat):
    """(h, w) in 0..1 -> (h, w, 3) uint8, dark blue over green to red."""
    grey = Image.fromarray((255 * np.clip(heat, 0, 1)).round().astype(np.uint8))
    return np.asarray(ImageOps.colorize(grey, (48, 18, 120), (200, 30, 20), (60, 190, 110)))


def overlay(image, heat, alpha=0.5):
    """A PIL image with a heat map (h, w) in 0..1 over it, enlarged smoothly to its size."""
    heat = Image.fromarray(np.asarray(heat, np.float32)).resize(image.size, Image.BICUBIC)
    colours = Image.fromarray(heat_colours(np.asarray(heat)))
    return Image.blend(image.convert("RGB"), colours, alpha)


def box_overlay(image, boxes, heat, scale, alpha=0.6):
    """A slide, a PIL image `scale` times smaller, with its boxes (n, 4) coloured by heat (n,)."""
    heat = scipy.stats.rankdata(heat) / len(heat)            # as CLAM: a softmax is mostly near 0
    image, colours = image.convert("RGB"), heat_colours(heat[None])[0].tolist()
    inked = image.copy()
    for (x, y, w, h), colour in zip(np.asarray(boxes) / scale, colours):
        inked.paste(tuple(colour), tuple(map(round, (x, y, x + w, y + h))))
    return Image.blend(image, inked, alpha)


def contact_sheet(rows, titles, side=160, names=()):
    """Rows of PIL images, `side` pixels wide, as one picture, below `titles` and after `names`."""
    left, step = 90 if names else 8, side + 8
    sheet = Image.new("RGB", (left + step * len(titles), step * len(rows) + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.text((left + 4 + c * step, 8), title, "black")
    for r, row in enumerate(rows):
        if names:
            draw.text((6, 28 + r * step + side // 2), names[r], "black")
        for c, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.BICUBIC), (left + c * step, 28 + r * step))
    return sheet


def embedded(image, width=480):
    """A PIL image, at most `width` pixels wide and high, as an <img> with its data inside."""
    image = image.convert("RGB")
    image.thumbnail((width, width))
    return f'<img alt="" src="{image_url(image)}">'


def image_url(image, quality=85):
    """An RGB image as the data: URL of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
