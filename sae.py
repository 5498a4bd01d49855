"""Sparse autoencoders: SPARC, one sparse code shared by many models, and the family for one model.

Read first   thesis 5.2 (Eq. 6-14) and A.1.2; the paper "SPARC" sections 3.2-3.3. For TopK and AuxK
             Gao et al. 2024, "Scaling and evaluating sparse autoencoders"; for `SAE` thesis 4.1.
Read in      `dense_loss` (the equations as the thesis writes them), then `SPARC`, then the sparse
this order   products that make it fast, then `SAE`, then `train_step` and `fit`.

Glossary     B batch . M streams . L latents . k latents kept per sample . d_s width of stream s
             s, t      source, target stream               lambda   of cross reconstruction, `lam`
             x^s       (B, d_s) features, normalised         h^s  (B, L) logits       thesis Eq. 6
             z^s       (B, L) code, k-sparse, never stored dense: `Codes(indices, values)`, (B, k)
             W_enc[s]  (L, d_s) encoder, W_E^s in the thesis
             W_dec[s]  (L, d_s) decoder; row j is the unit dictionary vector of latent j, so it is
                       the thesis's W_D^s transposed
             b_lat[s]  (L,) latent bias                      b_pre[s]  (d_s,) pre-bias
             joint     a code whose support was chosen from all given streams together (Eq. 7-8)
             alone     a code whose support was chosen from its own stream only
             here[s]   (B,) bool: the samples that have stream s. Raw features that are NaN
                       throughout mean that a sample lacks the stream; NaN in part is not looked
                       for here, and spoils all weights: refuse it where you read
             topk      of several streams who chooses the k latents; of one stream an activation

Deviations   from the authors' code, where it differs from the papers or is wrong:
             the loss sums over streams as Eq. 14 does; theirs averages (`reduction="mean"`);
             AuxK differs in what it adds, masks and divides by: see `SPARC._auxk`;
             latents are drawn anew `reinit_after` steps after they died, with their Adam moments;
             theirs at once, which leaves AuxK nothing to do;
             dictionary rows are renormalised after the optimiser step: saved ones have unit norm;
             dead latents are counted per stream, in training only; a sample of zeros is skipped
             in Eq. 13, where theirs divides by zero;
             a latent fires when its value exceeds a thousandth of the features' length, which is 1
             for l2 (theirs: a thousandth; thesis A.1.2 speaks of a frequency, but they count none).
             One stream: CytoSAE's code also divides the error by ||x||, which is not here;
             resampling draws from the batch, not from 819,200 stored inputs; JumpReLU's threshold
             has the gradient of its paper, which two public libraries miss by a factor.
Ours         topk="both" (train on the joint and on the alone support), samples that lack streams
             (the sums and means of Eq. 7, 13, 14 are over what is there), `targets` (few pairs of
             streams a sample in Eq. 14), `join_loss`, short encoder rows at first (`start`), the
             sparse arithmetic, features standardised before they are scaled (see `norm`).
Processes    where torch.distributed was begun, `fit` of a SPARC takes in each process that one's
             share of a batch. What the loss divides by, gradients and counters are summed over
             all (`SPARC.across`), so that the steps are those of the whole batch.
Not here     learning-rate decay, mixed precision; other libraries' gated SAEs.

This file needs nothing but torch: copy it alone into your project.

    model = SPARC({"clip": 512, "dino": 768}, n_latents=4096, k=32, topk="both", norm="l2")
    # next_batch() -> {"clip": (B, 512), "dino": (B, 768)}, any float type
    fit(model, lambda step: next_batch(), n_steps=5000, lr=1e-4)         # on_step: to hear of it
    codes = model.encode({"clip": x_clip}, mode="alone")     # raw features in, {"clip": Codes} out
    dino_hat = model.decode(codes["clip"], "dino")           # Eq. 12: one model read from another
    single = SAE({"clip": 512}, n_latents=4096, activation="relu", sparsity=0.05)  # thesis 4.1
    other = load_public("folder")                            # an SAE of one of LIBRARIES
"""
import json
import math
import os
import warnings
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

TOPK = {"global": ["joint"], "local": ["alone"], "both": ["joint", "alone"], "random": ["drawn"]}
NORMS = ("l2", "standard", "standard,l2", "none")
ERRORS = ("nmse", "sum", "mean")
REVIVE = ("none", "auxk", "ghost", "resample")
FIRES = 1e-3  # a latent fires above this share of the features' length (authors: auxk_threshold)
GATHERED = 2 ** 24  # numbers (64 MiB) that the gather kernels copy at once
FORMAT = "repsae-sparc-1"
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class InputError(ValueError):
    """What the caller can mend: what was wrong and, after a dash, what to do."""


def refuse(when, why):
    """Raise InputError(why) where `when` holds; `why` is made in any case."""
    if when:
        raise InputError(why)


def one_of(name, value, allowed):
    """Refuse a value of the setting `name` that is not one of those allowed."""
    refuse(value not in allowed, f"{name}={value!r} - use one of {', '.join(allowed)}")


class Codes(NamedTuple):
    """A k-sparse code: indices (B, k) int64 in 0..L-1, distinct in a row, and values (B, k) >= 0. A
    value may be 0: TopK chose the latent, ReLU silenced it (Eq. 9); such a latent is not active.
    Without a fixed k, codes of batches put together are filled up with index -1, value 0; the code
    of a stream that the sample lacks is made of them alone."""
    indices: torch.Tensor
    values: torch.Tensor

    def dense(self, n_latents):
        """The same code as a (B, L) tensor, for showing and for small L."""
        dense = self.values.new_zeros(len(self.values), n_latents)
        return dense.scatter_add(1, self.indices.clamp(min=0), self.values)      # adds 0 for -1


def joined(pieces):
    """Codes of many batches, a list of dicts stream -> Codes, as one such dict of numpy arrays. The
    largest k is taken, and index -1 fills up: any real index would hide that latent's value."""
    out = {}
    for s in pieces[0]:
        k = max(codes[s].indices.shape[1] for codes in pieces)
        indices, values = (
            torch.cat([F.pad(codes[s][i], (0, k - codes[s][i].shape[1]), value=fill)
                       for codes in pieces]).cpu() for i, fill in ((0, -1), (1, 0)))
        out[s] = Codes(indices.int().numpy(), values.numpy())
    return out


# ---- The equations, as the thesis writes them ---------------------------------------------------

def nmse(x, x_hat):
    """Normalised mean squared error, thesis Eq. 13, over the samples of x, x_hat (B, d). Those of
    zeros have no scale to normalise by and are left out."""
    return ((x - x_hat).square().sum(1) * _nmse_weight(x.square().sum(1))).sum()


def _nmse_weight(energy, here=None, across=lambda n: n):
    """||x||^2 (B,) -> (B,): its inverse over the number of samples that are not all zero; 0 for
    those. With `here` (B, M), of sources, (B, M): over the samples that have the source too.
    across: the number in this process -> in all of them."""
    weight = torch.where(energy > 0, 1 / energy.clamp_min(1e-30), 0)
    if here is None:
        return weight / across((energy > 0).sum()).clamp_min(1)
    counted = here & (energy > 0).unsqueeze(1)
    return weight.unsqueeze(1) * counted / across(counted.sum(0)).clamp_min(1)


def missing(x):
    """(B,) bool: the rows of raw features x (B, d) that are NaN throughout."""
    gone = x[:, 0].isnan()
    return x.isnan().all(1) if gone.any() else gone


