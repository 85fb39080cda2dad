// The matrix unit of x86 (AMX), which multiplies 16 rows with 16 columns at a time.
//
// One step is a tile of words of rows times one of words of columns, 16 words deep at most. Sums of
// two tiles of rows and two of columns are kept in the unit, so that each tile that is loaded is
// used twice. A row's sums are the same whatever rows stand beside it.
#pragma once

#include "tiles.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_MATRIX_UNIT

namespace {

constexpr int64_t TILE = 16;  // rows of a tile, words of each row, and columns of sums
constexpr int64_t TILE_BYTES = TILE * LINE;

// A thread's use of the unit: the sizes of its tiles. Setting them clears all tiles.
class MatrixUnit {
  public:
    MatrixUnit() = default;
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
    ~MatrixUnit() {
        if (rows_) _tile_release();
    }

    // For up to two tiles of rows, and steps of so many words.
    void set(int64_t rows, int64_t words) {
        if (rows == rows_ && words == words_) return;
        rows_ = rows, words_ = words;
        const int64_t first = std::min(rows, TILE), second = rows - first;
        Sizes sizes;
        for (int i = 0; i < 2; i++) {
            sizes.of(SUMS + i, first, TILE);
            sizes.of(ROWS + i, i ? second : first, words);
            sizes.of(COLUMNS + i, words, TILE);
            if (second) sizes.of(SUMS + 2 + i, second, TILE);
        }
        asm volatile("" : : "r"(&sizes) : "memory");  // compilers think that 8 bytes of it are read
        _tile_loadconfig(&sizes);
    }

  private:
    static constexpr int SUMS = 0, ROWS = 4, COLUMNS = 6;  // numbers of tiles

    struct alignas(64) Sizes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};

        void of(int tile, int64_t num_rows, int64_t words) {
            rows[tile] = uint8_t(num_rows);
            row_bytes[tile] = num_rows ? uint16_t(words * sizeof(uint32_t)) : 0;
        }
    };

    int64_t rows_ = 0, words_ = 0;
};

// Where tiles of rows lie: from row to row, from tile to tile, and from step to step.
struct RowTiles {
    const char* first;
    int64_t row_bytes, tile_bytes, step_bytes;

    RowTiles from(int64_t tile, int64_t step) const {
        return {first + tile * tile_bytes + step * step_bytes, row_bytes, tile_bytes, step_bytes};
    }
};

// R tiles of rows times V vectors of columns into C, which is written or added to.
//
// `column(step, j)`: where the words of a vector of columns begin, `column_bytes` from one word of
// a row to the next. `ahead.bring()` is called in each step.
template <class Words, int R, int V, class Column, class Ahead>
inline void multiply_tiles(RowTiles rows, int64_t steps, Column column, int64_t column_bytes,
                           typename Words::Sum* c, int64_t c_stride, bool add, Ahead ahead) {
#define MULTIPLY(sum, row, column)                      \
    do {                                                \
        if constexpr (std::is_same_v<Words, Pairs>)     \
            _tile_dpbf16ps(sum, row, column);           \
        else                                            \
            _tile_dpbusd(sum, row, column);             \
    } while (false)
    const int64_t c_bytes = c_stride * int64_t(sizeof(typename Words::Sum));
    auto* second = c + TILE * c_stride;
    asm volatile("" ::: "memory");  // the instructions below read what was written so far
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (V == 2) _tile_loadd(1, c + TILE, c_bytes);
        if constexpr (R == 2) _tile_loadd(2, second, c_bytes);
        if constexpr (R == 2 && V == 2) _tile_loadd(3, second + TILE, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (V == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && V == 2) _tile_zero(3);
    }
    const char* row = rows.first;
    for (int64_t k = 0; k < steps; k++, row += rows.step_bytes) {
        _tile_loadd(6, column(k, 0), column_bytes);
        _tile_loadd(4, row, rows.row_bytes);
        ahead.bring();
        if constexpr (V == 2) _tile_loadd(7, column(k, 1), column_bytes);
        MULTIPLY(0, 4, 6);
        if constexpr (V == 2) MULTIPLY(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, row + rows.tile_bytes, rows.row_bytes);
            MULTIPLY(2, 5, 6);
            if constexpr (V == 2) MULTIPLY(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (V == 2) _tile_stored(1, c + TILE, c_bytes);
    if constexpr (R == 2) _tile_stored(2, second, c_bytes);
    if constexpr (R == 2 && V == 2) _tile_stored(3, second + TILE, c_bytes);
#undef MULTIPLY
}

// The same for up to 2 tiles of rows, the last of which may be partly filled, and any number of
// words: the last step takes those that are left.
template <class Words, int V, class Column, class Ahead>
inline void multiply_rows(MatrixUnit& unit, RowTiles rows, int64_t num_rows, int64_t words,
                          Column column, int64_t column_bytes, typename Words::Sum* c,
                          int64_t c_stride, bool add, Ahead ahead) {
    const auto multiply = [&](RowTiles from, int64_t steps, auto at, bool adds) {
        if (num_rows > TILE)
            multiply_tiles<Words, 2, V>(from, steps, at, column_bytes, c, c_stride, adds, ahead);
        else
            multiply_tiles<Words, 1, V>(from, steps, at, column_bytes, c, c_stride, adds, ahead);
    };
    const int64_t steps = words / TILE, rest = words % TILE;
    if (steps) {
        unit.set(num_rows, TILE);
        multiply(rows, steps, column, add);
    }
    if (rest) {
        unit.set(num_rows, rest);
        multiply(rows.from(0, steps), 1, [&](int64_t, int j) { return column(steps, j); },
                 add || steps);
    }
}

}  // namespace
#endif
