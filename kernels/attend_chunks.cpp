// Attention of rows with several new tokens each, over the paged cache where it lies: bf16 in and out, scores, softmax and sums in fp32.
//
// What a row's queries see is packed once for all of them, so that both products take a pair of one query's numbers at a time and have 16
// results side by side: keys as [16 keys] for each pair of dimensions, values as [64 dimensions] for each pair of keys. Then a tile of
// queries at a time goes over CHUNK keys after CHUNK keys, softmax as it goes, and over no key that none of them sees.
#include <algorithm>
#include <vector>

#include "int8_rows.h"
#include "vectors.h"

namespace {

using pair = std::uint32_t;  // of bf16

constexpr int64_t CHUNK = 128;        // keys: their scores and packed keys lie in the second-level cache while they are needed
constexpr int64_t QUERIES = 64;       // in a tile, of all heads that share keys
constexpr int64_t ABREAST = 4 * LANES;  // results of one row of a product that are summed at once

struct Chunks {
    bf16* out;           // [tokens, heads, head_dim]
    const bf16* query;   // [tokens, heads, head_dim]
    const char* cache;   // [blocks, kv_heads, 2, block_size] rows of head_dim bf16, or as in int8_rows.h
    const int64_t* places;     // [rows]: a row's first token
    const int64_t* sums;       // [rows + 1]: how many tokens the rows before have
    const int64_t* positions;  // [rows], of the first token in its sequence
    const int64_t* tables;     // [rows, table_width]: the blocks from the first with a key that is seen
    int64_t rows, table_width, window, heads, kv_heads, block_size, head_dim;
    float scale, softcap;
    bool int8;

    int64_t row_size() const { return int8 ? row_bytes(head_dim) : head_dim * sizeof(bf16); }
    int64_t tokens(int64_t row) const { return sums[row + 1] - sums[row]; }
    int64_t first_key(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
    int64_t base(int64_t row) const { return first_key(positions[row]) / block_size * block_size; }
    // Runs of 16 keys from `base` to the last token's own.
    int64_t runs(int64_t row) const { return (positions[row] + tokens(row) - base(row) + LANES - 1) / LANES; }
};

// Where keys and values of a row's head are packed, which take as many pairs each. Values of 64 dimensions lie together for all runs: a KiB
// apart, as those of a head of 256 are in the cache, they would share a fourth of the first-level cache's sets.
struct Packed {
    std::vector<int64_t> firsts;  // [rows]: runs of the rows before
    pair *keys, *values;
    int64_t run;  // pairs

    int64_t at(const Chunks& c, int64_t row, int64_t kv_head) const { return (firsts[row] * c.kv_heads + kv_head * c.runs(row)) * run; }
    pair* keys_of(const Chunks& c, int64_t row, int64_t kv_head, int64_t key) const {
        return keys + at(c, row, kv_head) + key / LANES * run;
    }
    // From dimension d on, a multiple of ABREAST: [keys / 2][min(ABREAST, head_dim - d)].
    pair* values_of(const Chunks& c, int64_t row, int64_t kv_head, int64_t key, int64_t d) const {
        return values + at(c, row, kv_head) + (c.runs(row) * LANES * d + key * std::min(ABREAST, c.head_dim - d)) / 2;
    }
};

// One head's key (part 0) or value (part 1) at a position, made bf16 in `made` if it is not; zeros if no query sees it: what lies there may
// be no number.
const bf16* found(const Chunks& c, int64_t row, int64_t kv_head, int64_t part, int64_t position, bf16* made) {
    if (position < c.first_key(c.positions[row]) || position >= c.positions[row] + c.tokens(row)) {
        std::memset(made, 0, c.head_dim * sizeof(bf16));
        return made;
    }
    const int64_t place = position - c.base(row), block = c.tables[row * c.table_width + place / c.block_size];
    const char* at = c.cache + (((block * c.kv_heads + kv_head) * 2 + part) * c.block_size + place % c.block_size) * c.row_size();
    if (!c.int8) return (const bf16*)at;
    decode_row(made, at, c.head_dim);
    return made;
}

void pack(const Chunks& c, const Packed& packed, int64_t row, int64_t kv_head, int64_t run) {
    thread_local std::vector<bf16> made;
    made.resize(2 * LANES * c.head_dim);
    const int64_t first = c.base(row) + run * LANES;
    const bf16 *keys[LANES], *values[LANES];
    for (int64_t i = 0; i < LANES; i++) {
        keys[i] = found(c, row, kv_head, 0, first + i, made.data() + i * c.head_dim);
        values[i] = found(c, row, kv_head, 1, first + i, made.data() + (LANES + i) * c.head_dim);
    }
    pair* to = packed.keys_of(c, row, kv_head, run * LANES);
    for (int64_t d = 0; d < c.head_dim; d += 2)
        for (int64_t i = 0; i < LANES; i++) *to++ = load_as<pair>(keys[i] + d);
    for (int64_t from = 0; from < c.head_dim; from += ABREAST) {
        to = packed.values_of(c, row, kv_head, run * LANES, from);
        const int64_t width = std::min(ABREAST, c.head_dim - from);
        for (int64_t i = 0; i < LANES; i += 2, to += width)
            for (int64_t d = 0; d < width; d++) to[d] = values[i][from + d] | (pair)values[i + 1][from + d] << 16;
    }
}

// out[r][g * 16 + lane] (+)= the sum over `pairs` of x[r][k] and w[g * apart + k * step + lane], for TILE rows and GROUPS times 16 lanes.
template <int GROUPS>
void multiply(float* const (&out)[TILE], const bf16* const (&x)[TILE], const pair* w, int64_t apart, int64_t step, int64_t pairs, bool more) {
    f32x16 acc[TILE][GROUPS] = {};
    if (more)
        for (int r = 0; r < TILE; r++)
            for (int g = 0; g < GROUPS; g++) acc[r][g] = load(out[r] + g * LANES);
    for (int64_t k = 0; k < pairs; k++) {
        u32x16 found[GROUPS];
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++) found[g] = load_as<u32x16>(w + g * apart + k * step);
#pragma GCC unroll 4
        for (int r = 0; r < TILE; r++) {
            const u32x16 each = u32x16{} + load_as<pair>(x[r] + 2 * k);
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) acc[r][g] = dot(acc[r][g], found[g], each);
        }
    }
    for (int r = 0; r < TILE; r++)
        for (int g = 0; g < GROUPS; g++) store(out[r] + g * LANES, acc[r][g]);
}

