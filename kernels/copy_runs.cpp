// Runs of bytes from one place in memory to another.
#include <algorithm>
#include <cstring>

#include "vectors.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

typedef std::uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int64_t CACHE_LINE = 64, FETCHED_AHEAD = 2048, STREAMED = 16 << 10, NEXT = 1024;
constexpr int64_t PART = 16 << 10, ROW = 4096, ROW_WORDS = ROW / 8;  // a part and its sums are in the nearest cache together

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

// The `length` bytes at `place` as a table of 64-bit words, ROW bytes a row: the sum of each column and of each row, from the first row on.
struct Sums {
    const char* place;
    int64_t length;
    std::uint64_t *columns, *rows;
    int64_t done;

    void add(const char* row) {
        u64x8 total = {};
        for (int64_t i = 0; i < ROW_WORDS; i += 8) {
            const u64x8 words = load_as<u64x8>(row + 8 * i), column = load_as<u64x8>(columns + i) + words;
            std::memcpy(columns + i, &column, sizeof column);
            total += words;
        }
        rows[done++] = total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
    }

    // Of all rows that end before `end`.
    void until(int64_t end) {
        for (end = std::min(end, length); (done + 1) * ROW <= end;) add(place + done * ROW);
    }

    // Of those that are left, the last perhaps as if zeros followed.
    void finish() {
        until(length);
        if (done * ROW >= length) return;
        char last[ROW] = {};
        std::memcpy(last, place + done * ROW, length - done * ROW);
        add(last);
    }

    void copy(char* to, const char* from, int64_t length, bool past, bool again) {
        for (int64_t at = 0; at < length; at += PART) {
            const int64_t part = std::min(PART, length - at);
            if (!again) until(from + at + part + ROW - place);
            past ? stream(to + at, from + at, part) : (void)std::memcpy(to + at, from + at, part);
            if (again) until(to + at + part - place);
        }
    }
};

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

// layers, runs and `again` as above. `place`, `length` bytes long, is where all runs end, each behind the one before it (`again`), or
// where all begin. sums [ROW_WORDS + rows]: of its columns, then of its rows.
extern "C" void diptych_copy_summed(const int64_t* layers, int64_t m, const int64_t* runs, int64_t n, int64_t again, const char* place,
                                    int64_t length, std::uint64_t* sums) {
    std::memset(sums, 0, ROW);
    Sums summed{place, length, sums, sums + ROW_WORDS, 0};
    for (const int64_t* layer = layers; layer < layers + 2 * m; layer += 2)
        for (const int64_t* run = runs; run < runs + 3 * n; run += 3)
            summed.copy((char*)layer[1] + run[1], (const char*)layer[0] + run[0], run[2], !again && run[2] >= STREAMED, again);
    summed.finish();
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
