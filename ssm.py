"""Thesis chapter 3 in plain PyTorch: selective scan, ViT, Vim, VMamba; DINO, CLIP and MIL.

Read first   thesis 3.2.1 (Vim, DINO), 3.2.2 (MIL), 3.3.1 (VMamba). [1] Gu & Dao, Mamba, arXiv
             2312.00752, sections 2-3 and Algorithm 2; [2] Zhu et al., Vision Mamba; [3] Liu et
             al., VMamba; Caron et al., DINO; Oquab et al., DINOv2.
Read in      `_scan_reference` (the recurrence), `selective_scan`, then `_TorchScan` (the same,
this order   fast), `Mixer`, `Vim`, `SS2D`, `VMamba`, `ViT`; `dino_step`, `fit_dino`, `MIL`;
             presets and released weights come last.

Glossary     B batch . L or T tokens . D channels . N state size . G groups of channels that share
             the scan's B and C . d width of a token . E = 2 d inner width of a Mamba block
             u      (B, L, D)   the sequence       y  (B, L, D)  the output
             h      (B, D, N)   the state          z  (B, L, D)  gate
             delta  (B, L, D)   step size          A  (D, N)     negative decay rates
             B, C   (B, L, N) or (B, L, G, N)      input and output weights; they and delta
                                depend on the token, which is what "selective" means
             r      rank of delta's projection     K  DINO's prototypes
             g_x    the gradient of x, in backward passes

Deviations   exp(delta A) is exact (zero-order hold) but delta B is Euler's, as in the official
             code of [1]; its Eq. 4 has the hold for both. Vim and VMamba keep the released names
             of parameters, misnomers included, so that released files load as they are. DINO's
             weight decay spares the state space's parameters (`decay_groups`). CLAM's smooth SVM
             stays smooth where the authors' turns into a hinge, and bags too small for 2 k
             instances take fewer (`instance_loss`).
Not here     Pictures, crops and bags (data.py), log files and checkpoints (repsae.py, which calls
             `fit_dino` and its like), inference token by token, training on several machines.

This file needs nothing but torch: copy it alone. `csrc/` beside it holds an optional compiled
scan, built when first used with REPSAE_NATIVE=1 in the environment, or by `python ssm.py build`.

    y = selective_scan(u, delta, A, B, C, D, z, delta_bias)
    model = load_weights(vim_small(), "vim_s.pth"); x = model.features(images)         # (B, 384)
"""
import argparse
import math
import os
import platform
import sys
from collections import OrderedDict, deque
from functools import lru_cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class InputError(ValueError):
    """What the caller can mend: what was wrong and, after a dash, what to do."""


def refuse(when, why):
    """Raise InputError(why) where `when` holds; `why` is made in any case."""
    if when:
        raise InputError(why)


# -- The selective scan ----------------------------------------------------------------------------

CHUNK = 2 ** 20    # numbers in the states that the torch backend works on at a time


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=True,
                   backend="auto", last_state=False):
    """y_t = C_t h_t + D u_t with h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t: [1] Algorithm 2.

    u, delta, z (B, L, D); A (D, N); D and delta_bias (D,); B, C (B, L, N), or (B, L, G, N) where
    channel i uses group i // (D / G). delta gets its bias, then softplus; y is gated by silu(z).
    Computed in float32 (float64 if u is), returned in u's dtype.

    backend      "reference" (a loop to read), "torch" (chunked, its own backward), "native"
                 (compiled, see `build_native`), or "auto": native if the environment has
                 REPSAE_NATIVE=1 and it can be built, else torch
    last_state   return (y, h_L (B, D, N))
    All backends differentiate in every input; the memory that reference keeps for that grows with
    B L D N, that of the others with B L D. Raises InputError for shapes that do not fit."""
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    kind, work = u.dtype, torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        if B.dim() == 3:
            B, C = B.unsqueeze(2), C.unsqueeze(2)            # one group
        D, bias = (u.new_zeros(u.shape[2]) if v is None else v for v in (D, delta_bias))    # (D,)
        inputs = u, delta, A, B, C, D, z, bias = [
            v if v is None else v.to(work).contiguous() for v in (u, delta, A, B, C, D, z, bias)]
        backend = _choose_backend(backend, u, A.shape[1])
        if backend == "native":
            learns = any(v is not None and v.requires_grad for v in inputs)
            y, h = _NativeScan.apply(*inputs, softplus, torch.is_grad_enabled() and learns)
        elif backend == "torch":
            G, T = B.shape[2], max(A.shape[1], CHUNK // (len(u) * A.numel() + 1))  # tokens a chunk
            u, delta, z = (v if v is None else v.unflatten(2, (G, -1)) for v in (u, delta, z))
            A, D, bias = (v.unflatten(0, (G, -1)) for v in (A, D, bias))     # D channels as (G, E)
            y, h = _TorchScan.apply(u, delta, A, B, C, D, z, bias, softplus, T)
            y, h = y.flatten(2), h.flatten(1, 2)             # (B, L, D), (B, D, N)
        else:
            delta = delta + bias
            y, h = _scan_reference(u, F.softplus(delta) if softplus else delta, A, B, C)
            y = y + D * u
            y = y if z is None else y * F.silu(z)
    return (y.to(kind), h) if last_state else y.to(kind)


def _check_scan(u, delta, A, B, C, D, z, delta_bias):
    """Raise InputError, naming the first tensor whose shape does not fit those of u and A."""
    refuse(u.dim() != 3, f"u has shape {tuple(u.shape)} - give (batch, tokens, channels)")
    tokens, channels, N = tuple(u.shape), u.shape[2], A.shape[-1]                # tokens: (B, L, D)
    G = B.shape[2] if B.dim() == 4 else 1
    weights = (*tokens[:2], N) if B.dim() == 3 else (*tokens[:2], G, N)
    wanted = {"delta": (delta, tokens), "z": (z, tokens), "A": (A, (channels, N)),
              "D": (D, (channels,)), "delta_bias": (delta_bias, (channels,)),
              "B": (B, weights), "C": (C, weights)}
    for name, (v, shape) in wanted.items():
        if v is not None and tuple(v.shape) != shape:
            raise InputError(f"{name} has shape {tuple(v.shape)} - with u {tokens} and A "
                             f"{tuple(A.shape)} it must be {shape}")
    refuse(channels % G,
           f"{channels} channels do not divide into the {G} groups of B - give a multiple")


def _scan_reference(u, delta, A, B, C):
    """The recurrence as [1] writes it (Eq. 2a, 2b), token by token; delta as it is used.

    u, delta (B, L, D), A (D, N), B, C (B, L, G, N). Returns y (B, L, D), the last h (B, D, N)."""
    per_group = u.shape[2] // B.shape[2]                     # E = D / G
    B, C = (v.repeat_interleave(per_group, dim=2) for v in (B, C))     # (B, L, D, N)
    h = u.new_zeros(u.shape[0], *A.shape)                    # (B, D, N)
    y = []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)                    # (B, D, N)
        B_bar = delta[:, t, :, None] * B[:, t]               # Euler
        h = A_bar * h + B_bar * u[:, t, :, None]                       # Eq. 2a
        y.append((h * C[:, t]).sum(-1))                                # Eq. 2b: <C_t, h_t>
    return torch.stack(y, 1), h


