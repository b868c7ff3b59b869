// Sixteen lanes at a time, in the vector types of GCC and clang: the compiler maps them to the registers that the machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = std::uint16_t;
using std::int64_t;

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef std::int32_t i32x16 __attribute__((vector_size(64)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));
typedef std::uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

template <typename V, typename T>
inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

// The first `count` elements; the other lanes are zero.
template <typename V, typename T>
inline V load_part(const T* p, int64_t count) {
    V v = {};
    std::memcpy(&v, p, count * sizeof(T));
    return v;
}

inline f32x16 widen(u16x16 raw) {
#ifdef __AVX512F__
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)raw), 16);  // GCC 12 makes 7 instructions of what follows
#else
    return (f32x16)(__builtin_convertvector(raw, u32x16) << 16);
#endif
}

// To the nearest, of two equally near the even one; any NaN becomes a quiet one. Where one instruction does it, for ten, what is no normal
// number (below 1.2e-38) becomes zero.
inline u16x16 narrow(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 quiet = u32x16{} + 0x7fc0u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, u16x16);
#endif
}

inline bf16 narrow(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline float widen(bf16 x) {
    std::uint32_t bits = (std::uint32_t)x << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline f32x16 rounded(f32x16 x) { return widen(narrow(x)); }

inline f32x16 load(const bf16* p) { return widen(load_as<u16x16>(p)); }
inline f32x16 load(const float* p) { return load_as<f32x16>(p); }
inline f32x16 load(const bf16* p, int64_t count) { return count < LANES ? widen(load_part<u16x16>(p, count)) : load(p); }
inline f32x16 load(const float* p, int64_t count) { return count < LANES ? load_part<f32x16>(p, count) : load(p); }

inline void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, f32x16 x, int64_t count = LANES) {
    u16x16 raw = narrow(x);
    if (count < LANES)
        std::memcpy(p, &raw, count * sizeof(bf16));
    else
        std::memcpy(p, &raw, sizeof raw);
}

// Calls `body(index, count)` for every 16 of `n` elements, and for what is left.
template <typename Body>
inline void sixteens(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, (int64_t)LANES);
    if (i < n) body(i, n - i);
}

inline f32x4 quarters(f32x16 x) {
    f32x8 low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    f32x8 half = low + high;
    f32x4 first, second;
    std::memcpy(&first, &half, sizeof first);
    std::memcpy(&second, (const char*)&half + sizeof first, sizeof second);
    return first + second;
}

// The sums over the lanes of a, b, c and d: each in the same order, whatever the others are.
inline f32x4 sums(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
#define PAIRS(x, y)                                                                              \
    (SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +                   \
     SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
    f32x16 ab = PAIRS(a, b), cd = PAIRS(c, d);
#undef PAIRS
    return quarters(SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
}

inline float sum(f32x16 x) {
    f32x4 q = quarters(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

inline float largest(f32x16 x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// e to the x, to 2 units in the last place: 2^n from the exponent's bits, a Taylor polynomial for what is left, |r| <= ln 2 / 2. Below
// -87 it is as at -87 (1.6e-38), above 88 as at 88.
inline f32x16 exponential(f32x16 x) {
    const f32x16 low = f32x16{} - 87.0f, high = f32x16{} + 88.0f;
    x = x < low ? low : x > high ? high : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    f32x16 shifted = x * 1.44269504f + shift, n = shifted - shift;
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return p * (f32x16)power;
}

// 32 bf16, two a lane, as one product takes them. Where bf16 products are no faster than fp32 ones (native.py) those are taken.
inline f32x16 dot(f32x16 sum, u32x16 a, u32x16 b) {
#if defined(__AVX512BF16__) && !defined(DIPTYCH_FP32_PRODUCTS)
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (f32x16)(a << 16) * (f32x16)(b << 16);
    return sum + (f32x16)(a & 0xffff0000u) * (f32x16)(b & 0xffff0000u);
#endif
}

constexpr int TILE = 4;

// Lines to ask memory for while a tile is computed: with element k, at i * row + k * pace bytes, for as many i as asked.
struct Ahead {
    const char* from;
    int64_t row, pace;
};

// Rows of x: element k of row r, where k is a multiple of 32, begins the 32 at r * row + k * pace.
struct Rows {
    const bf16* from;
    int64_t row, pace;
};

// Dot products of ROWS rows of x with TILE rows of w, n elements each: out[row][w]. The sum over n is in the same order for every row
// and any ROWS. With every 32 elements ASKED lines of `ahead` are asked for.
template <int ROWS, int ASKED>
inline void dots(f32x4* out, Rows x, const bf16* const (&w)[TILE], int64_t n, Ahead ahead) {
    f32x16 acc[ROWS][TILE] = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        u32x16 weights[TILE];
#pragma GCC unroll 4
        for (int o = 0; o < TILE; o++) {
            weights[o] = load_as<u32x16>(w[o] + k);
            if (o < ASKED) __builtin_prefetch(ahead.from + o * ahead.row + k * ahead.pace, 0, 3);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            u32x16 row = load_as<u32x16>(x.from + r * x.row + k * x.pace);
#pragma GCC unroll 4
            for (int o = 0; o < TILE; o++) acc[r][o] = dot(acc[r][o], weights[o], row);
        }
    }
    if (k < n) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            u32x16 row = load_part<u32x16>(x.from + r * x.row + k * x.pace, n - k);
#pragma GCC unroll 4
            for (int o = 0; o < TILE; o++) acc[r][o] = dot(acc[r][o], load_part<u32x16>(w[o] + k, n - k), row);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) out[r] = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// As above for 1 to TILE rows.
template <int ASKED>
inline void dots(int64_t rows, f32x4* out, Rows x, const bf16* const (&w)[TILE], int64_t n, Ahead ahead = {}) {
    switch (rows) {
        case 1: return dots<1, ASKED>(out, x, w, n, ahead);
        case 2: return dots<2, ASKED>(out, x, w, n, ahead);
        case 3: return dots<3, ASKED>(out, x, w, n, ahead);
        default: return dots<4, ASKED>(out, x, w, n, ahead);
    }
}

}  // namespace
