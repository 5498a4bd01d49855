"""Claims about ssm.py, held against the textbook recurrence, closed forms, and the authors' own outputs and gradients."""
import argparse
import copy
import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension

import ssm
from ssm import InputError, selective_scan

BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(ssm.native() is None, reason="the native scan cannot be built here"))]


def arguments(B=2, L=7, D=6, N=3, G=0, dtype=torch.float64, z=True, seed=0, steps=1.):
    """Random inputs of a scan by name; `steps` scales delta."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)
    weights = (B, L, G, N) if G else (B, L, N)
    out = {"u": r(B, L, D), "delta": steps * r(B, L, D), "A": -torch.exp(r(D, N)), "B": r(*weights), "C": r(*weights), "D": r(D), "delta_bias": r(D)}
    return {**out, "z": r(B, L, D)} if z else out


def same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def same_in_scale(found, expected, tolerance):
    """As `same`, with the largest expected value as the unit: gradients are sums of many terms."""
    scale = expected.abs().max().clamp_min(1e-3)
    same(found / scale, expected / scale, tolerance)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """The torch backend takes as many tokens at a time as fit its budget: here as few as it can, so that chunks join."""
    monkeypatch.setattr(ssm, "CHUNK", 1)


# -- the scan ----------------------------------------------------------------------------------------------------------

def tokens_first(v):
    """The authors' (B, D, L), (B, N, L) or (B, G, N, L) to ours."""
    return torch.from_numpy(v).movedim(-1, 1)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_outputs_states_and_gradients_are_the_authors(backend, golden):
    z, cfg = golden("scan")
    assert len(cfg["cases"]) >= 6
    for case, about in cfg["cases"].items():
        x = {k: torch.from_numpy(z[f"in.{case}.{k}"]) if k in ("A", "D", "delta_bias") else tokens_first(z[f"in.{case}.{k}"]) for k in about["present"]}
        x = {k: v.clone().requires_grad_() for k, v in x.items()}
        y, h = selective_scan(**x, softplus=about["softplus"], backend=backend, last_state=True)
        same(y, tokens_first(z[f"out.{case}.y"]), 1e-5)
        same(h, torch.from_numpy(z[f"out.{case}.last_state"]), 1e-5)
        found = torch.autograd.grad((y * tokens_first(z[f"in.{case}.g"])).sum(), x.values())
        for (k, v), g in zip(x.items(), found):
            expected = z[f"grad.{case}.{k}"]
            expected = torch.from_numpy(expected) if k in ("A", "D", "delta_bias") else tokens_first(expected)
            same_in_scale(g, expected, 1e-5)


def test_the_reference_is_the_recurrence_done_by_hand_for_one_state():
    u, delta, a, b, c = 2., 0.5, -3., 0.7, 1.1
    x = {"u": torch.full((1, 3, 1), u), "delta": torch.full((1, 3, 1), delta), "A": torch.full((1, 1), a), "B": torch.full((1, 3, 1), b),
         "C": torch.full((1, 3, 1), c)}
    y = selective_scan(**x, softplus=False, backend="reference")[0, :, 0]
    decay, step = np.exp(delta * a), delta * b * u
    same(y.double(), c * step * torch.tensor([1, 1 + decay, 1 + decay + decay ** 2]).double(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, ssm.CHUNK])
@pytest.mark.parametrize("seed", range(6))
def test_backends_agree_with_the_reference_over_random_shapes(backend, chunk, seed, monkeypatch):
    monkeypatch.setattr(ssm, "CHUNK", chunk)
    g = np.random.default_rng(seed)
    E, G = int(g.integers(1, 90)), int(g.integers(0, 4))
    shape = {"B": int(g.integers(1, 4)), "L": [1, 31, 32, 33, 64, 197][seed], "D": E * max(G, 1), "N": [1, 16, 3, 8, 1, 5][seed], "G": G}
    x = {k: v.requires_grad_() for k, v in arguments(**shape, dtype=torch.float32, z=bool(seed % 2), seed=seed).items()}
    gy = torch.randn(shape["B"], shape["L"], shape["D"])
    runs = {}
    for name in ("reference", backend):
        y, h = selective_scan(**x, backend=name, last_state=True)
        runs[name] = (y, h, *torch.autograd.grad((y * gy).sum() + h.sum(), x.values()))
    for a, b in zip(runs[backend], runs["reference"]):
        same_in_scale(a, b, 1e-5)


