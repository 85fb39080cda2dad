// A token for each row of logits: the likeliest, or a draw within min_p, top_k and top_p.
//
// What is chosen is what platforms/torch/sampling defines, but for the last bits of exponentials.
// Likelier is the larger logit, and of equal ones the lower id; weights are whole numbers of units
// whose sums are exact in float64, so that neither the threads nor the other rows have a say in a
// row's token.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t SPAN = 64;         // tokens whose largest logit and whose weight are noted
constexpr int64_t SPANS = 128;       // that a thread goes through at a time
constexpr int64_t FIRST_LOOK = 64;   // likeliest tokens that are looked at first,
constexpr int64_t FURTHER = 4;       // and how many times as many after each time in vain
constexpr int64_t MOST_LOOK = 256;   // where levels cost less than another look
constexpr int LEVELS = 256;          // of scaled logits, from the largest one downwards,
constexpr float PER_UNIT = 8.f;      // and so many of them where a weight becomes e times smaller
constexpr float COLD = 1e-5f;        // temperatures below this are greedy

typedef float f32xH __attribute__((vector_size(2 * NATIVE)));
typedef double f64xH __attribute__((vector_size(4 * NATIVE)));

struct Logits {
    const void* data;
    bool wide;       // float32; else bf16
    int64_t stride;  // from row to row
    int64_t size;    // of the vocabulary

    int64_t spans() const { return ceil_div(size, SPAN); }

    // Those of a span; behind the last of a row there are some that no token has.
    void read(int64_t row, int64_t span, float* to) const {
        const int64_t begin = span * SPAN, count = std::min(SPAN, size - begin);
        const float* floats = (const float*)data + row * stride + begin;
        const bf16* halves = (const bf16*)data + row * stride + begin;
        int64_t i = 0;
        for (; i + NATIVE <= count; i += NATIVE)
            store(to + i, wide ? load<f32xN>(floats + i) : load_wide(halves + i));
        for (; i < count; i++) to[i] = wide ? floats[i] : widen(halves[i]);
        std::fill(to + count, to + SPAN, NEVER);
    }
};

// The largest logit of each of some spans; if any is not a number, that of the first span is none.
inline void note_maxima(const Logits& x, int64_t row, int64_t begin, int64_t end, float* maxima) {
    f32xN wrong = all(0.f);
    for (int64_t span = begin; span < end; span++) {
        alignas(64) float logits[SPAN];
        x.read(row, span, logits);
        f32xN most = all(NEVER);
        for (int64_t i = 0; i < SPAN; i += NATIVE) {
            const f32xN v = load<f32xN>(logits + i);
            most = larger(v, most);
            wrong = v == v ? wrong : all(1.f);
        }
        maxima[span] = largest(most);
    }
    if (sum(wrong) != 0.f) maxima[begin] = NAN;
}

// A row's largest logit, which is not a number if one of them is not, and the first token with it.
inline std::pair<float, int64_t> peak_of(const Logits& x, int64_t row, const float* maxima) {
    int64_t best = 0;
    for (int64_t span = 0; span < x.spans(); span++) {
        if (maxima[span] != maxima[span]) return {NAN, 0};
        if (maxima[span] > maxima[best]) best = span;
    }
    float logits[SPAN];
    x.read(row, best, logits);
    return {maxima[best], best * SPAN + (std::find(logits, logits + SPAN, maxima[best]) - logits)};
}

// How a logit becomes a weight.
struct Heat {
    float peak, temperature, units;

    float scaled(float logit) const { return (logit - peak) / temperature; }
};

// Weights of a span. A function of its own: where it is inlined, the compiler may join another of
// its products with a sum, and the same logit would have two weights.
[[gnu::noinline]] void weigh_span(const Heat& heat, const float* logits, float* weights) {
    const f32xN whole = all(8388608.f);  // from here on float32 has whole numbers only
    for (int64_t i = 0; i < SPAN; i += NATIVE) {
        const f32xN scaled = (load<f32xN>(logits + i) - heat.peak) / heat.temperature;
        const f32xN w = exponential(scaled) * heat.units;
        store(weights + i, w < whole ? (w + whole) - whole : w);
    }
}

// Which level each logit of a span has.
inline void find_levels(const Heat& heat, const float* logits, int32_t* levels) {
    for (int64_t i = 0; i < SPAN; i += NATIVE) {
        const f32xN below = (load<f32xN>(logits + i) - heat.peak) / heat.temperature * -PER_UNIT;
        const f32xN lowest = all(LEVELS - 1);
        store(levels + i, __builtin_convertvector(below < lowest ? below : lowest, i32xN));
    }
}

inline double sum_of_span(const float* weights) {
    f64xH sums{};
    for (int64_t i = 0; i < SPAN; i += NATIVE / 2)
        sums += __builtin_convertvector(load<f32xH>(weights + i), f64xH);
    double total = 0;
    for (int i = 0; i < NATIVE / 2; i++) total += sums[i];
    return total;
}

