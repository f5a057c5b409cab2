// Attention of bfloat16 heads without a mask or with a causal one, forward and backward. The formulas are those
// of kernels/attention.py; blocks of scores stay in the first-level cache, sums are float32.
//
// Forward, a block of queries: online softmax over blocks of keys. Backward, a block of keys against blocks of
// queries, both turned (keys in rows), so that P and dS are what the next products read:
//     dv += P^T dy,   dk += dS^T q,   dq^T += k^T dS^T
// A task is one key head of one batch element, with the query heads that share it: no sums across tasks.

#include "bf16_products.h"

#if FUSEKIT_LANES == 16
#include <vector>

struct Head {  // (length, features) of one head, features adjacent
    bf16* x;
    int64_t stride;
};

static Head head_of(const bf16* x, const int64_t* s, int64_t batch, int64_t head) {
    return {const_cast<bf16*>(x) + batch * s[0] + head * s[1], s[2]};
}

static int64_t blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK; }
static int64_t padded_features(int64_t features) { return (features + 15) / 16 * 16; }

struct Sizes {
    int64_t queries, keys, features, values;  // lengths, and features of q and k, and of v
    float scale;
    bool causal;
};

// One block of scores becomes probabilities, rounded to P; running maximum and total of its row. `visible` keys
// of the block count. Returns what the sums so far are to be multiplied by.
static inline float soften(const float* s, bf16* p, int64_t visible, float scale, float* top, float* total) {
    Lane tops = all(*top), sums = all(0.f), x[BLOCK / 16];
#pragma GCC unroll 4
    for (int64_t i = 0; i < BLOCK / 16; i++) {
        x[i] = load(s + 16 * i, 16) * all(scale);
        if (visible < 16 * (i + 1)) x[i] = forbid_from(visible - 16 * i, x[i]);
        tops = larger(x[i], tops);
    }
    float highest = largest(tops), base = highest == -INFINITY ? 0.f : highest;
#pragma GCC unroll 4
    for (int64_t i = 0; i < BLOCK / 16; i++) {
        Lane e = exponential(x[i] - all(base));
        sums = sums + e;
        store(p + 16 * i, e, 16);
    }
    float rescale = sum(exponential(all(*top - base))) * 0.0625f;
    *total = *total * rescale + sum(sums);
    *top = highest;
    return rescale;
}

static void forward_head(Head q, const uint32_t* k, const uint32_t* v, Head out, float* lse, const Sizes& z,
                         float* scores, bf16* p, float* acc) {
    int64_t pairs = z.features / 2, width = padded_features(z.values);
    for (int64_t m0 = 0; m0 < z.queries; m0 += BLOCK) {
        int64_t rows = least(BLOCK, z.queries - m0);
        int64_t last = z.causal ? least(m0 / BLOCK + 1, blocks(z.keys)) : blocks(z.keys);
        float top[BLOCK], total[BLOCK];
        for (int64_t m = 0; m < rows; m++) top[m] = -INFINITY, total[m] = 0.f;
        std::memset(acc, 0, rows * width * sizeof(float));
        for (int64_t j = 0; j < last; j++) {
            product(rows, BLOCK, pairs, q.x + m0 * q.stride, q.stride, k + j * pairs * BLOCK, BLOCK, scores, BLOCK, false);
            for (int64_t m = 0; m < rows; m++) {
                int64_t visible = z.keys - j * BLOCK;
                if (z.causal) visible = least(visible, m0 + m + 1 - j * BLOCK);
                float rescale = soften(scores + m * BLOCK, p + m * BLOCK, visible, z.scale, top + m, total + m);
                for (int64_t d = 0; d < width; d++) acc[m * width + d] *= rescale;
            }
            product(rows, width, BLOCK / 2, p, BLOCK, v + j * BLOCK / 2 * width, width, acc, width, true);
        }
        for (int64_t m = 0; m < rows; m++) {
            float inverse = total[m] == 0.f ? 0.f : 1.f / total[m];
            bf16* y = out.x + (m0 + m) * out.stride;
            for (int64_t d = 0; d < z.values; d++) y[d] = narrow(acc[m * width + d] * inverse);
            lse[m0 + m] = total[m] == 0.f ? INFINITY : top[m] + std::log(total[m]);
        }
    }
}

// One row (a key) of a turned block: P and dS of its queries from `from` on; zero for those before.
static inline void row_gradients(const float* scores, const float* dp, const float* lse, const float* delta,
                                 int64_t from, float scale, bf16* p, bf16* ds) {
#pragma GCC unroll 4
    for (int64_t m = 0; m < BLOCK; m += 16) {
        Lane e = zero_before(from - m, exponential(fused(load(scores + m, 16), all(scale), all(0.f) - load(lse + m, 16))));
        Lane d = zero_before(from - m, e * (load(dp + m, 16) - load(delta + m, 16)) * all(scale));
        store(p + m, e, 16);
        store(ds + m, d, 16);
    }
}