def dense_loss(model, x):
    """SPARC's loss with dense codes and all M^2 decoders: slow, to be read beside thesis 5.2.

    x: dict stream -> (B, d_s), raw, NaN where a sample lacks it. Returns the scalar of Eq. 14
    (without AuxK, all pairs). The tests hold `SPARC.loss` to the same number and gradients."""
    here = {s: ~missing(x[s]) for s in x}
    x = {s: model.normalise(x[s].nan_to_num(0), s) for s in x}
    h = {s: (x[s] - model.b_pre[s]) @ model.W_enc[s].T + model.b_lat[s] for s in x}  # Eq. 6, (B, L)
    h = {s: h[s] * here[s].unsqueeze(1) for s in x}                    # what is missing adds 0
    h_agg = sum(h.values())                                                          # Eq. 7
    h_drawn = 0.
    for s in reversed(model.drawn_streams()):                          # the first that is there
        h_drawn = torch.where(here[s].unsqueeze(1), h[s], h_drawn)
    decider = {"joint": dict.fromkeys(x, h_agg), "alone": h, "drawn": dict.fromkeys(x, h_drawn)}
    total = 0.
    for mode in TOPK[model.topk]:
        z = {}
        for s in x:
            kept = decider[mode][s].topk(model.k).indices                            # Eq. 8, (B, k)
            on = torch.zeros_like(h[s]).scatter(1, kept, 1.)
            z[s] = torch.relu(h[s] * on)                                             # Eq. 9, (B, L)
        own, cross = [], []
        for s in x:
            for t in x:
                both = here[s] & here[t]
                if both.any():
                    x_hat = z[s] @ model.W_dec[t] + model.b_pre[t]                   # Eq. 11, 12
                    (own if s == t else cross).append(nmse(x[t][both], x_hat[both]))     # Eq. 13
        total = total + model.reduce(own) + model.lam * model.reduce(cross)              # Eq. 14
    return total


# ---- Sparse products: after the k latents are chosen nothing may cost B*L*d ---------------------
# Three products are all there is, and they are each other's gradients. With S the (B, L) matrix
# that holds `values` at `indices`:
#     sample   values_bi = x_b . W[indices_bi]          k logits of a sample, of the L there are
#     combine  out = S W                                a weighted sum of k dictionary rows
#     scatter  out = S^T x                              the gradient of either with respect to W
# On a CPU, CSR kernels do them fastest; `kernels="gather"` uses only indexing and batched products,
# for torch builds without CSR kernels and for GPUs, on as many samples at once as GATHERED allows.

