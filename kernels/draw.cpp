// Of each draw the largest of logit / temperature + Gumbel noise, without most of the noise (noise.py says how it is made, and why).
#include <vector>

#include "vectors.h"

namespace {

using std::uint32_t;
using std::uint64_t;

typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

constexpr int64_t GROUP = 64;
constexpr int EIGHT = 8;
constexpr float SLACK = 4e-3f;  // more than `logarithm` is wrong, twice, and rounding is

struct Words {
    u64x8 word[4];
};

// Philox4x32-10 of eight counters (first + lane, choice, index, kind).
Words philox(uint64_t first, uint64_t choice, uint64_t index, uint64_t kind, uint64_t seed) {
    u64x8 c0 = (u64x8{0, 1, 2, 3, 4, 5, 6, 7} + first) & 0xffffffffu;
    u64x8 c1 = u64x8{} + choice, c2 = u64x8{} + index, c3 = u64x8{} + kind;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const u64x8 left = c0 * 0xD2511F53u, right = c2 * 0xCD9E8D57u;
        c0 = (right >> 32) ^ c1 ^ k0;
        c2 = (left >> 32) ^ c3 ^ k1;
        c1 = right & 0xffffffffu;
        c3 = left & 0xffffffffu;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

inline float share(uint64_t word) {
    const float w = ((float)word + 0.5f) * 0x1p-32f;
    return w < 1 - 0x1p-24f ? w : 1 - 0x1p-24f;
}

inline float exponential_of(uint64_t word) { return -log1pf(-share(word)); }

// To 1e-3: the exponent's bits, and a polynomial through six points of [1, 2].
inline f32x8 logarithm(f32x8 x) {
    typedef std::int32_t i32x8 __attribute__((vector_size(32)));
    const i32x8 bits = (i32x8)x;
    const f32x8 exponent = __builtin_convertvector((bits >> 23) - 127, f32x8);
    const f32x8 m = (f32x8)((bits & 0x7fffff) | 0x3f800000);
    const f32x8 p = (((-0.056570851f * m + 0.44717955f) * m - 1.4699568f) * m + 2.8212026f) * m - 1.7417939f;
    return exponent * 0.69314718f + p;
}

// No noise of these groups is above, but for 1e-3 at most: one word of each.
inline f32x8 caps(u64x8 words) {
    const f32x8 w = (__builtin_convertvector(words, f32x8) + 0.5f) * 0x1p-32f;
    const f32x8 small = w * (1.0f + w * (0.5f + w * 0.33333333f));  // 1 - w would lose what is left of w
    const f32x8 rest = 1.0f - (w < 0.99999f ? w : f32x8{} + 0.99999f);
    return 4.1588831f - logarithm(w < 0.01f ? small : -logarithm(rest));
}

template <typename T>
struct Draw {
    const T* logits;
    int64_t n;
    float temperature;
    uint64_t seed, choice, index;
    float floor;
    int64_t last;
    float best = -INFINITY;
    int64_t token = 0;

    // NaN if there is one.
    float largest_of(int64_t group) const {
        const int64_t first = group * GROUP;
        float most = -INFINITY, odd = 0.0f;
        if (n - first >= GROUP) {
            f32x16 tops = f32x16{} + most, odds = {};
            for (int64_t t = first; t < first + GROUP; t += LANES) {
                const f32x16 each = load(logits + t);
                tops = each > tops ? each : tops;
                odds = each != each ? each : odds;
            }
            most = largest(tops);
            odd = sum(odds);
        } else {
            for (int64_t t = first; t < n; t++) {
                most = at(t) > most ? at(t) : most;
                odd += at(t) != at(t) ? at(t) : 0.0f;
            }
        }
        return odd != odd ? odd : most;
    }

    float at(int64_t t) const {
        if constexpr (sizeof(T) == 2)
            return widen(logits[t]);
        else
            return logits[t];
    }

    int64_t first_odd(int64_t group) const {
        int64_t t = group * GROUP;
        while (at(t) == at(t)) t++;
        return t;
    }

    // All of a group's noise.
    void look(int64_t group) {
        const Words own = philox(group / 2, choice, index, 1, seed);
        const float least = exponential_of(own.word[2 * (group % 2)][0]) / GROUP, cap = -logf(least);
        const int64_t place = own.word[2 * (group % 2) + 1][0] % GROUP;
        for (int64_t start = 0; start < GROUP; start += 4 * EIGHT) {
            const Words words = philox((group * GROUP + start) / 4, choice, index, 0, seed);
            for (int64_t i = 0; i < 4 * EIGHT; i++) {
                const int64_t within = start + i, t = group * GROUP + within;
                if (t >= n) return;
                if (at(t) < floor || (at(t) == floor && t > last)) continue;
                const float more = within == place ? 0.0f : exponential_of(words.word[i % 4][i / 4]);
                const float noise = std::fmin(-logf(more + least), cap), sum = at(t) / temperature + noise;
                if (sum > best || (sum == best && t < token)) {
                    best = sum;
                    token = t;
                }
            }
        }
    }

    int64_t drawn() {
        const int64_t groups = (n + GROUP - 1) / GROUP;
        std::vector<float> bounds(groups);
        int64_t highest = 0;
        for (int64_t start = 0; start < groups; start += 2 * EIGHT) {
            const Words words = philox(start / 2, choice, index, 1, seed);
            const f32x8 even = caps(words.word[0]), odd = caps(words.word[2]);
            for (int64_t g = start; g < groups && g < start + 2 * EIGHT; g++) {
                const int64_t lane = (g - start) / 2;
                const float most = largest_of(g);
                if (most != most) return first_odd(g);
                bounds[g] = most < floor ? -INFINITY : most / temperature + (g % 2 ? odd[lane] : even[lane]) + SLACK;
                highest = bounds[g] > bounds[highest] ? g : highest;
            }
        }
        look(highest);
        for (int64_t g = 0; g < groups; g++)
            if (bounds[g] >= best && bounds[g] > -INFINITY && g != highest) look(g);
        return token;
    }
};

constexpr int64_t ASKED = 5;

template <typename T>
int64_t drawn(const T* logits, int64_t n, int64_t stride, const int64_t* ask, float floor, int64_t last) {
    float temperature;
    std::memcpy(&temperature, ask + 3, sizeof(temperature));
    return Draw<T>{logits + ask[4] * stride, n, temperature, (uint64_t)ask[0], (uint32_t)ask[1], (uint32_t)ask[2], floor, last}.drawn();
}

}  // namespace

// tokens [count] of logits [rows, n], whose rows lie `stride` apart, bf16 or, if `wide`, fp32: the first of equal sums, or of those that are no
// number. asks [count, ASKED]: seed, choice and index of the noise (noise.py), the temperature's bits, the row. floors, lasts [count], or null: as
// in gpu/draw.py.
extern "C" void diptych_draw(int64_t* tokens, const void* logits, int64_t wide, int64_t n, int64_t stride, const int64_t* asks,
                             const float* floors, const int64_t* lasts, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) {
        const float floor = floors ? floors[i] : -INFINITY;
        const int64_t last = lasts ? lasts[i] : n;
        tokens[i] = wide ? drawn((const float*)logits, n, stride, asks + i * ASKED, floor, last)
                         : drawn((const bf16*)logits, n, stride, asks + i * ASKED, floor, last);
    }
}
