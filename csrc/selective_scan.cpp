// The selective scan, compiled: the CPU kernels, and the door through which Python calls them and the CUDA ones.
//
// Read ssm.py first: `_scan_reference` is what this computes and `_TorchScan.backward` how its gradient is derived.
// Letters as there: u, delta, y (B, L, D), A (D, N), B, C (B, L, G, N), h the state (B, D, N); a = exp(delta A).
//
// A job is one sample and one block of W neighbouring channels of one group. Its states h[N][W] stay in the innermost
// caches for all L tokens, and every inner loop runs over channels, which lie side by side in memory, so the compiler turns
// it into vector instructions. Of the states only those at the start of every T-th token are written out; going backward, a
// chunk of T states is made again from there. Sums over channels (the gradients of B and C) go into a row per job and sums
// over samples (of A) into a row per sample, to be added by the caller: no atomics, so results repeat to the bit.
#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int W = 64;  // channels of a block
constexpr int T = 64;  // tokens of a chunk

// exp(x) to about 1e-7 relative, in operations that vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by a polynomial
// (Cephes), times 2^n by way of the exponent bits. Below the smallest normal number the result is 0, above the largest inf.
inline float fast_exp(float x) {
    const float n = std::floor(x * 1.44269504088896341f + 0.5f);
    const float m = n < -127.f ? -127.f : (n > 127.f ? 127.f : n);
    float r = x - m * 0.693359375f;
    r -= m * -2.12194440e-4f;  // ln 2 in two parts, so that the product is exact
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const int32_t bits = (static_cast<int32_t>(m) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    p *= scale;
    p = x < -87.3365f ? 0.f : p;
    return x > 88.7228f ? INFINITY : p;
}
inline double fast_exp(double x) { return std::exp(x); }  // double is for checking gradients, not for speed

struct Sizes {
    int64_t B, L, D, G, N;
    int64_t per_group() const { return D / G; }
    int64_t blocks() const { return (per_group() + W - 1) / W; }  // of a group
    int64_t jobs() const { return B * G * blocks(); }
    int64_t chunks() const { return (L + T - 1) / T; }
};

// Where job number j is: its sample, its group, its block in the group, its first channel, and how many channels it has.
struct Job {
    int64_t b, g, block, first;
    int w;
    Job(const Sizes& s, int64_t j) {
        block = j % s.blocks();
        g = j / s.blocks() % s.G;
        b = j / s.blocks() / s.G;
        first = g * s.per_group() + block * W;
        w = static_cast<int>(std::min<int64_t>(W, s.per_group() - block * W));
    }
};

// A (D, N) of a block as [N][W], so that channels are side by side; unused channels get 0.
template <typename F>
void load_A(const Sizes& s, const Job& job, const F* A, F* out) {
    std::memset(out, 0, sizeof(F) * s.N * W);
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) out[n * W + i] = A[(job.first + i) * s.N + n];
}

// A row of W channels, the missing ones 0: then every loop below has the fixed length W, which is what vectorises best.
template <typename F>
inline void load_row(const F* row, int w, F* out) {
    for (int i = 0; i < W; i++) out[i] = i < w ? row[i] : F(0);
}

template <typename F>
void forward_job(const Sizes& s, const Job& job, const F* u, const F* delta, const F* A, const F* B, const F* C, F* y, F* last, F* starts) {
    std::vector<F> memory(2 * s.N * W, F(0));
    F *Ab = memory.data(), *h = Ab + s.N * W;
    load_A(s, job, A, Ab);
    for (int64_t t = 0; t < s.L; t++) {
        if (starts && t % T == 0)
            std::memcpy(starts + ((job.b * s.G + job.g) * s.blocks() + job.block) * s.chunks() * s.N * W + t / T * s.N * W, h, sizeof(F) * s.N * W);
        const int64_t row = (job.b * s.L + t) * s.D + job.first;
        const F *Bt = B + ((job.b * s.L + t) * s.G + job.g) * s.N, *Ct = C + ((job.b * s.L + t) * s.G + job.g) * s.N;
        F d[W], du[W], out[W] = {};
        load_row(delta + row, job.w, d);
        load_row(u + row, job.w, du);
        for (int i = 0; i < W; i++) du[i] *= d[i];
        for (int64_t n = 0; n < s.N; n++) {
            F* hn = h + n * W;
            const F *An = Ab + n * W, bn = Bt[n], cn = Ct[n];
            for (int i = 0; i < W; i++) {
                hn[i] = fast_exp(d[i] * An[i]) * hn[i] + du[i] * bn;
                out[i] += cn * hn[i];
            }
        }
        std::memcpy(y + row, out, sizeof(F) * job.w);
    }
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) last[(job.b * s.D + job.first + i) * s.N + n] = h[n * W + i];
}

