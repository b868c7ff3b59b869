// y = x @ weight.T + bias (products.h) with weight [n_out, n_in] in bf16, as it lies in the mapped file.
#include "products.h"

namespace {

struct Plain {
    const bf16* weight;
    int64_t stride;
};

// Four rows that follow each other are one run; rows that lie apart are asked for one tile ahead. From the line `first` of a tile's four
// on, asking for `count` of them at a time.
Ahead ahead_of(const Product& p, const Plain& plain, int64_t o, int first, int count) {
    const char* here = (const char*)(plain.weight + o * plain.stride);
    const int64_t stride = plain.stride * sizeof(bf16);
    if (plain.stride == p.n_in) return {here + AHEAD + first * stride, 64, (int64_t)(count * sizeof(bf16))};
    return {here + (TILE + first) * stride, stride, sizeof(bf16)};
}

// Outputs o to o + TILE of every row. The first rows read the weights from memory, the others from the first-level cache.
void tile(const Product& p, const Plain& plain, int64_t o) {
    const bf16* w[TILE];
    for (int i = 0; i < TILE; i++) w[i] = plain.weight + std::min(o + i, p.n_out - 1) * plain.stride;
    for (int64_t r = 0; r < p.rows; r += TILE) {
        const int64_t rows = std::min<int64_t>(TILE, p.rows - r);
        f32x4 found[TILE] = {};
        if (p.rows <= TILE)
            dots<4>(rows, found, p.tile_of_x(r), w, p.n_in, ahead_of(p, plain, o, 0, 4));
        else if (r < 2 * TILE)
            dots<2>(rows, found, p.tile_of_x(r), w, p.n_in, ahead_of(p, plain, o, r ? 2 : 0, 2));
        else
            dots<0>(rows, found, p.tile_of_x(r), w, p.n_in);
        write(p, r, rows, o, found);
    }
}

}  // namespace

extern "C" void diptych_linear(bf16* y, const bf16* x, const bf16* weight, const bf16* bias, int64_t rows, int64_t n_in, int64_t n_out,
                               int64_t x_stride, int64_t weight_stride, int64_t threads) {
    thread_local std::vector<bf16> room;
    Product product = {y, x, bias, rows, n_in, n_out, x_stride, nullptr};
    product.packed = packed(product, room);
    const Plain plain = {weight, weight_stride};
    for_each_tile(n_out, threads, [&](int64_t o) { tile(product, plain, o); });
}