class _TorchScan(torch.autograd.Function):
    """All of the scan chunk by chunk, with its analytic gradient.

    u, delta, z (B, L, G, E); B, C (B, L, G, N); A (G, E, N); D, bias (G, E). Within a chunk time
    comes first, so that a step is contiguous memory: (T, B, G, E), and (T, B, G, E, N) with states.
    The states of a chunk exist only while it is worked on; of each chunk only the state it starts
    from is kept, and the backward pass makes the others again. With chunks of T >= N tokens that
    is no more memory than u. (Dividing by running products of exp(delta A) would turn the loop
    over time into one cumulative sum, and underflow at the first long decay.)"""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus, T):
        y, starts, h = torch.empty_like(u), [], u.new_zeros(len(u), *A.shape)    # h_0
        a, x = (u.new_empty(min(T, u.shape[1]), *h.shape) for _ in range(2))
        for i in range(0, u.shape[1], T):
            now = slice(i, i + T)
            starts.append(h)                                 # (B, G, E, N)
            u_t, raw, B_t, C_t = _time_first(now, u, delta, B, C)
            step = F.softplus(raw + bias) if softplus else raw + bias
            h = _states(u_t, step, A, B_t, h, a, x).clone()
            y_t = torch.einsum("tbgen,tbgn->tbge", x[:len(u_t)], C_t) + D * u_t
            y[:, now] = y_t.transpose(0, 1)                  # (B, T, G, E)
            if z is not None:
                y[:, now] *= F.silu(z[:, now])
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, *starts)
        ctx.softplus, ctx.T = softplus, T
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y, g_h):
        """With g_t the gradient of h_t and a_t = exp(delta_t A): g_t = C_t g_y_t + a_{t+1} g_{t+1};
        the gradients of the inputs are products of g_t."""
        u, delta, A, B, C, D, z, bias, *starts = ctx.saved_tensors
        g_u, g_delta, g_B, g_C = (torch.empty_like(v) for v in (u, delta, B, C))
        g_A, g_D = torch.zeros_like(A), torch.zeros_like(D)  # sums over batch and tokens
        g_z = None if z is None else torch.empty_like(z)
        a, x, g = (u.new_empty(min(ctx.T, u.shape[1]), *g_h.shape) for _ in range(3))
        for i in reversed(range(0, u.shape[1], ctx.T)):
            now, h = slice(i, i + ctx.T), starts[i // ctx.T]
            u_t, raw, out, B_t, C_t = _time_first(now, u, delta, g_y, B, C)
            raw, n = raw + bias, len(u_t)
            step = F.softplus(raw) if ctx.softplus else raw  # (T, B, G, E)
            _states(u_t, step, A, B_t, h, a, x)
            if z is not None:
                z_t, = _time_first(now, z)
                gate = torch.sigmoid(z_t)                    # silu(z) = z gate
                y_t = torch.einsum("tbgen,tbgn->tbge", x[:n], C_t) + D * u_t
                g_z[:, now] = (out * y_t * gate * (1 + z_t * (1 - gate))).transpose(0, 1)
                out = out * z_t * gate                       # from here on the gradient before it
            torch.mul(out.unsqueeze(-1), C_t.unsqueeze(-2), out=g[:n])           # (T, B, G, E, N)
            g[n - 1] += g_h                                  # from the chunk after
            for t in range(n - 2, -1, -1):
                g[t].addcmul_(a[t + 1], g[t + 1])
            g_h = a[0] * g[0]                                # to the chunk before
            g_B[:, now] = torch.einsum("tbgen,tbge->btgn", g[:n], step * u_t)    # (B, T, G, N)
            g_C[:, now] = torch.einsum("tbgen,tbge->btgn", x[:n], out)
            gB = torch.einsum("tbgen,tbgn->tbge", g[:n], B_t)
            a[1:n] *= x[:n - 1]                              # a_t h_{t-1}
            a[0] *= h
            gah = a[:n].mul_(g[:n])                          # g_t a_t h_{t-1}, (T, B, G, E, N)
            g_step = gB * u_t + torch.mul(gah, A, out=x[:n]).sum(-1)
            g_step = g_step * torch.sigmoid(raw) if ctx.softplus else g_step     # softplus' slope
            g_A += gah.mul_(step.unsqueeze(-1)).sum((0, 1))  # (G, E, N)
            g_D += (out * u_t).sum((0, 1))                   # (G, E)
            g_u[:, now] = (step * gB + D * out).transpose(0, 1)
            g_delta[:, now] = g_step.transpose(0, 1)         # (B, T, G, E)
        g_bias = g_delta.sum((0, 1))                         # the bias is added to delta
        return g_u, g_delta, g_A, g_B, g_C, g_D, g_z, g_bias, None, None


def _time_first(now, *tensors):
    """The tokens `now` of tensors (B, L, ...), as (T, B, ...)."""
    return [v[:, now].transpose(0, 1).contiguous() for v in tensors]


def _states(u, step, A, B, h, a, x):
    """Fill a with exp(delta_t A) and x with h_t of one chunk, from the state h; the last h_t."""
    n = len(u)                                               # T, less in the last chunk
    torch.mul(step.unsqueeze(-1), A, out=a[:n]).exp_()
    torch.mul((step * u).unsqueeze(-1), B.unsqueeze(-2), out=x[:n])
    for t in range(n):
        h = x[t].addcmul_(a[t], h)                           # one call a token
    return h


class _NativeScan(torch.autograd.Function):
    """The compiled scan (csrc/) in one pass: states in registers, the start of each chunk kept."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus, keep):
        y, h, starts = native().forward(u, delta, A, B, C, D, z, bias, softplus, keep)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, starts)
        ctx.softplus = softplus
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y, g_h):
        *inputs, starts = ctx.saved_tensors
        grads = native().backward(*inputs, ctx.softplus, starts, g_y.contiguous(), g_h.contiguous())
        return *grads, grads[1].sum((0, 1)), None, None      # the bias is added to delta


def _choose_backend(backend, u, states):
    """The name of the backend that serves u (B, L, D) with so many states; InputError if none."""
    if backend == "auto":
        wanted = os.environ.get("REPSAE_NATIVE") == "1" and native()
        return "native" if wanted and native().serves(u, states) else "torch"
    refuse(backend not in ("reference", "torch", "native"),
           f"backend={backend!r} - use auto, reference, torch, native")
    refuse(backend == "native" and not (native() and native().serves(u, states)), "there is no "
           f"native scan of {u.dtype} on {u.device} with {states} states - use backend='torch'")
    return backend


@lru_cache(None)
def native(verbose=False):
    """The compiled scan (forward, backward, serves); None, and said once, if it cannot be built."""
    try:
        return build_native(verbose)
    except Exception as e:                                   # no compiler, no ninja, ...
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
        print(f"ssm: the native scan cannot be built ({why}) - it needs ninja and a C++ compiler; "
              "the torch scan serves", file=sys.stderr)


def build_native(verbose=False):
    """Compile csrc/ with torch.utils.cpp_extension (ninja, a C++ compiler); returns the module."""
    import fcntl                                             # late: Windows has none, and no scan
    from torch.utils import cpp_extension
    csrc = os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc")      # beside this file
    sources = [os.path.join(csrc, "selective_scan.cpp")]
    refuse(not os.path.exists(sources[0]), f"no {sources[0]}")
    # All plain C++: errno and floating-point traps are given up, exact arithmetic is not.
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    flags.append("-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp")    # Apple: no threads
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")            # else half of each register is used
    cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if cuda:
        sources.append(os.path.join(csrc, "selective_scan.cu"))
        flags.append("-DWITH_CUDA")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = os.path.join(root, f"repsae_scan_{sys.implementation.cache_tag}_{torch.__version__}")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "builder"), "w") as builder:
        fcntl.flock(builder, fcntl.LOCK_EX)                  # one builder; goes with its process
        stale = os.path.join(folder, "lock")                 # torch's, left when one is killed
        if os.path.exists(stale):
            print(f"ssm: a build was killed and left {stale}; building anew", file=sys.stderr)
            os.remove(stale)                                 # torch would wait for ever for that
        return cpp_extension.load("repsae_scan", sources, extra_cflags=flags, with_cuda=cuda,
                                  extra_cuda_cflags=["-O3"], build_directory=folder,
                                  verbose=verbose)


# -- Parts that several backbones use --------------------------------------------------------------

class DropPath(nn.Module):
    """Stochastic depth: in training a sample's whole branch is dropped with probability p."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.p  # (B, 1, ...)
        return x * keep / (1 - self.p)                       # so that the mean stays


def gelu_mlp(dim, hidden):
    """Two layers with GELU between, (..., d) -> (..., d)."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))


def _grid(x, patch, name):
    """Rows and columns of patches of an image batch; refuses what does not divide."""
    refuse(x.dim() != 4 or x.shape[1] != 3,
           f"images have shape {tuple(x.shape)} - {name} wants (batch, 3, h, w)")
    h, w = x.shape[2:]
    refuse(h % patch or w % patch or not h or not w,
           f"images are {h}x{w} - {name} wants multiples of {patch}")
    return h // patch, w // patch


def _patches(patch, size):
    """T, the number of whole patches in a square picture of `size` pixels."""
    refuse(not 0 < patch <= size,
           f"patches of {patch} pixels in pictures of {size} - give smaller ones")
    return (size // patch) ** 2


def _interpolate(pos, grid, offset=0.1, antialias=False):
    """Resize a square of position embeddings (1, n*n, d) to `grid`, bicubic: (1, T, d).

    DINO passes scale factors with 0.1 added against rounding, and that factor, not the ratio of
    the sizes, places the samples: the result differs visibly from asking for the size. DINOv2
    with registers (offset 0) asks for the size."""
    n = int(pos.shape[1] ** 0.5)                             # rows of the trained grid
    image = _float32_up(pos).reshape(1, n, n, -1).permute(0, 3, 1, 2)            # (1, d, n, n)
    scale = tuple((g + offset) / n for g in grid) if offset else None
    image = F.interpolate(image, None if scale else tuple(grid), scale, "bicubic",
                          antialias=antialias)               # (1, d, *grid)
    return image.flatten(2).transpose(1, 2).to(pos.dtype)


def _float32_up(x):
    """x in float32, or in float64 if it is: for what 16 bits are too few for."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _trunc_normal(*tensors):
    for v in tensors:
        nn.init.trunc_normal_(v, std=0.02)


def _init_linear(model):
    """Every linear layer as timm and DINO begin: weights of deviation 0.02, biases 0."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            _trunc_normal(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class PatchTokens(nn.Module):
    """What ViT and Vim share: patches as tokens, a class token, positions, a head.

    size, patch   the trained image size and the patch size; any multiple of the patch can be given
    `forward`: (B, 3, H, W) -> class logits (B, n_classes), or class tokens (B, d) if that is 0."""
    middle, resize = False, {}    # is the class token's row in the middle; see `_interpolate`

    def __init__(self, dim, patch, size):
        super().__init__()
        self.dim, self.patch, self.size = dim, patch, size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _patches(patch, size), dim))

    def position(self, x, grid):
        """(1, 1 + T, d) as the tokens come; resized to the grid of images x not of that size."""
        pos = self.pos_embed
        if tuple(x.shape[2:]) == (self.size, self.size):
            return pos
        row = (pos.shape[1] - 1) // 2 if self.middle else 0
        patches = _interpolate(torch.cat([pos[:, :row], pos[:, row + 1:]], 1), grid, **self.resize)
        now = patches.shape[1] // 2 if self.middle else 0
        return torch.cat([patches[:, :now], pos[:, row:row + 1], patches[:, now:]], 1)

    def forward(self, x):
        return self.head(self.features(x))


# -- ViT: DINO and DINOv2 --------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention, (B, T, d) -> same.

    With `keep` set, the probabilities (B, heads, T, T) of the last pass stay in `kept`, and their
    gradient with them: heat maps need both. Else torch's fused kernel, which never forms them."""
    keep = False

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv, causal=False):
        """softmax(q k' / sqrt(d)) v by heads, (B, T, 3 d) -> (B, T, d); causal: sees no later t."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, .)
        if self.keep:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if causal:
                scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(1)
            self.kept = torch.softmax(scores, -1)
            if self.kept.requires_grad:
                self.kept.retain_grad()
            out = self.kept @ v                              # (B, heads, T, d / heads)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    """DINOv2 giant's MLP: w3(silu(x1) x2) with x1, x2 the halves of w12(x)."""

    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8          # two thirds: there are three matrices
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(x1) * x2)