@pytest.mark.parametrize("G", [0, 2])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradcheck_for_every_input(backend, G):
    x = arguments(B=1, L=5, D=4, N=2, G=G)
    names = list(x)

    def f(*values):
        return selective_scan(**dict(zip(names, values)), backend=backend, last_state=True)
    assert torch.autograd.gradcheck(f, [v.requires_grad_() for v in x.values()])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_long_decay_underflows_to_zero_not_to_nan(backend):
    x = arguments(B=1, L=70, D=4, N=2, dtype=torch.float32, z=False, steps=0)
    x["A"], x["delta_bias"] = torch.full((4, 2), -50.), torch.full((4,), 30.)               # exp(-1500)
    x = {k: v.requires_grad_() for k, v in x.items()}
    y = selective_scan(**x, backend=backend)
    memoryless = 30 * x["u"] * (x["B"] * x["C"]).sum(-1, keepdim=True) + x["D"] * x["u"]
    same(y, memoryless, 1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), x.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_and_chunked_exponential_is_accurate_over_its_whole_range(backend):
    """One token, C = 1: the state after a second token that brings nothing is exp(delta A)."""
    exponent = torch.linspace(-86, 3, 4096)
    L2 = torch.stack([torch.ones(4096), torch.zeros(4096)])[None]
    one = torch.ones(1, 2, 1)
    delta = torch.stack([torch.ones(4096), exponent.abs()])[None]
    y = selective_scan(L2, delta, torch.sign(exponent)[:, None], one, one, softplus=False, backend=backend)
    error = (y[0, 1].double() / torch.exp(exponent.abs() * torch.sign(exponent)).double() - 1).abs()
    assert error.max() < 1e-6


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory):
    """csrc/selective_scan.cu compiled as C++ against tests/cuda_on_cpu/cuda_runtime.h, which runs a block's threads in turn."""
    if shutil.which("g++") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    tests, out = pathlib.Path(__file__).parent, tmp_path_factory.mktemp("cuda") / "scan.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{tests / 'cuda_on_cpu'}", "-x", "c++",
                    str(tests.parent / "csrc" / "selective_scan.cu"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("shape", [dict(B=2, L=70, D=20, N=16), dict(B=1, L=32, D=12, N=3, G=2), dict(B=1, L=33, D=70, N=1, G=2), dict(B=1, L=5, D=9, N=20)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_cuda_kernels_compute_the_reference_when_run_on_the_cpu(cuda_on_cpu, shape, whole):
    """Their logic, not their speed nor what only a GPU can show: with and without z and softplus."""
    x = {"z": None, **arguments(**{"G": 1, **shape}, dtype=torch.float32, z=whole)}
    if not whole:
        x.update(D=torch.zeros(shape["D"]), delta_bias=torch.zeros(shape["D"]), delta=x["delta"].abs())
    (b, L, D), N, G, wanted = x["u"].shape, shape["N"], shape.get("G", 1), [v.requires_grad_() for v in x.values() if v is not None]
    y, h = selective_scan(**x, softplus=whole, backend="reference", last_state=True)
    gy, gh = torch.randn_like(y), torch.randn_like(h)
    expected = dict(zip([k for k, v in x.items() if v is not None], torch.autograd.grad((y * gy).sum() + (h * gh).sum(), wanted)))
    chunks, blocks = -(-L // cuda_on_cpu.scan_cuda_chunk()), -(-(D // G) // cuda_on_cpu.scan_cuda_block(N))

    def call(function, *tensors):
        function(b, L, D, G, N, ctypes.c_bool(whole), *(ctypes.c_void_p(v.data_ptr() if v is not None else None) for v in tensors), None)

    def empty(*shape):
        return torch.full(shape, float("nan"))
    inputs = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out = empty(b, L, D), empty(b, D, N), empty(b, chunks, D, N)
    call(cuda_on_cpu.scan_forward_cuda, *inputs, *out)
    same(out[0], y.detach(), 1e-5)
    same(out[1], h.detach(), 1e-5)
    du, ddelta, dz, dA, dD = empty(b, L, D), empty(b, L, D), empty(b, L, D), empty(b, D, N), empty(b, D)
    dB, dC = empty(b, L, G, blocks, N), empty(b, L, G, blocks, N)
    call(cuda_on_cpu.scan_backward_cuda, *inputs, out[2], gy, gh, du, ddelta, dA, dB, dC, dD, dz if whole else None)
    found = {"u": du, "delta": ddelta, "z": dz, "A": dA.sum(0), "B": dB.sum(3), "C": dC.sum(3), "D": dD.sum(0), "delta_bias": ddelta.sum((0, 1))}
    for name, value in expected.items():
        same_in_scale(found[name], value, 1e-5)
    assert cuda_on_cpu.scan_cuda_block(33) == 0


def test_memory_of_the_torch_backend_does_not_grow_with_the_state():
    kept = {}
    for backend in ("reference", "torch"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, lambda v: v):
            selective_scan(**{k: v.requires_grad_() for k, v in arguments(B=1, L=256, D=8, N=32, z=False).items()}, backend=backend).sum()
        kept[backend] = sum(sizes)
    assert kept["torch"] < 16 * 256 * 8 < 32 * 256 * 8 < kept["reference"]


def test_bfloat16_autocast_keeps_the_state_in_float32():
    x = {k: v for k, v in arguments(B=2, L=100, D=8, N=4, dtype=torch.float32).items()}
    exact = selective_scan(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**x), exact)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    y, h = selective_scan(**half, last_state=True)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert (y.float() - exact).norm() / exact.norm() < 3e-2


def test_build_says_in_one_line_that_there_is_no_compiler(capsys, monkeypatch):
    def absent(verbose):
        raise OSError("Error compiling: no c++ here\nmore")
    monkeypatch.setattr(ssm, "build_native", absent)
    assert ssm.native.__wrapped__() is None
    said = capsys.readouterr().err
    assert "cannot be built (Error compiling: no c++ here) - it needs ninja" in said
    assert said.count("\n") == 1


def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_living_one_waited_for(
        tmp_path, capsys, monkeypatch):
    """A build is killed while it holds torch's lock; another lives for a while."""
    program = """
import os, sys, time; sys.path.insert(0, sys.argv[1])
from torch.utils import cpp_extension
import ssm
def load(*args, build_directory, **kw):
    open(os.path.join(build_directory, "lock"), "x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    os.remove(os.path.join(build_directory, "lock"))
cpp_extension.load = load
ssm.build_native()
"""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    here, seen = str(pathlib.Path(ssm.__file__).parent), []

    def begun(seconds):
        builder = subprocess.Popen([sys.executable, "-c", program, here, str(seconds)],
                                   stdout=subprocess.PIPE)
        assert builder.stdout.readline() == b"building\n"
        return builder

    def load(*args, build_directory, **kw):
        seen.append(sorted(os.listdir(build_directory)))
    monkeypatch.setattr(cpp_extension, "load", load)
    with begun(60) as killed:
        killed.kill()
    ssm.build_native()
    assert "a build was killed and left" in capsys.readouterr().err
    with begun(1) as living:
        ssm.build_native()
        assert living.wait() == 0
    assert not capsys.readouterr().err and seen == [["builder"], ["builder"]]


@pytest.mark.parametrize("change, message", [
    ({"u": torch.zeros(2, 6)}, r"u has shape \(2, 6\)"), ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\)"), ({"z": torch.zeros(2, 7, 5)}, "z has shape"),
    ({"C": torch.zeros(2, 7, 4)}, "C has shape"), ({"B": torch.zeros(2, 7, 4, 3), "C": torch.zeros(2, 7, 4, 3)}, "6 channels do not divide into the 4 groups"),
    ({"backend": "cuda"}, "backend='cuda' - use auto")])
def test_wrong_shapes_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        selective_scan(**{**arguments(), **change})


# -- ViT ---------------------------------------------------------------------------------------------------------------

def state(z, prefix="sd."):
    return {k[len(prefix):]: torch.from_numpy(v) for k, v in z.items() if k.startswith(prefix)}


def weight_gradients_are(model, z, prefix):
    for k, v in state(z, prefix).items():
        g = dict(model.named_parameters())[k].grad
        same_in_scale(g, v, 1e-5)


def test_vit_tokens_attention_and_gradients_are_the_authors_at_every_size(golden):
    z, cfg = golden("vit")
    model = ssm.ViT(24, 2, 3, patch=8, size=32)
    model.load_state_dict(state(z))
    model.eval()
    for i, size in enumerate(cfg["sizes"]):
        x = torch.from_numpy(z[f"in.{size}.x"]).requires_grad_()
        grid = tuple(n // 8 for n in x.shape[2:])
        same(model.position(x, grid), torch.from_numpy(z[f"out.{size}.pos"]), 1e-5)
        out, found_grid = model.blocks_out(x, 2)
        assert found_grid == grid
        for j in range(2):
            same(out[j], torch.from_numpy(z[f"out.{size}.inter{j}"]), 1e-5)
        model.zero_grad()
        y = model(x)
        same(y, torch.from_numpy(z[f"out.{size}.cls"]), 1e-5)
        (y * torch.from_numpy(z[f"in.{size}.g"])).sum().backward()
        same(x.grad, torch.from_numpy(z[f"grad.{size}.x"]), 1e-5)
        same(model.pos_embed.grad, torch.from_numpy(z[f"grad.{size}.pos_embed"]), 1e-5)
        if i == 0:
            weight_gradients_are(model, z, "grad.sd.")
        model.blocks[-1].attn.keep = True                    # the slow path gives the same, and shows its probabilities
        same(model(x), y, 1e-5)
        same(model.blocks[-1].attn.kept, torch.from_numpy(z[f"out.{size}.last_attn"]), 1e-5)
        model.blocks[-1].attn.keep = False


def test_kept_attention_carries_its_gradient():
    model = ssm.vit_micro()
    attention = model.blocks[-1].attn
    attention.keep = True
    x = torch.randn(1, 3, 32, 32)
    model(x)[0, 0].backward()
    step, moved = 1e-3 * torch.randn_like(attention.kept), attention.kept.grad
    base, probabilities = model(x)[0, 0].item(), attention.kept.detach()

    class Moved(ssm.Attention):
        def forward(self, x):
            B, T, d = x.shape
            v = self.qkv(x).view(B, T, 3, self.heads, -1)[:, :, 2].transpose(1, 2)
            return self.proj(((probabilities + step) @ v).transpose(1, 2).reshape(B, T, d))
    attention.__class__ = Moved
    assert model(x)[0, 0].item() - base == pytest.approx((moved * step).sum().item(), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("variant", ["plain", "reg", "swiglu"])
def test_dinov2_tokens_and_gradients_are_the_authors(variant, golden):
    z, cfg = golden("dinov2")
    model = ssm.ViT(24, 1, 3, patch=7, size=28, v2=True, registers=4 if variant == "reg" else 0, swiglu=variant == "swiglu")
    model.load_state_dict(state(z, f"sd.{variant}."))
    sizes = [s for s in cfg["sizes"] if f"in.{variant}.{s}.x" in z]
    assert len(sizes) == (1 if variant == "swiglu" else 3)
    for size in sizes:
        key = f"{variant}.{size}"
        x = torch.from_numpy(z[f"in.{key}.x"]).requires_grad_()
        same(model.position(x, tuple(n // 7 for n in x.shape[2:])), torch.from_numpy(z[f"out.{key}.pos"]), 1e-5)
        cls, (patches, _) = model.features(x), model.features(x, tokens=True)
        same(cls, torch.from_numpy(z[f"out.{key}.x_norm_clstoken"]), 1e-5)
        same(patches, torch.from_numpy(z[f"out.{key}.x_norm_patchtokens"]), 1e-5)
        assert torch.equal(model.features(x, tokens="all")[0], torch.cat([cls[:, None], patches], 1))        # no registers
        total = (cls * torch.from_numpy(z[f"in.{key}.g_cls"])).sum() + (patches * torch.from_numpy(z[f"in.{key}.g_patch"])).sum()
        same(torch.autograd.grad(total, x)[0], torch.from_numpy(z[f"grad.{key}.x"]), 1e-5)


@pytest.mark.parametrize("letter, widths, n", [
    ("s", (384, 12, 6), 22_056_576), ("b", (768, 12, 12), 86_580_480), ("l", (1024, 24, 16), 304_368_640), ("g", (1536, 40, 24), None)])
def test_dinov2_presets_have_the_names_and_shapes_of_the_released_files(letter, widths, n):
    """Their keys, written out: hub files name blocks.0 to blocks.N, and hold a mask token."""
    d, depth, heads = widths
    hidden = 4096 if letter == "g" else 4 * d
    block = {"norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d),
             "attn.proj.bias": (d,), "ls1.gamma": (d,), "norm2.weight": (d,), "norm2.bias": (d,), "ls2.gamma": (d,)}
    block |= {"mlp.w12.weight": (2 * hidden, d), "mlp.w12.bias": (2 * hidden,), "mlp.w3.weight": (d, hidden), "mlp.w3.bias": (d,)} \
        if letter == "g" else {"mlp.fc1.weight": (hidden, d), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (d, hidden), "mlp.fc2.bias": (d,)}
    expected = {"cls_token": (1, 1, d), "pos_embed": (1, 1370, d), "mask_token": (1, d), "patch_embed.proj.weight": (d, 3, 14, 14),
                "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    weights = [sum(map(np.prod, shapes.values())) for shapes in (expected, block)]
    assert n in (None, weights[0] + depth * weights[1])      # as counted in the files
    expected |= {f"blocks.0.{k}": v for k, v in block.items()}
    for ending, more in (("", {}), ("_reg", {"register_tokens": (1, 4, d)})):
        preset = ssm.PRESETS[f"dinov2_vit{letter}14{ending}"]
        model = preset.func(d, 1, heads, **preset.keywords)  # one block, as all are alike
        assert preset.args == widths and model.blocks[0].attn.heads == heads
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {**expected, **more}


def test_tokens_of_an_earlier_block_are_its_residual_stream_and_of_the_last_its_norm():
    model, x, kept = ssm.vit_micro().eval(), torch.randn(2, 3, 32, 32), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: kept.append(o))
    (last, grid), (second, _) = model.features(x, tokens=True), model.features(x, tokens=True, last=2)
    assert torch.equal(model.features(x, tokens="all", last=2)[0], kept[2])
    assert grid == (4, 4) and torch.equal(second, kept[2][:, 1:]) and torch.equal(last, model.norm(kept[3])[:, 1:])
    assert torch.equal(model.features(x, last=2), torch.cat([model.norm(kept[2])[:, 0], model.norm(kept[3])[:, 0]], 1))


# -- Vim ---------------------------------------------------------------------------------------------------------------

def test_vim_blocks_mixer_and_gradients_are_the_authors(golden):
    z, cfg = golden("vim")
    model = ssm.Vim(20, 2, patch=8, size=32, n_classes=5, d_state=8)
    model.load_state_dict(state(z))
    x = torch.from_numpy(z["in.x"]).requires_grad_()
    hidden = []
    for layer in model.layers:
        layer.mixer.register_forward_hook(lambda m, i, o: hidden.append(o))
    y = model.features(x)
    for i in range(2):
        same(hidden[i], torch.from_numpy(z[f"out.block{i}.hidden"]), 1e-5)
    same(y, torch.from_numpy(z["out.features"]), 1e-5)
    (y * torch.from_numpy(z["in.g"])).sum().backward()
    same(x.grad, torch.from_numpy(z["grad.x"]), 1e-5)
    weight_gradients_are(model, {k: v for k, v in z.items() if "head" not in k}, "grad.sd.")
    same(model(x), torch.from_numpy(z["out.logits"]), 1e-5)
    u = torch.from_numpy(z["in.mixer.x"]).requires_grad_()
    y = model.layers[0].mixer(u)
    same(y, torch.from_numpy(z["out.mixer.y"]), 1e-5)
    same(torch.autograd.grad((y * torch.from_numpy(z["in.mixer.g"])).sum(), u)[0], torch.from_numpy(z["grad.mixer.x"]), 1e-5)


def test_vim4path_tokens_blocks_and_gradients_are_the_authors_at_every_size(golden):
    z, cfg = golden("vim4path")
    model = ssm.Vim(20, 2, patch=8, size=32, n_classes=2, double_cls=True, d_state=6)
    model.load_state_dict(state(z))
    hidden = []
    for layer in model.layers:
        layer.mixer.register_forward_hook(lambda m, i, o: hidden.append(o))
    for n, size in enumerate(cfg["sizes"]):
        x = torch.from_numpy(z[f"in.{size}.x"]).requires_grad_()
        tokens, layout = model.embed(x)[0], cfg["layout"][size]
        numbers = torch.arange(tokens.shape[1])[None, :, None]
        patches = model.patches(numbers).flatten().tolist()
        assert sorted({0, layout["middle_cls"], *patches}) == numbers.flatten().tolist()
        assert tokens.shape[1] == layout["length"] == len(patches) + 2
        same(tokens, torch.from_numpy(z[f"out.{size}.tokens"]), 1e-5)
        hidden.clear()
        model.zero_grad()
        y = model.features(x)
        for i in range(2):
            same(hidden[i], torch.from_numpy(z[f"out.{size}.block{i}.hidden"]), 1e-5)
        same(y, torch.from_numpy(z[f"out.{size}.features"]), 1e-5)
        (y * torch.from_numpy(z[f"in.{size}.g"])).sum().backward()
        same(x.grad, torch.from_numpy(z[f"grad.{size}.x"]), 1e-5)
        for name in ("cls_token", "pos_embed"):
            same(getattr(model, name).grad, torch.from_numpy(z[f"grad.{size}.{name}"]), 1e-5)
        if n == 0:
            weight_gradients_are(model, {k: v for k, v in z.items() if "head" not in k}, "grad.sd.")


def test_at_224_and_96_pixels_vim4path_has_198_and_38_tokens():
    model = ssm.vim_tiny(double_cls=True)
    assert [model.embed(torch.zeros(1, 3, s, s))[0].shape[1] for s in (224, 96)] == [198, 38]
    assert ssm.vim_tiny().embed(torch.zeros(1, 3, 224, 224))[0].shape[1] == 197


def test_reversing_the_sequence_swaps_the_two_directions():
    mixer = ssm.Mixer(16, 1, d_state=4)
    swapped = ssm.Mixer(16, 1, d_state=4)
    names = mixer.state_dict()

    def twin(k):
        head, *rest = k.split(".")
        pairs = {"A_log": "A_b_log", "D": "D_b", "conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}
        return ".".join([{**pairs, **{v: k for k, v in pairs.items()}}.get(head, head), *rest])
    swapped.load_state_dict({k: names[twin(k)] for k in names})
    x = torch.randn(2, 9, 16)
    same(swapped(x.flip(1)).flip(1), mixer(x), 1e-5)
    assert (mixer(x.flip(1)).flip(1) - mixer(x)).abs().max() > 1e-4


@pytest.mark.parametrize("end, sees", [("", lambda t, s: s <= t), ("_b", lambda t, s: s >= t)])
def test_the_forward_direction_never_sees_later_tokens_nor_the_backward_one_earlier(end, sees):
    mixer = ssm.Mixer(8, 1, d_state=4)
    x = torch.randn(1, 6, 8, requires_grad=True)
    xz = mixer.in_proj(x)
    y = mixer._direction(xz, "") if end == "" else mixer._direction(xz.flip(1), "_b").flip(1)
    for t in range(6):
        g = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(1)
        assert [(v > 0).item() for v in g] == [sees(t, s) for s in range(6)]


def test_initial_steps_are_small_forward_and_not_backward_as_released():
    mixer = ssm.vim_micro().layers[0].mixer
    steps = F.softplus(mixer.dt_proj.bias.detach())
    assert 1e-4 <= steps.min() and steps.max() <= 0.1001 and steps.log().std() > 1
    assert not mixer.dt_proj_b.bias.any()
    assert torch.equal(torch.exp(mixer.A_b_log[3]).round(), torch.arange(1., 9)) and mixer.D_b.eq(1).all()
    weights = {n: torch.cat([getattr(ssm.Mixer(192, 24), n).weight.detach().flatten() for _ in range(2)]) for n in ("dt_proj", "dt_proj_b", "out_proj")}
    assert weights["dt_proj"].abs().max() == pytest.approx(12 ** -0.5, rel=1e-2) == weights["dt_proj_b"].abs().max()
    assert weights["out_proj"].abs().max() == pytest.approx((384 * 24) ** -0.5, rel=1e-2)


# -- VMamba ------------------------------------------------------------------------------------------------------------

def channels_last(v):
    return torch.from_numpy(v).permute(0, 2, 3, 1)


def micro_vmamba(z):
    model = ssm.VMamba(8, (1, 1, 1, 1), n_classes=4)
    model.layers[3] = ssm.VMamba(12, (1, 1, 1), n_classes=4).layers[2]                      # the golden widths: 8, 16, 32, 48
    model.layers[2].downsample[1], model.layers[2].downsample[3] = torch.nn.Conv2d(32, 48, 3, 2, 1), torch.nn.LayerNorm(48)
    model.classifier.norm, model.classifier.head = torch.nn.LayerNorm(48), torch.nn.Linear(48, 4)
    model.load_state_dict(state(z))
    return model


def test_vmamba_stages_features_and_gradients_are_the_authors(golden):
    z, cfg = golden("vmamba")
    model = micro_vmamba(z)
    for n, size in enumerate(cfg["sizes"]):
        x = torch.from_numpy(z[f"in.{size}.x"]).requires_grad_()
        for i, stage in enumerate(model.stages(x)):
            same(stage, channels_last(z[f"out.{size}.stage{i}"]), 1e-5)
        features = model.features(x)
        same(features, torch.from_numpy(z[f"out.{size}.features"]), 1e-5)
        logits = model(x)
        same(logits, torch.from_numpy(z[f"out.{size}.logits"]), 1e-5)
        model.zero_grad()
        ((features * torch.from_numpy(z[f"in.{size}.g_feat"])).sum() + (logits * torch.from_numpy(z[f"in.{size}.g_logits"])).sum()).backward()
        same_in_scale(x.grad, torch.from_numpy(z[f"grad.{size}.x"]), 1e-5)
        if n == 0:
            weight_gradients_are(model, z, "grad.sd.")


@pytest.mark.parametrize("case, dim, N, weights", [("ss2d", 16, 1, "sd.layers.1.blocks.0.op."), ("ss2d_n", 12, 4, "sd_ss2d_n.")])
def test_one_2d_scan_on_a_map_that_is_not_square_is_the_authors(case, dim, N, weights, golden):
    z, _ = golden("vmamba")
    op = ssm.SS2D(dim, N)
    op.load_state_dict(state(z, weights))
    x = torch.from_numpy(z[f"in.{case}.x"]).requires_grad_()
    y = op(x.permute(0, 2, 3, 1))
    same(y, channels_last(z[f"out.{case}.y"]), 1e-5)
    (y * channels_last(z[f"in.{case}.g"])).sum().backward()
    same(x.grad, torch.from_numpy(z[f"grad.{case}.x"]), 1e-5)
    weight_gradients_are(op, z, f"grad.{case}.sd.")


def test_cross_scan_and_merge_are_the_authors_and_together_four_times_the_map(golden):
    z, _ = golden("vmamba")
    x = channels_last(z["in.cross.x"])
    same(ssm.cross_scan(x).permute(0, 2, 3, 1), torch.from_numpy(z["out.cross.scan"]), 0)
    y = torch.from_numpy(z["in.cross.y"])                    # (1, 4, 2, 2, 3): each direction's sequence, not yet flattened
    merged = ssm.cross_merge(y.flatten(3).permute(0, 3, 1, 2), 2, 3)
    same(merged.flatten(1, 2).transpose(1, 2), torch.from_numpy(z["out.cross.merge"]), 0)
    x = torch.randn(2, 3, 5, 4)
    same(ssm.cross_merge(ssm.cross_scan(x), 3, 5), 4 * x, 1e-6)


# -- presets and weights -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, count", [
    ("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656), ("vim_tiny", 6_955_008), ("vim_tiny_plus", 12_891_648),
    ("vim_small", 25_411_584), ("vmamba_tiny", 29_936_832), ("vmamba_small", 49_378_752), ("vmamba_base", 87_532_800)])
def test_every_preset_has_the_parameters_of_the_thesis(name, count):
    """Tables 3.4 and 3.9, without the classifier."""
    assert sum(p.numel() for p in ssm.PRESETS[name]().parameters()) == count


def test_the_names_of_vim_tiny_are_the_released_ones():
    shapes = {k: tuple(v.shape) for k, v in ssm.vim_tiny(n_classes=1000).state_dict().items()}
    top = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,),
           "head.weight": (1000, 192), "head.bias": (1000,), "norm_f.weight": (192,)}
    mixer = {"in_proj.weight": (768, 192), "out_proj.weight": (192, 384)}
    for end in ("", "_b"):
        mixer |= {f"A{end}_log": (384, 16), f"D{end}": (384,), f"conv1d{end}.weight": (384, 1, 4), f"conv1d{end}.bias": (384,),
                  f"x_proj{end}.weight": (44, 384), f"dt_proj{end}.weight": (384, 12), f"dt_proj{end}.bias": (384,)}
    layers = {f"layers.{i}.{k}": v for i in range(24) for k, v in {"norm.weight": (192,), **{f"mixer.{k}": v for k, v in mixer.items()}}.items()}
    assert shapes == {**top, **layers}


@pytest.mark.parametrize("name", ["vit_micro", "vim_micro", "vmamba_micro"])
def test_a_model_takes_any_multiple_of_its_patch_and_gives_class_and_patch_tokens(name):
    model = ssm.PRESETS[name]().eval()
    step = getattr(model, "patch", 32)
    for h, w in ((32, 32), (32 + step, 32), (32, 32 + 2 * step)):
        x = torch.randn(2, 3, h, w)
        tokens, grid = model.features(x, tokens=True)
        assert model.features(x).shape == (2, model.dim) and tokens.shape == (2, grid[0] * grid[1], model.dim) and grid == (h // step, w // step)
        if name != "vmamba_micro":                           # which has none
            assert torch.equal(model.features(x, tokens="all")[0], torch.cat([model.features(x)[:, None], tokens], 1))
    for bad in (torch.zeros(2, 3, 32, 33), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(InputError, match="wants"):
            model(bad)


def test_interpolation_at_the_trained_size_is_the_identity():
    for model in (ssm.vit_micro(), ssm.vim_micro(), ssm.vim_micro(double_cls=True)):
        assert model.position(torch.zeros(1, 3, 32, 32), (4, 4)) is model.pos_embed
    pos = torch.randn(1, 16, 5)
    same(ssm._interpolate(pos, (4, 4), offset=0), pos, 1e-6)
    vim = ssm.vim_micro()
    moved = vim.position(torch.zeros(1, 3, 48, 48), (6, 6))  # the class token's row moves to the new middle, unchanged
    assert torch.equal(moved[:, 18], vim.pos_embed[:, 8]) and moved.shape[1] == 37


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
                                  lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
                                  lambda s: {"teacher": {**{f"backbone.{k}": v for k, v in s.items()}, "head.mlp.0.weight": torch.zeros(2)}}])
def test_weights_load_from_every_released_layout(wrap, tmp_path):
    source, target = ssm.vim_micro(), ssm.vim_micro()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    ssm.load_weights(target, tmp_path / "w.pt")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(target(x), source(x))


def test_a_released_classifier_is_left_out_of_a_model_without_one(tmp_path):
    for name in ("vit_micro", "vmamba_micro"):
        torch.save(ssm.PRESETS[name](n_classes=7).state_dict(), tmp_path / "w.pt")
        ssm.load_weights(ssm.PRESETS[name](), tmp_path / "w.pt")
        with pytest.raises(InputError, match="2 mis-shaped: .*head.weight \\(7, "):
            ssm.load_weights(ssm.PRESETS[name](n_classes=3), tmp_path / "w.pt")


def test_weights_that_do_not_fit_are_listed_by_name(tmp_path):
    state = ssm.vit_micro().state_dict()
    state["pos_embed"] = torch.zeros(1, 5, 96)
    state["extra"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "w.pt")
    before = ssm.vit_micro()
    kept = before.pos_embed.clone()
    with pytest.raises(InputError) as e:
        ssm.load_weights(before, tmp_path / "w.pt")
    assert "1 missing: norm.weight; 1 unexpected: extra; 1 mis-shaped: pos_embed (1, 5, 96) for (1, 17, 96)" in str(e.value)
    assert torch.equal(before.pos_embed, kept)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:999])
    torch.save(before, tmp_path / "pickle.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (("cut.pt", "not a readable checkpoint"), ("pickle.pt", "not a readable checkpoint"), ("none.pt", "no weights at"),
                          ("list.pt", "holds no state_dict")):
        with pytest.raises(InputError, match=message):
            ssm.load_weights(before, tmp_path / name)


@pytest.mark.parametrize("name", ["vit_micro", "vim_micro", "vmamba_micro"])
def test_drop_path_acts_in_training_only_and_keeps_the_mean(name):
    model = ssm.PRESETS[name](drop_path=0.5)
    x = torch.randn(16, 3, 32, 32)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))
    drop = ssm.DropPath(0.3)
    y = drop.train()(torch.ones(20000, 2))
    assert set(y.mul(0.7).round().flatten().tolist()) == {0., 1.} and y.mean().item() == pytest.approx(1, abs=0.02)


# -- DINO --------------------------------------------------------------------------------------------------------------

def dino_net(z, head_sizes):
    """The authors' one-block ViT (MLP twice as wide, not four times) and head, with their weights."""
    backbone = ssm.ViT(12, 1, 3, patch=8, size=16)
    backbone.blocks[0].mlp = ssm.gelu_mlp(12, 24)
    net = ssm.MultiCrop(backbone, ssm.DINOHead(12, norm_last=False, **head_sizes))
    net.load_state_dict({k[3:]: torch.from_numpy(z[k]) for k in z if k.startswith("sd.")})
    return net


def test_dino_loss_gradient_and_centre_are_the_authors_over_three_steps(golden):
    z, cfg = golden("dinoloss")
    about = cfg["loss_ctor"]
    for i, epoch in enumerate(cfg["epochs"]):
        student = torch.from_numpy(z[f"in.student{i}"]).requires_grad_()
        teacher, center = (torch.from_numpy(z[k]) for k in (f"in.teacher{i}", f"out.center_before{i}"))
        loss = ssm.dino_loss(student, teacher, center[0], about["ncrops"], z["out.teacher_temp_schedule"][epoch])
        same(loss, torch.tensor(z[f"out.loss{i}"]), 1e-5)
        same(torch.autograd.grad(loss, student)[0], torch.from_numpy(z[f"grad.student{i}"]), 1e-5)
        ssm.move_center(center, teacher)
        same(center, torch.from_numpy(z[f"out.center_after{i}"]), 1e-6)


def test_dino_loss_is_the_slow_loop_over_pairs_of_views():
    views, b, K = 5, 3, 7
    student, teacher, center = torch.randn(views * b, K), torch.randn(2 * b, K, requires_grad=True), torch.randn(K)
    terms = []
    for i in range(2):
        for v in range(views):
            if v != i:
                for n in range(b):
                    q = torch.softmax((teacher[i * b + n] - center) / 0.05, 0)
                    terms.append(-(q * torch.log_softmax(student[v * b + n] / 0.1, 0)).sum())
    loss = ssm.dino_loss(student.requires_grad_(), teacher, center, views, 0.05)
    same(loss, torch.stack(terms).mean(), 1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_the_head_and_the_crops_through_it_are_the_authors(golden):
    z, cfg = golden("dinoloss")
    about = cfg["head_ctor"]
    net = dino_net(z, {"K": about["out_dim"], "hidden": about["hidden_dim"], "bottleneck": about["bottleneck_dim"]})
    x = torch.from_numpy(z["in.head.x"]).requires_grad_()
    y = net.head(x)
    same(y, torch.from_numpy(z["out.head.y"]), 1e-5)
    same(torch.autograd.grad((y * torch.from_numpy(z["in.head.g"])).sum(), x)[0], torch.from_numpy(z["grad.head.x"]), 1e-5)
    y = net([torch.from_numpy(z[f"in.crop{i}"]) for i in range(5)])
    same(y, torch.from_numpy(z["out.multicrop"]), 1e-5)
    (y * torch.from_numpy(z["in.multicrop_g"])).sum().backward()
    for name, p in net.named_parameters():
        same_in_scale(p.grad, torch.from_numpy(z[f"grad.multicrop.sd.{name}"]), 1e-5)
    ssm.clip_each(net, cfg["clip"])
    for name, p in net.named_parameters():
        same_in_scale(p.grad, torch.from_numpy(z[f"out.clipped.sd.{name}"]), 1e-5)
    for norm_last, key in ((True, "norm_last_layer=True"), (False, "norm_last_layer=False")):
        net.head.last_layer.weight_g.requires_grad_(not norm_last)
        decayed, spared = ssm.decay_groups(net)
        names = {id(p): name for name, p in net.named_parameters()}
        groups = cfg["params_groups"][key]
        assert {names[id(p)] for p in decayed["params"]} == set(groups["regularized"])
        assert {names[id(p)] for p in spared["params"]} == set(groups["not_regularized"]) and spared["weight_decay"] == 0


def test_cosine_schedules_are_the_authors(golden):
    z, cfg = golden("dinoloss")
    for i, s in enumerate(cfg["schedules"]):
        n = s["epochs"] * s["niter_per_ep"]
        warmup = s.get("warmup_epochs", 0) * s["niter_per_ep"]
        ours = [ssm.cosine_schedule(step, n, s["base_value"], s["final_value"], warmup) for step in range(n)]
        np.testing.assert_allclose(ours, z[f"out.sched{i}"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro"])
def test_state_space_parameters_are_decayed_only_on_request(name):
    model = ssm.PRESETS[name]()
    names = {id(p): n for n, p in model.named_parameters()}
    for decay_ssm in (False, True):
        decayed = {names[id(p)] for p in ssm.decay_groups(model, decay_ssm)[0]["params"]}
        rates = {n for n in names.values() if "A_log" in n or "A_b_log" in n}
        assert rates and (rates <= decayed if decay_ssm else not rates & decayed)
        assert not any(n.endswith(("D", "D_b", "dt_proj.bias", "norm.weight")) for n in decayed)


def test_the_teacher_is_the_exact_moving_average_and_the_prototypes_freeze():
    def net():
        torch.manual_seed(1)
        return ssm.MultiCrop(ssm.vim_micro(size=16), ssm.DINOHead(96, K=32, hidden=24, bottleneck=8))
    student, teacher, center = net(), net().eval().requires_grad_(False), torch.zeros(32)
    optimiser = torch.optim.AdamW(ssm.decay_groups(student))
    average = [p.clone().double() for p in teacher.parameters()]
    crops = [torch.randn(2, 3, 16, 16) for _ in range(2)] + [torch.randn(2, 3, 8, 8) for _ in range(2)]
    for momentum, frozen in ((0.9, True), (0.5, False)):
        before = student.head.last_layer.weight_v.detach().clone()
        found = ssm.dino_step(student, teacher, center, optimiser, crops, 1e-3, 0.1, momentum, freeze_last=frozen)
        assert torch.equal(before, student.head.last_layer.weight_v.detach()) == frozen
        average = [momentum * a + (1 - momentum) * p.detach().double() for a, p in zip(average, student.parameters())]
        assert 0 <= found["information"] <= np.log(4) + 1e-5 and 0 <= found["entropy"] <= np.log(32) + 1e-5
    for a, p in zip(average, teacher.parameters()):
        same(p.double(), a, 1e-6)


@pytest.mark.parametrize("teacher, entropy", [(torch.zeros(8, 16), np.log(16)), (torch.eye(16)[:1].repeat(8, 1) * 9, 0.)])
def test_uniform_and_constant_outputs_carry_no_information(teacher, entropy):
    h, information = ssm.output_entropy(torch.softmax(teacher / 0.04, -1))
    assert h == pytest.approx(entropy, abs=1e-4) and information == pytest.approx(0, abs=1e-5)
    h, information = ssm.output_entropy(torch.eye(16)[:8])
    assert h == pytest.approx(0, abs=1e-6) and information == pytest.approx(np.log(8), abs=1e-5)


def test_vim_keeps_its_residual_in_float32_under_autocast():
    model, seen = ssm.vim_micro(), []
    for layer in model.layers:
        layer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert seen == [torch.float32] * 4


def test_vim_starts_from_patch_weights_as_wide_as_released():
    """timm 0.4.12 divides LeCun's standard deviation by 0.8796 for a truncation at 2, which is 50 deviations away."""
    weight = ssm.vim_tiny().patch_embed.proj.weight
    assert weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5 / 0.87962566, rel=0.01)


@pytest.mark.parametrize("name", ["vit_micro", "vim_micro", "vmamba_micro"])
def test_bfloat16_autocast_stays_close(name):
    torch.manual_seed(0)
    model, x = ssm.PRESETS[name]().eval(), torch.randn(4, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        close = model(x)
    assert ((close - exact).norm() / exact.norm()).item() < 3e-2


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.bfloat16, 0.03), (torch.float16, 3e-3), (torch.float64, 1e-5)])
@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro"])
def test_a_model_in_another_precision_stays_close_to_float32(name, dtype, tolerance):
    model = ssm.PRESETS[name](n_classes=3).eval()
    other = copy.deepcopy(model).to(dtype)
    for side in (32, 64):                                    # 64: resized positions
        x = torch.randn(2, 3, side, side)
        exact, found = model(x), other(x.to(dtype))
        assert found.dtype == dtype and (found.to(exact) - exact).norm() <= tolerance * exact.norm()
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in other.parameters())


