// Products of small bfloat16 tiles with float32 sums, by AVX512-BF16's dot products of pairs.
//
//     C (rows, columns) [+]= A (rows, 2 pairs) B (2 pairs, columns)
//
// A lies in rows, two neighbours read as one 32-bit word; B is packed so that a word holds two values that
// follow each other along the summed dimension. What one product writes, the next may read as its A.

#pragma once
#include "vector.h"

#if FUSEKIT_LANES == 16

static const int64_t BLOCK = 64;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <int R, int Z>
static inline void tile(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                        int64_t pairs, bool add) {
    __m512 sums[R][Z];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int z = 0; z < Z; z++) sums[r][z] = add ? _mm512_loadu_ps(c + r * ldc + 16 * z) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh column[Z];
#pragma GCC unroll 8
        for (int z = 0; z < Z; z++) column[z] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * z);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * lda + 2 * k, 4);
            __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int z = 0; z < Z; z++) sums[r][z] = _mm512_dpbf16_ps(sums[r][z], row, column[z]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int z = 0; z < Z; z++) _mm512_storeu_ps(c + r * ldc + 16 * z, sums[r][z]);
}

template <int Z>
static void columns_of(int64_t rows, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                       int64_t ldc, int64_t pairs, bool add) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) tile<4, Z>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, pairs, add);
    for (; r < rows; r++) tile<1, Z>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, pairs, add);
}

// columns: a multiple of 16.
static void product(int64_t rows, int64_t columns, int64_t pairs, const bf16* a, int64_t lda, const uint32_t* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t n = 0;
    for (; n + 64 <= columns; n += 64) columns_of<4>(rows, a, lda, b + n, ldb, c + n, ldc, pairs, add);
    if (columns - n >= 32) columns_of<2>(rows, a, lda, b + n, ldb, c + n, ldc, pairs, add), n += 32;
    if (columns - n >= 16) columns_of<1>(rows, a, lda, b + n, ldb, c + n, ldc, pairs, add);
}

// x (rows, 2 pairs) as B of a product that sums over its columns: blocks of (pairs, BLOCK), zero past the rows.
static void pack_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t pairs, uint32_t* out) {
    for (int64_t first = 0; first < rows; first += BLOCK, out += pairs * BLOCK)
        for (int64_t k = 0; k < pairs; k++)
            for (int64_t r = 0; r < BLOCK; r++) {
                uint32_t word = 0;
                if (first + r < rows) std::memcpy(&word, x + (first + r) * stride + 2 * k, 4);
                out[k * BLOCK + r] = word;
            }
}

// x (rows, columns) as B of a product that sums over its rows: (padded rows / 2, width), zero past the edges.
static void pack_pairs(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, uint32_t* out) {
    int64_t padded = (rows + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t r = 0; r < padded; r += 2, out += width) {
        const bf16 *even = x + r * stride, *odd = even + stride;
        if (r + 1 < rows)
            for (int64_t d = 0; d < columns; d++) out[d] = uint32_t(even[d]) | uint32_t(odd[d]) << 16;
        else if (r < rows)
            for (int64_t d = 0; d < columns; d++) out[d] = even[d];
        else
            std::memset(out, 0, width * sizeof(uint32_t));
        if (r < rows) std::memset(out + columns, 0, (width - columns) * sizeof(uint32_t));
    }
}

// x (rows, columns) turned: blocks of (columns, BLOCK), zero past the rows.
static void turn(const bf16* x, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
    for (int64_t first = 0; first < rows; first += BLOCK, out += columns * BLOCK)
        for (int64_t d = 0; d < columns; d++)
            for (int64_t r = 0; r < BLOCK; r++)
                out[d * BLOCK + r] = first + r < rows ? x[(first + r) * stride + d] : bf16(0);
}
#endif
