// Weights of 8 and 4 bits: y = x @ weight.T + bias (products.h), and the weights in bf16, each its number times its scale, rounded. With int4
// y is what linear.cpp makes of those, to the bit; with int8 the numbers are multiplied, and their sum by the scale that they share.
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

    float scale(int64_t o) const { return ((const float*)scales)[o]; }  // of int8
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

// Row o in bf16, times `scale`. What lies AHEAD behind it in memory is asked for meanwhile.
inline void unpack_int8(bf16* out, const Numbers& w, int64_t o, float scale) {
    const unsigned char* in = w.row(o);
    int64_t k = 0;
    for (; k + 64 <= w.n_in; k += 64) {
        ask(in + k + AHEAD);
#pragma GCC unroll 4
        for (int64_t i = k; i < k + 64; i += LANES) {
            const u16x16 weights = to_bf16(from_int8(in + i) * scale);
            std::memcpy(out + i, &weights, sizeof weights);
        }
    }
    for (; k < w.n_in; k++) out[k] = narrow((float)(std::int8_t)in[k] * scale);
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

#ifdef __AVX512VNNI__
constexpr int64_t BYTES = 64, PLANES = 3;

// Up to TILE rows of x in fixed point of 24 bits with 2^23 added, by bytes, so that products with int8 are sums of whole numbers, without an
// error: 64 lowest bytes of the first row, 64 middle, 64 highest, the same of the others, then the next 64 inputs. An element is rounded if it
// is less than 2^-15 of its row's largest. `unit[r]` is what 1 stands for, NaN if the row has something that is no number.
struct FixedPoint {
    std::vector<unsigned char> room;
    unsigned char* first;
    float unit[TILE];

    void make(const Product& p) {
        room.assign(p.rows * ((p.n_in + BYTES - 1) / BYTES * BYTES) * PLANES + BYTES, 0);
        first = (unsigned char*)(((std::uintptr_t)room.data() + 63) / 64 * 64);
        for (int64_t r = 0; r < p.rows; r++) make_row(p, r, p.x + r * p.x_stride);
    }

    void make_row(const Product& p, int64_t r, const bf16* x) {
        f32x16 most = {}, odd = {};
        sixteens(p.n_in, [&](int64_t i, int64_t count) {
            const f32x16 each = load(x + i, count), size = each < 0.0f ? -each : each;
            most = size > most ? size : most;
            odd += each - each;  // zero, or no number
        });
        int above;
        std::frexp(largest(most), &above);
        const int shift = 23 - std::max(above, -100);
        unit[r] = std::ldexp(1.0f, -shift) + sum(odd);
        const __m512 turn = _mm512_set1_ps(std::ldexp(1.0f, shift));
        const __m512i offset = _mm512_set1_epi32(1 << 23);
        sixteens(p.n_in, [&](int64_t i, int64_t count) {
            const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(x + i, count), turn)), offset);
            unsigned char* to = first + (i / BYTES * p.rows + r) * PLANES * BYTES + i % BYTES;
            _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(whole));
            _mm_storeu_si128((__m128i*)(to + BYTES), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
            _mm_storeu_si128((__m128i*)(to + 2 * BYTES), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 16)));
        });
    }
};

// Dot products of ROWS rows in fixed point with the numbers of OUTS rows, by lanes; 1 stands for the row's unit. Its sums fill the registers:
// 4 rows with 4 outputs would need 52.
template <int ROWS, int OUTS>
inline void dots_int8(f32x16 (*found)[TILE], const unsigned char* x, const unsigned char* const* w, int64_t n) {
    __m512i acc[ROWS * PLANES][OUTS] = {}, all[OUTS] = {};
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < n; k += BYTES, x += ROWS * PLANES * BYTES) {
        const __mmask64 there = n - k < BYTES ? ((__mmask64)1 << (n - k)) - 1 : ~(__mmask64)0;
        __m512i numbers[OUTS];
#pragma GCC unroll 4
        for (int o = 0; o < OUTS; o++) {
            ask(w[0] + AHEAD + k * OUTS + o * BYTES);
            numbers[o] = _mm512_maskz_loadu_epi8(there, w[o] + k);
            all[o] = _mm512_dpbusd_epi32(all[o], ones, numbers[o]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS * PLANES; i++) {
            const __m512i bytes = _mm512_load_si512(x + i * BYTES);
#pragma GCC unroll 4
            for (int o = 0; o < OUTS; o++) acc[i][o] = _mm512_dpbusd_epi32(acc[i][o], bytes, numbers[o]);
        }
    }
    const __m512 middle = _mm512_set1_ps(256.0f), high = _mm512_set1_ps(65536.0f);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
        for (int o = 0; o < OUTS; o++) {  // what was added, 128 in the highest byte, is taken away
            const __m512i highest = _mm512_sub_epi32(acc[r * PLANES + 2][o], _mm512_slli_epi32(all[o], 7));
            const __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r * PLANES + 1][o]), middle, _mm512_cvtepi32_ps(acc[r * PLANES][o]));
            found[r][o] = (f32x16)_mm512_fmadd_ps(_mm512_cvtepi32_ps(highest), high, low);
        }
    }
}

