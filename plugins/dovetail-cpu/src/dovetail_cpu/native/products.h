// Linear layers over panels: by the matrix unit where there is one, else by vectors.
#pragma once

#include "linear.h"
#include "matrix_unit.h"

namespace {

// Memory of a thread's own that is kept from call to call, in whole lines.
template <class T>
inline T* scratch(int64_t size) {
    thread_local std::vector<char> memory;
    const int64_t bytes = size * int64_t(sizeof(T)) + LINE;
    if (int64_t(memory.size()) < bytes) memory.resize(bytes);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((address + LINE - 1) / LINE * LINE);
}

#ifdef HAS_MATRIX_UNIT
constexpr int64_t PAIR = 2 * TILE;        // rows that are multiplied at once
constexpr int64_t PART_ROWS = 8 * PAIR;   // that meet a group of panels in the second cache
constexpr int64_t LEAST_ROWS = 4 * PAIR;  // that are worth a part; more of them are packed first
constexpr int64_t PANELS_TOGETHER = 8;    // in a group
constexpr int64_t SLICE_WORDS = 128;      // of a panel: they stay in the first cache for all rows
constexpr int64_t SOON = 1024;            // bytes ahead: half a step of one panel
constexpr int64_t STEP_BYTES = 2 * TILE_BYTES, STEP_LINES = STEP_BYTES / LINE;  // of two tiles

// What is read next by rows that take the words of a panel only once.
struct Behind {
    const char* next;

    void bring() {
        for (int64_t i = 0; i < STEP_LINES; i++) prefetch(next + i * LINE);
        next += STEP_BYTES;
    }
};

// Memory that will be read soon: some lines in each step.
struct Lines {
    const char* next = nullptr;
    int64_t count = 0;

    // Share i of n of the two tiles of each step.
    static Lines share(const char* first, int64_t i, int64_t n) {
        const int64_t begin = i * STEP_LINES / n, end = (i + 1) * STEP_LINES / n;
        return {first + begin * LINE, end - begin};
    }

    void bring() {
        for (int64_t i = 0; i < count; i++) prefetch(next + i * LINE);
        next += STEP_BYTES;
    }
};

// Rows as the unit takes them, in each step two tiles, with zeros for what is missing. Where they
// lie a multiple of 4 KiB apart, all would meet in the same lines of the first cache.
struct PackedRows {
    char* tiles;
    int64_t steps;  // in which all words are taken

    static int64_t bytes(int64_t num_rows, int64_t depth) {
        return ceil_div(num_rows, PAIR) * 2 * ceil_div(depth, TILE) * TILE_BYTES;
    }

    void pack(const char* rows, int64_t row_bytes, int64_t num_rows, int64_t depth) const {
        share_out(ceil_div(num_rows, PAIR) * 2, 1, [&](int64_t tile) {
            for (int64_t s = 0; s < steps; s++) {
                char* to = tiles + (tile / 2 * steps + s) * STEP_BYTES + tile % 2 * TILE_BYTES;
                for (int64_t i = 0; i < TILE; i++, to += LINE) {
                    const int64_t row = tile * TILE + i;
                    const char* from = rows + row * row_bytes + s * LINE;
                    const int64_t left = row < num_rows ? depth * 4 - s * LINE : 0;
                    if (left >= LINE)
                        store(to, load<u32xN>(from));
                    else
                        std::memset(std::copy_n(from, left, to), 0, LINE - left);
                }
            }
        });
    }

    RowTiles all() const { return {tiles, LINE, TILE_BYTES, STEP_BYTES}; }
};

// A layer's product with rows, as threads share it: a task is a group of panels and a part of the
// rows. With a gate, the panels of a group are those of its columns and of those that they are
// multiplied with.
template <class Words>
struct TiledProduct {
    using Sum = typename Words::Sum;

    const Factors<Words>& factors;
    const Target& target;
    const int64_t num_rows;
    RowTiles rows;
    int64_t pair_bytes;  // from two tiles of rows to the next
    bool is_packed;

    // A group of panels: `count` from `first` on, then `others` from `second` on.
    struct Group {
        int64_t first, count, second, others;

        int64_t size() const { return count + others; }
        int64_t panel(int64_t i) const { return i < count ? first + i : second + i - count; }
    };

    struct Task {
        Group group;
        int64_t row, end_row;

        int64_t pairs() const { return ceil_div(end_row - row, PAIR); }
    };

    // Some words of a task's panels and of its rows.
    struct Slice {
        const Task& task;
        int64_t word, end_word;
    };

