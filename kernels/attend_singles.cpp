// Attention of rows with one new token each, over the paged cache where it lies: keys and values of a block are read once for all query
// heads that share them, and nothing outside what a query may see is read. bf16 in and out, scores, softmax and sums in fp32. Of an int8
// cache what is seen of a block is made bf16 before it is read.
#include <algorithm>
#include <vector>

#include "int8_rows.h"
#include "vectors.h"

namespace {

struct Paged {
    bf16* out;           // [rows, heads, head_dim]
    const bf16* query;   // [rows, heads, head_dim]
    const char* cache;   // [blocks, kv_heads, 2, block_size] rows of head_dim bf16, or as in int8_rows.h
    const int64_t* tables;  // [rows, table_width]: the blocks from the first with a key that is seen
    const int64_t* firsts;  // [rows]: the first position seen
    const int64_t* lasts;   // [rows]: the last, the query's own
    int64_t table_width, heads, kv_heads, block_size, head_dim;
    float scale, softcap;
    bool int8;

    int64_t row() const { return int8 ? row_bytes(head_dim) : head_dim * sizeof(bf16); }
};

// The keys of one block that a query sees: `count` of them, and the values of the same positions. `next`: from there to the same place of
// the block that comes next, in bytes, which is asked for meanwhile; blocks lie scattered, and no processor guesses where.
struct Seen {
    const char* keys;
    const char* values;
    int64_t count;
    int64_t next;
};

// The rows of keys or of values as bf16 [count, head_dim], where they lie or made of them. `next` as above.
struct Opened {
    const bf16* rows;
    int64_t count, next;
};

Seen seen(const Paged& p, int64_t row, int64_t kv_head, int64_t block) {
    const int64_t size = p.block_size, from = (p.firsts[row] / size + block) * size;
    const int64_t low = std::max<int64_t>(p.firsts[row] - from, 0), high = std::min(p.lasts[row] + 1 - from, size);
    const int64_t* table = p.tables + row * p.table_width;
    const int64_t block_stride = p.kv_heads * 2 * size * p.row();
    const char* keys = p.cache + table[block] * block_stride + (kv_head * 2 * size + low) * p.row();
    const int64_t next = high + from <= p.lasts[row] ? (table[block + 1] - table[block]) * block_stride : 0;
    return {keys, keys + size * p.row(), high - low, next};
}

Opened opened(const Paged& p, const Seen& s, const char* rows, std::vector<bf16>& made) {
    if (!p.int8) return {(const bf16*)rows, s.count, s.next};
    for (int64_t at = 0; at < s.count * p.row(); at += 64) __builtin_prefetch(rows + s.next + at, 0, 3);
    made.resize(p.block_size * p.head_dim);
    for (int64_t i = 0; i < s.count; i++) decode_row(made.data() + i * p.head_dim, rows + i * p.row(), p.head_dim);
    return {made.data(), s.count, 0};
}

// Scores of `queries` query heads with the keys: scores[head * stride + key].
void score(const Paged& p, const bf16* query, int64_t queries, const Opened& s, float* scores, int64_t stride) {
    for (int64_t key = 0; key < s.count; key += TILE) {
        const bf16* keys[TILE];
        for (int i = 0; i < TILE; i++) keys[i] = s.rows + std::min(key + i, s.count - 1) * p.head_dim;
        for (int64_t q = 0; q < queries; q += TILE) {
            const int64_t rows = std::min<int64_t>(TILE, queries - q);
            f32x4 found[TILE];
            const Rows x = {query + q * p.head_dim, p.head_dim, 1};
            const Ahead ahead = {(const char*)keys[0] + s.next, (int64_t)(p.head_dim * sizeof(bf16)), sizeof(bf16)};
            if (q == 0)
                dots<4>(rows, found, x, keys, p.head_dim, ahead);
            else
                dots<0>(rows, found, x, keys, p.head_dim);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < std::min<int64_t>(TILE, s.count - key); j++) scores[(q + i) * stride + key + j] = found[i][j];
        }
    }
}

// Scores to shares of the softmax, not yet divided by their sum, which is returned.
float soften(const Paged& p, float* scores, int64_t count) {
    f32x16 best = f32x16{} - INFINITY;
    for (int64_t i = 0; i < count; i += LANES) {
        f32x16 each = load(scores + i) * p.scale;
        if (p.softcap) each = p.softcap - 2.0f * p.softcap / (1.0f + exponential(each * (2.0f / p.softcap)));
        if (count - i < LANES)
            for (int64_t j = count - i; j < LANES; j++) each[j] = -INFINITY;
        store(scores + i, each);
        best = each > best ? each : best;
    }
    const float most = largest(best);
    f32x16 total = {};
    for (int64_t i = 0; i < count; i += LANES) {
        f32x16 share = exponential(load(scores + i) - most);
        if (count - i < LANES)
            for (int64_t j = count - i; j < LANES; j++) share[j] = 0.0f;
        store(scores + i, share);
        total += share;
    }
    return sum(total);
}

