// Products of a few rows with a large matrix: y (m, n) = x (m, k) times w (k, n), float32.
//
// w comes in panels of PANEL columns, (n / PANEL, k, PANEL), the last one filled up with zeros: each is read from memory
// once, from front to back. The sums of up to ROWS rows stay in registers meanwhile, so eight rows read what one reads.
// More rows are several such blocks, of like size, one after the other over a chunk of a panel: while they compute, each
// fetches its share of the next chunk, so that memory is read all the time, not by the first block alone.

#include <algorithm>
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

// What the blocks of rows of one chunk have in common.
struct Chunk {
    const float* w;  // its lines, PANEL values each
    int64_t lines, k, n, columns;  // `columns` of the panel belong to y
    bool first;  // of its panel: sums start at zero
    int64_t blocks;
};

// R rows of x times one chunk; block number `number` of its rows.
template <int R>
static inline void block(const Chunk& chunk, const float* x, float* y, int64_t number) {
    const bool alone = chunk.blocks == 1;
    vector sums[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = vector{};
        if (!chunk.first) std::memcpy(sums[r], y + r * chunk.n, chunk.columns * sizeof(float));
    }
    const float* w = chunk.w;
    const int64_t ahead = (alone ? AHEAD : chunk.lines) * PANEL;
    bool mine[VECTORS];
    for (int v = 0; v < VECTORS; v++) mine[v] = v % chunk.blocks == number;
    for (int64_t i = 0; i < chunk.lines; i++, w += PANEL) {
        vector line[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            line[v] = *(const vector*)(w + v * LANES);
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

template <int R>
static void up_to(int64_t rows, const Chunk& chunk, const float* x, float* y, int64_t number) {
    if (rows >= R) return block<R>(chunk, x, y, number);
    if constexpr (R > 1) up_to<R - 1>(rows, chunk, x, y, number);
}

extern "C" int64_t panel_columns() { return PANEL; }

extern "C" void product(
    const float* x, const float* w, float* y, int64_t m, int64_t k, int64_t n, int64_t threads
) {
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
    const int64_t chunks = blocks == 1 ? 1 : (k + CHUNK - 1) / CHUNK, lines = chunks ? (k + chunks - 1) / chunks : 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels; p++) {
        const int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
        for (int64_t i = 0; i < k; i += lines) {
            const Chunk chunk{w + (p * k + i) * PANEL, std::min(lines, k - i), k, n, columns, i == 0, blocks};
            for (int64_t b = 0, row = 0; b < blocks; b++) {
                const int64_t rows = (m - row + blocks - b - 1) / (blocks - b);  // alike
                up_to<ROWS>(rows, chunk, x + row * k + i, y + row * n + first, b);
                row += rows;
            }
        }
    }
}
