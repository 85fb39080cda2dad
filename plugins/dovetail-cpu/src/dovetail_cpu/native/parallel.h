// Work is shared out among the threads of the OpenMP that torch has loaded: a second pool would
// contend with the first for the same cores.
#pragma once

#include <atomic>
#include <cstdint>

#include <omp.h>

namespace {

// Calls work(task) for every task below `count`, `chunk` of them after each other at a time. A
// thread that is held up takes fewer.
template <class Work>
void share_out(int64_t count, int64_t chunk, Work work) {
    std::atomic<int64_t> next{0};
#pragma omp parallel if (count > chunk)
    for (;;) {
        const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= count) break;
        const int64_t end = begin + chunk < count ? begin + chunk : count;
        for (int64_t task = begin; task < end; task++) work(task);
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// So many tasks that each thread comes back for more some times.
inline int64_t chunk_of(int64_t count, int64_t times = 32) {
    const int64_t turns = omp_get_max_threads() * times;
    return count > turns ? count / turns : 1;
}

}  // namespace
