// Work is shared out among the threads of the OpenMP that torch has loaded: a second pool would
// contend with the first for the same cores.
#pragma once

#include <atomic>
#include <cstdint>

#include <omp.h>
#include <sched.h>

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Threads that go through the same phases of work together. Whoever comes takes tasks of the phase
// that is under way; one that comes late finds phases done and goes on, and nobody waits for it
// unless it holds a task. So a core that somebody else has taken costs its share and no more.
class Team {
  public:
    template <class Work>
    void share_out(int64_t phase, int64_t count, int64_t chunk, Work work) {
        for (;;) {
            const int64_t begin = take(phase, count, chunk);
            if (begin < 0) break;
            const int64_t end = begin + chunk < count ? begin + chunk : count;
            for (int64_t task = begin; task < end; task++) work(task);
            const int64_t done = done_.fetch_add(end - begin, std::memory_order_acq_rel);
            if ((done & MASK) + end - begin == count) {
                done_.store((phase + 1) << SHIFT, std::memory_order_relaxed);
                next_.store((phase + 1) << SHIFT, std::memory_order_release);
                return;
            }
        }
        for (int turns = 0; next_.load(std::memory_order_acquire) >> SHIFT == phase; turns++) {
            relax();
            if (turns > PATIENCE) sched_yield();
        }
    }

  private:
    static constexpr int SHIFT = 32;
    static constexpr int64_t MASK = (int64_t(1) << SHIFT) - 1;
    static constexpr int PATIENCE = 2000;

    // The first of up to `chunk` tasks that are the caller's now; -1: none is left in its phase.
    int64_t take(int64_t phase, int64_t count, int64_t chunk) {
        int64_t now = next_.load(std::memory_order_acquire);
        while (now >> SHIFT == phase && (now & MASK) < count)
            if (next_.compare_exchange_weak(now, now + chunk, std::memory_order_acq_rel))
                return now & MASK;
        return -1;
    }

    // Phase and number: of the next task, and of tasks done.
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> done_{0};
};

struct Member {
    Team* team = nullptr;
    int64_t phase = 0;
};

thread_local Member member;

// Runs the same function on every thread, as one team.
template <class Function>
void as_team(Function function) {
    Team team;
#pragma omp parallel
    {
        member = {&team, 0};
        function();
        member = {};
    }
}

// Calls work(task) for every task below `count`, `chunk` of them after each other at a time. A
// thread that is held up takes fewer. All threads of a team must come here with the same count.
template <class Work>
void share_out(int64_t count, int64_t chunk, Work work) {
    if (member.team) {
        if (count > 0) member.team->share_out(member.phase++, count, chunk, work);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel if (count > chunk)
    for (;;) {
        const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= count) break;
        const int64_t end = begin + chunk < count ? begin + chunk : count;
        for (int64_t task = begin; task < end; task++) work(task);
    }
}

// Rows that are worth a thread's waking.
inline int64_t rows_at_once(int64_t row_size) {
    constexpr int64_t ENOUGH = 1 << 14;
    return ceil_div(ENOUGH, row_size);
}

// So many tasks that each thread comes back for more some times.
inline int64_t chunk_of(int64_t count, int64_t times = 32) {
    const int64_t turns = omp_get_max_threads() * times;
    return count > turns ? count / turns : 1;
}

}  // namespace