def test_vim_passes_gradcheck_in_float64():
    model = ssm.Vim(16, 2, patch=4, size=8, d_state=2).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    log = model.layers[0].mixer.A_log
    assert torch.autograd.gradcheck(lambda x, log: model(x)[0, :3], (x, log), fast_mode=True)


def test_a_mixer_learns_to_remember_its_first_token():
    """The label is the first of 64 tokens, read off the last one. The convolution reaches back 3 and the second direction
    sees only what follows, so the state alone can carry it there, past 63 tokens of noise. Guessing scores ln 2 = 0.69."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        words, model, read = torch.nn.Embedding(4, 16), ssm.Mixer(16, depth=1, d_state=8), torch.nn.Linear(16, 1)
        optimiser = torch.optim.Adam([*words.parameters(), *model.parameters(), *read.parameters()], 1e-2)
        recent = [1.] * 10
        for _ in range(400):
            sentence = torch.randint(2, 4, (32, 64))
            sentence[:, 0] = torch.randint(0, 2, (32,))
            guess = read(model(words(sentence))[:, -1]).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(guess, sentence[:, 0].float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            recent = recent[1:] + [loss.item()]
            if max(recent) < 0.1:
                break
        assert max(recent) < 0.1


# -- bags ---------------------------------------------------------------------------------------------------------------

def golden_weights(z, name):
    """An official state dict; large matrices are stored as row @ col."""
    state = {k.removeprefix(f"sd.{name}."): v for k, v in z.items() if k.startswith(f"sd.{name}.")}
    for k in [k for k in z if k.startswith(f"lr.{name}.") and k.endswith(".row")]:
        row, col = z[k].astype(np.float64), z[k[:-3] + "col"].astype(np.float64)
        state[k.removeprefix(f"lr.{name}.").removesuffix(".row")] = (row @ col).astype(np.float32)
    return {k: torch.from_numpy(v) for k, v in state.items()}


def clam(z, cfg, name):
    about, theirs = cfg["models"][name], golden_weights(z, name)
    head = "clam_mb" if name == "mb" else "clam_sb"
    model = ssm.MIL(16, about["n_classes"], head).eval()
    names = {"attention_net.0": "embed.0", "attention_net.3.attention_a.0": "V", "attention_net.3.attention_b.0": "U",
             "attention_net.3.attention_c": "w", "attention_net.3.module.0": "V", "attention_net.3.module.2": "w", "classifiers": "classifier"}
    if not about["gate"]:
        model.U = None
    ours = {"mean": model.mean, "std": model.std}
    for k, v in theirs.items():
        layer, _, kind = k.rpartition(".")
        if k.startswith("classifiers.") and layer != "classifiers":                         # MB: a row for each class
            ours.setdefault(f"classifier.{kind}", torch.zeros_like(getattr(model.classifier, kind)))[int(layer[-1])] = v[0]
        else:
            ours[f"{names.get(layer, layer)}.{kind}"] = v
    model.load_state_dict(ours)
    return model, about


@pytest.mark.parametrize("name", ["sb", "mb", "sb_nogate"])
def test_clam_logits_attention_instance_losses_and_gradients_are_the_authors(name, golden):
    z, cfg = golden("clam")
    model, about = clam(z, cfg, name)
    losses = {"ce": F.cross_entropy, "svm": ssm.smooth_top1_svm}
    compared = 0
    for n in cfg["bag_sizes"]:
        case = f"{name}.N{n}"
        x = torch.from_numpy(z[f"in.{case}.h"])[None].requires_grad_()
        logits, scores, h = model(x)
        same(logits, torch.from_numpy(z[f"out.{case}.logits"]), 1e-5)
        same(scores[0], torch.from_numpy(z[f"out.{case}.A_raw"]), 1e-5)
        same(torch.softmax(scores, -1)[0] @ h[0], torch.from_numpy(z[f"out.{case}.features"]), 1e-5)
        gradient, = torch.autograd.grad((logits * torch.from_numpy(z[f"in.{case}.g"])).sum(), x)
        same_in_scale(gradient[0], torch.from_numpy(z[f"grad.{case}.h"]), 1e-5)
        for subtyping in (0, 1):
            for kind, loss in losses.items():
                for y in range(about["n_classes"]):
                    key, label = f"{case}.sub{subtyping}.{kind}.y{y}", torch.tensor([y])
                    if f"out.{key}.total_loss" not in z:
                        continue
                    _, scores, h = model(x)
                    alone = ssm.instance_loss(model, scores, h, torch.ones(1, n, dtype=bool), label, about["k_sample"], bool(subtyping), loss)
                    same(alone, torch.tensor(z[f"out.{key}.instance_loss"]), 1e-5)
                    total = ssm.mil_loss(model, x, torch.ones(1, n, dtype=bool), label, about["k_sample"], 0.7, bool(subtyping), loss)
                    same(total, torch.tensor(z[f"out.{key}.total_loss"]), 1e-5)
                    same_in_scale(torch.autograd.grad(total, x)[0][0], torch.from_numpy(z[f"grad.{key}.h"]), 1e-5)
                    compared += 1
    assert compared == sum(k.startswith(f"out.{name}.N") and k.endswith("total_loss") for k in z) > 10


def test_smooth_svm_is_the_authors_and_stays_smooth_where_theirs_turns_into_a_hinge(golden):
    z, _ = golden("clam")
    for case, tolerance in (("smooth", 1e-6), ("mixed", 2.7e-3)):
        s = torch.from_numpy(z[f"in.svmloss.{case}.s"]).requires_grad_()
        loss = ssm.smooth_top1_svm(s, torch.from_numpy(z[f"in.svmloss.{case}.y"]))
        assert loss.item() == pytest.approx(float(z[f"out.svmloss.{case}.loss"]), abs=tolerance)
        if case == "smooth":
            same(torch.autograd.grad(loss, s)[0], torch.from_numpy(z["grad.svmloss.smooth.s"]), 1e-6)


@pytest.mark.parametrize("name, head", [("Attention", "abmil"), ("GatedAttention", "gated")])
def test_attention_pooling_is_the_authors_with_their_one_output_as_our_second_class(name, head, golden):
    z, cfg = golden("abmil")
    theirs = golden_weights(z, name)
    model = ssm.MIL(500, 2, head, widths=(500,), attention=128, dropout=0.).eval()
    model.embed = torch.nn.Identity()                        # their embeddings H are given
    names = {"V": ("attention.0", "attention_V.0"), "U": ("attention_U.0",), "w": ("attention.2", "attention_w")}
    with torch.no_grad():
        for ours, options in names.items():
            for kind in ("weight", "bias"):
                found = [theirs[f"{o}.{kind}"] for o in options if f"{o}.{kind}" in theirs]
                if found:
                    getattr(getattr(model, ours), kind).copy_(found[0])
        for kind in ("weight", "bias"):
            getattr(model.classifier, kind).copy_(torch.stack([torch.zeros_like(theirs[f"classifier.0.{kind}"][0]),
                                                               theirs[f"classifier.0.{kind}"][0]]))
    for n in cfg["bag_sizes"]:
        H = torch.from_numpy(z[f"in.{name}.K{n}.H"])[None].requires_grad_()
        logits, scores, _ = model(H)
        same(torch.softmax(logits, 1)[:, 1:], torch.from_numpy(z[f"out.{name}.K{n}.Y_prob"]), 1e-5)
        same(torch.softmax(scores, -1)[0], torch.from_numpy(z[f"out.{name}.K{n}.A"]), 1e-5)
        for y in (0, 1):
            loss = ssm.mil_loss(model, H, None, torch.tensor([y]))
            same(loss, torch.from_numpy(z[f"out.{name}.K{n}.Y{y}.nll"])[0, 0], 1e-5)
            same_in_scale(torch.autograd.grad(loss, H, retain_graph=True)[0][0], torch.from_numpy(z[f"grad.{name}.K{n}.Y{y}.H"]), 1e-5)


@pytest.mark.parametrize("head", ssm.HEADS)
def test_the_order_of_instances_and_padding_change_nothing(head):
    model = ssm.MIL(6, 3, head, (8, 5), 4).eval()
    x, order = torch.randn(1, 9, 6), torch.randperm(9)
    padded = torch.cat([x, 100 * torch.randn(1, 4, 6)], 1)
    mask = torch.arange(13)[None] < 9
    logits, scores, h = model(x)
    same(model(x[:, order])[0], logits, 1e-6)
    same(model(x[:, order])[1], scores[..., order], 1e-6)
    same(model(padded, mask)[0], logits, 1e-6)
    assert (model(padded, mask)[1][..., 9:] == -torch.inf).all()
    same(torch.softmax(model(padded, mask)[1], -1).sum(-1), torch.ones(1, scores.shape[1]), 1e-6)
    if head.startswith("clam"):
        y = torch.tensor([1])
        same(ssm.mil_loss(model, padded, mask, y, k=3, subtyping=True), ssm.mil_loss(model, x, mask[:, :9], y, k=3, subtyping=True), 1e-6)


def test_mean_and_max_pooling_are_the_mean_and_the_maximum():
    for head, pool in (("mean", lambda h: h.mean(1)), ("max", lambda h: h.amax(1))):
        model = ssm.MIL(4, 2, head, (6,)).eval()
        logits, scores, h = model(torch.randn(3, 5, 4))
        same(logits, model.classifier(pool(h)), 1e-6)
        same(torch.softmax(scores, -1).sum(-1), torch.ones(3, 1), 1e-6)
    first = (h[0] == h[0].amax(0)).float()
    wins = (first / first.sum(0)).mean(1)
    same(torch.softmax(scores, -1)[0, 0], wins, 1e-6)


def test_instance_targets_by_hand():
    """Attention 0.1 0.9 0.5 0.3 0.7, k = 2: instances 1 and 4 are called positive, 0 and 3 negative; in another class's
    classifier, with subtyping, 1 and 4 negative."""
    model = ssm.MIL(1, 2, "clam_sb", (2,))
    seen = []

    def spy(logits, target):
        seen.append((logits[:, 0].round().tolist(), target.tolist()))
        return logits.sum()
    for classifier in model.instance_classifiers:
        classifier.weight.data, classifier.bias.data = torch.tensor([[1., 0], [0, 1]]), torch.zeros(2)
    h = torch.stack([torch.arange(5.), torch.zeros(5)], 1)[None]
    scores, mask = torch.tensor([[[0.1, 0.9, 0.5, 0.3, 0.7]]]), torch.ones(1, 5, dtype=bool)
    ssm.instance_loss(model, scores, h, mask, torch.tensor([0]), 2, True, spy)
    assert seen == [([1, 4, 3, 0], [1, 1, 0, 0]), ([1, 4], [0, 0])]
    seen.clear()
    assert ssm.instance_loss(model, scores, h, mask[:, :1].expand(1, 5) & (torch.arange(5) < 1), torch.tensor([0]), 2, True, spy) == 0
    assert not seen                                          # a lone instance is neither


def test_fit_stops_by_validation_and_puts_the_best_weights_back():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data[:] = 0.
    values = iter([3., 1., 2., 2., 5., 0.])
    seen = []

    def validate(m):
        seen.append(m.weight.item())
        return next(values)
    history = ssm.fit(model, torch.optim.SGD(model.parameters(), 1.), lambda epoch: [(torch.ones(1, 1),)] * 2,
                      lambda m, x: -m(x).sum(), 6, validate, patience=3)
    assert [v for _, v in history] == [3., 1., 2., 2., 5.] and seen == [2., 4., 6., 8., 10.]
    assert model.weight.item() == 4.
    values = iter([3., 1., 2., 2., 5., 0.])
    assert len(ssm.fit(model, torch.optim.SGD(model.parameters(), 1.), lambda epoch: [(torch.ones(1, 1),)], lambda m, x: m(x).sum(),
                       6, lambda m: next(values), patience=1, least=6)) == 6
    model.weight.data[:] = 0.
    assert ssm.fit(model, torch.optim.SGD(model.parameters(), 1.), lambda epoch: [(torch.ones(1, 1),)], lambda m, x: -m(x).sum(), 4)[3][1] is None
    assert model.weight.item() == 4. and not model.training    # without validation the last weights stay


def test_a_bag_is_told_by_its_one_planted_instance_and_attention_points_at_it():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 12, 5, generator=g), torch.arange(120) % 2
    where = torch.randint(0, 12, (120,), generator=g)
    x[y == 1, where[y == 1], :2] += 3.
    mask = torch.ones(120, 12, dtype=bool)
    model = ssm.MIL(5, 2, "gated", (16,), 8, 0.)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    ssm.fit(model, optimiser, lambda e: [(x[:80], mask[:80], y[:80])], ssm.mil_loss, 150,
            lambda m: float(ssm.mil_loss(m, x[80:100], mask[80:100], y[80:100])))
    logits, scores, _ = model(x[100:])
    assert (logits.argmax(1) == y[100:]).float().mean() >= 0.9
    assert (scores[:, 0].argmax(1) == where[100:])[y[100:] == 1].float().mean() >= 0.9


# -- heat maps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [ssm.vit_micro(), ssm.vim_micro(), ssm.vim_micro(double_cls=True), ssm.vmamba_micro(),
                                   ssm.CLIPVision(32, 2, 1, 8, 64, 16)])
def test_the_grad_cam_layer_is_a_map_without_class_tokens_that_the_output_depends_on(model):
    model.eval()
    x = torch.randn(2, 3, 64, 64 if isinstance(model, ssm.CLIPVision) else 32)
    module, to_map = ssm.cam_layer(model, x)
    kept = []
    hook = module.register_forward_hook(lambda m, i, out: kept.append(out))
    out = model(x)
    hook.remove()
    gradient, = torch.autograd.grad(out.square().sum(), kept[0])
    grid = (2, 1) if isinstance(model, ssm.VMamba) else (8, x.shape[3] // 8)
    assert to_map(kept[0]).shape[:3] == (2, *grid) and (to_map(gradient) != 0).any(-1).all()
    if not isinstance(model, ssm.VMamba):                    # exactly the patch tokens, in their order
        numbers = torch.arange(kept[0].shape[1]).float()[None, :, None]
        cls = [0] if isinstance(model, (ssm.ViT, ssm.CLIPVision)) else [0, 16] if model.double_cls else [16]
        assert to_map(numbers).flatten().tolist() == [i for i in range(kept[0].shape[1]) if i not in cls]


def test_the_file_works_when_copied_alone(tmp_path):
    shutil.copy(pathlib.Path(ssm.__file__), tmp_path)
    program = """