class Pattern:
    """Where a batch of codes is non-zero: indices (B, k) of L latents, for products with S, S^T."""

    def __init__(self, indices, n_latents, kernels, spare=None):
        self.indices, self.n_latents, self.csr = indices, n_latents, kernels == "csr"
        self.spare = {} if spare is None else spare          # (L, d) -> memory for such gradients
        self._columns = None

    def rows(self, values):
        """S as a CSR matrix (B, L). Indices of int32: others MKL would convert in each product."""
        B, k = self.indices.shape
        starts = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=values.device)
        return torch.sparse_csr_tensor(starts, self.indices.reshape(-1).int(), values.reshape(-1),
                                       (B, self.n_latents), check_invariants=False)

    def columns(self, values):
        """S^T as a CSR matrix (L, B): explicit, as CSR^T @ dense takes three times CSR @ dense."""
        B, k = self.indices.shape
        if self._columns is None:
            flat = self.indices.reshape(-1).int()
            order = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=self.n_latents)
            starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            self._columns = starts, (order // k).int(), order
        starts, sample, order = self._columns
        return torch.sparse_csr_tensor(starts, sample, values.reshape(-1)[order],
                                       (self.n_latents, B), check_invariants=False)

    def pieces(self, d):
        """Slices of the batch whose gathered rows, (b, k, d), are at most GATHERED numbers."""
        B, k = self.indices.shape
        step = max(1, GATHERED // (k * d))
        return [slice(start, start + step) for start in range(0, max(B, 1), step)]


def _sample(x, W, p):                                                  # (B, d), (L, d) -> (B, k)
    if p.csr:
        pattern = p.rows(x.new_zeros(p.indices.shape))
        return torch.sparse.sampled_addmm(pattern, x, W.t(), beta=0).values().view_as(p.indices)
    return torch.cat([torch.bmm(W[p.indices[i]], x[i].unsqueeze(2)).squeeze(2)
                      for i in p.pieces(x.shape[1])])


def _times(S, x, spare=()):
    """CSR (m, n) @ dense (n, d). In place with beta=0: `S @ x` first copies zeros to its result."""
    out = spare.pop() if spare else x.new_empty(S.shape[0], x.shape[1])
    return out.addmm_(S, x, beta=0)


def _combine(values, W, p):                                            # (B, k), (L, d) -> (B, d)
    if p.csr:
        return _times(p.rows(values), W)
    return torch.cat([torch.bmm(values[i].unsqueeze(1), W[p.indices[i]]).squeeze(1)
                      for i in p.pieces(W.shape[1])])


def _scatter(values, x, p):                                            # (B, k), (B, d) -> (L, d)
    if p.csr:
        return _times(p.columns(values), x, p.spare.get((p.n_latents, x.shape[1])))
    out = x.new_zeros(p.n_latents, x.shape[1])
    for i in p.pieces(x.shape[1]):
        rows = (values[i].unsqueeze(2) * x[i].unsqueeze(1)).flatten(0, 1)      # (b*k, d)
        out.index_add_(0, p.indices[i].reshape(-1), rows)
    return out


class _Product(torch.autograd.Function):
    """`product` _sample of x (B, d), or _combine of values (B, k), with W (L, d)."""
    @staticmethod
    def forward(ctx, a, W, pattern, product):
        ctx.save_for_backward(a, W)
        ctx.pattern, ctx.product = pattern, product
        return product(a, W, pattern)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, W = ctx.saved_tensors
        other, values, x = (_combine, g, a) if ctx.product is _sample else (_sample, a, g)
        return (other(g, W, ctx.pattern) if ctx.needs_input_grad[0] else None,
                _scatter(values, x, ctx.pattern) if ctx.needs_input_grad[1] else None, None, None)


@lru_cache(None)
def _has_csr():
    """Whether this torch build has the CSR kernels (builds without MKL may not)."""
    try:
        p, W, x = Pattern(torch.tensor([[0, 1]]), 2, "csr"), torch.eye(2), torch.ones(1, 2)
        return bool(_combine(_sample(x, W, p), _scatter(x, x, p), p).sum() == 4)
    except RuntimeError:
        return False


def _no_autocast(function):
    """Run a model's function in its weights' precision in autocast: CSR kernels know no other."""
    @wraps(function)
    def run(model, *args, **kw):
        with torch.autocast(model.step.device.type, enabled=False):
            return function(model, *args, **kw)
    return run


# ---- The model ----------------------------------------------------------------------------------

class SPARC(nn.Module):
    """Sparse Autoencoders for Aligned Representation of Concepts (thesis 5.2).

    dims        dict stream -> d_s; its order is that of every result; of one stream: a TopK SAE
    n_latents   L          k   latents kept per sample, at most L
    topk        who chooses the k latents in training:
                "global"  all streams together: TopK of the summed logits (Eq. 7-9)
                "local"   each stream for itself (thesis 5.3.4)
                "both"    the losses of both supports, added; ours: a model trained on the joint
                          support only is poor when it later sees one stream alone
                "random"  one stream, drawn anew each step, for all (Universal SAE; sparc.txt 1);
                          for samples that lack it the next one that they have
    lam         weight of cross reconstruction (Eq. 14)
    reduction   "sum" as Eq. 14, or "mean" of each sum as the authors' code:
                lambda_paper = lambda_code / (M - 1)
    targets     n: each code rebuilds its own stream and n of the M - 1 others, drawn for each
                sample and step. The cross sum of Eq. 14 is weighted (M - 1) / n, so that its mean
                over the draws, and that of its gradient, is the whole sum's. None: all others
    norm        how raw features are normalised, one of NORMS: "l2" per sample (the authors' code;
                no paper says so), "standard" per dimension with `stats`, "standard,l2", "none"
    stats       dict stream -> (mean (d_s,), std (d_s,)) of the training samples, for "standard"
    aux_k, aux_coef, dead_after, reinit_after
                AuxK (thesis A.1.2): a latent that has not fired for `dead_after` training steps is
                dead; the `aux_k` best dead latents rebuild the residual, weighted `aux_coef`. One
                still dead `reinit_after` steps later is drawn anew
    kernels     "auto", "csr" or "gather": see the sparse products above
    seed        of the initial weights and of every later draw
    start       encoder rows begin so many times as long as the authors'. Their random directions
                mean nothing to the other streams, and a step turns a short row further

    Parameters live in dicts by stream. Statistics, dead-latent counters and the step count are
    buffers: a state_dict has what a run needs to go on. Raises InputError for what cannot be."""
    activation, revive, by_batch = "topk", "auxk", False     # `SAE` has others

    def __init__(self, dims, n_latents, k, topk="global", lam=1., reduction="sum", norm="l2",
                 stats=None, aux_k=64, aux_coef=1 / 32, dead_after=1000, reinit_after=1000,
                 kernels="auto", seed=42, targets=None, start=1 / 3):
        super().__init__()
        self.config = dict(dims=dict(dims), n_latents=n_latents, k=k, topk=topk, lam=lam,
                           reduction=reduction, norm=norm, aux_k=aux_k, aux_coef=aux_coef,
                           dead_after=dead_after, reinit_after=reinit_after, kernels=kernels,
                           seed=seed, targets=targets, start=start)
        refuse(not dims, "no streams - give at least one")
        for s, d in dims.items():
            refuse(not isinstance(s, str) or "." in s or not s or hasattr(nn.ParameterDict(), s),
                   f"stream name {str(s)[:60]!r} cannot name a parameter - "
                   "rename it (letters, digits, _ and -)")
            refuse(d < 1, f"stream '{s}' has width {d} - give it at least one column")
        refuse(targets is not None and targets < 1,
               f"targets={targets} - give 1 or more, or lam=0 for no cross term")
        refuse(not 0 < start < math.inf, f"start={start} - give a number above 0")
        refuse(not 1 <= k <= n_latents,
               f"k={k} must lie in 1..latents={n_latents} - lower k or raise latents")
        for name, allowed in (("topk", TOPK), ("norm", NORMS), ("reduction", ("sum", "mean")),
                              ("kernels", ("auto", "csr", "gather"))):
            one_of(name, self.config[name], allowed)
        vars(self).update(self.config)
        self.streams = list(dims)
        g = torch.Generator().manual_seed(seed)
        W = {s: (torch.rand(n_latents, d, generator=g) * 2 - 1) / d ** 0.5 for s, d in dims.items()}
        self.W_enc = nn.ParameterDict({s: start * w for s, w in W.items()})
        self.W_dec = nn.ParameterDict({s: F.normalize(w) for s, w in W.items()})     # tied at first
        self.b_pre = nn.ParameterDict({s: torch.zeros(d) for s, d in dims.items()})
        self.b_lat = nn.ParameterDict({s: torch.zeros(n_latents) for s in dims})
        for s, d in dims.items():
            mean, std = (torch.as_tensor(v, dtype=torch.float32).clone()
                         for v in (stats or {}).get(s, (torch.zeros(d), torch.ones(d))))
            # a dimension that is constant but for rounding is not blown up
            std = torch.where(std > 1.2e-7 * mean.abs(), std, 1)
            idle = torch.zeros(n_latents, dtype=torch.long)  # training steps since a latent fired
            for name, value in (("mean", mean), ("std", std), ("idle", idle)):
                self.register_buffer(f"{name}_{s}", value)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))              # steps taken
        self._spare = {}                                     # memory of gradients: see `_recycle`

    # -- features in -----------------------------------------------------------------------------
    def normalise(self, x, stream):
        """Raw features (B, d_s) of any type -> what the model sees, of its own type; NaN stays."""
        x = x.to(self.b_pre[stream].dtype)
        if "standard" in self.norm:
            x = (x - getattr(self, f"mean_{stream}")) / getattr(self, f"std_{stream}")
        return F.normalize(x, dim=-1, eps=1e-8) if "l2" in self.norm else x

    def dictionary(self, stream):
        """The (L, d_s) dictionary in units of the raw features: what one unit of a latent adds."""
        W = self.W_dec[stream].detach()
        return W * getattr(self, f"std_{stream}") if "standard" in self.norm else W

    def _named(self, x):
        """Features by stream: a dict as it is; a bare tensor (B, d) is the only stream's."""
        if not isinstance(x, torch.Tensor):
            return x
        refuse(len(self.streams) > 1, f"one tensor for {len(self.streams)} streams - "
               f"give a dict of {', '.join(self.streams)[:300]}")
        return {self.streams[0]: x}

    def _features(self, x):
        """Raw features by stream -> (x, here): checked, normalised, in the model's order, 0 where
        missing; `here` has the streams with gaps in this batch, and no others."""
        x, known = self._named(x), ", ".join(self.streams)
        refuse(not x, f"no streams given - give at least one of {known}")
        first = next(iter(x))
        for s, v in x.items():
            refuse(s not in self.dims, f"stream '{s}' is unknown to the model - it has {known}")
            refuse(v.dim() != 2 or v.shape[1] != self.dims[s], f"stream '{s}' has shape "
                   f"{tuple(v.shape)} - the model wants (B, {self.dims[s]})")
            refuse(len(v) != len(x[first]), f"stream '{s}' has {len(v)} rows but '{first}' has "
                   f"{len(x[first])} - rows must be the same samples")
        x = {s: x[s] for s in self.streams if s in x}
        gone = {s: missing(v) for s, v in x.items()}
        some = self.across(torch.stack([rows.any() for rows in gone.values()]).int()).tolist()
        gone = {s: rows for (s, rows), n in zip(gone.items(), some) if n}

        def filled(x):
            return x | {s: x[s].masked_fill(rows.unsqueeze(1), 0) for s, rows in gone.items()}
        x = {s: self.normalise(v, s) for s, v in filled(x).items()}          # for NaN * 0 is NaN
        return filled(x), {s: ~rows for s, rows in gone.items()}

    def _centred(self, x, here):
        """x^s - b_pre^s by stream, (B, d_s): what is encoded, and what W_D z must come to."""
        return {s: (v - self.b_pre[s]) * here[s].unsqueeze(1) if s in here else v - self.b_pre[s]
                for s, v in x.items()}

    # -- choosing --------------------------------------------------------------------------------
    # c: a dict of centred features, see `_centred`. Only here logits are dense, without gradients.

    @torch.no_grad()
    def _support(self, c, mode, here):
        """Kept latents, stream -> (B, k): chosen "joint"ly, "alone", or by one stream ("drawn")."""
        def top(streams):
            # All L logits, Eq. 6, summed over those of `streams` that a sample has, Eq. 7: (B, L).
            # Both equations are one product, added in place from the second stream on.
            h = sum(self.b_lat[s] * here[s].unsqueeze(1) if s in here else self.b_lat[s]
                    for s in streams)                                                # (L,), (B, L)
            for s in streams:
                h = torch.addmm(h, c[s], self.W_enc[s].T, out=h if h.dim() == 2 else None)
            return h.topk(self.k, sorted=False).indices                              # Eq. 8
        if mode == "alone":
            return {s: top([s]) for s in c}
        if mode == "joint":
            return dict.fromkeys(c, top(list(c)))
        order, kept = self.drawn_streams(), 0
        for s in reversed(order if order[0] in here else order[:1]):       # the first that is there
            kept = torch.where(here[s].unsqueeze(1), top([s]), kept) if s in here else top([s])
        return dict.fromkeys(c, kept)

    def drawn_streams(self):
        """All streams, from the one that chooses for all in this step of topk="random" onwards."""
        i = int(torch.randint(len(self.streams), (), generator=self._generator()))
        return self.streams[i:] + self.streams[:i]

    def drawn_sources(self, B):
        """Whose codes rebuild stream t of each of B samples in this step, see `targets`: {t: (B,
        1 + n) numbers of streams, its own first}; (B, M) where all do. On a circle of the streams
        a sample hands its codes on by n of the M - 1 distances, which samples take in turn, in an
        order drawn anew: all ordered pairs meet in as many samples, up to one."""
        M, n = len(self.streams), self.targets if self.lam else 0
        if n is None or n >= M - 1:
            every = torch.arange(M, device=self.step.device).expand(B, M)
            return dict.fromkeys(self.streams, every)
        g, first = self._generator(), 0
        torch.randint(M, (), generator=g)                    # the draw of `drawn_streams`
        distances = 1 + torch.randperm(M - 1, generator=g)
        if dist.is_available() and dist.is_initialized():    # other processes have the rows before
            rows = torch.zeros(dist.get_world_size(), dtype=torch.long, device=self.step.device)
            rows[dist.get_rank()] = B
            first = int(self.across(rows)[:dist.get_rank()].sum())
        turn = (first + torch.arange(B)).unsqueeze(1) * n + torch.arange(n)      # (B, n)
        turn = F.pad(distances[turn % (M - 1)], (1, 0)).to(self.step.device)     # (B, 1 + n)
        return {t: (i - turn) % M for i, t in enumerate(self.streams)}

    def across(self, x):
        """In training a tensor's sum over all processes, in place; in evaluation the tensor."""
        if self.training and dist.is_available() and dist.is_initialized():
            if "activation" in self.config:
                raise InputError("an SAE trains in one process - use SPARC for several")
            dist.all_reduce(x)
        return x

    def _generator(self):
        """Of what a step draws: by seed and step alone, so that resuming is exact."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))

    # -- encoding and decoding -------------------------------------------------------------------
    def _pattern(self, indices):
        auto = "csr" if indices.device.type == "cpu" and _has_csr() else "gather"
        kernels = auto if self.kernels == "auto" else self.kernels
        return Pattern(indices, self.n_latents, kernels, self._spare)

    def _codes(self, c, support, here):
        """ReLU of logits, Eq. 9: c (B, d_s), support (B, k) by stream -> Codes; missing: 0."""
        codes, pattern = {}, None
        for s, indices in support.items():
            if pattern is None or pattern.indices is not indices:                    # one if joint
                pattern = self._pattern(indices)
            # not b_lat[indices]: the gradient of indexing is a slow serial loop
            bias = self.b_lat[s].index_select(0, indices.reshape(-1)).view_as(indices)
            z = torch.relu(_Product.apply(c[s], self.W_enc[s], pattern, _sample) + bias)
            codes[s] = Codes(indices, z * here[s].unsqueeze(1) if s in here else z)
        return codes

    @_no_autocast
    def encode(self, x, mode=None):
        """Codes of raw features, differentiable in x and the weights: dict stream -> Codes.

        x: dict stream -> (B, d_s), any non-empty subset of the streams, row i one sample; NaN
        throughout where it lacks the stream. Of one stream also a bare tensor (B, d): bare Codes.
        mode: "joint" or "alone", see the top; by default as in training ("alone" for "local")."""
        if isinstance(x, torch.Tensor):
            return self.encode(self._named(x), mode)[self.streams[0]]
        mode = mode or ("alone" if self.topk == "local" else "joint")
        one_of("mode", mode, ("joint", "alone"))
        x, here = self._features(x)
        return _marked(self._encode(self._centred(x, here), mode, here), here)

    def _encode(self, c, mode, here):
        return self._codes(c, self._support(c, mode, here), here)

    @_no_autocast
    def decode(self, codes, stream=None):
        """Any stream's Codes -> (B, d) reconstruction of `stream`, in normalised units: D_t(z^s),
        Eq. 10-12. The stream may be left out where there is but one."""
        (stream,) = [stream] if stream else self.streams
        pattern, W = self._pattern(codes.indices.clamp(min=0)), self.W_dec[stream]
        return _Product.apply(codes.values.to(W.dtype), W, pattern, _combine) + self.b_pre[stream]

    def forward(self, x, mode=None):
        """x and mode as `encode` has them -> every given stream rebuilt from its own code, in
        normalised units: dict stream -> (B, d_s), or (B, d) of a bare tensor."""
        z = self.encode(x, mode)
        return self.decode(z) if isinstance(z, Codes) else {s: self.decode(z[s], s) for s in z}

    # -- the loss --------------------------------------------------------------------------------
    def reduce(self, terms, n=None):
        """Sum of loss terms, Eq. 14, or their mean: of n, where few stand for all."""
        return sum(terms) / ((n or len(terms)) if self.reduction == "mean" and terms else 1)

    @_no_autocast
    def loss(self, x):
        """Eq. 14 plus AuxK for one batch of raw features of all streams, x as `encode` has it.

        Returns (total, parts): detached scalars `self` and `cross` (mean NMSE over streams and over
        ordered pairs), `aux`; `codes`: for each support used a dict stream -> Codes; and `energy`:
        dict stream -> (B,), ||x||^2 of the normalised features, 0 where missing."""
        x, here = self._features(x)
        absent = ", ".join(s for s in self.streams if s not in x)
        refuse(absent, "training needs every stream (rows of NaN where a sample lacks it) - "
               f"missing {absent}")
        c, sources = self._centred(x, here), None
        if here:
            sources = torch.stack([here.get(s, v[:, 0] == v[:, 0]) for s, v in x.items()], 1)
        energy = {s: v.square().sum(1) for s, v in x.items()}
        weight = {s: _nmse_weight(e, sources, self.across) for s, e in energy.items()}   # or (B, M)
        total, terms, used, pairs = 0., {"self": [], "cross": [], "aux": []}, [], 0
        for mode in TOPK[self.topk]:
            codes = self._encode(c, mode, here)
            own, cross, aux, n = self._terms(c, weight, codes, here)
            total = total + self.reduce(own) + self.lam * self.reduce(cross, n)          # Eq. 14
            total, pairs = total + self.aux_coef * self.reduce(aux), pairs + n
            for name, new in (("self", own), ("cross", cross), ("aux", aux)):
                terms[name] += [v.detach() for v in new]
            used.append(_marked(codes, here))
        counts = {k: len(v) for k, v in terms.items()} | {"cross": pairs}
        means = {k: sum(v, total.new_zeros(())) / max(counts[k], 1) for k, v in terms.items()}
        return total, {**means, "codes": used, "energy": energy}

    def _terms(self, c, weight, codes, here):
        """NMSE of every reconstruction, AuxK of every stream: lists own (M), cross, aux, without
        those that no sample of the batch has. What is drawn for cross is times (M - 1) / n: the sum
        is that of all pairs, on average. The last result: how many pairs any sample has.

        x_hat - x = W_D z + b_pre - x = W_D z - c, so nothing needs the bias but c. All sources of a
        target go through one product, the codes of one sample in neighbouring rows: half the time,
        as supports overlap, and dictionary rows that one needs are in the cache for the next."""
        own, cross, aux, pairs, pattern, before = [], [], [], 0, None, None
        indices, values = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*codes.values()))
        M, B, supports = len(c), len(values) // len(c), {id(z.indices) for z in codes.values()}
        drawn = self.drawn_sources(B)
        for i, t in enumerate(c):
            if drawn[t] is not before:                       # with all pairs the same for all t
                rows = (drawn[t] + M * torch.arange(B, device=values.device).unsqueeze(1)).flatten()
                z = values.index_select(0, rows)             # (B*sources, k)
                if pattern is None or len(supports) > 1:
                    pattern = self._pattern(indices.index_select(0, rows))
            before, n = drawn[t], drawn[t].shape[1] - 1
            y = _Product.apply(z, self.W_dec[t], pattern, _combine)
            e = y.unflatten(0, (B, -1)) - c[t].unsqueeze(1)  # (B, sources, d_t)
            energy, there = torch.linalg.vector_norm(e, dim=2).square(), [True] * M
            if weight[t].dim() == 1:
                terms = list(weight[t] @ energy)                                         # Eq. 13
            else:
                terms = list((weight[t].gather(1, drawn[t]) * energy).sum(0))
                there = (self.across((weight[t] > 0).sum(0)) > 0).tolist()   # any sample has both
            pairs += (sum(there) - there[i]) * bool(n)
            own_at = i if n == M - 1 else 0
            own += [terms[own_at]] if there[i] else []
            cross += [(M - 1) / n * term for j, term in enumerate(terms) if j != own_at]
            some = t not in here or self.across(here[t].sum())
            if self.aux_coef and some and self.dead(t).any():
                aux.append(self._auxk(c[t].detach(), -e[:, own_at].detach(), t, here))
        return own, cross, aux, pairs

    def dead(self, stream):
        """(L,) bool: latents that have not fired in this stream for `dead_after` training steps."""
        return getattr(self, f"idle_{stream}") >= self.dead_after

    def _auxk(self, c, e, stream, here):
        """AuxK (Gao et al.): how the best dead latents rebuild e = x - x_hat (B, d).

        c, e detached: gradient reaches the dead latents' rows and biases only. Who is dead was
        counted up to the step before. (The authors' code adds b_pre to both sides and masks with 0
        instead of -inf: it pulls at the bias, and is about 1 when nothing is dead. It divides each
        sample's error by its own residual, so that the best rebuilt, whose rest is noise, lead.)"""
        dead = self.dead(stream).nonzero().squeeze(1)
        with torch.no_grad():
            h = c @ self.W_enc[stream][dead].T + self.b_lat[stream][dead]            # (B, n dead)
            indices = dead[h.topk(min(self.aux_k, len(dead)), sorted=False).indices]
        z = self._codes({stream: c}, {stream: indices}, here)[stream].values
        # thesis A.1.2: without a bias
        e_hat = _Product.apply(z, self.W_dec[stream], self._pattern(indices), _combine)
        return (e - e_hat).square().sum() / self.across(e.square().sum()).clamp_min(1e-30)


def _marked(codes, here):
    """Codes by stream, with index -1 and value 0 where a sample lacks the stream."""
    return codes | {s: Codes(codes[s].indices.where(rows.unsqueeze(1), -1),
                             codes[s].values.where(rows.unsqueeze(1), 0))
                    for s, rows in here.items()}


# ---- One stream: the family of sparse autoencoders ----------------------------------------------
# An activation is a function (model, logits h (B, L), batch) -> (code z (B, L), penalty): what it
# keeps of the logits. With `batch` it may choose among the whole batch, as batchtopk does to train.

def _relu(model, h, batch):
    z = torch.relu(h)
    return z, z.sum(1).mean()                                # the L1 norm: z is not negative


def _batchtopk(model, h, batch):
    if batch:
        kept = h.detach().flatten().topk(len(h) * model.k, sorted=False).indices
        on = torch.zeros(h.numel(), dtype=torch.bool, device=h.device)
        z = torch.relu(h) * on.index_fill_(0, kept, True).view_as(h)
        least, old = torch.where(z > 0, z.detach(), torch.inf).min(), model.kept_above
        if least.isfinite():                                 # the mean over steps, begun with it
            old.copy_(least if old.isnan() else old.lerp(least, 0.01))
    else:
        refuse(model.kept_above.isnan(), "the threshold of batchtopk is not set - "
               "train for a step at least before encoding")
        z = torch.relu(h) * (h > model.kept_above)
    return z, h.new_zeros(())


def _jumprelu(model, h, batch):
    """z = h 1[h > theta]. The step's gradient at theta is that of Rajamanoharan et al. (2024):
    -1/epsilon for logits within epsilon/2: the mean is minus their density. None reaches h."""
    theta, epsilon = model.log_threshold.exp(), model.bandwidth
    near = ((h - theta).abs() < epsilon / 2).to(h.dtype).detach()
    on = (h > theta).to(h.dtype) + near * (theta.detach() - theta) / epsilon         # adds 0
    # what z does with the step reaches theta times theta: -theta/epsilon near it
    return h * on.detach() + theta.detach() * (on - on.detach()), on.sum(1).mean()


class Activation(NamedTuple):
    """An activation (None: TopK), and settings for features of length 1; sparsity 0: no penalty."""
    code: Callable
    error: str
    revive: str
    sparsity: float
    prefixes: tuple = ()                                     # shares of L that rebuild x alone, too


ACTIVATIONS = {                                              # one more trains with a line here
    "relu": Activation(_relu, "sum", "resample", 0.1),
    "topk": Activation(None, "nmse", "auxk", 0.),
    "batchtopk": Activation(_batchtopk, "nmse", "auxk", 0.),
    "matryoshka": Activation(_batchtopk, "nmse", "auxk", 0., (1 / 16, 1 / 4)),
    "jumprelu": Activation(_jumprelu, "sum", "resample", 0.01),
}


class SAE(SPARC):
    """One stream: x_hat = W_d z + b_pre, z = f(W_e (x - b_pre) + b_lat), thesis Eq. 1-4.

    dims        {stream: d}                  n_latents   L
    activation  f.  "relu"       sparse by the penalty: thesis Eq. 5, Mammo-SAE Eq. 1, CytoSAE Eq. 2
                    "topk"       the k largest logits of a sample (Gao et al. 2024); no penalty
                    "batchtopk"  the B*k largest logits of a batch (Bussmann et al. 2024); later
                                 all above the mean over steps of the smallest value kept
                    "matryoshka" so too, and the first 16th and quarter of the latents also rebuild
                                 x alone: general concepts come first (Bussmann et al. 2025)
                    "jumprelu"   those above a learned threshold (Rajamanoharan et al. 2024)
    k           latents kept per sample (topk), on average (batchtopk)
    sparsity    lambda: weight of the mean over samples of ||z||_1 (relu) or of ||z||_0 (jumprelu)
    error       "sum"   ||x - x_hat||^2, averaged over samples: thesis Eq. 5, as in all papers
                "mean"  that over d, as Mammo-SAE's, CytoSAE's code: lambda_paper = d lambda_code
                "nmse"  each sample's over ||x||^2: thesis Eq. 13
    revive      what is done about dead latents, silent for `dead_after` training steps
                "auxk"      they rebuild the residual (see SPARC)
                "ghost"     exp(logit) counts as their activation (CytoSAE 2), see `ghost_error`
                "resample"  they become badly rebuilt samples (Bricken et al. 2023), see `_resample`
    bandwidth   epsilon of the gradients of the JumpReLU threshold; it starts at `threshold`
    The others, and the parameters' names, are SPARC's. Raises InputError for what cannot be."""

    def __init__(self, dims, n_latents, activation="topk", k=64, sparsity=0., error="nmse",
                 revive="auxk", bandwidth=0.05, threshold=0.05, **shared):
        one_of("activation", activation, ACTIVATIONS)
        one_of("error", error, ERRORS)
        one_of("revive", revive, REVIVE)
        refuse(len(dims) != 1, f"SAE takes one stream, not {len(dims)} - use SPARC for several")
        refuse(not (sparsity >= 0 and bandwidth > 0 and threshold > 0),
               f"sparsity={sparsity}, bandwidth={bandwidth}, threshold={threshold} - "
               "give numbers above 0, or sparsity 0")
        self.by_batch = ACTIVATIONS[activation].code is _batchtopk
        k = k if activation == "topk" or self.by_batch else min(k, n_latents)    # of no use there
        super().__init__(dims, n_latents, k, "local", 0., **{"start": 1., **shared})
        for name in ("topk", "lam", "reduction", "targets"):
            del self.config[name]
        self.config |= dict(activation=activation, sparsity=sparsity, error=error, revive=revive,
                            bandwidth=bandwidth, threshold=threshold)
        vars(self).update(self.config, stream=self.streams[0])
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n_latents,), float(threshold)).log())
        self.register_buffer("kept_above", torch.tensor(float("nan")))   # batchtopk's threshold

    @torch.no_grad()
    def start_bias(self, x, how):
        """Begin b_pre at the "mean" or the geometric "median" of raw samples x (n, d)."""
        v = self.normalise(x[~missing(x)], self.stream)
        self.b_pre[self.stream].copy_(geometric_median(v) if how == "median" else v.mean(0))

    def logits(self, c):
        """(B, d) centred features -> (B, L), thesis Eq. 2 before its ReLU."""
        return torch.addmm(self.b_lat[self.stream], c, self.W_enc[self.stream].T)

    def activate(self, h, batch=False):
        """Logits (B, L) -> (code z (B, L), penalty), of activations other than topk."""
        return ACTIVATIONS[self.activation].code(self, h, batch)

    def _encode(self, c, mode, here):
        """Codes as wide as the sample with most active latents; a single stream is always alone."""
        if self.activation == "topk":
            return super()._encode(c, mode, here)
        z, _ = self.activate(self.logits(c[self.stream]))
        width = max(1, int((z > 0).sum(1).max())) if len(z) else 1
        values, indices = z.topk(width, sorted=False)
        return {self.stream: Codes(indices, values)}

    @_no_autocast
    def loss(self, x):
        """Thesis Eq. 5, or its relatives, for a batch of raw features; missing rows are left out.

        Returns (total, parts): detached scalars `self` (the error), `sparsity` (the penalty before
        its weight), `aux` (what revives the dead), `cross` (0), and `codes` as SPARC has them."""
        s = self.stream
        x, here = self._features(x)
        v = x[s][here[s]] if here else x[s]
        c, own, shorter = v - self.b_pre[s], ACTIVATIONS[self.activation], []
        if self.activation == "topk":
            codes, penalty = super()._encode({s: c}, "alone", {})[s], c.new_zeros(())
            y = _Product.apply(codes.values, self.W_dec[s], self._pattern(codes.indices), _combine)
        else:
            z, penalty = self.activate(self.logits(c), batch=self.training)
            y = z @ self.W_dec[s]
            ends = [max(1, int(share * self.n_latents)) for share in own.prefixes]
            shorter = [z[:, :end] @ self.W_dec[s][:end] for end in ends]
            codes = Codes(torch.arange(self.n_latents, device=z.device).expand_as(z), z)
        energy = v.square().sum(1)
        each = 1 / max(1, len(v) if self.error == "sum" else v.numel())
        weight = _nmse_weight(energy) if self.error == "nmse" else torch.full_like(energy, each)
        error, *nested = ((part - c).square() * weight.unsqueeze(1) for part in (y, *shorter))
        aux, aux_coef, residual = c.new_zeros(()), 1, (c - y).detach()
        dead = self.dead(s)
        if self.revive == "auxk" and self.aux_coef and dead.any():
            aux, aux_coef = self._auxk(c.detach(), residual, s, {}), self.aux_coef
        elif self.revive == "ghost" and dead.any():
            h = torch.addmm(self.b_lat[s][dead], c, self.W_enc[s][dead].T)
            aux = ghost_error(residual, h, self.W_dec[s][dead], error.detach()).sum()
        total = error.sum() + sum(part.sum() for part in nested)     # each (B, d)
        total = total + self.sparsity * penalty + aux_coef * aux
        return total, {"self": error.sum().detach(), "sparsity": penalty.detach(),
                       "aux": aux.detach(), "cross": c.new_zeros(()), "codes": [{s: codes}],
                       "energy": {s: energy}}