    int64_t num_vectors() const {
        return ceil_div(target.gate ? target.num_columns / 2 : target.num_columns, LANES);
    }

    Group group(int64_t first, int64_t most) const {
        const int64_t end = std::min(first + most, ceil_div(num_vectors(), PANEL_VECTORS));
        if (!target.gate) return {first, end - first, 0, 0};
        const int64_t vector = num_vectors() + first * PANEL_VECTORS;
        const int64_t end_vector = num_vectors() + std::min(end * PANEL_VECTORS, num_vectors());
        const int64_t second = vector / PANEL_VECTORS;
        return {first, end - first, second, ceil_div(end_vector, PANEL_VECTORS) - second};
    }

    const char* words(int64_t panel, int64_t word) const {
        return (const char*)(factors.panels + (panel * factors.depth + word) * PANEL);
    }

    RowTiles tiles(int64_t row, int64_t word) const {
        RowTiles tiles = rows.from(0, word / TILE);
        tiles.first += row / PAIR * pair_bytes;
        return tiles;
    }

    template <class Scale>
    void run(Scale scale) {
        const int64_t enough = 4 * omp_get_max_threads();
        const int64_t panels = ceil_div(num_vectors(), PANEL_VECTORS);
        const bool halves = target.gate || num_rows <= PAIR;
        const int64_t most = halves ? PANELS_TOGETHER / 2 : PANELS_TOGETHER;
        const int64_t least = ceil_div(num_rows, PART_ROWS);  // parts
        const int64_t least_groups =
            std::max(ceil_div(panels, most), std::min(panels, ceil_div(enough, least)));
        const int64_t together = ceil_div(panels, least_groups);
        const int64_t groups = ceil_div(panels, together);
        const int64_t parts = std::clamp(ceil_div(enough, groups), least,
                                         std::max(least, num_rows / LEAST_ROWS));
        const int64_t part_rows = ceil_div(ceil_div(num_rows, parts), PAIR) * PAIR;
        const auto task_of = [&](int64_t i) {
            const int64_t row = i / groups * part_rows;
            return Task{group(i % groups * together, together), row,
                        std::min(num_rows, row + part_rows)};
        };
        share_out(groups * ceil_div(num_rows, part_rows), 1, [&](int64_t i, Place among) {
            multiply(task_of(i), among.is_last ? Task{} : task_of(i + 1), among.is_first, scale);
        });
    }

    // `next`: what the thread does afterwards; a task without rows: nothing.
    template <class Scale>
    void multiply(const Task& task, const Task& next, bool is_first, Scale scale) const {
        Sum* sums = scratch<Sum>(task.pairs() * task.group.size() * PAIR * PANEL);
        MatrixUnit unit;
        const int64_t steps = ceil_div(factors.depth, TILE);
        const int64_t slices = num_rows <= PAIR ? 1 : ceil_div(factors.depth, SLICE_WORDS);
        const auto slice = [&](const Task& of, int64_t i) {
            return Slice{of, i * steps / slices * TILE,
                         std::min(factors.depth, (i + 1) * steps / slices * TILE)};
        };
        for (int64_t i = 0; i < slices; i++)
            multiply(unit, slice(task, i), i + 1 < slices ? slice(task, i + 1) : slice(next, 0),
                     is_first && i == 0, sums);
        finish(task, (float*)sums, scale);
    }

    // What will be read next, brought a little in each step: memory and unit are busy at once.
    struct Coming {
        Lines own, columns, rows;

        void bring() {
            own.bring();
            columns.bring();
            rows.bring();
        }
    };

    // `is_cold`: nothing of the slice was brought before.
    void multiply(MatrixUnit& unit, const Slice& slice, const Slice& next, bool is_cold,
                  Sum* sums) const {
        const Task& task = slice.task;
        for (int64_t p = 0; p < task.group.size(); p++)
            for (int64_t i = 0; i < task.pairs(); i++, sums += PAIR * PANEL) {
                const char* columns = words(task.group.panel(p), slice.word);
                const auto column = [&](int64_t step, int j) {
                    return columns + step * STEP_BYTES + j * LINE;
                };
                const int64_t row = task.row + i * PAIR;
                const auto multiply = [&](auto ahead) {
                    multiply_rows<Words, PANEL_VECTORS>(
                        unit, tiles(row, slice.word),
                        is_packed ? PAIR : std::min(PAIR, task.end_row - row),
                        slice.end_word - slice.word, column, LINE_OF_WORDS, sums, PANEL,
                        slice.word > 0, ahead);
                };
                if (num_rows <= PAIR)
                    multiply(Behind{columns + SOON});
                else
                    multiply(coming(slice, next, p, i, is_cold));
            }
    }

