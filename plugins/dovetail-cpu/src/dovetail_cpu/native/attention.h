// Paged causal attention.
//
// A block of P positions keeps the keys of a KV head as words of two entries, (E / 2, P), and the
// values as words of two positions, (P / 2, E): the second factors of the two matrix products, as
// tiles read them; or the same words with a byte for each entry (codes.h), which are expanded to
// those before they are multiplied. Query heads that share a KV head are rows of one product, so
// that keys and values are read once for all of them. The softmax goes along with the keys
// (Milakov and Gimelshein, 2018; Dao et al., 2022).
#pragma once

#include "codes.h"
#include "matrix_unit.h"

namespace {

constexpr int64_t MOST_ROWS = 96;    // of queries times heads
constexpr int64_t MOST_HEAD = 256;   // entries
constexpr int64_t KEYS = 256;        // positions between two looks at the largest score

extern "C" struct Layer {
    int64_t num_heads, num_kv_heads, head_size, block_size;
    int64_t window;        // 0: none
    const float* slopes;   // of ALiBi, per head; null: none
    char* cache;           // (blocks, 2, kv heads, block_size * head_size) entries
    bf16* scales;          // (blocks, 2, kv heads, block_size); null with entries in bf16
    Format format;
    float scale, soft_cap; // 0: none

    int64_t entry_bytes() const { return format == Format::BF16 ? sizeof(bf16) : 1; }
};

extern "C" struct Task {
    int32_t row, first_query, num_queries, first_key, end_key;
    int32_t part;  // where its result waits for others of the same queries; -1: nowhere
};

extern "C" struct Step {
    int64_t num_tokens, num_tasks, num_merges, table_width;
    const int32_t *query_starts, *context_lens, *tables, *slots;
    const Task* tasks;
    const int32_t* merges;  // (num_merges, 2): first task, number of tasks
    float* parts;           // (parts, kv heads, MOST_ROWS, head_size + 2)
};

extern "C" struct Heads {
    const bf16 *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // from token to token
    const float *cosines, *sines;          // (tokens, half); null: heads are not rotated
    int64_t half;
    const void *q_norm, *k_norm;           // (head_size,); null: none
    int64_t wide_norms;
    float eps;
};

struct Sides {
    char *keys, *values;
    bf16 *key_scales, *value_scales;
};

inline Sides block_of(const Layer& layer, int64_t block, int64_t head) {
    const int64_t places = layer.block_size, bytes = places * layer.head_size * layer.entry_bytes();
    const int64_t keys = block * 2 * layer.num_kv_heads + head, values = keys + layer.num_kv_heads;
    bf16* scales = layer.scales;
    return {layer.cache + keys * bytes, layer.cache + values * bytes,
            scales ? scales + keys * places : nullptr, scales ? scales + values * places : nullptr};
}

// One head of a token as attention meets it: norm, then rotation.
inline void prepare(const Heads& heads, int64_t token, int64_t size, const void* norm,
                    const bf16* from, bf16* to) {
    if (norm) norm_row(from, size, {norm, heads.wide_norms != 0}, heads.eps, to), from = to;
    if (heads.cosines)
        rotate_head(from, size, heads.cosines + token * heads.half,
                    heads.sines + token * heads.half, heads.half, to);
    else if (from != to)
        std::memcpy(to, from, size * sizeof(bf16));
}

// A token's keys and values to the cache.
inline void store_token(const Layer& layer, const Step& step, const Heads& heads, int64_t token) {
    const int64_t size = layer.head_size, places = layer.block_size;
    const int64_t block = step.slots[token] / places, place = step.slots[token] % places;
    const auto put = [&](Sides to, const auto* key, const auto* value) {
        using Entry = std::remove_cv_t<std::remove_pointer_t<decltype(key)>>;
        Entry *keys = (Entry*)to.keys + place * 2, *values = (Entry*)to.values + place % 2;
        for (int64_t e = 0; e < size; e += 2)
            std::memcpy(keys + e * places, key + e, 2 * sizeof(Entry));
        values += place / 2 * size * 2;
        for (int64_t e = 0; e < size; e++) values[e * 2] = value[e];
    };
    for (int64_t h = 0; h < layer.num_kv_heads; h++) {
        const Sides to = block_of(layer, block, h);
        bf16 key[MOST_HEAD];
        prepare(heads, token, size, heads.k_norm, heads.k + token * heads.k_stride + h * size, key);
        const bf16* value = heads.v + token * heads.v_stride + h * size;
        if (layer.format == Format::BF16) {
            put(to, key, value);
            continue;
        }
        of_format(layer.format, [&](auto code) {
            using C = decltype(code);
            uint8_t key_codes[MOST_HEAD], value_codes[MOST_HEAD];
            to.key_scales[place] = encode<C>(key, size, key_codes);
            to.value_scales[place] = encode<C>(value, size, value_codes);
            put(to, key_codes, value_codes);
        });
    }
}

// Keys and values that will be read soon, in their order.
class Coming {
  public:
    // `lines`: of LANES keys or values.
    explicit Coming(int64_t lines) : lines_(lines) {}

