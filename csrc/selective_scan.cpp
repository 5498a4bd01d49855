// The selective scan, compiled: the CPU kernels, and the door through which Python calls them and the CUDA ones.
//
// Read ssm.py first: `_scan_reference` is what this computes and `_TorchScan.backward` how its gradient is derived.
// Letters as there: u, delta, z, y (B, L, D), A (D, N), B, C (B, L, G, N), D, bias (D), h the state (B, D, N);
// a = exp(delta A). Everything is done in one pass: delta's bias and softplus, the scan, D u, and the gate silu(z).
//
// A job is one sample and one block of W neighbouring channels of one group. Its states h[N][W] stay in the innermost
// caches for all L tokens, and every inner loop runs over channels, which lie side by side in memory, so the compiler turns
// it into vector instructions. Of the states only those at the start of every T-th token are written out; going backward, a
// chunk of T states is made again from there. Sums over channels (the gradients of B and C) go into a row per job and sums
// over tokens (of A and D) into a row per sample, to be added by the caller: no atomics, so results repeat to the bit.
#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int W = 64;  // channels of a block
constexpr int T = 32;  // tokens of a chunk

// exp(x) to about 2e-7 relative, in operations that vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r)
// (coefficients from Cephes), then 2^n by way of the exponent bits. Below -87.7 the result is 0, above 88.4 infinite.
inline float fast_exp(float x) {
    x = x < -88.f ? -88.f : x;  // written so that NaN stays NaN
    x = x > 88.7f ? 88.7f : x;
    const float n = std::nearbyint(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;  // ln 2 in two parts, so that the first product is exact
    float p = 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}
inline double fast_exp(double x) { return std::exp(x); }  // double is for checking gradients, not for speed

// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)), whose series has converged to 1e-8 after eight terms.
inline float fast_log1p(float x) {
    const float s = x / (2.f + x), q = s * s;
    float p = 1.f / 15;
    p = p * q + 1.f / 13;
    p = p * q + 1.f / 11;
    p = p * q + 1.f / 9;
    p = p * q + 1.f / 7;
    p = p * q + 1.f / 5;
    p = p * q + 1.f / 3;
    p = p * q + 1.f;
    return 2.f * s * p;
}
inline double fast_log1p(double x) { return std::log1p(x); }

template <typename F>
inline F softplus(F x) {
    return (x > 0 ? x : F(0)) + fast_log1p(fast_exp(x > 0 ? -x : x));
}
template <typename F>
inline F sigmoid(F x) {
    return F(1) / (F(1) + fast_exp(-x));
}

struct Sizes {
    int64_t B, L, D, G, N;
    int64_t per_group() const { return D / G; }
    int64_t blocks() const { return (per_group() + W - 1) / W; }  // of a group
    int64_t jobs() const { return B * G * blocks(); }
    int64_t chunks() const { return (L + T - 1) / T; }
};

// Where job number j is: its sample, its group, its block in the group, its first channel, and how many channels it has.
struct Job {
    int64_t index, b, g, block, first;
    int w;
    Job(const Sizes& s, int64_t j) : index(j) {
        block = j % s.blocks();
        g = j / s.blocks() % s.G;
        b = j / s.blocks() / s.G;
        first = g * s.per_group() + block * W;
        w = static_cast<int>(std::min<int64_t>(W, s.per_group() - block * W));
    }
    int64_t row(const Sizes& s, int64_t t) const { return (b * s.L + t) * s.D + first; }          // into (B, L, D)
    int64_t weights(const Sizes& s, int64_t t) const { return ((b * s.L + t) * s.G + g) * s.N; }  // into (B, L, G, N)
};

template <typename F>
struct Inputs {
    const F *u, *delta, *A, *B, *C, *D, *z, *bias;  // z may be null
    bool softplus;
};

// W channels of a row, the missing ones 0: then every loop below has the fixed length W, which is what vectorises best.
template <typename F>
inline void load(const F* row, int w, F* out) {
    for (int i = 0; i < W; i++) out[i] = i < w && row ? row[i] : F(0);
}

// A block of a (D, N) array as [N][W], so that channels are side by side, and back.
template <typename F>
void turn_in(const Sizes& s, const Job& job, const F* array, F* out) {
    std::memset(out, 0, sizeof(F) * s.N * W);
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) out[n * W + i] = array[(job.first + i) * s.N + n];
}
template <typename F>
void turn_out(const Sizes& s, const Job& job, const F* block, F* array) {
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) array[(job.first + i) * s.N + n] = block[n * W + i];
}

