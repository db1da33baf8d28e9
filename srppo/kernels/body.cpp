// What stands between the matrix products of a body, for fp32 on CPUs, built by native.py with native.cpp: RMSNorm, the
// gate of a SwiGLU, rotary position embedding, and their gradients. Each reads its inputs once and writes its results.
//
// A row is summed in an order of its own, and a weight's gradient in blocks of rows of fixed size, one after the other:
// bits depend neither on other rows nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 64;      // rows whose share of a weight's gradient one thread adds up
constexpr int64_t CHUNK = 16384;  // numbers of a gate at a time

// Up to WIDTH numbers; the lanes behind them are 0.
inline V load(const float* p, int64_t count) {
    if (count >= WIDTH) return load(p);
    V x = {};
    std::memcpy(&x, p, count * sizeof(float));
    return x;
}

inline void store(float* p, V x, int64_t count) {
    if (count >= WIDTH)
        store(p, x);
    else
        std::memcpy(p, &x, count * sizeof(float));
}

inline float total(V x) {
    for (int width = WIDTH / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] += x[lane + width];
    return x[0];
}

// The sum of term(i, how many numbers from i on) over a row, in two chains.
template <class Term>
inline float row_sum(int64_t D, const Term& term) {
    V sum = {}, sum2 = {};
    for (int64_t i = 0; i < D; i += 2 * WIDTH) {
        sum += term(i, D - i);
        if (i + WIDTH < D) sum2 += term(i + WIDTH, D - i - WIDTH);
    }
    return total(sum + sum2);
}

void norm_row(const float* x, const float* weight, float* out, float* inverse, int64_t D, float eps) {
    const float squares = row_sum(D, [&](int64_t i, int64_t count) {
        const V v = load(x + i, count);
        return v * v;
    });
    *inverse = 1.0f / std::sqrt(squares / float(D) + eps);
    for (int64_t i = 0; i < D; i += WIDTH)
        store(out + i, load(weight + i, D - i) * (load(x + i, D - i) * *inverse), D - i);
}

// With n = x / rms: d x = (g w - n mean(g w n)) / rms, and g n is added to d weight, where that is asked for.
void norm_gradient_row(const float* grad, const float* x, const float* weight, float inverse, float* d_x,
                       float* d_weight, int64_t D) {
    const float mean = row_sum(D, [&](int64_t i, int64_t count) {
        return load(grad + i, count) * load(weight + i, count) * (load(x + i, count) * inverse);
    }) / float(D);
    for (int64_t i = 0; i < D; i += WIDTH) {
        const V g = load(grad + i, D - i), n = load(x + i, D - i) * inverse;
        store(d_x + i, (g * load(weight + i, D - i) - n * mean) * inverse, D - i);
        if (d_weight) store(d_weight + i, load(d_weight + i, D - i) + g * n, D - i);
    }
}

struct Sigmoid {
    V of, rest;  // sigmoid(x) and 1 - sigmoid(x), neither by cancellation
    explicit Sigmoid(V x) {
        const V small = exp_negative(x < V{} ? x : -x), scale = all(1.0f) / (all(1.0f) + small);
        of = x < V{} ? small * scale : scale;
        rest = x < V{} ? scale : small * scale;
    }
};

inline void rotate_row(const float* x, const float* cos, const float* sin, float* out, int64_t half, bool transposed) {
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t j = i + half, count = half - i;
        const V a = load(x + i, count), b = load(x + j, count);
        const V s = load(sin + i, count), s2 = load(sin + j, count);
        const V across = transposed ? b * s2 : -b * s, back = transposed ? -a * s : a * s2;
        store(out + i, a * load(cos + i, count) + across, count);
        store(out + j, b * load(cos + j, count) + back, count);
    }
}

}  // namespace

extern "C" {

// out = weight * x / rms(x), and 1 / rms of each row.
int srppo_rms_norm(const float* x, const float* weight, float* out, float* inverse, int64_t N, int64_t D, float eps,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) norm_row(x + n * D, weight, out + n * D, inverse + n, D, eps);
    return 0;
}

// d_weight null: not asked for. 0 on success, 1 out of memory.
int srppo_rms_norm_gradient(const float* grad, const float* x, const float* weight, const float* inverse, float* d_x,
                            float* d_weight, int64_t N, int64_t D, int threads) {
    try {
        const int64_t blocks = (N + ROWS - 1) / ROWS;
        std::vector<float> partial(d_weight ? blocks * D : 0);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t n = b * ROWS; n < std::min(N, (b + 1) * ROWS); n++)
                norm_gradient_row(grad + n * D, x + n * D, weight, inverse[n], d_x + n * D,
                                  d_weight ? partial.data() + b * D : nullptr, D);
        if (d_weight) std::fill_n(d_weight, D, 0.0f);
        for (int64_t b = 0; d_weight && b < blocks; b++)
            for (int64_t i = 0; i < D; i++) d_weight[i] += partial[b * D + i];
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// out = silu(gate) * up
int srppo_swiglu(const float* gate, const float* up, float* out, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < count; c += CHUNK)
        for (int64_t i = c; i < std::min(count, c + CHUNK); i += WIDTH) {
            const V x = load(gate + i, count - i);
            store(out + i, x * Sigmoid(x).of * load(up + i, count - i), count - i);
        }
    return 0;
}

int srppo_swiglu_gradient(const float* grad, const float* gate, const float* up, float* d_gate, float* d_up,
                          int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < count; c += CHUNK)
        for (int64_t i = c; i < std::min(count, c + CHUNK); i += WIDTH) {
            const V g = load(grad + i, count - i), x = load(gate + i, count - i);
            const Sigmoid s(x);
            store(d_up + i, g * (x * s.of), count - i);
            store(d_gate + i, g * load(up + i, count - i) * (s.of * (all(1.0f) + x * s.rest)), count - i);
        }
    return 0;
}

// out[b, s, h] = x[b, h, s] * cos[b, s] + rotate_half(x[b, h, s]) * sin[b, s], or the transpose of that map of x.
// strides: of b, h and s in x; rows of cos and sin are taken again from the first on where there are fewer.
int srppo_rotate(const float* x, const int64_t* strides, const float* cos, const float* sin, int64_t angles, float* out,
                 int64_t B, int64_t H, int64_t S, int64_t D, int transposed, int threads) {
    const int64_t half = D / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < B * S; row++) {
        const float *c = cos + row % angles * D, *s = sin + row % angles * D;
        const float* from = x + row / S * strides[0] + row % S * strides[2];
        for (int64_t h = 0; h < H; h++) rotate_row(from + h * strides[1], c, s, out + (row * H + h) * D, half, transposed);
    }
    return 0;
}
}
