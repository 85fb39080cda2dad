// Linear layers over weights of 8 and 4 bits and rows of 8 bits: sums of products of codes are exact.
#pragma once

#include "products.h"

namespace {

constexpr int64_t GROUP_INPUTS = 64;  // that share a scale, of weights in 4 bits
constexpr int64_t GROUP_WORDS = GROUP_INPUTS / 8;

// Vectors of columns that are taken at a time, by one row (STREAMED, as in tiles.h) and by more.
#if defined(__AVX512F__)
constexpr int INT4_ROWS = 5, INT4_VECTORS = 2, INT4_STREAMED = 2;
#else
constexpr int INT4_ROWS = 2, INT4_VECTORS = 1, INT4_STREAMED = 4;
#endif

// Rows in 8 bits, padded to whole words.
struct Quantized {
    const uint8_t* codes;
    const float* steps;
    const int32_t* group_sums;  // (rows, groups): of the codes; for weights in 4 bits only
};

// Packed codes with, for each column, its scale and 128 times the sum of its codes. Codes of rows
// lie 128 higher where one factor of a product of bytes has no sign.
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
    const auto scale = [&](int64_t row, int64_t size, Columns columns, float* to) {
        const int32_t* exact = reinterpret_cast<const int32_t*>(to);
        for (int64_t i = 0; i < size; i++)
            for (int64_t c = 0; c < columns.count * LANES; c += NATIVE) {
                const int64_t at = columns.first * LANES + c, here = i * columns.stride + c;
                i32xN sum = load<i32xN>(exact + here);
                if (!Fours::SIGNED) sum -= load<i32xN>(weight.offsets + at);
                const f32xN scaled = __builtin_convertvector(sum, f32xN) * x.steps[row + i];
                store(to + here, scaled * load<f32xN>(weight.scales + at));
            }
    };
    multiply_layer(factors, num_rows, target, scale);
}

// Words of eight inputs: the low halves of its bytes are the first four, the high halves the
// others, each 8 higher. Scales in panels like the words: (N / 32, groups, 32).
struct Int4Weight {
    const uint32_t* panels;
    const float* scales;
    int64_t num_inputs;
};

// Sums of products of halves of bytes with bytes that have a sign, over MOST words.
struct Eights {
#if defined(ONLY_AVX2)
    // 16 products of at most 15 * 127 each fit into 16 bits.
    static constexpr int64_t MOST = 4;
    typedef int16_t Sums __attribute__((vector_size(4 * NATIVE)));
    static Sums add(Sums c, u32xN a, i32xN b) {
        return c + bits<Sums>(_mm256_maddubs_epi16(bits<__m256i>(a), bits<__m256i>(b)));
    }
    static i32xN whole(Sums c) {
        return bits<i32xN>(_mm256_madd_epi16(bits<__m256i>(c), _mm256_set1_epi16(1)));
    }
#else
    static constexpr int64_t MOST = GROUP_WORDS;
    using Sums = i32xN;
    static Sums add(Sums c, u32xN a, i32xN b) { return dot_fours(c, a, b); }
    static i32xN whole(Sums c) { return c; }
#endif
};