// One token of a block: the step size before and after softplus, the input, and (step size) x (input).
template <typename F>
struct Token {
    F raw[W], d[W], u[W], du[W];
    Token(const Sizes& s, const Job& job, const Inputs<F>& in, const F* bias, int64_t t) {
        load(in.delta + job.row(s, t), job.w, raw);
        load(in.u + job.row(s, t), job.w, u);
        for (int i = 0; i < W; i++) d[i] = raw[i] += bias[i];
        if (in.softplus)
            for (int i = 0; i < W; i++) d[i] = softplus(raw[i]);
        for (int i = 0; i < W; i++) du[i] = d[i] * u[i];
    }
};

template <typename F>
void forward_job(const Sizes& s, const Job& job, const Inputs<F>& in, F* y, F* last, F* starts) {
    const int64_t NW = s.N * W;
    std::vector<F> memory(2 * NW, F(0));
    F *A = memory.data(), *h = A + NW, skip[W], bias[W];
    turn_in(s, job, in.A, A);
    load(in.D + job.first, job.w, skip);
    load(in.bias + job.first, job.w, bias);
    for (int64_t t = 0; t < s.L; t++) {
        if (starts && t % T == 0) std::memcpy(starts + (job.index * s.chunks() + t / T) * NW, h, sizeof(F) * NW);
        const Token<F> x(s, job, in, bias, t);
        F out[W];
        for (int i = 0; i < W; i++) out[i] = skip[i] * x.u[i];
        for (int64_t n = 0; n < s.N; n++) {
            F* __restrict hn = h + n * W;
            const F *__restrict An = A + n * W, b = in.B[job.weights(s, t) + n], c = in.C[job.weights(s, t) + n];
            for (int i = 0; i < W; i++) {
                const F now = fast_exp(x.d[i] * An[i]) * hn[i] + x.du[i] * b;
                hn[i] = now;
                out[i] += c * now;
            }
        }
        if (in.z) {
            F z[W];
            load(in.z + job.row(s, t), job.w, z);
            for (int i = 0; i < W; i++) out[i] *= z[i] * sigmoid(z[i]);
        }
        std::memcpy(y + job.row(s, t), out, sizeof(F) * job.w);
    }
    turn_out(s, job, h, last + job.b * s.D * s.N);
}

template <typename F>
struct Gradients {
    F *u, *delta, *A, *B, *C, *D, *z;  // A (B, D, N), D (B, D), B and C (B, L, G, blocks, N); z may be null
};

