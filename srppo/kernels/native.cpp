// The log-prob kernels for CPUs, built by native.py at first use. One pass over the vocabulary, no logits matrix.
//
// From hidden states the logits are computed transposed, a tile of 64 vocabulary entries x 64 rows at a time:
// weight[64, D] @ hidden.T[D, 64]. So the weight, the large operand, is read in place and once (only 16-bit weights are
// widened, a panel at a time), the hidden states, the small one, are packed once, and the running maximum and sum of a
// row live in a vector lane of their own: no horizontal reduction, and no row's bits depend on its neighbours. The tile
// is multiplied by oneDNN's microkernel inside torch and reduced while it lies in the cache.
//
// Bits depend on neither N nor the number of threads: the vocabulary is cut into segments of fixed size, each by one
// thread, combined in order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {  // exported by libtorch_cpu; C[M, N] (+)= A[M, K] @ B[K, N], row-major, fp32 sums
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C, const float* A,
            const float* B, float* C, bool is_vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C, const c10::BFloat16* A,
            const c10::BFloat16* B, float* C, bool is_vnni);  // B as pairs of k: [K / 2, N, 2]
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

constexpr int LANES = 32;      // rows (tokens) of a tile
constexpr int TILE = 128;      // vocabulary entries of a tile: 16 KiB, in the first-level cache
constexpr int SEGMENT = 512;   // vocabulary entries whose partial sums one thread makes
constexpr int K_BLOCK = 1024;  // hidden dimensions a call of the microkernel
constexpr int64_t PANEL_BYTES = 1 << 20;   // weights that stay in the second-level cache while all rows pass by
constexpr int64_t PACKED_BYTES = 8 << 20;  // hidden states packed at once
constexpr float INF = std::numeric_limits<float>::infinity();

enum Dtype { FP32 = 0, BF16 = 1, FP16 = 2 };

typedef float V __attribute__((vector_size(64), aligned(4)));
typedef int32_t I __attribute__((vector_size(64), aligned(4)));
constexpr int WIDTH = 16, VECTORS = LANES / WIDTH;

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V x) { *reinterpret_cast<V*>(p) = x; }
inline V all(float x) { return V{} + x; }
inline V maximum(V a, V b) { return a > b ? a : b; }

// exp(x) for x <= 0, to 1 ulp; 0 below -87, NaN for NaN.
inline V exp_negative(V x) {
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = x * all(1.44269504f) + magic;
    const I exponent = reinterpret_cast<I&>(n) << 23;
    n = n - magic;
    const V r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    V p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    V y = p * r * r + r + all(1.0f);
    const I scaled = reinterpret_cast<I&>(y) + exponent;
    return x < all(-87.0f) ? V{} : reinterpret_cast<const V&>(scaled);
}

inline V tanh_of(V x) {
    const V size = x < V{} ? -x : x, square = x * x;
    const V q = exp_negative(-2.0f * size);
    const V large = (all(1.0f) - q) / (all(1.0f) + q);
    V p = all(-5.70498872745e-3f);
    p = p * square + all(2.06390887954e-2f);
    p = p * square + all(-5.37397155531e-2f);
    p = p * square + all(1.33314422036e-1f);
    p = p * square + all(-3.33332819422e-1f);
    return size < all(0.625f) ? p * square * x + x : (x < V{} ? -large : large);
}

struct Transform {  // softcap * tanh(raw * scale / softcap) * inverse temperature; softcap 0: none
    float scale, softcap, inverse_temperature;
    bool identity() const { return scale == 1.0f && softcap == 0.0f && inverse_temperature == 1.0f; }
    V operator()(V x) const {
        x = x * scale;
        if (softcap != 0.0f) x = softcap * tanh_of(x / softcap);
        return x * inverse_temperature;
    }
};

// The online state of some rows: maximum, sum of exp(z - maximum), and sum of exp(z - maximum) * (z - maximum).
struct Online {
    V max = all(-INF), sum = V{}, weighted = V{};

    // Before adding terms whose maximum is `other`: returns the shift to subtract, finite also while all is -inf.
    V rescale(V other, bool with_entropy) {
        const V next = maximum(max, other), shift = next == all(-INF) ? V{} : next;
        const V delta = max - shift, factor = exp_negative(delta);
        if (with_entropy) weighted = factor * (weighted + (sum > V{} ? sum * delta : V{}));
        sum = sum * factor;
        max = next;
        return shift;
    }
};

inline void add_terms(V z, V shift, bool with_entropy, V& sum, V& weighted) {
    const V d = z - shift, p = exp_negative(d);
    sum += p;
    if (with_entropy) weighted += p > V{} ? p * d : (p == p ? V{} : p);
}

template <class T>
float widen(T x);
template <>
float widen(float x) {
    return x;
}
template <>
float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
template <>
float widen(_Float16 x) {
    return x;
}

