// What stands between the matrix products, each in one pass over memory.
#pragma once

#include "linear.h"

namespace {

// A norm's weight as the model keeps it. One in bf16 meets what was rounded to bf16, as in the
// models that were trained so.
struct NormWeight {
    const void* values;  // null: no norm
    bool wide;           // float32; else bf16
};

inline float sum_of_squares(const bf16* x, int64_t size) {
    f32xN even = all(0.f), odd = all(0.f);
    int64_t i = 0;
    for (; i + 2 * NATIVE <= size; i += 2 * NATIVE) {
        const f32xN a = load_wide(x + i), b = load_wide(x + i + NATIVE);
        even += a * a;
        odd += b * b;
    }
    float total = sum(even + odd);
    for (; i < size; i++) total += widen(x[i]) * widen(x[i]);
    return total;
}

template <bool WIDE>
inline void scale_row(const bf16* x, int64_t size, const void* weight, float factor, bf16* out) {
    const float* wide = (const float*)weight;
    const bf16* slim = (const bf16*)weight;
    int64_t i = 0;
    for (; i + NATIVE <= size; i += NATIVE) {
        const f32xN y = load_wide(x + i) * factor;
        if constexpr (WIDE)
            store(out + i, narrow(load<f32xN>(wide + i) * y));
        else
            store(out + i, narrow(load_wide(slim + i) * rounded(y)));
    }
    for (; i < size; i++) {
        const float y = widen(x[i]) * factor;
        out[i] = WIDE ? narrow(wide[i] * y) : narrow(widen(slim[i]) * widen(narrow(y)));
    }
}

// Root-mean-square norm of one row (Zhang and Sennrich, 2019).
inline void norm_row(const bf16* x, int64_t size, NormWeight weight, float eps, bf16* out) {
    const float factor = 1.f / std::sqrt(sum_of_squares(x, size) / float(size) + eps);
    if (weight.wide)
        scale_row<true>(x, size, weight.values, factor, out);
    else
        scale_row<false>(x, size, weight.values, factor, out);
}

inline void add_row(const bf16* x, const bf16* y, int64_t size, bf16* out) {
    int64_t i = 0;
    for (; i + NATIVE <= size; i += NATIVE)
        store(out + i, narrow(load_wide(x + i) + load_wide(y + i)));
    for (; i < size; i++) out[i] = narrow(widen(x[i]) + widen(y[i]));
}

inline void rms_norm(const bf16* x, const bf16* residual, int64_t num_rows, int64_t size,
                     NormWeight weight, float eps, bf16* out, bf16* total) {
    share_out(num_rows, rows_at_once(size), [&](int64_t row) {
        const bf16* from = x + row * size;
        if (residual) {
            add_row(from, residual + row * size, size, total + row * size);
            from = total + row * size;
        }
        norm_row(from, size, weight, eps, out + row * size);
    });
}

inline f32xN load_weight(const void* weight, bool wide, int64_t i) {
    // One in float32 is rounded to the dtype of what it meets.
    return wide ? rounded(load<f32xN>((const float*)weight + i)) : load_wide((const bf16*)weight + i);
}

inline float one_weight(const void* weight, bool wide, int64_t i) {
    return wide ? widen(narrow(((const float*)weight)[i])) : widen(((const bf16*)weight)[i]);
}

// Layer norm (Ba et al., 2016); a bias may be null. The variance is that of the row less its mean.
inline void layer_norm(const bf16* x, int64_t num_rows, int64_t size, const void* weight,
                       const void* bias, bool wide, float eps, bf16* out) {
    share_out(num_rows, rows_at_once(size), [&](int64_t row) {
        const bf16* from = x + row * size;
        bf16* to = out + row * size;
        const int64_t whole = size / NATIVE * NATIVE;
        f32xN sums = all(0.f), squares = all(0.f);
        for (int64_t i = 0; i < whole; i += NATIVE) sums += load_wide(from + i);
        float total = sum(sums);
        for (int64_t i = whole; i < size; i++) total += widen(from[i]);
        const float mean = total / float(size);
        for (int64_t i = 0; i < whole; i += NATIVE) {
            const f32xN apart = load_wide(from + i) - mean;
            squares += apart * apart;
        }
        float spread = sum(squares);
        for (int64_t i = whole; i < size; i++) {
            const float apart = widen(from[i]) - mean;
            spread += apart * apart;
        }
        const float factor = 1.f / std::sqrt(spread / float(size) + eps);
        for (int64_t i = 0; i < whole; i += NATIVE) {
            f32xN y = (load_wide(from + i) - mean) * factor * load_weight(weight, wide, i);
            if (bias) y += load_weight(bias, wide, i);
            store(to + i, narrow(y));
        }
        for (int64_t i = whole; i < size; i++) {
            float y = (widen(from[i]) - mean) * factor * one_weight(weight, wide, i);
            if (bias) y += one_weight(bias, wide, i);
            to[i] = narrow(y);
        }
    });
}

// Functions of one number, some of which have a parameter.
enum class Pointwise : int64_t { RELU, SCALE, SOFT_CAP, SILU, GELU, GELU_TANH };

// Numbers in runs; the last vector is filled up with zeros.
template <class Function>
inline void for_each(const bf16* x, const bf16* y, int64_t count, bf16* out, Function function) {
    constexpr int64_t RUN = 1024;
    share_out(ceil_div(count, RUN), rows_at_once(RUN), [&](int64_t run) {
        const int64_t end = std::min(count, (run + 1) * RUN);
        int64_t i = run * RUN;
        for (; i + NATIVE <= end; i += NATIVE)
            store(out + i, narrow(function(load_wide(x + i), load_wide(y + i))));
        if (i < end) {
            bf16 a[NATIVE] = {}, b[NATIVE] = {};
            const int64_t bytes = (end - i) * sizeof(bf16);
            std::memcpy(a, x + i, bytes);
            std::memcpy(b, y + i, bytes);
            store(a, narrow(function(load_wide(a), load_wide(b))));
            std::memcpy(out + i, a, bytes);
        }
    });
}

inline void add(const bf16* x, const bf16* y, int64_t count, bf16* out) {
    for_each(x, y, count, out, [](f32xN a, f32xN b) { return a + b; });
}

inline void pointwise(const bf16* x, int64_t count, Pointwise kind, float parameter, bf16* out) {
    const auto apply = [&](auto function) {
        for_each(x, x, count, out, [&](f32xN v, f32xN) { return function(v); });
    };
    const float factor = widen(narrow(parameter));  // a factor has the numbers' own dtype
    switch (kind) {
        case Pointwise::RELU: return apply([](f32xN v) { return v < 0.f ? all(0.f) : v; });
        case Pointwise::SCALE: return apply([=](f32xN v) { return v * factor; });
        case Pointwise::SOFT_CAP: return apply([=](f32xN v) { return soft_cap(v, parameter); });
        case Pointwise::SILU: return apply([](f32xN v) { return silu(v); });
        case Pointwise::GELU: return apply([](f32xN v) { return gelu(v); });
        case Pointwise::GELU_TANH: return apply([](f32xN v) { return gelu_tanh(v); });
    }
}

inline void gate(const bf16* x, int64_t num_rows, int64_t width, Gate kind, bf16* out) {
    share_out(num_rows, rows_at_once(width), [&](int64_t row) {
        const bf16 *a = x + row * 2 * width, *b = a + width;
        bf16* to = out + row * width;
        const auto apply = [&](f32xN g, f32xN up) {
            // Rounded between the two, as the ops are that this stands for.
            return narrow(rounded(kind == SILU ? silu(g) : gelu_tanh(g)) * up);
        };
        int64_t i = 0;
        for (; i + NATIVE <= width; i += NATIVE)
            store(to + i, apply(load_wide(a + i), load_wide(b + i)));
        if (i < width) {
            bf16 g[NATIVE] = {}, up[NATIVE] = {};
            const int64_t bytes = (width - i) * sizeof(bf16);
            std::memcpy(g, a + i, bytes);
            std::memcpy(up, b + i, bytes);
            store(g, apply(load_wide(g), load_wide(up)));
            std::memcpy(to + i, g, bytes);
        }
    });
}

// Rotates the first 2 * half entries of a head as pairs (i, i + half) (Su et al., 2021).
inline void rotate_head(const bf16* x, int64_t size, const float* cosines, const float* sines,
                        int64_t half, bf16* out) {
    int64_t i = 0;
    for (; i + NATIVE <= half; i += NATIVE) {
        const f32xN a = load_wide(x + i), b = load_wide(x + i + half);
        const f32xN cosine = load<f32xN>(cosines + i), sine = load<f32xN>(sines + i);
        store(out + i, narrow(a * cosine - b * sine));
        store(out + i + half, narrow(b * cosine + a * sine));
    }
    for (; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        out[i] = narrow(a * cosines[i] - b * sines[i]);
        out[i + half] = narrow(b * cosines[i] + a * sines[i]);
    }
    if (out != x && size > 2 * half)
        std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(bf16));
}

// Rows of a table of floats, of `bytes` each; what is not in the table is not a number.
inline void embedding(const int64_t* ids, int64_t num_rows, const char* table, int64_t table_rows,
                      int64_t bytes, char* out) {
    share_out(num_rows, rows_at_once(bytes), [&](int64_t row) {
        if (ids[row] >= 0 && ids[row] < table_rows)
            std::memcpy(out + row * bytes, table + ids[row] * bytes, bytes);
        else
            std::memset(out + row * bytes, 0xff, bytes);
    });
}

}  // namespace