template <typename F>
void backward_job(const Sizes& s, const Job& job, const Inputs<F>& in, const F* starts, const F* dy, const F* dlast,
                  const Gradients<F>& out) {
    const int64_t NW = s.N * W;
    std::vector<F> memory(NW * (3 + 2 * T + 1));
    F *A = memory.data(), *dA = A + NW, *g = dA + NW, *a = g + NW, *h = a + T * NW;  // h holds T + 1 states
    F skip[W], bias[W], dskip[W] = {};
    std::memset(dA, 0, sizeof(F) * NW);
    turn_in(s, job, in.A, A);
    turn_in(s, job, dlast + job.b * s.D * s.N, g);
    load(in.D + job.first, job.w, skip);
    load(in.bias + job.first, job.w, bias);
    for (int64_t chunk = s.chunks() - 1; chunk >= 0; chunk--) {
        const int64_t begin = chunk * T, end = std::min<int64_t>(s.L, begin + T);
        std::memcpy(h, starts + (job.index * s.chunks() + chunk) * NW, sizeof(F) * NW);
        for (int64_t t = begin; t < end; t++) {  // forward again, keeping a and h
            const Token<F> x(s, job, in, bias, t);
            for (int64_t n = 0; n < s.N; n++) {
                F *__restrict at = a + (t - begin) * NW + n * W, *__restrict ht = h + (t - begin + 1) * NW + n * W;
                const F *__restrict before = ht - NW, *__restrict An = A + n * W, b = in.B[job.weights(s, t) + n];
                for (int i = 0; i < W; i++) {
                    at[i] = fast_exp(x.d[i] * An[i]);
                    ht[i] = at[i] * before[i] + x.du[i] * b;
                }
            }
        }
        for (int64_t t = end - 1; t >= begin; t--) {
            const Token<F> x(s, job, in, bias, t);
            const int64_t row = job.row(s, t);
            F dyt[W], z[W], gate[W], gB[W] = {}, gaA[W] = {};
            F y[W], d_out[W];  // the output before the gate, its gradient
            load(dy + row, job.w, dyt);
            load(in.z ? in.z + row : nullptr, job.w, z);
            for (int i = 0; i < W; i++) {
                gate[i] = in.z ? sigmoid(z[i]) : F(1);
                d_out[i] = in.z ? dyt[i] * z[i] * gate[i] : dyt[i];
                y[i] = skip[i] * x.u[i];
            }
            for (int64_t n = 0; n < s.N; n++) {
                const F *__restrict at = a + (t - begin) * NW + n * W;
                const F *__restrict ht = h + (t - begin + 1) * NW + n * W;
                const F *__restrict before = ht - NW, *__restrict An = A + n * W;
                const F b = in.B[job.weights(s, t) + n], c = in.C[job.weights(s, t) + n];
                F *__restrict gn = g + n * W, *__restrict dAn = dA + n * W, sum_B = 0, sum_C = 0;
#pragma omp simd reduction(+ : sum_B, sum_C)
                for (int i = 0; i < W; i++) {
                    const F gt = gn[i] + c * d_out[i];  // gradient of h_t
                    const F ga = gt * at[i];            // what of it reaches h_{t-1}
                    const F gah = ga * before[i];
                    y[i] += c * ht[i];
                    gB[i] += gt * b;
                    gaA[i] += gah * An[i];
                    dAn[i] += gah * x.d[i];
                    sum_B += gt * x.du[i];
                    sum_C += ht[i] * d_out[i];
                    gn[i] = ga;
                }
                const int64_t at_job = (((job.b * s.L + t) * s.G + job.g) * s.blocks() + job.block) * s.N + n;
                out.B[at_job] = sum_B;
                out.C[at_job] = sum_C;
            }
            F du[W], ddelta[W];
            for (int i = 0; i < W; i++) {
                du[i] = gB[i] * x.d[i] + skip[i] * d_out[i];
                ddelta[i] = (gB[i] * x.u[i] + gaA[i]) * (in.softplus ? sigmoid(x.raw[i]) : F(1));
                dskip[i] += d_out[i] * x.u[i];
                z[i] = dyt[i] * y[i] * gate[i] * (1 + z[i] * (1 - gate[i]));  // derivative of z sigmoid(z)
            }
            std::memcpy(out.u + row, du, sizeof(F) * job.w);
            std::memcpy(out.delta + row, ddelta, sizeof(F) * job.w);
            if (out.z) std::memcpy(out.z + row, z, sizeof(F) * job.w);
        }
    }
    turn_out(s, job, dA, out.A + job.b * s.D * s.N);
    std::memcpy(out.D + job.b * s.D + job.first, dskip, sizeof(F) * job.w);
}

using torch::Tensor;
using Maybe = c10::optional<Tensor>;

template <typename F>
F* p(const Tensor& v) {
    return v.data_ptr<F>();
}
template <typename F>
F* p(const Maybe& v) {
    return v ? v->data_ptr<F>() : nullptr;
}

}  // namespace

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
// selective_scan.cu; every pointer is to float on the device, and z and its gradient may be null
extern "C" {
int scan_cuda_block(int n);  // channels of a block for n states, 0 if it does not serve so many
int scan_cuda_chunk();
void scan_forward_cuda(int b, int l, int d, int g, int n, bool softplus, const float* u, const float* delta,
                       const float* A, const float* B, const float* C, const float* d_skip, const float* z,
                       const float* bias, float* y, float* last, float* starts, cudaStream_t stream);
void scan_backward_cuda(int b, int l, int d, int g, int n, bool softplus, const float* u, const float* delta,
                        const float* A, const float* B, const float* C, const float* d_skip, const float* z,
                        const float* bias, const float* starts, const float* dy, const float* dlast, float* du,
                        float* ddelta, float* dA, float* dB, float* dC, float* dD, float* dz, cudaStream_t stream);
}
#endif

// Whether these kernels serve such inputs: float32 or float64 on a CPU, float32 and up to 32 states on a GPU.
static bool serves(const Tensor& u, int64_t states) {
    if (u.is_cpu()) return u.scalar_type() == torch::kFloat32 || u.scalar_type() == torch::kFloat64;
#ifdef WITH_CUDA
    return u.is_cuda() && u.scalar_type() == torch::kFloat32 && scan_cuda_block(states);
#else
    return false;
#endif
}

