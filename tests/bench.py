"""Speed and memory: what `python repsae.py bench` runs. Contenders first, then what is measured of them, then the tables.

The slow contenders (the authors' dense step, loops and a parallel scan in plain PyTorch) compute what ours do: test_repsae.
"""
import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import eval as judge
import repsae
import sae
import ssm


def dense_step(model, optimiser, x):
    """A training step as the authors' code does it: dense codes, M^2 dense decoders, renormalise, project, Adam.

    Without AuxK, which their code computes in every step, dead latents or not: that is left out in their favour.
    """
    optimiser.zero_grad()
    sae.dense_loss(model, x).backward()
    sae.renormalise(model)
    sae.project_gradient(model)
    optimiser.step()


def contender(kind, dims, device, batch=256, latents=8192, k=64):
    """A function that takes one training step of a `kind`, on one random batch of the thesis's size."""
    g = torch.Generator().manual_seed(0)
    x = {s: torch.nn.functional.normalize(torch.randn(batch, d, generator=g)).to(device) for s, d in dims.items()}
    model = sae.SPARC(dims, latents, k, select="bf16" if kind == "bf16" else "fp32").to(device).train()
    if kind == "dense":                                      # with its defaults, as the authors call it
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    else:
        optimiser = sae.make_optimiser(model)
    step = {"phases": phases, "dense": dense_step, "dense fused": dense_step}.get(kind, sae.train_step)

    def run():
        result = step(model, optimiser, x)
        if device != "cpu":
            torch.cuda.synchronize()
        return result
    return run


def phases(model, optimiser, x):
    """Take one training step with a stopwatch on its parts: dict phase -> seconds."""
    spent = {}

    def watch(owner, name, phase):
        inner = getattr(owner, name)

        def timed(*args, **kw):
            began = time.perf_counter()
            result = inner(*args, **kw)
            spent[phase] = spent.get(phase, 0) + time.perf_counter() - began
            return result
        setattr(owner, name, timed)
        return lambda: setattr(owner, name, inner)
    undo = [watch(*where) for where in (
        (model, "_support", "choose"), (model, "loss", "forward"), (torch.Tensor, "backward", "backward"),
        (sae, "project_gradient", "project"), (optimiser, "step", "adam"), (sae, "renormalise", "renormalise"),
        (sae, "_count_idle", "count dead"))]
    sae.train_step(model, optimiser, x)
    for restore in undo:
        restore()
    spent["forward"] -= spent["choose"]                      # the loss does the choosing
    return spent


def step_memory(kind, dims, device):
    """Peak memory (MB) of a process that does nothing but three training steps."""
    with judge.PeakMemory() as peak:
        step = contender(kind, dims, device)
        for _ in range(3):
            step()
    return round(peak.mb)


def bench_sparc(dims, rounds, device):
    """Time and memory of a training step, sparse against dense, steps of all kinds taking turns. Returns plain figures."""
    steps = {kind: contender(kind, dims, device) for kind in ("sparse", "bf16", "dense", "dense fused")}
    times = {kind: [] for kind in steps}
    for i in range(rounds + 1):
        for kind, step in steps.items():
            began = time.perf_counter()
            step()
            if i:                                            # the first is a warm-up
                times[kind].append(1000 * (time.perf_counter() - began))
    ms = {kind: statistics.median(v) for kind, v in times.items()}
    del steps, step
    apart = contender("phases", dims, device)
    apart = [apart() for _ in range(rounds + 2)][2:]
    return {"streams": dims, "step_ms": round(ms["sparse"], 1), "bf16_step_ms": round(ms["bf16"], 1),
            "dense_step_ms": round(ms["dense"], 1), "dense_fused_step_ms": round(ms["dense fused"], 1),
            "ratio": round(ms["dense"] / ms["sparse"], 2), "fused_ratio": round(ms["dense fused"] / ms["sparse"], 2),
            "phase_ms": {name: round(1000 * statistics.median(p[name] for p in apart), 1) for name in apart[0]},
            "peak_mb": judge.in_child(step_memory, "sparse", dims, device),
            "dense_peak_mb": judge.in_child(step_memory, "dense", dims, device)}


