// The largest of each row, bf16: its first place.
#include "vectors.h"

namespace {

typedef std::int16_t i16x32 __attribute__((vector_size(64)));

// As whole numbers that have the same order: those below zero are turned round.
inline i16x32 ordered(i16x32 bits) { return bits ^ ((bits >> 15) & (std::int16_t)0x7fff); }
inline std::int16_t ordered(std::int16_t bits) { return bits ^ ((bits >> 15) & 0x7fff); }

constexpr int64_t RUN = 1024;

std::int16_t largest_of(const std::int16_t* x, int64_t n) {
    i16x32 best = i16x32{} + (std::int16_t)INT16_MIN;
    std::int16_t most = INT16_MIN;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const i16x32 each = ordered(load_as<i16x32>(x + i));
        best = each > best ? each : best;
    }
    for (int j = 0; j < 32; j++) most = best[j] > most ? best[j] : most;
    for (; i < n; i++) most = ordered(x[i]) > most ? ordered(x[i]) : most;
    return most;
}

// The first run with the largest, then its first place there.
int64_t argmax(const std::int16_t* x, int64_t n) {
    std::int16_t most = largest_of(x, n < RUN ? n : RUN);
    int64_t place = 0;
    for (int64_t i = RUN; i < n; i += RUN) {
        const std::int16_t best = largest_of(x + i, n - i < RUN ? n - i : RUN);
        if (best > most) {
            most = best;
            place = i;
        }
    }
    while (ordered(x[place]) != most) place++;
    return place;
}

}  // namespace

// places [rows] of x [rows, n]; -0 is below 0, and a NaN beyond infinity.
extern "C" void diptych_argmax(int64_t* places, const std::int16_t* x, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) places[r] = argmax(x + r * n, n);
}