struct Packed {  // of one query head, for the backward pass
    std::vector<uint32_t> q_turned, q_pairs, dy_turned, dy_pairs;
    std::vector<float> lse, delta;
};

static void pack_queries(Packed& x, Head q, Head dy, const float* lse, const Sizes& z) {
    pack_transposed(q.x, q.stride, z.queries, z.features / 2, x.q_turned.data());
    pack_transposed(dy.x, dy.stride, z.queries, z.values / 2, x.dy_turned.data());
    pack_pairs(q.x, q.stride, z.queries, z.features, padded_features(z.features), x.q_pairs.data());
    pack_pairs(dy.x, dy.stride, z.queries, z.values, padded_features(z.values), x.dy_pairs.data());
    for (int64_t m = 0; m < blocks(z.queries) * BLOCK; m++) {
        x.delta[m] = 0.f;
        x.lse[m] = m < z.queries ? lse[m] : INFINITY;  // no probability past the last query
    }
}

struct Tile {
    float scores[BLOCK * BLOCK], dp[BLOCK * BLOCK];
    bf16 p[BLOCK * BLOCK], ds_rows[BLOCK * BLOCK];
    uint32_t ds_pairs[BLOCK / 2 * BLOCK];
};

// S and dP of a block of keys against one of queries, turned.
static void scores_and_dp(Tile& t, const Packed& x, Head k, Head v, int64_t j, int64_t i, const Sizes& z) {
    int64_t n0 = j * BLOCK, rows = least(BLOCK, z.keys - n0), qk = z.features / 2, vv = z.values / 2;
    product(rows, BLOCK, qk, k.x + n0 * k.stride, k.stride, x.q_turned.data() + i * qk * BLOCK, BLOCK, t.scores, BLOCK, false);
    product(rows, BLOCK, vv, v.x + n0 * v.stride, v.stride, x.dy_turned.data() + i * vv * BLOCK, BLOCK, t.dp, BLOCK, false);
}

// delta = rowsum(P dP). The usual rowsum(dy y) takes it from y as it was rounded, and dP - delta is a difference of
// near equals: rows of dk would be off by several roundings.
static void add_delta(Tile& t, Packed& x, Head k, Head v, int64_t j, int64_t i, const Sizes& z) {
    scores_and_dp(t, x, k, v, j, i, z);
    float *lse = x.lse.data() + i * BLOCK, *delta = x.delta.data() + i * BLOCK;
    for (int64_t n = 0; n < least(BLOCK, z.keys - j * BLOCK); n++) {
        int64_t first = z.causal ? j * BLOCK + n - i * BLOCK : 0;
        for (int64_t m = 0; m < BLOCK; m += 16) {
            Lane e = exponential(fused(load(t.scores + n * BLOCK + m, 16), all(z.scale), all(0.f) - load(lse + m, 16)));
            Lane seen = zero_before(first - m, e * load(t.dp + n * BLOCK + m, 16));  // what is not may be infinite
            store(delta + m, load(delta + m, 16) + seen, 16);
        }
    }
}

static void backward_block(Tile& t, const Packed& x, Head k, Head v, const bf16* k_turned, int64_t j, int64_t i,
                           float* dq, float* dk, float* dv, const Sizes& z) {
    int64_t n0 = j * BLOCK, rows = least(BLOCK, z.keys - n0), half = BLOCK / 2;
    int64_t wide_k = padded_features(z.features), wide_v = padded_features(z.values);
    scores_and_dp(t, x, k, v, j, i, z);
    const float *lse = x.lse.data() + i * BLOCK, *delta = x.delta.data() + i * BLOCK;
    for (int64_t n = 0; n < BLOCK; n++) {
        bf16 *p = t.p + n * BLOCK, *ds = t.ds_rows + n * BLOCK;
        if (n >= rows) {
            std::memset(p, 0, BLOCK * sizeof(bf16));
            std::memset(ds, 0, BLOCK * sizeof(bf16));
        } else {
            int64_t first = z.causal ? n0 + n - i * BLOCK : 0;  // the first query that sees this key
            row_gradients(t.scores + n * BLOCK, t.dp + n * BLOCK, lse, delta, first, z.scale, p, ds);
        }
        if (n % 2)
            for (int64_t m = 0; m < BLOCK; m++)
                t.ds_pairs[n / 2 * BLOCK + m] = uint32_t(ds[m - BLOCK]) | uint32_t(ds[m]) << 16;
    }
    product(rows, wide_v, half, t.p, BLOCK, x.dy_pairs.data() + i * half * wide_v, wide_v, dv + n0 * wide_v, wide_v, true);
    product(rows, wide_k, half, t.ds_rows, BLOCK, x.q_pairs.data() + i * half * wide_k, wide_k, dk + n0 * wide_k, wide_k, true);
    product(z.features, BLOCK, half, k_turned + j * z.features * BLOCK, BLOCK, t.ds_pairs, BLOCK, dq + i * z.features * BLOCK, BLOCK, true);
}