    void clear() { count_ = current_ = done_ = 0; }
    void add(const void* first, int64_t stride) { runs_[count_++] = {(const char*)first, stride}; }

    void bring() {
        if (current_ == count_) return;
        const Run& run = runs_[current_];
        prefetch(run.first + done_ * run.stride);
        prefetch(run.first + (done_ + 1) * run.stride);
        done_ += 2;
        if (done_ == lines_) done_ = 0, current_++;
    }

  private:
    struct Run {
        const char* first;
        int64_t stride;  // bytes from line to line
    };

    const int64_t lines_;
    int64_t count_ = 0, current_ = 0, done_ = 0;
    Run runs_[2 * KEYS / LANES];
};

struct Bringing {
    Coming* coming;

    void bring() const {
        if (coming) coming->bring();
    }
};

// One task in one KV head.
struct Share {
    const Layer& layer;
    const Step& step;
    const Task& task;
    const int64_t head, group, num_rows, size;

    Share(const Layer& layer, const Step& step, const Task& task, int64_t head)
        : layer(layer), step(step), task(task), head(head),
          group(layer.num_heads / layer.num_kv_heads), num_rows(task.num_queries * group),
          size(layer.head_size) {}

    int64_t token(int64_t i) const {
        return step.query_starts[task.row] + task.first_query + i / group;
    }
    int64_t position(int64_t i) const {
        return step.context_lens[task.row] + task.first_query + i / group;
    }
    int64_t offset(int64_t i) const { return (head * group + i % group) * size; }

    // The keys that it sees: from a multiple of LANES on.
    int64_t begin() const {
        const int64_t first = task.first_key;
        const int64_t seen = layer.window ? std::max(first, position(0) - layer.window + 1) : first;
        return seen / LANES * LANES;
    }
    int64_t end() const { return std::min<int64_t>(task.end_key, position(num_rows - 1) + 1); }

    // Calls with where every LANES keys and values begin.
    template <class Call>
    void each(int64_t first, int64_t count, Call call) const {
        const int64_t places = layer.block_size, bytes = layer.entry_bytes();
        const int32_t* table = step.tables + task.row * step.table_width;
        for (int64_t v = 0; v * LANES < count; v++) {
            const int64_t position = first + v * LANES, place = position % places;
            const Sides block = block_of(layer, table[position / places], head);
            const int64_t scale = layer.scales ? place : 0;
            call(v, Sides{block.keys + place * 2 * bytes, block.values + place * size * bytes,
                          block.key_scales + scale, block.value_scales + scale});
        }
    }
};

// The work of it.
struct Attended : Share {
    using A = Pairs::A;
    alignas(64) A queries[MOST_ROWS * MOST_HEAD];
    alignas(64) float scores[MOST_ROWS * KEYS];
    alignas(64) A weights[MOST_ROWS * KEYS];
    alignas(64) float result[MOST_ROWS * MOST_HEAD];
    float peaks[MOST_ROWS], totals[MOST_ROWS];
    alignas(64) uint32_t expanded[KEYS * MOST_HEAD / 2];  // keys, then values, if they are codes
    const uint32_t *keys[KEYS / LANES], *values[KEYS / LANES];
    int64_t key_stride;  // words from one pair of entries to the next
#ifdef HAS_MATRIX_UNIT
    alignas(64) uint32_t rest[LANES * MOST_HEAD];  // the last values, in two vectors
    MatrixUnit unit;
#endif
    Coming coming;

