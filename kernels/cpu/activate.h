// Activations of a Lane and their derivatives. Sources of the formulas: kernels/activations.py.
//
//     z sigmoid(t): gelu_tanh  t = z (A + B z^2),   silu  t = z,   quick_gelu  t = 1.702 z;   gelu  z cdf(z)
//
// The normal distribution's tail: Abramowitz & Stegun 1964, 7.1.26, to 1.5e-7, a thousandth of bfloat16's
// rounding; it shares its exponential with the density. gelu_tanh takes t at |z| <= 30, where sigmoid is exactly
// 0 or 1 already: z^2 could overflow, and 0 * inf is no derivative.

#pragma once
#include "vector.h"

enum Act { GELU_TANH = 0, SILU = 1, QUICK_GELU = 2, GELU = 3, RELU = 4, NONE = 5 };  // cpu_library.ACTIVATIONS

struct Value {
    Lane y, slope;
};

static inline Value normal(Lane z) {
    Lane x = larger(z, all(0.f) - z);
    Lane t = all(1.f) / fused(all(0.23164190f), x, all(1.f));  // 0.3275911 / sqrt(2)
    Lane p = all(1.061405429f);
    p = fused(p, t, all(-1.453152027f));
    p = fused(p, t, all(1.421413741f));
    p = fused(p, t, all(-0.284496736f));
    p = fused(p, t, all(0.254829592f));
    Lane e = exponential(all(-0.5f) * z * z);
    Lane tail = all(0.5f) * p * t * e;
    Lane cdf = where_negative(z, tail, all(1.f) - tail);
    return {z * cdf, fused(z * e, all(0.39894228040f), cdf)};
}

template <int ACT>
static inline Value activate(Lane z) {
    const float A = 1.5957691216057308f, B = 0.07135481282052264f, QUICK = 1.702f;
    if (ACT == NONE) return {z, all(1.f)};
    if (ACT == RELU) return {where_negative(z, all(0.f), z), where_negative(all(0.f) - z, all(1.f), all(0.f))};
    if (ACT == GELU) return normal(z);
    Lane t = ACT == SILU ? z : all(QUICK) * z, dt = all(ACT == SILU ? 1.f : QUICK);
    if (ACT == GELU_TANH) {
        Lane c = larger(all(-30.f), smaller(all(30.f), z)), square = c * c;
        t = c * fused(all(B), square, all(A));
        dt = fused(all(3.f * B), square, all(A));
    }
    Lane s = all(1.f) / (all(1.f) + exponential(all(0.f) - t));
    Lane y = z * s;
    return {y, fused(y * (all(1.f) - s), dt, s)};
}

#define FOR_ACTIVATION(act, function, ...)                         \
    switch (act) {                                                 \
        case GELU_TANH: function<GELU_TANH>(__VA_ARGS__); break;   \
        case SILU: function<SILU>(__VA_ARGS__); break;             \
        case QUICK_GELU: function<QUICK_GELU>(__VA_ARGS__); break; \
        case GELU: function<GELU>(__VA_ARGS__); break;             \
        case RELU: function<RELU>(__VA_ARGS__); break;             \
        default: function<NONE>(__VA_ARGS__);                      \
    }
