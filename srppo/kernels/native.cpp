// The log-prob kernels for CPUs, built by native.py at first use. One pass over the vocabulary, no logits matrix.
//
// From hidden states the logits are computed transposed, a tile of 128 vocabulary entries x 32 rows at a time:
// weight[128, D] @ hidden.T[D, 32]. So the weight, the large operand, is read once (in place for few rows; for more a
// panel at a time is copied, and widened unless it is multiplied as bf16), the hidden states, the small one, are packed
// once, and the running maximum and sum of a row live in a vector lane of their own: no horizontal reduction, and no
// row's bits depend on its neighbours. The tile is multiplied by oneDNN's microkernel inside torch and reduced while it
// lies in the cache.
//
// Bits depend on neither N nor the number of threads: the vocabulary is cut into segments of fixed size, each by one
// thread, combined in order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <vector>

#include "vectors.h"

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
constexpr int K_BLOCK = 1024;  // hidden dimensions of a panel
constexpr int SUM_DEPTH = 256; // products in one chain of additions: chains of 1024 would err twice as much
constexpr int64_t PANEL_BYTES = 1 << 20;   // weights that stay in the second-level cache while all rows pass by
constexpr int64_t PANELS_BYTES = 16 << 20; // of all threads together: with many of them panels are lower
constexpr int64_t LINE_BYTES = 64;         // after each row of a copied panel: rows powers of two apart share few sets
constexpr int64_t FEW_ROWS = 128;          // of hidden states, for which copying a panel takes longer than it saves
constexpr int64_t PACKED_BYTES = 8 << 20;  // hidden states packed at once
constexpr int64_t MOST_ROWS = 2048;        // so that partial sums take at most 5 MiB at a vocabulary of 150k
constexpr int64_t DEEP_ROWS = 512;         // rows at once where D > K_BLOCK: their tiles must stay in the cache too
constexpr int VECTORS = LANES / WIDTH;
constexpr float INF = std::numeric_limits<float>::infinity();

enum Dtype { FP32 = 0, BF16 = 1, FP16 = 2 };

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

// The online state of some rows: maximum, and sum of exp(z - maximum).
struct Online {
    V max = all(-INF), sum = V{};

    // Before adding terms whose maximum is `other`: returns the shift to subtract, finite also while all is -inf.
    V rescale(V other) {
        const V next = maximum(max, other), shift = next == all(-INF) ? V{} : next;
        sum = sum * exp_negative(max - shift);
        max = next;
        return shift;
    }
};

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

inline float from_fp16(uint16_t x) {
    const uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity and NaN keep the largest exponent
    const float size = from_bits(uint32_t(x & 0x7fff) << 13) * 0x1p112f;  // exact, subnormal numbers too
    uint32_t bits;
    std::memcpy(&bits, &size, 4);
    return from_bits(bits | special | uint32_t(x & 0x8000) << 16);
}

void widen_row(Dtype dtype, const void* source, int64_t offset, int64_t count, float* out) {
    const float* wide = static_cast<const float*>(source) + offset;
    const uint16_t* half = static_cast<const uint16_t*>(source) + offset;
    if (dtype == FP32) std::copy_n(wide, count, out);
    if (dtype == BF16)
        for (int64_t i = 0; i < count; i++) out[i] = from_bf16(half[i]);
    if (dtype == FP16)
        for (int64_t i = 0; i < count; i++) out[i] = from_fp16(half[i]);
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

struct Stats {  // N each
    float *target, *max, *log_sum;
};

// C[entries, LANES] (+)= panel[entries, depth] @ block[depth, LANES], summed SUM_DEPTH products at a time.
void multiply(int64_t entries, int64_t depth, const char* panel, int64_t panel_stride, const char* block, bool pairs,
              bool add, float* tile) {
    using at::native::cpublas::brgemm;
    using c10::BFloat16;
    const int64_t element = pairs ? 2 : 4;
    for (int64_t k = 0; k < depth; k += SUM_DEPTH, add = true) {
        const int64_t count = std::min<int64_t>(SUM_DEPTH, depth - k);
        const void *a = panel + k * element, *b = block + k * LANES * element;
        if (pairs)
            brgemm(entries, LANES, count, panel_stride, LANES, LANES, add, static_cast<const BFloat16*>(a),
                   static_cast<const BFloat16*>(b), tile, true);
        else
            brgemm(entries, LANES, count, panel_stride, LANES, LANES, add, static_cast<const float*>(a),
                   static_cast<const float*>(b), tile, false);
    }
}

// Fold one tile [entries, LANES] into the states of its rows.
void reduce(float* tile, int64_t entries, const float* bias, const Transform& transform, Online* states) {
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
        const V shift = state.rescale(tile_max);
        V sum = {}, sum2 = {};  // two chains: additions do not wait for each other
        for (int64_t v = 0; v + 1 < entries; v += 2) {
            sum += exp_negative(load(column + v * LANES) - shift);
            sum2 += exp_negative(load(column + (v + 1) * LANES) - shift);
        }
        if (entries % 2) sum += exp_negative(load(column + (entries - 1) * LANES) - shift);
        state.sum += sum + sum2;
        states[g] = state;
    }
}

