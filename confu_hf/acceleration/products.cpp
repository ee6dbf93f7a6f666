// What a transformer's layer computes of a few rows, float32: products with large matrices, y (m, n) = x (m, k) times
// w (k, n), and what stands between them. Weights are float32, or bfloat16 that is widened as it is read.
//
// w comes in panels of PANEL columns, (n / PANEL, k, PANEL), the last one filled up with zeros: each is read from memory
// once, from front to back. The sums of up to ROWS rows stay in registers meanwhile, so eight rows read what one reads.
// More rows are several such blocks, of like size, one after the other over a chunk of a panel: while they compute, each
// fetches its share of the next chunk, so that memory is read all the time, not by the first block alone.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 8;  // 24 of 32 registers hold sums
#else
constexpr int LANES = 8, ROWS = 4;  // 12 of 16
#endif
constexpr int VECTORS = 3, PANEL = VECTORS * LANES;
constexpr int AHEAD = 16;  // lines of a panel that a single block fetches in advance
constexpr int CHUNK = 96;  // lines of a panel that several blocks go through together, at most: they fit the first cache

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));

typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));

static inline vector widened(const float* w) { return *(const vector*)w; }
static inline vector widened(const uint16_t* w) {
    return (vector)(__builtin_convertvector(*(const halves*)w, words) << 16);
}

// What the blocks of rows of one chunk have in common.
template <typename W>
struct Chunk {
    const W* w;  // its lines, PANEL values each
    int64_t lines, k, n, columns;  // `columns` of the panel belong to y
    bool first;  // of its panel: sums start at zero
    int64_t blocks;
};

// R rows of x times one chunk; block number `number` of its rows.
template <int R, typename W>
static inline void block(const Chunk<W>& chunk, const float* x, float* y, int64_t number) {
    const bool alone = chunk.blocks == 1;
    vector sums[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = vector{};
        if (!chunk.first) std::memcpy(sums[r], y + r * chunk.n, chunk.columns * sizeof(float));
    }
    const W* w = chunk.w;
    const int64_t ahead = (alone ? AHEAD : chunk.lines) * PANEL;
    bool mine[VECTORS];
    for (int v = 0; v < VECTORS; v++) mine[v] = v % chunk.blocks == number;
    for (int64_t i = 0; i < chunk.lines; i++, w += PANEL) {
        vector line[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            line[v] = widened(w + v * LANES);
            if (mine[v]) __builtin_prefetch(w + v * LANES + ahead);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float value = x[r * chunk.k + i];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] += value * line[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) std::memcpy(y + r * chunk.n, sums[r], chunk.columns * sizeof(float));
}

template <int R, typename W>
static void up_to(int64_t rows, const Chunk<W>& chunk, const float* x, float* y, int64_t number) {
    if (rows >= R) return block<R>(chunk, x, y, number);
    if constexpr (R > 1) up_to<R - 1>(rows, chunk, x, y, number);
}

// The panels of one thread of those that share a product.
template <typename W>
static void multiply(const float* x, const W* w, float* y, int64_t m, int64_t k, int64_t n) {
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t chunks = blocks <= 1 ? 1 : (k + CHUNK - 1) / CHUNK, lines = (k + chunks - 1) / chunks;
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; p++) {
        const int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
        for (int64_t i = 0; i < k; i += lines) {
            const Chunk<W> chunk{w + (p * k + i) * PANEL, std::min(lines, k - i), k, n, columns, i == 0, blocks};
            for (int64_t b = 0, row = 0; b < blocks; b++) {
                const int64_t rows = (m - row + blocks - b - 1) / (blocks - b);  // alike
                up_to<ROWS>(rows, chunk, x + row * k + i, y + row * n + first, b);
                row += rows;
            }
        }
    }
}

// `wide`: w is float32, else bfloat16.
static void multiply(const float* x, const void* w, bool wide, float* y, int64_t m, int64_t k, int64_t n) {
    wide ? multiply(x, (const float*)w, y, m, k, n) : multiply(x, (const uint16_t*)w, y, m, k, n);
}

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

// gate = silu(gate) * up, `count` values.
static void gate_with(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        vector g{}, u{};
        const size_t bytes = std::min<int64_t>(LANES, count - i) * sizeof(float);
        std::memcpy(&g, gate + i, bytes);
        std::memcpy(&u, up + i, bytes);
        g = g / (exponential(-g) + 1.f) * u;
        std::memcpy(gate + i, &g, bytes);
    }
}

// Rotates a head of width d by its position: the first half with the second.
static void rotate(float* x, const float* cos, const float* sin, int64_t d) {
    for (int64_t i = 0, j = d / 2; i < d / 2; i++, j++) {
        const float a = x[i], b = x[j];
        x[i] = a * cos[i] - b * sin[i];
        x[j] = b * cos[j] + a * sin[j];
    }
}

// y = x / root mean square of x * weight, row by row.
extern "C" void rms_norm(const float* x, const float* weight, float* y, int64_t m, int64_t k, float epsilon) {
    for (int64_t row = 0; row < m; row++, x += k, y += k) {
        vector squares{};
        int64_t i = 0;
        for (; i + LANES <= k; i += LANES) {
            const vector values = *(const vector*)(x + i);
            squares += values * values;
        }
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        for (; i < k; i++) sum += x[i] * x[i];
        const float scale = 1 / std::sqrt(sum / k + epsilon);
        for (i = 0; i < k; i++) y[i] = weight[i] * (x[i] * scale);
    }
}

extern "C" int64_t panel_columns() { return PANEL; }

extern "C" void product(
    const float* x, const void* w, float* y, int64_t m, int64_t k, int64_t n, bool wide, int64_t threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(x, w, wide, y, m, k, n);
}

// y = (silu(x gate) * (x up)) down; `hidden` is room for 2 m times `inner` values.
extern "C" void gated_mlp(
    const float* x, const void* gate, const void* up, const void* down, float* hidden, float* y, int64_t m, int64_t k,
    int64_t inner, int64_t n, bool wide, int64_t threads
) {
    float* other = hidden + m * inner;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        multiply(x, gate, wide, hidden, m, k, inner);
        multiply(x, up, wide, other, m, k, inner);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) gate_with(hidden + row * inner, other + row * inner, inner);
        multiply(hidden, down, wide, y, m, inner, n);
    }
}

// Queries, keys and values of m rows, `heads[0]`, `heads[1]` and `heads[2]` heads of width d, one behind the other in y;
// heads of queries and keys normed, then rotated. Each of `biases` and `norms` may be null; cos and sin are (positions, d),
// row r is at position r % positions.
extern "C" void attention_inputs(
    const float* x, const void* const* weights, const float* const* biases, const float* const* norms,
    const int64_t* heads, const float* cos, const float* sin, float* y, int64_t m, int64_t k, int64_t d,
    int64_t positions, float epsilon, bool wide, int64_t threads
) {
    float* parts[3] = {y, y + m * heads[0] * d, y + m * (heads[0] + heads[1]) * d};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int part = 0; part < 3; part++) multiply(x, weights[part], wide, parts[part], m, k, heads[part] * d);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) {
            const int64_t position = row % positions * d;
            for (int part = 0; part < 3; part++) {
                float* states = parts[part] + row * heads[part] * d;
                if (biases[part])
                    for (int64_t i = 0; i < heads[part] * d; i++) states[i] += biases[part][i];
                if (norms[part]) rms_norm(states, norms[part], states, heads[part], d, epsilon);
                if (part < 2)
                    for (int64_t head = 0; head < heads[part]; head++)
                        rotate(states + head * d, cos + position, sin + position, d);
            }
        }
    }
}