    explicit Attended(const Share& share)
        : Share(share), key_stride(layer.format == Format::BF16 ? layer.block_size : LANES),
          coming(size / 2) {}

    void start() {
        std::fill_n(peaks, num_rows, NEVER);
        std::fill_n(totals, num_rows, 0.f);
        std::fill_n(result, num_rows * size, 0.f);
    }

    // `next`: what the same thread does afterwards; null: nothing.
    void run(const Heads& heads, const Share* next) {
        start();
        for (int64_t i = 0; i < num_rows; i++) {
            bf16 query[MOST_HEAD];
            prepare(heads, token(i), size, heads.q_norm,
                    heads.q + token(i) * heads.q_stride + offset(i), query);
            Pairs::take(query, size, queries + i * size);
        }
        for (int64_t first = begin(); first < end(); first += KEYS) {
            const int64_t count = std::min(KEYS, end() - first);
            coming.clear();
            if (layer.format != Format::BF16) {
                of_format(layer.format, [&](auto code) { over_codes<decltype(code)>(first, count); });
                continue;
            }
            each(first, count, [&](int64_t v, Sides at) {
                keys[v] = (const uint32_t*)at.keys;
                values[v] = (const uint32_t*)at.values;
                coming.add(at.values, LINE);
            });
            // Values are brought while keys are multiplied, and the keys behind them afterwards.
            const bool ends = first + KEYS >= end();
            const Share* behind = ends ? next : this;
            const int64_t from = ends ? behind ? behind->begin() : 0 : first + KEYS;
            if (behind)
                behind->each(from, std::min(KEYS, behind->end() - from), [&](int64_t, Sides at) {
                    coming.add(at.keys, layer.block_size * sizeof(uint32_t));
                });
            score(count);
            for (int64_t i = 0; i < num_rows; i++) weigh(i, first, count);
            mix(first, count);
        }
    }

    // The same over codes: each side is expanded when its turn comes.
    template <class C>
    void over_codes(int64_t first, int64_t count) {
        each(first, count, [&](int64_t v, Sides at) {
            uint32_t* to = expanded + v * size / 2 * LANES;
            keys[v] = to;
            for (int lane = 0; lane < LANES; lane += NATIVE) {
                const f32xN scales = load_wide(at.key_scales + lane);
                const uint8_t* from = (const uint8_t*)at.keys + lane * 2;
                for (int64_t e = 0; e < size / 2; e++)
                    expand<C>(from + e * layer.block_size * 2, scales, scales, to + e * LANES + lane);
            }
        });
        score(count);
        for (int64_t i = 0; i < num_rows; i++) weigh(i, first, count);
        each(first, count, [&](int64_t v, Sides at) {
            uint32_t* to = expanded + v * LANES / 2 * size;
            values[v] = to;
            for (int64_t pair = 0; pair < LANES / 2; pair++) {
                const f32xN even = all(widen(at.value_scales[pair * 2]));
                const f32xN odd = all(widen(at.value_scales[pair * 2 + 1]));
                const uint8_t* from = (const uint8_t*)at.values + pair * size * 2;
                for (int64_t e = 0; e < size; e += NATIVE)
                    expand<C>(from + e * 2, even, odd, to + pair * size + e);
            }
        });
        mix(first, count);
    }

#ifdef HAS_MATRIX_UNIT
    // Calls multiply(rows, first row, number of rows) for up to two tiles of rows at a time.
    template <class Multiply>
    void in_pairs(const A* from, int64_t stride, Multiply multiply) {
        const int64_t bytes = stride * sizeof(A);
        const RowTiles rows{(const char*)from, bytes, TILE * bytes, LINE};
        for (int64_t first = 0; first < num_rows; first += 2 * TILE)
            multiply(rows.from(first / TILE, 0), first, std::min(2 * TILE, num_rows - first));
    }

    // What is brought in a step of the unit, while the first rows are there.
    struct Brings {
        Coming& coming;
        int64_t words;

        void bring() const {
            for (int64_t i = 0; i < words; i++) coming.bring();
        }
    };