// All tensors contiguous and of one type. Returns y, the last state, and (if asked for) the states that chunks start from.
std::vector<Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Maybe z, Tensor bias,
                            bool softplus, bool keep) {
    TORCH_CHECK(serves(u, A.size(1)), "not served: ", u.scalar_type(), " on ", u.device(), ", ", A.size(1), " states");
    const Sizes s{u.size(0), u.size(1), u.size(2), B.size(2), A.size(1)};
    auto y = torch::empty_like(u), last = torch::empty({s.B, s.D, s.N}, u.options());
#ifdef WITH_CUDA
    if (u.is_cuda()) {
        const c10::cuda::CUDAGuard guard(u.device());
        const int64_t chunks = (s.L + scan_cuda_chunk() - 1) / scan_cuda_chunk();
        auto starts = torch::empty({keep ? s.B : 0, chunks, s.D, s.N}, u.options());
        using F = float;
        scan_forward_cuda(s.B, s.L, s.D, s.G, s.N, softplus, p<F>(u), p<F>(delta), p<F>(A), p<F>(B), p<F>(C), p<F>(D), p<F>(z),
                          p<F>(bias), p<F>(y), p<F>(last), keep ? p<F>(starts) : nullptr, c10::cuda::getCurrentCUDAStream());
        return {y, last, starts};
    }
#endif
    auto starts = torch::empty({keep ? s.jobs() : 0, s.chunks(), s.N, W}, u.options());
    AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "scan_forward", [&] {
        using F = scalar_t;
        const Inputs<F> in{p<F>(u), p<F>(delta), p<F>(A), p<F>(B), p<F>(C), p<F>(D), p<F>(z), p<F>(bias), softplus};
        at::parallel_for(0, s.jobs(), 1, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; j++)
                forward_job<F>(s, Job(s, j), in, p<F>(y), p<F>(last), keep ? p<F>(starts) : nullptr);
        });
    });
    return {y, last, starts};
}

// Returns the gradients of u, delta, A, B, C, D and z; that of the bias is the sum of delta's.
std::vector<Tensor> backward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Maybe z, Tensor bias,
                             bool softplus, Tensor starts, Tensor dy, Tensor dlast) {
    const Sizes s{u.size(0), u.size(1), u.size(2), B.size(2), A.size(1)};
    auto du = torch::empty_like(u), ddelta = torch::empty_like(u), dz = z ? torch::empty_like(u) : Tensor();
    auto dA = torch::empty({s.B, s.D, s.N}, u.options()), dD = torch::empty({s.B, s.D}, u.options());
#ifdef WITH_CUDA
    if (u.is_cuda()) {
        const c10::cuda::CUDAGuard guard(u.device());
        const int64_t per_block = scan_cuda_block(s.N), blocks = (s.per_group() + per_block - 1) / per_block;
        auto dB = torch::empty({s.B, s.L, s.G, blocks, s.N}, u.options()), dC = torch::empty_like(dB);
        using F = float;
        scan_backward_cuda(s.B, s.L, s.D, s.G, s.N, softplus, p<F>(u), p<F>(delta), p<F>(A), p<F>(B), p<F>(C), p<F>(D), p<F>(z),
                           p<F>(bias), p<F>(starts), p<F>(dy), p<F>(dlast), p<F>(du), p<F>(ddelta), p<F>(dA), p<F>(dB),
                           p<F>(dC), p<F>(dD), z ? p<F>(dz) : nullptr, c10::cuda::getCurrentCUDAStream());
        return {du, ddelta, dA.sum(0), dB.sum(3), dC.sum(3), dD.sum(0), dz};
    }
#endif
    auto dB = torch::empty({s.B, s.L, s.G, s.blocks(), s.N}, u.options()), dC = torch::empty_like(dB);
    AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "scan_backward", [&] {
        using F = scalar_t;
        const Inputs<F> in{p<F>(u), p<F>(delta), p<F>(A), p<F>(B), p<F>(C), p<F>(D), p<F>(z), p<F>(bias), softplus};
        const Gradients<F> out{p<F>(du), p<F>(ddelta), p<F>(dA), p<F>(dB), p<F>(dC), p<F>(dD), z ? p<F>(dz) : nullptr};
        at::parallel_for(0, s.jobs(), 1, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; j++)
                backward_job<F>(s, Job(s, j), in, p<F>(starts), p<F>(dy), p<F>(dlast), out);
        });
    });
    return {du, ddelta, dA.sum(0), dB.sum(3), dC.sum(3), dD.sum(0), dz};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("serves", &serves);
}
