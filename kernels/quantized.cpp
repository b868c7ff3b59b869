// Weights of 8 and 4 bits: y = x @ weight.T + bias (products.h), and the weights in bf16. A weight is its number times its scale, rounded to
// bf16, so both are what linear.cpp computes with those, to the bit.
//
// bits 8: values [n_out, n_in] int8, scales [n_out] fp32. bits 4: values [n_out, n_in in whole runs of 128, two a byte], scales
// [n_out, n_in / 32] bf16; n_in is a multiple of 32. A run is 32 words of 16 bits, the lowest first: bits 4 s to 4 s + 3 of word j are
// number 32 s + j of the run, plus 8. So a register of words is, shifted by nothing, 4, 8 and 12, the indices of its four groups of 32 in a
// table of 16 weights.
#include "products.h"

namespace {

struct Numbers {
    const unsigned char* values;
    const void* scales;
    int64_t bits, n_in;

    int64_t row_bytes() const { return bits == 8 ? n_in : (n_in + RUN - 1) / RUN * RUN / 2; }
    const unsigned char* row(int64_t o) const { return values + o * row_bytes(); }

    static constexpr int64_t RUN = 128, GROUP = 32;
};

typedef std::int8_t i8x16 __attribute__((vector_size(16)));

inline u16x16 to_bf16(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);  // 1 instruction for 9; what it does not do, subnormals and NaN, is no weight
#else
    return narrow(x);
#endif
}

inline f32x16 from_int8(const unsigned char* p) {
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_as<i8x16>(p), i32x16), f32x16);
#endif
}

inline void ask(const unsigned char* p) { __builtin_prefetch(p, 0, 3); }

// Row o in bf16. What lies AHEAD behind it in memory is asked for meanwhile.
inline void unpack_int8(bf16* out, const Numbers& w, int64_t o) {
    const unsigned char* in = w.row(o);
    const float scale = ((const float*)w.scales)[o];
    int64_t k = 0;
    for (; k + 64 <= w.n_in; k += 64) {
        ask(in + k + AHEAD);
#pragma GCC unroll 4
        for (int64_t i = k; i < k + 64; i += LANES) {
            const u16x16 weights = to_bf16(from_int8(in + i) * scale);
            std::memcpy(out + i, &weights, sizeof weights);
        }
    }
    for (; k < w.n_in; k++) {
        out[k] = narrow((float)(std::int8_t)in[k] * scale);
    }
}

// The 16 weights that a group of this scale can have.
inline u16x16 table_of(bf16 scale) {
    const f32x16 numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return to_bf16(numbers * widen(scale));
}

// The group of 32 that has its numbers in bits `shift` to `shift` + 3 of the words.
inline void unpack_group(bf16* out, const unsigned char* words, int shift, bf16 scale) {
    const u16x16 table = table_of(scale);
#ifdef __AVX512BW__
    // A place has five bits that count: with the table twice the fifth, which is another number's, picks the same weight.
    const __m512i twice = _mm512_broadcast_i64x4((__m256i)table), places = _mm512_srli_epi16(_mm512_loadu_si512(words), shift);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(places, twice));
#else
    for (int j = 0; j < 32; j++) out[j] = table[load_as<bf16>(words + 2 * j) >> shift & 15];
#endif
}

inline void unpack_int4(bf16* out, const Numbers& w, int64_t o) {
    const unsigned char* in = w.row(o);
    const int64_t groups = w.n_in / Numbers::GROUP;
    const bf16* scales = (const bf16*)w.scales + o * groups;
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) {
        ask(in + g * 16 + AHEAD);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) unpack_group(out + (g + s) * 32, in + g * 16, 4 * s, scales[g + s]);
    }
    for (int s = 0; g + s < groups; s++) unpack_group(out + (g + s) * 32, in + g * 16, 4 * s, scales[g + s]);
}

inline void unpack(bf16* out, const Numbers& w, int64_t o) { w.bits == 8 ? unpack_int8(out, w, o) : unpack_int4(out, w, o); }

// Room for TILE rows in the first-level cache, 64 bytes more than a multiple of 64 apart, since those 4 KiB apart would share one set of it.
struct Room {
    std::vector<bf16> data;
    bf16* rows[TILE];

    void make(int64_t n_in) {
        const int64_t apart = (n_in + STEP - 1) / STEP * STEP + STEP;
        data.resize(TILE * apart + STEP);
        bf16* first = (bf16*)(((std::uintptr_t)data.data() + 63) / 64 * 64);
        for (int i = 0; i < TILE; i++) rows[i] = first + i * apart;
    }
};

// Outputs o to o + TILE of every row of x.
void tile(const Product& p, const Numbers& numbers, int64_t o) {
    thread_local Room room;
    room.make(p.n_in);
    for (int i = 0; i < TILE; i++) unpack(room.rows[i], numbers, std::min(o + i, p.n_out - 1));
    const bf16* w[TILE] = {room.rows[0], room.rows[1], room.rows[2], room.rows[3]};
    for (int64_t r = 0; r < p.rows; r += TILE) {
        const int64_t rows = std::min<int64_t>(TILE, p.rows - r);
        f32x4 found[TILE] = {};
        dots<0>(rows, found, p.tile_of_x(r), w, p.n_in);
        write(p, r, rows, o, found);
    }
}

}  // namespace

extern "C" void diptych_linear_quantized(bf16* y, const bf16* x, const unsigned char* values, const void* scales, const bf16* bias,
                                         int64_t bits, int64_t rows, int64_t n_in, int64_t n_out, int64_t x_stride, int64_t threads) {
    thread_local std::vector<bf16> room;
    Product product = {y, x, bias, rows, n_in, n_out, x_stride, nullptr};
    product.packed = packed(product, room);
    const Numbers numbers = {values, scales, bits, n_in};
    for_each_tile(n_out, threads, [&](int64_t o) { tile(product, numbers, o); });
}

// out [rows, n_in]: row i is row places[i] of the matrix, or row i if there are no places.
extern "C" void diptych_dequantize(bf16* out, const unsigned char* values, const void* scales, const int64_t* places, int64_t bits,
                                   int64_t rows, int64_t n_in, int64_t threads) {
    const Numbers numbers = {values, scales, bits, n_in};
    for_each_tile(rows, threads, [&](int64_t first) {
        for (int64_t i = first; i < std::min(first + TILE, rows); i++) unpack(out + i * n_in, numbers, places ? places[i] : i);
    });
}
