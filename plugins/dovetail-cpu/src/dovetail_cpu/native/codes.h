// Keys and values in one byte per entry, with a scale for each vector: what
// dovetail/attention_backends/kv_codec.py defines, byte by byte.
#pragma once

#include "elementwise.h"

namespace {

enum class Format : int64_t { BF16, INT8, E4M3, E5M2 };

// A float of 8 bits without its sign is the top of a float32 whose exponent is too small.
template <int MANTISSA, int BIAS>
struct Small {
    static constexpr int SHIFT = 23 - MANTISSA;
    static constexpr int OFFSET = (127 - BIAS) << MANTISSA;

    static f32xN number(u32xN code) {
        const f32xN grown = bits<f32xN>(u32xN{} + (uint32_t(254 - BIAS) << 23));
        return bits<f32xN>((code & 0x7fu) << SHIFT | (code & 0x80u) << 24) * grown;
    }

    // To the nearest, half to even; x is within the largest.
    static u32xN code(f32xN x) {
        const u32xN raw = bits<u32xN>(x), size = raw & 0x7fffffffu;
        const u32xN near = size + ((1u << (SHIFT - 1)) - 1) + (size >> SHIFT & 1u);
        const u32xN normal = (near >> SHIFT) - uint32_t(OFFSET);
        // Below the least normal number, 2 to the power of 1 - BIAS, steps are of one size.
        const float steps = float(1 << (BIAS - 1 + MANTISSA)), magic = 12582912.f;
        const f32xN counted = (bits<f32xN>(size) * steps + magic) - magic;
        const u32xN subnormal = bits<u32xN>(__builtin_convertvector(counted, i32xN));
        const float least = bits<float>(uint32_t(128 - BIAS) << 23);
        return (bits<f32xN>(size) < least ? subnormal : normal) | (raw >> 24 & 0x80u);
    }
};

template <Format FORMAT>
struct Code;

template <>
struct Code<Format::INT8> {
    static constexpr float LARGEST = 127.f;

    static f32xN number(u32xN code) {
        return __builtin_convertvector(bits<i32xN>(code << 24) >> 24, f32xN);
    }

    static u32xN code(f32xN x) {
        const float magic = 12582912.f;
        return bits<u32xN>(__builtin_convertvector((x + magic) - magic, i32xN)) & 0xffu;
    }
};

template <>
struct Code<Format::E4M3> : Small<3, 7> {
    static constexpr float LARGEST = 448.f;
};

template <>
struct Code<Format::E5M2> : Small<2, 15> {
    static constexpr float LARGEST = 57344.f;
};

// Calls with the format as a constant; not with BF16.
template <class Call>
inline void of_format(Format format, Call call) {
    switch (format) {
        case Format::BF16: break;
        case Format::INT8: call(Code<Format::INT8>{}); break;
        case Format::E4M3: call(Code<Format::E4M3>{}); break;
        case Format::E5M2: call(Code<Format::E5M2>{}); break;
    }
}

// A vector of a multiple of LANES entries to codes; returns its scale. One that holds what is not
// finite has such a scale, and so comes back as what is not a number.
template <class C>
inline bf16 encode(const bf16* x, int64_t size, uint8_t* codes) {
    f32xN most = all(0.f), wrong = all(0.f);
    for (int64_t i = 0; i < size; i += NATIVE) {
        const f32xN v = load_wide(x + i);
        most = larger(v < 0.f ? -v : v, most);
        wrong += v - v;
    }
    const float spoilt = sum(wrong);
    const bf16 scale = spoilt == 0.f ? narrow(largest(most) / C::LARGEST) : narrow(NAN);
    const float divisor = spoilt == 0.f && widen(scale) != 0.f ? widen(scale) : 1.f;
    for (int64_t i = 0; i < size; i += NATIVE) {
        f32xN v = load_wide(x + i) / divisor;
        v = v > C::LARGEST ? all(C::LARGEST) : v;
        v = v < -C::LARGEST ? all(-C::LARGEST) : v;
        v = v == v ? v : all(0.f);
        store(codes + i, __builtin_convertvector(C::code(v), u8xN));
    }
    return scale;
}

// Words of two codes, the first in the low byte, to words of two bf16.
template <class C>
inline void expand(const uint8_t* from, f32xN first, f32xN second, uint32_t* to) {
    const u32xN pair = __builtin_convertvector(load<u16xN>(from), u32xN);
    const f32xN low = rounded(C::number(pair & 0xffu) * first);
    const f32xN high = rounded(C::number(pair >> 8) * second);
    store(to, bits<u32xN>(high) | bits<u32xN>(low) >> 16);
}

}  // namespace
