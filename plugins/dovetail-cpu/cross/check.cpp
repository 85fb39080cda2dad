// Compares the kernels with plain loops, on whatever processor this is compiled for. Without
// Python or torch, so that it also runs where a processor is emulated.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "kernels.cpp"

namespace {

int failures = 0;
uint32_t seed = 1;

float draw() {  // -1..1
    seed = seed * 1664525u + 1013904223u;
    return float(int32_t(seed)) / 2147483648.f;
}

std::vector<bf16> drawn(size_t count, float spread = 1.f) {
    std::vector<bf16> out(count);
    for (bf16& x : out) x = narrow(draw() * spread);
    return out;
}

void expect(bool is_right, const char* what, int64_t a, int64_t b) {
    if (is_right) return;
    failures++;
    std::printf("wrong: %s (%ld, %ld)\n", what, long(a), long(b));
}

bool near(float got, float want, float tolerance) {
    return std::fabs(got - want) <= tolerance * (1.f + std::fabs(want));
}

float plain_silu(float x) { return x / (1.f + std::exp(-x)); }

void repack(const uint32_t* words, int64_t columns, int64_t depth, uint32_t* panels) {
    pack_generic(&words, &columns, 1, depth, panels, nullptr);
}

void check_linear(int64_t rows, int64_t columns, int64_t inputs) {
    const auto x = drawn(rows * inputs), w = drawn(columns * inputs);
    const int64_t padded = ceil_div(columns, PANEL) * PANEL;
    std::vector<uint32_t> panels(padded * inputs / 2);
    repack((const uint32_t*)w.data(), columns, inputs / 2, panels.data());
    std::vector<float> bias(padded);
    for (int64_t c = 0; c < columns; c++) bias[c] = draw();
    std::vector<bf16> out(rows * columns), gated(rows * columns / 2);
    bf16_linear_generic(x.data(), inputs, rows, inputs, panels.data(), columns, bias.data(), 0,
                   out.data(), columns);
    const bool can_gate = columns % (2 * LANES) == 0;
    if (can_gate)
        bf16_linear_generic(x.data(), inputs, rows, inputs, panels.data(), columns, bias.data(), SILU,
                       gated.data(), columns / 2);
    for (int64_t r = 0; r < rows; r++) {
        std::vector<float> want(columns);
        for (int64_t c = 0; c < columns; c++) {
            double total = bias[c];
            for (int64_t k = 0; k < inputs; k++)
                total += double(widen(x[r * inputs + k])) * widen(w[c * inputs + k]);
            want[c] = float(total);
            expect(near(widen(out[r * columns + c]), want[c], 0.01f), "linear", r, c);
        }
        for (int64_t c = 0; can_gate && c < columns / 2; c++)
            expect(near(widen(gated[r * columns / 2 + c]),
                        plain_silu(want[c]) * want[columns / 2 + c], 0.02f),
                   "gated linear", r, c);
    }
}

// Codes and step of a row, as plain as can be.
float plain_codes(const bf16* x, int64_t inputs, std::vector<int>& codes) {
    float most = 0.f;
    for (int64_t k = 0; k < inputs; k++) most = std::max(most, std::fabs(widen(x[k])));
    const float step = most / 127.f;
    for (int64_t k = 0; k < inputs; k++) codes[k] = int(std::nearbyint(widen(x[k]) / step));
    return step;
}

void check_int8(int64_t rows, int64_t columns, int64_t inputs) {
    const auto x = drawn(rows * inputs, 3.f);
    const int64_t bytes = ceil_div(inputs, 4) * 4, padded = ceil_div(columns, PANEL) * PANEL;
    std::vector<int8_t> w(columns * bytes);
    std::vector<float> scales(padded), steps(rows), out(rows * columns);
    std::vector<int32_t> offsets(padded);
    for (int64_t c = 0; c < columns; c++) {
        scales[c] = 0.01f + 0.001f * c;
        for (int64_t k = 0; k < inputs; k++) {
            w[c * bytes + k] = int8_t(draw() * 127.f);
            offsets[c] += 128 * w[c * bytes + k];
        }
    }
    std::vector<uint32_t> panels(padded * bytes / 4);
    repack((const uint32_t*)w.data(), columns, bytes / 4, panels.data());
    std::vector<uint8_t> codes(rows * bytes);
    quantize_generic(x.data(), 0, inputs, rows, inputs, codes.data(), steps.data(), nullptr);
    const Quantized at{codes.data(), steps.data(), nullptr};
    const Int8Weight weight{panels.data(), scales.data(), offsets.data(), inputs};
    const Target target{out.data(), true, columns, columns, nullptr, NO_GATE};
    int8_linear_generic(&at, rows, &weight, &target);
    std::vector<int> own(inputs);
    for (int64_t r = 0; r < rows; r++) {
        const float step = plain_codes(&x[r * inputs], inputs, own);
        for (int64_t c = 0; c < columns; c++) {
            int64_t total = 0;
            for (int64_t k = 0; k < inputs; k++) total += own[k] * w[c * bytes + k];
            expect(near(out[r * columns + c], float(total) * step * scales[c], 1e-5f), "int8", r, c);
        }
    }
}

void check_int4(int64_t rows, int64_t columns, int64_t inputs) {
    const auto x = drawn(rows * inputs, 3.f);
    const int64_t groups = inputs / GROUP_INPUTS, padded = ceil_div(columns, PANEL) * PANEL;
    std::vector<int> w(columns * inputs);
    std::vector<uint8_t> packed(columns * inputs / 2);
    std::vector<float> scales(columns * groups), steps(rows), out(rows * columns);
    for (int& code : w) code = int(draw() * 7.9f);
    for (float& scale : scales) scale = 0.1f + 0.05f * draw();
    for (int64_t word = 0; word < columns * inputs / 8; word++)
        for (int64_t i = 0; i < 4; i++)
            packed[word * 4 + i] = uint8_t((w[word * 8 + i] + 8) | (w[word * 8 + 4 + i] + 8) << 4);
    std::vector<uint32_t> panels(padded * inputs / 8), scale_panels(padded * groups);
    repack((const uint32_t*)packed.data(), columns, inputs / 8, panels.data());
    repack((const uint32_t*)scales.data(), columns, groups, scale_panels.data());
    std::vector<uint8_t> codes(rows * inputs);
    std::vector<int32_t> sums(rows * groups);
    quantize_generic(x.data(), 0, inputs, rows, inputs, codes.data(), steps.data(), sums.data());
    const Quantized at{codes.data(), steps.data(), sums.data()};
    const Int4Weight weight{panels.data(), (const float*)scale_panels.data(), inputs};
    const Target target{out.data(), true, columns, columns, nullptr, NO_GATE};
    int4_linear_generic(&at, rows, &weight, &target);
    std::vector<int> own(inputs);
    for (int64_t r = 0; r < rows; r++) {
        const float step = plain_codes(&x[r * inputs], inputs, own);
        for (int64_t c = 0; c < columns; c++) {
            double total = 0;
            for (int64_t k = 0; k < inputs; k++)
                total += double(own[k] * w[c * inputs + k]) *
                         scales[c * groups + k / GROUP_INPUTS];
            expect(near(out[r * columns + c], float(total * step), 1e-4f), "int4", r, c);
        }
    }
}

void check_rows(int64_t rows, int64_t size) {
    const auto x = drawn(rows * size, 2.f);
    std::vector<float> weight(size);
    for (float& w : weight) w = draw();
    std::vector<bf16> out(rows * size), gated(rows * size / 2);
    rms_norm_generic(x.data(), nullptr, rows, size, weight.data(), 1, 1e-6f, out.data(), nullptr);
    gate_generic(x.data(), rows, size / 2, SILU, gated.data());
    for (int64_t r = 0; r < rows; r++) {
        const bf16* row = &x[r * size];
        double squares = 0;
        for (int64_t i = 0; i < size; i++) squares += double(widen(row[i])) * widen(row[i]);
        const float factor = float(1. / std::sqrt(squares / size + 1e-6));
        for (int64_t i = 0; i < size; i++)
            expect(near(widen(out[r * size + i]), widen(row[i]) * factor * weight[i], 0.01f),
                   "norm", r, i);
        for (int64_t i = 0; i < size / 2; i++)
            expect(near(widen(gated[r * (size / 2) + i]),
                        plain_silu(widen(row[i])) * widen(row[size / 2 + i]), 0.02f),
                   "gate", r, i);
    }
}

void check_layer_norm(int64_t rows, int64_t size) {
    auto x = drawn(rows * size, 2.f);
    for (bf16& v : x) v = narrow(widen(v) + 3.f);
    const auto weight = drawn(size), bias = drawn(size);
    std::vector<bf16> out(rows * size);
    layer_norm_generic(x.data(), rows, size, weight.data(), bias.data(), 0, 1e-5f, out.data());
    for (int64_t r = 0; r < rows; r++) {
        const bf16* row = &x[r * size];
        double mean = 0, spread = 0;
        for (int64_t i = 0; i < size; i++) mean += double(widen(row[i])) / size;
        for (int64_t i = 0; i < size; i++) spread += std::pow(widen(row[i]) - mean, 2) / size;
        for (int64_t i = 0; i < size; i++) {
            const double normed = (widen(row[i]) - mean) / std::sqrt(spread + 1e-5);
            expect(near(widen(out[r * size + i]),
                        float(normed * widen(weight[i]) + widen(bias[i])), 0.01f),
                   "layer norm", r, i);
        }
    }
}

void check_numbers(int64_t count) {
    const auto x = drawn(count, 8.f), y = drawn(count, 8.f);
    std::vector<bf16> out(count);
    add_generic(x.data(), y.data(), count, out.data());
    for (int64_t i = 0; i < count; i++)
        expect(out[i] == narrow(widen(x[i]) + widen(y[i])), "add", count, i);
    const auto compare = [&](Pointwise kind, float parameter, auto plain) {
        pointwise_generic(x.data(), count, int64_t(kind), parameter, out.data());
        for (int64_t i = 0; i < count; i++)
            expect(near(widen(out[i]), float(plain(double(widen(x[i])))), 0.01f), "function",
                   int64_t(kind), i);
    };
    const auto half = [](double share) { return 0.5 * (1. + share); };
    compare(Pointwise::RELU, 0.f, [](double v) { return v < 0. ? 0. : v; });
    compare(Pointwise::SCALE, 2.5f, [](double v) { return 2.5 * v; });
    compare(Pointwise::SOFT_CAP, 3.f, [](double v) { return 3. * std::tanh(v / 3.); });
    compare(Pointwise::SILU, 0.f, [](double v) { return v / (1. + std::exp(-v)); });
    compare(Pointwise::GELU, 0.f,
            [&](double v) { return v * half(std::erf(v * std::sqrt(0.5))); });
    compare(Pointwise::GELU_TANH, 0.f, [&](double v) {
        return v * half(std::tanh(0.7978845608 * (v + 0.044715 * v * v * v)));
    });
}

// The likeliest, and what is drawn.
void check_choice(int64_t size) {
    auto x = drawn(3 * size);
    x[1 * size + size / 2] = x[1 * size + size - 1] = narrow(5.f);
    x[2 * size + size / 3] = narrow(NAN);
    int64_t ids[3];
    bool finite[3];
    choose_generic(x.data(), 0, size, 3, size, nullptr, ids, finite);
    for (int64_t row = 0; row < 2; row++) {
        int64_t best = 0;
        for (int64_t i = 1; i < size; i++)
            if (widen(x[row * size + i]) > widen(x[row * size + best])) best = i;
        expect(ids[row] == best && finite[row], "likeliest", row, size);
    }
    expect(ids[2] == 0 && !finite[2], "likeliest of what is no number", 2, size);
    for (int64_t top_k : {int64_t(1), std::min<int64_t>(size, 5), size}) {
        const float noise = 0.4f, k = float(top_k), heat = 0.25f;
        const float controls[15] = {heat, heat, 0.f, NEVER, NEVER, NEVER, k, k, k,
                                    1.f,  1.f,  1.f, noise, noise, noise};
        choose_generic(x.data(), 0, size, 3, size, controls, ids, finite);
        for (int64_t row = 0; row < 2; row++) {
            std::vector<std::pair<float, int64_t>> order;
            for (int64_t i = 0; i < size; i++) order.push_back({-widen(x[row * size + i]), i});
            std::sort(order.begin(), order.end());
            std::vector<double> weights(size, 0.);
            double total = 0, sum = 0;
            for (int64_t i = 0; i < top_k; i++)
                total += weights[order[i].second] =
                    std::exp(double(order[0].first - order[i].first) / heat);
            int64_t want = 0;
            while (sum + weights[want] <= noise * total) sum += weights[want++];
            expect(ids[row] == want, "draw", row, top_k);
        }
    }
}

// A sequence of `length` whose last `count` tokens are computed, after all the others were.
void check_attention(int64_t length, int64_t count, int64_t heads, int64_t kv_heads, int64_t size,
                     Format format = Format::BF16) {
    constexpr int64_t PLACES = 16;
    const int64_t blocks = ceil_div(length, PLACES), group = heads / kv_heads;
    const auto q = drawn(length * heads * size), k = drawn(length * kv_heads * size);
    const auto v = drawn(length * kv_heads * size);
    const int64_t vectors = (blocks + 1) * 2 * kv_heads * PLACES;
    std::vector<bf16> cache(vectors * size, bf16(0x7fc0)), scales(vectors, bf16(0x7fc0));
    const float scale = 1.f / std::sqrt(float(size));
    const Layer layer{heads, kv_heads, size, PLACES, 0, nullptr, (char*)cache.data(), scales.data(),
                      format, scale, 0.f};
    const float tolerance = format == Format::BF16   ? 0.02f
                            : format == Format::INT8 ? 0.03f
                            : format == Format::E4M3 ? 0.1f
                                                     : 0.2f;
    std::vector<int32_t> table(blocks);
    for (int64_t b = 0; b < blocks; b++) table[b] = int32_t(blocks - b);
    std::vector<bf16> out(length * heads * size);
    const int64_t begins[] = {0, length - count, length};
    const int64_t at_once = std::max<int64_t>(1, 48 / group);
    for (int part = 0; part < 2; part++) {
        const int64_t begin = begins[part], tokens = begins[part + 1] - begin;
        const int32_t starts[] = {0, int32_t(tokens)}, context = int32_t(begin);
        std::vector<int32_t> slots(tokens);
        for (int64_t t = 0; t < tokens; t++)
            slots[t] = int32_t(table[(begin + t) / PLACES] * PLACES + (begin + t) % PLACES);
        std::vector<Task> tasks;
        for (int64_t first = 0; first < tokens; first += at_once) {
            const int64_t rows = std::min(at_once, tokens - first);
            tasks.push_back({0, int32_t(first), int32_t(rows), 0, int32_t(begin + first + rows), -1});
        }
        const Step step{tokens, int64_t(tasks.size()), 0, blocks, starts, &context, table.data(),
                        slots.data(), tasks.data(), nullptr, nullptr};
        const Heads given{&q[begin * heads * size], &k[begin * kv_heads * size],
                          &v[begin * kv_heads * size], heads * size, kv_heads * size,
                          kv_heads * size, nullptr, nullptr, 0, nullptr, nullptr, 0, 0.f};
        if (tokens)
            attend_generic(&layer, &step, &given, &out[begin * heads * size]);
    }
    for (int64_t t = 0; t < length; t++)
        for (int64_t h = 0; h < heads; h++) {
            std::vector<double> weights(t + 1), want(size);
            double total = 0;
            for (int64_t p = 0; p <= t; p++) {
                double score = 0;
                for (int64_t e = 0; e < size; e++)
                    score += double(widen(q[(t * heads + h) * size + e])) *
                             widen(k[(p * kv_heads + h / group) * size + e]);
                total += weights[p] = std::exp(score * scale);
            }
            for (int64_t p = 0; p <= t; p++)
                for (int64_t e = 0; e < size; e++)
                    want[e] += weights[p] / total * widen(v[(p * kv_heads + h / group) * size + e]);
            for (int64_t e = 0; e < size; e++)
                expect(near(widen(out[(t * heads + h) * size + e]), float(want[e]), tolerance),
                       "attention", t, h);
        }
}

}  // namespace

int main() {
    for (int64_t rows : {1, 3, 13, 49, 200})
        for (int64_t columns : {1, 31, 64, 96, 100}) check_linear(rows, columns, 34);
    check_linear(5, 33, 4098);
    for (int64_t inputs : {1, 33, 64, 130}) check_int8(7, 50, inputs), check_int8(60, 32, inputs);
    for (int64_t inputs : {64, 192}) check_int4(7, 50, inputs), check_int4(60, 32, inputs);
    for (int64_t size : {2, 30, 32, 34, 256}) check_rows(9, size), check_layer_norm(9, size);
    for (int64_t count : {1, 15, 1024, 1031, 5000}) check_numbers(count);
    for (int64_t size : {3, 16, 17, 8191, 8193, 20000}) check_choice(size);
    check_attention(40, 1, 4, 2, 16);
    check_attention(37, 5, 7, 1, 64);
    check_attention(300, 3, 2, 2, 80);
    for (Format format : {Format::INT8, Format::E4M3, Format::E5M2})
        check_attention(70, 3, 6, 2, 64, format), check_attention(300, 3, 2, 1, 80, format);
    if (failures) std::printf("%d results are wrong\n", failures);
    else std::printf("all kernels are right\n");
    return failures != 0;
}