def bench_rows(rows):
    """Peak memory of some hundred training steps and an evaluation on a memory-mapped folder of `rows` float16 rows."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for s, d in (("dino", 1024), ("clip_img", 768), ("clip_txt", 768)):
            out = np.lib.format.open_memmap(repsae.out_path(folder, f"{s}.npy"), "w+", np.float16, (rows, d))
            for start in range(0, rows, 4096):
                out[start:start + 4096] = rng.standard_normal((min(4096, rows - start), d), np.float32)
            del out
        np.save(repsae.out_path(folder, "labels.npy"), rng.integers(0, 20, rows))
        split = np.full(rows, "train", "<U5")
        split[rng.permutation(rows)[:rows // 5]] = "test"
        np.save(repsae.out_path(folder, "split.npy"), split)
        return judge.in_child(train_on_rows, folder)


def train_on_rows(folder, n_steps=300):
    """Train and judge on a folder, in a process of its own: its rows, peak RssAnon in MB, and seconds by phase."""
    with judge.PeakMemory() as peak:
        marks = [time.time()]
        features = data.read_features(folder)
        marks.append(time.time())
        model = sae.SPARC(features.dims, repsae.MODEL["latents"][0], repsae.MODEL["k"][0])
        batches = data.Batches(features.rows("train"), 256, 0)
        sae.fit(model, lambda step: features.batch(batches.rows(step)), n_steps)
        marks.append(time.time())
        flags = {k.replace("-", "_"): v[0] for k, v in repsae.RUN.items()}
        repsae.measure(model, features, repsae.Flags({**flags, "seed": 0}))
        marks.append(time.time())
    seconds = [round(b - a, 1) for a, b in zip(marks, marks[1:])]
    return {"rows": len(features), "data_mb": round(sum(x.nbytes for x in features.streams.values()) / 2 ** 20),
            "peak_mb": round(peak.mb), **dict(zip(("read_s", "train_s", "evaluate_s"), seconds))}


def loop_scan(u, delta, A, B, C):
    """The recurrence over `unbind` and `stack`, its gradient left to autograd: the plain way to write it well."""
    h, y = u.new_zeros(u.shape[0], *A.shape), []
    for u_t, d_t, B_t, C_t in zip(*(v.unbind(1) for v in (u, delta, B, C))):
        h = torch.exp(d_t.unsqueeze(-1) * A) * h + (d_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1)
        y.append((h @ C_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, 1)


def parallel_scan(a, b):
    """h_t = a_t h_{t-1} + b_t over dimension 1 of (B, L, D, N), by halves (Blelloch 1990): L/2 pairs at once, then L/4, ..."""
    if a.shape[1] == 1:
        return b
    even = a.shape[1] - a.shape[1] % 2
    a1, b1, a2, b2 = a[:, 0:even:2], b[:, 0:even:2], a[:, 1:even:2], b[:, 1:even:2]
    odd_h = parallel_scan(a1 * a2, torch.addcmul(b2, a2, b1))                               # h_1, h_3, ...
    h = torch.empty_like(b)
    h[:, 1:even:2] = odd_h
    h[:, 0] = b[:, 0]
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], odd_h[:, :h[:, 2::2].shape[1]])
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
            g = parallel_scan(later, g.flip(1)).flip(1)                                     # g_t + a_{t+1} g_{t+1}
            return torch.cat([torch.zeros_like(h[:, :1]), g[:, 1:] * h[:, :-1]], 1), g
    h = Scan.apply(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    return (h @ C.unsqueeze(-1)).squeeze(-1)


def scan_contenders(size, device):
    """dict name -> (forward, forward and backward), functions of nothing, on random inputs of one size (B, L, D, N)."""
    b, L, D, N = size
    g = torch.Generator().manual_seed(0)
    u, z, gy, delta = (torch.randn(b, L, D, generator=g).to(device) for _ in range(4))
    B, C = (torch.randn(b, L, N, generator=g).to(device) for _ in range(2))
    A = -torch.arange(1., N + 1, device=device).repeat(D, 1)
    skip, bias = torch.ones(D, device=device), torch.zeros(D, device=device)
    inputs = [v.requires_grad_() for v in (u, delta / 2 - 3, A, B, C, skip, z, bias)]

    def whole(core):
        """Around a bare scan what selective_scan does around its own."""
        def run(u, delta, A, B, C, skip, z, bias):
            return (core(u, F.softplus(delta + bias), A, B, C) + skip * u) * F.silu(z)
        return run

    def both(scan):
        def forward():
            with torch.no_grad():
                return scan(*inputs)
        return forward, lambda: torch.autograd.grad(scan(*inputs), inputs, gy)
    backends = {name: functools.partial(ssm.selective_scan, backend=name) for name in ("reference", "torch", "native")}
    found = {"loop over slices (reference)": both(backends["reference"]),
             "loop over unbind, autograd": both(whole(loop_scan)),
             "parallel scan (Blelloch)": both(whole(textbook_scan)), "torch (ours)": both(backends["torch"])}
    if ssm.native() and ssm.native().serves(u, N):
        found["native (ours)"] = both(backends["native"])
    return found


def apart(device, function, *args):
    """On the CPU in a process of its own, whose memory is its own; a GPU counts by itself."""
    return judge.in_child(function, *args) if device == "cpu" else function(*args)


def scan_memory(size, device, name):
    """MB that one forward and backward of a contender needs."""
    scan_contenders((1, 64, 8, 4), device)[name][1]()        # what is loaded and started but once is not the scan's
    return judge.round_or_none(judge.peak_of(scan_contenders(size, device)[name][1], device))


def bench_scan(device):
    """Ways to compute a selective scan, with softplus, skip and gate, against exp of a ready (B, L, D, N) array."""
    results = []
    for size in ((8, 197, 384, 16), (2, 1024, 384, 16), (1, 4096, 384, 16)):
        ready = -torch.rand(*size, device=device)
        out = torch.empty_like(ready)
        floor = judge.median_ms(lambda: torch.exp(ready, out=out), device)
        rate = 2 * ready.nbytes / judge.median_ms(lambda: out.copy_(ready), device) / 1e6         # GB/s
        del ready, out
        r = {"B, L, D, N": size, "exp_ms": floor, "copy_gb_s": rate, "ways": {}}
        moved = (4 * size[0] * size[1] * size[2] + 2 * size[0] * size[1] * size[3]) * 4     # bytes: u, delta, z, y, B, C
        for name, (forward, both) in scan_contenders(size, device).items():
            ms = judge.median_ms(forward, device)
            slow = "slices" in name and size[1] > 1024       # its gradient grows with L^2: minutes
            full = None if slow else judge.median_ms(both, device)
            memory = None if slow else apart(device, scan_memory, size, device, name)
            r["ways"][name] = {"forward_ms": ms, "both_ms": full, "forward_ratio": ms / floor,
                               "both_ratio": full and full / floor, "peak_mb": memory, "forward_gb_s": moved / ms / 1e6}
        results.append(r)
    return results


def print_scan(results, device):
    """`bench_scan`'s figures as a table for each size; on a GPU with the rate of memory moved."""
    for r in results:
        b, L, D, N = r["B, L, D, N"]
        print(f"\nB {b}, L {L}, D {D}, N {N}, float32, {device}; copying memory: {r['copy_gb_s']:.0f} GB/s")
        gpu = [] if device == "cpu" else ["forward GB/s"]
        header = ["selective scan", "forward ms", "forward+backward ms", "forward / exp", "f+b / exp", "peak MB", *gpu]
        rows = [["exp alone", r["exp_ms"], None, 1., None, None, *[None for _ in gpu]]]
        columns = ["forward_ms", "both_ms", "forward_ratio", "both_ratio", "peak_mb", *("forward_gb_s" for _ in gpu)]
        rows += [[name, *(w[k] for k in columns)] for name, w in r["ways"].items()]
        print(judge.text_table(header, rows))


