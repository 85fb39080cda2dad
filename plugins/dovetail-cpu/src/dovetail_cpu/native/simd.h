// Vectors of the machine's own size, in GNU vector extensions, and the few operations for which
// instruction sets have instructions of their own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define ONLY_AVX2
#endif

namespace {

// Columns and positions lie in runs of this many, whatever the machine.
constexpr int LANES = 16;

// Lanes of a register. A longer vector would be split by the compiler, and kept in memory.
#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(ONLY_AVX2)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif

constexpr int PIECES = LANES / NATIVE;

constexpr float NEVER = -std::numeric_limits<float>::infinity();  // a score that nothing has

using bf16 = uint16_t;
typedef float f32xN __attribute__((vector_size(4 * NATIVE)));
typedef int32_t i32xN __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t u32xN __attribute__((vector_size(4 * NATIVE)));
typedef uint16_t u16xN __attribute__((vector_size(2 * NATIVE)));
typedef uint8_t u8xN __attribute__((vector_size(NATIVE)));

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline f32xN all(float x) { return x - f32xN{}; }

inline f32xN widen(u16xN x) {
    return bits<f32xN>(__builtin_convertvector(x, u32xN) << 16);
}

inline float widen(bf16 x) { return bits<float>(uint32_t(x) << 16); }

// To the nearest bf16, half to even; what is not a number stays so.
#if defined(__AVX512BF16__)
inline u16xN narrow(f32xN x) { return bits<u16xN>(_mm512_cvtneps_pbh(x)); }

inline f32xN rounded(f32xN x) { return widen(narrow(x)); }
#else
inline f32xN rounded(f32xN x) {
    const u32xN raw = bits<u32xN>(x);
    const u32xN near = raw + 0x7fffu + ((raw >> 16) & 1u);
    return bits<f32xN>((x == x ? near : raw | 0x400000u) & 0xffff0000u);
}

inline u16xN narrow(f32xN x) {
    return __builtin_convertvector(bits<u32xN>(rounded(x)) >> 16, u16xN);
}
#endif

inline bf16 narrow(float x) {
    const uint32_t raw = bits<uint32_t>(x);
    if (x != x) return bf16(raw >> 16 | 0x40);
    return bf16((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}

inline f32xN load_wide(const bf16* from) { return widen(load<u16xN>(from)); }

inline f32xN larger(f32xN a, f32xN b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline float sum(f32xN v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float s[NATIVE];
    store(s, v);
    for (int half = NATIVE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

inline float largest(f32xN v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float s[NATIVE];
    store(s, v);
    for (int half = NATIVE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
    return s[0];
#endif
}

// e to the power of x within 2 units in the last place (Cody and Waite, 1980): x = n ln 2 + r.
inline f32xN exponential(f32xN x) {
    x = x < -87.3f ? all(-87.3f) : x;
    x = x > 88.3f ? all(88.3f) : x;
    const f32xN magic = all(12582912.f);  // adding 1.5 * 2^23 rounds to an integer
    const f32xN n = (x * 1.44269504f + magic) - magic;
    const f32xN r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32xN p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const i32xN power = (__builtin_convertvector(n, i32xN) + 127) << 23;
    return p * bits<f32xN>(power);
}

// 2 to the power of r within 3e-6 of it, for r within -0.5..0.5.
inline f32xN rough_fraction(f32xN r) {
    f32xN p = r * 9.58277e-3f + 5.590636e-2f;
    p = p * r + 2.40241e-1f;
    p = p * r + 6.931242e-1f;
    return p * r + 1.f;
}

// 2 to the power of x as exactly as that, for what is rounded to bf16; x is at most 126, and
// below -126 the result is rough or 0.
inline f32xN rough_power_of_two(f32xN x) {
#if defined(__AVX512F__)
    x = _mm512_min_ps(all(126.f), x);
    const f32xN n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(rough_fraction(x - n), n);
#else
    x = x < -126.f ? all(-126.f) : x;
    x = x > 126.f ? all(126.f) : x;
    const f32xN magic = all(12582912.f);
    const f32xN shifted = x + magic;
    const f32xN p = rough_fraction(x - (shifted - magic));
    const f32xN power = bits<f32xN>(bits<i32xN>(p) + (bits<i32xN>(shifted) << 23));
    return x == x ? power : x;
#endif
}

inline f32xN hyperbolic_tangent(f32xN x) {
    const f32xN e = exponential(x * 2.f);
    return 1.f - 2.f / (e + 1.f);
}

inline f32xN reciprocal(f32xN x) {
#if defined(__AVX512F__)
    const f32xN rough = _mm512_rcp14_ps(x);
    return rough * (2.f - x * rough);
#else
    return 1.f / x;
#endif
}

inline f32xN silu(f32xN x) {
    return x * reciprocal(1.f + rough_power_of_two(x * -1.44269504f));
}

// cap * tanh(x / cap) (Gemma Team, 2024). Near 0, where 1 is a bad start, by the series.
inline f32xN soft_cap(f32xN x, float cap) {
    const f32xN u = x / cap, square = u * u;
    const f32xN series = u * (1.f - square * (1.f / 3 - square * (2.f / 15)));
    return cap * (square < 0.01f ? series : hyperbolic_tangent(u));
}

// x times the normal distribution's share below x: by 7.1.26 of Abramowitz and Stegun (1964), which
// gives the complement of the error function within 1.5e-7.
inline f32xN gelu(f32xN x) {
    const f32xN z = (x < 0.f ? -x : x) * 0.70710678f;
    const f32xN t = 1.f / (1.f + 0.3275911f * z);
    f32xN p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const f32xN beyond = p * t * exponential(z * z * -1.f) * 0.5f;
    return x * (x < 0.f ? beyond : 1.f - beyond);
}

inline f32xN gelu_tanh(f32xN x) {
    const f32xN inner = (x + x * x * x * 0.044715f) * 0.7978845608f;
    return x * 0.5f * (1.f + hyperbolic_tangent(inner));
}

// Four bytes in each lane, those of a without sign: c + the sum of their products. With AVX2 alone
// it is exact for bytes of a up to 128 only.
inline i32xN dot_fours(i32xN c, u32xN a, i32xN b) {
#if defined(__AVX512VNNI__)
    return bits<i32xN>(
        _mm512_dpbusd_epi32(bits<__m512i>(c), bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(ONLY_AVX2)
    const __m256i pairs = _mm256_maddubs_epi16(bits<__m256i>(a), bits<__m256i>(b));
    return c + bits<i32xN>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int shift = 24; shift >= 0; shift -= 8)
        c += bits<i32xN>((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24);
    return c;
#endif
}

constexpr int64_t LINE = 64;  // bytes of a cache's line

// Into the second cache.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace
