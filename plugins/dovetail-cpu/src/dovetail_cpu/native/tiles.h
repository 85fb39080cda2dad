// Matrix products of a few rows with a panel of columns, in registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// A kind of word: how rows of them are kept as first factors (A), and what one of them adds to the
// sums of R rows and N vectors of columns. `row(i)` is the address of the word of a row, `column(j)`
// of the words of a vector of columns. Up to FEW_ROWS rows are multiplied in tiles of FEW x
// FEW_VECTORS (of LANES), MANY_ROWS and more in WIDE_ROWS x WIDE_VECTORS, others in ROWS x VECTORS.
// One row, and up to FEW rows, wait for memory alone: they take STREAMED and STREAMED_FEW vectors, so
// that several panels are read side by side. A processor reads several streams faster than one.
constexpr int FEW = 2, FEW_VECTORS = 2;

// What a word adds, for words that are multiplied as they are: by `dot` of their kind.
template <class Words, int R, int N, class Sums, class Row, class Column>
inline void add_dots(Sums (&sums)[R][N], Row row, Column column) {
    u32xN columns[N];
    for (int j = 0; j < N; j++) columns[j] = load<u32xN>(column(j));
    for (int i = 0; i < R; i++) {
        const u32xN words = load<uint32_t>(row(i)) - u32xN{};
        for (int j = 0; j < N; j++) sums[i][j] = Words::dot(sums[i][j], words, columns[j]);
    }
}

// Words of two bf16 each, and sums in float32.
struct Pairs {
    using Sums = f32xN;
    using Sum = float;
#if defined(__AVX512F__)
    using A = bf16;
    static constexpr int ROWS = 12, VECTORS = 2, WIDE_ROWS = 6, WIDE_VECTORS = 4;
    static constexpr int FEW_ROWS = 0;

    template <int R, int N, class Row, class Column>
    static void add(Sums (&sums)[R][N], Row row, Column column) {
        add_dots<Pairs>(sums, row, column);
    }

    static f32xN dot(f32xN c, u32xN a, u32xN b) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(c, bits<__m512bh>(a), bits<__m512bh>(b));
#else
        c += bits<f32xN>(a << 16) * bits<f32xN>(b << 16);
        return c + bits<f32xN>(a & 0xffff0000u) * bits<f32xN>(b & 0xffff0000u);
#endif
    }

    static void take(const bf16* from, int64_t size, A* to) {
        std::memcpy(to, from, size * sizeof(bf16));
    }
    static void put(A* to, f32xN x) { store(to, narrow(x)); }
    static float value(A x) { return widen(x); }
#else
    // Without an instruction for pairs, rows are kept in float32: to widen them costs nothing then
    // in the loop, where each is read for all columns.
    using A = float;
#if defined(ONLY_AVX2)
    static constexpr int ROWS = 6;
#else
    static constexpr int ROWS = 4;
#endif
    static constexpr int FEW_ROWS = 4, STREAMED = 8, STREAMED_FEW = 4;
    static constexpr int VECTORS = 1, WIDE_ROWS = ROWS, WIDE_VECTORS = VECTORS;

    template <int R, int N, class Row, class Column>
    static void add(Sums (&sums)[R][N], Row row, Column column) {
        half<0>(sums, row, column);
        half<1>(sums, row, column);
    }

    // The first or the second of each pair.
    template <int WHICH, int R, int N, class Row, class Column>
    static void half(Sums (&sums)[R][N], Row row, Column column) {
        const auto entry = [&](int i) { return load<float>(row(i) + WHICH * sizeof(A)) - f32xN{}; };
        const auto entries = [&](int j) {
            const u32xN words = load<u32xN>(column(j));
            return bits<f32xN>(WHICH ? words & 0xffff0000u : words << 16);
        };
        if constexpr (R < N) {
            f32xN x[R];
            for (int i = 0; i < R; i++) x[i] = entry(i);
            for (int j = 0; j < N; j++) {
                const f32xN y = entries(j);
                for (int i = 0; i < R; i++) sums[i][j] += x[i] * y;
            }
        } else {
            f32xN y[N];
            for (int j = 0; j < N; j++) y[j] = entries(j);
            for (int i = 0; i < R; i++) {
                const f32xN x = entry(i);
                for (int j = 0; j < N; j++) sums[i][j] += x * y[j];
            }
        }
    }

    static void take(const bf16* from, int64_t size, A* to) {
        int64_t i = 0;
        for (; i + NATIVE <= size; i += NATIVE) store(to + i, load_wide(from + i));
        for (; i < size; i++) to[i] = widen(from[i]);
    }
    static void put(A* to, f32xN x) { store(to, rounded(x)); }
    static float value(A x) { return x; }
