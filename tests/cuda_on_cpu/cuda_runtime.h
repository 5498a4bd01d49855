// Enough of CUDA to run a kernel's logic on a CPU, for tests on machines without a GPU. Every thread of a block is a fiber.
// The threads of a warp run in turn from shuffle to shuffle until all stand at a barrier; then the next warp does. Warps and
// threads go forwards and backwards by turns, so that a forgotten barrier shows.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(n)
using std::min;
typedef void* cudaStream_t;
struct dim3 {
    unsigned x;
    explicit dim3(unsigned x) : x(x) {}
};
inline dim3 threadIdx(0), blockIdx(0);

namespace fibers {
enum State { ready, at_barrier, at_shuffle, done };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    State state = ready;
    float value = 0;
};
inline std::vector<Fiber>* all;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline Fiber& now() { return (*all)[threadIdx.x]; }
inline void wait(State why) {
    now().state = why;
    swapcontext(&now().context, &scheduler);
}
inline void start() {
    body();
    wait(done);
}
inline void agree(unsigned from, unsigned to) {
    for (unsigned i = from; i < to; i++)
        if ((*all)[i].state != (*all)[from].state) std::fprintf(stderr, "threads part ways\n"), std::abort();
}
inline void run_block(unsigned threads) {
    std::vector<Fiber> block(threads);
    all = &block;
    for (Fiber& f : block) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, start, 0);
    }
    const unsigned warps = (threads + 31) / 32;
    for (bool forwards = true; block[0].state != done; forwards = !forwards) {
        for (unsigned w = 0; w < warps; w++) {
            const unsigned from = 32 * (forwards ? w : warps - 1 - w), to = min(from + 32, threads);
            do {
                for (unsigned i = 0; i < to - from; i++) {
                    threadIdx.x = forwards ? from + i : to - 1 - i;
                    swapcontext(&scheduler, &now().context);
                }
                agree(from, to);
            } while (block[from].state == at_shuffle);
        }
        agree(0, threads);
    }
}
template <typename... A, std::size_t... I>
void launch(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::at_barrier); }
inline float __shfl_xor_sync(unsigned, float x, int bit) {
    fibers::now().value = x;
    fibers::wait(fibers::at_shuffle);
    const float other = (*fibers::all)[threadIdx.x ^ bit].value;
    fibers::wait(fibers::at_shuffle);
    return other;
}
template <typename... A>
void cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, std::size_t, cudaStream_t) {
    fibers::body = [=] { fibers::launch(kernel, arguments, std::index_sequence_for<A...>()); };
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) fibers::run_block(block.x);
}
