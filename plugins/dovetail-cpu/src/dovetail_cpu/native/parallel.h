// Work is shared out among the threads of the OpenMP that torch has loaded: a second pool would
// contend with the first for the same cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include <omp.h>
#include <sched.h>

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Range {
    int64_t begin = 0, end = 0;

    bool is_empty() const { return begin == end; }
};

// How many of the tasks that are left a thread takes: fewer and fewer, so that all end together
// however fast each of them is (Polychronopoulos and Kuck, 1987).
inline int64_t share_of(int64_t left, int64_t least) {
    const int64_t share = left / (2 * omp_get_num_threads());
    return share > least ? share : least < left ? least : left;
}

// Where a task stands among those that a thread does one after the other.
struct Place {
    bool is_first, is_last;
};

// Calls work(task) or work(task, place).
template <class Work>
inline void run(Range range, Work work) {
    for (int64_t task = range.begin; task < range.end; task++) {
        if constexpr (std::is_invocable_v<Work, int64_t, Place>)
            work(task, Place{task == range.begin, task + 1 == range.end});
        else
            work(task);
    }
}

// Threads that go through the same phases of work together. Whoever comes takes tasks of the phase
// that is under way; one that comes late finds phases done and goes on, and nobody waits for it
// unless it holds a task. So a core that somebody else has taken costs its share and no more.
class Team {
  public:
    template <class Work>
    void share_out(int64_t phase, int64_t count, int64_t least, Work work) {
        for (;;) {
            const Range range = take(phase, count, least);
            if (range.is_empty()) break;
            run(range, work);
            const int64_t size = range.end - range.begin;
            const int64_t done = done_.fetch_add(size, std::memory_order_acq_rel);
            if ((done & MASK) + size == count) {
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

    // Tasks that are the caller's now; empty if none is left in its phase.
    Range take(int64_t phase, int64_t count, int64_t least) {
        int64_t now = next_.load(std::memory_order_acquire);
        while (now >> SHIFT == phase && (now & MASK) < count) {
            const int64_t begin = now & MASK, size = share_of(count - begin, least);
            if (next_.compare_exchange_weak(now, now + size, std::memory_order_acq_rel))
                return {begin, begin + size};
        }
        return {};
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

// Runs every task below `count`, at least `least` of them after each other at a time. A thread
// that is held up takes fewer. All threads of a team must come here with the same count.
template <class Work>
void share_out(int64_t count, int64_t least, Work work) {
    if (member.team) {
        if (count > 0) member.team->share_out(member.phase++, count, least, work);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel if (count > least)
    for (int64_t begin = next.load(std::memory_order_relaxed); begin < count;) {
        const int64_t size = share_of(count - begin, least);
        if (next.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) {
            run({begin, begin + size}, work);
            begin = next.load(std::memory_order_relaxed);
        }
    }
}

// Rows that are worth a second thread: those of a team are awake, others must be woken.
inline int64_t rows_at_once(int64_t row_size) {
    constexpr int64_t AWAKE = 1 << 12, ASLEEP = 1 << 14;
    return ceil_div(member.team ? AWAKE : ASLEEP, row_size);
}

}  // namespace