// The first place whose running sum is beyond the target, and what lies before it. The target is
// held below the last sum, so that what is found has a weight.
template <class T>
inline std::pair<int64_t, double> first_beyond(const T* weights, int64_t count, double total,
                                               double target) {
    const double held = std::min(target, total - 1);
    double before = 0;
    for (int64_t i = 0; i < count; i++) {
        if (before + weights[i] > held) return {i, before};
        before += weights[i];
    }
    return {count - 1, before};
}

// A token among the likeliest of its row: a larger rank is likelier.
struct Candidate {
    uint64_t rank;
    float weight;

    Candidate(float logit, int64_t id, float weight) : weight(weight) {
        const uint32_t raw = bits<uint32_t>(logit + 0.f);  // -0 is 0
        const uint32_t ordered = raw >> 31 ? ~raw : raw | 0x80000000u;
        rank = uint64_t(ordered) << 32 | uint32_t(~uint32_t(id));
    }

    float logit() const {
        const uint32_t ordered = uint32_t(rank >> 32);
        return bits<float>(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
    }
    int64_t id() const { return int64_t(uint32_t(~uint32_t(rank))); }
    bool operator<(const Candidate& other) const { return rank > other.rank; }
};

// One row that is drawn.
struct Draw {
    const Logits& x;
    const int64_t row;
    const Heat heat;
    const float floor;  // logarithm of min_p
    const int64_t top_k;
    const double top_p, uniform;
    const float* maxima;
    double* sums;  // weights of spans

    bool is_whole() const { return top_k >= x.size && floor == NEVER; }
    bool is_free() const { return is_whole() && top_p >= 1; }

    void weigh(int64_t begin, int64_t end) const {
        for (int64_t span = begin; span < end; span++) {
            alignas(64) float logits[SPAN], weights[SPAN];
            x.read(row, span, logits);
            weigh_span(heat, logits, weights);
            sums[span] = sum_of_span(weights);
        }
    }

    int64_t token() const {
        if (is_free()) return drawn(nullptr);
        const Candidate last = boundary();
        for (int64_t span = 0; span < x.spans(); span++) {
            alignas(64) float weights[SPAN];
            sums[span] = 0;
            if (maxima[span] < last.logit()) continue;
            weigh_kept(span, &last, weights);
            sums[span] = sum_of_span(weights);
        }
        return drawn(&last);
    }

  private:
    double total() const {
        double sum = 0;
        for (int64_t span = 0; span < x.spans(); span++) sum += sums[span];
        return sum;
    }

    // By inverting the cumulative distribution, in order of id.
    int64_t drawn(const Candidate* last) const {
        const double whole = total(), target = uniform * whole;
        const auto [span, before] = first_beyond(sums, x.spans(), whole, target);
        alignas(64) float weights[SPAN];
        weigh_kept(span, last, weights);
        return span * SPAN + first_beyond(weights, SPAN, sums[span], target - before).first;
    }

    // Weights of a span, those behind the last token that is kept as zeros.
    void weigh_kept(int64_t span, const Candidate* last, float* weights) const {
        alignas(64) float logits[SPAN];
        x.read(row, span, logits);
        weigh_span(heat, logits, weights);
        if (!last) return;
        const float least = last->logit();
        const int32_t most = int32_t(last->id() - span * SPAN);
        for (int32_t i = 0; i < SPAN; i++)
            weights[i] = logits[i] > least || (logits[i] == least && i <= most) ? weights[i] : 0.f;
    }

    // The last token that min_p, top_k and top_p leave, in order of likelihood.
    Candidate boundary() const {
        // That of other rows is not known, and then not asked for.
        const double whole = is_whole() ? total() : std::numeric_limits<double>::infinity();
        std::vector<Candidate> found;
        const int64_t least = top_k < x.size ? top_k : 1;
        for (int64_t count = std::max(FIRST_LOOK, least);; count *= FURTHER) {
            if (is_whole() && count > MOST_LOOK) return boundary_by_levels(top_p * whole, found);
            const bool are_all = count >= x.spans();
            collect(count, found);
            const int64_t kept = narrowed(found, are_all, whole);
            if (kept >= 0) return found[kept];
        }
    }

    // The token at which the weight of the likeliest tokens reaches the goal.
    Candidate boundary_by_levels(double goal, std::vector<Candidate>& found) const {
        alignas(64) float logits[SPAN], weights[SPAN];
        alignas(64) int32_t levels[SPAN];
        double masses[LEVELS] = {};
        for (int64_t span = 0; span < x.spans(); span++) {
            x.read(row, span, logits);
            find_levels(heat, logits, levels);
            weigh_span(heat, logits, weights);
            for (int64_t i = 0; i < SPAN; i++) masses[levels[i]] += weights[i];
        }
        int level = 0;
        double before = 0;
        while (before + masses[level] < goal) before += masses[level++];
        found.clear();
        for (int64_t span = 0; span < x.spans(); span++) {
            x.read(row, span, logits);
            find_levels(heat, logits, levels);
            if (std::count(levels, levels + SPAN, level) == 0) continue;
            weigh_span(heat, logits, weights);
            for (int64_t i = 0; i < SPAN; i++)
                if (levels[i] == level) found.emplace_back(logits[i], span * SPAN + i, weights[i]);
        }
        return *reaching(found.begin(), found.end(), before, goal);
    }