// dB, dC: (B, L, G, blocks, N), a row per job. dA: (B, D, N), a row per sample.
template <typename F>
void backward_job(const Sizes& s, const Job& job, const F* u, const F* delta, const F* A, const F* B, const F* C, const F* starts, const F* dy,
                  const F* dlast, F* du_out, F* ddelta_out, F* dA_out, F* dB_out, F* dC_out) {
    const int64_t NW = s.N * W;
    std::vector<F> memory(NW * (3 + 2 * T + 1), F(0));
    F *Ab = memory.data(), *dA = Ab + NW, *g = dA + NW, *a = g + NW, *h = a + T * NW;  // h holds T + 1 states
    load_A(s, job, A, Ab);
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) g[n * W + i] = dlast[(job.b * s.D + job.first + i) * s.N + n];
    for (int64_t chunk = s.chunks() - 1; chunk >= 0; chunk--) {
        const int64_t begin = chunk * T, end = std::min<int64_t>(s.L, begin + T);
        std::memcpy(h, starts + (((job.b * s.G + job.g) * s.blocks() + job.block) * s.chunks() + chunk) * NW, sizeof(F) * NW);
        for (int64_t t = begin; t < end; t++) {  // forward again, keeping a and h
            const int64_t row = (job.b * s.L + t) * s.D + job.first;
            const F* Bt = B + ((job.b * s.L + t) * s.G + job.g) * s.N;
            F d[W], du[W];
            load_row(delta + row, job.w, d);
            load_row(u + row, job.w, du);
            for (int i = 0; i < W; i++) du[i] *= d[i];
            for (int64_t n = 0; n < s.N; n++) {
                F *at = a + (t - begin) * NW + n * W, *ht = h + (t - begin) * NW + n * W;
                const F *An = Ab + n * W, bn = Bt[n];
                for (int i = 0; i < W; i++) {
                    at[i] = fast_exp(d[i] * An[i]);
                    ht[NW + i] = at[i] * ht[i] + du[i] * bn;
                }
            }
        }
        for (int64_t t = end - 1; t >= begin; t--) {
            const int64_t row = (job.b * s.L + t) * s.D + job.first, weights = ((job.b * s.L + t) * s.G + job.g) * s.N;
            F d[W], ut[W], dyt[W], du[W], gB[W] = {}, gaA[W] = {};
            load_row(delta + row, job.w, d);
            load_row(u + row, job.w, ut);
            load_row(dy + row, job.w, dyt);
            for (int i = 0; i < W; i++) du[i] = d[i] * ut[i];
            for (int64_t n = 0; n < s.N; n++) {
                const F *at = a + (t - begin) * NW + n * W, *before = h + (t - begin) * NW + n * W, *ht = before + NW, *An = Ab + n * W;
                const F bn = B[weights + n], cn = C[weights + n];
                F *gn = g + n * W, *dAn = dA + n * W, sum_B = 0, sum_C = 0;
#pragma omp simd reduction(+ : sum_B, sum_C)
                for (int i = 0; i < W; i++) {
                    const F gt = gn[i] + cn * dyt[i];      // gradient of h_t
                    const F ga = gt * at[i];               // what of it reaches h_{t-1}
                    const F gah = ga * before[i];
                    gB[i] += gt * bn;
                    gaA[i] += gah * An[i];
                    dAn[i] += gah * d[i];
                    sum_B += gt * du[i];
                    sum_C += ht[i] * dyt[i];
                    gn[i] = ga;
                }
                const int64_t at_job = (((job.b * s.L + t) * s.G + job.g) * s.blocks() + job.block) * s.N + n;
                dB_out[at_job] = sum_B;
                dC_out[at_job] = sum_C;
            }
            for (int i = 0; i < job.w; i++) {
                du_out[row + i] = gB[i] * d[i];
                ddelta_out[row + i] = gB[i] * ut[i] + gaA[i];
            }
        }
    }
    for (int i = 0; i < job.w; i++)
        for (int64_t n = 0; n < s.N; n++) dA_out[(job.b * s.D + job.first + i) * s.N + n] = dA[n * W + i];
}

Sizes sizes(const torch::Tensor& u, const torch::Tensor& A, const torch::Tensor& B) {
    return {u.size(0), u.size(1), u.size(2), B.size(2), A.size(1)};
}

}  // namespace

#ifdef WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
// selective_scan.cu; every pointer is to float on the device
int scan_cuda_block(int n);     // channels of a block for n states, 0 if it does not serve so many
int scan_cuda_chunk();
void scan_forward_cuda(int b, int l, int d, int g, int n, const float* u, const float* delta, const float* A, const float* B, const float* C, float* y,
                       float* last, float* starts, cudaStream_t stream);
void scan_backward_cuda(int b, int l, int d, int g, int n, const float* u, const float* delta, const float* A, const float* B, const float* C,
                        const float* starts, const float* dy, const float* dlast, float* du, float* ddelta, float* dA, float* dB, float* dC,
                        cudaStream_t stream);
#endif

