// Linear layers over packed weights: columns in panels of 64, and in a panel the words of 64
// columns one after another for each word of a row: (N / 64, words of a row, 64).
//
// A weight is read once from memory however many rows there are, for a panel stays in a core's
// cache while all rows pass. Every sum runs over the inputs in one order, whatever the number of
// rows or threads.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL = 64;
constexpr int64_t ROW_BLOCK = 96;
constexpr int64_t DEPTH_BLOCK = 1024;  // words of a panel that stay in a core's second cache

enum Gate : int64_t { NO_GATE = 0, SILU = 1, GELU_TANH = 2 };

// Where the rows of the result go, and what is done to them on the way.
struct Target {
    bf16* out;
    int64_t stride;
    int64_t num_columns;  // of the weight; with a gate twice those of `out`
    const float* bias;    // null: none
    Gate gate;
};

// Packed weights, with the rows that they are multiplied with.
template <class Words>
struct Factors {
    const char* rows;
    int64_t row_bytes;
    const uint32_t* panels;
    int64_t depth;  // words of a row

    // Rows times some vectors of columns of a panel: (num_rows, 64) sums.
    void multiply(int64_t row, int64_t num_rows, int64_t panel, int64_t vector, int64_t vectors,
                  typename Words::Sum* sums, bool more) const {
        for (int64_t done = 0; done < depth; done += DEPTH_BLOCK) {
            const int64_t part = std::min(DEPTH_BLOCK, depth - done);
            const uint32_t* words = panels + (panel * depth + done) * PANEL + vector * LANES;
            // What comes next is fetched while tiles after the first find this in the cache.
            const uint32_t* after = done + part < depth || more ? words + part * PANEL : nullptr;
            in_tiles(num_rows, [&](auto r, int64_t first) {
                constexpr int R = decltype(r)::value;
                const char* a = rows + (row + first) * row_bytes + 4 * done;
                typename Words::Sum* c = sums + first * PANEL + vector * LANES;
                const bool second = first && first <= TILE_ROWS;
                for (int64_t v = 0; v < vectors;) {
                    const uint32_t* b = words + v * LANES;
                    if (vectors - v >= TILE_VECTORS) {
                        const char* next = second ? (const char*)after : nullptr;
                        strip<R, TILE_VECTORS>(a, b, part, c + v * LANES, done > 0, next);
                        v += TILE_VECTORS;
                    } else {
                        strip<R, 1>(a, b, part, c + v * LANES, done > 0, nullptr);
                        v += 1;
                    }
                }
            });
        }
    }

    template <int R, int V>
    void strip(const char* a, const uint32_t* words, int64_t depth, typename Words::Sum* c,
               bool add, const char* next) const {
        const auto part = [&](int64_t, int j) { return words + j * LANES; };
        tile<Words, R, V>(a, row_bytes, 1, depth, part, PANEL, c, PANEL, add, next);
    }
};

// Rounds some vectors of sums, (num_rows, 64) at a panel's columns, into the result.
inline void put(const Target& target, int64_t row, int64_t num_rows, int64_t column,
                const float* sums, const float* others, int64_t vector, int64_t vectors) {
    const int64_t width = target.gate ? target.num_columns / 2 : target.num_columns;
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t v = vector; v < vector + vectors; v++) {
            const int64_t at = column + v * LANES;
            if (at >= width) break;
            f32x16 x = load<f32x16>(sums + i * PANEL + v * LANES);
            if (target.bias) x += load<f32x16>(target.bias + at);
            if (target.gate) {
                f32x16 up = load<f32x16>(others + i * PANEL + v * LANES);
                if (target.bias) up += load<f32x16>(target.bias + width + at);
                x = (target.gate == SILU ? silu(x) : gelu_tanh(x)) * up;
            }
            const u16x16 y = narrow(x);
            bf16* to = target.out + (row + i) * target.stride + at;
            std::memcpy(to, &y, std::min<int64_t>(LANES, width - at) * sizeof(bf16));
        }
}

// Calls sums(row, num_rows, panel, vector, vectors, to, more) for whatever part of the product is
// needed, and puts it into the target.
template <class Sums>
void product(int64_t num_rows, const Target& target, Sums sums) {
    const int64_t width = target.gate ? target.num_columns / 2 : target.num_columns;
    const int64_t num_panels = ceil_div(width, PANEL);
    const int64_t threads = omp_get_max_threads();
    const int64_t row_blocks = ceil_div(num_rows, ROW_BLOCK);
    const int64_t row_parts = std::min(row_blocks, ceil_div(4 * threads, num_panels));
    // Few panels and many threads: each takes some of a panel's vectors of columns.
    const int64_t panel_parts = num_panels * row_parts >= 2 * threads ? 1 : PANEL / LANES;
    const int64_t vectors = PANEL / LANES / panel_parts;
    const int64_t blocks_per_part = ceil_div(row_blocks, row_parts);
    const int64_t count = num_panels * row_parts * panel_parts;
    share_out(count, chunk_of(count), [&](int64_t task, bool more) {
        const int64_t vector = task % panel_parts * vectors;
        const int64_t panel = task / panel_parts % num_panels;
        const int64_t part = task / panel_parts / num_panels;
        alignas(64) float first[ROW_BLOCK * PANEL];
        alignas(64) float second[ROW_BLOCK * PANEL];
        const int64_t end = std::min(num_rows, (part + 1) * blocks_per_part * ROW_BLOCK);
        for (int64_t row = part * blocks_per_part * ROW_BLOCK; row < end; row += ROW_BLOCK) {
            const int64_t size = std::min(ROW_BLOCK, end - row);
            const bool goes_on = more && panel + 1 < num_panels;
            sums(row, size, panel, vector, vectors, first, goes_on);
            if (target.gate) sums(row, size, num_panels + panel, vector, vectors, second, goes_on);
            put(target, row, size, panel * PANEL, first, second, vector, vectors);
        }
    });
}

