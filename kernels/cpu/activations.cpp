// Hidden features of mlp and gated_mlp: the activation, and its derivative with everything else that reads the
// same values, each in one pass.

#include "activate.h"

// Rows of gate (and up) with a distance between rows each, since both may lie in one packed tensor.
template <int ACT, bool GATED>
static void forward_row(const bf16* gate, const bf16* up, bf16* h, int64_t columns) {
    for (int64_t j = 0; j < columns; j += LANES) {
        int64_t left = columns - j;
        Lane y = activate<ACT>(load(gate + j, left)).y;
        store(h + j, GATED ? y * load(up + j, left) : y, left);
    }
}

static inline void add_to(float* sums, Lane x, int64_t left) { store(sums, load(sums, left) + x, left); }

// h again, and dz of the gate (and of up), whose float32 column sums become the bias gradients. h may be dh.
// A gate without up comes divided by `rescale`.
template <int ACT, bool GATED>
static void backward_row(const bf16* dh, const bf16* gate, const bf16* up, bf16* h, bf16* dgate, bf16* dup,
                         float* sum_gate, float* sum_up, float rescale, int64_t columns) {
    for (int64_t j = 0; j < columns; j += LANES) {
        int64_t left = columns - j;
        Lane z = load(gate + j, left);
        Value v = activate<ACT>(GATED ? z : all(rescale) * z);
        Lane grad = load(dh + j, left), y = v.y, dz = grad * v.slope;
        if (GATED) {
            Lane u = load(up + j, left), du = grad * v.y;
            y = v.y * u, dz = dz * u;
            store(dup + j, du, left);
            add_to(sum_up + j, du, left);
        }
        store(h + j, y, left);
        store(dgate + j, dz, left);
        add_to(sum_gate + j, dz, left);
    }
}

template <int ACT>
static void forward(const bf16* gate, const bf16* up, bf16* h, int64_t rows, int64_t columns, int64_t stride,
                    int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        if (up)
            forward_row<ACT, true>(gate + i * stride, up + i * stride, h + i * columns, columns);
        else
            forward_row<ACT, false>(gate + i * stride, nullptr, h + i * columns, columns);
    }
}

// A fixed number of parts, whatever the threads: sums come out the same.
template <int ACT>
static void backward(const bf16* dh, const bf16* gate, const bf16* up, bf16* h, bf16* dgate, bf16* dup,
                     float* sums_gate, float* sums_up, int64_t rows, int64_t columns, int64_t stride,
                     float rescale, int64_t parts, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        float *sum_gate = sums_gate + part * columns, *sum_up = sums_up ? sums_up + part * columns : nullptr;
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++) {
            int64_t at = i * stride, dense = i * columns;
            if (up)
                backward_row<ACT, true>(dh + dense, gate + at, up + at, h + dense, dgate + at, dup + at, sum_gate,
                                        sum_up, rescale, columns);
            else
                backward_row<ACT, false>(dh + dense, gate + at, nullptr, h + dense, dgate + at, nullptr, sum_gate,
                                         nullptr, rescale, columns);
        }
    }
}

extern "C" void hidden_forward(int64_t act, const bf16* gate, const bf16* up, bf16* h, int64_t rows, int64_t columns,
                               int64_t stride, int threads) {
    FOR_ACTIVATION(act, forward, gate, up, h, rows, columns, stride, threads)
}

extern "C" void hidden_backward(int64_t act, const bf16* dh, const bf16* gate, const bf16* up, bf16* h, bf16* dgate,
                                bf16* dup, float* sums_gate, float* sums_up, int64_t rows, int64_t columns,
                                int64_t stride, float rescale, int64_t parts, int threads) {
    FOR_ACTIVATION(act, backward, dh, gate, up, h, dgate, dup, sums_gate, sums_up, rows, columns, stride, rescale,
                   parts, threads)
}
