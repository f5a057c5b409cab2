// Linear layers of bfloat16 whose epilogue wants the float32 sums: activation, residual, softmax.
//
//     z = x W^T + bias,   y = act(z) + residual,   each rounded once
//
// W is packed first, blocks of 64 rows of it; a block of it and one of x meet in a tile of sums that stays in
// the first-level cache, where the epilogue finds them.

#include "activate.h"
#include "bf16_products.h"

#if FUSEKIT_LANES == 16
#include <memory>

static const int64_t PAIRS = 96;  // summed at a time: such a block of W is 24 KiB

using Words = std::unique_ptr<uint32_t[]>;  // not initialised: all of it is written

static Words packed(const bf16* w, int64_t stride, int64_t rows, int64_t pairs, int threads) {
    int64_t count = (rows + BLOCK - 1) / BLOCK;
    Words out(new uint32_t[count * pairs * BLOCK]);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < count; n++)
        pack_transposed(w + n * BLOCK * stride, stride, least(BLOCK, rows - n * BLOCK), pairs, out.get() + n * pairs * BLOCK);
    return out;
}

// rows of x times a packed block of W, to sums (rows, BLOCK) whose rows lie `width` apart.
static void block_sums(const bf16* x, int64_t stride, int64_t rows, const uint32_t* w, int64_t pairs, float* sums,
                       int64_t width) {
    for (int64_t k = 0; k < pairs; k += PAIRS)
        product(rows, BLOCK, least(PAIRS, pairs - k), x + 2 * k, stride, w + k * BLOCK, BLOCK, sums, width, k > 0);
}

struct Epilogue {
    const float* bias;
    const bf16* residual;
    int64_t residual_stride;
    bf16 *y, *z;
    float z_scale;
    int64_t features;
};

template <int ACT>
static void finish(const float* sums, const Epilogue& e, int64_t m0, int64_t n0, int64_t rows) {
    int64_t columns = least(BLOCK, e.features - n0);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            int64_t left = columns - c, at = (m0 + r) * e.features + n0 + c;
            Lane z = load(sums + r * BLOCK + c, LANES);
            if (e.bias) z = z + load(e.bias + n0 + c, left);
            if (e.z) store(e.z + at, all(e.z_scale) * z, left);
            Lane y = activate<ACT>(z).y;
            if (e.residual) y = y + load(e.residual + (m0 + r) * e.residual_stride + n0 + c, left);
            store(e.y + at, y, left);
        }
}

// y, z (or null; z_scale times it): (rows, features), dense. bias (or null): float32. residual: (rows, features) or null.
extern "C" void linear_forward(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, const float* bias,
                               const bf16* residual, int64_t residual_stride, int64_t act, bf16* y, bf16* z,
                               float z_scale, int64_t rows, int64_t features, int64_t inputs, int threads) {
    int64_t pairs = inputs / 2, count = (features + BLOCK - 1) / BLOCK, row_blocks = (rows + BLOCK - 1) / BLOCK;
    Words words = packed(w, w_stride, features, pairs, threads);
    Epilogue e{bias, residual, residual_stride, y, z, z_scale, features};
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t m = 0; m < row_blocks; m++)
        for (int64_t n = 0; n < count; n++) {
            alignas(64) float sums[BLOCK * BLOCK];
            int64_t m0 = m * BLOCK, here = least(BLOCK, rows - m0);
            block_sums(x + m0 * x_stride, x_stride, here, words.get() + n * pairs * BLOCK, pairs, sums, BLOCK);
            FOR_ACTIVATION(act, finish, sums, e, m0, n * BLOCK, here)
        }
}

// Softmax and cross entropy of a row of float32 logits with their bias added: its loss, and in dz the gradient of
// `share` times the loss. The target's, p - (1 - smoothing), has its p rounded away: `rest` is what it lost.
static void soften(const float* z, int64_t classes, int64_t target, float smoothing, float share, float* loss,
                   bf16* dz, float* rest) {
    // A NaN is not larger than anything; it comes back through the sums, in the loss and in every gradient.
    Lane tops = all(-INFINITY), exps = all(0.f), plains = all(0.f);
    int64_t whole = classes / LANES * LANES, left = classes - whole;
    for (int64_t j = 0; j < whole; j += LANES) tops = larger(load(z + j, LANES), tops);
    if (left) tops = larger(forbid_from(left, load(z + whole, left)), tops);
    float top = largest(tops), spread = smoothing / float(classes);
    for (int64_t j = 0; j < classes; j += LANES) {
        Lane x = load(z + j, classes - j);
        exps = exps + exponential(forbid_from(classes - j, x - all(top)));
        plains = plains + x;
    }
    float total = sum(exps);
    // Without smoothing the sum of logits must not count: 0 * inf is NaN where a class is ruled out by -inf.
    *loss = std::log(total) + top - (1.f - smoothing) * z[target] - (smoothing > 0.f ? spread * sum(plains) : 0.f);
    if (!dz) return;
    Lane inverse = all(share / total), shift = all(-share * spread);
    for (int64_t j = 0; j < classes; j += LANES)
        store(dz + j, fused(exponential(load(z + j, classes - j) - all(top)), inverse, shift), classes - j);
    float exact = share * (std::exp(z[target] - top) / total - spread - (1.f - smoothing));
    dz[target] = narrow(exact);
    *rest = exact - widen(dz[target]);
}

// Losses of x W^T + bias, and, where dz is not null, dz (rows, classes) and rests. A row that does not count gets
// zeros.
extern "C" void linear_softmax(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, const float* bias,
                               const int64_t* targets, const uint8_t* counts, float smoothing, float share,
                               float* losses, bf16* dz, float* rests, int64_t rows, int64_t classes, int64_t inputs, int threads) {
    int64_t pairs = inputs / 2, count = (classes + BLOCK - 1) / BLOCK, width = count * BLOCK;
    Words words = packed(w, w_stride, classes, pairs, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t m0 = 0; m0 < rows; m0 += BLOCK) {
        int64_t here = least(BLOCK, rows - m0);
        std::unique_ptr<float[]> z(new float[here * width]);
        for (int64_t n = 0; n < count; n++)
            block_sums(x + m0 * x_stride, x_stride, here, words.get() + n * pairs * BLOCK, pairs, z.get() + n * BLOCK, width);
        for (int64_t r = 0; r < here; r++) {
            int64_t m = m0 + r;
            bf16* row = dz ? dz + m * classes : nullptr;
            if (counts[m]) {
                for (int64_t j = 0; bias && j < classes; j += LANES)
                    store(z.get() + r * width + j, load(z.get() + r * width + j, LANES) + load(bias + j, classes - j), LANES);
                soften(z.get() + r * width, classes, targets[m], smoothing, share, losses + m, row, rests + m);
            } else {
                losses[m] = 0.f;
                if (row) std::memset(row, 0, classes * sizeof(bf16)), rests[m] = 0.f;
            }
        }
    }
}
#endif

extern "C" int has_products() { return FUSEKIT_LANES == 16; }
