// Vectors of float32 of this processor, and what is computed with them everywhere.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 32;
#else
constexpr int LANES = 8, REGISTERS = 16;
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));

typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));

// e to the power of each lane: 2^n times a polynomial, within two units in the last place; 0 below -87.
static inline vector exponential(vector x) {
    const vector low = vector{} - 88.f, high = vector{} + 88.f, magic = vector{} + 12582912.f;  // 1.5 * 2^23: rounds
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vector shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vector sum = vector{} + 1.9875691500e-4f;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.f;
    const integers exponent = (((integers)shifted - (integers)magic) + 127) << 23;
    return sum * (vector)exponent;
}

static inline float dot(const float* x, const float* y, int64_t count) {
    vector sums{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += *(const vector*)(x + i) * *(const vector*)(y + i);
    float parts[LANES];
    std::memcpy(parts, &sums, sizeof parts);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) parts[lane] += parts[lane + half];
    for (; i < count; i++) parts[0] += x[i] * y[i];
    return parts[0];
}

static inline void fetch(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + i);
}
