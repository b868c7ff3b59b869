// y = x @ weight.T + bias for many rows, bf16 in and out, computed in fp32: for processors whose fp32 products are no slower than their
// bf16 ones.
//
// Weights are made fp32 once for all rows of a run, BROAD outputs side by side; a tile takes HIGH rows over DEPTH inputs from registers,
// one number of x against BROAD weights at a time. The sum of each output is over its inputs in order, whatever the other rows are.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// As wide as a register. Of a tile 24 sums, 4 of weights and one of x are in 32 registers; 12, 2 and 1 in 16.
#ifdef __AVX512F__
typedef f32x16 Wide;
constexpr int64_t VECTORS = 4;
#else
typedef f32x8 Wide;
constexpr int64_t VECTORS = 2;
#endif
constexpr int64_t HIGH = 6, WIDTH = sizeof(Wide) / sizeof(float), BROAD = VECTORS * WIDTH;
constexpr int64_t AT_ONCE = 8 << 20;  // numbers of x made fp32 for a run: 32 MiB, which the thread keeps
constexpr int64_t DEPTH = 512;  // inputs: 128 KiB of weights, which stay in the second-level cache

struct Many {
    bf16* y;
    const bf16 *x, *weight, *bias;
    int64_t rows, n_in, n_out, x_stride, weight_stride;
    const float* wide;  // x in fp32: [row tiles][n_in][HIGH]

    int64_t tiles() const { return (rows + HIGH - 1) / HIGH; }
};

void widen_rows(const Many& m, int64_t tile, float* to) {
    for (int64_t r = 0; r < HIGH; r++) {
        const int64_t row = tile * HIGH + r;
        if (row < m.rows)
            for (int64_t k = 0; k < m.n_in; k++) to[k * HIGH + r] = widen(m.x[row * m.x_stride + k]);
        else
            for (int64_t k = 0; k < m.n_in; k++) to[k * HIGH + r] = 0.0f;
    }
}

// 16 rows of 16 numbers, each of two bf16, as 16 columns.
void transpose(u32x16 (&v)[LANES]) {
    u32x16 t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = SHUFFLE(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        t[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = SHUFFLE(t[i + j], t[i + 2 + j], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            v[i + 2 * j + 1] = SHUFFLE(t[i + j], t[i + 2 + j], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    // v[4 q + c], lanes 4 l to 4 l + 3: column 4 l + c of rows 4 q to 4 q + 3.
    for (int c = 0; c < 4; c++)
        for (int half = 0; half < 2; half++) {
            t[c + 8 * half] = SHUFFLE(v[c + 8 * half], v[4 + c + 8 * half], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            t[c + 4 + 8 * half] = SHUFFLE(v[c + 8 * half], v[4 + c + 8 * half], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int c = 0; c < 4; c++)
        for (int high = 0; high < 2; high++) {
            v[c + 8 * high] = SHUFFLE(t[c + 4 * high], t[c + 4 * high + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
            v[c + 4 + 8 * high] = SHUFFLE(t[c + 4 * high], t[c + 4 * high + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        }
}

// Outputs o to o + BROAD, inputs k to k + depth, as [depth][BROAD].
void widen_weights(const Many& m, int64_t o, int64_t k, int64_t depth, float* to) {
    for (int64_t g = 0; g < BROAD; g += LANES)
        for (int64_t i = 0; i < depth; i += 2 * LANES) {
            const int64_t count = std::min<int64_t>(2 * LANES, depth - i);
            u32x16 v[LANES];
            for (int64_t r = 0; r < LANES; r++) {
                const bf16* from = m.weight + std::min(o + g + r, m.n_out - 1) * m.weight_stride + k + i;
                v[r] = count == 2 * LANES ? load_as<u32x16>(from) : load_part<u32x16>(from, count);
            }
            transpose(v);
            for (int64_t j = 0; j < count; j += 2) {
                store(to + (i + j) * BROAD + g, (f32x16)(v[j / 2] << 16));
                if (j + 1 < count) store(to + (i + j + 1) * BROAD + g, (f32x16)(v[j / 2] & 0xffff0000u));
            }
        }
}

// sums [HIGH][BROAD] (+)= what `depth` inputs add.
void add(float* sums, const float* x, const float* w, int64_t depth, bool more) {
    Wide acc[HIGH][VECTORS] = {};
    if (more)
        for (int r = 0; r < HIGH; r++)
            for (int g = 0; g < VECTORS; g++) acc[r][g] = load_as<Wide>(sums + r * BROAD + g * WIDTH);
    for (int64_t k = 0; k < depth; k++) {
        Wide weights[VECTORS];
#pragma GCC unroll 4
        for (int g = 0; g < VECTORS; g++) weights[g] = load_as<Wide>(w + k * BROAD + g * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
            for (int g = 0; g < VECTORS; g++) acc[r][g] += weights[g] * x[k * HIGH + r];
    }
    for (int r = 0; r < HIGH; r++)
        for (int g = 0; g < VECTORS; g++) std::memcpy(sums + r * BROAD + g * WIDTH, &acc[r][g], sizeof(Wide));
}

void panel(const Many& m, int64_t o) {
    thread_local std::vector<float> room;
    const int64_t tiles = m.tiles();
    room.resize(DEPTH * BROAD + tiles * HIGH * BROAD + LANES);
    float *weights = (float*)(((std::uintptr_t)room.data() + 63) / 64 * 64), *sums = weights + DEPTH * BROAD;
    for (int64_t k = 0; k < m.n_in; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, m.n_in - k);
        widen_weights(m, o, k, depth, weights);
        for (int64_t t = 0; t < tiles; t++) add(sums + t * HIGH * BROAD, m.wide + (t * m.n_in + k) * HIGH, weights, depth, k > 0);
    }
    for (int64_t r = 0; r < m.rows; r++)
        sixteens(std::min(BROAD, m.n_out - o), [&](int64_t i, int64_t count) {
            f32x16 all = load(sums + r * BROAD + i);
            if (m.bias) all += load(m.bias + o + i, count);
            store(m.y + r * m.n_out + o + i, all, count);
        });
}

void run(Many many, int64_t threads) {
    thread_local std::vector<float> room;
    room.resize(many.tiles() * HIGH * many.n_in);
    float* wide = room.data();
    many.wide = wide;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < many.tiles(); t++) widen_rows(many, t, wide + t * HIGH * many.n_in);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < many.n_out; o += BROAD) panel(many, o);
}

}  // namespace

extern "C" void diptych_linear_many(bf16* y, const bf16* x, const bf16* weight, const bf16* bias, int64_t rows, int64_t n_in,
                                    int64_t n_out, int64_t x_stride, int64_t weight_stride, int64_t threads) {
    const int64_t tiles = (rows + HIGH - 1) / HIGH, most = std::max<int64_t>(1, AT_ONCE / HIGH / std::max<int64_t>(1, n_in));
    const int64_t runs = std::max<int64_t>(1, (tiles + most - 1) / most), share = (tiles + runs - 1) / runs * HIGH;
    for (int64_t r = 0; r < rows; r += share) {
        const int64_t count = std::min(share, rows - r);
        run({y + r * n_out, x + r * x_stride, weight, bias, count, n_in, n_out, x_stride, weight_stride, nullptr}, threads);
    }
}
