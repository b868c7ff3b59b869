// Of rows the k largest, and the logarithm of the sum of all exponentials.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

struct Candidate {
    float value;
    int64_t token;

    bool operator<(const Candidate& other) const { return value != other.value ? value > other.value : token < other.token; }
};

template <typename T>
float value_of(const T* p) {
    if constexpr (sizeof(T) == 2)
        return widen(*p);
    else
        return *p;
}

template <typename T>
float largest_among(const T* x, int64_t n) {
    f32x16 tops = f32x16{} - INFINITY;
    sixteens(n, [&](int64_t i, int64_t count) {
        f32x16 each = load(x + i, count);
        for (int64_t lane = count; lane < LANES; lane++) each[lane] = -INFINITY;
        tops = each > tops ? each : tops;
    });
    return largest(tops);
}

// Of every SPAN logits the largest: k of these are as large as the k-th, so nothing below it is among the k largest of all.
template <typename T>
int64_t likeliest(float* values, int64_t* tokens, const T* x, int64_t n, int64_t k, float temperature) {
    constexpr int64_t SPAN = 64;
    std::vector<float> tops;
    for (int64_t start = 0; start < n; start += SPAN) tops.push_back(largest_among(x + start, std::min(SPAN, n - start)));
    float least = -INFINITY;
    if ((int64_t)tops.size() >= k) {
        std::vector<float> ordered = tops;
        std::nth_element(ordered.begin(), ordered.begin() + k - 1, ordered.end(), std::greater<float>());
        least = ordered[k - 1];
    }
    std::vector<Candidate> found;
    for (int64_t start = 0; start < n; start += SPAN)
        if (tops[start / SPAN] >= least)
            for (int64_t t = start; t < std::min(start + SPAN, n); t++)
                if (const float value = value_of(x + t); value >= least) found.push_back({value, t});
    const int64_t kept = std::min(k, (int64_t)found.size());
    std::partial_sort(found.begin(), found.begin() + kept, found.end());
    for (int64_t i = 0; i < kept; i++) {
        values[i] = found[i].value / temperature;
        tokens[i] = found[i].token;
    }
    return kept;
}

template <typename T>
float log_total(const T* x, int64_t n, float temperature) {
    const float most = largest_among(x, n);
    if (most == -INFINITY) return most;
    f32x16 total = {};
    sixteens(n, [&](int64_t i, int64_t count) {
        f32x16 each = exponential((load(x + i, count) - most) / temperature);
        for (int64_t lane = count; lane < LANES; lane++) each[lane] = 0.0f;
        total += each;
    });
    return most / temperature + logf(sum(total));
}

}  // namespace

// values, tokens [count, k] of rows `rows` [count] of logits, bf16 or, if `wide`, fp32, which have n each and lie `stride` apart, divided by
// temperatures [count]: the largest first, of equal ones the first. kept [count]: how many there are, fewer than k only where some are no numbers.
extern "C" void diptych_likeliest(float* values, int64_t* tokens, int64_t* kept, const void* logits, int64_t wide, int64_t n, int64_t stride,
                                  const int64_t* rows, const float* temperatures, int64_t count, int64_t k, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++)
        kept[i] = wide ? likeliest(values + i * k, tokens + i * k, (const float*)logits + rows[i] * stride, n, k, temperatures[i])
                       : likeliest(values + i * k, tokens + i * k, (const bf16*)logits + rows[i] * stride, n, k, temperatures[i]);
}

// totals [count]: of each row the log of the sum of e to the logit / temperature.
extern "C" void diptych_log_totals(float* totals, const void* logits, int64_t wide, int64_t n, int64_t stride, const int64_t* rows,
                                   const float* temperatures, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++)
        totals[i] = wide ? log_total((const float*)logits + rows[i] * stride, n, temperatures[i])
                         : log_total((const bf16*)logits + rows[i] * stride, n, temperatures[i]);
}
