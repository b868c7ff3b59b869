// y = x @ weight.T + bias, in whatever form the weight is read: bf16 in and out, summed in fp32.
//
// x [rows, n_in] in rows x_stride apart, bias [n_out] or null, y [rows, n_out] contiguous.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// How far ahead of what is computed memory is asked for, in bytes. One core of a Zen 5 reads 640 inputs of 4 rows at 17 GB/s without
// asking, at 30 with 5 KiB, 35 with 8 to 16, 32 with 32; it reads at 41 where nothing is computed.
constexpr int64_t AHEAD = 12288;
constexpr int64_t SHARES = 8;
constexpr int64_t STEP = 2 * LANES;

struct Product {
    bf16* y;
    const bf16* x;
    const bf16* bias;
    int64_t rows, n_in, n_out, x_stride;
    const bf16* packed;

    int64_t padded() const { return (n_in + STEP - 1) / STEP * STEP; }
    Rows tile_of_x(int64_t r) const { return {packed + r * padded(), STEP, TILE}; }
};

// x as tiles of rows, in each the first 32 elements of all its rows, then the next 32: rows 4 KiB apart, as those of 2,048 inputs, would
// all lie in one set of the first-level cache, which halves the speed.
const bf16* packed(const Product& p, std::vector<bf16>& room) {
    room.resize((p.rows + TILE - 1) / TILE * TILE * p.padded() + STEP);
    bf16* first = (bf16*)(((std::uintptr_t)room.data() + 63) / 64 * 64);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t k = 0; k < p.n_in; k += STEP)
            std::memcpy(first + r / TILE * TILE * p.padded() + k * TILE + r % TILE * STEP, p.x + r * p.x_stride + k,
                        std::min(STEP, p.n_in - k) * sizeof(bf16));
    return first;
}

void write(const Product& p, int64_t r, int64_t rows, int64_t o, const f32x4 (&found)[TILE]) {
    const int64_t outputs = std::min<int64_t>(TILE, p.n_out - o);
    f32x16 all;
    std::memcpy(&all, found, sizeof all);
    if (p.bias) {
        f32x16 bias = load(p.bias + o, outputs);
        all += SHUFFLE(bias, bias, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    }
    const u16x16 raw = narrow(all);
    bf16* y = p.y + r * p.n_out + o;
    if (outputs == TILE)
        for (int64_t i = 0; i < rows; i++) std::memcpy(y + i * p.n_out, (const bf16*)&raw + i * TILE, TILE * sizeof(bf16));
    else
        for (int64_t i = 0; i < rows; i++) std::memcpy(y + i * p.n_out, (const bf16*)&raw + i * TILE, outputs * sizeof(bf16));
}

// Calls `tile(o)` for every TILE outputs, o the first of them. In shares, not halves: of two threads one may have lost its core to whom
// that belongs, and the other goes on.
template <typename Tile>
void for_each_tile(int64_t n_out, int64_t threads, Tile tile) {
    const int64_t share = std::max<int64_t>(1, n_out / (TILE * SHARES * threads));
#pragma omp parallel for schedule(dynamic, share) num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < n_out; o += TILE) tile(o);
}

}  // namespace