def backbone_contenders(device):
    """dict name -> function(side) -> (forward, forward and backward) of one image of that side."""
    # The gradients of tokens far from the class token fall below the smallest normal number, which slows CPUs down.
    torch.set_flush_denormal(True)

    def both(make, side, backend="torch", keep=False):
        torch.manual_seed(0)
        model, x = make().to(device), torch.randn(1, 3, side, side, device=device)
        for part in model.modules():
            if isinstance(part, ssm.Attention):
                part.keep = keep
            if isinstance(part, ssm.Mixer):
                part.backend = backend

        def forward():
            with torch.no_grad():
                model(x)
        return forward, lambda: model(x).sum().backward()
    found = {"ViT-tiny, fused attention": functools.partial(both, ssm.vit_tiny),
             "ViT-tiny, attention matrix": functools.partial(both, ssm.vit_tiny, keep=True)}
    compiled = ssm.native() and ssm.native().serves(torch.zeros(1, device=device), 16)
    for backend in ("reference", "torch", "native") if compiled else ("reference", "torch"):
        found[f"Vim-tiny, {backend}"] = functools.partial(both, ssm.vim_tiny, backend=backend)
    return found


def backbone_memory(side, device, name, training):
    """MB that one forward, or with `training` forward and backward, needs beyond the model."""
    make = backbone_contenders(device)[name]
    make(64)[training]()
    return judge.round_or_none(judge.peak_of(make(side)[training], device))