    Brings brings(int64_t first_row, int64_t words) { return {coming, first_row ? 0 : words}; }

    void score(int64_t count) {
        const int64_t vectors = ceil_div(count, LANES), bytes = key_stride * sizeof(uint32_t);
        in_pairs(queries, size, [&](RowTiles rows, int64_t first, int64_t num) {
            const auto strip = [&](int64_t v, auto wide) {
                const auto column = [&](int64_t step, int j) {
                    return keys[v + j] + step * TILE * key_stride;
                };
                multiply_rows<Pairs, decltype(wide)::value>(
                    unit, rows, num, size / 2, column, bytes, scores + first * KEYS + v * LANES,
                    KEYS, false, brings(first, TILE));
            };
            for (int64_t v = 0; v + 1 < vectors; v += 2) strip(v, std::integral_constant<int, 2>{});
            if (vectors % 2) strip(vectors - 1, std::integral_constant<int, 1>{});
        });
    }
#else
    void score(int64_t count) {
        const int64_t vectors = ceil_div(count, LANES);
        in_tiles<Pairs::ROWS>(num_rows, [&](auto r, int64_t first) {
            constexpr int R = decltype(r)::value;
            const char* a = (const char*)(queries + first * size);
            const Bringing bringing{first == 0 ? &coming : nullptr};
            float* c = scores + first * KEYS;
            int64_t v = 0;
            const auto strip = [&](auto wide) {
                constexpr int V = decltype(wide)::value;
                const auto part = [&](int64_t, int j) { return keys[v + j]; };
                tile<Pairs, R, V, 1>(a, size * sizeof(A), 1, size / 2, part, key_stride,
                                     c + v * LANES, KEYS, false, bringing);
                v += V;
            };
            while (vectors - v >= Pairs::VECTORS) strip(std::integral_constant<int, Pairs::VECTORS>{});
            while (v < vectors) strip(std::integral_constant<int, 1>{});
        });
    }
#endif

    // What is done to scores before the softmax, apart from a factor.
    void bend(float* s, int64_t begin, int64_t end, int64_t i) const {
        f32xN lanes;
        for (int lane = 0; lane < NATIVE; lane++) lanes[lane] = float(lane);
        const float slope = layer.slopes ? layer.slopes[head * group + i % group] : 0.f;
        for (int64_t k = 0; k < end; k += NATIVE) {
            f32xN x = load<f32xN>(s + k) * layer.scale;
            if (layer.soft_cap != 0.f) x = soft_cap(x, layer.soft_cap);
            x += (lanes + float(begin + k - position(i))) * slope;
            store(s + k, x);
        }
    }

    // Scores of one row to weights, and what was mixed so far to the new largest score. Peaks are
    // in powers of two.
    void weigh(int64_t i, int64_t begin, int64_t count) {
        constexpr float LOG2_E = 1.44269504f;
        float* s = scores + i * KEYS;
        const int64_t end = ceil_div(count, LANES) * LANES, here = position(i);
        const bool is_bent = layer.soft_cap != 0.f || layer.slopes;
        if (is_bent) bend(s, begin, end, i);
        const float factor = is_bent ? LOG2_E : LOG2_E * layer.scale;
        const int64_t first = layer.window ? std::max<int64_t>(0, here - layer.window + 1 - begin) : 0;
        const int64_t seen = std::min(here + 1 - begin, count);
        std::fill(s, s + std::clamp<int64_t>(first, 0, end), NEVER);
        std::fill(s + std::clamp<int64_t>(seen, 0, end), s + end, NEVER);
        f32xN most = all(NEVER);
        for (int64_t k = 0; k < end; k += NATIVE) most = larger(load<f32xN>(s + k), most);
        const float peak = std::max(peaks[i], largest(most) * factor);
        if (peak == NEVER) {  // it sees none of these, or nothing that is a number
            std::fill_n(weights + i * KEYS, end, A(0));
            if (std::any_of(s, s + end, [](float x) { return x != x; }))
                totals[i] = NAN;
            return;
        }
        f32xN total = all(0.f);
        for (int64_t k = 0; k < end; k += NATIVE) {
            const f32xN w = rough_power_of_two(load<f32xN>(s + k) * factor - peak);
            Pairs::put(weights + i * KEYS + k, w);
            total += w;
        }
        const float kept = std::exp2(peaks[i] - peak);
        totals[i] = totals[i] * kept + sum(total);
        peaks[i] = peak;
        if (kept != 1.f)
            for (int64_t e = 0; e < size; e += NATIVE)
                store(result + i * size + e, load<f32xN>(result + i * size + e) * kept);
    }