def ghost_error(residual, h, W, error):
    """Ghost gradients (CytoSAE's code): the dead rebuild the residual, exp(h) as their activation.

    residual (B, d) = x - x_hat and error (B, d) of the reconstruction, without gradient; h (B, D)
    logits and W (D, d) rows of the dead. Returns (B, d): `error`'s value, gradients to h and W."""
    excess = (h.detach().amax(-1, keepdim=True) - 20).clamp(min=0)   # only the direction counts
    ghost = (h - excess).exp() @ W
    length = residual.norm(dim=-1, keepdim=True)                     # twice that of the ghost
    ghost = ghost * (length / (1e-6 + 2 * ghost.norm(dim=-1, keepdim=True))).detach()
    e = (ghost - residual).square() / length.clamp_min(1e-30)
    return e * (error / (e + 1e-6)).detach()


def geometric_median(x, iterations=1000, tolerance=1e-9):
    """The point (d,) of least summed distance to the rows of x (n, d), by Weiszfeld's iteration. A
    row that the iteration comes to lie on would divide by 0 or hold it there for ever; the step of
    Vardi and Zhang (2000) leaves it, unless it is the median."""
    x = x.double()
    y = x.mean(0)
    for _ in range(iterations):
        distance = (x - y).norm(dim=1)
        here = distance <= 1e-12 * distance.max()
        weight = torch.where(here, 0, 1 / distance.clamp_min(1e-300))
        pull = weight @ (x - y)
        stay = (here.sum() / pull.norm().clamp_min(1e-300)).clamp(max=1)     # 1 if all are there
        step = (1 - stay) * pull / weight.sum().clamp_min(1e-300)
        y = y + step
        if step.norm() <= tolerance * distance.mean():
            break
    return y.float()