struct Partials {  // [segments, rows]
    float *max, *sum;
};

void combine(const Partials& partials, int64_t segments, int64_t stride, int64_t row, const Stats& out, int64_t n) {
    float top = -INF;
    for (int64_t s = 0; s < segments; s++) top = std::max(top, partials.max[s * stride + row]);
    double sum = 0;
    for (int64_t s = 0; s < segments; s++) {
        const double part = partials.sum[s * stride + row], below = double(partials.max[s * stride + row]) - top;
        if (part == 0) continue;  // a segment of -inf only
        sum += part * std::exp(below);
    }
    out.max[n] = top;
    out.target[n] -= top;
    out.log_sum[n] = float(std::log(sum));
}

// One pass over the vocabulary for rows first .. first + rows.
struct Pass {
    Matrix hidden, weight;
    const float* bias;
    const int64_t* tokens;
    int64_t first, rows, D, vocabulary;
    Transform transform;
    bool pairs;
    Stats out;
    int threads;

    int64_t blocks() const { return (rows + LANES - 1) / LANES; }
    int64_t segments() const { return (vocabulary + SEGMENT - 1) / SEGMENT; }
    int64_t element() const { return pairs ? 2 : 4; }
    bool in_place() const { return (pairs || weight.dtype == FP32) && rows <= FEW_ROWS; }
    bool deep() const { return D > K_BLOCK; }  // then tiles of all rows wait for the next part of the weights
    int workers() const { return int(std::min<int64_t>(threads, segments())); }
    // Whole tiles, always: how a row's terms are grouped, and so its bits, must not depend on the number of threads.
    int64_t panel_entries() const {
        const int64_t bytes = std::min(PANEL_BYTES, PANELS_BYTES / workers());
        return std::clamp<int64_t>(bytes / (std::min<int64_t>(D, K_BLOCK) * element()) / TILE * TILE, TILE, SEGMENT);
    }
    int64_t row_bytes(int64_t depth) const { return depth * element() + LINE_BYTES; }  // of a copied panel
    int64_t rows_of(int64_t block) const { return std::min<int64_t>(LANES, rows - block * LANES); }

    struct Workspace {  // of one thread
        Buffer<float> tiles;
        Buffer<char> weights;
        std::unique_ptr<Online[]> states;
        explicit Workspace(const Pass& pass)
            : tiles((pass.deep() ? pass.blocks() * pass.panel_entries() : TILE) * LANES),
              weights(pass.in_place() ? 1 : pass.panel_entries() * pass.row_bytes(std::min<int64_t>(pass.D, K_BLOCK))),
              states(new Online[pass.blocks() * VECTORS]) {}
    };

    // A block of hidden states transposed: fp32 [D, LANES], or bf16 pairs [D / 2, LANES, 2]; missing rows are 0.
    void pack(int64_t block, char* packed) const {
        char* target = packed + block * LANES * D * element();
        std::memset(target, 0, LANES * D * element());
        for (int64_t j = 0; j < rows_of(block); j++) {
            const int64_t offset = (first + block * LANES + j) * hidden.stride;
            if (pairs) {
                const uint16_t* source = static_cast<const uint16_t*>(hidden.data) + offset;
                uint16_t* halves = reinterpret_cast<uint16_t*>(target);
                for (int64_t k = 0; k < D; k++) halves[(k / 2 * LANES + j) * 2 + k % 2] = source[k];
            } else {
                float row[K_BLOCK];
                for (int64_t k = 0; k < D; k += K_BLOCK) {
                    const int64_t depth = std::min<int64_t>(K_BLOCK, D - k);
                    widen_row(Dtype(hidden.dtype), hidden.data, offset + k, depth, row);
                    for (int64_t i = 0; i < depth; i++) reinterpret_cast<float*>(target)[(k + i) * LANES + j] = row[i];
                }
            }
        }
    }

    // The partial sums of one segment of the vocabulary.
    void segment(int64_t s, const char* packed, Workspace& work, const Partials& partials) const {
        std::fill_n(work.states.get(), blocks() * VECTORS, Online());
        const int64_t end = std::min<int64_t>(vocabulary, (s + 1) * SEGMENT);
        for (int64_t v = s * SEGMENT; v < end; v += panel_entries())
            panel(v, std::min<int64_t>(panel_entries(), end - v), packed, work);
        const int64_t stride = blocks() * LANES;
        for (int64_t i = 0; i < blocks() * VECTORS; i++) {
            const int64_t at = s * stride + i * WIDTH;
            store(partials.max + at, work.states[i].max);
            store(partials.sum + at, work.states[i].sum);
        }
    }

    void copy_row(const char* source, int64_t depth, char* out) const {
        if (pairs)
            std::memcpy(out, source, depth * element());
        else
            widen_row(Dtype(weight.dtype), source, 0, depth, reinterpret_cast<float*>(out));
    }