// Adds the values, each by its share, to `mixed` [queries, head_dim], 16 * WIDTH elements from d on.
template <int QUERIES, int WIDTH>
inline void mix_part(const Paged& p, const Opened& s, const float* shares, int64_t stride, float* mixed, int64_t d) {
    f32x16 acc[QUERIES][WIDTH];
    for (int q = 0; q < QUERIES; q++)
        for (int i = 0; i < WIDTH; i++) acc[q][i] = load(mixed + q * p.head_dim + d + i * LANES);
    for (int64_t key = 0; key < s.count; key++) {
        f32x16 values[WIDTH];
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) {
            const bf16* part = s.rows + key * p.head_dim + d + i * LANES;
            values[i] = load(part);
            if (i % 2 == 0) __builtin_prefetch((const char*)part + s.next, 0, 3);
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; q++) {
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; i++) acc[q][i] += shares[q * stride + key] * values[i];
        }
    }
    for (int q = 0; q < QUERIES; q++)
        for (int i = 0; i < WIDTH; i++) store(mixed + q * p.head_dim + d + i * LANES, acc[q][i]);
}

template <int QUERIES>
void mix(const Paged& p, const Opened& s, const float* shares, int64_t stride, float* mixed) {
    int64_t d = 0;
    for (; d + 4 * LANES <= p.head_dim; d += 4 * LANES) mix_part<QUERIES, 4>(p, s, shares, stride, mixed, d);
    for (; d < p.head_dim; d += LANES) mix_part<QUERIES, 1>(p, s, shares, stride, mixed, d);
}

void mix(const Paged& p, int64_t queries, const Opened& s, const float* shares, int64_t stride, float* mixed) {
    int64_t q = 0;
    for (; q + 4 <= queries; q += 4) mix<4>(p, s, shares + q * stride, stride, mixed + q * p.head_dim);
    if (queries & 2) mix<2>(p, s, shares + q * stride, stride, mixed + q * p.head_dim);
    q += queries & 2;
    if (queries & 1) mix<1>(p, s, shares + q * stride, stride, mixed + q * p.head_dim);
}

void attend(const Paged& p, int64_t row, int64_t kv_head) {
    const int64_t queries = p.heads / p.kv_heads, size = p.block_size;
    const int64_t blocks = p.lasts[row] / size - p.firsts[row] / size + 1, count = p.lasts[row] - p.firsts[row] + 1;
    const int64_t stride = (count + LANES - 1) / LANES * LANES, place = (row * p.heads + kv_head * queries) * p.head_dim;
    thread_local std::vector<float> scores, mixed, totals;
    thread_local std::vector<bf16> made;
    scores.resize(queries * stride);
    mixed.assign(queries * p.head_dim, 0.0f);
    for (int64_t block = 0, at = 0; block < blocks; block++) {
        const Seen s = seen(p, row, kv_head, block);
        score(p, p.query + place, queries, opened(p, s, s.keys, made), scores.data() + at, stride);
        at += s.count;
    }
    std::vector<float>& shares = scores;
    totals.resize(queries);
    for (int64_t q = 0; q < queries; q++) totals[q] = soften(p, shares.data() + q * stride, count);
    for (int64_t block = 0, at = 0; block < blocks; block++) {
        const Seen s = seen(p, row, kv_head, block);
        mix(p, queries, opened(p, s, s.values, made), shares.data() + at, stride, mixed.data());
        at += s.count;
    }
    for (int64_t q = 0; q < queries; q++)
        for (int64_t d = 0; d < p.head_dim; d += LANES)
            store(p.out + place + q * p.head_dim + d, load(mixed.data() + q * p.head_dim + d) / totals[q]);
}

}  // namespace

// head_dim is a multiple of 16. Softmax of scale * q.k, soft-capped unless softcap is 0.
extern "C" void diptych_attend_singles(bf16* out, const bf16* query, const char* cache, const int64_t* tables, const int64_t* firsts,
                                       const int64_t* lasts, int64_t rows, int64_t table_width, int64_t heads, int64_t kv_heads,
                                       int64_t block_size, int64_t head_dim, float scale, float softcap, int64_t int8, int64_t threads) {
    const Paged paged = {out,   query,    cache,      tables,   firsts, lasts,   table_width,
                         heads, kv_heads, block_size, head_dim, scale,  softcap, (bool)int8};
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < rows * kv_heads; item++) attend(paged, item / kv_heads, item % kv_heads);
}