    Coming coming(const Slice& slice, const Slice& next, int64_t p, int64_t i,
                  bool is_cold) const {
        Coming coming;
        const Group &group = slice.task.group, &behind = next.task.group;
        const int64_t pairs = slice.task.pairs();
        if (is_cold && p + 1 < group.size())
            coming.own = Lines::share(words(group.panel(p + 1), slice.word), i, pairs);
        if (p < behind.size())
            coming.columns = Lines::share(words(behind.panel(p), next.word), i, pairs);
        if (is_packed && i < next.task.pairs())
            coming.rows = Lines::share(tiles(next.task.row + i * PAIR, next.word).first, p,
                                       group.size());
        return coming;
    }

    // Row by row, as the result lies: each page of it is written once.
    template <class Scale>
    void finish(const Task& task, float* sums, Scale scale) const {
        const int64_t vector = task.group.first * PANEL_VECTORS;
        const int64_t count = std::min(task.group.count * PANEL_VECTORS, num_vectors() - vector);
        const Columns columns{vector, count, PANEL, task.pairs() * PAIR * PANEL};
        const int64_t behind = (num_vectors() + vector) % PANEL_VECTORS * LANES;
        for (int64_t i = 0; i < task.pairs(); i++, sums += PAIR * PANEL) {
            const int64_t row = task.row + i * PAIR, size = std::min(PAIR, task.end_row - row);
            for (int64_t p = 0; p < task.group.size(); p++)
                scale(row, size, {task.group.panel(p) * PANEL_VECTORS, PANEL_VECTORS, PANEL},
                      sums + p * columns.panel_stride);
            put(target, row, size, columns, sums,
                sums + task.group.count * columns.panel_stride + behind);
        }
    }
};
#endif

// The rows of the factors times all columns. `scale(row, num_rows, columns, sums)` makes sums what
// they are to be, in float32.
template <class Words, class Scale>
inline void multiply_layer(const Factors<Words>& factors, int64_t num_rows, const Target& target,
                           Scale scale) {
#ifdef HAS_MATRIX_UNIT
    if (num_rows == 0) return;
    TiledProduct<Words> product{factors, target, num_rows,
                                {factors.rows, factors.row_bytes, TILE * factors.row_bytes, LINE},
                                PAIR * factors.row_bytes, false};
    if (num_rows > LEAST_ROWS && !member.team) {
        const int64_t depth = factors.depth;
        const PackedRows packed{scratch<char>(PackedRows::bytes(num_rows, depth)),
                                ceil_div(depth, TILE)};
        packed.pack(factors.rows, factors.row_bytes, num_rows, depth);
        product.rows = packed.all();
        product.pair_bytes = packed.steps * STEP_BYTES;
        product.is_packed = true;
    }
    product.run(scale);
#else
    using Sum = typename Words::Sum;
    product(num_rows, target, step_of<Words>(num_rows), [](int64_t, int64_t) {},
            [&](int64_t row, int64_t size, Columns columns, float* to, Place place) {
                factors.multiply(row, size, columns, reinterpret_cast<Sum*>(to), place);
                scale(row, size, columns, to);
            });
#endif
}

inline void bf16_linear(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t num_inputs,
                        const uint32_t* panels, const Target& target) {
    using A = Pairs::A;
    Factors<Pairs> factors{(const char*)x, x_stride * 2, panels, num_inputs / 2};
    if constexpr (std::is_same_v<A, bf16>) {
        multiply_layer(factors, num_rows, target, [](int64_t, int64_t, Columns, float*) {});
        return;
    }
    factors.row_bytes = num_inputs * sizeof(A);
    product(
        num_rows, target, step_of<Pairs>(num_rows),
        [&](int64_t row, int64_t size) {
            A* rows = scratch<A>(size * num_inputs);
            for (int64_t i = 0; i < size; i++)
                Pairs::take(x + (row + i) * x_stride, num_inputs, rows + i * num_inputs);
        },
        [&](int64_t, int64_t size, Columns columns, float* to, Place place) {
            Factors<Pairs> own = factors;
            own.rows = (const char*)scratch<A>(0);
            own.multiply(0, size, columns, to, place);
        });
}

}  // namespace
