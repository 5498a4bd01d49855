// The selective scan on a GPU. Read selective_scan.cpp first: same letters, same formulas, same outputs.
//
// A block of threads is one sample and CH neighbouring channels of one group; a thread is one state of one channel, P lanes
// side by side making up a channel (P: the number of states, up to a power of two). It walks through the tokens in chunks of
// T: all threads load a chunk into shared memory, softplus done on the way; each carries its state through it in a register,
// lanes adding up their C h by shuffles; then all store the chunk's outputs, skip and gate done on the way. States never
// reach global memory but for the one a chunk starts from; backward makes the T states of a chunk again, in registers.
// Sums over the channels of a block go out as partial sums, for the caller to add: no atomics, so results repeat to the bit.
//
// Nothing of torch is included, so that `nvcc -c` checks this file anywhere.
#include <cuda_runtime.h>

namespace {

constexpr int T = 32;     // tokens of a chunk
constexpr int PART = 8;   // tokens whose sums over channels are put together at a time
constexpr unsigned ALL = 0xffffffffu;

__host__ __device__ constexpr int channels(int P) { return 256 / P < 32 ? 256 / P : 32; }  // of a block

struct Shape {
    int B, L, D, G, N;
    bool softplus;
};
struct Inputs {
    const float *u, *delta, *A, *B, *C, *D, *z, *bias;  // z may be null
};
struct Gradients {
    float *u, *delta, *A, *B, *C, *D, *z;  // A (B, D, N), D (B, D), B and C (B, L, G, blocks, N); z may be null
};

// exp(-|x|) makes both safe at either end.
__device__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
__device__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The sum over lanes that differ in the bits from `low` up to, not including, `high`.
template <int low, int high>
__device__ float sum_lanes(float x) {
#pragma unroll
    for (int bit = low; bit < high; bit *= 2) x += __shfl_xor_sync(ALL, x, bit);
    return x;
}

// Who this thread is. In the loop over tokens it is state `n` of channel `i` of its block; where rows are loaded and stored
// it serves channel `c` of every P-th token, so that neighbouring threads touch neighbouring memory.
template <int P>
struct Place {
    static constexpr int CH = channels(P);
    int b, g, block, blocks, first, width, i, n, c, t0;
    __device__ explicit Place(const Shape& s) {
        const int per_group = s.D / s.G, tid = threadIdx.x;
        blocks = (per_group + CH - 1) / CH;
        block = blockIdx.x % blocks;
        g = blockIdx.x / blocks % s.G;
        b = blockIdx.x / blocks / s.G;
        first = g * per_group + block * CH;
        width = min(CH, per_group - block * CH);
        i = tid / P, n = tid % P;
        c = tid % CH, t0 = tid / CH;
    }
    __device__ size_t row(const Shape& s, int t) const { return ((size_t)b * s.L + t) * s.D + first; }
    __device__ size_t weights(const Shape& s, int t) const { return (((size_t)b * s.L + t) * s.G + g) * s.N; }
};

template <int P>
struct Chunk {
    static constexpr int CH = channels(P);
    float d[T][CH], u[T][CH], B[T][P], C[T][P];

    // Tokens begin .. begin + T - 1; what lies past the end, the last channel or the last state is 0 and changes nothing.
    __device__ void load(const Shape& s, const Inputs& in, const Place<P>& at, int begin) {
        const float bias = at.c < at.width ? in.bias[at.first + at.c] : 0.f;
        for (int t = at.t0; t < T; t += P) {
            const bool there = begin + t < s.L && at.c < at.width;
            const float raw = there ? in.delta[at.row(s, begin + t) + at.c] + bias : 0.f;
            d[t][at.c] = there && s.softplus ? softplus(raw) : raw;
            u[t][at.c] = there ? in.u[at.row(s, begin + t) + at.c] : 0.f;
        }
        for (int t = at.i; t < T; t += CH) {
            const bool there = begin + t < s.L && at.n < s.N;
            B[t][at.n] = there ? in.B[at.weights(s, begin + t) + at.n] : 0.f;
            C[t][at.n] = there ? in.C[at.weights(s, begin + t) + at.n] : 0.f;
        }
    }
};

template <int P>
__global__ void __launch_bounds__(channels(P) * P)
    forward_kernel(Shape s, Inputs in, float* y, float* last, float* starts) {
    constexpr int CH = channels(P);
    __shared__ Chunk<P> x;
    __shared__ float out[T][CH];
    const Place<P> at(s);
    const bool mine = at.i < at.width && at.n < s.N;
    const size_t state = (size_t)(at.first + at.i) * s.N + at.n, states = (size_t)s.D * s.N;
    const int chunks = (s.L + T - 1) / T;
    const float a = mine ? in.A[state] : 0.f, skip = at.c < at.width ? in.D[at.first + at.c] : 0.f;
    float h = 0.f;
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int begin = chunk * T;
        if (starts && mine) starts[((size_t)at.b * chunks + chunk) * states + state] = h;
        x.load(s, in, at, begin);
        __syncthreads();
        for (int t = 0; t < T; t++) {
            const float d = x.d[t][at.i];
            h = expf(d * a) * h + d * x.u[t][at.i] * x.B[t][at.n];
            const float sum = sum_lanes<1, P>(x.C[t][at.n] * h);
            if (at.n == 0) out[t][at.i] = sum;
        }
        __syncthreads();
        for (int t = at.t0; t < T && begin + t < s.L; t += P)
            if (at.c < at.width) {
                float o = out[t][at.c] + skip * x.u[t][at.c];
                if (in.z) {
                    const float z = in.z[at.row(s, begin + t) + at.c];
                    o *= z * sigmoid(z);
                }
                y[at.row(s, begin + t) + at.c] = o;
            }
    }  // no barrier here: of the rows, each thread reads above what it loads again itself
    if (mine) last[(size_t)at.b * states + state] = h;
}