class LayerScale(nn.Module):
    """DINOv2: a learnt factor for each channel of a branch."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, d) -> same."""

    def __init__(self, dim, heads, scale, mlp, drop_path):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp(dim, 4 * dim)
        self.ls1, self.ls2, self.drop_path = scale(dim), scale(dim), DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ViT(PatchTokens):
    """Vision transformer with a class token, as in DINO; with `v2` (LayerScale, a mask token) as in
    DINOv2, whose `registers`, 0 or 4, are extra tokens between class token and patches."""

    def __init__(self, dim, depth, heads, patch=16, size=224, n_classes=0, drop_path=0., v2=False,
                 registers=0, swiglu=False):
        super().__init__(dim, patch, size)
        self.registers = registers
        if v2:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused: released files hold one
        if registers:
            self.resize = {"offset": 0., "antialias": True}
            self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, dim))
        scale, mlp = LayerScale if v2 else nn.Identity, SwiGLU if swiglu else gelu_mlp
        self.blocks = nn.ModuleList(Block(dim, heads, scale, mlp, p)
                                    for p in torch.linspace(0, drop_path, depth).tolist())
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, n_classes) if n_classes else nn.Identity()
        _trunc_normal(self.pos_embed, *(() if v2 else (self.cls_token,)))
        if v2:
            nn.init.normal_(self.cls_token, std=1e-6)
        _init_linear(self)

    def blocks_out(self, x, last=1, norm=True):
        """The last blocks' outputs, oldest first, normed: [(B, 1 + registers + T, d)]; the grid."""
        grid, cls = _grid(x, self.patch, "this ViT"), self.cls_token.expand(len(x), -1, -1)
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)            # (B, T, d)
        x = torch.cat([cls, patches], 1) + self.position(x, grid)
        if self.registers:                                   # added after positions: they have none
            extra = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], extra, x[:, 1:]], 1)    # (B, 1 + registers + T, d)
        out = deque(maxlen=last)
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return [self.norm(x) if norm else x for x in out], grid

    def patches(self, x, cls=False):
        """All tokens -> those of patches (B, T, d); with `cls` after the class token."""
        return torch.cat([x[:, :int(cls)], x[:, 1 + self.registers:]], 1)

    def features(self, x, tokens=False, last=1):
        """Class tokens of the last blocks (B, last d); `tokens`: those of patches ("all": after the
        class token), and grid; with last > 1 of the residual stream after that block."""
        out, grid = self.blocks_out(x, last, norm=last == 1 or not tokens)
        cls = torch.cat([v[:, 0] for v in out], -1)
        return (self.patches(out[0], tokens == "all"), grid) if tokens else cls


# -- Vim: Vision Mamba -----------------------------------------------------------------------------