def bench_backbones(device):
    """ViT-tiny against Vim-tiny, one image of growing size: figures per number of tokens."""
    results = []
    for side in (224, 384, 512, 768, 1024):
        tokens = (side // 16) ** 2
        r = {"tokens": tokens, "models": {}}
        for name, make in backbone_contenders(device).items():
            repsae.say(f"{tokens} tokens: {name}")
            forward, training = make(side)
            r["models"][name] = found = {"forward_ms": judge.median_ms(forward, device, 5)}
            slow = "reference" in name and tokens > 196      # gradients of slices grow with the square of the tokens
            if not slow:
                found["both_ms"] = judge.median_ms(training, device, 5)
            for i, key in enumerate(("forward_mb", "both_mb")[:1 if slow else 2]):
                found[key] = apart(device, backbone_memory, side, device, name, i)
        results.append(r)
    return results


def print_backbones(results, device, svg):
    """`bench_backbones`' figures as tables against tokens, and as charts in the file `svg`, if named."""
    names, tokens, pictures = list(results[0]["models"]), [r["tokens"] for r in results], []
    for key, title in (("forward_ms", "forward, ms"), ("both_ms", "forward + backward, ms"),
                       ("forward_mb", "peak memory of forward, MB"), ("both_mb", "peak memory of forward + backward, MB")):
        values = {name: [r["models"].get(name, {}).get(key) for r in results] for name in names}
        print(f"\n{title}; one image, float32, {device}")
        header, curves = list(map(str, tokens)), {name: list(enumerate(v)) for name, v in values.items()}
        print(judge.text_table(["tokens", *header], [
            [name, *(x and f"{x:,.{0 if x >= 100 else 1}f}" for x in v)] for name, v in values.items()]))
        pictures.append(judge.svg_lines(curves, "tokens", title, header, log=True))
    if svg:
        judge.write_text(svg, judge.standalone_svg(*pictures))
        repsae.say(f"wrote {svg}")


def print_sparc(r, device, threads):
    """One size of `bench_sparc`: the contenders as a table, and our step by phase."""
    print(f"\nM = {len(r['streams'])} streams, {sum(r['streams'].values())} dimensions in all, batch 256, L 8192, k 64, "
          f"{threads} threads, {device}")
    print(judge.text_table(["one training step", "ms", "times ours", "peak MB"], [
        ["sparse (ours)", r["step_ms"], 1., r["peak_mb"]],
        ["sparse, --select bf16", r["bf16_step_ms"], r["bf16_step_ms"] / r["step_ms"], None],
        ["dense, Adam's defaults (the authors' way)", r["dense_step_ms"], r["ratio"], r["dense_peak_mb"]],
        ["dense, fused Adam", r["dense_fused_step_ms"], r["fused_ratio"], None]]))
    total = sum(r["phase_ms"].values())
    print("ours by phase: " + ", ".join(f"{name} {ms:.0f} ms ({100 * ms / total:.0f} %)"
                                        for name, ms in r["phase_ms"].items()))


def run(what, device, svg=None):
    """Measure and print `what` ("all", "sparc", "rows", "scan" or "backbones"); returns every figure."""
    found, everything = {"versions": repsae.versions()}, what == "all"
    if everything or what == "sparc":
        found["sparc"] = []
        for dims, rounds in (({"dino": 1024, "clip_img": 768, "clip_txt": 768}, 9), ({f"s{i}": 768 for i in range(10)}, 3)):
            found["sparc"].append(bench_sparc(dims, rounds, device))
            print_sparc(found["sparc"][-1], device, found["versions"]["threads"])
    if everything or what == "rows":
        found["rows"] = [bench_rows(n) for n in (40_000, 400_000)]
        print("\n300 steps and an evaluation on a memory-mapped folder of float16, widths 1024 + 768 + 768, L 8192, k 64")
        columns = ["data_mb", "peak_mb", "read_s", "train_s", "evaluate_s"]
        print(judge.text_table(["rows", "data MB", "peak MB (RssAnon)", "read s", "train s", "evaluate s"],
                               [[f"{r['rows']:,}", *(r[c] for c in columns)] for r in found["rows"]]))
    if everything or what == "scan":
        found["scan"] = bench_scan(device)
        print_scan(found["scan"], device)
    if everything or what == "backbones":
        found["backbones"] = bench_backbones(device)
        print_backbones(found["backbones"], device, svg)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    for name in ("--device", "--svg", "--json"):
        parser.add_argument(name)
    flags = parser.parse_args()
    figures = run(flags.what, flags.device, flags.svg)
    if flags.json:
        judge.write_json(flags.json, figures)