// Whether these kernels serve such a tensor: float32 or float64 on a CPU, float32 on a GPU they were compiled for.
static bool serves(const torch::Tensor& u) {
    if (u.is_cpu()) return u.scalar_type() == torch::kFloat32 || u.scalar_type() == torch::kFloat64;
#ifdef WITH_CUDA
    return u.is_cuda() && u.scalar_type() == torch::kFloat32;
#else
    return false;
#endif
}

static void check(const torch::Tensor& u, const torch::Tensor& A) {
    TORCH_CHECK(serves(u), "the native scan does not serve ", u.scalar_type(), " on ", u.device());
#ifdef WITH_CUDA
    TORCH_CHECK(u.is_cpu() || scan_cuda_block(A.size(1)), "the CUDA scan serves up to 32 states, not ", A.size(1));
#endif
}

// Returns y, the last state, and the states that chunks start from.
std::vector<torch::Tensor> forward(torch::Tensor u, torch::Tensor delta, torch::Tensor A, torch::Tensor B, torch::Tensor C) {
    check(u, A);
    const Sizes s = sizes(u, A, B);
    auto y = torch::empty_like(u), last = torch::empty({s.B, s.D, s.N}, u.options());
#ifdef WITH_CUDA
    if (u.is_cuda()) {
        const c10::cuda::CUDAGuard guard(u.device());
        auto starts = torch::empty({s.B, (s.L + scan_cuda_chunk() - 1) / scan_cuda_chunk(), s.D, s.N}, u.options());
        scan_forward_cuda(s.B, s.L, s.D, s.G, s.N, u.data_ptr<float>(), delta.data_ptr<float>(), A.data_ptr<float>(), B.data_ptr<float>(),
                          C.data_ptr<float>(), y.data_ptr<float>(), last.data_ptr<float>(), starts.data_ptr<float>(), at::cuda::getCurrentCUDAStream());
        return {y, last, starts};
    }
#endif
    auto starts = torch::empty({s.jobs(), s.chunks(), s.N, W}, u.options());
    AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "scan_forward", [&] {
        using F = scalar_t;
        at::parallel_for(0, s.jobs(), 1, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; j++)
                forward_job<F>(s, Job(s, j), u.data_ptr<F>(), delta.data_ptr<F>(), A.data_ptr<F>(), B.data_ptr<F>(), C.data_ptr<F>(), y.data_ptr<F>(),
                               last.data_ptr<F>(), starts.data_ptr<F>());
        });
    });
    return {y, last, starts};
}

// Returns the gradients of u, delta, A, B, C.
std::vector<torch::Tensor> backward(torch::Tensor u, torch::Tensor delta, torch::Tensor A, torch::Tensor B, torch::Tensor C, torch::Tensor starts,
                                    torch::Tensor dy, torch::Tensor dlast) {
    check(u, A);
    const Sizes s = sizes(u, A, B);
    auto du = torch::empty_like(u), ddelta = torch::empty_like(u), dA = torch::empty({s.B, s.D, s.N}, u.options());
#ifdef WITH_CUDA
    if (u.is_cuda()) {
        const c10::cuda::CUDAGuard guard(u.device());
        const int64_t per_block = scan_cuda_block(s.N), blocks = (s.per_group() + per_block - 1) / per_block;
        auto dB = torch::empty({s.B, s.L, s.G, blocks, s.N}, u.options()), dC = torch::empty_like(dB);
        scan_backward_cuda(s.B, s.L, s.D, s.G, s.N, u.data_ptr<float>(), delta.data_ptr<float>(), A.data_ptr<float>(), B.data_ptr<float>(),
                           C.data_ptr<float>(), starts.data_ptr<float>(), dy.data_ptr<float>(), dlast.data_ptr<float>(), du.data_ptr<float>(),
                           ddelta.data_ptr<float>(), dA.data_ptr<float>(), dB.data_ptr<float>(), dC.data_ptr<float>(), at::cuda::getCurrentCUDAStream());
        return {du, ddelta, dA.sum(0), dB.sum(3), dC.sum(3)};
    }
#endif
    auto dB = torch::empty({s.B, s.L, s.G, s.blocks(), s.N}, u.options()), dC = torch::empty_like(dB);
    AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "scan_backward", [&] {
        using F = scalar_t;
        at::parallel_for(0, s.jobs(), 1, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; j++)
                backward_job<F>(s, Job(s, j), u.data_ptr<F>(), delta.data_ptr<F>(), A.data_ptr<F>(), B.data_ptr<F>(), C.data_ptr<F>(), starts.data_ptr<F>(),
                                dy.data_ptr<F>(), dlast.data_ptr<F>(), du.data_ptr<F>(), ddelta.data_ptr<F>(), dA.data_ptr<F>(), dB.data_ptr<F>(),
                                dC.data_ptr<F>());
        });
    });
    return {du, ddelta, dA.sum(0), dB.sum(3), dC.sum(3)};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("serves", &serves);
}