class Mixer(nn.Module):
    """Vim's bidirectional Mamba block ("v2"), (B, L, d) -> same: two scans with weights of their
    own between shared projections.

    The second direction runs over the reversed sequence, gate and convolution included. Names
    ending in _b belong to it; `D_b` is its skip, `A_b_log` its log(-A)."""
    backend = "auto"

    def __init__(self, dim, depth, d_state=16):
        super().__init__()
        E, self.r, self.N = 2 * dim, math.ceil(dim / 16), d_state
        self.in_proj = nn.Linear(dim, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, dim, bias=False)
        rates = torch.log(torch.arange(1., d_state + 1)).repeat(E, 1)            # (E, N)
        for end in ("", "_b"):
            setattr(self, f"conv1d{end}", nn.Conv1d(E, E, 4, groups=E, padding=3))
            setattr(self, f"x_proj{end}", nn.Linear(E, self.r + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{end}", nn.Linear(self.r, E))
            setattr(self, f"A{end}_log", nn.Parameter(rates.clone()))
            setattr(self, f"D{end}", nn.Parameter(torch.ones(E)))
        nn.init.kaiming_uniform_(self.out_proj.weight, a=5 ** 0.5)
        with torch.no_grad():
            self.out_proj.weight /= depth ** 0.5             # so that depth does not add up
            self.dt_proj.weight.uniform_(-self.r ** -0.5, self.r ** -0.5)
            self.dt_proj.bias.copy_(_delta_bias(E))
            self.dt_proj_b.bias.zero_()                      # as released: not as small

    def _direction(self, xz, end):
        x, z = xz.chunk(2, -1)                               # (B, L, E) each
        conv, dt_proj = getattr(self, f"conv1d{end}"), getattr(self, f"dt_proj{end}")
        x = conv(x.transpose(1, 2))[..., :x.shape[1]]        # causal: no later token
        x = F.silu(x.transpose(1, 2))                        # (B, L, E)
        x_proj, A_log = getattr(self, f"x_proj{end}"), getattr(self, f"A{end}_log")
        delta, B, C = x_proj(x).split([self.r, self.N, self.N], -1)  # (B, L, r), (B, L, N)
        delta = F.linear(delta, dt_proj.weight)              # its bias is added inside the scan
        A, D = -torch.exp(_float32_up(A_log)), getattr(self, f"D{end}")          # (E, N), (E,)
        return selective_scan(x, delta, A, B, C, D, z, dt_proj.bias, backend=self.backend)

    def forward(self, x):
        xz = self.in_proj(x)                                 # (B, L, 2 E)
        backwards = self._direction(xz.flip(1), "_b").flip(1)
        return self.out_proj((self._direction(xz, "") + backwards) / 2)


def _delta_bias(n):
    """Mamba's initial bias of delta (n,): softplus of it is log-uniform in 0.001..0.1."""
    low, high = math.log(1e-3), math.log(0.1)
    delta = torch.exp(torch.rand(n) * (high - low) + low)
    return delta + torch.log(-torch.expm1(-delta))           # inverse softplus


class Vim(PatchTokens):
    """Vision Mamba ([2], thesis 3.2.1): patches with a class token in their middle, Mamba blocks.

    double_cls    Vim4Path's variant, as its authors trained it: the class token stands at the
                  front, with a position (whose row 0 is then the class token's, DINO's
                  convention), and the same parameter once more in the middle, without one: 198
                  tokens at 224 px, 38 at 96. The middle one is the output in either variant.
    A layer's output is added to the residual only in the next layer ("delayed"), so layer i's
    drop_path acts on the output of layer i - 1."""

    def __init__(self, dim, depth, patch=16, size=224, n_classes=0, drop_path=0.,
                 double_cls=False, d_state=16):
        super().__init__(dim, patch, size)
        self.double_cls, self.middle = double_cls, not double_cls
        rates, self.layers = torch.linspace(0, drop_path, depth).tolist(), nn.ModuleList()
        for p in [0., *rates[:-1]]:
            parts = {"mixer": Mixer(dim, depth, d_state), "norm": nn.RMSNorm(dim, eps=1e-5)}
            self.layers.append(nn.ModuleDict({**parts, "drop_path": DropPath(p)}))
        self.drop_path = DropPath(drop_path)
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, n_classes) if n_classes else nn.Identity()
        _trunc_normal(self.cls_token, self.pos_embed)
        # LeCun's normal (variance 1 / fan_in), widened against a truncation that in the timm which
        # Vim pins cuts off nothing.
        nn.init.normal_(self.patch_embed.proj.weight, std=(3 * patch ** 2) ** -0.5 / 0.87962566)
        nn.init.zeros_(self.patch_embed.proj.bias)
        _init_linear(self.head)

    def embed(self, x):
        """(B, 3, H, W) -> tokens (B, L, d), and the grid of patches."""
        grid = _grid(x, self.patch, "this Vim")
        pos = self.position(x, grid)
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)                  # (B, T, d)
        cls, middle = self.cls_token.expand(len(x), -1, -1), (x.shape[1] + self.double_cls) // 2
        if self.double_cls:
            x = torch.cat([cls, x], 1) + pos                 # the one in the middle has no position
        x = torch.cat([x[:, :middle], cls, x[:, middle:]], 1)                    # (B, L, d)
        return x if self.double_cls else x + pos, grid

    def patches(self, x, cls=False):
        """All tokens -> those of patches (B, T, d); with `cls` after the middle class token."""
        m = (x.shape[1] - 1) // 2
        return torch.cat([x[:, m:m + cls], x[:, int(self.double_cls):m], x[:, m + 1:]], 1)

    def features(self, x, tokens=False):
        """Middle class token (B, d); `tokens`: of patches (B, T, d) ("all": after it), and grid."""
        x, grid = self.embed(x)                              # (B, L, d)
        residual = None
        for layer in self.layers:
            residual = _float32_up(x) if residual is None else residual + layer.drop_path(x)
            x = layer.mixer(layer.norm(residual.to(layer.norm.weight.dtype)))
        x = self.norm_f((residual + self.drop_path(x)).to(self.norm_f.weight.dtype))
        return (self.patches(x, tokens == "all"), grid) if tokens else x[:, (x.shape[1] - 1) // 2]


# -- VMamba ----------------------------------------------------------------------------------------

def cross_scan(x):
    """(B, H, W, E) -> (B, L, 4, E): VMamba's four orders, by rows, by columns, both backwards."""
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)             # (B, L, E)
    return torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 2)


def cross_merge(y, h, w):
    """(B, L, 4, E) -> (B, H, W, E): the sum of the four, each put back in place."""
    rows, columns = y[:, :, 0] + y[:, :, 2].flip(1), y[:, :, 1] + y[:, :, 3].flip(1)
    return rows.unflatten(1, (h, w)) + columns.unflatten(1, (w, h)).transpose(1, 2)


class SS2D(nn.Module):
    """2D selective scan ([3]), (B, H, W, d) -> same: a convolution, then the sum of scans in four
    directions, the four groups of one scan. "v05_noz": no gate, state size 1 as released."""

    def __init__(self, dim, d_state=1):
        super().__init__()
        E, self.r, self.N = 2 * dim, math.ceil(dim / 16), d_state
        self.in_proj = nn.Linear(dim, E, bias=False)
        self.out_proj = nn.Linear(E, dim, bias=False)
        self.conv2d = nn.Conv2d(E, E, 3, padding=1, groups=E, bias=False)
        self.out_norm = nn.LayerNorm(E)
        x_proj = torch.empty(4, self.r + 2 * d_state, E).uniform_(-E ** -0.5, E ** -0.5)
        dt_projs = torch.empty(4, E, self.r).uniform_(-self.r ** -0.5, self.r ** -0.5)
        self.x_proj_weight, self.dt_projs_weight = nn.Parameter(x_proj), nn.Parameter(dt_projs)
        self.dt_projs_bias = nn.Parameter(torch.stack([_delta_bias(E) for _ in range(4)]))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1., d_state + 1)).repeat(4 * E, 1))
        self.Ds = nn.Parameter(torch.ones(4 * E))
        _trunc_normal(self.in_proj.weight, self.out_proj.weight)

    def forward(self, x):
        h, w = x.shape[1:3]
        x = self.conv2d(self.in_proj(x).permute(0, 3, 1, 2))                     # (B, E, H, W)
        u = cross_scan(F.silu(x.permute(0, 2, 3, 1)))                            # (B, L, 4, E)
        weights = torch.einsum("blke,kce->blkc", u, self.x_proj_weight)  # (B, L, 4, r + 2 N)
        delta, B, C = weights.split([self.r, self.N, self.N], -1)
        delta = torch.einsum("blkr,ker->blke", delta, self.dt_projs_weight)      # (B, L, 4, E)
        A = -torch.exp(_float32_up(self.A_logs))                                 # (4 E, N)
        y = selective_scan(u.flatten(2), delta.flatten(2), A, B, C, self.Ds, None,
                           self.dt_projs_bias.flatten())
        return self.out_proj(self.out_norm(cross_merge(y.unflatten(2, (4, -1)), h, w)))


