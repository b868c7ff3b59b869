// Blocks of an int8 cache as bf16, for attention that gathers them.
#include "int8_rows.h"

// out [n, size, head_dim]; blocks [n]: which `size` rows of the cache.
extern "C" void diptych_read_int8(bf16* out, const char* cache, const int64_t* blocks, int64_t n, int64_t size, int64_t head_dim,
                                  int64_t threads) {
    const int64_t length = row_bytes(head_dim);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < n * size; at++)
        decode_row(out + at * head_dim, cache + (blocks[at / size] * size + at % size) * length, head_dim);
}