template <int P>
__global__ void __launch_bounds__(channels(P) * P)
    backward_kernel(Shape s, Inputs in, const float* starts, const float* dy, const float* dlast, Gradients out) {
    constexpr int CH = channels(P), WARPS = (CH * P + 31) / 32;
    __shared__ Chunk<P> x;
    __shared__ float d_out[T][CH], y[T][CH], gB[T][CH], gaA[T][CH];  // d_out and y: before the gate
    __shared__ float dB[PART][WARPS][P], dC[PART][WARPS][P];
    const Place<P> at(s);
    const bool mine = at.i < at.width && at.n < s.N;
    const size_t state = (size_t)(at.first + at.i) * s.N + at.n, states = (size_t)s.D * s.N;
    const int chunks = (s.L + T - 1) / T, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float a = mine ? in.A[state] : 0.f, skip = at.c < at.width ? in.D[at.first + at.c] : 0.f;
    const float bias = at.c < at.width ? in.bias[at.first + at.c] : 0.f;
    float g = mine ? dlast[(size_t)at.b * states + state] : 0.f, dA = 0.f, dskip = 0.f;
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int begin = chunk * T;
        x.load(s, in, at, begin);
        for (int t = at.t0; t < T; t += P) {
            const bool there = begin + t < s.L && at.c < at.width;
            const float z = there && in.z ? in.z[at.row(s, begin + t) + at.c] : 0.f;
            d_out[t][at.c] = there ? dy[at.row(s, begin + t) + at.c] * (in.z ? z * sigmoid(z) : 1.f) : 0.f;
        }
        __syncthreads();

        const float start = mine ? starts[((size_t)at.b * chunks + chunk) * states + state] : 0.f;
        float h[T];  // the loops that use it are unrolled, which keeps it in registers
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float d = x.d[t][at.i];
            h[t] = expf(d * a) * (t ? h[t ? t - 1 : 0] : start) + d * x.u[t][at.i] * x.B[t][at.n];
        }
