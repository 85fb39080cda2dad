// Linear layers over packed weights: columns in panels of 32, and in a panel the words of 32
// columns one after another for each word of a row: (N / 32, words of a row, 32).
//
// A weight is read once from memory however many rows there are, for a panel stays in a core's
// cache while all rows pass. Every sum runs over the inputs in one order, whatever the number of
// rows or threads.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL = 32;
constexpr int64_t PANEL_VECTORS = PANEL / LANES;
constexpr int64_t STEP = 4;            // vectors of columns that are taken at a time
#if defined(__AVX512F__)
constexpr int64_t ROW_BLOCK = 96;
constexpr int64_t DEPTH_BLOCK = 1024;  // words of a panel that stay in a core's second cache
constexpr int64_t NEAR_ROWS = 8;       // with fewer, a core has enough reads under way by itself
#else
constexpr int64_t ROW_BLOCK = 48;
constexpr int64_t DEPTH_BLOCK = 256;   // in its first one
constexpr int64_t NEAR_ROWS = 4;
#endif
constexpr int64_t MOST_SUMS = ROW_BLOCK * STEP * LANES;
constexpr int64_t GROUP = 4;           // steps that meet a block of rows in the second cache
constexpr int64_t MANY_ROWS = 48;      // from here on products are bound by arithmetic
constexpr int64_t LINE_OF_WORDS = PANEL * sizeof(uint32_t);  // bytes of a panel for a word of a row
constexpr int64_t NEAR = 4096;    // bytes ahead: in the next page, where a processor's own guess ends

enum Gate : int64_t { NO_GATE = 0, SILU = 1, GELU_TANH = 2 };

// Where the rows of the result go, and what is done to them on the way.
struct Target {
    void* out;
    bool wide;            // float32; else bf16
    int64_t stride;
    int64_t num_columns;  // of the weight; with a gate twice those of `out`
    const float* bias;    // null: none
    Gate gate;
};

// Vectors of columns, and how far their sums of a row are from those of the next, and those of a
// panel from those of the next.
struct Columns {
    int64_t first, count, stride, panel_stride = PANEL;

    Columns from(int64_t done, int64_t size) const {
        return {first + done, size, stride, panel_stride};
    }

    // How far the sums of column c are from those of the first, which may lie within a panel.
    int64_t at(int64_t c) const {
        const int64_t skipped = first % PANEL_VECTORS * LANES, column = skipped + c;
        return column / PANEL * panel_stride + column % PANEL - skipped;
    }
};

// Packed weights, with the rows that they are multiplied with.
template <class Words>
struct Factors {
    const char* rows;
    int64_t row_bytes;
    const uint32_t* panels;
    int64_t depth;  // words of a row

    // Sums of rows times columns. What lies before a place that is not the first was read just now,
    // and what lies behind one that is not the last is read next.
    void multiply(int64_t row, int64_t num_rows, Columns columns, typename Words::Sum* sums,
                  Place place) const {
        if constexpr (Words::FEW_ROWS > 0) {
            if (num_rows <= Words::FEW_ROWS && columns.count % FEW_VECTORS == 0) {
                if (num_rows == 1)
                    strips<1, Words::STREAMED>(row, num_rows, columns, sums, place);
                else if (num_rows <= FEW)
                    strips<FEW, Words::STREAMED_FEW>(row, num_rows, columns, sums, place);
                else
                    strips<FEW, FEW_VECTORS>(row, num_rows, columns, sums, place);
                return;
            }
        }
        if (num_rows >= MANY_ROWS && columns.count % Words::WIDE_VECTORS == 0)
            strips<Words::WIDE_ROWS, Words::WIDE_VECTORS>(row, num_rows, columns, sums, place);
        else
            strips<Words::ROWS, Words::VECTORS>(row, num_rows, columns, sums, place);
    }