import sys; sys.path.insert(0, '.')
import torch
from ssm import vim_micro, vit_micro, vmamba_micro, selective_scan, native
print([tuple(f().features(torch.zeros(2, 3, 32, 32)).shape) for f in (vim_micro, vit_micro, vmamba_micro)], native())
"""
    run = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "[(2, 96), (2, 96), (2, 256)] None", run.stderr
    assert run.stderr.strip().count("\n") == 0 and "the torch scan serves" in run.stderr


# -- a small CLIP ------------------------------------------------------------------------------------------------------

def small_clip(**kw):
    torch.manual_seed(1)
    return ssm.CLIP(**{"out": 16, "vision": (32, 2, 2), "text": (24, 2, 2), "vocab": 12, "context": 9, "patch": 8, "size": 32, **kw})


def test_a_clip_has_openais_names_and_shapes_and_such_a_file_loads():
    """ViT-B/32's names and shapes, as published, for a model of one layer a side."""
    model = ssm.CLIP(512, (768, 1, 12), (512, 1, 8), 49408, 77, 32, 224)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    block = {"attn.in_proj_weight": (3, 1), "attn.in_proj_bias": (3,), "attn.out_proj.weight": (1, 1), "attn.out_proj.bias": (1,),
             "ln_1.weight": (1,), "ln_1.bias": (1,), "mlp.c_fc.weight": (4, 1), "mlp.c_fc.bias": (4,), "mlp.c_proj.weight": (1, 4),
             "mlp.c_proj.bias": (1,), "ln_2.weight": (1,), "ln_2.bias": (1,)}
    expected = {"positional_embedding": (77, 512), "text_projection": (512, 512), "logit_scale": (), "token_embedding.weight":
                (49408, 512), "ln_final.weight": (512,), "ln_final.bias": (512,), "visual.class_embedding": (768,),
                "visual.positional_embedding": (50, 768), "visual.proj": (768, 512), "visual.conv1.weight": (768, 3, 32, 32),
                "visual.ln_pre.weight": (768,), "visual.ln_pre.bias": (768,), "visual.ln_post.weight": (768,),
                "visual.ln_post.bias": (768,)}
    for side, d in (("visual.transformer", 768), ("transformer", 512)):
        expected.update({f"{side}.resblocks.0.{k}": tuple(d * n for n in v) for k, v in block.items()})
    assert shapes == expected
    state = {**model.half().state_dict(), "input_resolution": torch.tensor(224)}
    again = ssm.clip_from_state(state)
    assert again.config == model.config
    block, x = ssm.clip_from_state(state, quick=False).visual.transformer.resblocks[0], torch.randn(2, 5, 768)
    between = x + block.attn(block.ln_1(x))                  # open_clip's own models: the exact GELU
    same(block(x), between + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(between)))), 1e-5)
    with pytest.raises(ssm.InputError, match="not the weights of a CLIP"):
        ssm.clip_from_state({"visual.conv1.weight": torch.zeros(2, 3, 4, 4)})


