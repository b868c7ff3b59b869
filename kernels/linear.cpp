// y = x @ weight.T + bias: bf16 in and out, summed in fp32.
//
// x [rows, n_in], weight [n_out, n_in] as it lies in the mapped file, bias [n_out] or null, y [rows, n_out] contiguous.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// How far ahead of what is computed memory is asked for, in bytes. One core of a Zen 5 reads 640 inputs of 4 rows at 17 GB/s without
// asking, at 30 with 5 KiB, 35 with 8 to 16, 32 with 32; it reads at 41 where nothing is computed.
constexpr int64_t AHEAD = 12288;
constexpr int64_t SHARES = 8;

struct Product {
    bf16* y;
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    int64_t rows, n_in, n_out, x_stride, weight_stride;
    const bf16* packed;
};

// x as tiles of rows, in each the first 32 elements of all its rows, then the next 32: rows 4 KiB apart, as those of 2,048 inputs, would
// all lie in one set of the first-level cache, which halves the speed.
const bf16* packed(const Product& p, std::vector<bf16>& room) {
    constexpr int64_t STEP = 2 * LANES;
    const int64_t padded = (p.n_in + STEP - 1) / STEP * STEP;
    room.resize((p.rows + TILE - 1) / TILE * TILE * padded + STEP);
    bf16* first = (bf16*)(((std::uintptr_t)room.data() + 63) / 64 * 64);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t k = 0; k < p.n_in; k += STEP)
            std::memcpy(first + r / TILE * TILE * padded + k * TILE + r % TILE * STEP, p.x + r * p.x_stride + k,
                        std::min(STEP, p.n_in - k) * sizeof(bf16));
    return first;
}

// Four rows that follow each other are one run; rows that lie apart are asked for one tile ahead. From the line `first` of a tile's four
// on, asking for `count` of them at a time.
Ahead ahead_of(const Product& p, int64_t o, int first, int count) {
    const char* here = (const char*)(p.weight + o * p.weight_stride);
    const int64_t stride = p.weight_stride * sizeof(bf16);
    if (p.weight_stride == p.n_in) return {here + AHEAD + first * stride, 64, (int64_t)(count * sizeof(bf16))};
    return {here + (TILE + first) * stride, stride, sizeof(bf16)};
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

// Outputs o to o + TILE of every row. The first rows read the weights from memory, the others from the first-level cache.
void tile(const Product& p, int64_t o) {
    const bf16* w[TILE];
    for (int i = 0; i < TILE; i++) w[i] = p.weight + std::min(o + i, p.n_out - 1) * p.weight_stride;
    for (int64_t r = 0; r < p.rows; r += TILE) {
        const int64_t rows = std::min<int64_t>(TILE, p.rows - r);
        const Rows x = {p.packed + r * ((p.n_in + 2 * LANES - 1) / (2 * LANES) * 2 * LANES), 2 * LANES, TILE};
        f32x4 found[TILE] = {};
        if (p.rows <= TILE)
            dots<4>(rows, found, x, w, p.n_in, ahead_of(p, o, 0, 4));
        else if (r < 2 * TILE)
            dots<2>(rows, found, x, w, p.n_in, ahead_of(p, o, r ? 2 : 0, 2));
        else
            dots<0>(rows, found, x, w, p.n_in);
        write(p, r, rows, o, found);
    }
}

}  // namespace

extern "C" void diptych_linear(bf16* y, const bf16* x, const bf16* weight, const bf16* bias, int64_t rows, int64_t n_in, int64_t n_out,
                               int64_t x_stride, int64_t weight_stride, int64_t threads) {
    thread_local std::vector<bf16> room;
    Product product = {y, x, weight, bias, rows, n_in, n_out, x_stride, weight_stride, nullptr};
    product.packed = packed(product, room);
    // In shares, not halves: of two threads one may have lost its core to whom that belongs, and the other goes on.
    const int64_t share = std::max<int64_t>(1, n_out / (TILE * SHARES * threads));
#pragma omp parallel for schedule(dynamic, share) num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < n_out; o += TILE) tile(product, o);
}