class VSSBlock(nn.Module):
    """Pre-norm block: SS2D, then an MLP, (B, H, W, d) -> same."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.norm, self.op = nn.LayerNorm(dim), SS2D(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), gelu_mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Permute(nn.Module):
    """Between (B, C, H, W) and (B, H, W, C); a module, since released files count it."""

    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class VMamba(nn.Module):
    """VMamba ([3], thesis 3.3.1), the v2 ("s2") releases: four stages of VSS blocks, halving the
    resolution in between.

    (B, 3, H, W), sides multiples of 32 -> logits, or features (B, 8 dim) if n_classes = 0."""

    def __init__(self, dim, depths, n_classes=0, drop_path=0.):
        super().__init__()
        dims = [dim * 2 ** i for i in range(len(depths))]
        self.dim, self.reduction = dims[-1], 4 * 2 ** (len(depths) - 1)
        first, last = partial(_Permute, 0, 3, 1, 2), partial(_Permute, 0, 2, 3, 1)    # channels
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        self.patch_embed = nn.Sequential(
            conv(3, dim // 2), last(), nn.LayerNorm(dim // 2), first(), nn.GELU(),
            conv(dim // 2, dim), last(), nn.LayerNorm(dim))
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            blocks = nn.Sequential(*(VSSBlock(dims[i], next(rates)) for _ in range(depth)))
            halve = nn.Identity()
            if i + 1 < len(depths):
                norm = nn.LayerNorm(dims[i + 1])
                halve = nn.Sequential(first(), conv(dims[i], dims[i + 1]), last(), norm)
            self.layers.append(nn.ModuleDict({"blocks": blocks, "downsample": halve}))
        head = nn.Linear(self.dim, n_classes) if n_classes else nn.Identity()
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(self.dim), "head": head})
        _init_linear(self)

    def stages(self, x):
        """The output of each stage before it is downsampled: a list of (B, H_i, W_i, C_i)."""
        _grid(x, self.reduction, "this VMamba")
        x, out = self.patch_embed(x), []                     # (B, H / 4, W / 4, dim)
        for stage in self.layers:
            out.append(stage.blocks(x))
            x = stage.downsample(out[-1])
        return out

    def features(self, x, tokens=False):
        """Pooled features (B, d); with `tokens` the last stage's normed map (B, T, d), its grid."""
        refuse(tokens == "all", "VMamba has no class token - leave it out")
        x = self.classifier.norm(self.stages(x)[-1])         # (B, H / 32, W / 32, d)
        return (x.flatten(1, 2), tuple(x.shape[1:3])) if tokens else x.mean((1, 2))

    def forward(self, x):
        return self.classifier.head(self.features(x))


# -- Training: one update, and one loop over epochs with early stopping ----------------------------

def descend(optimiser, loss, mend=None):
    """One step of the optimiser down the gradient of the scalar `loss`, returned as a float; mend()
    may change (clip) the gradients. Raises InputError when the loss is no number any more."""
    refuse(not torch.isfinite(loss), f"the loss became {loss} - lower the learning rate")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if mend:
        mend()
    optimiser.step()
    return loss.item()


def fit(model, optimiser, batches, loss, epochs, validate=None, patience=math.inf, least=0):
    """Supervised training by epochs, with early stopping if asked for; bags and fine-tuning.

    batches(epoch)    iterable of tuples, each the arguments of loss(model, ...), a scalar
    validate(model)   a number, lower is better, of data neither trained on nor reported: training
                      stops when it has not fallen for `patience` epochs, but never before `least`,
                      and the best epoch's weights are put back
    Without validate all epochs are trained. Returns [(mean loss, validation or None)] by epoch."""
    history, best, kept, at = [], math.inf, None, 0          # at: the best epoch
    for epoch in range(epochs):
        model.train()
        spent = [descend(optimiser, loss(model, *batch)) for batch in batches(epoch)]
        model.eval()
        with torch.no_grad():
            value = validate(model) if validate else None
        history.append((sum(spent) / len(spent), value))
        if validate and (value < best or kept is None):
            best, at = value, epoch
            kept = {k: v.clone() for k, v in model.state_dict().items()}
        if validate and epoch - at >= patience and epoch + 1 >= least:
            break
    if kept:
        model.load_state_dict(kept)
    return history


def held_loss(logits, held):
    """What training stops by: cross-entropy of logits(*inputs) (n, C) over `held`: (*inputs, y)."""
    found, y = zip(*((logits(*inputs), y) for *inputs, y in held))
    return F.cross_entropy(torch.cat(found), torch.cat(y)).item()


def fit_classifier(model, batches, held, epochs, lr, weight_decay, patience):
    """Fine-tune a classifier of pictures (thesis 3.3) with AdamW; returns what `fit` returns.

    batches(epoch) and held() yield x (B, 3, H, W) and y (B,); held() says when to stop."""
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    return fit(model, optimiser, batches, lambda m, x, y: F.cross_entropy(m(x), y), epochs,
               lambda m: held_loss(m, held()), patience)


def cosine_schedule(step, n_steps, base, final, warmup=0, start=0.):
    """From start to base in `warmup` steps (base is the last's), then half a cosine to final."""
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    turn = math.pi * (step - warmup) / max(n_steps - warmup, 1)
    return final + (base - final) / 2 * (1 + math.cos(turn))


# -- A small CLIP: image and text encoders trained to agree (thesis 5.3.1; Radford et al. 2021) ----