template <class T>
void widen_row(const void* source, int64_t offset, int64_t count, float* out) {
    const T* p = static_cast<const T*>(source) + offset;
    for (int64_t i = 0; i < count; i++) out[i] = widen(p[i]);
}

void widen_row(Dtype dtype, const void* source, int64_t offset, int64_t count, float* out) {
    if (dtype == FP32) widen_row<float>(source, offset, count, out);
    if (dtype == BF16) widen_row<uint16_t>(source, offset, count, out);
    if (dtype == FP16) widen_row<_Float16>(source, offset, count, out);
}

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator T*() const { return data; }
};

struct Matrix {
    const void* data;
    int64_t dtype, stride;
};

struct Stats {  // N each; entropy may be null
    float *target, *max, *log_sum, *entropy;
};

// hidden[rows, D] as blocks of 64 rows, transposed: fp32 [D, 64], or bf16 pairs [D / 2, 64, 2]; rows beyond the end are 0.
void pack_block(const Matrix& hidden, int64_t first, int64_t rows, int64_t D, bool pairs, void* out) {
    Buffer<float> row(D);
    std::memset(out, 0, D * LANES * (pairs ? 2 : 4));
    for (int64_t j = 0; j < rows; j++) {
        if (pairs) {
            const uint16_t* source = static_cast<const uint16_t*>(hidden.data) + (first + j) * hidden.stride;
            uint16_t* packed = static_cast<uint16_t*>(out);
            for (int64_t k = 0; k < D; k++) packed[(k / 2 * LANES + j) * 2 + k % 2] = source[k];
        } else {
            widen_row(Dtype(hidden.dtype), hidden.data, (first + j) * hidden.stride, D, row);
            float* packed = static_cast<float*>(out);
            for (int64_t k = 0; k < D; k++) packed[k * LANES + j] = row[k];
        }
    }
}

void multiply(int64_t entries, int64_t D, const void* panel, int64_t panel_stride, const void* block, bool pairs,
              float* tile) {
    for (int64_t k = 0; k < D; k += K_BLOCK) {
        const int64_t depth = std::min<int64_t>(K_BLOCK, D - k);
        if (pairs)
            at::native::cpublas::brgemm(entries, LANES, depth, panel_stride, LANES, LANES, k > 0,
                                        reinterpret_cast<const c10::BFloat16*>(static_cast<const uint16_t*>(panel) + k),
                                        reinterpret_cast<const c10::BFloat16*>(static_cast<const uint16_t*>(block) +
                                                                               k * LANES),
                                        tile, true);
        else
            at::native::cpublas::brgemm(entries, LANES, depth, panel_stride, LANES, LANES, k > 0,
                                        static_cast<const float*>(panel) + k,
                                        static_cast<const float*>(block) + k * LANES, tile, false);
    }
}

// Fold one tile [entries, 64] into the states of its 64 rows.
void reduce(float* tile, int64_t entries, const float* bias, const Transform& transform, bool with_entropy,
            Online* states) {
    const bool changed = bias || !transform.identity();
    for (int g = 0; g < VECTORS; g++) {
        float* column = tile + g * WIDTH;
        V tile_max = all(-INF);
        for (int64_t v = 0; v < entries; v++) {
            V z = load(column + v * LANES);
            if (changed) {
                z = transform(bias ? z + bias[v] : z);
                store(column + v * LANES, z);
            }
            tile_max = maximum(tile_max, z);
        }
        Online state = states[g];
        const V shift = state.rescale(tile_max, with_entropy);
        V sums[2] = {}, weighted[2] = {};  // two chains, so that additions do not wait for each other
        for (int64_t v = 0; v < entries; v++)
            add_terms(load(column + v * LANES), shift, with_entropy, sums[v % 2], weighted[v % 2]);
        state.sum += sums[0] + sums[1];
        state.weighted += weighted[0] + weighted[1];
        states[g] = state;
    }
}

struct Partials {  // [segments, rows]
    float *max, *sum, *weighted;
};

void combine(const Partials& partials, int64_t segments, int64_t stride, int64_t row, const Stats& out, int64_t n) {
    float top = -INF;
    for (int64_t s = 0; s < segments; s++) top = std::max(top, partials.max[s * stride + row]);
    double sum = 0, weighted = 0;
    for (int64_t s = 0; s < segments; s++) {
        const double part = partials.sum[s * stride + row], below = double(partials.max[s * stride + row]) - top;
        if (part == 0) continue;  // a segment of -inf only
        const double factor = std::exp(below);
        sum += part * factor;
        weighted += factor * (partials.weighted[s * stride + row] + part * below);
    }
    out.max[n] = top;
    out.target[n] -= top;
    out.log_sum[n] = float(std::log(sum));
    if (out.entropy) out.entropy[n] = float(std::log(sum) - weighted / sum);
}