#pragma unroll
        for (int part = T / PART - 1; part >= 0; part--) {
#pragma unroll
            for (int t = part * PART + PART - 1; t >= part * PART; t--) {
                const float d = x.d[t][at.i], dyt = d_out[t][at.i], b = x.B[t][at.n], c = x.C[t][at.n];
                g += c * dyt;                                             // gradient of h_t
                const float ga = g * expf(d * a);                         // what of it reaches h_{t-1}
                const float gah = ga * (t ? h[t ? t - 1 : 0] : start);
                dA += gah * d;
                const float sum_y = sum_lanes<1, P>(c * h[t]);
                const float sum_gB = sum_lanes<1, P>(g * b), sum_gaA = sum_lanes<1, P>(gah * a);
                if (at.n == 0) y[t][at.i] = sum_y, gB[t][at.i] = sum_gB, gaA[t][at.i] = sum_gaA;
                const float sum_dB = sum_lanes<P, 32>(g * d * x.u[t][at.i]), sum_dC = sum_lanes<P, 32>(h[t] * dyt);
                if (lane < P) dB[t % PART][warp][at.n] = sum_dB, dC[t % PART][warp][at.n] = sum_dC;
                g = ga;
            }
            __syncthreads();
            for (int e = threadIdx.x; e < PART * P; e += CH * P) {
                const int t = part * PART + e / P, n = e % P;
                if (begin + t < s.L && n < s.N) {
                    float sum_dB = 0.f, sum_dC = 0.f;
                    for (int w = 0; w < WARPS; w++) sum_dB += dB[e / P][w][n], sum_dC += dC[e / P][w][n];
                    const size_t group = ((size_t)at.b * s.L + begin + t) * s.G + at.g;
                    const size_t to = (group * at.blocks + at.block) * s.N + n;
                    out.B[to] = sum_dB;
                    out.C[to] = sum_dC;
                }
            }
            __syncthreads();
        }
        for (int t = at.t0; t < T && begin + t < s.L; t += P)
            if (at.c < at.width) {
                const size_t to = at.row(s, begin + t) + at.c;
                const float d = x.d[t][at.c], u = x.u[t][at.c];
                out.u[to] = gB[t][at.c] * d + skip * d_out[t][at.c];
                out.delta[to] = (gB[t][at.c] * u + gaA[t][at.c]) * (s.softplus ? sigmoid(in.delta[to] + bias) : 1.f);
                dskip += d_out[t][at.c] * u;
                if (in.z) {
                    const float z = in.z[to], gate = sigmoid(z);
                    out.z[to] = dy[to] * (y[t][at.c] + skip * u) * gate * (1.f + z * (1.f - gate));
                }
            }
    }
    if (mine) out.A[(size_t)at.b * states + state] = dA;
    y[at.t0][at.c] = dskip;  // P <= T rows
    __syncthreads();
    if (threadIdx.x < at.width) {
        float sum = 0.f;
        for (int t = 0; t < P; t++) sum += y[t][threadIdx.x];
        out.D[(size_t)at.b * s.D + at.first + threadIdx.x] = sum;
    }
}

int lanes(int n) {
    for (int P = 1; P <= 32; P *= 2)
        if (n <= P) return P;
    return 0;
}

template <int P>
void launch_forward(Shape s, Inputs in, float* y, float* last, float* starts, cudaStream_t stream) {
    const int blocks = (s.D / s.G + channels(P) - 1) / channels(P);
    void* arguments[] = {&s, &in, &y, &last, &starts};
    cudaLaunchKernel(forward_kernel<P>, dim3(s.B * s.G * blocks), dim3(channels(P) * P), arguments, 0, stream);
}

template <int P>
void launch_backward(Shape s, Inputs in, const float* starts, const float* dy, const float* dlast, Gradients out,
                     cudaStream_t stream) {
    const int blocks = (s.D / s.G + channels(P) - 1) / channels(P);
    void* arguments[] = {&s, &in, &starts, &dy, &dlast, &out};
    cudaLaunchKernel(backward_kernel<P>, dim3(s.B * s.G * blocks), dim3(channels(P) * P), arguments, 0, stream);
}

}  // namespace

#define FOR_LANES(n, call)          \
    switch (lanes(n)) {             \
        case 1: call(1); break;     \
        case 2: call(2); break;     \
        case 4: call(4); break;     \
        case 8: call(8); break;     \
        case 16: call(16); break;   \
        default: call(32); break;   \
    }

// Channels of a block for n states, or 0: more than 32 are not served.
extern "C" int scan_cuda_block(int n) { return lanes(n) ? channels(lanes(n)) : 0; }
extern "C" int scan_cuda_chunk() { return T; }

extern "C" void scan_forward_cuda(int b, int l, int d, int g, int n, bool softplus, const float* u, const float* delta,
                                  const float* A, const float* B, const float* C, const float* d_skip, const float* z,
                                  const float* bias, float* y, float* last, float* starts, cudaStream_t stream) {
    const Shape s{b, l, d, g, n, softplus};
    const Inputs in{u, delta, A, B, C, d_skip, z, bias};
#define CALL(P) launch_forward<P>(s, in, y, last, starts, stream)
    FOR_LANES(n, CALL)
#undef CALL
}

extern "C" void scan_backward_cuda(int b, int l, int d, int g, int n, bool softplus, const float* u, const float* delta,
                                   const float* A, const float* B, const float* C, const float* d_skip, const float* z,
                                   const float* bias, const float* starts, const float* dy, const float* dlast,
                                   float* du, float* ddelta, float* dA, float* dB, float* dC, float* dD, float* dz,
                                   cudaStream_t stream) {
    const Shape s{b, l, d, g, n, softplus};
    const Inputs in{u, delta, A, B, C, d_skip, z, bias};
    const Gradients out{du, ddelta, dA, dB, dC, dD, dz};
#define CALL(P) launch_backward<P>(s, in, starts, dy, dlast, out, stream)
    FOR_LANES(n, CALL)
#undef CALL
}
