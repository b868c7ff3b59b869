// Root mean square norms and the residual sum before them, in one pass over a row: bf16 in and out, fp32 in between, rounded where
// the torch twin rounds.
#include "vectors.h"

namespace {

inline float scale_of(float squares, int64_t n, float eps) { return 1.0f / std::sqrt(squares / n + eps); }

void row(bf16* sum_, bf16* normed, const bf16* x, const bf16* change, const float* change_weight, const float* weight, int64_t n,
         float eps) {
    f32x16 squares = {};
    if (change_weight) {
        sixteens(n, [&](int64_t i, int64_t count) {
            f32x16 each = load(change + i, count);
            squares += each * each;
        });
    }
    const float change_scale = change_weight ? scale_of(sum(squares), n, eps) : 1.0f;
    squares = f32x16{};
    sixteens(n, [&](int64_t i, int64_t count) {
        f32x16 total = load(x + i, count), each = load(change + i, count);
        total += change_weight ? rounded(each * change_scale * load(change_weight + i, count)) : each;
        store(sum_ + i, total, count);
        total = rounded(total);
        squares += total * total;
    });
    const float scale = scale_of(sum(squares), n, eps);
    sixteens(n, [&](int64_t i, int64_t count) { store(normed + i, load(sum_ + i, count) * scale * load(weight + i, count), count); });
}

}  // namespace

// For each of the rows [n]: sum = x + change, or x + norm(change) with change_weight, which may be null; normed = norm(sum). Weights
// fp32 [n].
extern "C" void diptych_residual_norm(bf16* sum, bf16* normed, const bf16* x, const bf16* change, const float* change_weight,
                                      const float* weight, int64_t rows, int64_t n, float eps, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        row(sum + r * n, normed + r * n, x + r * n, change + r * n, change_weight, weight, n, eps);
}