# ---- A stream that joins a trained code: ours ---------------------------------------------------
# x: the raw features (B, d) of a model's one stream, by the names of others their alone Codes.

def join_loss(model, x):
    """For `fit`: (total, parts) of a batch. With z the stream's own alone code, z^s another's and m
    the mean of those: NMSE (Eq. 13) of D(z), of D(z^s), of its own values on the support of z^s,
    and ||z - m||^2 / ||m||^2, without which others cannot read z. Over s the mean."""
    (own,) = model.streams
    v, here = model._features({own: x[own]})
    c, energy = model._centred(v, here), v[own].square().sum(1)

    def error(indices, values):                              # index -1: the sample lacks s
        rest = model.decode(Codes(indices, values.to(v[own])), own) - v[own]
        return (_nmse_weight(energy * (indices[:, 0] >= 0)) * rest.square().sum(1)).sum()
    z, cross, m = model._encode(c, "alone", here)[own], [], 0.
    others, used = [code for s, code in x.items() if s != own], [{own: z}]
    for code in others:
        on = model._codes(c, {own: code.indices.clamp(min=0)}, here)[own].values
        used.append({own: Codes(code.indices, on * (code.indices >= 0))})
        cross += [error(*code), error(*used[-1][own])]
        m = m + code.dense(model.n_latents)                                          # (B, L)
    m = m / sum((code.indices[:, :1] >= 0).int() for code in others).clamp_min(1)
    squares, own_error, cross_error = m.square().sum(1), error(*z), sum(cross) / len(cross)
    apart = squares + (z.values * (z.values - 2 * m.gather(1, z.indices))).sum(1)    # ||z - m||^2
    total = own_error + 2 * cross_error + (_nmse_weight(squares * (energy > 0)) * apart).sum()
    return total, {"self": own_error.detach(), "cross": cross_error.detach(),
                   "codes": used, "energy": {own: energy}}