void multiply(int64_t lanes, float* const (&out)[TILE], const bf16* const (&x)[TILE], const pair* w, int64_t apart, int64_t step,
              int64_t pairs, bool more) {
    switch (lanes / LANES) {
        case 1: return multiply<1>(out, x, w, apart, step, pairs, more);
        case 2: return multiply<2>(out, x, w, apart, step, pairs, more);
        case 3: return multiply<3>(out, x, w, apart, step, pairs, more);
        default: return multiply<4>(out, x, w, apart, step, pairs, more);
    }
}

// A tile's queries, each one head of one token, and what is known of them so far; `padded` rows of each, the last of them repeated.
struct Tile {
    int64_t count, padded, width;      // width: head_dim
    std::vector<const bf16*> query;    // where each lies
    std::vector<int64_t> lows, highs;  // the keys it sees, from `base`
    std::vector<float> scores;         // [CHUNK] each
    std::vector<bf16> shares;          // [CHUNK] each
    std::vector<float> mixed;          // [head_dim] each: values by their shares
    std::vector<float> most, total;    // the largest score, and the sum of the shares
};

void begin(const Chunks& c, Tile& t, int64_t row, int64_t kv_head, int64_t first, int64_t tokens) {
    const int64_t group = c.heads / c.kv_heads;
    t.count = tokens * group, t.padded = (t.count + TILE - 1) / TILE * TILE, t.width = c.head_dim;
    t.query.resize(t.padded), t.lows.resize(t.padded), t.highs.resize(t.padded);
    for (int64_t q = 0; q < t.padded; q++) {
        const int64_t each = std::min(q, t.count - 1), token = first + each / group, position = c.positions[row] + token;
        t.query[q] = c.query + ((c.places[row] + token) * c.heads + kv_head * group + each % group) * c.head_dim;
        t.lows[q] = c.first_key(position) - c.base(row), t.highs[q] = position + 1 - c.base(row);
    }
    t.scores.resize(t.padded * CHUNK), t.shares.resize(t.padded * CHUNK);
    t.mixed.assign(t.padded * c.head_dim, 0.0f);
    t.most.assign(t.padded, -INFINITY), t.total.assign(t.padded, 0.0f);
}

void score(Tile& t, const pair* keys, int64_t keys_count) {
    for (int64_t key = 0; key < keys_count; key += ABREAST)
        for (int64_t q = 0; q < t.padded; q += TILE) {
            float* out[TILE];
            const bf16* x[TILE];
            for (int i = 0; i < TILE; i++) out[i] = t.scores.data() + (q + i) * CHUNK + key, x[i] = t.query[q + i];
            const int64_t pairs = t.width / 2;
            multiply(std::min(ABREAST, keys_count - key), out, x, keys + key * pairs, pairs * LANES, LANES, pairs, false);
        }
}

