"""Claims about sae.py, held against the dense textbook form, the authors' outputs, closed forms and planted truth."""
import itertools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch

import data
import eval as judge
import sae
from sae import SAE, SPARC, Codes, InputError

DIMS = {"a": 10, "b": 8, "c": 14}


def make(M=3, batch=16, dtype=torch.float64, L=64, k=4, norm="l2", **kw):
    """A model with all parameters random, and a batch for it."""
    dims = dict(list(DIMS.items())[:M])
    model = SPARC(dims, L, k, norm=norm, **kw).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=dtype)
    return model, {s: torch.randn(batch, d, generator=g, dtype=dtype) for s, d in dims.items()}


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


def same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- the sparse arithmetic ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernels", ["csr", "gather"])
@pytest.mark.parametrize("lam", [0., 1., 0.3])
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("topk", sae.TOPK)
def test_loss_and_gradients_equal_the_dense_textbook_form(topk, M, lam, kernels):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for reduction in ("sum", "mean"):
            model, x = make(M, dtype=dtype, topk=topk, lam=lam, kernels=kernels, reduction=reduction)
            x["a"][3] = 0
            ours, dense = model.loss(x)[0], sae.dense_loss(model, x)
            same(ours, dense, tolerance)
            for (name, g), expected in zip(gradients(model, ours).items(), gradients(model, dense).values()):
                same(g, expected, tolerance)


@pytest.mark.parametrize("mode", ["joint", "alone"])
@pytest.mark.parametrize("kernels", ["csr", "gather"])
def test_codes_and_reconstructions_equal_the_dense_textbook_form(mode, kernels):
    model, x = make(kernels=kernels)
    codes = model.encode(x, mode)
    x = {s: model.normalise(v, s) for s, v in x.items()}
    h = {s: (x[s] - model.b_pre[s]) @ model.W_enc[s].T + model.b_lat[s] for s in x}
    for s in x:
        decider = sum(h.values()) if mode == "joint" else h[s]
        kept = decider >= decider.sort(1, descending=True)[0][:, 3:4]                       # k = 4
        z = torch.relu(h[s]) * kept
        same(codes[s].dense(64), z, 1e-12)
        for t in x:
            same(model.decode(codes[s], t), z @ model.W_dec[t] + model.b_pre[t], 1e-12)


@pytest.mark.parametrize("kernels", ["csr", "gather"])
def test_sparse_products_pass_gradcheck(kernels):
    g = torch.Generator().manual_seed(0)
    x, W, v = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (12, 6), (5, 3)))
    pattern = sae.Pattern(torch.rand(5, 12, generator=g).topk(3)[1], 12, kernels)
    assert torch.autograd.gradcheck(lambda x, W: sae._Product.apply(x, W, pattern, sae._sample), (x, W))
    assert torch.autograd.gradcheck(lambda v, W: sae._Product.apply(v, W, pattern, sae._combine), (v, W))


def test_gradient_reaches_the_raw_features():
    model, x = make(norm="none")
    x = {s: v.requires_grad_() for s, v in x.items()}
    assert torch.autograd.gradcheck(lambda a: model.encode({"a": a}, "alone")["a"].values, x["a"])


def test_without_csr_kernels_the_gather_path_serves(monkeypatch):
    model, x = make()
    expected = model.loss(x)[0]
    monkeypatch.setattr(sae, "_has_csr", lambda: False)
    assert not model._pattern(torch.zeros(1, 1, dtype=torch.long)).csr
    same(model.loss(x)[0], expected, 1e-12)


def test_a_gradient_that_the_caller_keeps_is_not_overwritten_by_the_next_step():
    model, x = make(dtype=torch.float32, topk="both")
    first = torch.autograd.grad(model.loss(x)[0], model.W_dec["a"])[0]
    kept = first.clone()
    optimiser = sae.make_optimiser(model)
    for _ in range(3):
        sae.train_step(model, optimiser, x)
    assert torch.equal(first, kept)


# -- the authors' own outputs ------------------------------------------------------------------------------------------

def authors_model(z, cfg, kind, **kw):
    model = SPARC(cfg["dims"], cfg["n_latents"], cfg["k"], topk=kind, reduction="mean", norm="none", **kw)
    set_authors_weights(model, {k[2:]: v for k, v in z.items() if k.startswith("w.")})
    return model


def authors_names(stream):
    """Their state-dict names and ours; their decoder is our dictionary transposed."""
    return ((f"encoders.{stream}.weight", "W_enc", False), (f"decoders.{stream}.weight", "W_dec", True),
            (f"pre_biases.{stream}", "b_pre", False), (f"latent_biases.{stream}", "b_lat", False))


def set_authors_weights(model, weights):
    with torch.no_grad():
        for s in model.streams:
            for theirs, ours, transposed in authors_names(s):
                v = torch.from_numpy(weights[theirs])
                getattr(model, ours)[s].copy_(v.T if transposed else v)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_codes_and_reconstructions_of_every_subset_of_streams_are_the_authors(kind, golden):
    z, cfg = golden(f"sparc_{kind}")
    model = authors_model(z, cfg, kind)
    x = {s: torch.from_numpy(z[f"in.{s}"]) for s in cfg["streams"]}
    subsets = {k.split(".")[1] for k in z if k.startswith("out.") and "logits" in k}
    assert len(subsets) == 7
    for subset in subsets:
        names = subset.split("+")
        codes = model.encode({s: x[s] for s in names})
        for s in names:
            same(codes[s].dense(64), torch.from_numpy(z[f"out.{subset}.sparse_codes_{s}"]), 1e-5)
            for t in names:
                key = f"recon_{s}" if s == t else f"cross_recon_{t}_from_{s}"
                same(model.decode(codes[s], t), torch.from_numpy(z[f"out.{subset}.{key}"]), 1e-5)


@pytest.mark.parametrize("lam", [0, 1])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_loss_terms_and_gradients_are_the_authors(kind, lam, golden):
    z, cfg = golden(f"sparc_{kind}")
    model = authors_model(z, cfg, kind, lam=float(lam))
    total, parts = model.loss({s: torch.from_numpy(z[f"in.{s}"]) for s in cfg["streams"]})
    same(total.item(), z[f"out.loss.lam{lam}.total"].item(), 1e-5)
    same(parts["self"].item(), z[f"out.loss.lam{lam}.avg_mse_true"].item(), 1e-5)
    if lam:
        same(parts["cross"].item(), z[f"out.loss.lam{lam}.avg_cross_loss"].item(), 1e-5)
    found = gradients(model, total)
    for s in cfg["streams"]:
        for theirs, ours, transposed in authors_names(s):
            expected = torch.from_numpy(z[f"grad.lam{lam}.{theirs}"])
            same(found[f"{ours}.{s}"], expected.T if transposed else expected, 1e-5)


@pytest.mark.parametrize("lam", [0, 1])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_twenty_steps_end_where_the_authors_do_when_they_too_renormalise_last(kind, lam, golden):
    z, cfg = golden("sparc_step")
    model = authors_model(z, cfg, kind, lam=float(lam), aux_coef=0.)
    losses = []
    sae.fit(model, lambda t: {s: torch.from_numpy(z[f"in.{s}"][t]) for s in cfg["streams"]}, 20, lr=1e-3,
            on_step=lambda _, result: losses.append(result["loss"].item()))
    run = f"out.{kind}.lam{lam}.renorm_last"
    np.testing.assert_allclose(losses, z[f"{run}.losses"], rtol=1e-5)
    for s in cfg["streams"]:
        for theirs, ours, transposed in authors_names(s):
            expected = torch.from_numpy(z[f"{run}.{theirs}"])
            same(getattr(model, ours)[s].detach(), expected.T if transposed else expected, 1e-5)
        norms = model.W_dec[s].norm(dim=1)
        same(norms, torch.ones_like(norms), 1e-6)
        # On purpose otherwise: in their order the saved rows are off unit norm.
        theirs = torch.from_numpy(z[f"out.{kind}.lam{lam}.authors.decoders.{s}.weight"]).norm(dim=0)
        assert (theirs - 1).abs().max() > 1e-4


# -- AuxK and dead latents ---------------------------------------------------------------------------------------------

def with_dead(golden, kind="global"):
    z, cfg = golden("sparc_auxk")
    model = authors_model(z, cfg, kind, aux_k=cfg["auxk"], dead_after=1000)
    x = {s: torch.from_numpy(z[f"in.{s}"]) for s in cfg["streams"]}
    for s in cfg["streams"]:
        # theirs counts this batch before asking who is dead, ours after: start from what they ask
        getattr(model, f"idle_{s}").copy_(torch.from_numpy(z[f"out.{kind}.counter_after_{s}"]) - 1)
    return z, cfg, model, x


def test_auxk_uses_the_dead_latents_that_the_authors_use_but_not_their_bias(golden):
    z, cfg, model, x = with_dead(golden)
    codes = model.encode(x, "joint")
    for s in cfg["streams"]:
        used = []
        original = model._codes
        model._codes = lambda *a: used.append(original(*a)) or used[-1]
        c, e = x[s] - model.b_pre[s].detach(), (x[s] - model.decode(codes[s], s)).detach()
        if not model.dead(s).any():
            assert s == "dino" and z["out.global.auxk_loss_dino"] > 0.9                     # theirs, with nothing dead
            continue
        ours = model._auxk(c, e, s, {})
        model._codes = original
        z_aux = torch.from_numpy(z[f"out.global.aux_codes_{s}"])
        same(used[0][s].dense(64).detach(), z_aux, 1e-5)
        e_hat = z_aux @ model.W_dec[s].detach()
        same(ours.detach(), (e - e_hat).square().sum() / e.square().sum(), 1e-5)


def test_auxk_gradient_reaches_dead_rows_and_biases_only(golden):
    _, cfg, model, x = with_dead(golden)
    codes = model.encode(x, "joint")
    s = "clip_img"
    e = (x[s] - model.decode(codes[s], s)).detach()
    aux = model._auxk((x[s] - model.b_pre[s]).detach(), e, s, {})
    parameters = [model.W_enc[s], model.W_dec[s], model.b_lat[s], model.b_pre[s]]
    grads = torch.autograd.grad(aux, parameters, allow_unused=True)
    for g in grads[:3]:
        reached = g.reshape(64, -1).abs().sum(1) > 0
        assert reached.any() and not (reached & ~model.dead(s)).any()
    assert grads[3] is None


