// Column sums of bfloat16 in float32: bias gradients whose rounding waits for something else to be added.

#include "vector.h"

static const int64_t LANES_AT_ONCE = 16;  // of columns, whose sums stay in registers over all rows

// x: rows `stride` apart; sums: (columns). A column is added up in the order of its rows, whatever the threads.
extern "C" void column_sums(const bf16* x, int64_t stride, float* sums, int64_t rows, int64_t columns, int threads) {
    const int64_t width = LANES_AT_ONCE * LANES, blocks = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        Lane total[LANES_AT_ONCE];
        for (int64_t k = 0; k < LANES_AT_ONCE; k++) total[k] = all(0.f);
        int64_t j0 = b * width, lanes = (columns - j0 + LANES - 1) / LANES;
        if (lanes > LANES_AT_ONCE) lanes = LANES_AT_ONCE;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < lanes; k++)
                total[k] = total[k] + load(x + i * stride + j0 + k * LANES, columns - j0 - k * LANES);
        for (int64_t k = 0; k < lanes; k++) store(sums + j0 + k * LANES, total[k], columns - j0 - k * LANES);
    }
}
