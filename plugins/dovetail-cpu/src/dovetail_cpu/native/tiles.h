// Matrix products of a few rows with a panel of columns, in registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// Words of two bf16 each, and sums in float32.
struct Pairs {
    using Sums = f32x16;
    using Sum = float;
    static constexpr int PER_WORD = 2;
    static Sums dot(Sums c, u32x16 a, u32x16 b) { return dot_pairs(c, a, b); }
};

// Words of four bytes each, those of A without sign, and exact sums.
struct Fours {
    using Sums = i32x16;
    using Sum = int32_t;
    static constexpr int PER_WORD = 4;
    static Sums dot(Sums c, u32x16 a, u32x16 b) { return dot_fours(c, a, bits<i32x16>(b)); }
};

// R rows of A times V vectors of columns of B into C, which is written or added to.
//
// A is rows of words; B has, for each word of a row of A, a word for every column. B may lie in
// parts, `depth` words of A to each: `part(p, j)` is where the j-th vector of columns begins in
// part p, and `stride` the words of B from one word of A to the next. `next` is what will be read
// from memory after this; null: nothing.
template <class Words, int R, int V, class Part>
inline void tile(const char* a, int64_t a_bytes, int64_t parts, int64_t depth, Part part,
                 int64_t stride, typename Words::Sum* c, int64_t c_stride, bool add,
                 const char* next = nullptr) {
    using Sums = typename Words::Sums;
    Sums sums[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++)
            sums[i][j] = add ? load<Sums>(c + i * c_stride + j * LANES) : Sums{};
    for (int64_t p = 0; p < parts; p++) {
        const uint32_t* b[V];
        for (int j = 0; j < V; j++) b[j] = part(p, j);
        for (int64_t k = 0; k < depth; k++, a += 4) {
            u32x16 columns[V];
            for (int j = 0; j < V; j++) columns[j] = load<u32x16>(b[j] + k * stride);
            if (next)
                for (int j = 0; j < V; j++) prefetch(next + (k * V + j) * sizeof(u32x16));
            for (int i = 0; i < R; i++) {
                const u32x16 word = load<uint32_t>(a + i * a_bytes) - u32x16{};
                for (int j = 0; j < V; j++) sums[i][j] = Words::dot(sums[i][j], word, columns[j]);
            }
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) store(c + i * c_stride + j * LANES, sums[i][j]);
}

// Calls work(R, row) for all rows, in tiles of at most TILE_ROWS rows whose sizes differ by one.
template <class Work>
inline void in_tiles(int64_t num_rows, Work work) {
    const int64_t count = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t row = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t size = (num_rows - row + count - i - 1) / (count - i);
        switch (size) {
            case 1: work(std::integral_constant<int, 1>{}, row); break;
            case 2: work(std::integral_constant<int, 2>{}, row); break;
            case 3: work(std::integral_constant<int, 3>{}, row); break;
            case 4: work(std::integral_constant<int, 4>{}, row); break;
#if defined(__AVX512F__)
            case 5: work(std::integral_constant<int, 5>{}, row); break;
            case 6: work(std::integral_constant<int, 6>{}, row); break;
#endif
        }
        row += size;
    }
}

}  // namespace