// TILE outputs, as many at a time as the compiler keeps the sums of in registers.
template <int ROWS, int OUTS>
inline void all_int8(f32x16 (*found)[TILE], const unsigned char* x, const unsigned char* const* w, int64_t n) {
    for (int o = 0; o < TILE; o += OUTS) dots_int8<ROWS, OUTS>((f32x16(*)[TILE])(found[0] + o), x, w + o, n);
}

// Outputs o to o + TILE of up to TILE rows of x.
void tile_int8(const Product& p, const FixedPoint& fixed, const Numbers& numbers, int64_t o) {
    const unsigned char* w[TILE];
    f32x4 scales;
    for (int i = 0; i < TILE; i++) {
        const int64_t place = std::min(o + i, p.n_out - 1);
        w[i] = numbers.row(place);
        scales[i] = numbers.scale(place);
    }
    f32x16 lanes[TILE][TILE];
    switch (p.rows) {
        case 1: all_int8<1, 4>(lanes, fixed.first, w, p.n_in); break;
        case 2: all_int8<2, 2>(lanes, fixed.first, w, p.n_in); break;
        case 3: all_int8<3, 1>(lanes, fixed.first, w, p.n_in); break;
        default: all_int8<4, 1>(lanes, fixed.first, w, p.n_in);
    }
    f32x4 found[TILE] = {};
    for (int64_t r = 0; r < p.rows; r++) found[r] = sums(lanes[r][0], lanes[r][1], lanes[r][2], lanes[r][3]) * scales * fixed.unit[r];
    write(p, 0, p.rows, o, found);
}
#endif

// Outputs o to o + TILE of every row of x.
void tile(const Product& p, const Numbers& numbers, int64_t o) {
    thread_local Room room;
    room.make(p.n_in);
    f32x4 scales = f32x4{} + 1.0f;
    for (int i = 0; i < TILE; i++) {
        const int64_t place = std::min(o + i, p.n_out - 1);
        if (numbers.bits == 8) {
            unpack_int8(room.rows[i], numbers, place, 1.0f);
            scales[i] = numbers.scale(place);
        } else
            unpack_int4(room.rows[i], numbers, place);
    }
    const bf16* w[TILE] = {room.rows[0], room.rows[1], room.rows[2], room.rows[3]};
    for (int64_t r = 0; r < p.rows; r += TILE) {
        const int64_t rows = std::min<int64_t>(TILE, p.rows - r);
        f32x4 found[TILE] = {};
        dots<0>(rows, found, p.tile_of_x(r), w, p.n_in);
        for (int64_t i = 0; i < rows; i++) found[i] *= scales;
        write(p, r, rows, o, found);
    }
}

}  // namespace

extern "C" void diptych_linear_quantized(bf16* y, const bf16* x, const unsigned char* values, const void* scales, const bf16* bias,
                                         int64_t bits, int64_t rows, int64_t n_in, int64_t n_out, int64_t x_stride, int64_t threads) {
    Product product = {y, x, bias, rows, n_in, n_out, x_stride, nullptr};
    const Numbers numbers = {values, scales, bits, n_in};
#ifdef __AVX512VNNI__
    if (bits == 8 && rows <= TILE) {
        thread_local FixedPoint fixed;
        fixed.make(product);
        const FixedPoint& made = fixed;  // this thread's, for all
        return for_each_tile(n_out, threads, [&](int64_t o) { tile_int8(product, made, numbers, o); });
    }
#endif
    thread_local std::vector<bf16> room;
    product.packed = packed(product, room);
    for_each_tile(n_out, threads, [&](int64_t o) { tile(product, numbers, o); });
}

// out [rows, n_in]: row i is row places[i] of the matrix, or row i if there are no places.
extern "C" void diptych_dequantize(bf16* out, const unsigned char* values, const void* scales, const int64_t* places, int64_t bits,
                                   int64_t rows, int64_t n_in, int64_t threads) {
    const Numbers numbers = {values, scales, bits, n_in};
    for_each_tile(rows, threads, [&](int64_t first) {
        for (int64_t i = first; i < std::min(first + TILE, rows); i++) {
            const int64_t place = places ? places[i] : i;
            if (bits == 8)
                unpack_int8(out + i * n_in, numbers, place, numbers.scale(place));
            else
                unpack_int4(out + i * n_in, numbers, place);
        }
    });
}
