// The library's functions for one instruction set: compiled once for each, with another SUFFIX.
#include "attention.h"

#define JOIN(name, suffix) name##_##suffix
#define JOIN_EXPANDED(name, suffix) JOIN(name, suffix)
#define EXPORT(name) JOIN_EXPANDED(name, SUFFIX)

extern "C" {

void EXPORT(pack)(const uint32_t* words, int64_t num_columns, int64_t depth, uint32_t* panels) {
    pack(words, num_columns, depth, panels);
}

void EXPORT(bf16_linear)(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                         const uint32_t* panels, int64_t num_columns, const float* bias,
                         int64_t gate, bf16* out, int64_t out_stride) {
    bf16_linear(x, x_stride, num_rows, num_inputs, panels,
                {out, out_stride, num_columns, bias, Gate(gate)});
}

void EXPORT(quantize)(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                      uint8_t* codes, float* scales) {
    const int64_t bytes = ceil_div(num_inputs, 4) * 4;
    share_out(num_rows, rows_at_once(num_inputs), [&](int64_t row) {
        quantize_row(x + row * x_stride, num_inputs, codes + row * bytes, scales + row);
    });
}

void EXPORT(int8_linear)(const uint8_t* codes, const float* code_scales, int64_t num_rows,
                         int64_t num_inputs, const uint32_t* panels, const float* scales,
                         const int32_t* offsets, int64_t num_columns, const float* bias,
                         int64_t gate, bf16* out, int64_t out_stride) {
    int8_linear({codes, code_scales}, num_rows, {panels, scales, offsets, num_inputs},
                {out, out_stride, num_columns, bias, Gate(gate)});
}

void EXPORT(rms_norm)(const bf16* x, const bf16* residual, int64_t num_rows, int64_t size,
                      const void* weight, int64_t wide, float eps, bf16* out, bf16* total) {
    rms_norm(x, residual, num_rows, size, {weight, wide != 0}, eps, out, total);
}

void EXPORT(gate)(const bf16* x, int64_t num_rows, int64_t width, int64_t kind, bf16* out) {
    gate(x, num_rows, width, Gate(kind), out);
}

void EXPORT(attend)(const Layer* layer, const Step* step, const Heads* heads, bf16* queries,
                    bf16* out) {
    attend(*layer, *step, *heads, queries, out);
}
}