@torch.no_grad()
def join_start(model, x):
    """Start at what is to be learned: dictionary rows by ridge regression of the features on the
    others' summed codes, of some thousand samples at most, and encoder rows along them."""
    (own,) = model.streams
    here = ~missing(x[own])
    v = model.normalise(x[own][here], own)
    z = sum(code.dense(model.n_latents) for s, code in x.items() if s != own)[here]
    model.b_pre[own].copy_(v.mean(0))
    ridge = (0.1 * z.square().sum() / z.shape[1]).clamp_min(1e-12) * torch.eye(len(z)).to(z)
    rows = F.normalize(z.T @ torch.linalg.solve(z @ z.T + ridge, v - v.mean(0)))     # (L, d)
    W, E = model.W_dec[own], model.W_enc[own]
    W.copy_(torch.where(rows.any(1, keepdim=True), rows, W))
    E.copy_(W * E.norm(dim=1, keepdim=True))


def merged(model, joined):
    """A SPARC of the streams of `model` and of one that joined its code, weights as they are."""
    whole = SPARC(**{**model.config, "dims": {**model.dims, **joined.dims}, "targets": None})
    whole.load_state_dict({**joined.state_dict(), **model.state_dict(), "step": joined.step})
    return whole.to(model.step.device).eval()


# ---- Training -----------------------------------------------------------------------------------

