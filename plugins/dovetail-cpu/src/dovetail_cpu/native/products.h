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
constexpr int64_t BLOCK_ROWS = 4 * PAIR;  // that meet a group of panels in the second cache
constexpr int64_t PART_ROWS = 512;        // whose sums a thread keeps
constexpr int64_t PANELS_TOGETHER = 8;    // in a group
constexpr int64_t FAR_WORDS = 256;        // of each, which stay there for all blocks of a part
constexpr int64_t NEAR_WORDS = 128;       // of one panel that stay in the first cache for a block
constexpr int64_t ALONE_WORDS = 1024;     // the same where there is one block
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

    template <class Scale>
    void run(Scale scale) {
        const int64_t threads = omp_get_max_threads(), enough = 4 * threads;
        const int64_t num_panels = ceil_div(num_vectors(), PANEL_VECTORS);
        const int64_t blocks = ceil_div(num_rows, BLOCK_ROWS);
        const bool halves = target.gate || num_rows <= PAIR;
        const int64_t most = halves ? PANELS_TOGETHER / 2 : PANELS_TOGETHER;
        const int64_t together = std::clamp<int64_t>(num_panels * blocks / enough, 1, most);
        const int64_t groups = ceil_div(num_panels, together);
        const int64_t least = far() < factors.depth ? ceil_div(num_rows, PART_ROWS) : 1;
        const int64_t parts = std::clamp(ceil_div(enough, groups), std::min(least, blocks), blocks);
        const int64_t part_rows = ceil_div(ceil_div(num_rows, parts), PAIR) * PAIR;
        share_out(groups * ceil_div(num_rows, part_rows), 1, [&](int64_t task, Place among) {
            const int64_t row = task / groups * part_rows, first = task % groups * together;
            const Group mine = group(first, together);
            const bool ends = among.is_last || task % groups + 1 == groups;
            part(mine, ends ? mine : group(first + together, together), row,
                 std::min(num_rows, row + part_rows), among, scale);
        });
    }

    // Words that a part of the rows takes at a time: read from memory once for all of them.
    int64_t far() const {
        return num_rows <= BLOCK_ROWS ? ceil_div(factors.depth, TILE) * TILE
                                      : evenly(factors.depth, FAR_WORDS);
    }

    // In steps of the unit, at most `most` at a time.
    static int64_t evenly(int64_t words, int64_t most) {
        return ceil_div(ceil_div(words, TILE), ceil_div(words, most)) * TILE;
    }

    // Rows that meet some words of the panels in the second cache.
    struct Block {
        int64_t row, num_rows, word, end_word;
        int64_t index, count;  // among those that meet these words

        int64_t pairs() const { return ceil_div(num_rows, PAIR); }
        int64_t words() const { return end_word - word; }
        bool is_last() const { return index + 1 == count; }
        // Words of each panel that all rows meet before the next ones.
        int64_t near() const {
            if (num_rows <= PAIR) return words();
            return evenly(words(), count == 1 ? ALONE_WORDS : NEAR_WORDS);
        }
    };

    // `next`: the group that the thread takes afterwards; the same: none.
    template <class Scale>
    void part(Group group, Group next, int64_t first_row, int64_t end_row, Place among,
              Scale scale) const {
        const int64_t depth = factors.depth, each = far();
        const int64_t count = ceil_div(end_row - first_row, BLOCK_ROWS);
        const int64_t stride = group.size() * PANEL + LANES;
        Sum* sums = scratch<Sum>((each < depth ? count : 1) * BLOCK_ROWS * stride);
        MatrixUnit unit;
        for (int64_t word = 0; word < depth; word += each)
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = first_row + i * BLOCK_ROWS;
                const Block block{row, std::min(BLOCK_ROWS, end_row - row), word,
                                  std::min(depth, word + each), i, count};
                Sum* to = sums + (each < depth ? i : 0) * BLOCK_ROWS * stride;
                multiply(unit, group, block, to, stride, among.is_first && word == 0,
                         block.end_word < depth ? group : next);
                if (block.end_word == depth)
                    finish(group, row, block.num_rows, (float*)to, stride, scale);
            }
    }

    // What will be read next, brought a little in each step: memory and unit are busy at once.
    struct Coming {
        Lines columns, rows;

        void bring() {
            columns.bring();
            rows.bring();
        }
    };

    // Where a product of up to PAIR rows with one panel stands in the work of a block.
    struct Spot {
        int64_t word, panel, pair;  // the panel's number in its group
    };

    void multiply(MatrixUnit& unit, Group group, Block block, Sum* sums, int64_t stride,
                  bool is_cold, Group next) const {
        const int64_t near = block.near();
        for (int64_t k = block.word; k < block.end_word; k += near)
            for (int64_t p = 0; p < group.size(); p++)
                for (int64_t i = 0; i < block.pairs(); i++) {
                    const char* columns = words(group.panel(p), k);
                    const auto column = [&](int64_t step, int j) {
                        return columns + step * STEP_BYTES + j * LINE;
                    };
                    const int64_t left = is_packed ? PAIR : block.num_rows - i * PAIR;
                    const auto multiply = [&](auto ahead) {
                        multiply_rows<Words, PANEL_VECTORS>(
                            unit, tiles(block, i, k), std::min(PAIR, left),
                            std::min(near, block.end_word - k), column, LINE_OF_WORDS,
                            sums + i * PAIR * stride + p * PANEL, stride, k > 0, ahead);
                    };
                    if (block.num_rows <= PAIR)
                        multiply(Behind{columns + SOON});
                    else
                        multiply(coming(group, block, {k, p, i}, is_cold, next));
                }
    }

    RowTiles tiles(Block block, int64_t pair, int64_t word) const {
        RowTiles tiles = rows.from(0, word / TILE);
        tiles.first += (block.row / PAIR + pair) * pair_bytes;
        return tiles;
    }

    // All blocks share the words that come after those that they meet now. Of a thread's first
    // group nothing was brought before: its first block does that, a panel ahead.
    Coming coming(Group group, Block block, Spot at, bool is_cold, Group next) const {
        Coming coming;
        const int64_t pairs = block.pairs();
        const int64_t next_word = block.end_word < factors.depth ? block.end_word : 0;
        if (is_cold && block.index == 0 && at.panel + 1 < group.size())
            coming.columns = Lines::share(words(group.panel(at.panel + 1), at.word), at.pair, pairs);
        else if ((next_word > 0 || next.first != group.first) && at.panel < next.size())
            coming.columns = Lines::share(
                words(next.panel(at.panel), next_word + at.word - block.word),
                block.index * pairs + at.pair, block.count * pairs);
        if (is_packed && !block.is_last())
            coming.rows = Lines::share(tiles(block, at.pair + BLOCK_ROWS / PAIR, at.word).first,
                                       at.panel, group.size());
        return coming;
    }

    template <class Scale>
    void finish(Group group, int64_t row, int64_t size, float* sums, int64_t stride,
                Scale scale) const {
        const int64_t vector = group.first * PANEL_VECTORS;
        const int64_t count = std::min(group.count * PANEL_VECTORS, num_vectors() - vector);
        const Columns columns{vector, count, stride};
        const Columns behind = columns.from(num_vectors(), count);
        float* others = sums + (group.count * PANEL_VECTORS + behind.first % PANEL_VECTORS) * LANES;
        scale(row, size, columns, sums);
        if (target.gate) scale(row, size, behind, others);
        put(target, row, size, columns, sums, others);
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
    if (num_rows > BLOCK_ROWS && !member.team) {
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