def test_a_clip_block_is_torchs_multihead_attention_and_keeps_its_probabilities():
    for causal in (False, True):
        block = ssm.CLIPAttention(24, 3, causal)
        torch.nn.init.normal_(block.in_proj_bias)
        theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
        theirs.load_state_dict(block.state_dict())
        x = torch.randn(2, 7, 24)
        mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
        y, probability = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
        torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-6)
        block.keep = True
        torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(block.kept, probability, rtol=1e-5, atol=1e-6)


def test_text_is_read_at_its_end_and_not_beyond():
    model = small_clip()
    tokens = torch.tensor([[10, 3, 4, 11, 0, 0]])
    longer = torch.tensor([[10, 3, 4, 11, 7, 7]])
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(longer))
    assert not torch.allclose(model.encode_text(tokens), model.encode_text(torch.tensor([[10, 4, 3, 11, 0, 0]])))


def test_clips_loss_is_the_mean_of_two_cross_entropies_and_learns_pairs():
    model = small_clip()
    x, tokens = torch.randn(6, 3, 32, 32), torch.stack([torch.tensor([10, i + 1, 11, 0]) for i in range(6)])
    every, _ = model.visual.features(x, tokens="all")     # the class token, not projected yet, before its patches
    assert torch.equal(every[:, 0] @ model.visual.proj, model.visual(x)) and torch.equal(every[:, 1:], model.visual.features(x, tokens=True)[0])
    a, b = (v / v.norm(dim=1, keepdim=True) for v in (model.visual(x), model.encode_text(tokens)))
    s = a @ b.T / 0.07
    rows = sum(-(s[i, i] - s[i].logsumexp(0)) for i in range(6)) / 6
    columns = sum(-(s[i, i] - s[:, i].logsumexp(0)) for i in range(6)) / 6
    torch.testing.assert_close(model.loss(x, tokens), (rows + columns) / 2, rtol=1e-5, atol=1e-5)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = model.loss(x, tokens)
        loss.backward()
        optimiser.step()
    assert loss < 0.1