@torch.no_grad()
def project_gradient(model, rows=256):
    """Rid gradients of what lengthens dictionary rows (thesis A.1.2), by blocks for the cache."""
    for W in model.W_dec.values():
        # a stream that the batch lacks has no gradient
        for g, w in zip(W.grad.split(rows), W.split(rows)) if W.grad is not None else ():
            g.addcmul_(w, (g * w).sum(1, keepdim=True), value=-1)


@torch.no_grad()
def renormalise(model):
    """Give every dictionary row unit length again."""
    for W in model.W_dec.values():
        F.normalize(W, dim=1, out=W)


@torch.no_grad()
def _count_idle(model, codes, energy):
    """Advance the dead-latent counters by one step; what fired in any sample starts again at 0.

    What a latent adds to a sample is as long as its value. It fired if that exceeds FIRES times the
    length of the batch's features (root mean square, zero rows left out): their scale must not
    decide who is dead. A stream that the whole batch lacks had no chance to fire."""
    for s, squares in energy.items():                        # (B,) squared lengths
        there, length = model.across(torch.stack([(squares > 0).sum(), squares.sum()]))
        idle, least = getattr(model, f"idle_{s}"), FIRES * (length / there).sqrt()
        idle += there > 0
        for support in codes if there else ():
            fired = support[s].values > least
            if model.activation == "topk":
                idle[support[s].indices[fired]] = 0
            else:                                            # dense codes: latent j is column j
                idle[fired.any(0)] = 0
        idle[model.across((idle == 0).int()) > 0] = 0        # in any process


@torch.no_grad()
def _reinitialise(model, optimiser):
    """Draw anew encoder rows that AuxK could not revive: N(0, 0.01^2), rest 0 (thesis A.1.2)."""
    for s in model.streams if model.revive == "auxk" else ():
        idle, W = getattr(model, f"idle_{s}"), model.W_enc[s]
        rows = (idle >= model.dead_after + model.reinit_after).nonzero().squeeze(1)
        if len(rows):
            W[rows] = 0.01 * torch.randn(len(rows), W.shape[1], generator=model._generator()).to(W)
            _start_anew(model, optimiser, s, rows, W)


def _start_anew(model, optimiser, s, rows, *weights):
    """Of latents whose `weights` are new: bias, Adam's moments and idle steps become 0."""
    model.b_lat[s][rows] = 0
    getattr(model, f"idle_{s}")[rows] = 0
    for p in (model.b_lat[s], *weights):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimiser.state[p][moment][rows] = 0


@torch.no_grad()
def _resample(model, optimiser, x):
    """Make dead latents of badly rebuilt samples (Bricken et al. 2023), drawn from a batch by the
    square of their loss; encoder rows get a fifth of the mean length of the living."""
    s = model.streams[0]
    unset = model.by_batch and model.kept_above.isnan()
    if model.revive != "resample" or unset or not model.dead(s).any():
        return
    x = x[s][~missing(x[s])]
    v = model.normalise(x, s)
    loss = (model.decode(model.encode(x), s) - v).square().sum(1)
    rows = model.dead(s).nonzero().squeeze(1)[:int((loss > 0).sum())]
    if len(rows):
        drawn = torch.multinomial(loss.square().cpu(), len(rows), generator=model._generator())
        model.W_dec[s][rows], model.W_enc[s][rows] = resampled_rows(
            v[drawn.to(v.device)] - model.b_pre[s], model.W_enc[s][~model.dead(s)])
        _start_anew(model, optimiser, s, rows, model.W_enc[s], model.W_dec[s])


def resampled_rows(c, alive):
    """Centred samples (n, d), encoder rows of the living -> new dictionary, encoder rows (n, d)."""
    unit = F.normalize(c)
    return unit, 0.2 * (alive.norm(dim=1).mean() if len(alive) else 1) * unit