    // At least so many of the likeliest tokens (all that weigh something, if there are fewer): those
    // that reach the least of as many largest maxima.
    void collect(int64_t count, std::vector<Candidate>& found) const {
        float least = NEVER;
        if (count < x.spans()) {
            std::vector<float> ranked(maxima, maxima + x.spans());
            std::nth_element(ranked.begin(), ranked.begin() + count - 1, ranked.end(),
                             std::greater<float>());
            least = ranked[count - 1];
        }
        found.clear();
        for (int64_t span = 0; span < x.spans(); span++) {
            if (maxima[span] < least) continue;
            alignas(64) float logits[SPAN], weights[SPAN];
            x.read(row, span, logits);
            weigh_span(heat, logits, weights);
            for (int64_t i = 0; i < SPAN; i++)
                if (logits[i] >= least && logits[i] > NEVER)
                    found.emplace_back(logits[i], span * SPAN + i, weights[i]);
        }
    }

    // Which of the likeliest tokens is the last that is kept, after which they are put in no
    // particular order; -1: that takes more of them.
    int64_t narrowed(std::vector<Candidate>& found, bool are_all, double whole) const {
        const auto begin = found.begin();
        auto end = found.end();
        if (floor > NEVER)
            end = std::partition(begin, end, [&](const Candidate& c) {
                return heat.scaled(c.logit()) >= floor;
            });
        const bool is_complete = are_all || end != found.end() || end - begin >= top_k;
        if (end - begin > top_k) {
            std::nth_element(begin, begin + top_k, end);
            end = begin + top_k;
        }
        const double here = mass(begin, end), goal = top_p * (is_complete ? here : whole);
        return here < goal ? -1 : reaching(begin, end, 0., goal) - begin;
    }

    using Iterator = std::vector<Candidate>::iterator;

    static double mass(Iterator begin, Iterator end) {
        double sum = 0;
        for (Iterator c = begin; c != end; ++c) sum += c->weight;
        return sum;
    }

    // Where the goal is reached in order of likelihood, in which they are put as far as is needed;
    // `before`: the weight of likelier ones.
    static Iterator reaching(Iterator begin, Iterator end, double before, double goal) {
        while (end - begin > 1) {
            const Iterator middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end);
            const double more = mass(begin, middle);
            if (before + more >= goal)
                end = middle;
            else
                begin = middle, before += more;
        }
        return begin;
    }
};

// `controls`: temperature, logarithm of min_p, top_k, top_p and noise, (5, rows); null: all rows are
// greedy. `finite`: whether the largest logits are; where one is not, the token is 0.
inline void choose(const Logits& x, int64_t num_rows, const float* controls, int64_t* ids,
                   bool* finite) {
    const int64_t spans = x.spans(), parts = ceil_div(spans, SPANS);
    const auto part_of = [&](int64_t task, auto work) {
        const int64_t begin = task % parts * SPANS;
        work(task / parts, begin, std::min(spans, begin + SPANS));
    };
    std::vector<float> maxima(num_rows * spans);
    share_out(num_rows * parts, 4, [&](int64_t task) {
        part_of(task, [&](int64_t row, int64_t begin, int64_t end) {
            note_maxima(x, row, begin, end, maxima.data() + row * spans);
        });
    });
    const float units = std::ldexp(1.f, 52 - (64 - __builtin_clzll(uint64_t(x.size))));
    std::vector<Draw> draws;
    for (int64_t row = 0; row < num_rows; row++) {
        const auto control = [&](int field) { return controls[field * num_rows + row]; };
        const float* own = maxima.data() + row * spans;
        const auto [peak, likeliest] = peak_of(x, row, own);
        finite[row] = std::isfinite(peak);
        ids[row] = finite[row] ? likeliest : 0;
        if (controls && control(0) >= COLD && finite[row])
            draws.push_back({x, row, {peak, control(0), units}, control(1), int64_t(control(2)),
                             control(3), control(4), own, nullptr});
    }
    if (draws.empty()) return;
    std::vector<double> sums(draws.size() * spans);
    std::vector<const Draw*> weighed;
    for (size_t i = 0; i < draws.size(); i++) {
        draws[i].sums = sums.data() + i * spans;
        if (draws[i].is_whole()) weighed.push_back(&draws[i]);
    }
    share_out(weighed.size() * parts, 1, [&](int64_t task) {
        part_of(task, [&](int64_t i, int64_t begin, int64_t end) {
            weighed[i]->weigh(begin, end);
        });
    });
    share_out(draws.size(), 1, [&](int64_t i) { ids[draws[i].row] = draws[i].token(); });
}

}  // namespace
