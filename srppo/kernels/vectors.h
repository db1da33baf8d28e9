// Vectors of fp32 lanes, as GCC and Clang have them on any machine, and what all compiled kernels do with them. They are
// as wide as the machine's registers: a wider one is split, and its comparisons are made lane by lane.

#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;  // SSE2, NEON
#endif
typedef float V __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V x) { *reinterpret_cast<V*>(p) = x; }
inline V all(float x) { return V{} + x; }
inline V maximum(V a, V b) { return a > b ? a : b; }

// exp(x) for x <= 0, to 1 ulp; 0 below -87, NaN for NaN.
inline V exp_negative(V x) {
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = x * all(1.44269504f) + magic;
    const I exponent = (I)n << 23;  // a cast between vectors keeps the bits
    n = n - magic;
    const V r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    V p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    V y = p * r * r + r + all(1.0f);
    const V scale = (V)(exponent + 0x3f800000);  // 2^n; multiplying, unlike adding to the exponent, leaves a NaN one
    return x < all(-87.0f) ? V{} : y * scale;
}

}  // namespace
