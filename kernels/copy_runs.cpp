// Runs of bytes from one place in memory to another.
#include <cstring>

#include "vectors.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t CACHE_LINE = 64, FETCHED_AHEAD = 2048, STREAMED = 16 << 10, NEXT = 1024;

// Past the caches, which neither end's next step wants full of it, and without first reading what is overwritten.
void stream(char* to, const char* from, int64_t length) {
#if defined(__x86_64__)
    const int64_t head = -(intptr_t)to & (CACHE_LINE - 1);
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + CACHE_LINE <= length; i += CACHE_LINE) {
        __builtin_prefetch(from + i + FETCHED_AHEAD, 0, 0);
        for (int64_t j = i; j < i + CACHE_LINE; j += 16) _mm_stream_si128((__m128i*)(to + j), _mm_loadu_si128((const __m128i*)(from + j)));
    }
    std::memcpy(to + i, from + i, length - i);
#else
    std::memcpy(to, from, length);
#endif
}

void copy_layer(const char* source, char* destination, const int64_t* runs, int64_t n, int64_t again) {
    for (int64_t r = 0; r < n; r++) {
        const char* from = source + runs[3 * r];
        char* to = destination + runs[3 * r + 1];
        const int64_t length = runs[3 * r + 2];
        if (length >= STREAMED && !again) {
            stream(to, from, length);
            continue;
        }
        if (r + 1 < n)
            for (int64_t ahead = 0; ahead < NEXT; ahead += CACHE_LINE) __builtin_prefetch(source + runs[3 * r + 3] + ahead);
        std::memcpy(to, from, length);
    }
}

}  // namespace

// pieces [k, 4]: where its layers begin, how many; where its runs begin, how many. layers [m, 2]: addresses of a source and of a
// destination. runs [n, 3], the same for each layer: from where after the source, to where after the destination, how many bytes.
// `again`: the copy is read again at once.
extern "C" void diptych_copy_runs(const int64_t* pieces, int64_t k, int64_t again) {
    for (const int64_t* piece = pieces; piece < pieces + 4 * k; piece += 4) {
        const int64_t* layers = (const int64_t*)piece[0];
        for (int64_t l = 0; l < piece[1]; l++)
            copy_layer((const char*)layers[2 * l], (char*)layers[2 * l + 1], (const int64_t*)piece[2], piece[3], again);
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