// One pass over the vocabulary for `rows` rows from `first` on.
void linear_pass(const Matrix& hidden, const Matrix& weight, const float* bias, const int64_t* tokens, int64_t first,
                 int64_t rows, int64_t D, int64_t vocabulary, const Transform& transform, bool pairs, const Stats& out,
                 int threads) {
    const int64_t blocks = (rows + LANES - 1) / LANES, segments = (vocabulary + SEGMENT - 1) / SEGMENT;
    const int64_t stride = blocks * LANES, element = pairs ? 2 : 4;
    Buffer<char> packed(blocks * LANES * D * element);
    Buffer<float> part_max(segments * stride), part_sum(segments * stride);
    Buffer<float> part_weighted(segments * stride);
    const Partials partials{part_max, part_sum, part_weighted};
    const bool in_place = pairs || weight.dtype == FP32, with_entropy = out.entropy;
    const int64_t width = weight.dtype == FP32 ? 4 : 2, panel_stride = in_place ? weight.stride : D + WIDTH;
    const int64_t panel_entries = std::clamp<int64_t>(PANEL_BYTES / (D * element), 16, SEGMENT);
    const int64_t tile_entries = std::min<int64_t>(TILE, panel_entries);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            pack_block(hidden, first + b * LANES, std::min<int64_t>(LANES, rows - b * LANES), D, pairs,
                       packed.data + b * LANES * D * element);
        Buffer<float> tile(TILE * LANES), wide(in_place ? 1 : panel_entries * (D + WIDTH));
        std::unique_ptr<Online[]> states(new Online[blocks * VECTORS]);
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < segments; s++) {
            std::fill_n(states.get(), blocks * VECTORS, Online());
            const int64_t end = std::min<int64_t>(vocabulary, (s + 1) * SEGMENT);
            for (int64_t v = s * SEGMENT; v < end; v += panel_entries) {
                const int64_t entries = std::min<int64_t>(panel_entries, end - v);
                const void* panel = static_cast<const char*>(weight.data) + v * weight.stride * width;
                if (!in_place) {
                    for (int64_t i = 0; i < entries; i++)
                        widen_row(Dtype(weight.dtype), weight.data, (v + i) * weight.stride, D,
                                  wide + i * (D + WIDTH));
                    panel = wide;
                }
                for (int64_t b = 0; b < blocks; b++)
                    for (int64_t t = 0; t < entries; t += tile_entries) {
                        const int64_t height = std::min<int64_t>(tile_entries, entries - t);
                        multiply(height, D, static_cast<const char*>(panel) + t * panel_stride * element,
                                 panel_stride, packed.data + b * LANES * D * element, pairs, tile);
                        reduce(tile, height, bias ? bias + v + t : nullptr, transform, with_entropy,
                               &states[b * VECTORS]);
                        for (int64_t j = 0; j < std::min<int64_t>(LANES, rows - b * LANES); j++) {
                            const int64_t n = first + b * LANES + j, at = tokens[n] - v - t;
                            if (at >= 0 && at < height) out.target[n] = tile[at * LANES + j];
                        }
                    }
            }
            for (int64_t i = 0; i < blocks * VECTORS; i++) {
                store(partials.max + s * stride + i * WIDTH, states[i].max);
                store(partials.sum + s * stride + i * WIDTH, states[i].sum);
                store(partials.weighted + s * stride + i * WIDTH, states[i].weighted);
            }
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) combine(partials, segments, stride, r, out, first + r);
        at::native::cpublas::brgemm_release(pairs);
    }
}

constexpr int64_t BLOCK = 1024;  // logits of a row at a time: 4 KiB, in the first-level cache

inline float highest(V x) {
    float top = x[0];
    for (int lane = 1; lane < WIDTH; lane++) top = std::max(top, x[lane]);
    return top;
}

// Statistics of one row of logits: (target, maximum, sum of exp).
void logits_row(const Matrix& logits, int64_t row, int64_t token, int64_t vocabulary, const Transform& transform,
                float* block, float& target, float& max, double& sum) {
    max = -INF, sum = 0;
    for (int64_t v = 0; v < vocabulary; v += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, vocabulary - v), padded = (count + WIDTH - 1) / WIDTH * WIDTH;
        widen_row(Dtype(logits.dtype), logits.data, row * logits.stride + v, count, block);
        if (!transform.identity())
            for (int64_t i = 0; i < count; i += WIDTH) store(block + i, transform(load(block + i)));
        std::fill(block + count, block + padded, -INF);
        V top = all(-INF), sums[2] = {}, unused = V{};
        for (int64_t i = 0; i < padded; i += WIDTH) top = maximum(top, load(block + i));
        const float next = std::max(max, highest(top)), shift = next == -INF ? 0.0f : next;
        for (int64_t i = 0; i < padded; i += WIDTH)
            add_terms(load(block + i), all(shift), false, sums[i / WIDTH % 2], unused);
        const V block_sum = sums[0] + sums[1];
        double total = 0;
        for (int lane = 0; lane < WIDTH; lane++) total += block_sum[lane];
        sum = sum * std::exp(double(max) - shift) + total;
        max = next;
        if (token >= v && token < v + count) target = block[token - v];
    }
}

