// From the output of the qkv product to rotated queries and stored keys and values: the norms of queries and keys, the rotation and the
// copy into the paged cache, in one pass. bf16 in and out, fp32 in between, rounded where the torch twin rounds.
#include "int8_rows.h"
#include "vectors.h"

namespace {

struct Heads {
    int64_t heads, kv_heads, head_dim, block_size;
    float eps;
};

// `head` has room for 15 more.
void norm(float* head, const float* weight, int64_t n, float eps) {
    f32x16 squares = {};
    sixteens(n, [&](int64_t i, int64_t count) {
        f32x16 each = load(head + i, count);
        squares += each * each;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    sixteens(n, [&](int64_t i, int64_t count) { store(head + i, rounded(load(head + i, count) * scale * load(weight + i, count))); });
}

// One head of a query or key, [head_dim]: normed if there is a weight, turned if there are angles.
void turn(bf16* out, const bf16* in, const float* weight, const float* cos, const float* sin, int64_t n, float eps) {
    float head[1024 + LANES];
    sixteens(n, [&](int64_t i, int64_t count) { store(head + i, load(in + i, count)); });
    if (weight) norm(head, weight, n, eps);
    if (!cos) {
        sixteens(n, [&](int64_t i, int64_t count) { store(out + i, load(head + i, count), count); });
        return;
    }
    const int64_t half = n / 2;
    sixteens(half, [&](int64_t i, int64_t count) {
        f32x16 left = load(head + i, count), right = load(head + half + i, count), c = load(cos + i, count), s = load(sin + i, count);
        store(out + i, left * c - right * s, count);
        store(out + half + i, right * c + left * s, count);
    });
}

}  // namespace

// queries [tokens, heads, head_dim]; qkv [tokens, heads + 2 * kv_heads, head_dim], rows qkv_stride apart; qk_norm fp32 [heads + kv_heads,
// head_dim] or null; cos, sin fp32 [tokens, head_dim / 2] or null. rows [tokens, kv_heads]: the key's row of the cache, bf16 or, if `int8`,
// as in int8_rows.h; the value's is block_size further. head_dim <= 1024.
extern "C" void diptych_rotary_store(bf16* queries, char* cache, const bf16* qkv, int64_t qkv_stride, const float* qk_norm,
                                     const float* cos, const float* sin, const int64_t* rows, int64_t tokens, int64_t heads,
                                     int64_t kv_heads, int64_t head_dim, int64_t block_size, float eps, int64_t int8, int64_t threads) {
    const int64_t n = head_dim, row = int8 ? row_bytes(n) : n * sizeof(bf16);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const bf16* in = qkv + t * qkv_stride;
        const float* c = cos ? cos + t * (n / 2) : nullptr;
        const float* s = sin ? sin + t * (n / 2) : nullptr;
        const bf16* values = in + (heads + kv_heads) * n;
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            char* key = h < heads ? nullptr : cache + rows[t * kv_heads + h - heads] * row;
            bf16 turned[1024];
            bf16* out = !key ? queries + (t * heads + h) * n : int8 ? turned : (bf16*)key;
            turn(out, in + h * n, qk_norm ? qk_norm + h * n : nullptr, c, s, n, eps);
            if (key && int8) encode_row(key, turned, n);
        }
        for (int64_t h = 0; h < kv_heads; h++) {
            char* value = cache + (rows[t * kv_heads + h] + block_size) * row;
            if (int8)
                encode_row(value, values + h * n, n);
            else
                std::memcpy(value, values + h * n, row);
        }
    }
}