class CLIPAttention(Attention):
    """`Attention` under the names of torch's nn.MultiheadAttention, which OpenAI's files have."""

    def __init__(self, dim, heads, causal):
        nn.Module.__init__(self)
        self.heads, self.causal = heads, causal              # text sees no later tokens
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim).normal_(std=dim ** -0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                # (B, T, 3 d)
        return self.out_proj(self.attend(qkv, self.causal))


class CLIPBlock(nn.Module):
    """Pre-norm transformer block under OpenAI's names; quick: see `CLIP`."""

    def __init__(self, dim, heads, causal, quick):
        super().__init__()
        self.quick = quick
        self.attn = CLIPAttention(dim, heads, causal)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        wide, narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.ModuleDict({"c_fc": wide, "c_proj": narrow})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        h = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


def _clip_blocks(dim, layers, heads, **how):
    blocks = nn.Sequential(*(CLIPBlock(dim, heads, **how) for _ in range(layers)))
    return nn.Sequential(OrderedDict(resblocks=blocks))      # the name between is OpenAI's


class CLIPVision(nn.Module):
    """CLIP's ViT: images (B, 3, size, size) -> class tokens (B, out)."""

    def __init__(self, dim, layers, heads, patch, size, out, quick=True):
        super().__init__()
        self.dim, self.patch, self.size, T = out, patch, size, _patches(patch, size)
        self.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(dim ** -0.5 * torch.randn(dim))
        self.positional_embedding = nn.Parameter(dim ** -0.5 * torch.randn(T + 1, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = _clip_blocks(dim, layers, heads, causal=False, quick=quick)
        self.proj = nn.Parameter(dim ** -0.5 * torch.randn(dim, out))

    def features(self, x, tokens=False):
        """Class tokens (B, out); `tokens`: of patches (B, T, dim) ("all": after it), and grid."""
        h, w = x.shape[2:]
        refuse({h, w} != {self.size},
               f"images are {h}x{w} - this CLIP was trained at {self.size}x{self.size}")
        x = self.conv1(x)                                    # (B, dim, rows, columns)
        grid, x = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2)               # (B, T, dim)
        cls = self.class_embedding.expand(len(x), 1, -1)     # (B, 1, dim)
        x = torch.cat([cls, x], 1) + self.positional_embedding                   # (B, 1 + T, dim)
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        return (self.patches(x, tokens == "all"), grid) if tokens else x[:, 0] @ self.proj

    registers, patches = 0, ViT.patches                      # all tokens but the class token
    forward = features


class CLIP(nn.Module):
    """An image encoder, `visual`, and a text encoder into one space, under OpenAI's names.

    out            width of that space
    vision, text   (dim, layers, heads) of each transformer
    vocab          number of tokens; context: the longest text
    quick          OpenAI's QuickGELU; open_clip's own models (DataComp, LAION) have GELU
    Text ends in the token of the highest number, whose output is the text's feature."""

    def __init__(self, out, vision, text, vocab, context, patch, size, quick=True):
        super().__init__()
        self.config = dict(out=out, vision=vision, text=text, vocab=vocab, context=context,
                           patch=patch, size=size, quick=quick)
        dim = text[0]
        self.visual = CLIPVision(*vision, patch, size, out, quick)
        self.token_embedding = nn.Embedding(vocab, dim)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, dim))
        self.transformer = _clip_blocks(*text, causal=True, quick=quick)
        self.ln_final = nn.LayerNorm(dim)
        self.text_projection = nn.Parameter(dim ** -0.5 * torch.randn(dim, out))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens):
        """(B, T) token numbers, T up to the context, zeros after the end -> (B, out)."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        x = self.ln_final(self.transformer(x))               # (B, T, dim)
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection

    def loss(self, images, tokens):
        """Symmetric cross-entropy of which text belongs to which image (Radford et al., Fig. 3)."""
        a, b = F.normalize(self.visual(images)), F.normalize(self.encode_text(tokens))
        logits = self.logit_scale.exp().clamp(max=100) * a @ b.T                 # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fit_clip(model, batch, n_steps, lr, on_step):
    """Train a CLIP with AdamW along a cosine. batch(t): images, tokens; on_step: see `fit_dino`."""
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1, fused=True)
    mend = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1.)
    model.train()
    for t in range(n_steps):
        now = cosine_schedule(t, n_steps, lr, 0., min(100, n_steps // 10))
        optimiser.param_groups[0]["lr"] = now
        images, tokens = (v.to(model.logit_scale.device) for v in batch(t))
        on_step(t + 1, {"loss": descend(optimiser, model.loss(images, tokens), mend)})
    model.eval()


@torch.no_grad()
def text_features(clip, words, captions, block=512):
    """Features (n, out) of captions; words that the tokenizer `words` does not know are left out:
    words(captions, context, strict=False) -> (n, context) tokens."""
    tokens = words(captions, clip.config["context"], strict=False).to(clip.logit_scale.device)
    return torch.cat([clip.encode_text(part) for part in tokens.split(block)])


@torch.no_grad()
def standardise_pixels(model, mean, std, assumed):
    """Change a model's first convolution to answer to pictures normalised by `assumed`, (mean, std)
    of R, G, B, as it did to those by `mean`, `std` (3,). Exact without padding (not VMamba)."""
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    numbers = (torch.as_tensor(v).to(conv.weight).view(3, 1, 1) for v in (mean, std, *assumed))
    mean, std, was_mean, was_std = numbers
    # A pixel is x was_std + was_mean.
    bias = model.positional_embedding[1:] if conv.bias is None else conv.bias    # CLIP's has none
    bias += (conv.weight * ((was_mean - mean) / std)).sum((1, 2, 3))             # (d,)
    conv.weight *= was_std / std


def clip_from_state(state, quick=True):
    """A CLIP of the shapes that a state_dict under OpenAI's names has (ViTs; heads are 64 wide),
    with those weights; quick: see `CLIP`. Raises InputError for any other."""
    def tower(side, dim):
        layers = sum(k.startswith(f"{side}transformer.") and k.endswith("ln_1.bias") for k in state)
        return dim, layers, max(dim // 64, 1)
    plain = ("input_resolution", "context_length", "vocab_size")        # no weights
    try:
        state = {k: v.float() for k, v in state.items() if k not in plain}
        width, _, patch, _ = state["visual.conv1.weight"].shape
        vocab, dim = state["token_embedding.weight"].shape
        T = len(state["visual.positional_embedding"]) - 1
        model = CLIP(state["text_projection"].shape[1], tower("visual.", width), tower("", dim),
                     vocab, len(state["positional_embedding"]), patch, round(T ** 0.5) * patch,
                     quick)
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as e:
        raise InputError(f"these are not the weights of a CLIP with a ViT ({str(e)[:80]!r}) - "
                         "give OpenAI's state_dict")
    return model


# -- DINO: self-distillation without labels (Caron et al. 2021, Algorithm 1; thesis 3.2.1) ---------
# Letters: V views (crops) of an image, the first 2 global; K prototypes; student and teacher are
# the same architecture.

class DINOHead(nn.Module):
    """Features (B, d) -> logits (B, K): three layers, then the cosine with each of K prototypes.
    norm_last keeps the prototypes' length (`weight_g`) at 1; DINO's switch for stability."""

    def __init__(self, dim, K=65536, hidden=2048, bottleneck=256, norm_last=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        _init_linear(self.mlp)
        directions = nn.Linear(bottleneck, K, bias=False).weight.detach()        # (K, bottleneck)
        lengths = nn.Parameter(torch.ones(K, 1), requires_grad=not norm_last)
        self.last_layer = nn.ParameterDict({"weight_g": lengths, "weight_v": directions})

    def forward(self, x):
        last = self.last_layer
        prototypes = last.weight_g * F.normalize(last.weight_v, dim=1)           # (K, bottleneck)
        return F.linear(F.normalize(self.mlp(x), dim=-1), prototypes)


class MultiCrop(nn.Module):
    """A backbone and a head: a list of crops, each (B, 3, h, w), -> logits (V B, K), view by view.
    Neighbours of the same size go through the backbone together, all features through the head."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops):
        features = [self.backbone.features(torch.cat(list(same)))
                    for _, same in groupby(crops, lambda x: x.shape[-2:])]
        return self.head(torch.cat(features))                # (V B, d) -> (V B, K)


def dino_loss(student, teacher, center, views, teacher_temp=0.04, student_temp=0.1):
    """Cross-entropy of every student view against every *other* global teacher view, averaged over
    pairs and images. student (V B, K) and teacher (2 B, K) logits, view by view; center (K,)."""
    q = torch.softmax((teacher.detach() - center) / teacher_temp, -1)
    s = torch.log_softmax(student / student_temp, -1)
    q, s = q.unflatten(0, (2, -1)), s.unflatten(0, (views, -1))                  # (views, B, K)
    own = (q * s[:2]).sum((0, -1))                           # (B,): of a view with itself
    pairs = own - (q.sum(0) * s.sum(0)).sum(-1)              # (B,)
    return pairs.mean() / (2 * views - 2)


STATE_SPACE = ("A_log", "A_b_log", "A_logs", "Ds", "dt_projs_bias")    # D, dt_proj.bias: vectors


def decay_groups(model, decay_ssm=False):
    """AdamW's two groups: matrices, which are decayed, and vectors, which are not.

    Without `decay_ssm` neither are the state space's decay rates, skips and step sizes, though
    matrices: decaying log(-A) pulls every rate to 1. (Published runs did; Mamba exempts them.)"""
    decayed, spared = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            spare = p.dim() < 2 or (not decay_ssm and name.endswith(STATE_SPACE))
            (spared if spare else decayed).append(p)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.}]


def clip_each(model, most):
    """Shrink every parameter's gradient to an L2 norm of at most `most`, each by itself (DINO)."""
    for p in model.parameters():
        nn.utils.clip_grad_norm_(p, most)


def dino_step(student, teacher, center, optimiser, crops, lr, weight_decay, momentum,
              teacher_temp=0.04, clip=3., freeze_last=False):
    """One step: the student's update, then teacher <- momentum teacher + (1 - momentum) student,
    then the centre. crops: V tensors (B, 3, h, w), global ones first. Returns floats: the loss;
    entropy and information of the teacher's output."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.param_groups[0]["weight_decay"] = weight_decay  # not of the group that is spared
    with torch.no_grad():
        logits = teacher(crops[:2])                          # (2 B, K)

    def mend():
        clip_each(student, clip)
        if freeze_last:                                      # in the first epoch prototypes stay
            student.head.last_layer.zero_grad(set_to_none=True)
    loss = dino_loss(student(crops), logits, center, len(crops), teacher_temp)
    told = {"loss": descend(optimiser, loss, mend)}
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters()):
            mine.mul_(momentum).add_(theirs, alpha=1 - momentum)
    q = torch.softmax((logits - center) / teacher_temp, -1)  # (2 B, K)
    told["entropy"], told["information"] = output_entropy(q)
    move_center(center, logits)
    return told


def move_center(center, teacher, momentum=0.9):
    """In place: the moving average (K,) of the teacher's logits over batches."""
    center.mul_(momentum).add_(teacher.mean(0), alpha=1 - momentum)


def output_entropy(q):
    """Of distributions (n, K), in nats: mean entropy, and the entropy of their mean less that. The
    second is how much an output tells of its image: 0 means collapse, be it to the uniform output
    (entropy ln K) or to a constant one."""
    entropy = torch.special.entr(q).sum(-1).mean().item()
    return entropy, torch.special.entr(q.mean(0)).sum().item() - entropy