// Scores of one query with the keys from `first` on to shares, as if its largest score so far were its largest; what it has mixed is brought
// to that.
void soften(const Chunks& c, Tile& t, int64_t q, int64_t first, int64_t keys_count) {
    float* scores = t.scores.data() + q * CHUNK;
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i32x16 low = i32x16{} + (int32_t)(t.lows[q] - first), high = i32x16{} + (int32_t)(t.highs[q] - first);
    f32x16 best = f32x16{} - INFINITY;
    for (int64_t i = 0; i < keys_count; i += LANES) {
        f32x16 each = load(scores + i) * c.scale;
        if (c.softcap) each = c.softcap - 2.0f * c.softcap / (1.0f + exponential(each * (2.0f / c.softcap)));
        const i32x16 key = lanes + (int32_t)i;
        each = ((key >= low) & (key < high)) ? each : f32x16{} - INFINITY;
        store(scores + i, each);
        best = each > best ? each : best;
    }
    const float before = t.most[q], most = std::max(before, largest(best));
    const float from = most == -INFINITY ? 0.0f : most;  // none seen yet
    f32x16 total = {};
    for (int64_t i = 0; i < keys_count; i += LANES) {
        const f32x16 each = load(scores + i), share = each == -INFINITY ? f32x16{} : exponential(each - from);
        store(t.shares.data() + q * CHUNK + i, share);
        total += share;
    }
    const float rest = before == most ? 1.0f : exponential(f32x16{} + (before - from))[0];
    t.most[q] = most, t.total[q] = t.total[q] * rest + sum(total);
    if (rest != 1.0f)
        for (int64_t d = 0; d < t.width; d += LANES) store(t.mixed.data() + q * t.width + d, load(t.mixed.data() + q * t.width + d) * rest);
}

// Adds the values of `keys_count` keys, each by its share, from dimension d on.
void mix(Tile& t, const pair* values, int64_t d, int64_t keys_count) {
    const int64_t width = std::min(ABREAST, t.width - d);
    for (int64_t q = 0; q < t.padded; q += TILE) {
        float* out[TILE];
        const bf16* x[TILE];
        for (int i = 0; i < TILE; i++) out[i] = t.mixed.data() + (q + i) * t.width + d, x[i] = t.shares.data() + (q + i) * CHUNK;
        multiply(width, out, x, values, LANES, width, keys_count / 2, true);
    }
}

void attend(const Chunks& c, const Packed& packed, int64_t row, int64_t kv_head, int64_t first, int64_t tokens) {
    thread_local Tile t;
    begin(c, t, row, kv_head, first, tokens);
    const int64_t low = t.lows[0] / LANES * LANES, high = (t.highs[t.count - 1] + LANES - 1) / LANES * LANES;
    for (int64_t key = low; key < high; key += CHUNK) {
        const int64_t count = std::min(CHUNK, high - key);
        score(t, packed.keys_of(c, row, kv_head, key), count);
        for (int64_t q = 0; q < t.padded; q++) soften(c, t, q, key, count);
        for (int64_t d = 0; d < t.width; d += ABREAST) mix(t, packed.values_of(c, row, kv_head, key, d), d, count);
    }
    for (int64_t q = 0; q < t.count; q++) {
        bf16* out = c.out + (t.query[q] - c.query);
        for (int64_t d = 0; d < t.width; d += LANES) store(out + d, load(t.mixed.data() + q * t.width + d) / t.total[q]);
    }
}

// One piece of work: a run to pack, or the queries from a token on.
struct Item {
    int64_t row, kv_head, first;
};

}  // namespace

// head_dim is a multiple of 16. Softmax of scale * q.k, soft-capped unless softcap is 0.
extern "C" void diptych_attend_chunks(bf16* out, const bf16* query, const char* cache, const int64_t* places, const int64_t* sums,
                                      const int64_t* positions, const int64_t* tables, int64_t rows, int64_t table_width, int64_t window,
                                      int64_t heads, int64_t kv_heads, int64_t block_size, int64_t head_dim, float scale, float softcap,
                                      int64_t int8, int64_t threads) {
    const Chunks c = {out,  query,       cache,  places, sums,     positions,  tables,
                      rows, table_width, window, heads,  kv_heads, block_size, head_dim, scale, softcap, (bool)int8};
    thread_local std::vector<pair> space;
    Packed packed = {{}, nullptr, nullptr, LANES * head_dim / 2};
    std::vector<Item> packs, tiles;
    const int64_t abreast = std::max<int64_t>(1, QUERIES / (heads / kv_heads));
    int64_t runs = 0;
    for (int64_t row = 0; row < rows; runs += c.runs(row++)) {
        packed.firsts.push_back(runs);
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            for (int64_t run = 0; run < c.runs(row); run++) packs.push_back({row, kv_head, run});
            for (int64_t first = 0; first < c.tokens(row); first += abreast) tiles.push_back({row, kv_head, first});
        }
    }
    space.resize(2 * runs * kv_heads * packed.run + LANES);
    packed.keys = (pair*)(((std::uintptr_t)space.data() + 63) / 64 * 64), packed.values = packed.keys + runs * kv_heads * packed.run;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < packs.size(); i++) pack(c, packed, packs[i].row, packs[i].kv_head, packs[i].first);
    // The last first: they see most, and what is begun last should be short.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < tiles.size(); i++) {
        const Item& item = tiles[tiles.size() - 1 - i];
        attend(c, packed, item.row, item.kv_head, item.first, std::min(abreast, c.tokens(item.row) - item.first));
    }
}
