// The activation of the MLP: activation(gate) * up, bf16 in and out, fp32 in between, rounded where the torch twin rounds.
#include "vectors.h"

namespace {

inline f32x16 silu(f32x16 x) { return x / (1.0f + exponential(-x)); }

// x / 2 * (1 + tanh(u)) is x / (1 + exp(-2u)), u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline f32x16 gelu(f32x16 x) { return x / (1.0f + exponential(x * (-1.59576912f - 0.0713548163f * x * x))); }

}  // namespace

// out [rows, n] of gate_up [rows, 2 * n], gate first. kind 0: gelu_tanh, 1: silu.
extern "C" void diptych_gated(bf16* out, const bf16* gate_up, int64_t rows, int64_t n, int64_t kind, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *gate = gate_up + 2 * r * n, *up = gate + n;
        sixteens(n, [&](int64_t i, int64_t count) {
            f32x16 x = load(gate + i, count);
            store(out + r * n + i, rounded(kind ? silu(x) : gelu(x)) * load(up + i, count), count);
        });
    }
}