def dino_nets(arch, size, patch=None, prototypes=65536, head_hidden=2048, bottleneck=256,
              decay_ssm=False, device="cpu"):
    """Student (in training, with DINO's drop path of 0.1), teacher (the same weights; no gradient,
    no drop path), centre (K,) and AdamW."""
    def net(p):
        backbone = make_backbone(arch, size=size, patch=patch, drop_path=p)
        head = DINOHead(backbone.dim, prototypes, head_hidden, bottleneck)
        return MultiCrop(backbone, head).to(device)
    student, teacher = net(0.1).train(), net(0.).eval().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimiser = torch.optim.AdamW(decay_groups(student, decay_ssm))
    return student, teacher, torch.zeros(prototypes, device=device), optimiser


def dino_state(nets, step):
    """What `restore_dino` needs to go on after `step` steps."""
    student, teacher, center, optimiser = nets
    return {"student": student.state_dict(), "teacher": teacher.state_dict(), "center": center,
            "optimiser": optimiser.state_dict(), "step": step}


def restore_dino(nets, kept):
    """Put a `dino_state` into new `dino_nets`; returns the step. Raises for what is none."""
    student, teacher, center, optimiser = nets
    student.load_state_dict(kept["student"])
    teacher.load_state_dict(kept["teacher"])
    optimiser.load_state_dict(kept["optimiser"])
    center.copy_(kept["center"].reshape(center.shape))
    for weights, moments in optimiser.state.items():         # torch itself would miss it
        if any(v.shape != weights.shape for key, v in moments.items() if key != "step"):
            raise ValueError("moments of other weights")
    if kept["step"] < 0:
        raise ValueError("a step before the first")
    return int(kept["step"])


def dino_schedule(step, epoch, n_steps, lr, warmup=10, weight_decay=0.04, momentum=0.996,
                  teacher_temp=0.04, warmup_start=0.):
    """The settings of `dino_step` in a step; `epoch` is the number of steps in one, n_steps in all.

    Defaults and constants are those of DINO's code: after `warmup` epochs lr is reached, and falls
    to 1e-6; weight decay rises to 0.4, momentum to 1; prototypes stay fixed in the first epoch."""
    return {"lr": cosine_schedule(step, n_steps, lr, 1e-6, warmup * epoch, warmup_start),
            "weight_decay": cosine_schedule(step, n_steps, weight_decay, 0.4),
            "momentum": cosine_schedule(step, n_steps, momentum, 1.),
            "teacher_temp": teacher_temp, "freeze_last": step < epoch}


