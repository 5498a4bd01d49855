"""Speed and memory: what `python repsae.py bench` runs.

First the instruments, then contenders and what is measured of them: a `bench_*` yields tables, each
(title, {contender: {figure: value}}). The slow contenders (the authors' dense step, loops and a
parallel scan in plain PyTorch) compute what ours do: see test_repsae.
"""
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])
import data
import eval as judge
import repsae
import sae
import ssm
import test_page


def status_mb(name):
    """A figure of this process's memory; OSError or StopIteration where the system keeps none."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(name))


def watch_memory(peak):
    """Keep in the list `peak` the most RssAnon (MB) of this process: mapped files do not count."""
    with contextlib.suppress(OSError, StopIteration):        # no Linux: no figure, not a wrong one
        while True:
            peak[0] = max(peak[0], status_mb("RssAnon"))
            time.sleep(0.002)


def peak_of(run, device):
    """MB that run() needs on top of what was there; None where the system does not tell."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2 ** 20)
    try:
        ctypes.CDLL(None).malloc_trim(0)                     # else what was freed is used uncounted
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")                                     # start the high-water mark anew
        before = status_mb("VmHWM")
        run()
        return round(status_mb("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def apart(device, function, *args):
    """function(*args), on the CPU in a fresh process, whose memory is its own."""
    if device != "cpu":                                      # a GPU counts by itself
        return function(*args)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def median_ms(run, device, rounds=15, patience=3.):
    """Median milliseconds of run() after a warm-up; once if longer than `patience` seconds."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        if sum(spent) > patience:
            break
    return 1000 * statistics.median(spent[1:] or spent)


# -- a training step, and large folders --------------------------------------------------------

def dense_step(model, optimiser, x):
    """The authors' step: dense codes, M^2 dense decoders, Adam; in their favour without AuxK."""
    optimiser.zero_grad()
    sae.dense_loss(model, x).backward()
    sae.renormalise(model)
    sae.project_gradient(model)
    optimiser.step()


OURS, AUTHORS = "sparse (ours)", "dense, Adam's defaults (the authors' way)"
KINDS = (OURS, AUTHORS, "dense, fused Adam")


def contender(kind, dims, device, batch=256, latents=8192, k=64, targets=None):
    """A function that takes a training step of a kind, on a random batch of the thesis's size."""
    g = torch.Generator().manual_seed(0)
    x = {s: F.normalize(torch.randn(batch, d, generator=g)).to(device) for s, d in dims.items()}
    model = sae.SPARC(dims, latents, k, targets=targets).to(device).train()
    optimiser = (torch.optim.Adam(model.parameters(), lr=1e-4) if kind == AUTHORS
                 else sae.make_optimiser(model))
    step = dense_step if "dense" in kind else sae.train_step
    return functools.partial(step, model, optimiser, x)


def three_steps(kind, dims, device, *sizes):
    """Make a contender, model and optimiser with it, and take three steps."""
    step = contender(kind, dims, device, *sizes)
    for _ in range(3):
        step()


def bench_sparc(device):
    """A training step of SPARC against the authors' dense one; what a stream costs among many."""
    three = {"dino": 1024, "clip_img": 768, "clip_txt": 768}
    for dims in (three, {f"s{i}": 768 for i in range(10)}):
        ms = {kind: median_ms(contender(kind, dims, device), device, 7, 60.) for kind in KINDS}
        ways = {kind: {"ms": t, "times ours": t / ms[OURS]} for kind, t in ms.items()}
        for kind in (OURS, AUTHORS):
            steps = functools.partial(three_steps, kind, dims, device)
            ways[kind]["peak MB"] = apart(device, peak_of, steps, device)
        yield (f"one training step: {len(dims)} streams, {sum(dims.values())} dimensions, "
               f"batch 256, L 8192, k 64, {torch.get_num_threads()} threads, {device}"), ways
    found = {}                                               # for each of many streams
    for M, targets in ((4, None), (32, 2), (32, None)):
        dims, sizes = {f"s{i}": 512 for i in range(M)}, (256, 4096, 32, targets)
        ms = median_ms(contender(OURS, dims, device, *sizes), device, 5, 20.)
        steps = functools.partial(three_steps, OURS, dims, device, *sizes)
        peak = apart(device, peak_of, steps, device)
        way = f"{M} streams, {f'--targets {targets}' if targets else 'all pairs'}"
        found[way] = {"ms a stream": ms / M, "peak MB a stream": peak and peak / M}
    yield ("one training step, a stream: width 512, batch 256, L 4096, k 32; many streams rebuild "
           f"each other by two, {device}"), found


def bench_rows(device):
    """Peak memory of training and evaluating on memory-mapped folders of float16 rows, and of
    extracting tokens into such a folder, and into one file."""
    found, tokens = {}, {}
    for rows in (40_000, 400_000):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            for s, d in (("dino", 1024), ("clip_img", 768), ("clip_txt", 768)):
                out = np.lib.format.open_memmap(f"{folder}/{s}.npy", "w+", np.float16, (rows, d))
                for block in np.array_split(out, -(-rows // 4096)):
                    block[:] = rng.standard_normal(block.shape, np.float32)
            np.save(pathlib.Path(folder, "labels.npy"), rng.integers(0, 20, rows))
            found[f"{rows:,} rows"] = apart("cpu", watched, train_on_rows, folder)
    yield ("300 steps and an evaluation on a memory-mapped folder of float16, "
           "widths 1024 + 768 + 768, L 8192, k 64; memory is RssAnon"), found
    for n, out in itertools.product((1000, 4000), ("a folder", "one.npz")):
        with tempfile.TemporaryDirectory() as folder:
            judge.save_picture(f"{folder}/a.png", Image.new("RGB", (128, 128), "plum"))
            judge.write_npz(f"{folder}/list.npz", {"images": np.repeat("a.png", n)})
            tokens[f"{n:,} pictures, {out}"] = apart("cpu", watched, repsae.main, [
                "extract", "--images", f"{folder}/list.npz", "--weights", "vit_micro", "--size",
                "128", "--tokens", "--out", f"{folder}/{out}"])
    yield "extract: 256 tokens of width 96 of each picture, 49 KB; memory is RssAnon", tokens


def watched(function, *args):
    """Peak RssAnon in MB of this process while function(*args) runs, and seconds."""
    peak, began = [0.], time.time()
    threading.Thread(target=watch_memory, args=[peak], daemon=True).start()
    function(*args)
    return {"peak MB": round(peak[0]), "seconds": time.time() - began}


def train_on_rows(folder, n_steps=300):
    """Train and judge on a folder."""
    features = data.read_features(folder)
    model = sae.SPARC(features.dims, 8192, 64)
    batches = data.Batches(features.rows("train"), 256, 0)
    sae.fit(model, lambda step: features.batch(batches.rows(step)), n_steps)
    repsae.measure(model, features, repsae.parse(["eval", "none"])[1].replaced({"seed": 0}))


# -- the selective scan -----------------------------------------------------------------------

def loop_scan(u, delta, A, B, C):
    """The recurrence over `unbind` and `stack`, its gradient left to autograd: the plain way."""
    h, y = u.new_zeros(u.shape[0], *A.shape), []
    for u_t, d_t, B_t, C_t in zip(*(v.unbind(1) for v in (u, delta, B, C))):
        h = torch.exp(d_t.unsqueeze(-1) * A) * h + (d_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1)
        y.append((h @ C_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, 1)


def parallel_scan(a, b):
    """h_t = a_t h_{t-1} + b_t over dimension 1 of (B, L, D, N), by halves (Blelloch 1990):
    L/2 pairs at once, then L/4, ..."""
    if a.shape[1] == 1:
        return b
    even = a.shape[1] - a.shape[1] % 2
    a1, b1, a2, b2 = a[:, 0:even:2], b[:, 0:even:2], a[:, 1:even:2], b[:, 1:even:2]
    odd_h = parallel_scan(a1 * a2, torch.addcmul(b2, a2, b1))  # h_1, h_3, ...
    h = torch.empty_like(b)
    h[:, 1:even:2] = odd_h
    h[:, 0] = b[:, 0]
    later = slice(2, None, 2)
    h[:, later] = torch.addcmul(b[:, later], a[:, later], odd_h[:, :h[:, later].shape[1]])
    return h


def textbook_scan(u, delta, A, B, C):
    """The scan by `parallel_scan`, forward and (reversed in time) backward: all states at once."""
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            h = parallel_scan(a, b)
            ctx.save_for_backward(a, h)
            return h

        @staticmethod
        def backward(ctx, g):
            a, h = ctx.saved_tensors
            later = torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:].flip(1)], 1)
            g = parallel_scan(later, g.flip(1)).flip(1)  # g_t + a_{t+1} g_{t+1}
            return torch.cat([torch.zeros_like(h[:, :1]), g[:, 1:] * h[:, :-1]], 1), g
    h = Scan.apply(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    return (h @ C.unsqueeze(-1)).squeeze(-1)


def scan_contenders(size, device):
    """dict name -> function that makes (forward, forward and backward), functions of nothing, on
    random inputs of one size (B, L, D, N)."""
    b, L, D, N = size
    g = torch.Generator().manual_seed(0)
    u, z, gy, delta = (torch.randn(b, L, D, generator=g).to(device) for _ in range(4))
    B, C = (torch.randn(b, L, N, generator=g).to(device) for _ in range(2))
    A = -torch.arange(1., N + 1, device=device).repeat(D, 1)
    skip, bias = torch.ones(D, device=device), torch.zeros(D, device=device)
    inputs = [v.requires_grad_() for v in (u, delta / 2 - 3, A, B, C, skip, z, bias)]

    def whole(core):
        """Around a bare scan what selective_scan does around its own."""
        return lambda u, delta, A, B, C, skip, z, bias: F.silu(z) * (
            core(u, F.softplus(delta + bias), A, B, C) + skip * u)

    def both(scan):
        return lambda: (torch.no_grad()(lambda: scan(*inputs)),
                        lambda: torch.autograd.grad(scan(*inputs), inputs, gy))

    def ours(backend):
        return both(functools.partial(ssm.selective_scan, backend=backend))
    found = {"loop over slices (reference)": ours("reference"),
             "loop over unbind, autograd": both(whole(loop_scan)),
             "parallel scan (Blelloch)": both(whole(textbook_scan)), "torch (ours)": ours("torch")}
    if ssm.native() and ssm.native().serves(u, N):
        found["native (ours)"] = ours("native")
    return found


def memory_of(contenders, small, size, device, name, which):
    """MB that one forward (which 0), or one with its backward (1), of a contender needs."""
    contenders(small, device)[name]()[which]()               # what starts but once is not its own
    return peak_of(contenders(size, device)[name]()[which], device)


def bench_scan(device):
    """Ways to compute a selective scan, with softplus, skip and gate, beside exp of an array."""
    for size in ((8, 197, 384, 16), (2, 1024, 384, 16), (1, 4096, 384, 16)):
        b, L, D, N = size
        ready = -torch.rand(*size, device=device)
        out = torch.empty_like(ready)
        floor = median_ms(lambda: torch.exp(ready, out=out), device)  # no scan does without it
        rate = 2 * ready.nbytes / median_ms(lambda: out.copy_(ready), device) / 1e6
        ways = {"exp alone": {"forward ms": floor, "forward / exp": 1.}}
        moved = 4 * (4 * b * L * D + 2 * b * L * N)          # bytes: u, delta, z, y, B, C
        for name, make in scan_contenders(size, device).items():
            forward, both = make()
            ms = median_ms(forward, device)
            ways[name] = {"forward ms": ms, "forward / exp": ms / floor,
                          "forward GB/s": moved / ms / 1e6}
            if "slices" in name and L > 1024:                # its gradient grows with L^2: minutes
                continue
            full = median_ms(both, device)
            mb = apart(device, memory_of, scan_contenders, (1, 64, 8, 4), size, device, name, 1)
            ways[name] |= {"forward+backward ms": full, "f+b / exp": full / floor, "peak MB": mb}
        yield (f"selective scan: B {b}, L {L}, D {D}, N {N}, float32, {device}; "
               f"copying memory: {rate:.0f} GB/s"), ways


# -- backbones --------------------------------------------------------------------------------

def backbone_contenders(side, device):
    """dict name -> function that makes (forward, forward and backward) of an image of that side."""
    # gradients of far tokens fall below the smallest normal number, which slows CPUs down
    torch.set_flush_denormal(True)

    def both(make, backend="torch", keep=False):
        torch.manual_seed(0)
        model, x = make().to(device), torch.randn(1, 3, side, side, device=device)
        for part in model.modules():
            if isinstance(part, ssm.Attention):
                part.keep = keep
            if isinstance(part, ssm.Mixer):
                part.backend = backend
        return torch.no_grad()(lambda: model(x)), lambda: model(x).sum().backward()
    found = {"ViT-tiny, fused attention": functools.partial(both, ssm.vit_tiny),
             "ViT-tiny, attention matrix": functools.partial(both, ssm.vit_tiny, keep=True)}
    compiled = ssm.native() and ssm.native().serves(torch.zeros(1, device=device), 16)
    for backend in ("reference", "torch", *["native"] * bool(compiled)):
        found[f"Vim-tiny, {backend}"] = functools.partial(both, ssm.vim_tiny, backend=backend)
    return found


def bench_backbones(device):
    """ViT-tiny against Vim-tiny, one image of growing size."""
    for side in (224, 384, 512, 768, 1024):
        tokens, ways = (side // 16) ** 2, {}
        for name, make in backbone_contenders(side, device).items():
            repsae.say(f"{tokens} tokens: {name}")
            slow = "reference" in name and tokens > 196      # its gradient grows with their square
            ways[name], directions = {}, ["forward", *["forward + backward"] * (not slow)]
            for i, (what, go) in enumerate(zip(directions, make())):
                ways[name][f"{what}, ms"] = median_ms(go, device, 5)
                ways[name][f"{what}, MB"] = apart(device, memory_of, backbone_contenders, 64, side,
                                                  device, name, i)
        yield f"{tokens} tokens, one image, float32, {device}", ways


def bench_page(device):
    """The largest page that is promised, 2,000 samples with pictures."""
    rng, n, L, k = np.random.default_rng(0), 2000, 8192, 64
    pixels = rng.integers(256, size=(n, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    features = data.Features({"s0": np.zeros((n, 1))}, labels=rng.integers(10, size=n),
                             about={"images": pixels, "ids": np.arange(n)})
    alone, joint = (rng.integers(1, L // k, (m, n, k)).cumsum(2) for m in (6, 1))
    codes = {mode: {f"s{s}": judge.sparse_code(at[s % len(at)], rng.gamma(2, size=(n, k)), L)
                    for s in range(6)} for mode, at in (("alone", alone), ("joint", joint))}
    run = {"codes": codes, "dictionary": dict.fromkeys(codes["alone"], np.eye(L, 64)), "names": ()}
    page, began = judge.Page("the largest page"), time.perf_counter()
    page.explore(payload := judge.explorer(features, np.arange(n), {"": run}, n))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "report.html")
        page.write(lambda name: path)
        found = {"MB": path.stat().st_size / 1e6, "s to write": time.perf_counter() - began,
                 "samples shown": len(payload["texts"]["ids"])}                       # by room
        _, said, opened = test_page.browse(path, ["latent=17"])
    assert not said, said
    yield "report.html of 6 streams, L 8192, k 64", {"page": {**found, "s to open": opened / 1000}}


BENCHES = {"sparc": bench_sparc, "page": bench_page, "rows": bench_rows, "scan": bench_scan,
           "backbones": bench_backbones}


def run(what, device):
    """Measure and print `what` ("all" or one of BENCHES); returns every figure by title."""
    found = {"versions": repsae.versions()}
    for bench in BENCHES if what == "all" else [what]:
        found[bench] = {}
        for title, ways in BENCHES[bench](device):
            found[bench][title] = ways
            columns = list(dict.fromkeys(key for figures in ways.values() for key in figures))
            rows = [[name, *map(figures.get, columns)] for name, figures in ways.items()]
            print(f"\n{title}\n{judge.text_table(['', *columns], rows)}")
    return found