    // Vectors of columns V at a time, and what is left in narrower strips.
    template <int ROWS, int V>
    void strips(int64_t row, int64_t num_rows, Columns columns, typename Words::Sum* sums,
                Place place) const {
        int64_t v = 0;
        for (; v + V <= columns.count; v += V)
            strip<ROWS, V>(row, num_rows, columns.from(v, V), sums + v * LANES,
                           {place.is_first && v == 0, place.is_last && v + V == columns.count});
        if constexpr (V > 1) {
            if (v < columns.count)
                strips<ROWS, V / 2>(row, num_rows, columns.from(v, columns.count - v),
                                    sums + v * LANES, {place.is_first && v == 0, place.is_last});
        }
    }

    // A function of its own, so that its loop has all registers: inlined, it had 7 % less speed.
    template <int R, int V>
    [[gnu::noinline]] static void block(const char* a, int64_t a_bytes, int64_t depth,
                                        const uint32_t* b, int64_t panel_words,
                                        typename Words::Sum* sums, int64_t stride, bool add,
                                        Ahead ahead) {
        const auto part = [&](int64_t, int j) { return b + j / PANEL_VECTORS * panel_words; };
        tile<Words, R, V, std::min<int>(V, PANEL_VECTORS)>(a, a_bytes, 1, depth, part, PANEL, sums,
                                                           stride, add, ahead);
    }

    // V vectors of columns: part of a panel, a panel, or several.
    template <int ROWS, int V>
    void strip(int64_t row, int64_t num_rows, Columns columns, typename Words::Sum* sums,
               Place place) const {
        constexpr int64_t WHOLE = V / PANEL_VECTORS;  // panels
        constexpr int64_t WORD = Words::PER_WORD * sizeof(typename Words::A);
        const int64_t vector = columns.first;
        const uint32_t* words = panels + vector / PANEL_VECTORS * depth * PANEL +
                                vector % PANEL_VECTORS * LANES;
        // Where several panels are read at once and only once, they need no place in a cache.
        const int64_t parts = WHOLE > 1 && num_rows <= ROWS ? 1 : ceil_div(depth, DEPTH_BLOCK);
        const int64_t most = ceil_div(depth, parts);
        for (int64_t done = 0; done < depth; done += most) {
            const int64_t size = std::min(most, depth - done);
            const bool ends = done + size == depth;
            const uint32_t* b = words + done * PANEL;
            // Of a strip that is half a panel, what is behind is half of the next panel.
            const int64_t half = vector % PANEL_VECTORS;
            const uint32_t* behind = WHOLE == 0 ? words + (depth + (half * depth + done) / 2) * PANEL
                                     : ends     ? words + WHOLE * depth * PANEL
                                                : b + size * PANEL;
            const int64_t line = WHOLE == 0 ? LINE_OF_WORDS / 2 : WHOLE * LINE_OF_WORDS;
            const bool is_cold = WHOLE == 0 ? place.is_first && half == 0
                                            : num_rows <= ROWS || (place.is_first && done == 0);
            const bool brings = !(place.is_last && (ends || WHOLE == 0));
            int64_t cold_rows = 0;
            in_tiles<ROWS>(num_rows, [&](auto r, int64_t first) {
                constexpr int R = decltype(r)::value;
                const char* a = rows + (row + first) * row_bytes + WORD * done;
                Ahead ahead;
                if (is_cold && first == 0) {
                    if (WHOLE < 2 && R >= NEAR_ROWS)
                        ahead = {(const char*)b + NEAR, LINE_OF_WORDS};
                    cold_rows = R;
                } else if (brings) {
                    // Each tile brings its share of the words behind these into the cache, so that
                    // memory and arithmetic are busy at once.
                    const int64_t sharing = num_rows - cold_rows, part = size * LINE_OF_WORDS;
                    const int64_t from = line * size * (first - cold_rows) / sharing;
                    const uint32_t* panel = behind + from / part * depth * PANEL;
                    ahead = {(const char*)panel + from % part, ceil_div(line * R, sharing)};
                }
                block<R, V>(a, row_bytes, size, b, depth * PANEL, sums + first * columns.stride,
                            columns.stride, done > 0, ahead);
            });
        }
    }
};

template <class T, class V>
inline void put_vector(T* to, V x, int64_t room) {
    if (room >= NATIVE)
        store(to, x);
    else if (room > 0)
        std::memcpy(to, &x, room * sizeof(T));
}

