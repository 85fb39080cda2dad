// What stands between the matrix products, each in one pass over memory.
#pragma once

#include "linear.h"

namespace {

// A norm's weight as the model keeps it.
struct NormWeight {
    const void* values;  // null: no norm
    bool wide;           // float32; else bf16

    f32x16 at(int64_t i) const {
        return wide ? load<f32x16>((const float*)values + i) : load_wide((const bf16*)values + i);
    }
    float one(int64_t i) const {
        return wide ? ((const float*)values)[i] : widen(((const bf16*)values)[i]);
    }
    // A weight in bf16 meets what was rounded to bf16; so does the model that it was trained in.
    f32x16 times(f32x16 x, int64_t i) const { return at(i) * (wide ? x : widen(narrow(x))); }
    float times(float x, int64_t i) const { return one(i) * (wide ? x : widen(narrow(x))); }
};

inline float sum_of_squares(const bf16* x, int64_t size) {
    f32x16 squares = all(0.f);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const f32x16 wide = load_wide(x + i);
        squares += wide * wide;
    }
    float total = sum(squares);
    for (; i < size; i++) total += widen(x[i]) * widen(x[i]);
    return total;
}

// Root-mean-square norm of one row (Zhang and Sennrich, 2019).
inline void norm_row(const bf16* x, int64_t size, NormWeight weight, float eps, bf16* out) {
    const float factor = 1.f / std::sqrt(sum_of_squares(x, size) / float(size) + eps);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i, narrow(weight.times(load_wide(x + i) * factor, i)));
    for (; i < size; i++) out[i] = narrow(weight.times(widen(x[i]) * factor, i));
}

inline void add_row(const bf16* x, const bf16* y, int64_t size, bf16* out) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i, narrow(load_wide(x + i) + load_wide(y + i)));
    for (; i < size; i++) out[i] = narrow(widen(x[i]) + widen(y[i]));
}

// Rows that are worth a thread's waking.
inline int64_t rows_at_once(int64_t row_size) {
    constexpr int64_t ENOUGH = 1 << 14;
    return ceil_div(ENOUGH, row_size);
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

inline void gate(const bf16* x, int64_t num_rows, int64_t width, Gate kind, bf16* out) {
    share_out(num_rows, rows_at_once(width), [&](int64_t row) {
        const bf16 *a = x + row * 2 * width, *b = a + width;
        bf16* to = out + row * width;
        const auto apply = [&](f32x16 g, f32x16 up) {
            // Rounded between the two, as the ops are that this stands for.
            return narrow(widen(narrow(kind == SILU ? silu(g) : gelu_tanh(g))) * up);
        };
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            store(to + i, apply(load_wide(a + i), load_wide(b + i)));
        if (i < width) {
            bf16 g[LANES] = {}, up[LANES] = {};
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
    for (int64_t i = 0; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        out[i] = narrow(a * cosines[i] - b * sines[i]);
        out[i + half] = narrow(b * cosines[i] + a * sines[i]);
    }
    if (out != x && size > 2 * half)
        std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(bf16));
}

}  // namespace
