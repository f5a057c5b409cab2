// Backward pass of LayerNorm and RMSNorm over bfloat16 rows, one visit of each row. With a the normalised row and
// g = dy * scale, as in kernels/add_layer_norm.py and kernels/add_rms_norm.py:
//
//     dx = dh + rstd (g - mean(g) - a mean(g a)),   dweight = sum over rows of dy a,   dbias = sum of dy
//
// RMSNorm has no mean(g), and its rows have no mean.

#include "vector.h"

struct Row {
    const bf16 *dy, *h, *dh;
    float mean, rstd;
};

template <bool CENTRED>
static void row_backward(const Row& r, const float* scale, bf16* dx, float* dweight, float* dbias, int64_t N) {
    Lane of_g = all(0.f), of_ga = all(0.f), mean = all(r.mean), rstd = all(r.rstd);
    for (int64_t j = 0; j < N; j += LANES) {
        int64_t left = N - j;
        Lane dy = load(r.dy + j, left), g = dy * load(scale + j, left);
        Lane a = (load(r.h + j, left) - mean) * rstd;
        of_g = of_g + g;
        of_ga = fused(g, a, of_ga);  // past the row's end g is zero
        if (dweight) store(dweight + j, fused(dy, a, load(dweight + j, left)), left);
        if (dbias) store(dbias + j, dy + load(dbias + j, left), left);
    }
    if (!dx) return;
    Lane mean_g = all(CENTRED ? sum(of_g) / float(N) : 0.f), mean_ga = all(sum(of_ga) / float(N));
    for (int64_t j = 0; j < N; j += LANES) {
        int64_t left = N - j;
        Lane g = load(r.dy + j, left) * load(scale + j, left);
        Lane a = (load(r.h + j, left) - mean) * rstd;
        Lane d = rstd * (g - mean_g - a * mean_ga);
        store(dx + j, r.dh ? d + load(r.dh + j, left) : d, left);
    }
}

// dy, h, dx and dh (the latter two or null): (rows, N), dense. mean: null for RMSNorm. dweight, dbias (or null):
// zeros (parts, N), a fixed number of parts, so that the sums do not depend on the threads.
extern "C" void norm_backward(const bf16* dy, const bf16* dh, const bf16* h, const float* mean, const float* rstd,
                              const float* scale, bf16* dx, float* dweight, float* dbias, int64_t rows, int64_t N,
                              int64_t parts, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        float *to_weight = dweight ? dweight + part * N : nullptr, *to_bias = dbias ? dbias + part * N : nullptr;
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++) {
            Row r{dy + i * N, h + i * N, dh ? dh + i * N : nullptr, mean ? mean[i] : 0.f, rstd[i]};
            bf16* out = dx ? dx + i * N : nullptr;
            if (mean)
                row_backward<true>(r, scale, out, to_weight, to_bias, N);
            else
                row_backward<false>(r, scale, out, to_weight, to_bias, N);
        }
    }
}