    // Adds the weighted values. Places that nobody has written are not looked at: they may hold
    // what is not a number.
#ifdef HAS_MATRIX_UNIT
    void mix(int64_t begin, int64_t count) {
        const int64_t vectors = ceil_div(count, LANES);
        if (count % LANES) take_written(begin, count);
        // A step takes two vectors where they lie together and the first has an even number among
        // all of the sequence: so a row's sums do not depend on where its task begins or ends.
        const auto is_pair = [&](int64_t v) {
            return v + 1 < vectors && (begin / LANES + v) % 2 == 0 &&
                   values[v + 1] == values[v] + LANES / 2 * size;
        };
        for (int64_t v = 0; v < vectors;) {
            const int64_t first = v, each = is_pair(v) ? 2 : 1;
            while (v < vectors && each == (is_pair(v) ? 2 : 1)) v += each;
            mix_run(first, (v - first) / each, each);
        }
    }

    // Steps of one or two vectors of positions.
    void mix_run(int64_t vector, int64_t steps, int64_t each) {
        const int64_t words = each * LANES / 2;
        in_pairs(weights + vector * LANES, KEYS, [&](RowTiles rows, int64_t first, int64_t num) {
            rows.step_bytes = words * 2 * sizeof(A);
            unit.set(num, words);
            const auto strip = [&](int64_t e, auto wide) {
                constexpr int V = decltype(wide)::value;
                const auto column = [&](int64_t step, int j) {
                    return values[vector + step * each] + e + j * LANES;
                };
                const auto multiply = [&](auto tiles) {
                    multiply_tiles<Pairs, decltype(tiles)::value, V>(
                        rows, steps, column, size * sizeof(uint32_t), result + first * size + e,
                        size, true, brings(first, words));
                };
                if (num > TILE)
                    multiply(std::integral_constant<int, 2>{});
                else
                    multiply(std::integral_constant<int, 1>{});
            };
            int64_t e = 0;
            for (; e + 2 * LANES <= size; e += 2 * LANES)
                strip(e, std::integral_constant<int, 2>{});
            if (e < size) strip(e, std::integral_constant<int, 1>{});
        });
    }

    // Copies the last values, with zeros in places that are not written; with those that a step
    // takes together with them.
    void take_written(int64_t begin, int64_t count) {
        int64_t v = count / LANES;
        if (v > 0 && (begin / LANES + v) % 2 && values[v] == values[v - 1] + LANES / 2 * size) v--;
        const int64_t written = count - v * LANES, pairs = written / 2;
        std::memcpy(rest, values[v], pairs * size * sizeof(uint32_t));
        std::memset(rest + pairs * size, 0, (LANES - pairs) * size * sizeof(uint32_t));
        for (int64_t e = 0; written % 2 && e < size; e++)
            rest[pairs * size + e] = values[v][pairs * size + e] & 0xffffu;
        for (int64_t i = 0; v + i < ceil_div(count, LANES); i++)
            values[v + i] = rest + i * LANES / 2 * size;
    }
#else
    void mix(int64_t begin, int64_t count) {
        const int64_t places = layer.block_size;
        for (int64_t done = 0; done < count;) {
            const int64_t place = (begin + done) % places;
            const int64_t run = place || count - done < places
                                    ? std::min(places - place, count - done)
                                    : (count - done) / places * places;
            const int64_t parts = ceil_div(run, places);
            mix_run(parts, run / parts / 2, done);
            if (run % 2) mix_last(done + run - 1);
            done += run;
        }
    }