@pytest.mark.parametrize("topk", ["global", "local", "both"])
def test_auxk_is_exactly_nothing_when_nothing_is_dead(topk):
    model, x = make(topk=topk, aux_coef=1.)
    with_aux, parts = model.loss(x)
    without, _ = make(topk=topk, aux_coef=0.)
    assert parts["aux"] == 0 and torch.equal(with_aux, without.loss(x)[0])
    for g, expected in zip(gradients(model, with_aux).values(), gradients(without, without.loss(x)[0]).values()):
        assert torch.equal(g, expected)


def test_auxk_enters_the_loss_as_the_coefficient_times_the_sum_over_streams():
    model, x = make(aux_coef=0.25, aux_k=5)
    for s in DIMS:
        getattr(model, f"idle_{s}")[:9] = 1000
    total, parts = model.loss(x)
    model.aux_coef = 0.
    assert parts["aux"] > 0
    same(total - model.loss(x)[0], 0.25 * 3 * parts["aux"], 1e-12)


def test_dead_counters_count_training_steps_since_a_value_above_a_thousandth():
    model, x = make(dtype=torch.float32, dead_after=3)
    optimiser = sae.make_optimiser(model, lr=0.)
    for step in range(1, 4):
        codes = model.encode(x, "joint")
        sae.train_step(model, optimiser, x)
        for s in DIMS:
            fired = (codes[s].dense(64) > 1e-3).any(0)
            assert torch.equal(model.idle_a if s == "a" else getattr(model, f"idle_{s}"), torch.where(fired, 0, step))
    assert torch.equal(model.dead("a"), ~(model.encode(x, "joint")["a"].dense(64) > 1e-3).any(0))


def test_the_scale_of_the_features_does_not_decide_which_latents_are_dead():
    counters = {}
    for scale in (1., 2e-4, 1e4):
        model = SPARC(DIMS, 64, 4, norm="none", aux_coef=0.)        # linear: its biases are 0
        optimiser, g = sae.make_optimiser(model, lr=0.), torch.Generator().manual_seed(5)
        for _ in range(6):
            x = {s: scale * torch.randn(3, d, generator=g) for s, d in DIMS.items()}
            sae.train_step(model, optimiser, x)
        counters[scale] = torch.stack([getattr(model, f"idle_{s}") for s in DIMS])
    assert torch.equal(counters[1.], counters[2e-4]) and torch.equal(counters[1.], counters[1e4])
    assert 0 < (counters[1.] == 0).sum() < counters[1.].numel()


@pytest.mark.parametrize("kind", [None, "topk", "relu", "batchtopk"])
def test_dead_counters_are_right_when_every_latent_is_kept(kind):
    how = {"n_latents": 6, "k": 6, "norm": "none"}
    model = SAE({"a": 10}, activation=kind, **how) if kind else SPARC({"a": 10}, **how)
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(3))
    fired = (torch.relu(x @ model.W_enc["a"].T) > 1e-2).any(0)
    assert 0 < fired.sum() < 6
    sae.train_step(model.train(), sae.make_optimiser(model, lr=0.), {"a": x})
    assert torch.equal(model.idle_a == 0, fired)