def dino_settings_for(n, given):
    """Settings, {name: value}, but those `given`, that kept some thousand pictures, n, from
    collapse in our trials, and learn within minutes on a CPU."""
    # sides are multiples of a patch, or of what VMamba's four stages divide by
    step = 32 if "vmamba" in given.get("arch", "") else given.get("patch", 8)
    size = given.get("size", -(-max(32, 2 * step) // step) * step)
    epochs = given.get("epochs", min(max(96_000 // n, 10), 200))         # 20 minutes at most
    few = {"arch": "vit_micro", "size": size, "patch": 8, "local_crops": 6,
           "local_size": max(step, size // 2 // step * step), "local_scale": [0.2, 0.6],
           "blur": min(2., size / 80), "colour": 0.2, "standardise": True, "prototypes": 1024,
           "head_hidden": 512, "bottleneck": 64, "momentum": 0.99, "lr": 2e-3,
           "batch": min(64, 2 ** (n // 2).bit_length() // 2), "epochs": epochs,
           "warmup": -(-epochs // 10)}
    return {name: value for name, value in few.items() if name not in given}


def fit_dino(nets, batch, n_steps, epoch, on_step, start=0, seed=0, **schedule):
    """Train by DINO, from step `start` on. nets: student, teacher, centre (K,), optimiser.

    batch(t)           the views of step t, from 0: V tensors (B, 3, h, w), global ones first; a
                       pure function of t makes resuming exact
    epoch, schedule    see `dino_schedule`
    on_step(t, told)   after each step, t from 1: logs, saves, or raises to stop; told: a dict of
                       loss, entropy and information
    Raises InputError after an epoch in which the teacher's output never told 1e-3 nats of its
    picture: it has collapsed, and training will not bring it back."""
    (K,), device = nets[2].shape, nets[2].device
    most = math.inf if start % epoch else 0.                 # a resumed epoch is not judged
    for t in range(start, n_steps):
        views = [v.to(device) for v in batch(t)]
        torch.manual_seed(seed * 1_000_003 + t)              # drop path: the same after resuming
        told = dino_step(*nets, views, **dino_schedule(t, epoch, n_steps, **schedule))
        most = max(most, told["information"])                # in this epoch so far
        at, since = divmod(t + 1, epoch)                     # epochs done, steps since then
        if not since and most < 1e-3:
            kind = "uniform" if told["entropy"] > 0.9 * math.log(K) else "constant"
            raise InputError(
                f"collapse: the teacher's output was {kind} for every picture all through epoch "
                f"{at} (entropy {told['entropy']:.3f} of ln K = {math.log(K):.3f}) - lower --lr "
                "or the teacher's temperature, or raise --batch or --warmup")
        most = most if since else 0.
        on_step(t + 1, told)


def cam_layer(model, x):
    """Where Grad-CAM looks in a backbone, and how that layer's output becomes a map: (module,
    function -> (B, h, w, d)), for images x (B, 3, H, W).

    ViT and CLIP's: the first norm of the last block; Vim: what enters its last layer (as Vim4Path);
    VMamba: the output of the last stage."""
    if isinstance(model, VMamba):
        return model.layers[-1].blocks, lambda out: out
    if isinstance(model, CLIPVision):
        layer = model.transformer.resblocks[-1].ln_1
    else:
        layer = model.blocks[-1].norm1 if isinstance(model, ViT) else model.layers[-1].drop_path
    grid = _grid(x, model.patch, "this backbone")
    return layer, lambda out: model.patches(out).unflatten(1, grid)


# -- Bags of instances (thesis 3.2.2; attention: Ilse et al. 2018; CLAM: Lu et al. 2021) -----------
# Letters: B bags, N instances in the longest, d width of an instance, E of its embedding,
# C classes, A attentions (C for clam_mb, else 1).

HEADS = ("max", "mean", "abmil", "gated", "clam_sb", "clam_mb")


class MIL(nn.Module):
    """A bag of instances -> class logits. One class for all heads:

    max       the largest value of each embedding channel
    mean      the mean of all embeddings
    abmil     their mean weighted by softmax(w tanh(V h)), Ilse et al.
    gated     the same by softmax(w (tanh(V h) * sigmoid(U h)))
    clam_sb   gated, with a classifier of instances for each class beside it: `instance_loss`
    clam_mb   the same with an attention for each class

    Input x (B, N, d) and mask (B, N), False where a bag is padded (all True by default). Returns
    logits (B, C), scores (B, A, N), whose softmax is each instance's share in its bag, and
    embeddings h (B, N, E). The instances are first standardised by the buffers `mean` and `std`."""

    def __init__(self, dim, n_classes=2, head="gated", widths=(512,), attention=256, dropout=0.25):
        super().__init__()
        self.head, E = head, widths[-1]
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        layers = []
        for i, o in zip((dim, *widths), widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.embed = nn.Sequential(*layers, nn.Dropout(dropout))
        clam = head.startswith("clam")
        self.inner_dropout = nn.Dropout(dropout if clam else 0.)
        if head not in ("max", "mean"):
            self.V = nn.Linear(E, attention)
            self.U = nn.Linear(E, attention) if head != "abmil" else None
            self.w = nn.Linear(attention, n_classes if head == "clam_mb" else 1)
        self.classifier = nn.Linear(E, n_classes)            # clam_mb: row c reads attention c's
        if clam:
            self.instance_classifiers = nn.ModuleList(nn.Linear(E, 2) for _ in range(n_classes))

    def forward(self, x, mask=None):
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        real = self.embed((x[mask] - self.mean) / self.std)  # (n, E): without the padding
        h = real.new_zeros(*mask.shape, real.shape[-1]).masked_scatter(mask[..., None], real)
        if self.head == "max":                               # shares of those who have the largest
            pooled = h.amax(1, keepdim=True)                 # (B, 1, E); ReLU made all h >= 0
            top = ((h == pooled) & mask[..., None]).float()  # (B, N, E)
            scores = (top / top.sum(1, keepdim=True)).mean(-1)[:, None].log()    # (B, 1, N)
        else:
            scores = h.new_zeros(len(h), 1, h.shape[1])
            if self.head != "mean":
                a = self.inner_dropout(torch.tanh(self.V(h)))                    # (B, N, attention)
                if self.U is not None:
                    a = a * self.inner_dropout(torch.sigmoid(self.U(h)))
                scores = self.w(a).transpose(1, 2)           # (B, A, N)
            scores = scores.masked_fill(~mask[:, None], -math.inf)
            pooled = torch.softmax(scores, -1) @ h           # (B, A, E)
        if self.head == "clam_mb":
            logits = (pooled * self.classifier.weight).sum(-1) + self.classifier.bias  # (B, C)
        else:
            logits = self.classifier(pooled[:, 0])
        return logits, scores, h


def smooth_top1_svm(s, y):
    """log sum_j exp(s_j + [j != y] - s_y), the mean over rows of s (n, C): CLAM's instance loss,
    "svm" of Berrada et al. 2018 with alpha = tau = 1. Their code takes the hard hinge where scores
    differ by 6.9 or more; we stay with the formula."""
    return F.cross_entropy(s + 1 - F.one_hot(y, s.shape[1]), y)


def instance_loss(model, scores, h, mask, y, k=8, subtyping=False, loss=smooth_top1_svm):
    """CLAM's clustering: the k instances that its own class attends to most should be told from the
    k it attends to least; with `subtyping` other classes' favourites are none of theirs. The mean
    over bags.

    scores (B, A, N), h (B, N, E), mask (B, N) as `MIL` gives them, y (B,) labels. The choice has no
    gradient, h has. In bags of fewer than 2 k instances k is what fits: none is called both."""
    total, C = h.new_zeros(()), len(model.instance_classifiers)
    for b in range(len(h)):
        n = int(mask[b].sum())
        few = min(k, n // 2)                                 # none both first and last
        for c, classifier in enumerate(model.instance_classifiers):
            own = c == y[b]
            if few and (own or subtyping):
                order = scores[b, c if scores.shape[1] > 1 else 0, :n].argsort(descending=True)
                chosen = torch.cat([order[:few], order[-few:]]) if own else order[:few]
                target = torch.zeros_like(chosen)
                target[:few] = int(own)                      # 1: evidence of class c
                total = total + loss(classifier(h[b, chosen]), target) / (C if subtyping else 1)
    return total / len(h)


def mil_loss(model, x, mask, y, k=8, bag_weight=0.7, subtyping=False, loss=smooth_top1_svm):
    """Cross-entropy of the bags; for CLAM's heads bag_weight of it, the rest `instance_loss`."""
    logits, scores, h = model(x, mask)                       # (B, C), (B, A, N), (B, N, E)
    bag = F.cross_entropy(logits, y)
    if not model.head.startswith("clam"):
        return bag
    of_instances = instance_loss(model, scores, h, mask, y, k, subtyping, loss)
    return bag_weight * bag + (1 - bag_weight) * of_instances


def fit_mil(model, batches, held, epochs, lr, weight_decay=1e-5, cosine=False, patience=math.inf,
            least=0, **how):
    """Train a `MIL` with Adam; returns what `fit` returns.

    batches(epoch)   yields (x, mask, y); held: a list of such, whose labels stop the training, see
                     `fit`; all epochs are trained if it is empty
    how              settings of `mil_loss`; cosine: lr falls to 0 along half a cosine"""
    optimiser = torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay, fused=True)

    def scheduled(epoch):
        if cosine:
            optimiser.param_groups[0]["lr"] = cosine_schedule(epoch, epochs, lr, 0.)
        return batches(epoch)

    def validate(model):
        return held_loss(lambda *bags: model(*bags)[0], held)
    return fit(model, optimiser, scheduled, partial(mil_loss, **how), epochs,
               validate if held else None, patience, least)


# -- Presets, and released weights -----------------------------------------------------------------
# Every preset takes keyword arguments of its class: n_classes, drop_path, size, patch, ...

vit_tiny = partial(ViT, 192, 12, 3)
vit_small = partial(ViT, 384, 12, 6)
vit_base = partial(ViT, 768, 12, 12)
vit_micro = partial(ViT, 96, 4, 3, patch=8, size=32)         # ours: for teaching and tests
vim_tiny = partial(Vim, 192, 24)
vim_tiny_plus = partial(Vim, 384, 12)                        # Vim4Path's, not Vim's "tiny+"
vim_small = partial(Vim, 384, 24)
vim_base = partial(Vim, 768, 24)
vim_micro = partial(Vim, 96, 4, patch=8, size=32, d_state=8)
vmamba_tiny = partial(VMamba, 96, (2, 2, 5, 2))
vmamba_small = partial(VMamba, 96, (2, 2, 15, 2))
vmamba_base = partial(VMamba, 128, (2, 2, 15, 2))
vmamba_micro = partial(VMamba, 32, (1, 1, 1, 1))

PRESETS = {name: f for name, f in list(globals().items()) if isinstance(f, partial)}
# DINOv2 by its files' names
for letter, widths in (("s", (384, 12, 6)), ("b", (768, 12, 12)), ("l", (1024, 24, 16)),
                       ("g", (1536, 40, 24))):
    for ending, registers in (("", 0), ("_reg", 4)):
        PRESETS[f"dinov2_vit{letter}14{ending}"] = partial(
            ViT, *widths, patch=14, size=518, v2=True, registers=registers, swiglu=letter == "g")


def make_backbone(arch, **settings):
    """A preset by name; settings that are None are left to it (VMamba has no size, no patch)."""
    refuse(arch not in PRESETS, f"{arch} is no backbone - take one of {', '.join(PRESETS)}")
    skip = ("size", "patch") if arch.startswith("vmamba") else ()
    return PRESETS[arch](**{k: v for k, v in settings.items() if v is not None and k not in skip})


def last_linear(model):
    """(name, module) of a classifier's last linear layer; InputError when it has none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    refuse(not found, f"{type(model).__name__} ends in no linear layer - take another model")
    return found[-1]


def load_weights(model, path, new_head=False):
    """Load a released or own checkpoint into a backbone: weights only, nothing resized.

    Finds the state under teacher, student, model or state_dict, and strips module. and backbone.;
    of a DINO checkpoint (keys with backbone.) the projection head is left out, and so is a
    classifier when the model has none. new_head: the model's last linear layer stays as it is.
    Raises InputError listing every missing, unexpected and mis-shaped key."""
    own, state = model.state_dict(), {k.removeprefix("module."): v for k, v in _state(path).items()}
    inner = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    state = inner or state
    heads = [f"{last_linear(model)[0]}."] if new_head else \
        [head for head in ("head.", "classifier.head.") if not any(k.startswith(head) for k in own)]
    own, state = ({k: v for k, v in each.items() if not k.startswith(tuple(heads))}
                  for each in (own, state))
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    wrong = {"missing": sorted(own.keys() - state.keys()),
             "unexpected": sorted(state.keys() - own.keys()), "mis-shaped": shapes}
    lists = "; ".join(f"{len(v)} {name}: {', '.join(v)}" for name, v in wrong.items() if v)
    refuse(lists, f"{path} does not fit this model: {lists} - take the preset of these weights")
    model.load_state_dict(state, strict=False)               # all but the heads
    return model


def _state(path):
    """The tensors by name that a checkpoint holds, at its top or under one of the usual names."""
    refuse(not os.path.isfile(path), f"no weights at {path} - check the path")   # a pipe would wait
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):             # of their flags
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                   # torch raises many kinds
        raise InputError(f"{path} is not a readable checkpoint ({type(e).__name__}) - replace it")
    for key in ("teacher", "student", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    refuse(not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())),
           f"{path} holds no state_dict - expected tensors by name, at the top or under teacher, "
           "student, model, state_dict")
    return state


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        print("usage: python ssm.py build", file=sys.stderr)
        raise SystemExit(2)
    if not native(verbose=True):                             # shows the compiler's own words
        raise SystemExit(2)
    print(f"built {native(verbose=True).__file__}; set REPSAE_NATIVE=1 to use it")
