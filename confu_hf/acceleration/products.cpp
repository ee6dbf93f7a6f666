// Products of a few rows with a large matrix: y (m, n) = x (m, k) times w (k, n), float32.
//
// w comes in panels of PANEL columns, (n / PANEL, k, PANEL), the last one filled up with zeros: each is read from memory
// once, from front to back. The sums of up to ROWS rows stay in registers meanwhile, so eight rows read what one reads.

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 8;  // 24 of 32 registers hold sums
#else
constexpr int LANES = 8, ROWS = 4;  // 12 of 16
#endif
constexpr int VECTORS = 3, PANEL = VECTORS * LANES;
constexpr int AHEAD = 16;  // lines of a panel that are fetched in advance

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// R rows of x times one panel; `columns` of the panel belong to y.
template <int R>
static inline void block(const float* x, int64_t k, const float* w, float* y, int64_t n, int64_t columns) {
    vector sums[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = vector{};
    for (int64_t i = 0; i < k; i++, w += PANEL) {
        vector line[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            line[v] = *(const vector*)(w + v * LANES);
            __builtin_prefetch(w + v * LANES + AHEAD * PANEL);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float value = x[r * k + i];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] += value * line[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) std::memcpy(y + r * n, sums[r], columns * sizeof(float));
}

template <int R>
static void up_to(int64_t rows, const float* x, int64_t k, const float* w, float* y, int64_t n, int64_t columns) {
    if (rows >= R) return block<R>(x, k, w, y, n, columns);
    if constexpr (R > 1) up_to<R - 1>(rows, x, k, w, y, n, columns);
}

extern "C" int64_t panel_columns() { return PANEL; }

extern "C" void product(
    const float* x, const float* w, float* y, int64_t m, int64_t k, int64_t n, int64_t threads
) {
    const int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels; p++) {
        const int64_t first = p * PANEL, columns = n - first < PANEL ? n - first : PANEL;
        for (int64_t row = 0; row < m; row += ROWS)
            up_to<ROWS>(m - row, x + row * k, k, w + p * k * PANEL, y + row * n + first, n, columns);
    }
}