    // All rows pass by some entries of the vocabulary.
    void panel(int64_t v, int64_t entries, const char* packed, Workspace& work) const {
        const int64_t width = weight.dtype == FP32 ? 4 : 2;
        for (int64_t k = 0; k < D; k += K_BLOCK) {
            const int64_t depth = std::min<int64_t>(K_BLOCK, D - k);
            const int64_t stride = in_place() ? weight.stride : row_bytes(depth) / element();
            const char* weights = static_cast<const char*>(weight.data) + (v * weight.stride + k) * width;
            if (!in_place()) {
                for (int64_t i = 0; i < entries; i++)
                    copy_row(weights + i * weight.stride * width, depth, work.weights + i * row_bytes(depth));
                weights = work.weights;
            }
            for (int64_t b = 0; b < blocks(); b++)
                for (int64_t t = 0; t < entries; t += TILE) {
                    const int64_t height = std::min<int64_t>(TILE, entries - t);
                    float* tile = work.tiles + (deep() ? (b * panel_entries() + t) * LANES : 0);
                    multiply(height, depth, weights + t * stride * element(), stride,
                             packed + (b * LANES * D + k * LANES) * element(), pairs, k > 0, tile);
                    if (k + depth == D) finish(tile, v + t, height, b, work);
                }
        }
    }

    void finish(float* tile, int64_t v, int64_t height, int64_t block, Workspace& work) const {
        reduce(tile, height, bias ? bias + v : nullptr, transform, &work.states[block * VECTORS]);
        for (int64_t j = 0; j < rows_of(block); j++) {
            const int64_t n = first + block * LANES + j, at = tokens[n] - v;
            if (at >= 0 && at < height) out.target[n] = tile[at * LANES + j];
        }
    }

    void run() const {
        const int64_t cells = segments() * blocks() * LANES;
        Buffer<char> packed(blocks() * LANES * D * element());
        Buffer<float> max(cells), sum(cells);
        const Partials partials{max, sum};
        std::vector<std::unique_ptr<Workspace>> work;
        for (int i = 0; i < workers(); i++) work.push_back(std::make_unique<Workspace>(*this));
        std::atomic<int> next{0};
        std::exception_ptr error;
#pragma omp parallel num_threads(workers())
        {
            Workspace& own = *work[next++];
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks(); b++) pack(b, packed);
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < segments(); s++) {
                try {  // an exception must not leave the loop
                    segment(s, packed, own, partials);
                } catch (...) {
#pragma omp critical
                    error = std::current_exception();
                }
            }
            at::native::cpublas::brgemm_release(pairs);
        }
        if (error) std::rethrow_exception(error);
        for (int64_t r = 0; r < rows; r++) combine(partials, segments(), blocks() * LANES, r, out, first + r);
    }
};

constexpr int64_t BLOCK = 1024;  // logits of a row at a time: 4 KiB, in the first-level cache
constexpr int64_t STEP = 2 * WIDTH;

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
        const int64_t count = std::min<int64_t>(BLOCK, vocabulary - v), padded = (count + STEP - 1) / STEP * STEP;
        const float* z = static_cast<const float*>(logits.data) + row * logits.stride + v;
        if (logits.dtype != FP32 || !transform.identity() || count != padded) {
            widen_row(Dtype(logits.dtype), logits.data, row * logits.stride + v, count, block);
            if (!transform.identity())
                for (int64_t i = 0; i < count; i += WIDTH) store(block + i, transform(load(block + i)));
            std::fill(block + count, block + padded, -INF);
            z = block;
        }
        V top = all(-INF), top2 = top, sum_a = {}, sum_b = {};
        for (int64_t i = 0; i < padded; i += STEP) {
            top = maximum(top, load(z + i));
            top2 = maximum(top2, load(z + i + WIDTH));
        }
        top = maximum(top, top2);
        const float next = std::max(max, highest(top)), shift = next == -INF ? 0.0f : next;
        for (int64_t i = 0; i < padded; i += STEP) {
            sum_a += exp_negative(load(z + i) - all(shift));
            sum_b += exp_negative(load(z + i + WIDTH) - all(shift));
        }
        const V block_sum = sum_a + sum_b;
        double total = 0;
        for (int lane = 0; lane < WIDTH; lane++) total += block_sum[lane];
        sum = sum * std::exp(double(max) - shift) + total;
        max = next;
        if (token >= v && token < v + count) target = z[token - v];
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
                       float* target, float* max, float* log_sum, int threads) {
    try {
        int64_t rows = std::max<int64_t>(PACKED_BYTES / (D * (pairs ? 2 : 4)) / LANES, 1) * LANES;
        rows = std::min(rows, D > K_BLOCK ? DEEP_ROWS : MOST_ROWS);
        for (int64_t first = 0; first < N; first += rows)
            Pass{{hidden, hidden_dtype, hidden_stride}, {weight, weight_dtype, weight_stride}, bias, tokens, first,
                 std::min(rows, N - first), D, vocabulary, {scale, softcap, inverse_temperature}, pairs != 0,
                 {target, max, log_sum}, threads}
                .run();
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