// Calls with the flag as a constant.
template <class Call>
inline void decided(bool flag, Call call) {
    if (flag)
        call(std::true_type{});
    else
        call(std::false_type{});
}

// Rounds sums of some columns into the result, row by row: it may be far from one to the next.
inline void put(const Target& target, int64_t row, int64_t num_rows, Columns columns,
                const float* sums, const float* others) {
    const int64_t width = target.gate ? target.num_columns / 2 : target.num_columns;
    const int64_t first = columns.first * LANES;
    const int64_t count = std::min(columns.count * LANES, width - first);
    const bool is_silu = target.gate == SILU;
    const float* bias = target.bias ? target.bias + first : nullptr;
    const Columns behind = columns.from(ceil_div(width, LANES), columns.count);
    decided(target.gate != NO_GATE, [&](auto gated) {
        decided(target.wide, [&](auto wide) {
            decided(target.bias != nullptr, [&](auto biased) {
                using T = std::conditional_t<decltype(wide)::value, float, bf16>;
                for (int64_t i = 0; i < num_rows; i++) {
                    T* to = (T*)target.out + (row + i) * target.stride + first;
                    const int64_t here = i * columns.stride;
                    for (int64_t c = 0; c < count; c += NATIVE) {
                        f32xN x = load<f32xN>(sums + here + columns.at(c));
                        if (biased) x += load<f32xN>(bias + c);
                        if (gated) {
                            f32xN up = load<f32xN>(others + here + behind.at(c));
                            if (biased) up += load<f32xN>(bias + width + c);
                            x = (is_silu ? silu(x) : gelu_tanh(x)) * up;
                        }
                        if constexpr (wide)
                            put_vector(to + c, x, count - c);
                        else
                            put_vector(to + c, narrow(x), count - c);
                    }
                }
            });
        });
    });
}

// Calls sums(row, num_rows, columns, to, place) for whatever part of the product is needed, and puts
// it into the target. With a gate, half the columns are a whole number of vectors. A thread calls
// prepare(row, num_rows) before the sums of those rows.
//
// `most`: how many vectors of columns are taken at a time, if there are many.
template <class Prepare, class Sums>
void product(int64_t num_rows, const Target& target, int64_t most, Prepare prepare, Sums sums) {
    if (num_rows == 0) return;
    const int64_t width = target.gate ? target.num_columns / 2 : target.num_columns;
    const int64_t num_vectors = ceil_div(width, LANES);
    const int64_t threads = omp_get_max_threads();
    const int64_t row_blocks = ceil_div(num_rows, ROW_BLOCK);
    const int64_t row_parts = std::min(row_blocks, ceil_div(16 * threads * STEP, num_vectors));
    const int64_t part_rows = ceil_div(row_blocks, row_parts) * ROW_BLOCK;
    // Few columns and many threads: a thread takes less than a step. So it does where the half that
    // is multiplied with the gate begins within a panel: vectors of a strip lie in one.
    const bool is_aligned = !target.gate || num_vectors % PANEL_VECTORS == 0;
    const int64_t each = num_vectors * row_parts / threads;
    const int64_t step = !is_aligned || each < 2 * STEP ? 1 : each < 2 * most ? STEP : most;
    const int64_t stride = step * LANES;
    const int64_t steps = ceil_div(num_vectors, step);
    const int64_t together = std::clamp<int64_t>(steps * row_parts / (32 * threads), 1, GROUP);
    const int64_t group = num_rows > ROW_BLOCK ? together * step : step;
    const int64_t num_groups = ceil_div(num_vectors, group);
    share_out(num_groups * row_parts, 1, [&](int64_t task, Place among) {
        const int64_t begin = task % num_groups * group;
        const int64_t end = std::min(num_vectors, begin + group);
        const int64_t first_row = task / num_groups * part_rows;
        const int64_t end_row = std::min(num_rows, first_row + part_rows);
        alignas(64) float own[MOST_SUMS];
        alignas(64) float others[MOST_SUMS];
        for (int64_t row = first_row; row < end_row; row += ROW_BLOCK) {
            const int64_t size = std::min(ROW_BLOCK, end_row - row);
            prepare(row, size);
            for (int64_t vector = begin; vector < end; vector += step) {
                const Columns columns{vector, std::min(step, end - vector), stride};
                // What lies behind a group is brought by the last rows, the rest by the first.
                const bool is_last_step = vector + columns.count == end;
                const bool brings = is_last_step ? row + size == end_row && end < num_vectors &&
                                                       !among.is_last
                                                 : row == first_row;
                const Place place{among.is_first && vector == begin && row == first_row, !brings};
                sums(row, size, columns, own, place);
                if (target.gate)
                    sums(row, size, columns.from(num_vectors, columns.count), others, place);
                put(target, row, size, columns, own, others);
            }
        }
    });
}

