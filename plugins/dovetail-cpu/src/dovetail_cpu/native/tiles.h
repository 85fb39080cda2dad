// Matrix products of a few rows with a panel of columns, in registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// Products of matrices by whatever the processor has for them (AMX), as torch offers it: ``brgemm``
// in ATen/native/CPUBlas.h. (M, K) x (K, N) into C, or added to it; B in words of columns.
template <class A, class B, class C>
using MatrixProduct = void (*)(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
                               int64_t c_stride, bool add, const A* a, const B* b, C* c,
                               bool in_words);

// From `least_rows` rows on, products are left to these. Null: never.
template <class Words>
struct Matrices {
    static inline typename Words::Product product = nullptr;
    static inline int64_t least_rows = 0;
    static inline void (*release)(bool in_words) = nullptr;  // of a thread's tiles
};

// Words of two bf16 each, and sums in float32.
struct Pairs {
    using A = bf16;
    using B = bf16;
    using Sums = f32x16;
    using Sum = float;
    using Product = MatrixProduct<A, B, Sum>;
    static constexpr int PER_WORD = 2;
    static Sums dot(Sums c, u32x16 a, u32x16 b) { return dot_pairs(c, a, b); }
};

// Words of four bytes each, those of A without sign, and exact sums.
struct Fours {
    using A = uint8_t;
    using B = int8_t;
    using Sums = i32x16;
    using Sum = int32_t;
    using Product = MatrixProduct<A, B, Sum>;
    static constexpr int PER_WORD = 4;
    static Sums dot(Sums c, u32x16 a, u32x16 b) { return dot_fours(c, a, bits<i32x16>(b)); }
};

// Memory that will be read soon, and how much of it for each word of A; null: none.
struct Ahead {
    const char* next = nullptr;
    int64_t pace = 0;

    void bring() {
        if (!next) return;
        prefetch(next);
        prefetch(next + LINE);
        next += pace;
    }
};

// R rows of A times V vectors of columns of B into C, which is written or added to.
//
// A is rows of words; B has, for each word of a row of A, a word for every column. B may lie in
// parts, `depth` words of A to each: `part(p, j)` is where in part p the vectors j to j + TOGETHER
// begin, and `stride` the words of B from one word of A to the next. For each word of A, two lines
// of memory are brought ahead.
template <class Words, int R, int V, int TOGETHER, class Part, class Coming>
inline void tile(const char* a, int64_t a_bytes, int64_t parts, int64_t depth, Part part,
                 int64_t stride, typename Words::Sum* c, int64_t c_stride, bool add,
                 Coming coming) {
    using Sums = typename Words::Sums;
    constexpr int RUNS = V / TOGETHER;
    // An address is a base and up to twice the stride: there are too few registers for one each.
    constexpr int BASES = (R + 2) / 3;
    Sums sums[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++)
            sums[i][j] = add ? load<Sums>(c + i * c_stride + j * LANES) : Sums{};
    const char* base[BASES];
    for (int i = 0; i < BASES; i++) base[i] = a + 3 * i * a_bytes;
    for (int64_t p = 0; p < parts; p++) {
        const uint32_t* b[RUNS];
        for (int j = 0; j < RUNS; j++) b[j] = part(p, j * TOGETHER);
        for (int64_t k = 0; k < depth; k++) {
            u32x16 columns[V];
            for (int j = 0; j < V; j++)
                columns[j] = load<u32x16>(b[j / TOGETHER] + j % TOGETHER * LANES);
            coming.bring();
            for (int i = 0; i < R; i++) {
                const uint32_t word = load<uint32_t>(base[i / 3] + i % 3 * a_bytes);
                const u32x16 words = word - u32x16{};
                for (int j = 0; j < V; j++) sums[i][j] = Words::dot(sums[i][j], words, columns[j]);
            }
            for (int j = 0; j < RUNS; j++) b[j] += stride;
            for (int i = 0; i < BASES; i++) base[i] += 4;
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) store(c + i * c_stride + j * LANES, sums[i][j]);
}

// Calls work(size) with the size as a constant, which is between R and MOST.
template <int R, int MOST, class Work>
inline void one_of(int64_t size, Work work) {
    if constexpr (R < MOST) {
        if (size > R) return one_of<R + 1, MOST>(size, work);
    }
    work(std::integral_constant<int, R>{});
}

// Calls work(R, row) for all rows, in tiles of at most MOST rows whose sizes differ by one.
template <int MOST, class Work>
inline void in_tiles(int64_t num_rows, Work work) {
    const int64_t count = (num_rows + MOST - 1) / MOST;
    int64_t row = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t size = (num_rows - row + count - i - 1) / (count - i);
        one_of<1, MOST>(size, [&](auto r) { work(r, row); });
        row += size;
    }
}

}  // namespace
