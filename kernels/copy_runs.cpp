// Runs of bytes from one place in memory to another.
#include <algorithm>
#include <cstring>

#include "vectors.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

typedef std::uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int64_t CACHE_LINE = 64, FETCHED_AHEAD = 8192, STREAMED = 16 << 10, NEXT = 1024;
constexpr int64_t PART = 16 << 10, ROW = 4096, ROW_WORDS = ROW / 8;  // a part and its sums are in the nearest cache together

// A cache line to where one begins, past the caches.
inline void put_past(char* to, u64x8 line) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)line);
#elif defined(__x86_64__)
    for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i*)to + i, _mm_set_epi64x(line[2 * i + 1], line[2 * i]));
#else
    std::memcpy(to, &line, sizeof line);
#endif
}

// A run that is copied: `next` is where the one behind it is read from.
struct Run {
    char* to;
    const char* from;
    int64_t length;
    const char* next;

    // Ask memory for what is read FETCHED_AHEAD bytes after `at`. Into the second cache: with the hint that bypasses it (NTA) the copy
    // takes twice as long on a Sapphire Rapids as without asking.
    void ask(int64_t at) const {
        const int64_t then = at + FETCHED_AHEAD;
        __builtin_prefetch(then < length ? from + then : next + (then - length), 0, 2);
    }
};

// Past the caches, which neither end's next step wants full of it, and without first reading what is overwritten.
void stream(const Run& run) {
    int64_t i = std::min(-(intptr_t)run.to & (CACHE_LINE - 1), run.length);
    std::memcpy(run.to, run.from, i);
    for (; i + CACHE_LINE <= run.length; i += CACHE_LINE) {
        run.ask(i);
        put_past(run.to + i, load_as<u64x8>(run.from + i));
    }
    std::memcpy(run.to + i, run.from + i, run.length - i);
}

// The run at `run`, one of those before `end`, of the layer that begins at `source` and at `destination`.
Run placed(const char* source, char* destination, const int64_t* run, const int64_t* end) {
    const char* from = source + run[0];
    return {destination + run[1], from, run[2], run + 3 < end ? source + run[3] : from};
}

void copy_layer(const char* source, char* destination, const int64_t* runs, int64_t n, int64_t again) {
    const int64_t* end = runs + 3 * n;
    for (; runs < end; runs += 3) {
        const Run run = placed(source, destination, runs, end);
        if (run.length >= STREAMED && !again) {
            stream(run);
            continue;
        }
        if (runs + 3 < end)
            for (int64_t ahead = 0; ahead < NEXT; ahead += CACHE_LINE) __builtin_prefetch(run.next + ahead);
        std::memcpy(run.to, run.from, run.length);
    }
}

// The `length` bytes at `place` as a table of 64-bit words, ROW bytes a row: the sum of each column and of each row, from the first row on.
struct Sums {
    const char* place;
    int64_t length;
    std::uint64_t *columns, *rows;
    int64_t done;

    // Meanwhile memory is asked for the row at `ahead`.
    void add(const char* row, const char* ahead) {
        each_line([&](int64_t i) {
            __builtin_prefetch(ahead + i, 0, 2);
            return load_as<u64x8>(row + i);
        });
    }

    // The row of `run` that is `at` behind its beginning, copied past the caches.
    void add_copied(const Run& run, int64_t at) {
        each_line([&](int64_t i) {
            run.ask(at + i);
            const u64x8 words = load_as<u64x8>(run.from + at + i);
            put_past(run.to + at + i, words);
            return words;
        });
    }

    template <typename Line>
    void each_line(Line line) {
        u64x8 total = {};
        for (int64_t i = 0; i < ROW; i += CACHE_LINE) {
            const u64x8 words = line(i), column = load_as<u64x8>((const char*)columns + i) + words;
            std::memcpy((char*)columns + i, &column, sizeof column);
            total += words;
        }
        rows[done++] = total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
    }

    // Of all rows that end before `end`, and ask memory for as many bytes at `ahead`.
    void until(int64_t end, const char* ahead) {
        for (end = std::min(end, length); (done + 1) * ROW <= end; ahead += ROW) add(place + done * ROW, ahead);
    }

    // Of those that are left, the last perhaps as if zeros followed.
    void finish() {
        until(length, place + length);
        if (done * ROW >= length) return;
        char last[ROW] = {};
        std::memcpy(last, place + done * ROW, length - done * ROW);
        add(last, last);
    }

    // A run that begins what is not added up yet, copied past the caches with the sums of its whole rows. How much of it that is.
    int64_t copy_rows(const Run& run, bool packed) {
        int64_t at = 0;
        if ((intptr_t)run.to % CACHE_LINE == 0 && (packed ? run.to : run.from) == place + done * ROW)
            for (; at + ROW <= run.length; at += ROW) add_copied(run, at);
        return at;
    }

    // By rows where they allow it; else part by part, added up while it is in the nearest cache. Also what is `packed`, to be read
    // again, goes past the caches then: who sends it comes to it on another core, 16 to 64 MiB later, and to write it there costs a third.
    void copy(const Run& run, bool packed) {
        const bool large = run.length >= STREAMED;
        for (int64_t at = large ? copy_rows(run, packed) : 0; at < run.length; at += PART) {
            const int64_t part = std::min(PART, run.length - at);
            const char* ahead = at + part < run.length ? run.from + at + part : run.next;
            if (!packed) until(run.from + at + part + ROW - place, ahead);
            if (large && !packed)
                stream({run.to + at, run.from + at, part, ahead});
            else
                std::memcpy(run.to + at, run.from + at, part);
            if (packed) until(run.to + at + part - place, ahead);
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

// layers and runs as above. `place`, `length` bytes long, is where all runs end, each behind the one before it (`packed`), or where all
// begin. sums [ROW_WORDS + rows]: of its columns, then of its rows.
extern "C" void diptych_copy_summed(const int64_t* layers, int64_t m, const int64_t* runs, int64_t n, int64_t packed, const char* place,
                                    int64_t length, std::uint64_t* sums) {
    std::memset(sums, 0, ROW);
    Sums summed{place, length, sums, sums + ROW_WORDS, 0};
    for (const int64_t* layer = layers; layer < layers + 2 * m; layer += 2)
        for (const int64_t *run = runs, *end = runs + 3 * n; run < end; run += 3)
            summed.copy(placed((const char*)layer[0], (char*)layer[1], run, end), packed);
    summed.finish();
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
