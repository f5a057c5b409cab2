// What the CPU kernels share: bfloat16 as bits, and a Lane, the float32 values that one instruction takes.
//
// Everything computes in float32 and rounds once, to nearest even, when it stores. A Lane is 16 values where the
// processor has AVX512-BF16, one elsewhere. Ends of rows: `left` values are there, the others read as zero.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

static inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return bf16((bits >> 16) | 0x40);  // rounding could make it an infinity
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FUSEKIT_LANES 16
#include <immintrin.h>

using Lane = __m512;

static inline __mmask16 first(int64_t left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1); }
static inline Lane all(float x) { return _mm512_set1_ps(x); }
static inline Lane load(const float* p, int64_t left) {
    return left >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(left), p);
}
static inline Lane load(const bf16* p, int64_t left) {
    __m256i bits = left >= 16 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(left), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void store(float* p, Lane x, int64_t left) {
    left >= 16 ? _mm512_storeu_ps(p, x) : _mm512_mask_storeu_ps(p, first(left), x);
}
static inline void store(bf16* p, Lane x, int64_t left) {
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    left >= 16 ? _mm256_storeu_si256((__m256i*)p, bits) : _mm256_mask_storeu_epi16(p, first(left), bits);
}
// Of a NaN and a number these give the second argument.
static inline Lane smaller(Lane a, Lane b) { return _mm512_min_ps(a, b); }
static inline Lane larger(Lane a, Lane b) { return _mm512_max_ps(a, b); }
static inline Lane where_negative(Lane x, Lane yes, Lane no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), no, yes);
}
static inline __mmask16 before(int64_t end) { return end <= 0 ? __mmask16(0) : first(end); }
static inline Lane zero_before(int64_t end, Lane x) { return _mm512_maskz_mov_ps(~before(end), x); }
static inline Lane forbid_from(int64_t start, Lane x) { return _mm512_mask_blend_ps(before(start), all(-INFINITY), x); }
static inline float sum(Lane x) { return _mm512_reduce_add_ps(x); }
static inline float largest(Lane x) { return _mm512_reduce_max_ps(x); }
static inline Lane nearest(Lane x) { return _mm512_roundscale_ps(x, 0); }
static inline Lane times_power_of_two(Lane x, Lane n) { return _mm512_scalef_ps(x, n); }
static inline Lane fused(Lane a, Lane b, Lane c) { return _mm512_fmadd_ps(a, b, c); }
#else
#define FUSEKIT_LANES 1

using Lane = float;

static inline Lane all(float x) { return x; }
static inline Lane load(const float* p, int64_t) { return *p; }
static inline Lane load(const bf16* p, int64_t) { return widen(*p); }
static inline void store(float* p, Lane x, int64_t) { *p = x; }
static inline void store(bf16* p, Lane x, int64_t) { *p = narrow(x); }
static inline Lane smaller(Lane a, Lane b) { return a < b ? a : b; }
static inline Lane larger(Lane a, Lane b) { return a > b ? a : b; }
static inline Lane where_negative(Lane x, Lane yes, Lane no) { return x < 0.f ? yes : no; }
static inline float sum(Lane x) { return x; }
static inline float largest(Lane x) { return x; }
static inline Lane nearest(Lane x) { return std::nearbyint(x); }
static inline Lane times_power_of_two(Lane x, Lane n) { return std::ldexp(x, int(n)); }
static inline Lane fused(Lane a, Lane b, Lane c) { return a * b + c; }
#endif

static const int64_t LANES = FUSEKIT_LANES;

// exp(x), relative error below 2e-7 (tests/test_cpu_library.py): inf from 88.73 on, zero from -104 on, NaN of NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two parts; the polynomial is Cephes' expf.
static inline Lane exponential(Lane x) {
    x = larger(all(-104.f), smaller(all(89.f), x));
    Lane n = nearest(x * all(1.44269504089f));
    Lane r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    Lane p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    return times_power_of_two(fused(p * r, r, r + all(1.f)), n);
}