@pytest.mark.parametrize("name", ["vit_micro", "vim_micro"])
def test_standardised_pixels_are_as_if_normalised_by_their_own_statistics(name):
    """The changed model on one normalisation equals the unchanged model on the other."""
    torch.manual_seed(0)
    model, pixels = getattr(ssm, name)().eval(), torch.rand(2, 3, 32, 32)
    own, assumed = ((.88, .77, .84), (.13, .15, .09)), ((.485, .456, .406), (.229, .224, .225))

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = model.features(normalised(*own))
    assert (model.features(normalised(*assumed)) - expected).abs().max() > 0.01
    ssm.standardise_pixels(model, *own, assumed)
    assert torch.allclose(model.features(normalised(*assumed)), expected, atol=1e-4)


# -- what must not leak, and settings that must count -------------------------------------------

@pytest.mark.parametrize("settings", [
    dict(lr=0.1, weight_decay=0.), dict(lr=0.3, weight_decay=0.5),
    dict(lr=0.1, weight_decay=0., teacher_temp=0.5), dict(lr=0.1, weight_decay=0., clip=1e-3)])
def test_a_step_of_dino_is_plain_gradient_descent_with_the_settings_it_was_given(settings):
    """With SGD in place of AdamW: p <- p - lr (g + decay p), g clipped, decay on matrices only."""
    def net():
        torch.manual_seed(1)
        head = ssm.DINOHead(96, K=16, hidden=24, bottleneck=8)
        return ssm.MultiCrop(ssm.vit_micro(size=16), head)
    student, teacher, center = net(), net().eval().requires_grad_(False), torch.randn(16)
    crops = [torch.randn(2, 3, 16, 16) for _ in range(2)] + [torch.randn(2, 3, 8, 8)]
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    temperature = settings.get("teacher_temp", 0.04)
    loss = ssm.dino_loss(student(crops), teacher(crops[:2]), center, 3, temperature)
    learning = {name: p for name, p in student.named_parameters() if p.requires_grad}
    slopes = dict(zip(learning, torch.autograd.grad(loss, list(learning.values()))))
    optimiser = torch.optim.SGD(ssm.decay_groups(student), lr=9.)
    ssm.dino_step(student, teacher, center.clone(), optimiser, crops, momentum=1., **settings)
    for name, p in learning.items():
        g = slopes[name] * min(1, settings.get("clip", 3.) / (float(slopes[name].norm()) + 1e-6))
        decay = settings["weight_decay"] if p.dim() > 1 and not name.endswith(".bias") else 0
        same(p.detach(), before[name] - settings["lr"] * (g + decay * before[name]), 1e-6)


def test_the_bag_weight_mixes_the_two_losses_of_clam_and_nothing_else():
    torch.manual_seed(0)
    model = ssm.MIL(4, 2, "clam_sb", widths=(6,), attention=3, dropout=0.)
    x, mask, y = torch.randn(3, 8, 4), torch.ones(3, 8, dtype=torch.bool), torch.tensor([0, 1, 1])
    logits, scores, h = model(x, mask)
    of_bags = F.cross_entropy(logits, y)
    for k, subtyping, loss in ((1, False, ssm.smooth_top1_svm), (3, True, F.cross_entropy)):
        of_instances = ssm.instance_loss(model, scores, h, mask, y, k, subtyping, loss)
        for weight in (0., 0.3, 1.):
            found = ssm.mil_loss(model, x, mask, y, k, weight, subtyping, loss)
            same(found, weight * of_bags + (1 - weight) * of_instances, 1e-6)