// R rows times V vectors of columns, from where they begin in a panel on: sums in float32,
// (R, stride).
template <int R, int V>
inline void int4_tile(const Quantized& x, int64_t row, int64_t num_inputs, const uint32_t* words,
                      const float* scales, float* sums, int64_t stride) {
    const int64_t groups = num_inputs / GROUP_INPUTS;
    constexpr int N = V * PIECES, OF_PANEL = PANEL / NATIVE;
    f32xN totals[R][N] = {};
    for (int64_t g = 0; g < groups; g++) {
        i32xN exact[R][N] = {};
        for (int64_t done = 0; done < GROUP_WORDS; done += Eights::MOST) {
            Eights::Sums part[R][N] = {};
            for (int64_t k = done; k < done + Eights::MOST; k++, words += PANEL) {
                const uint8_t* codes = x.codes + row * num_inputs + (g * GROUP_WORDS + k) * 8;
                for (int j = 0; j < N; j++) {
                    const int64_t panel = j / OF_PANEL * (num_inputs / 8 * PANEL);
                    const u32xN both = load<u32xN>(words + panel + j % OF_PANEL * NATIVE);
                    const u32xN low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
                    for (int i = 0; i < R; i++) {
                        const int32_t first = load<int32_t>(codes + i * num_inputs);
                        const int32_t second = load<int32_t>(codes + i * num_inputs + 4);
                        part[i][j] = Eights::add(part[i][j], low, first - i32xN{});
                        part[i][j] = Eights::add(part[i][j], high, second - i32xN{});
                    }
                }
            }
            for (int i = 0; i < R; i++)
                for (int j = 0; j < N; j++) exact[i][j] += Eights::whole(part[i][j]);
        }
        for (int j = 0; j < N; j++) {
            const int64_t panel = j / OF_PANEL * groups * PANEL;
            const f32xN scale = load<f32xN>(scales + panel + g * PANEL + j % OF_PANEL * NATIVE);
            for (int i = 0; i < R; i++) {
                const i32xN sum = exact[i][j] - 8 * x.group_sums[(row + i) * groups + g];
                totals[i][j] += __builtin_convertvector(sum, f32xN) * scale;
            }
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < N; j++)
            store(sums + i * stride + j * NATIVE, totals[i][j] * x.steps[row + i]);
}

inline void int4_linear(const Quantized& x, int64_t num_rows, const Int4Weight& weight,
                        const Target& target) {
    const int64_t inputs = weight.num_inputs;
    product(num_rows, target, STEP, [](int64_t, int64_t) {},
            [&](int64_t row, int64_t size, Columns columns, float* to, Place) {
                for (int64_t v = 0; v < columns.count;) {
                    const int64_t panel = (columns.first + v) / PANEL_VECTORS;
                    const int64_t column = (columns.first + v) % PANEL_VECTORS * LANES;
                    const uint32_t* words = weight.panels + panel * inputs / 8 * PANEL + column;
                    const float* scales =
                        weight.scales + panel * inputs / GROUP_INPUTS * PANEL + column;
                    const auto strip = [&](auto wide) {
                        constexpr int V = decltype(wide)::value;
                        in_tiles<INT4_ROWS>(size, [&](auto r, int64_t first) {
                            int4_tile<decltype(r)::value, V>(
                                x, row + first, inputs, words, scales,
                                to + first * columns.stride + v * LANES, columns.stride);
                        });
                        v += V;
                    };
                    const int64_t left = columns.count - v;
                    if (size == 1 && left >= INT4_STREAMED)
                        strip(std::integral_constant<int, INT4_STREAMED>{});
                    else if (size <= FEW && left >= PANEL_VECTORS)
                        strip(std::integral_constant<int, PANEL_VECTORS>{});
                    else if (left >= INT4_VECTORS)
                        strip(std::integral_constant<int, INT4_VECTORS>{});
                    else
                        strip(std::integral_constant<int, 1>{});
                }
            });
}

// Where rows in 8 bits go.
struct Codes {
    uint8_t* codes;
    float* steps;
    int32_t* group_sums;  // null: codes are for products with weights in 8 bits
};

// One row's codes and step (Yao et al., ZeroQuant, 2022, section 3): x / step to the nearest, half
// to even, where the largest is 127. A step that is not a number makes all of its row's results so.
template <class Load>
inline void quantize_row(int64_t num_inputs, Load at, uint8_t* codes, float* step, int32_t* sums) {
    f32xN most = all(0.f), wrong = all(0.f);
    for (int64_t i = 0; i < num_inputs; i += NATIVE) {
        const f32xN x = at(i);
        most = larger(x < 0.f ? -x : x, most);
        wrong += x - x;  // 0, unless infinite or not a number
    }
    const float ideal = largest(most) / 127.f;
    const float divisor = ideal < std::numeric_limits<float>::min() ? 1.f : ideal;
    const int32_t higher = sums || Fours::SIGNED ? 0 : 128;
    for (int64_t i = 0; i < num_inputs; i += NATIVE) {
        const f32xN magic = all(12582912.f);  // adding 1.5 * 2^23 rounds to an integer
        const f32xN code = (at(i) / divisor + magic) - magic;
        const i32xN whole = __builtin_convertvector(code, i32xN);
        const u8xN bytes = __builtin_convertvector(whole + higher, u8xN);
        std::memcpy(codes + i, &bytes, std::min<int64_t>(NATIVE, ceil_div(num_inputs - i, 4) * 4));
        if (!sums) continue;
        if (i % GROUP_INPUTS == 0) sums[i / GROUP_INPUTS] = 0;
        for (int lane = 0; lane < NATIVE; lane++) sums[i / GROUP_INPUTS] += whole[lane];
    }
    *step = sum(wrong) == 0.f ? divisor : NAN;
}

template <class T>
inline void quantize(const T* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                     const Codes& to) {
    const int64_t bytes = ceil_div(num_inputs, 4) * 4, groups = num_inputs / GROUP_INPUTS;
    share_out(num_rows, rows_at_once(num_inputs), [&](int64_t row) {
        const T* from = x + row * x_stride;
        const auto at = [&](int64_t i) {
            T rest[NATIVE] = {};
            const T* here = from + i;
            if (num_inputs - i < NATIVE)
                here = (const T*)std::memcpy(rest, here, (num_inputs - i) * sizeof(T));
            if constexpr (sizeof(T) == sizeof(bf16))
                return load_wide(here);
            else
                return load<f32xN>(here);
        };
        quantize_row(num_inputs, at, to.codes + row * bytes, to.steps + row,
                     to.group_sums ? to.group_sums + row * groups : nullptr);
    });
}

}  // namespace
