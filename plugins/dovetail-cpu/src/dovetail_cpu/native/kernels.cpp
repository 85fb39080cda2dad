// The library's functions for one instruction set: compiled once for each, with another SUFFIX.
#include "attention.h"
#include "choice.h"
#include "integers.h"

#define JOIN(name, suffix) name##_##suffix
#define JOIN_EXPANDED(name, suffix) JOIN(name, suffix)
#define EXPORT(name) JOIN_EXPANDED(name, SUFFIX)

// A call of one of the functions below, as `replay` repeats it: its number in this order, and its
// arguments. A float is the low half of its argument.
struct Call {
    int64_t function;
    int64_t arguments[12];

    template <class T>
    T* address(int i) const {
        return reinterpret_cast<T*>(arguments[i]);
    }
    float number(int i) const { return bits<float>(int32_t(arguments[i])); }
};

extern "C" {

void EXPORT(pack)(const uint32_t* const* pieces, const int64_t* counts, int64_t num_pieces,
                  int64_t depth, uint32_t* panels, int32_t* sums) {
    pack({pieces, counts, num_pieces, depth}, panels, sums);
}

void EXPORT(bf16_linear)(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                         const uint32_t* panels, int64_t num_columns, const float* bias,
                         int64_t gate, bf16* out, int64_t out_stride) {
    bf16_linear(x, x_stride, num_rows, num_inputs, panels,
                {out, false, out_stride, num_columns, bias, Gate(gate)});
}

void EXPORT(quantize)(const void* x, int64_t wide, int64_t x_stride, int64_t num_rows,
                      int64_t num_inputs, uint8_t* codes, float* steps, int32_t* group_sums) {
    const Codes to{codes, steps, group_sums};
    if (wide)
        quantize((const float*)x, x_stride, num_rows, num_inputs, to);
    else
        quantize((const bf16*)x, x_stride, num_rows, num_inputs, to);
}

void EXPORT(int8_linear)(const Quantized* x, int64_t num_rows, const Int8Weight* weight,
                         const Target* target) {
    int8_linear(*x, num_rows, *weight, *target);
}

void EXPORT(int4_linear)(const Quantized* x, int64_t num_rows, const Int4Weight* weight,
                         const Target* target) {
    int4_linear(*x, num_rows, *weight, *target);
}

void EXPORT(rms_norm)(const bf16* x, const bf16* residual, int64_t num_rows, int64_t size,
                      const void* weight, int64_t wide, float eps, bf16* out, bf16* total) {
    rms_norm(x, residual, num_rows, size, {weight, wide != 0}, eps, out, total);
}

void EXPORT(gate)(const bf16* x, int64_t num_rows, int64_t width, int64_t kind, bf16* out) {
    gate(x, num_rows, width, Gate(kind), out);
}

void EXPORT(layer_norm)(const bf16* x, int64_t num_rows, int64_t size, const void* weight,
                        const void* bias, int64_t wide, float eps, bf16* out) {
    layer_norm(x, num_rows, size, weight, bias, wide != 0, eps, out);
}

void EXPORT(add)(const bf16* x, const bf16* y, int64_t count, bf16* out) {
    add(x, y, count, out);
}

void EXPORT(pointwise)(const bf16* x, int64_t count, int64_t kind, float parameter, bf16* out) {
    pointwise(x, count, Pointwise(kind), parameter, out);
}

void EXPORT(attend)(const Layer* layer, const Step* step, const Heads* heads, bf16* out) {
    attend(*layer, *step, *heads, out);
}

void EXPORT(embedding)(const int64_t* ids, int64_t num_rows, const char* table,
                       int64_t table_rows, int64_t bytes, char* out) {
    embedding(ids, num_rows, table, table_rows, bytes, out);
}

void EXPORT(choose)(const void* x, int64_t wide, int64_t stride, int64_t num_rows, int64_t size,
                    const float* controls, int64_t* ids, bool* finite) {
    choose({x, wide != 0, stride, size}, num_rows, controls, ids, finite);
}

static void repeat(const Call& c) {
    const int64_t* n = c.arguments;
    switch (c.function) {
        case 1:
            EXPORT(bf16_linear)(c.address<bf16>(0), n[1], n[2], n[3], c.address<uint32_t>(4),
                                n[5], c.address<float>(6), n[7], c.address<bf16>(8), n[9]);
            break;
        case 2:
            EXPORT(quantize)(c.address<void>(0), n[1], n[2], n[3], n[4], c.address<uint8_t>(5),
                             c.address<float>(6), c.address<int32_t>(7));
            break;
        case 3:
            EXPORT(int8_linear)(c.address<Quantized>(0), n[1], c.address<Int8Weight>(2),
                                c.address<Target>(3));
            break;
        case 4:
            EXPORT(rms_norm)(c.address<bf16>(0), c.address<bf16>(1), n[2], n[3],
                             c.address<void>(4), n[5], c.number(6), c.address<bf16>(7),
                             c.address<bf16>(8));
            break;
        case 5:
            EXPORT(gate)(c.address<bf16>(0), n[1], n[2], n[3], c.address<bf16>(4));
            break;
        case 6:
            EXPORT(attend)(c.address<Layer>(0), c.address<Step>(1), c.address<Heads>(2),
                           c.address<bf16>(3));
            break;
        case 7:
            EXPORT(embedding)(c.address<int64_t>(0), n[1], c.address<char>(2), n[3], n[4],
                              c.address<char>(5));
            break;
        case 8:
            EXPORT(int4_linear)(c.address<Quantized>(0), n[1], c.address<Int4Weight>(2),
                                c.address<Target>(3));
            break;
        case 9:
            EXPORT(layer_norm)(c.address<bf16>(0), n[1], n[2], c.address<void>(3),
                               c.address<void>(4), n[5], c.number(6), c.address<bf16>(7));
            break;
        case 10:
            EXPORT(add)(c.address<bf16>(0), c.address<bf16>(1), n[2], c.address<bf16>(3));
            break;
        case 11:
            EXPORT(pointwise)(c.address<bf16>(0), n[1], n[2], c.number(3), c.address<bf16>(4));
            break;
    }
}

void EXPORT(replay)(const Call* calls, int64_t count) {
    as_team([&] {
        for (int64_t i = 0; i < count; i++) repeat(calls[i]);
    });
}
}
