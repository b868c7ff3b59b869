// Rows of an int8 cache, as in int8_rows.py: n numbers, and behind them a bf16 for every 32 of them, by which these are multiplied. Rows
// follow each other without a gap, so a scale lies at any address.
#pragma once

#include "vectors.h"

namespace {

typedef std::int8_t i8x16 __attribute__((vector_size(16)));

constexpr int64_t SHARING = 32;

inline int64_t row_bytes(int64_t n) { return n + (n + SHARING - 1) / SHARING * (int64_t)sizeof(bf16); }

inline f32x16 whole_numbers(i8x16 raw) {
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)raw));
#else
    return __builtin_convertvector(raw, f32x16);
#endif
}

// The least bf16 that is not below x, which is positive, infinite or no number.
inline bf16 rounded_up(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0xffffu) >> 16;
}

inline bf16 scale_of(const bf16* in, int64_t n) {
    f32x16 most = {}, odd = {};
    sixteens(n, [&](int64_t i, int64_t count) {
        const f32x16 x = load(in + i, count), size = x < 0.0f ? -x : x;
        most = size > most ? size : most;
        odd += x - x;  // zero, or no number
    });
    return rounded_up((largest(most) + sum(odd)) / 127.0f);
}

inline void encode_row(char* row, const bf16* in, int64_t n) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, whose last byte is the sum's
    for (int64_t g = 0; g < n; g += SHARING) {
        const int64_t length = n - g < SHARING ? n - g : SHARING;
        const bf16 scale = scale_of(in + g, length);
        sixteens(length, [&](int64_t i, int64_t count) {
            const f32x16 shifted = load(in + g + i, count) / widen(scale) + shift;
            const i8x16 numbers = __builtin_convertvector((i32x16)shifted, i8x16);
            std::memcpy(row + g + i, &numbers, count);
        });
        std::memcpy(row + n + g / SHARING * sizeof scale, &scale, sizeof scale);
    }
}

inline void decode_row(bf16* out, const char* row, int64_t n) {
    sixteens(n, [&](int64_t i, int64_t count) {
        bf16 scale;
        std::memcpy(&scale, row + n + i / SHARING * sizeof scale, sizeof scale);
        const std::int8_t* numbers = (const std::int8_t*)row + i;
        const i8x16 raw = count < LANES ? load_part<i8x16>(numbers, count) : load_as<i8x16>(numbers);
        const u16x16 made = narrow(whole_numbers(raw) * widen(scale));
        if (count < LANES)
            std::memcpy(out + i, &made, count * sizeof(bf16));
        else
            std::memcpy(out + i, &made, sizeof made);
    });
}

}  // namespace