inline void bf16_linear(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                        const uint32_t* panels, const Target& target) {
    const Factors<Pairs> factors{(const char*)x, x_stride * 2, panels, num_inputs / 2};
    product(num_rows, target,
            [&](int64_t row, int64_t size, int64_t panel, int64_t vector, int64_t vectors,
                float* to, bool more) {
                factors.multiply(row, size, panel, vector, vectors, to, more);
            });
}

// Bytes for rows that were quantized: codes + 128, and a scale per row.
struct Quantized {
    const uint8_t* codes;  // (rows, inputs rounded up to fours)
    const float* scales;
};

// Packed codes with, for each column, its scale and 128 times the sum of its codes.
struct Int8Weight {
    const uint32_t* panels;
    const float* scales;
    const int32_t* offsets;
    int64_t num_inputs;
};

inline void int8_linear(const Quantized& x, int64_t num_rows, const Int8Weight& weight,
                        const Target& target) {
    const int64_t depth = ceil_div(weight.num_inputs, 4);
    const Factors<Fours> factors{(const char*)x.codes, depth * 4, weight.panels, depth};
    product(num_rows, target,
            [&](int64_t row, int64_t size, int64_t panel, int64_t vector, int64_t vectors,
                float* to, bool more) {
                int32_t* exact = reinterpret_cast<int32_t*>(to);
                factors.multiply(row, size, panel, vector, vectors, exact, more);
                for (int64_t i = 0; i < size; i++)
                    for (int64_t v = vector; v < vector + vectors; v++) {
                        const int64_t at = panel * PANEL + v * LANES;
                        const i32x16 shifted = load<i32x16>(exact + i * PANEL + v * LANES);
                        const i32x16 sum = shifted - load<i32x16>(weight.offsets + at);
                        const f32x16 scaled = __builtin_convertvector(sum, f32x16) * x.scales[row + i];
                        store(to + i * PANEL + v * LANES, scaled * load<f32x16>(weight.scales + at));
                    }
            });
}

// One row's codes and scale (Yao et al., ZeroQuant, 2022, section 3): x / scale to the nearest,
// half to even, where the largest is 127. A scale that is not a number makes all of its row's
// results so.
inline void quantize_row(const bf16* x, int64_t num_inputs, uint8_t* codes, float* scale) {
    f32x16 most = all(0.f), wrong = all(0.f);
    const auto look = [&](f32x16 wide) {
        most = larger(wide < 0.f ? -wide : wide, most);
        wrong += wide - wide;  // 0, unless infinite or not a number
    };
    const auto encoded = [&](f32x16 wide) {
        const f32x16 magic = all(12582912.f);  // adding 1.5 * 2^23 rounds to an integer
        const f32x16 code = (wide / *scale + magic) - magic;
        return __builtin_convertvector(__builtin_convertvector(code, i32x16) + 128, u8x16);
    };
    const int64_t whole = num_inputs / LANES * LANES;
    bf16 rest[LANES] = {};
    std::memcpy(rest, x + whole, (num_inputs - whole) * sizeof(bf16));
    for (int64_t i = 0; i < whole; i += LANES) look(load_wide(x + i));
    look(load_wide(rest));
    const float peak = largest(most);
    *scale = peak > 0 ? peak / 127.f : 1.f;
    for (int64_t i = 0; i < whole; i += LANES) store(codes + i, encoded(load_wide(x + i)));
    uint8_t last[LANES];
    store(last, encoded(load_wide(rest)));
    std::memcpy(codes + whole, last, (ceil_div(num_inputs, 4) * 4 - whole));
    if (sum(wrong) != 0.f) *scale = NAN;
}

// Words of a weight (num_columns, words of a row) into panels; columns beyond its own are zeros.
inline void pack(const uint32_t* words, int64_t num_columns, int64_t depth, uint32_t* panels) {
    const int64_t count = ceil_div(num_columns, PANEL);
    share_out(count, chunk_of(count), [&](int64_t panel, bool) {
        uint32_t* to = panels + panel * depth * PANEL;
        const int64_t size = std::min(PANEL, num_columns - panel * PANEL);
        constexpr int64_t STRIP = 16;  // words of each column that are in the cache at a time
        for (int64_t k0 = 0; k0 < depth; k0 += STRIP)
            for (int64_t column = 0; column < PANEL; column++) {
                const uint32_t* from = words + (panel * PANEL + column) * depth;
                for (int64_t k = k0; k < std::min(k0 + STRIP, depth); k++)
                    to[k * PANEL + column] = column < size ? from[k] : 0;
            }
    });
}

}  // namespace