static void store_rows(const float* sums, int64_t width, Head out, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < columns; d += LANES)
            store(out.x + r * out.stride + d, load(sums + r * width + d, LANES), columns - d);
}

// sums lie in blocks of (columns, BLOCK): a tile of 16 rows at a time is turned in registers' reach.
static void store_turned(const float* sums, Head out, int64_t rows, int64_t columns) {
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
        for (int64_t d0 = 0; d0 < columns; d0 += 16) {
            bf16 tile[16][16];
            const float* block = sums + (r0 / BLOCK * columns + d0) * BLOCK + r0 % BLOCK;
            for (int64_t d = 0; d < least(16, columns - d0); d++) store(tile[d], load(block + d * BLOCK, 16), 16);
            for (int64_t r = 0; r < least(16, rows - r0); r++)
                for (int64_t d = 0; d < least(16, columns - d0); d++)
                    out.x[(r0 + r) * out.stride + d0 + d] = tile[d][r];
        }
}

// strides: (batch, head, row) of each tensor in turn. lse: (batch, heads, queries), contiguous.
extern "C" void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                                  const int64_t* strides, int64_t batch, int64_t heads, int64_t key_heads,
                                  int64_t queries, int64_t keys, int64_t features, int64_t values, int64_t causal,
                                  float scale, int threads) {
    Sizes z{queries, keys, features, values, scale, causal != 0};
    int64_t group = heads / key_heads, pairs = features / 2, padded = blocks(keys) * BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < batch * key_heads; task++) {
        int64_t b = task / key_heads, shared = task % key_heads;
        std::vector<uint32_t> k_packed(pairs * padded), v_packed(padded / 2 * padded_features(values));
        std::vector<float> scores(BLOCK * BLOCK), acc(BLOCK * padded_features(values));
        std::vector<bf16> p(BLOCK * BLOCK);
        Head kh = head_of(k, strides + 3, b, shared), vh = head_of(v, strides + 6, b, shared);
        pack_transposed(kh.x, kh.stride, keys, pairs, k_packed.data());
        pack_pairs(vh.x, vh.stride, keys, values, padded_features(values), v_packed.data());
        for (int64_t h = shared * group; h < (shared + 1) * group; h++)
            forward_head(head_of(q, strides, b, h), k_packed.data(), v_packed.data(), head_of(out, strides + 9, b, h),
                         lse + (b * heads + h) * queries, z, scores.data(), p.data(), acc.data());
    }
}

// strides: of q, k, v, dy, dq, dk, dv.
extern "C" void attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dy,
                                   const float* lse, bf16* dq, bf16* dk, bf16* dv, const int64_t* strides,
                                   int64_t batch, int64_t heads, int64_t key_heads, int64_t queries, int64_t keys,
                                   int64_t features, int64_t values, int64_t causal, float scale, int threads) {
    Sizes z{queries, keys, features, values, scale, causal != 0};
    int64_t group = heads / key_heads, rows = blocks(queries) * BLOCK, columns = blocks(keys) * BLOCK;
    int64_t wide_k = padded_features(features), wide_v = padded_features(values);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < batch * key_heads; task++) {
        int64_t b = task / key_heads, shared = task % key_heads;
        Packed x;
        x.q_turned.resize(features / 2 * rows), x.dy_turned.resize(values / 2 * rows);
        x.q_pairs.resize(rows / 2 * wide_k), x.dy_pairs.resize(rows / 2 * wide_v);
        x.lse.resize(rows), x.delta.resize(rows);
        std::vector<float> dk_sums(columns * wide_k), dv_sums(columns * wide_v), dq_sums(rows * features);
        std::vector<bf16> k_turned(columns * features);
        std::vector<Tile> tile(1);
        Head kh = head_of(k, strides + 3, b, shared), vh = head_of(v, strides + 6, b, shared);
        turn(kh.x, kh.stride, keys, features, k_turned.data());
        for (int64_t h = shared * group; h < (shared + 1) * group; h++) {
            pack_queries(x, head_of(q, strides, b, h), head_of(dy, strides + 9, b, h),
                         lse + (b * heads + h) * queries, z);
            for (int64_t j = 0; j < blocks(keys); j++)
                for (int64_t i = z.causal ? j : 0; i < blocks(queries); i++) add_delta(tile[0], x, kh, vh, j, i, z);
            std::memset(dq_sums.data(), 0, dq_sums.size() * sizeof(float));
            for (int64_t j = 0; j < blocks(keys); j++)
                for (int64_t i = z.causal ? j : 0; i < blocks(queries); i++)
                    backward_block(tile[0], x, kh, vh, k_turned.data(), j, i, dq_sums.data(), dk_sums.data(),
                                   dv_sums.data(), z);
            store_turned(dq_sums.data(), head_of(dq, strides + 12, b, h), queries, features);
        }
        store_rows(dk_sums.data(), wide_k, head_of(dk, strides + 15, b, shared), keys, features);
        store_rows(dv_sums.data(), wide_v, head_of(dv, strides + 18, b, shared), keys, values);
    }
}
#endif