    void mix_run(int64_t parts, int64_t depth, int64_t column) {
        in_tiles<Pairs::ROWS>(num_rows, [&](auto r, int64_t first) {
            constexpr int R = decltype(r)::value;
            const char* a = (const char*)(weights + first * KEYS + column);
            const Bringing bringing{first == 0 ? &coming : nullptr};
            float* c = result + first * size;
            int64_t e = 0;
            const auto strip = [&](auto wide) {
                constexpr int V = decltype(wide)::value;
                const auto part = [&](int64_t p, int j) {
                    return values[(column + p * 2 * depth) / LANES] + e + j * LANES;
                };
                tile<Pairs, R, V, V>(a, KEYS * sizeof(A), parts, depth, part, size, c + e, size, true,
                                     bringing);
                e += V * LANES;
            };
            while (size - e >= Pairs::VECTORS * LANES)
                strip(std::integral_constant<int, Pairs::VECTORS>{});
            while (e < size) strip(std::integral_constant<int, 1>{});
        });
    }

    // The first position of a pair whose second one is beyond the last key.
    void mix_last(int64_t column) {
        const uint32_t* words = values[column / LANES] + column % LANES / 2 * size;
        for (int64_t i = 0; i < num_rows; i++) {
            const float weight = Pairs::value(weights[i * KEYS + column]);
            for (int64_t e = 0; e < size; e += NATIVE) {
                float* to = result + i * size + e;
                const f32xN value = bits<f32xN>(load<u32xN>(words + e) << 16);
                store(to, load<f32xN>(to) + value * weight);
            }
        }
    }
#endif

    void finish(bf16* out) const {
        for (int64_t i = 0; i < num_rows; i++) {
            const float factor = totals[i] != 0.f ? 1.f / totals[i] : 0.f;
            bf16* to = out + token(i) * layer.num_heads * size + offset(i);
            for (int64_t e = 0; e < size; e += NATIVE)
                store(to + e, narrow(load<f32xN>(result + i * size + e) * factor));
        }
    }

    float* waiting(int64_t part, int64_t i) const {
        return step.parts + ((part * layer.num_kv_heads + head) * MOST_ROWS + i) * (size + 2);
    }

    void keep() const {
        for (int64_t i = 0; i < num_rows; i++) {
            float* to = waiting(task.part, i);
            std::memcpy(to, result + i * size, size * sizeof(float));
            to[size] = peaks[i];
            to[size + 1] = totals[i];
        }
    }

    // Takes in what another task has kept of the same queries.
    void merge(int64_t part) {
        for (int64_t i = 0; i < num_rows; i++) {
            const float* other = waiting(part, i);
            const float peak = std::max(peaks[i], other[size]);
            if (peak == NEVER) {
                totals[i] += other[size + 1];
                continue;
            }
            const float mine = std::exp2(peaks[i] - peak), theirs = std::exp2(other[size] - peak);
            for (int64_t e = 0; e < size; e += NATIVE) {
                float* to = result + i * size + e;
                store(to, load<f32xN>(to) * mine + load<f32xN>(other + e) * theirs);
            }
            totals[i] = totals[i] * mine + other[size + 1] * theirs;
            peaks[i] = peak;
        }
    }
};

inline void attend(const Layer& layer, const Step& step, const Heads& heads, bf16* out) {
    // Entries that are scattered cost several times as much as those in a row.
    share_out(step.num_tokens, rows_at_once(8 * layer.num_kv_heads * layer.head_size),
              [&](int64_t token) { store_token(layer, step, heads, token); });
    const auto share = [&](int64_t i) {
        return Share(layer, step, step.tasks[i / layer.num_kv_heads], i % layer.num_kv_heads);
    };
    const int64_t num_shares = step.num_tasks * layer.num_kv_heads;
    share_out(num_shares, 1, [&](int64_t i, Place place) {
        Attended work(share(i));
        const Share next = share(place.is_last ? i : i + 1);
        work.run(heads, place.is_last ? nullptr : &next);
        if (work.task.part < 0)
            work.finish(out);
        else
            work.keep();
    });
    if (!step.num_merges) return;
    share_out(step.num_merges * layer.num_kv_heads, 1, [&](int64_t i) {
        const int32_t* range = step.merges + i / layer.num_kv_heads * 2;
        Attended work(Share(layer, step, step.tasks[range[0]], i % layer.num_kv_heads));
        work.start();
        for (int32_t t = range[0]; t < range[0] + range[1]; t++) work.merge(step.tasks[t].part);
        work.finish(out);
    });
}

}  // namespace