def test_evaluation_leaves_dead_counters_and_weights_unchanged():
    model, x = make(dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    model.decode(model.encode(x, "joint")["a"], "b")
    model.loss(x)
    model.encode(x, "alone")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_auxk_cannot_revive_is_drawn_anew_with_its_adam_moments():
    model, x = make(dtype=torch.float32, L=512, dead_after=5, reinit_after=7, aux_coef=0.)
    optimiser = sae.make_optimiser(model)
    for _ in range(3):
        sae.train_step(model, optimiser, x)
    W = model.W_enc["b"]
    model.idle_b[:400] = 11
    model.idle_b[400:] = 0
    before, moments = W.detach().clone(), optimiser.state[W]["exp_avg"].clone()
    model.idle_b[:] = torch.where(torch.arange(512) < 400, 12, 11)
    sae._reinitialise(model, optimiser)
    assert torch.equal(W[400:], before[400:]) and torch.equal(optimiser.state[W]["exp_avg"][400:], moments[400:])
    assert abs(W[:400].std() - 0.01) < 0.0005 and not model.b_lat["b"][:400].any()
    for p in (W, model.b_lat["b"]):
        assert not optimiser.state[p]["exp_avg"][:400].any() and not optimiser.state[p]["exp_avg_sq"][:400].any()
    assert (model.idle_b[:400] == 0).all() and (model.idle_b[400:] == 11).all()


# -- choosing ----------------------------------------------------------------------------------------------------------

def test_joint_codes_share_their_support_and_alone_codes_ignore_the_other_streams():
    model, x = make()
    joint = model.encode(x, "joint")
    assert torch.equal(joint["a"].indices, joint["c"].indices)
    other = {**x, "b": torch.randn_like(x["b"])}
    assert torch.equal(model.encode(x, "alone")["a"].dense(64), model.encode(other, "alone")["a"].dense(64))
    assert not torch.equal(model.encode(x, "joint")["a"].dense(64), model.encode(other, "joint")["a"].dense(64))
    single = {"a": x["a"]}
    assert torch.equal(model.encode(single, "alone")["a"].dense(64), model.encode(single, "joint")["a"].dense(64))


def test_keeping_every_latent_is_a_relu_autoencoder():
    model, x = make(1, k=64, norm="none")
    expected = torch.relu((x["a"] - model.b_pre["a"]) @ model.W_enc["a"].T + model.b_lat["a"])
    same(model.encode(x)["a"].dense(64), expected, 1e-12)


def test_random_topk_lets_one_stream_choose_for_all_and_draws_it_anew_each_step():
    model, x = make(topk="random")
    drawn = []
    for step in range(60):
        model.step.fill_(step)
        drawn.append(model.drawn_streams()[0])
        assert drawn[-1] == model.drawn_streams()[0]                                            # no hidden state
    assert {drawn.count(s) > 8 for s in DIMS} == {True}
    codes = model.loss(x)[1]["codes"][0]
    assert torch.equal(codes["a"].indices.sort(1)[0], model.encode(x, "alone")[drawn[-1]].indices.sort(1)[0])


# -- a few pairs of streams a step -------------------------------------------------------------------------------------

def five(**kw):
    dims = {"a": 6, "b": 5, "c": 7, "d": 4, "e": 3}
    g = torch.Generator().manual_seed(2)
    return SPARC(dims, 32, 4, norm="l2", **kw).double(), {s: torch.randn(8, d, generator=g).double() for s, d in dims.items()}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_the_mean_gradient_over_all_choices_of_targets_is_that_of_all_pairs(targets, gaps, reduction, monkeypatch):
    model, x = five(topk="both", targets=targets, reduction=reduction, lam=.7)
    everything, _ = five(topk="both", reduction=reduction, lam=.7)
    if gaps:                                                 # a and b never meet, as in unpaired sets
        x["a"][:4], x["b"][4:], x["c"][2] = float("nan"), float("nan"), float("nan")
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    losses, slopes, told = [], [], []
    for order in orders:
        monkeypatch.setattr(torch, "randperm", lambda n, generator, order=order: order)
        loss, parts = model.loss(x)
        losses.append(loss)
        told.append(parts["cross"])
        slopes.append(gradients(model, losses[-1]))
    assert torch.stack(losses).std() > 1e-3
    full, parts = everything.loss(x)
    same(torch.stack(losses).mean(), full, 1e-12)
    same(torch.stack(told).mean(), parts["cross"], 1e-12)
    for name, g in gradients(everything, full).items():
        same(torch.stack([one[name] for one in slopes]).mean(0), g, 1e-12)


def test_every_pair_of_streams_is_drawn_as_often_in_every_batch_and_by_the_step_alone():
    model, _ = five(targets=2, topk="random")
    met, with_first = np.zeros((5, 5)), np.zeros((5, 5))
    for step in range(2000):
        model.step.fill_(step)
        drawn = [v.numpy() for v in model.drawn_sources(6).values()]
        assert all((v == again.numpy()).all() for v, again in zip(drawn, model.drawn_sources(6).values()))
        here = np.zeros((5, 5, 6), int)
        for t, sources in enumerate(drawn):                  # (6, 3): its own, then two others
            assert (sources[:, 0] == t).all()
            for i, row in enumerate(sources):
                here[row, t, i] += 1
        assert here.max() == 1 and (here.sum(0) == 3).all() and (here.sum(1) == 3).all()
        assert (here.sum(2) == np.where(np.eye(5), 6, 3)).all()             # 6 samples x 2 of 4
        met += here[:, :, 0]
        s = model.streams.index(model.drawn_streams()[0])    # who chooses has no say in who rebuilds
        with_first[s] += here[s, :, 0]
    others = ~np.eye(5, dtype=bool)
    assert (abs(met[others] - 1000) < 110).all() and (abs(with_first[others] - 200) < 65).all()


def test_targets_change_nothing_where_all_pairs_are_few_and_cross_terms_nothing_without_lambda():
    for kw in ({"targets": 4}, {"targets": 9}):
        model, x = five(**kw)
        assert torch.equal(model.loss(x)[0], five()[0].loss(x)[0])
    model, x = five(targets=1, lam=0.)
    assert model.loss(x)[1]["cross"] == 0 and torch.equal(model.loss(x)[0], five(lam=0.)[0].loss(x)[0])


def test_the_gather_kernels_give_the_same_in_pieces(monkeypatch):
    model, x = make(kernels="gather", topk="both")
    whole = model.loss(x)[0]
    slopes = gradients(model, whole)
    monkeypatch.setattr(sae, "GATHERED", 200)                # five samples of four rows of ten
    pieces = model.loss(x)[0]
    same(pieces, whole, 1e-14)
    for name, g in gradients(model, pieces).items():
        same(g, slopes[name], 1e-14)
    widest = []
    monkeypatch.setattr(sae.Pattern, "pieces", lambda p, d, ask=sae.Pattern.pieces: widest.extend(
        len(p.indices[i]) * p.indices.shape[1] * d for i in ask(p, d)) or ask(p, d))
    model.loss(x)
    assert 0 < max(widest) <= 200


# -- samples that lack streams -----------------------------------------------------------------------------------------

def with_gaps(x):
    """The batch of `make` with gaps: samples that lack one stream, two, all; "a" and "b" never meet but in sample 0."""
    x = {s: v.clone() for s, v in x.items()}
    for s, rows in (("a", [1, 2, 3, 4, 5, 15]), ("b", [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]), ("c", [3, 8, 9, 15])):
        if s in x:
            x[s][rows] = float("nan")
    return x


def slow_loss(model, x):
    """Eq. 6-14 a sample, a stream and a latent at a time, of what is there."""
    streams, B = list(x), len(x["a"])
    there = {i: [s for s in streams if not x[s][i].isnan().any()] for i in range(B)}
    v = {(i, s): model.normalise(x[s][i:i + 1], s)[0] for i in there for s in there[i]}
    h = {(i, s): torch.stack([model.W_enc[s][j] @ (v[i, s] - model.b_pre[s]) + model.b_lat[s][j] for j in range(model.n_latents)])
         for i, s in v}
    order = model.drawn_streams()
    total = 0.
    for way in {"global": ["joint"], "local": ["alone"], "both": ["joint", "alone"], "random": ["drawn"]}[model.topk]:
        z = {}
        for i, s in v:
            deciding = {"joint": there[i], "alone": [s], "drawn": [next(t for t in order if t in there[i])]}[way]
            kept = sum(h[i, t] for t in deciding).topk(model.k).indices.tolist()
            z[i, s] = {j: h[i, s][j].clamp(min=0) for j in kept}
        n = {(s, t): sum(s in there[i] and t in there[i] and v[i, t].norm() > 0 for i in there) for s in streams for t in streams}
        own, cross, drawn = {}, 0., model.drawn_sources(B)
        for t in streams:
            for i in there:
                for place, s in enumerate(streams[number] for number in drawn[t][i]):
                    if s in there[i] and t in there[i] and v[i, t].norm() > 0:
                        x_hat = model.b_pre[t] + sum(value * model.W_dec[t][j] for j, value in z[i, s].items())
                        error = (v[i, t] - x_hat).square().sum() / v[i, t].square().sum() / n[s, t]
                        if s == t:
                            own[t] = own.get(t, 0.) + error
                        else:                                # as often drawn as not
                            cross = cross + error * (len(streams) - 1) / (len(drawn[t][i]) - 1)
        pairs = sum(n[s, t] > 0 for s in streams for t in streams if s != t)
        total = total + model.reduce([*own.values()])
        total = total + model.lam * cross / (pairs if model.reduction == "mean" and pairs else 1)
    return total


@pytest.mark.parametrize("kernels", ["csr", "gather"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("topk", sae.TOPK)
def test_with_gaps_loss_and_gradients_equal_a_loop_over_samples_and_pairs(topk, reduction, kernels):
    for M, step, targets in ((2, 0, None), (3, 0, None), (3, 3, 1)):
        model, x = make(M, topk=topk, reduction=reduction, kernels=kernels, lam=.7, L=20, targets=targets)
        model.step.fill_(step)
        x["a"][7] = 0
        x = with_gaps(x)
        if M == 2:
            x["a"][0] = float("nan")                                                        # no sample has both
        slow = slow_loss(model, x)
        slopes = gradients(model, slow)
        for found in (model.loss(x)[0], *([] if targets else [sae.dense_loss(model, x)])):
            same(found, slow, 1e-12)
            for name, g in gradients(model, found).items():
                same(g, slopes[name], 1e-12)


@pytest.mark.parametrize("norm", sae.NORMS)
@pytest.mark.parametrize("topk", sae.TOPK)
def test_no_nan_of_a_missing_stream_reaches_a_weight_a_code_or_a_counter(topk, norm):
    model, x = make(topk=topk, norm=norm, dtype=torch.float32, dead_after=2, reinit_after=2)
    x, optimiser = with_gaps(x), sae.make_optimiser(model, 1e-2)
    for _ in range(8):
        told = sae.told(model, sae.train_step(model.train(), optimiser, x))
        assert np.isfinite(list(told.values())).all()
    assert sum(map(bool, told.values())) > 4
    for v in [*model.state_dict().values(), *(v for codes in map(model.encode, [x]) for v in codes.values() for v in v)]:
        assert v.isfinite().all()


@pytest.mark.parametrize("mode", ["joint", "alone"])
def test_a_sample_that_lacks_streams_has_the_codes_of_those_it_has(mode):
    model, x = make()
    x = with_gaps(x)
    found = model.encode(x, mode)
    for i in range(15):
        there = {s: v[i:i + 1] for s, v in x.items() if not v[i].isnan().any()}
        expected = model.encode(there, mode)
        for s, code in found.items():
            one = Codes(code.indices[i:i + 1], code.values[i:i + 1])
            same(one.dense(64), expected[s].dense(64) if s in there else torch.zeros(1, 64).double(), 1e-12)
            assert ((one.indices < 0).all() if s not in there else (one.indices >= 0).all())
    assert all((code.indices[15] == -1).all() for code in found.values())


def test_auxk_and_the_counters_of_a_stream_are_those_of_the_samples_that_have_it():
    def trained(x, s, aux_coef):
        model, _ = make(topk="local", lam=0., dtype=torch.float32, dead_after=2, aux_coef=aux_coef)
        optimiser = sae.make_optimiser(model, 1e-2)
        for _ in range(6):
            sae.train_step(model.train(), optimiser, x)
        return {k: v for k, v in model.state_dict().items() if k.endswith(s)}

    gaps = with_gaps(make(dtype=torch.float32)[1])
    for s in DIMS:                                           # local and without cross terms: to each stream its own
        rows = ~gaps[s].isnan().any(1)
        alone = trained({t: v.nan_to_num(0)[rows] for t, v in gaps.items()}, s, 1.)
        same(trained(gaps, s, 1.), alone, 1e-5)
        assert (trained(gaps, s, 0.)[f"W_enc.{s}"] - alone[f"W_enc.{s}"]).abs().max() > 1e-3        # AuxK was at work


def test_a_stream_that_a_whole_batch_lacks_has_not_failed_to_fire_there():
    model, x = make(dtype=torch.float32)
    x["b"][:] = float("nan")
    sae.train_step(model.train(), sae.make_optimiser(model, 1e-3), x)
    assert (model.idle_a > 0).any() and not model.idle_b.any()


@pytest.mark.parametrize("activation", sae.ACTIVATIONS)
@pytest.mark.parametrize("revive", sae.REVIVE)
def test_a_single_stream_learns_from_the_rows_that_are_there(activation, revive):
    def trained(x):
        model = SAE({"a": 10}, 64, activation, 4, 0.1, "sum", revive, dead_after=2)
        model.start_bias(x, "mean")
        optimiser = sae.make_optimiser(model, 1e-2)
        for _ in range(6):
            sae.train_step(model.train(), optimiser, x)
        return model.eval()

    x = make(dtype=torch.float32)[1]["a"]
    gaps = x.repeat_interleave(2, 0)
    gaps[::2] = float("nan")
    with_, without = trained(gaps), trained(x)
    for name, v in without.state_dict().items():
        assert torch.equal(v, with_.state_dict()[name]) or v.isnan().all(), name
    codes = with_.encode(gaps)
    assert torch.equal(codes.dense(64)[1::2], without.encode(x).dense(64)) and not codes.dense(64)[::2].any()


def test_with_nothing_missing_nothing_is_masked(monkeypatch):
    model, x = make(topk="both", dead_after=0)
    x["a"][3] = 0
    assert model._features(x)[1] == {} and model._features(with_gaps(x))[1].keys() == set(DIMS)
    plain, features = model.loss(x)[0], model._features(x)[0]
    everywhere = {s: torch.ones(16, dtype=torch.bool) for s in DIMS}
    monkeypatch.setattr(model, "_features", lambda x: (features, everywhere))
    same(model.loss(x)[0], plain, 1e-12)                     # the masked way, with nothing to mask


def test_both_adds_the_joint_and_the_alone_loss_of_the_same_weights():
    losses = {topk: make(topk=topk)[0].loss(make()[1])[0] for topk in ("global", "local", "both")}
    same(losses["both"], losses["global"] + losses["local"], 1e-12)


# -- the loss ----------------------------------------------------------------------------------------------------------

def test_mean_reduction_is_the_sum_with_lambda_divided_by_the_other_streams():
    mean = make(reduction="mean", lam=1.)[0].loss(make()[1])[0]
    same(3 * mean, make(lam=0.5)[0].loss(make()[1])[0], 1e-12)                              # lambda_paper = 1 / (3 - 1)


def test_a_sample_of_zeros_is_skipped_not_divided_by():
    model, x = make(2, lam=0.)
    x["a"][5] = 0
    rest = {s: torch.cat([v[:5], v[6:]]) for s, v in x.items()}
    total = model.loss(x)[0]
    expected = sae.nmse(model.normalise(rest["a"], "a"), model.decode(model.encode(rest, "joint")["a"], "a")) \
        + sae.nmse(model.normalise(x["b"], "b"), model.decode(model.encode(x, "joint")["b"], "b"))
    same(total, expected, 1e-12)
    assert all(g.isfinite().all() for g in gradients(model, total).values())
    x["a"][:] = 0
    assert model.loss(x)[0].isfinite()


def test_projected_gradients_are_orthogonal_to_the_dictionary_rows():
    model, x = make()
    sae.renormalise(model)
    model.loss(x)[0].backward()
    sae.project_gradient(model)
    for W in model.W_dec.values():
        assert W.grad.norm() > 0.01
        same((W.grad * W).sum(1), torch.zeros(64, dtype=W.dtype), 1e-12)


# -- features in -------------------------------------------------------------------------------------------------------

def test_normalisations_do_what_their_names_say():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 10, generator=g) * 3 + 5
    x[:, 2] = 7.                                                                            # a constant dimension
    x[4] = 0
    stats = {"a": (x.mean(0), x.std(0, unbiased=False))}
    unit = SPARC({"a": 10}, 8, 2, norm="l2").normalise(x, "a")
    same(unit.norm(dim=1), torch.ones(50) - torch.eye(50)[4], 1e-6)
    standard = SPARC({"a": 10}, 8, 2, norm="standard", stats=stats).normalise(x, "a")
    same(standard.mean(0), torch.zeros(10), 1e-5)
    assert standard.isfinite().all()
    both = SPARC({"a": 10}, 8, 2, norm="standard,l2", stats=stats).normalise(x, "a")
    same(both, torch.nn.functional.normalize(standard), 1e-6)
    assert torch.equal(SPARC({"a": 10}, 8, 2, norm="none").normalise(x, "a"), x)


def test_a_dictionary_row_is_what_a_latent_adds_to_the_raw_features():
    stats = {"a": (torch.randn(10), torch.rand(10) + 0.5)}
    model = SPARC({"a": 10}, 8, 2, norm="standard", stats=stats)
    x_hat = [model.decode(Codes(torch.tensor([[3]]), torch.tensor([[v]])), "a") * model.std_a + model.mean_a
             for v in (1., 2.)]
    same((x_hat[1] - x_hat[0])[0].detach(), model.dictionary("a")[3], 1e-5)


@pytest.mark.parametrize("kw, message", [
    ({"k": 65}, "k=65 must lie in 1..latents=64 - lower k or raise latents"), ({"k": 0}, "k=0 must lie"),
    ({"targets": 0}, "targets=0 - give 1 or more"), ({"topk": "all"}, "topk='all' - use one of global"), ({"norm": "l1"}, "norm='l1'"), ({"dims": {}}, "no streams"),
    ({"dims": {"x.y": 3}}, "stream name 'x.y' cannot name a parameter"), ({"dims": {"keys": 3}}, "'keys' cannot name"),
    ({"dims": {"training": 3}}, "stream name 'training' cannot name"),
    ({"dims": {"_parameters": 3}}, "'_parameters' cannot name"),
    ({"dims": {3: 3}}, "'3' cannot name"),
    ({"dims": {"a": 0}}, "stream 'a' has width 0")])
def test_impossible_settings_are_refused(kw, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.").replace("(", r"\(")):
        SPARC(**{"dims": DIMS, "n_latents": 64, "k": 4, **kw})


def test_a_dimension_that_is_constant_but_for_rounding_is_not_blown_up():
    mean, std = torch.full((3,), 0.1), torch.tensor([0., 7e-9, 0.2])    # 7e-9: a float32 step
    model = SPARC({"a": 3}, 8, 2, norm="standard", stats={"a": (mean, std)})
    same(model.normalise(torch.full((1, 3), 0.6), "a"), torch.tensor([[0.5, 0.5, 2.5]]), 1e-6)


@pytest.mark.parametrize("kernels", ["csr", "gather"])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 0), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_features_of_any_float_type_are_read_in_the_weights_type(dtype, tolerance, kernels):
    for model in (SPARC(DIMS, 64, 4, topk="both", kernels=kernels),
                  SAE({"a": 10}, 64, k=4, kernels=kernels),
                  SAE({"a": 10}, 64, "relu", kernels=kernels, revive="resample", dead_after=1)):
        g = torch.Generator().manual_seed(0)
        x = {s: torch.randn(16, d, generator=g) for s, d in model.dims.items()}
        cast = {s: v.to(dtype) for s, v in x.items()}
        loss, expected = model.loss(cast)[0], model.loss(x)[0]
        assert loss.dtype == torch.float32 and abs(loss / expected - 1) <= tolerance
        code = model.encode(cast, "alone")["a"]
        assert code.values.dtype == torch.float32
        found = model.decode(Codes(code.indices, code.values.to(dtype)), "a")
        assert (found - model.decode(code, "a")).norm() <= tolerance * code.values.norm()
        optimiser = sae.make_optimiser(model)
        assert all(sae.train_step(model, optimiser, cast)["loss"].isfinite() for _ in range(3))


@pytest.mark.parametrize("kernels", ["csr", "gather"])
@pytest.mark.parametrize("activation", [None, *sae.ACTIVATIONS])
def test_autocast_around_a_model_changes_nothing(activation, kernels):
    def three_steps(autocast):
        if activation:
            model = SAE({"a": 10}, 64, activation, k=4, kernels=kernels, revive="resample",
                        dead_after=1)
        else:
            model = SPARC(DIMS, 64, 4, topk="both", kernels=kernels, dead_after=1)
        optimiser, g = sae.make_optimiser(model.train(), 1e-2), torch.Generator().manual_seed(0)
        x = {s: torch.randn(16, d, generator=g) for s, d in model.dims.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(3):
                sae.train_step(model, optimiser, x)
            return model.loss(x)[0], model(x)["a"], model.W_dec["a"]
    for found, expected in zip(three_steps(True), three_steps(False)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [None, "topk", "relu"])
def test_a_model_of_one_stream_takes_a_bare_tensor_and_gives_bare_results(kind):
    model = SAE({"a": 10}, 40, kind, k=4) if kind else SPARC({"a": 10}, 40, 4)
    x = torch.randn(7, 10)
    bare, named = model.encode(x), model.encode({"a": x})["a"]
    assert isinstance(bare, Codes) and all(map(torch.equal, bare, named))
    assert torch.equal(model(x), model.decode(named, "a"))
    assert torch.equal(model(x), model({"a": x})["a"])
    assert torch.equal(model.loss(x)[0], model.loss({"a": x})[0])
    losses = []
    sae.fit(model, lambda step: x, 3, on_step=lambda _, result: losses.append(result["loss"]))
    assert losses[2] < losses[0]
    with pytest.raises(InputError, match="one tensor for 3 streams - give a dict of a, b, c"):
        make()[0].encode(x)


@pytest.mark.parametrize("mode", ["joint", "alone"])
def test_calling_a_model_rebuilds_every_stream_from_its_own_code(mode):
    model, x = make()
    codes, rebuilt = model.encode(x, mode), model(x, mode)
    assert list(rebuilt) == list(DIMS)
    for s in x:
        same(rebuilt[s], codes[s].dense(64) @ model.W_dec[s] + model.b_pre[s], 1e-12)


def test_wrong_features_are_refused_by_name():
    model, x = make()
    with pytest.raises(InputError, match="stream 'b' has 15 rows but 'a' has 16 - rows must be"):
        model.loss({**x, "b": x["b"][1:]})
    for bad, message in (({"z": x["a"]}, "stream 'z' is unknown"),
                         ({"a": x["b"]}, r"stream 'a' has shape \(16, 8\) - the model wants \(B, 10\)"),
                         ({}, "no streams given")):
        with pytest.raises(InputError, match=message):
            model.encode(bad, "alone")
    with pytest.raises(InputError, match="training needs every stream .* - missing c"):
        model.loss({s: x[s] for s in "ab"})


# -- one stream: the family ---------------------------------------------------------------------------------------------

def single(activation="relu", L=40, d=10, dtype=torch.float64, batch=24, **kw):
    """An SAE with all parameters random, and a batch for it."""
    model = SAE({"a": d}, L, activation, norm="none", **{"k": 4, "sparsity": 0.3, "error": "sum", "revive": "none", **kw})
    model = model.to(dtype).train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=dtype)
    return model, {"a": torch.randn(batch, d, generator=g, dtype=dtype)}


@pytest.mark.parametrize("error", sae.ERRORS)
@pytest.mark.parametrize("activation", sae.ACTIVATIONS)
def test_loss_of_every_variant_and_its_gradients_equal_thesis_eq_5_written_out(activation, error):
    model, x = single(activation, error=error)
    x, W, V, b, c = x["a"], model.W_enc["a"], model.W_dec["a"], model.b_pre["a"], model.b_lat["a"]
    total, penalty, L = 0., 0., len(W)
    h = (x - b) @ W.T + c                                                                   # Eq. 1-2
    if activation in ("batchtopk", "matryoshka"):
        kept = h > h.flatten().sort(descending=True).values[4 * len(x)]
    for i in range(len(x)):
        if activation == "topk":
            z = torch.relu(h[i] * (h[i] >= h[i].sort(descending=True).values[3]))
        elif activation in ("batchtopk", "matryoshka"):
            z = torch.relu(h[i] * kept[i])
        elif activation == "jumprelu":
            z = h[i] * (h[i] > model.log_threshold.exp())
        else:
            z = torch.relu(h[i])
            penalty = penalty + z.abs().sum() / len(x)
        e = (x[i] - (z @ V + b)).square().sum()                                             # Eq. 3-4
        for few in (L // 16, L // 4) if activation == "matryoshka" else ():                 # the first alone
            e = e + (x[i] - (z[:few] @ V[:few] + b)).square().sum()
        total = total + e / {"sum": 1, "mean": 10, "nmse": x[i].square().sum()}[error] / len(x)
    expected = total + 0.3 * penalty
    found, parts = model.loss({"a": x})
    if activation == "jumprelu":                             # its threshold has a gradient of its own: see below
        active = (h > model.log_threshold.exp()).double().sum(1).mean()
        same(found, expected + 0.3 * active, 1e-12)
        same(parts["sparsity"], active, 1e-12)
    else:
        same(found, expected, 1e-12)
    wanted = torch.autograd.grad(expected, [W, V, b, c])
    for a, g in zip(torch.autograd.grad(found, [W, V, b, c]), wanted):
        same(a, g, 1e-10)


def test_with_an_orthonormal_dictionary_the_l1_code_is_soft_thresholding():
    """min_z ||x - V z||^2 + lambda |z|_1 with z >= 0 and V orthonormal is z = max(V'x - lambda / 2, 0), each sample's optimum:
    no encoder can do better, so the loss there has no gradient to the encoder either."""
    g = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    model = SAE({"a": 8}, 8, "relu", sparsity=0.5, error="sum", revive="none", norm="none").double()
    x = torch.randn(50, 8, generator=g, dtype=torch.float64)
    with torch.no_grad():
        model.W_dec["a"].copy_(V)
        model.W_enc["a"].copy_(V)
        model.b_lat["a"].fill_(-0.25)
    z = (x @ V.T - 0.25).clamp(min=0)
    optimum = ((x - z @ V).square().sum(1) + 0.5 * z.sum(1)).mean()
    total, _ = model.loss({"a": x})
    same(total, optimum, 1e-12)
    for gradient in torch.autograd.grad(total, [model.W_enc["a"], model.b_lat["a"]]):
        same(gradient, torch.zeros_like(gradient), 1e-12)
    by_scipy = scipy.optimize.minimize(lambda v: float(((x[0] - torch.from_numpy(v) @ V) ** 2).sum() + 0.5 * v.sum()),
                                       np.ones(8), bounds=[(0, None)] * 8, tol=1e-14).x
    np.testing.assert_allclose(z[0], by_scipy, atol=1e-5)


def test_batchtopk_keeps_exactly_n_times_k_in_training_and_is_independent_of_the_batch_afterwards():
    model, x = single("batchtopk", batch=32)
    with pytest.raises(InputError, match="threshold of batchtopk is not set"):
        model.encode(x)
    codes = model.loss(x)[1]["codes"][0]["a"]
    assert (codes.values > 0).sum() == 32 * 4 and len((codes.values > 0).sum(1).unique()) > 1
    least = codes.values[codes.values > 0].min()
    same(model.kept_above, least.detach(), 1e-12)
    second = {"a": 1.5 * x["a"]}
    later = model.loss(second)[1]["codes"][0]["a"].values
    same(model.kept_above, (0.99 * least + 0.01 * later[later > 0].min()).detach(), 1e-12)
    model.eval()
    model.loss(x)
    same(model.kept_above, (0.99 * least + 0.01 * later[later > 0].min()).detach(), 1e-12)
    together = model.encode(x)["a"].dense(40)
    for i in range(32):
        same(model.encode({"a": x["a"][i:i + 1]})["a"].dense(40)[0], together[i], 1e-12)


def test_the_jumprelu_threshold_has_the_gradient_of_a_smoothed_finite_difference():
    """Moving the threshold of latent j by epsilon changes the loss of the samples whose logit it passes over; the box estimate
    is that difference over epsilon, with the activation there counted as theta and the loss as linear in it."""
    model, x = single("jumprelu", batch=4000, bandwidth=0.1, sparsity=0.7)
    total, _ = model.loss(x)
    found, = torch.autograd.grad(total, [model.log_threshold])
    with torch.no_grad():
        c = x["a"] - model.b_pre["a"]
        h, theta = model.logits(c), model.log_threshold.exp()
        z, _ = model.activate(h)
        e = z @ model.W_dec["a"] - c
        slope = 2 * e @ model.W_dec["a"].T                                                  # d error / d z, (B, L)
        epsilon, expected = 0.1, torch.zeros(40, dtype=torch.float64)
        for j in range(40):
            passed = ((h[:, j] > theta[j] - epsilon / 2) & (h[:, j] < theta[j] + epsilon / 2)).double()
            step = -passed * (slope[:, j] * theta[j] + 0.7) / 4000                          # what silencing them changes
            expected[j] = step.sum() / epsilon * theta[j]                                   # d theta / d log theta
        same(found, expected, 1e-10)

        def loss_at(j, shift):
            moved = theta.clone()
            moved[j] += shift
            on = h > moved
            error = ((h * on) @ model.W_dec["a"] - c).square().sum(1).mean()
            return error + 0.7 * on.double().sum(1).mean()
        busy = ((h - theta).abs() < epsilon / 2).sum(0).argsort(descending=True)[:8]
        finite = torch.stack([(loss_at(j, epsilon / 2) - loss_at(j, -epsilon / 2)) / epsilon * theta[j] for j in busy])
    # the true difference has the activation's square in it too: equal up to that
    assert (found[busy] - finite).abs().max() < 0.25 * finite.abs().max() and (found[busy].sign() == finite.sign()).all()


def test_the_geometric_median_is_scipys_minimiser_even_from_a_mean_that_is_a_data_point():
    g = torch.Generator().manual_seed(0)
    cloud = torch.randn(9, 3, generator=g, dtype=torch.float64) ** 3
    skewed = torch.cat([cloud - cloud.mean(0), torch.zeros(1, 3, dtype=torch.float64)])     # its mean is its last row
    star = torch.tensor([[0., 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)   # its median too
    for x in (cloud, skewed, star, torch.ones(4, 2)):
        def total(v):
            return np.linalg.norm(x.numpy() - v, axis=1).sum()
        found = sae.geometric_median(x).numpy()
        best = scipy.optimize.minimize(total, np.median(x.numpy(), 0), method="Nelder-Mead",
                                       options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 20000}).fun
        assert total(found) <= best + 1e-5
    far = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 1e6)])
    assert sae.geometric_median(far).norm() < 1e-3 < far.mean(0).norm()                     # robust, which the mean is not


def authors_sae(z, **kw):
    """Our SAE with the weights of a golden file of CytoSAE (rows are inputs) or of Mammo-SAE's library."""
    model = SAE({"a": 6}, 20 if "w.W_enc" in z else 24, "relu", norm="none", **kw)
    with torch.no_grad():
        ours = [model.W_enc["a"], model.b_lat["a"], model.W_dec["a"], model.b_pre["a"]]
        if "w.W_enc" in z:
            theirs = [z["w.W_enc"].T, z["w.b_enc"], z["w.W_dec"], z["w.b_dec"]]
        else:
            theirs = [z["w.encoder.weight"][0], z["w.encoder.bias"][0], z["w.decoder.weight"][0].T, z["w.tied_bias"][0]]
        for a, b in zip(ours, theirs):
            a.copy_(torch.from_numpy(b))
    return model


def test_codes_penalty_and_ghost_gradients_are_cytosaes(golden):
    z, _ = golden("cyto")
    model = authors_sae(z, error="sum", revive="ghost", sparsity=8e-5)
    x = torch.from_numpy(z["in.x"]).flatten(0, 1)
    c = x - model.b_pre["a"]
    code, penalty = model.activate(model.logits(c))
    x_hat = code @ model.W_dec["a"] + model.b_pre["a"]
    same(code.detach(), torch.from_numpy(z["out.ghost.feature_acts"]).flatten(0, 1), 1e-6)
    same(x_hat.detach(), torch.from_numpy(z["out.ghost.sae_out"]).flatten(0, 1), 1e-6)
    same(8e-5 * penalty.item(), z["out.ghost.l1_loss"].item(), 1e-6)
    dead = torch.from_numpy(z["in.dead_mask"])
    error = (x_hat - x).square() / x.norm(dim=1, keepdim=True)                              # their error: over ||x||, not summed
    ghost = sae.ghost_error((x - x_hat).detach(), model.logits(c)[:, dead], model.W_dec["a"][dead], error.detach()).mean()
    same(ghost.item(), z["out.ghost.mse_loss_ghost_resid"].item(), 1e-5)
    found = gradients(model, ghost)
    for theirs, ours, transposed in (("W_enc", "W_enc.a", True), ("b_enc", "b_lat.a", False), ("W_dec", "W_dec.a", False),
                                     ("b_dec", "b_pre.a", False)):
        expected = torch.from_numpy(z[f"grad.ghost.mse_loss_ghost_resid.{theirs}"])
        same(found[ours], expected.T if transposed else expected, 1e-5)
    # what their initialisation computes: one point an image, then the mean over its tokens
    images = torch.from_numpy(z["in.x"])
    same(sae.geometric_median(images.flatten(1)).view(7, 6).mean(0), torch.from_numpy(z["out.geometric_median_b_dec"]), 1e-5)


def test_ghost_gradients_enter_the_loss_with_the_size_of_the_error_and_reach_dead_latents():
    model, x = single("relu", revive="ghost", dead_after=1)
    before, _ = model.loss(x)
    model.idle_a[:5] = 1
    total, parts = model.loss(x)
    same(total - before, parts["aux"], 1e-9)
    assert abs(parts["aux"] / parts["self"] - 1) < 1e-3      # the authors' 1e-6 in the rescaling keeps it just below
    huge = sae.ghost_error(torch.ones(2, 3), torch.full((2, 4), 500.), torch.eye(4, 3), torch.ones(2, 3))
    assert huge.isfinite().all()
    difference = torch.autograd.grad(total, [model.W_dec["a"]])[0] - torch.autograd.grad(before, [model.W_dec["a"]])[0]
    assert (difference[:5].norm(dim=1) > 0).all()
    same(difference[5:], torch.zeros_like(difference[5:]), 1e-12)


@pytest.mark.parametrize("lam", ["3e-5", "0.05"])
def test_five_steps_are_those_of_mammo_saes_library(lam, golden):
    z, cfg = golden("mammo")
    model = authors_sae(z, error="mean", revive="none", sparsity=float(lam))
    losses = []
    sae.fit(model, lambda i: {"a": torch.from_numpy(z["in.x"][i, :, 0])}, 5, lr=3e-3,
            on_step=lambda _, result: losses.append(result["loss"].item()))
    np.testing.assert_allclose(losses, z[f"out.l1_{lam}.losses"], rtol=1e-5)
    after = f"out.l1_{lam}.after5"
    same(model.W_dec["a"].detach(), torch.from_numpy(z[f"{after}.decoder.weight"][0].T), 1e-5)
    same(model.W_enc["a"].detach(), torch.from_numpy(z[f"{after}.encoder.weight"][0]), 1e-5)
    same(model.b_pre["a"].detach(), torch.from_numpy(z[f"{after}.tied_bias"][0]), 1e-5)


def test_resampled_rows_are_mammo_saes_and_samples_are_drawn_by_their_squared_loss(golden):
    z, _ = golden("mammo")
    alive = torch.from_numpy(z["in.resample.encoder"][z["in.resample.fired"] > 0])
    inputs = torch.from_numpy(z["in.resample.inputs"])
    rows, encoder = sae.resampled_rows(inputs, alive)
    same(encoder, torch.from_numpy(z["out.resample.renormalized_scaled"]), 1e-6)
    same(rows.norm(dim=1), torch.ones(3), 1e-6)
    model, x = single("relu", revive="resample", dead_after=1, dtype=torch.float32, batch=200, sparsity=0.)
    optimiser = sae.make_optimiser(model, 1e-3)
    sae.train_step(model, optimiser, x)
    error = (model.decode(model.encode(x)["a"]) - x["a"]).square().sum(1).detach()
    unit = torch.nn.functional.normalize(x["a"] - model.b_pre["a"].detach())
    drawn = torch.zeros(200)
    before = model.W_enc["a"][5:].clone()
    for i in range(400):
        model.step.fill_(i)
        model.idle_a[:5] = 1
        sae._resample(model, optimiser, x)
        picked = (model.W_dec["a"][:5].detach() @ unit.T).argmax(1)
        drawn[picked] += 1
        assert torch.equal(model.idle_a[:5], torch.zeros(5, dtype=torch.long)) and (model.b_lat["a"][:5] == 0).all()
        with torch.no_grad():                                # dead latents rebuilt nothing: the next draw sees the same errors
            model.b_lat["a"][:5] = -100.
    assert torch.equal(model.W_enc["a"][5:], before)
    probability = error.square() / error.square().sum()
    top = probability.argsort(descending=True)
    share = drawn / drawn.sum()
    assert 0.85 < share[top[:50]].sum() / probability[top[:50]].sum() < 1.05 and drawn[top[:20]].sum() > drawn[top[100:]].sum()


def test_topk_codes_reconstructions_and_loss_are_openais(golden):
    z, cfg = golden("openai_topk")
    model = SAE({"a": 10}, 40, "topk", 4, norm="none", revive="none")
    with torch.no_grad():
        for ours, theirs in ((model.b_pre, z["w.pre_bias"]), (model.b_lat, z["w.latent_bias"]),
                             (model.W_enc, z["w.encoder.weight"]), (model.W_dec, z["w.decoder.weight"].T)):
            ours["a"].copy_(torch.from_numpy(theirs))
    x = {"a": torch.from_numpy(z["in.x"])}
    codes = model.encode(x)["a"]
    same(codes.dense(40).detach(), torch.from_numpy(z["out.topk.latents"]), 1e-5)
    same(model.decode(codes).detach(), torch.from_numpy(z["out.topk.recons"]), 1e-5)
    total, _ = model.loss(x)
    same(total.item(), z["out.topk.loss"].item(), 1e-5)
    found = gradients(model, total)
    same(found["W_enc.a"], torch.from_numpy(z["grad.topk.encoder.weight"]), 1e-5)
    same(found["W_dec.a"], torch.from_numpy(z["grad.topk.decoder.weight"].T), 1e-5)
    same(found["b_pre.a"], torch.from_numpy(z["grad.topk.pre_bias"]), 1e-5)


def test_one_stream_chooses_and_all_dictionaries_rebuild_as_in_universal_sae(golden):
    z, cfg = golden("usae")
    chooser = cfg["info"]["encoding_model_per_step"][0]
    dims = {s: z[f"in.{s}"].shape[-1] for s in ("SigLIP", "ViT", "Third")}
    model = SPARC(dims, 24, 4, topk="random", norm="none")
    with torch.no_grad():
        for s in dims:
            weight = f"w.None.{s}.encoder.final_block.0"
            model.W_enc[s].copy_(torch.from_numpy(z[f"{weight}.weight"]))
            model.b_lat[s].copy_(torch.from_numpy(z[f"{weight}.bias"]))
            model.W_dec[s].copy_(torch.nn.functional.normalize(torch.from_numpy(z[f"w.None.{s}.dictionary._weights"])))
    x = torch.from_numpy(z[f"in.{chooser}"][0]).flatten(0, 1)
    codes = model.encode({chooser: x}, "alone")[chooser]
    same(codes.dense(24).detach(), torch.from_numpy(z["out.None.L2.step0.z"]), 1e-5)
    for s in dims:
        same(model.decode(codes, s).detach(), torch.from_numpy(z[f"out.None.L2.step0.recon_{s}"]), 1e-5)


@pytest.mark.parametrize("variant", [{"activation": "relu"}, {"activation": "relu", "revive": "ghost"}, {"activation": "topk"},
                                     {"activation": "batchtopk"}, {"activation": "jumprelu"}], ids=str)
def test_every_variant_recovers_nine_tenths_of_the_planted_concepts_with_its_documented_setting(variant):
    import repsae
    flags = repsae.parse(["sae", "--world", "planted", *(f"--{k}={v}" for k, v in variant.items())])[1]
    features = data.planted_streams(seed=42)
    features.streams = {"vision": features.streams["vision"]}
    flags, rows = repsae.resolved(flags, features), features.rows("train")
    model = repsae.make_model(features, flags, rows)
    batches = data.Batches(rows, flags.batch, 42, flags.shuffle)
    sae.fit(model, lambda step: features.batch(batches.rows(step)), flags.epochs * batches.epoch, lr=flags.lr)
    found = judge.recovery({"vision": model.dictionary("vision").numpy()}, {"vision": features.truth["vision"]})["vision"]
    assert found["of"] == 42 and found["found"] >= 0.9 * 42


def test_the_bias_starts_at_the_mean_or_the_median_of_what_the_model_sees():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) ** 3 + 2
    seen = torch.nn.functional.normalize(x)
    for how, expected in (("mean", seen.mean(0)), ("median", sae.geometric_median(seen))):
        model = SAE({"a": 6}, 12, k=2)
        model.start_bias(x, how)
        same(model.b_pre["a"].detach(), expected, 1e-6)


def test_codes_of_batches_are_joined_up_to_the_widest_without_an_index_that_hides_another():
    pieces = [{"a": Codes(torch.tensor([[3], [0]]), torch.tensor([[1.], [2.]]))},
              {"a": Codes(torch.tensor([[2, 0, 1]]), torch.tensor([[5., 6., 7.]]))}]
    found = sae.joined(pieces)["a"]
    assert found.indices.tolist() == [[3, -1, -1], [0, -1, -1], [2, 0, 1]]
    assert found.values.tolist() == [[1, 0, 0], [2, 0, 0], [5, 6, 7]]


def test_an_activation_needs_its_function_and_one_line_of_the_registry(monkeypatch, tmp_path):
    def half(model, h, batch):                               # the better half of what is positive
        z = torch.relu(h)
        return z * (z >= z.median(1, keepdim=True).values), h.new_zeros(())
    monkeypatch.setitem(sae.ACTIVATIONS, "half", sae.Activation(half, "nmse", "auxk", 0.))
    model, x = single("half", dtype=torch.float32)
    sae.fit(model, lambda step: x, 3)
    sae.save(tmp_path / "c.pt", model)
    z, _ = half(model, model.logits(x["a"] - model.b_pre["a"]), False)
    same(sae.load(tmp_path / "c.pt")[0].encode(x)["a"].dense(40), z, 1e-6)
    import repsae
    repsae.main(["sae", "--world", "planted", "--activation", "half", "--epochs", "1", "--out", str(tmp_path / "r")])
    assert sae.load(tmp_path / "r" / "checkpoint.pt")[0].activation == "half"


@pytest.mark.parametrize("revive", sae.REVIVE)
@pytest.mark.parametrize("activation", sae.ACTIVATIONS)
def test_a_resumed_sae_ends_bit_identical(activation, revive, tmp_path):
    def fresh():
        model, _ = single(activation, dtype=torch.float32, revive=revive, dead_after=4, reinit_after=3, sparsity=0.05)
        g = torch.Generator().manual_seed(3)
        return model, sae.make_optimiser(model, 1e-2), [{"a": torch.randn(16, 10, generator=g)} for _ in range(30)]
    whole, optimiser, batches = fresh()
    sae.fit(whole, batches.__getitem__, 30, lr=1e-2, optimiser=optimiser, warmup=20)
    half, optimiser, _ = fresh()
    sae.fit(half, batches.__getitem__, 13, lr=1e-2, optimiser=optimiser, warmup=20)
    sae.save(tmp_path / "c.pt", half, optimiser)
    half, optimiser, _ = sae.load(tmp_path / "c.pt")
    sae.fit(half, batches.__getitem__, 30, lr=1e-2, optimiser=optimiser, warmup=20)
    assert isinstance(half, SAE) and half.config == whole.config
    for k, v in whole.state_dict().items():                  # a threshold that nothing sets stays NaN
        assert torch.equal(v.nan_to_num(-1), half.state_dict()[k].nan_to_num(-1)), k


def test_the_learning_rate_rises_over_the_warm_up_and_stays():
    model, x = single("relu", dtype=torch.float32)
    optimiser, seen = sae.make_optimiser(model, 1e-2), []
    sae.fit(model, lambda step: x, 7, lr=1e-2, optimiser=optimiser, warmup=4,
            on_step=lambda *_: seen.append(optimiser.param_groups[0]["lr"]))
    np.testing.assert_allclose(seen, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


def test_topk_without_auxk_trains_on_when_latents_are_dead():
    model, x = single("topk", dtype=torch.float32, revive="auxk", aux_k=0, aux_coef=0.)
    model.idle_a += 10 ** 6
    assert model.loss(x)[1]["aux"] == 0


@pytest.mark.parametrize("kw, message", [({"activation": "gated"}, "activation='gated' - use one of relu"),
                                         ({"revive": "pray"}, "revive='pray'"), ({"error": "max"}, "error='max'"),
                                         ({"sparsity": -1.}, "give numbers above 0"), ({"k": 41}, "k=41 must lie in"),
                                         ({"dims": {"a": 3, "b": 3}}, "one stream, not 2")])
def test_impossible_saes_are_refused(kw, message):
    with pytest.raises(InputError, match=message):
        SAE(**{"dims": {"a": 6}, "n_latents": 40, **kw})


# -- training and files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("topk, targets", [*((topk, None) for topk in sae.TOPK), ("random", 1), ("both", 1)])
def test_a_resumed_model_ends_bit_identical(topk, targets, tmp_path):
    def fresh():
        model, x = make(dtype=torch.float32, topk=topk, dead_after=4, reinit_after=3, targets=targets)
        g = torch.Generator().manual_seed(3)
        batches = [{s: torch.randn(16, d, generator=g) for s, d in DIMS.items()} for _ in range(30)]
        return model, sae.make_optimiser(model, 1e-2), batches
    whole, optimiser, batches = fresh()
    sae.fit(whole, batches.__getitem__, 30, optimiser=optimiser)
    half, optimiser, _ = fresh()
    sae.fit(half, batches.__getitem__, 13, optimiser=optimiser)
    sae.save(tmp_path / "c.pt", half, optimiser, note="x")
    half, optimiser, extra = sae.load(tmp_path / "c.pt")
    sae.fit(half, batches.__getitem__, 30, optimiser=optimiser)
    assert extra == {"note": "x"} and whole.step == half.step == 30
    assert all(torch.equal(v, half.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_checkpoint_of_before_there_were_targets_goes_on_with_all_pairs(tmp_path):
    sae.save(tmp_path / "c.pt", five(targets=None)[0].float())
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["config"].pop("targets", "none") is None
    torch.save(state, tmp_path / "c.pt")
    model = sae.load(tmp_path / "c.pt")[0]
    assert all(v[0].tolist() == [*range(5)] for v in model.drawn_sources(8).values())


def test_a_broken_or_foreign_checkpoint_is_refused(tmp_path):
    model, _ = make(dtype=torch.float32)
    sae.save(tmp_path / "good.pt", model)
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"format": "other"}, tmp_path / "other.pt")
    torch.save(model, tmp_path / "pickle.pt")
    for name, message in (("cut.pt", "not a readable checkpoint"), ("pickle.pt", "not a readable checkpoint"),
                          ("other.pt", "has format 'other'"), ("none.pt", "no checkpoint at")):
        with pytest.raises(InputError, match=message):
            sae.load(tmp_path / name)
    assert torch.equal(sae.load(tmp_path / "good.pt")[0].W_enc["a"], model.W_enc["a"])


def spoiled_states():
    """What `save` packs, each time with one thing that does not belong there."""
    model, _ = make(dtype=torch.float32)
    optimiser = sae.make_optimiser(model)
    for change in (lambda s: s.pop("model"), lambda s: s.pop("optimiser"), lambda s: s.pop("extra"),
                   lambda s: s.update(config=3), lambda s: s.update(model="x"), lambda s: s["config"].update(lr=1),
                   lambda s: s["config"].update(seed=None), lambda s: s["config"].update(n_latents=7),
                   lambda s: s["model"].update(step=torch.tensor(-1)), lambda s: s["optimiser"].update(state=[]),
                   lambda s: s["optimiser"]["state"].update({0: {
                       "step": torch.tensor(1.), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}})):
        state = {"format": "repsae-sparc-1", "config": dict(model.config), "model": dict(model.state_dict()),
                 "optimiser": optimiser.state_dict(), "extra": {}}
        change(state)
        yield state


def test_a_checkpoint_with_a_part_missing_or_odd_is_refused(tmp_path):
    for state in spoiled_states():
        torch.save(state, tmp_path / "odd.pt")
        with pytest.raises(InputError, match="is not a readable checkpoint|no checkpoint"):
            sae.load(tmp_path / "odd.pt")
    os.mkfifo(tmp_path / "pipe.pt")                          # would be waited for
    with pytest.raises(InputError, match="no checkpoint at"):
        sae.load(tmp_path / "pipe.pt")


def test_a_save_that_fails_or_finds_a_link_leaves_everything_as_it_was(tmp_path, small_files):
    model = SPARC({"a": 64}, 512, 4)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "c.pt.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), small_files():
        sae.save(tmp_path / "c.pt", model)
    sae.save(tmp_path / "d.pt", model)
    assert sorted(os.listdir(tmp_path)) == ["c.pt.tmp", "d.pt", "mine"] and (tmp_path / "mine").read_text() == "mine"


def test_planted_concepts_are_found_by_one_latent_in_every_stream_only_when_training_is_shared():
    features = data.planted_streams(3000)
    batches = data.Batches(features.rows("train"), 128, 0)
    found = {}
    for topk, lam in (("global", 1.), ("both", 1.), ("local", 0.)):
        model = SPARC(features.dims, 128, 6, topk=topk, lam=lam, norm="none")
        sae.fit(model, lambda step: features.batch(batches.rows(step)), 250, lr=6e-3)
        found[topk] = judge.recovery({s: model.dictionary(s).numpy() for s in features.dims}, features.truth)
        for s in features.dims:
            assert found[topk][s]["found"] >= 0.85 * found[topk][s]["of"]
    assert found["global"]["same latent"]["found"] >= 0.9 * 36 and found["both"]["same latent"]["found"] >= 0.9 * 36
    assert found["local"]["same latent"]["found"] <= 2


def dense_join_loss(model, x):
    """sae.join_loss as its docstring says it, sample by sample, with dense codes."""
    others, terms = {s: code.dense(64) for s, code in x.items() if s != "a"}, []
    v = model.normalise(x["a"].nan_to_num(0), "a")
    h = (v - model.b_pre["a"]) @ model.W_enc["a"].T + model.b_lat["a"]

    def nmse_of(z, i):
        return (v[i] - z @ model.W_dec["a"] - model.b_pre["a"]).square().sum() / v[i].square().sum()

    def kept(i, support):
        return torch.relu(h[i]) * torch.zeros(64, dtype=h.dtype).index_fill(0, support, 1)
    own, apart, cross = [], [], {(s, what): [] for s in others for what in ("theirs", "mine")}
    for i in v.any(1).nonzero().squeeze(1).tolist():              # neither missing nor all zero
        z = kept(i, h[i].topk(4).indices)
        own.append(nmse_of(z, i))
        there = [s for s in others if x[s].indices[i, 0] >= 0]
        for s in there:
            cross[s, "theirs"].append(nmse_of(others[s][i], i))
            cross[s, "mine"].append(nmse_of(kept(i, x[s].indices[i]), i))
        if there:
            m = sum(others[s][i] for s in there) / len(there)
            apart.append((z - m).square().sum() / m.square().sum())
    mean = [sum(v) / len(v) for v in cross.values()]
    return sum(own) / len(own) + 2 * sum(mean) / len(mean) + sum(apart) / len(apart)


@pytest.mark.parametrize("gaps", [False, True])
def test_the_loss_of_a_stream_that_joins_a_code_is_its_textbook_form(gaps):
    model, x = make(1, topk="local")
    teacher, seen = make(3)
    codes = teacher.encode(seen, "alone")
    x |= {s: sae.Codes(codes[s].indices, codes[s].values.detach() + .1) for s in "bc"}
    if gaps:
        x["a"][2], x["a"][3] = torch.nan, 0
        for s, rows in (("b", [4, 5]), ("c", [5, 6])):
            x[s].indices[rows], x[s].values[rows] = -1, 0
    ours, dense = sae.join_loss(model, x)[0], dense_join_loss(model, x)
    same(ours, dense, 1e-12)
    for found, expected in zip(gradients(model, ours).values(), gradients(model, dense).values()):
        same(found, expected, 1e-12)


def test_a_stream_that_joins_finds_the_concepts_that_the_others_have_and_leaves_their_weights_alone():
    features = data.planted_streams(3000)
    new, batches = list(features.dims)[-1], data.Batches(features.rows("train"), 128, 0)
    old = SPARC({s: d for s, d in features.dims.items() if s != new}, 128, 6, topk="both", norm="none")
    sae.fit(old, lambda step: {s: features.batch(batches.rows(step))[s] for s in old.streams}, 250, lr=6e-3)
    before, order, found = {k: v.clone() for k, v in old.state_dict().items()}, np.random.default_rng(0).permutation(3000), {}

    def seen(rows, rows_of_new):
        x = features.batch(rows)
        return {new: features.batch(rows_of_new)[new], **old.encode({s: x[s] for s in old.streams}, "alone")}
    for name, other in (("pairs", np.arange(3000)), ("null", order)):
        model = SPARC({new: features.dims[new]}, 128, 6, topk="local", norm="none")
        start = features.rows("train")[:1000]
        sae.join_start(model, seen(start, other[start]))
        sae.fit(model, lambda step: seen(batches.rows(step), other[batches.rows(step)]), 60, lr=6e-3, loss=sae.join_loss)
        whole = sae.merged(old, model)
        found[name] = judge.recovery({s: whole.dictionary(s).numpy() for s in features.dims}, features.truth)["same latent"]["found"]
    assert found["pairs"] >= 0.9 * 36 and found["null"] <= 2
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in before.items() if k != "step")
    assert whole.streams == list(features.dims) and whole.step == 60


def test_the_file_works_when_copied_alone(tmp_path):
    shutil.copy(pathlib.Path(sae.__file__), tmp_path)
    program = """
import torch
from sae import SAE, SPARC, fit, save, load
model = SPARC({"clip": 12, "dino": 16}, n_latents=32, k=4, topk="both")
fit(model, lambda step: {"clip": torch.randn(8, 12), "dino": torch.randn(8, 16)}, n_steps=5)
codes = model.encode({"clip": torch.randn(3, 12)}, mode="alone")
save("c.pt", model)
print(tuple(load("c.pt")[0].decode(codes["clip"], "dino").shape))
one = SAE({"clip": 12}, n_latents=32, activation="relu", sparsity=0.05)
fit(one, lambda step: {"clip": torch.randn(8, 12)}, n_steps=5)
print(tuple(one.decode(one.encode({"clip": torch.randn(3, 12)})["clip"]).shape))
"""
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["(3, 16)", "(3, 12)"], run.stderr


# -- what must not leak, and settings that must count -------------------------------------------

def test_the_seed_decides_the_first_weights_and_which_stream_is_drawn():
    first, again, other = (SPARC(DIMS, 20, 2, topk="random", seed=seed) for seed in (1, 1, 2))
    W = [model.W_enc["a"] for model in (first, again, other)]
    assert torch.equal(W[0], W[1]) and not torch.equal(W[0], W[2])
    drawn = []
    for model in (first, again, other):
        drawn.append([])
        for step in range(20):
            model.step.fill_(step)
            drawn[-1].append(model.drawn_streams()[0])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("topk", ["global", "both"])
def test_streams_learn_to_read_each_other_sooner_from_short_encoder_rows(topk):
    g, error = torch.Generator().manual_seed(0), {}
    concepts = (torch.rand(600, 24, generator=g) < 0.12) * (torch.rand(600, 24, generator=g) + 0.5)
    x = {s: concepts @ torch.randn(24, 20, generator=g) + 0.1 * torch.randn(600, 20, generator=g) for s in "abcd"}
    order = [torch.randperm(400, generator=g)[:64] for _ in range(200)]
    for start in (1., 1 / 3):
        model = SPARC(dict.fromkeys(x, 20), 64, 6, topk=topk, start=start)
        before = model.W_enc["a"].detach().norm(dim=1) / start
        sae.fit(model, lambda step: {s: v[order[step]] for s, v in x.items()}, 200, lr=2e-3)
        codes = model.encode({s: v[400:] for s, v in x.items()}, "alone")
        error[start] = np.mean([sae.nmse(model.normalise(x[t][400:], t), model.decode(codes[s], t)).item()
                                for s in x for t in x if s != t])
    assert 0.4 < before.mean() < 0.7
    assert error[1 / 3] < error[1] - 0.02


# -- files of other libraries ------------------------------------------------------------------------------------------

def safetensors(tensors, **changes):
    """The bytes of {name: float32 tensor} as the format's description has them; `changes` to entries of the header."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = struct.pack(f"<{t.numel()}f", *t.flatten().tolist())
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        header[name] |= changes.get(name, {})
        numbers += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + numbers


TRAINER = {"trainer_class": "T", "lr": 1e-3, "steps": 9, "activation_dim": 6, "dict_size": 9}
PUBLIC = {                                                   # kind: (config, is b_dec subtracted first, what follows h)
    "standard": ({"architecture": "standard", "d_in": 6, "d_sae": 9, "metadata": {"a": 1}}, True, "relu"),
    "topk": ({"architecture": "topk", "k": 3, "dtype": "float32"}, True, "topk"),
    "rescaled": ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, True, "topk"),
    "jumprelu": ({"architecture": "jumprelu", "apply_b_dec_to_input": False, "reshape_activations": "none"}, False, "jump"),
    "sparsify": ({"k": 3, "d_in": 6, "expansion_factor": 2, "normalize_decoder": True, "signed": False}, True, "topk"),
    "AutoEncoder": ({"trainer": {**TRAINER, "dict_class": "AutoEncoder"}}, True, "relu"),
    "AutoEncoderTopK": ({"trainer": {**TRAINER, "dict_class": "AutoEncoderTopK", "k": 3}}, True, "topk"),
    "BatchTopKSAE": ({"trainer": {**TRAINER, "dict_class": "BatchTopKSAE", "k": 3}, "buffer": {}}, True, "batch"),
    "JumpReluAutoEncoder": ({"trainer": {**TRAINER, "dict_class": "JumpReluAutoEncoder"}}, False, "jump")}


def published(folder, kind, config=(), drop=(), more=(), **header):
    """Write an SAE of random weights as its library does, with changes; its weights as our equations have them."""
    known, centred, what = PUBLIC[kind]
    W, V, b, b_dec = torch.randn(9, 6), torch.randn(9, 6), torch.randn(9), torch.randn(6)
    theta = torch.linspace(-0.5, 1, 9) if what == "jump" else torch.tensor(0.4)
    if kind in ("sparsify", *list(PUBLIC)[5:8]):
        tensors = {"encoder.weight": W, "encoder.bias": b}
        tensors |= {"W_dec": V} if kind == "sparsify" else {"decoder.weight": V.T}
        tensors["bias" if kind == "AutoEncoder" else "b_dec"] = b_dec
    else:
        tensors = {"W_enc": W.T, "b_enc": b, "W_dec": V, "b_dec": b_dec}
    if what == "jump" or kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        tensors["threshold"] = theta
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        tensors["k"] = torch.tensor(3, dtype=torch.int32)
    tensors = {k: v for k, v in {**tensors, **dict(more)}.items() if k not in drop}
    config = {k: v for k, v in {**known, **dict(config)}.items() if v is not None}
    folder.mkdir(exist_ok=True)
    name = "config.json" if "trainer" in config else "cfg.json"
    (folder / name).write_text(json.dumps(config))
    if "trainer" in config:
        torch.save(tensors, folder / "ae.pt")
    else:
        file = "sae" if kind == "sparsify" else "sae_weights"
        (folder / f"{file}.safetensors").write_bytes(safetensors(tensors, **header))
    return W, V, b, b_dec, theta


@pytest.mark.parametrize("kind", PUBLIC)
def test_an_sae_of_another_library_gives_the_codes_and_reconstructions_that_its_source_writes_down(tmp_path, kind):
    W, V, b, b_dec, theta = published(tmp_path / "s", kind)
    x = torch.randn(50, 6)
    h = (x - b_dec if PUBLIC[kind][1] else x) @ W.T + b
    length = V.norm(dim=1) if kind == "rescaled" else 1.
    h = h * length
    if PUBLIC[kind][2] == "topk":
        h = torch.where(h >= h.sort(descending=True).values[:, [2]], h, 0)
    if PUBLIC[kind][2] in ("jump", "batch"):
        h = torch.where(h > theta, h, 0)
    z = h.clamp(min=0)
    for path in (tmp_path / "s", next(path for path in (tmp_path / "s").iterdir() if path.suffix != ".json")):
        model = sae.load_public(str(path), "eye")
        code = model.encode(x)
        same(code.dense(9), z, 1e-5)
        same(model.decode(code), z / length @ V + b_dec, 1e-5)
    assert model.streams == ["eye"] and not model.training


def test_what_is_not_understood_in_an_sae_of_another_library_is_named(tmp_path):
    cases = [
        ("topk", {"config": {"architecture": "gated"}}, "'gated' - standard, topk, jumprelu can be read"),
        ("topk", {"config": {"normalize_activations": "layer_norm"}}, "normalize_activations='layer_norm'"),
        ("topk", {"config": {"a_new_one": 1}}, "a_new_one=1"),
        ("topk", {"config": {"d_in": 7}}, "d_in=7"),
        ("topk", {"config": {"k": 10}}, "k=10"),
        ("topk", {"config": {"k": None}}, "k=0 must lie in"),
        ("topk", {"drop": ["b_enc"]}, "b_enc"),
        ("standard", {"more": {"scaling_factor": torch.ones(9)}}, "scaling_factor"),
        ("standard", {"more": {"b_enc": torch.ones(1)}}, "shapes that do not fit"),
        ("jumprelu", {"more": {"threshold": torch.ones(1)}}, "not readable"),
        ("sparsify", {"config": {"transcode": True}}, "transcode=True"),
        ("sparsify", {"config": {"activation": "groupmax"}}, "'groupmax'"),
        ("sparsify", {"more": {"W_skip": torch.ones(6, 6)}}, "W_skip"),
        ("BatchTopKSAE", {"more": {"k": torch.tensor(4)}}, "k=3"),
        ("BatchTopKSAE", {"config": {"trainer": {**TRAINER, "dict_class": "GatedAutoEncoder"}}}, "'GatedAutoEncoder'")]
    for i, (kind, changes, message) in enumerate(cases):
        published(tmp_path / str(i), kind, **changes)
        with pytest.raises(InputError, match=message):
            sae.load_public(tmp_path / str(i))
    with pytest.raises(InputError, match="none of sae_weights.safetensors, sae.safetensors, ae.pt"):
        sae.load_public(tmp_path)


def test_a_safetensors_file_with_gaps_overlaps_or_a_false_header_is_refused(tmp_path):
    def refused(reason):
        with pytest.raises(InputError, match=f"not readable .{reason}"):
            sae.load_public(tmp_path / "s")
    for entry, reason in (({"data_offsets": [0, 24]}, "ValueError"), ({"shape": [7]}, "ValueError"),
                          ({"dtype": "F8"}, "KeyError"), ({"shape": [-1]}, "ValueError"), ({"shape": [2., 3.]}, "")):
        published(tmp_path / "s", "topk", b_dec=entry)
        refused(reason)
    file, end = tmp_path / "s" / "sae_weights.safetensors", 4 * (9 * 6 + 9 + 9 * 6 + 6)
    for move in (8, -24, 10 ** 9):                           # a hole before the last tensor; an overlap; beyond the end
        published(tmp_path / "s", "topk", b_dec={"data_offsets": [end - 24 + move, end + move]})
        whole = file.read_bytes()
        file.write_bytes(whole + b"12345678" if move > 0 else whole[:move])
        refused("ValueError")
    published(tmp_path / "s", "topk")
    whole = file.read_bytes()
    assert sae.read_safetensors(file).keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    twice = whole[8:8 + whole[0] + 256 * whole[1]].replace(b'"W_dec"', b'"b_enc"')
    for odd in (whole[:-4], whole + b"1234", whole[:5], b"", struct.pack("<Q", 2 ** 62) + whole[8:],
                struct.pack("<Q", len(twice)) + twice + whole[8 + len(twice):]):
        file.write_bytes(odd)
        refused("")
    file.write_bytes(whole)
    (tmp_path / "s" / "cfg.json").write_text('{"architecture": "topk", "k": 3, "k": 3}')
    refused("")


@pytest.mark.parametrize("norm", ["none", "standard", "l2"])
@pytest.mark.parametrize("activation", ["sparc", *sae.ACTIVATIONS])
def test_what_saelens_reads_of_an_export_maps_raw_features_to_our_codes_and_to_raw_features(tmp_path, activation, norm):
    x = torch.randn(60, 6) * torch.linspace(0.5, 9, 6) + 3
    stats = {s: (x.mean(0), x.std(0)) for s in "ab"}
    if activation == "sparc":
        model = SPARC(dict.fromkeys("ab", 6), 11, 3, norm=norm, stats=stats)
    else:
        model = SAE({"b": 6}, 11, activation, k=3, norm=norm, stats=stats)
        model.kept_above.fill_(0.2)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.rand_like(p)
        code = model.encode({"b": x}, "alone")["b"]
        expected = model.decode(code, "b")
    if norm == "standard":
        expected = expected * stats["b"][1] + stats["b"][0]
    config, weights = judge.saelens(model, "b")
    judge.write_safetensors(tmp_path / "sae_weights.safetensors", weights)
    judge.write_json(tmp_path / "cfg.json", config)

    blob = (tmp_path / "sae_weights.safetensors").read_bytes()           # from here on nothing of ours
    n, = struct.unpack("<Q", blob[:8])
    t = {name: torch.frombuffer(bytearray(blob[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]]),
                                dtype=torch.float32).reshape(v["shape"]) for name, v in json.loads(blob[8:8 + n]).items()}
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert n % 8 == 0 and t["W_enc"].shape == (config["d_in"], config["d_sae"]) == (6, 11)
    coefficient = torch.ones(60, 1)
    if config["normalize_activations"] == "constant_norm_rescale":
        coefficient = 6 ** 0.5 / x.norm(dim=-1, keepdim=True)
    h = (x * coefficient - t["b_dec"] * config["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
    z = h.relu()
    if config["architecture"] == "topk":
        z = torch.where(h >= h.topk(config["k"]).values[:, -1:], z, 0)
    if config["architecture"] == "jumprelu":
        z = z * (h > t["threshold"])
    same(z, code.dense(11), 1e-5)
    same((z @ t["W_dec"] + t["b_dec"]) / coefficient, expected * (6 ** 0.5 / coefficient if norm == "l2" else 1), 1e-5)
    if norm != "l2":
        same(sae.load_public(tmp_path).encode(x).dense(11), z, 1e-5)


def test_an_export_refuses_what_saelens_has_no_words_for(monkeypatch):
    assert judge.saelens(SAE({"b": 6}, 11, "relu", norm="standard,l2"), "b") is None
    monkeypatch.setitem(sae.ACTIVATIONS, "half", sae.Activation(lambda *_: None, "sum", "none", 0.))
    assert judge.saelens(SAE({"b": 6}, 11, "half", norm="none"), "b") is None


def planted_tree(n, parents=6, children=4, d=32):
    """Samples x (n, d) of some parents each, most with one of their children; the unit directions (parents first)."""
    rng = np.random.default_rng(1)
    D = rng.standard_normal((parents * (1 + children), d))
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    on = rng.random((n, parents)) < .25
    on[np.arange(n), rng.integers(0, parents, n)] = True
    x = .02 * rng.standard_normal((n, d))
    for parent in range(parents):
        child = parents + children * parent + rng.integers(0, children, n)
        x += (on[:, parent] * rng.uniform(1, 1.3, n))[:, None] * D[parent]
        x += (on[:, parent] * (rng.random(n) < .8) * rng.uniform(.6, .9, n))[:, None] * D[child]
    return torch.tensor(x).float(), torch.tensor(D).float()


def test_with_nested_prefixes_the_parents_of_a_planted_tree_come_first_and_without_they_do_not():
    x, D = planted_tree(4000)
    first = {}
    for activation in ("matryoshka", "batchtopk"):
        model = sae.SAE({"a": 32}, 48, activation, 4, norm="none", dead_after=100, seed=0)
        sae.fit(model, lambda step: x[np.random.default_rng(step).integers(0, len(x), 128)], 1000, lr=3e-3)
        cosine, latent = (D @ model.dictionary("a").T).max(1)
        first[activation] = int((latent[:6][cosine[:6] > .9] < 12).sum())                # of the first quarter
    assert first["matryoshka"] >= 5 and first["batchtopk"] <= 3