// raw[N, count], logits from column `first` on, become upstream * d log-prob / d raw, in place.
void gradient_row(float* raw, int64_t first, int64_t count, const float* bias, int64_t token, float max, float log_sum,
                  float upstream, const Transform& transform) {
    for (int64_t c = 0; c < count; c += WIDTH) {
        const int64_t width = std::min<int64_t>(WIDTH, count - c);
        float lanes[WIDTH] = {}, biases[WIDTH] = {};
        std::copy_n(raw + c, width, lanes);
        if (bias) std::copy_n(bias + c, width, biases);
        const V x = (load(lanes) + load(biases)) * transform.scale;
        const V bent = transform.softcap == 0.0f ? V{} : tanh_of(x / transform.softcap);
        const V z = (transform.softcap == 0.0f ? x : transform.softcap * bent) * transform.inverse_temperature;
        const V slope = (all(1.0f) - bent * bent) * (transform.scale * transform.inverse_temperature);
        V one_hot = V{};
        if (token >= first + c && token < first + c + width) one_hot[token - first - c] = 1.0f;
        store(lanes, upstream * (one_hot - exp_negative((z - max) - log_sum)) * slope);
        std::copy_n(lanes, width, raw + c);
    }
}

}  // namespace

extern "C" {

// Row statistics of softmax(transform(hidden @ weight.T + bias)) at `tokens`; 0 on success, 1 out of memory, 2 otherwise.
int srppo_linear_stats(const void* hidden, int64_t hidden_dtype, int64_t hidden_stride, const void* weight,
                       int64_t weight_dtype, int64_t weight_stride, const float* bias, const int64_t* tokens, int64_t N,
                       int64_t D, int64_t vocabulary, float scale, float softcap, float inverse_temperature, int pairs,
                       float* target, float* max, float* log_sum, float* entropy, int threads) {
    try {
        const int64_t row_bytes = D * (pairs ? 2 : 4);
        const int64_t rows = std::max<int64_t>(PACKED_BYTES / row_bytes / LANES, 1) * LANES;
        for (int64_t first = 0; first < N; first += rows)
            linear_pass({hidden, hidden_dtype, hidden_stride}, {weight, weight_dtype, weight_stride}, bias, tokens,
                        first, std::min(rows, N - first), D, vocabulary, {scale, softcap, inverse_temperature}, pairs,
                        {target, max, log_sum, entropy}, threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    } catch (...) {
        return 2;
    }
}

// diff, log-probs and logsumexps of two logits matrices; rows with a negative token give 0. Returns as above.
int srppo_logits_diff(const void* sft, int64_t sft_dtype, int64_t sft_stride, const void* base, int64_t base_dtype,
                      int64_t base_stride, const int64_t* tokens, int64_t N, int64_t vocabulary, float scale,
                      float softcap, float inverse_temperature, float* out, int threads) {
    const Matrix models[2] = {{sft, sft_dtype, sft_stride}, {base, base_dtype, base_stride}};
    const Transform transform{scale, softcap, inverse_temperature};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) {
        alignas(64) float block[BLOCK];
        float centred[2], max[2], log_sum[2];
        if (tokens[n] < 0) {
            for (int i = 0; i < 5; i++) out[i * N + n] = 0.0f;
            continue;
        }
        for (int i = 0; i < 2; i++) {
            double sum;
            logits_row(models[i], n, tokens[n], vocabulary, transform, block, centred[i], max[i], sum);
            centred[i] -= max[i];
            log_sum[i] = float(std::log(sum));
            out[(1 + i) * N + n] = centred[i] - log_sum[i];
            out[(3 + i) * N + n] = max[i] + log_sum[i];
        }
        out[n] = (centred[0] - centred[1]) - (log_sum[0] - log_sum[1]);
    }
    return 0;
}

// A chunk of raw logits, columns `first` to `first + count`, becomes the gradient of sum(upstream * log-prob) in them.
int srppo_logits_gradient(float* raw, int64_t stride, const float* bias, const int64_t* tokens, const float* max,
                          const float* log_sum, const float* upstream, int64_t N, int64_t first, int64_t count,
                          float scale, float softcap, float inverse_temperature, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++)
        gradient_row(raw + n * stride, first, count, bias, tokens[n], max[n], log_sum[n], upstream[n],
                     {scale, softcap, inverse_temperature});
    return 0;
}
}