def make_optimiser(model, lr=1e-4):
    """Adam with the thesis's settings (A.1.2), fused: the same numbers in a quarter of the time."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _recycle(model):
    """Forget the gradients but keep their memory for the next ones. Fresh memory, which comes page
    by page, costs more than the product written into it. A tensor in `_spare` has no other owner,
    so autograd may keep whatever a backward pass takes from there."""
    model._spare.clear()
    for W in [*model.W_enc.values(), *model.W_dec.values()]:
        if W.grad is not None:
            model._spare.setdefault(tuple(W.shape), []).append(W.grad)
    model.zero_grad(set_to_none=True)


@_no_autocast
def train_step(model, optimiser, x, loss=None):
    """One step on a batch x of raw features, down loss(model, x) or else model.loss(x): a dict,
    `loss` and its parts. The order matters: gradients projected, step, rows renormalised."""
    _recycle(model)
    x = model._named(x)
    total, parts = loss(model, x) if loss else model.loss(x)
    total.backward()
    for p in model.parameters():
        if p.grad is not None:                               # in all processes, or in none
            model.across(p.grad)
    project_gradient(model)
    optimiser.step()
    renormalise(model)
    _count_idle(model, parts["codes"], parts["energy"])
    model.step += 1
    _reinitialise(model, optimiser)
    _resample(model, optimiser, x)
    terms = {"loss": total.detach(), **{k: v for k, v in parts.items() if torch.is_tensor(v)}}
    return {**parts, **dict(zip(terms, model.across(torch.stack([*terms.values()]))))}


def fit(model, batch, n_steps, lr=1e-4, optimiser=None, on_step=None, warmup=0, loss=None):
    """Train until the model has taken `n_steps` steps in all, and return the optimiser.

    batch: step -> dict stream -> (B, d_s) raw; a pure function of the step makes resuming exact.
    warmup: steps over which the learning rate rises to lr (CytoSAE; SPARC has none).
    on_step(step, result): after each step, from 1, with what `train_step`, given `loss`, told."""
    optimiser = optimiser or make_optimiser(model, lr)
    model.train()
    for step in range(int(model.step), n_steps):
        if warmup and step <= warmup:
            optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / warmup)
        result = train_step(model, optimiser, batch(step), loss)
        if on_step:
            on_step(step + 1, result)
    model.zero_grad(set_to_none=True)                        # they take the memory of the weights
    model._spare.clear()
    model.eval()
    return optimiser


@torch.no_grad()
def encoded(model, batch, rows, mode, block=1024):
    """Yield (x, codes) of `rows`, block by block: dicts stream -> raw (b, d_s), on the model's
    device, and -> Codes. batch: rows (b,) -> such a dict, on any."""
    for start in range(0, len(rows), block):
        x = {s: v.to(model.step.device) for s, v in batch(rows[start:start + block]).items()}
        yield x, model.encode(x, mode)


def told(model, result):
    """A step as numbers: its losses, active latents per sample, dead latents of each stream."""
    parts = [k for k in ("loss", "self", "cross", "aux", "sparsity") if k in result]
    counts = torch.stack([torch.stack([(z.values > 0).sum(), (z.indices[:, 0] >= 0).sum()])
                          for codes in result["codes"] for z in codes.values()])
    on, there = model.across(counts).float().T               # of each support and stream
    return {**{k: float(result[k]) for k in parts},
            "active": float((on / there)[there > 0].mean()),
            **{f"dead_{s}": int(model.dead(s).sum()) for s in model.streams}}


# ---- Files --------------------------------------------------------------------------------------

def save(path, model, optimiser=None, **extra):
    """Write model, optimiser and plain `extra` to `path`, whole or not at all."""
    state = {"format": FORMAT, "config": model.config, "model": model.state_dict(), "extra": extra,
             "optimiser": optimiser.state_dict() if optimiser else None}
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"          # fresh: no file, no link of others
    f = open(temporary, "xb")
    try:
        with f:                                              # a name would go into the bytes
            torch.save(state, f)
        os.replace(temporary, path)
    except BaseException as e:
        os.remove(temporary)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
            raise e.__context__                              # a full disk, in torch's words
        raise


@contextmanager
def reading(path, wrong, advice):
    """Lines that take a file apart: what fails there is said in one line."""
    try:
        yield
    except Exception as e:                                   # torch raises many kinds
        if type(e).__name__ == "InputError":                 # whichever module's
            raise
        raise InputError(f"{path} {wrong} ({type(e).__name__}) - {advice}")


def load(path, device="cpu"):
    """Read what `save` wrote: (model, optimiser or None, extra). InputError if it did not."""
    refuse(not os.path.isfile(path),                         # or a pipe, that would be waited for
           f"no checkpoint at {path} - name the folder of a finished or saved run")
    with reading(path, "is not a readable checkpoint", "train again or restore the file"):
        state = torch.load(path, map_location=device, weights_only=True)
        refuse(state["format"] != FORMAT,
               f"{path} has format {state['format']!r} - this version reads {FORMAT}")
        state["config"].pop("select", None)                  # settings of before
        state["config"].setdefault("start", 1.)
        kind, optimiser = SAE if "activation" in state["config"] else SPARC, None
        model = kind(**state["config"]).to(device)
        model.load_state_dict(state["model"])
        if model.step < 0:
            raise ValueError("a step before the first")
        if state["optimiser"]:
            optimiser = make_optimiser(model)
            optimiser.load_state_dict(state["optimiser"])
            for weights, moments in optimiser.state.items():     # torch would miss it until a step
                shapes = {weights.shape, moments["exp_avg"].shape, moments["exp_avg_sq"].shape}
                if len(shapes) > 1 or moments["step"].dim():
                    raise ValueError("moments of other weights")
        return model.eval(), optimiser, state["extra"]


# ---- Files of other libraries: SAELens 6, EleutherAI's sparsify, dictionary_learning ------------
# Name of the weights: (the config beside them, its field that tells the kind, "=usual", {kind:
# (activation, does it encode x - b_pre?, keys of W_enc, W_dec, b_lat, b_pre, threshold, k; .T where
# transposed)}). SAELens saves batchtopk as jumprelu. Dictionary rows keep the length they have.
FLAT, LINEAR = "W_enc.T W_dec b_enc b_dec", "encoder.weight decoder.weight.T encoder.bias"
LIBRARIES = {
    "sae_weights.safetensors": ("cfg.json", "architecture=standard", {
        "standard": ("relu", True, FLAT), "topk": ("topk", True, FLAT),
        "jumprelu": ("jumprelu", True, f"{FLAT} threshold")}),
    "sae.safetensors": ("cfg.json", "activation=topk", {
        "topk": ("topk", True, "encoder.weight W_dec encoder.bias b_dec")}),
    "ae.pt": ("config.json", "dict_class=", {
        "AutoEncoder": ("relu", True, f"{LINEAR} bias"),     # their loader multiplies z by ||w||
        "AutoEncoderTopK": ("topk", True, f"{LINEAR} b_dec threshold k"),    # threshold: not used
        "BatchTopKSAE": ("batchtopk", True, f"{LINEAR} b_dec threshold k"),
        "JumpReluAutoEncoder": ("jumprelu", False, f"{FLAT} threshold")}),
}
MEANT = {                                                    # fields, and what each may be
    "apply_b_dec_to_input": (True, False), "rescale_acts_by_decoder_norm": (True, False),
    "normalize_activations": ("none",), "reshape_activations": ("none", "hook_z"),
    "transcode": (False,), "skip_connection": (False,), "signed": (False,)}
IDLE = """num_latents expansion_factor normalize_decoder multi_topk dtype device metadata lr steps
    trainer_class buffer seed layer lm_name wandb_name submodule_name auxk_alpha top_k_aux
    warmup_steps decay_start threshold_beta threshold_start_step bandwidth sparsity_penalty
    sparsity_warmup_steps target_l0 l1_penalty resample_steps"""     # no code depends on these
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _object(pairs):
    return dict(pairs) if len(dict(pairs)) == len(pairs) else None       # a key twice: unreadable


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the length of a header, 8 bytes, little-endian; JSON
    {name: {dtype, shape, data_offsets}}; numbers without a gap. As much memory as the file."""
    with open(path, "rb") as f:
        f.readinto(blob := bytearray(os.path.getsize(path)))
    at = begin = 8 + int.from_bytes(blob[:8], "little")
    header, tensors = json.loads(blob[8:begin], object_pairs_hook=_object), {}
    header.pop("__metadata__", None)
    for name, v in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, n, (start, end) = DTYPES[v["dtype"]], math.prod(v["shape"]), v["data_offsets"]
        if begin + start != at or end - start != n * dtype.itemsize or n < 1:
            raise ValueError(f"'{name}' lies at {start} to {end}")
        tensors[name] = torch.frombuffer(blob, dtype=dtype, count=n, offset=at).reshape(v["shape"])
        at = begin + end
    if at != len(blob):
        raise ValueError(f"{len(blob)} bytes, where {at} are declared")
    return tensors


@torch.no_grad()
def load_public(path, stream="x", device="cpu"):
    """An `SAE` of one stream, for evaluation, of what another library wrote, see LIBRARIES: of the
    folder `path`, or of the file of weights in it. InputError for what is damaged, and by name for
    a tensor or field that might mean something else here."""
    folder, name = os.path.split(path) if os.path.isfile(path) else (path, None)
    name = name or next((n for n in LIBRARIES if os.path.isfile(os.path.join(path, n))), "")
    refuse(name not in LIBRARIES, f"{path} is none of {', '.join(LIBRARIES)} - name the folder")
    file, (beside, field, kinds) = os.path.join(folder, name), LIBRARIES[name]
    with reading(file, f"or the {beside} beside it is not readable", "fetch both anew"):
        with open(os.path.join(folder, beside), "rb") as f:
            config = json.loads(f.read(2 ** 24), object_pairs_hook=_object)
        config |= config.pop("trainer", {})                  # of dictionary_learning
        found = torch.load(file, "cpu", weights_only=True) if beside == "config.json" \
            else read_safetensors(file)
        kind = config.pop(*field.split("="))
        refuse(kind not in kinds, f"{file} is a {kind!r} - {', '.join(kinds)} can be read")
        activation, centred, keys = kinds[kind]
        odd = {*found} ^ {key.removesuffix(".T") for key in keys.split()}
        refuse(odd, f"{file} has or lacks {', '.join(sorted(odd))}, unlike a {kind} - use another")
        W, V, b_lat, b_pre, *rest = (found[key[:-2]].T.float() if key.endswith(".T")
                                     else found[key].float() for key in keys.split())
        L, d = W.shape
        refuse([*V.shape, *b_lat.shape, *b_pre.shape] != [L, d, L, d]
               or not all(v.isfinite().all() for v in found.values()),
               f"{file} has shapes that do not fit together, NaN or Inf - fetch it anew")
        meant = {**MEANT, "d_in": [d], "activation_dim": [d], "d_sae": [L], "dict_size": [L],
                 "k": [int(rest[1])] if len(rest) > 1 else range(1, L + 1)}
        for name, value in config.items():
            do = "use another" if name in meant else f"drop it from {beside} if no code needs it"
            refuse(name not in IDLE.split() and value not in meant.get(name, ()),
                   f"{name}={value!r} of {file} is not known here, or not of its weights - {do}")
        if activation == "topk" and config.get("rescale_acts_by_decoder_norm"):
            length = V.norm(dim=1).clamp_min(1e-30)          # TopK of h ||w||, decoded as z / ||w||
            W, V, b_lat = W * length[:, None], V / length[:, None], b_lat * length
        if not config.get("apply_b_dec_to_input", centred):  # W x + b = W (x - b_pre) + b + W b_pre
            b_lat = b_lat + W @ b_pre
        k = config.get("k", rest[1] if len(rest) > 1 else 0) if "topk" in activation else 1
        model = SAE({stream: d}, L, activation, int(k), norm="none")
        new = {"W_enc": W, "W_dec": V, "b_lat": b_lat, "b_pre": b_pre}
        new = {f"{name}.{stream}": v for name, v in new.items()}
        if rest and activation == "jumprelu":                # a ReLU follows: below 0 is as 0
            new["log_threshold"] = rest[0].clamp_min(0).log()
        elif rest:
            new["kept_above"] = rest[0]
        model.load_state_dict({**model.state_dict(), **new})
        return model.to(device).eval()