// How many vectors of columns are taken at a time.
template <class Words>
inline int64_t step_of(int64_t num_rows) {
    return Words::FEW_ROWS > 0 && num_rows <= FEW ? 2 * STEP : STEP;
}

// Rows of weights that lie one below the other, in several pieces of memory.
struct Rows {
    const uint32_t* const* pieces;
    const int64_t* counts;  // of rows, in each piece
    int64_t num_pieces;
    int64_t depth;  // words of a row

    int64_t count() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < num_pieces; i++) sum += counts[i];
        return sum;
    }

    // Null: there is no such row.
    const uint32_t* at(int64_t row) const {
        for (int64_t i = 0; i < num_pieces; row -= counts[i++])
            if (row < counts[i]) return pieces[i] + row * depth;
        return nullptr;
    }
};

#if defined(__AVX512F__)
// LANES words of each of LANES rows, which may be null for zeros, to LANES words of each column.
// Interleaving the halves of a list of rows four times transposes it.
inline void transpose(const uint32_t* const* rows, int64_t k, uint32_t* to) {
    const __m512i low =
        _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512i lines[LANES], next[LANES];
    for (int i = 0; i < LANES; i++)
        lines[i] = rows[i] ? _mm512_loadu_si512(rows[i] + k) : _mm512_setzero_si512();
    for (int turn = 0; turn < 4; turn++) {
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = _mm512_permutex2var_epi32(lines[i], low, lines[i + LANES / 2]);
            next[2 * i + 1] = _mm512_permutex2var_epi32(lines[i], high, lines[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) lines[i] = next[i];
    }
    for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * PANEL, lines[i]);
}
#else
inline void transpose(const uint32_t* const* rows, int64_t k, uint32_t* to) {
    for (int column = 0; column < LANES; column++)
        for (int i = 0; i < LANES; i++)
            to[i * PANEL + column] = rows[column] ? rows[column][k + i] : 0;
}
#endif

// Rows of words, which are columns of the product, into panels; columns beyond them are zeros.
// `sums`: what each column's bytes, with their signs, add up to; null: not wanted.
inline void pack(const Rows& rows, uint32_t* panels, int32_t* sums) {
    const int64_t count = ceil_div(rows.count(), PANEL), depth = rows.depth;
    share_out(count, 1, [&](int64_t panel) {
        uint32_t* to = panels + panel * depth * PANEL;
        const uint32_t* from[PANEL];
        for (int64_t column = 0; column < PANEL; column++)
            from[column] = rows.at(panel * PANEL + column);
        const int64_t whole = depth / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)
            for (int64_t column = 0; column < PANEL; column += LANES)
                transpose(from + column, k, to + k * PANEL + column);
        for (int64_t k = whole; k < depth; k++)
            for (int64_t column = 0; column < PANEL; column++)
                to[k * PANEL + column] = from[column] ? from[column][k] : 0;
        for (int64_t column = 0; sums && column < PANEL; column += NATIVE) {
            i32xN sum{};
            for (int64_t k = 0; k < depth; k++)
                sum = dot_fours(sum, u32xN{} + 0x01010101u, load<i32xN>(to + k * PANEL + column));
            store(sums + panel * PANEL + column, sum);
        }
    });
}

}  // namespace