#endif
    static constexpr int PER_WORD = 2;
};

// Words of four bytes each, and exact sums.
struct Fours {
    using A = uint8_t;
    using Sums = i32xN;
    using Sum = int32_t;
    static constexpr int PER_WORD = 4;
#if defined(__AVX512F__)
    static constexpr int ROWS = 12, VECTORS = 2, WIDE_ROWS = 6, WIDE_VECTORS = 4;
    static constexpr int FEW_ROWS = 0;
#else
    static constexpr int ROWS = 4, VECTORS = 1, WIDE_ROWS = ROWS, WIDE_VECTORS = VECTORS;
    static constexpr int FEW_ROWS = 12, STREAMED = 8, STREAMED_FEW = 8;
#endif
    // Bytes of A have signs; otherwise each lies 128 higher.
#if defined(ONLY_AVX2)
    static constexpr bool SIGNED = true;
#else
    static constexpr bool SIGNED = false;
#endif

    template <int R, int N, class Row, class Column>
    static void add(Sums (&sums)[R][N], Row row, Column column) {
        add_dots<Fours>(sums, row, column);
    }

    static i32xN dot(i32xN c, u32xN a, u32xN b) {
#if defined(ONLY_AVX2)
        // Sums of two products are kept in 16 bits, which these fit with signs only.
        const __m256i x = bits<__m256i>(a), y = bits<__m256i>(b);
        return dot_fours(c, bits<u32xN>(_mm256_abs_epi8(y)),
                         bits<i32xN>(_mm256_sign_epi8(x, y)));
#else
        return dot_fours(c, a, bits<i32xN>(b));
#endif
    }
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
// A is rows of words, the entries of each one after another; B has, for each word of a row of A, a
// word for every column. B may lie in parts, `depth` words of A to each: `part(p, j)` is where in
// part p the vectors j to j + TOGETHER begin, and `stride` the words of B from one word of A to the
// next. For each word of A, two lines of memory are brought ahead.
template <class Words, int R, int V, int TOGETHER, class Part, class Coming>
inline void tile(const char* a, int64_t a_bytes, int64_t parts, int64_t depth, Part part,
                 int64_t stride, typename Words::Sum* c, int64_t c_stride, bool add,
                 Coming coming) {
    using Sums = typename Words::Sums;
    constexpr int N = V * PIECES, RUNS = V / TOGETHER;
    constexpr int WORD = Words::PER_WORD * sizeof(typename Words::A);
    // An address is a base and up to twice the stride: there are too few registers for one each.
    constexpr int BASES = (R + 2) / 3;
    Sums sums[R][N];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < N; j++)
            sums[i][j] = add ? load<Sums>(c + i * c_stride + j * NATIVE) : Sums{};
    const char* base[BASES];
    for (int i = 0; i < BASES; i++) base[i] = a + 3 * i * a_bytes;
    for (int64_t p = 0; p < parts; p++) {
        const uint32_t* b[RUNS];
        for (int j = 0; j < RUNS; j++) b[j] = part(p, j * TOGETHER);
        for (int64_t k = 0; k < depth; k++) {
            coming.bring();
            Words::add(
                sums, [&](int i) { return base[i / 3] + i % 3 * a_bytes; },
                [&](int j) {
                    const int vector = j / PIECES;
                    return b[vector / TOGETHER] + vector % TOGETHER * LANES + j % PIECES * NATIVE;
                });
            for (int j = 0; j < RUNS; j++) b[j] += stride;
            for (int i = 0; i < BASES; i++) base[i] += WORD;
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < N; j++) store(c + i * c_stride + j * NATIVE, sums[i][j]);
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
