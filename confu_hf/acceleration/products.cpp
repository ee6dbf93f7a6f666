// What a transformer's layer computes of a few rows, float32: products with large matrices, y (m, n) = x (m, k) times
// w (k, n), and what stands between them. Weights are float32, or bfloat16 that is widened as it is read.
//
// w comes in panels of PANEL columns, (n / PANEL, k, PANEL), the last one filled up with zeros: each is read from memory
// once, from front to back. The sums of up to ROWS rows stay in registers meanwhile, so eight rows read what one reads.
// More rows are several such blocks, of like size, one after the other over a chunk of a panel: while they compute, each
// fetches its share of the next chunk, so that memory is read all the time, not by the first block alone.
//
// A product may be one that a gated LoRA adds to, for some of the rows: see Gate.

#include "vectors.h"

constexpr int ROWS = REGISTERS / 4;  // of their sums 24 registers of 32 are full, or 12 of 16
constexpr int VECTORS = 3, PANEL = VECTORS * LANES;
constexpr int AHEAD = 16;  // lines of a panel that a single block fetches in advance
constexpr int CHUNK = 96;  // lines of a panel that several blocks go through together, at most: they fit the first cache

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

// What a gated LoRA adds to a product: y += scale (x down) up. `down` has `rank` lines of k values, `up` comes in panels,
// as w does.
struct LowRank {
    const float *down, *up;
    int64_t down_stride, rank;
    float scale;
};

// To which rows: of every `length` rows those from `first` on.
struct Gate {
    int64_t length, first;
};

// A product's low-rank part, if it has one: `lower` by all threads and a barrier, then `raise` panel by panel.
struct Low {
    const LowRank* more;
    std::vector<int64_t> rows;  // that get it
    std::vector<float> said;    // (rows, rank): scale (x down)

    Low(const LowRank* more, Gate gate, int64_t m) : more(more) {
        if (!more) return;
        for (int64_t row = 0; row < m; row++)
            if (row % gate.length >= gate.first) rows.push_back(row);
        said.resize(rows.size() * more->rank);
    }

    void lower(const float* x, int64_t k) {
        if (!more) return;
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < more->rank; j++) {
            float* to = &said[j];
            if (j + 1 < more->rank) fetch(more->down + (j + 1) * more->down_stride, k);
            for (int64_t row : rows) {
                *to = more->scale * dot(x + row * k, more->down + j * more->down_stride, k);
                to += more->rank;
            }
        }
    }

    // Before panel p of w is multiplied: those of `up` lie elsewhere.
    void ahead(int64_t p) const {
        if (more) fetch(more->up + p * more->rank * PANEL, more->rank * PANEL);
    }

    void raise(float* y, int64_t n, int64_t p, int64_t columns) const {
        if (!more) return;
        const float *lines = more->up + p * more->rank * PANEL, *value = said.data();
        for (int64_t row : rows) {
            float* to = y + row * n + p * PANEL;
            vector sums[VECTORS];
            std::memcpy(sums, to, columns * sizeof(float));
            for (int64_t j = 0; j < more->rank; j++, value++)
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++) sums[v] += *value * *(const vector*)(lines + j * PANEL + v * LANES);
            std::memcpy(to, sums, columns * sizeof(float));
        }
    }
};

template <int R, typename W>
static void up_to(int64_t rows, const Chunk<W>& chunk, const float* x, float* y, int64_t number) {
    if (rows >= R) return block<R>(chunk, x, y, number);
    if constexpr (R > 1) up_to<R - 1>(rows, chunk, x, y, number);
}

// The panels of one thread of those that share a product.
template <typename W>
static void multiply(const float* x, const W* w, float* y, int64_t m, int64_t k, int64_t n, const Low& low) {
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t chunks = blocks <= 1 ? 1 : (k + CHUNK - 1) / CHUNK, lines = (k + chunks - 1) / chunks;
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; p++) {
        const int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
        low.ahead(p);
        for (int64_t i = 0; i < k; i += lines) {
            const Chunk<W> chunk{w + (p * k + i) * PANEL, std::min(lines, k - i), k, n, columns, i == 0, blocks};
            for (int64_t b = 0, row = 0; b < blocks; b++) {
                const int64_t rows = (m - row + blocks - b - 1) / (blocks - b);  // alike
                up_to<ROWS>(rows, chunk, x + row * k + i, y + row * n + first, b);
                row += rows;
            }
        }
        low.raise(y, n, p, columns);
    }
}

// `wide`: w is float32, else bfloat16.
static void multiply(
    const float* x, const void* w, bool wide, float* y, int64_t m, int64_t k, int64_t n, const Low& low
) {
    wide ? multiply(x, (const float*)w, y, m, k, n, low) : multiply(x, (const uint16_t*)w, y, m, k, n, low);
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

// y = x / root mean square of x * weight, one row.
static void norm_row(const float* x, const float* weight, float* y, int64_t k, float epsilon) {
    const float scale = 1 / std::sqrt(dot(x, x, k) / k + epsilon);
    for (int64_t i = 0; i < k; i++) y[i] = weight[i] * (x[i] * scale);
}

extern "C" void rms_norm(const float* x, const float* weight, float* y, int64_t m, int64_t k, float epsilon) {
    for (int64_t row = 0; row < m; row++) norm_row(x + row * k, weight, y + row * k, k, epsilon);
}

extern "C" int64_t panel_columns() { return PANEL; }

extern "C" void product(
    const float* x, const void* w, float* y, int64_t m, int64_t k, int64_t n, bool wide, int64_t threads
) {
    const Low none(nullptr, {}, m);
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(x, w, wide, y, m, k, n, none);
}

// `more` of this and the following: of each product in turn, or null.
//
// A gated MLP: y = (silu(x gate) * (x up)) down, by all threads of a team. `hidden` is room for 2 m times `inner` values.
struct GatedMLP {
    const void *gate, *up, *down;
    bool wide;
    int64_t k, inner;
    Low low_gate, low_up, low_down;

    GatedMLP(const void* const* weights, bool wide, int64_t k, int64_t inner, const LowRank* const* more, Gate rows, int64_t m)
        : gate(weights[0]), up(weights[1]), down(weights[2]), wide(wide), k(k), inner(inner), low_gate(more[0], rows, m),
          low_up(more[1], rows, m), low_down(more[2], rows, m) {}

    void operator()(const float* x, float* hidden, float* y, int64_t m) {
        float* other = hidden + m * inner;
        if (low_gate.more || low_up.more) {
            low_gate.lower(x, k);
            low_up.lower(x, k);
#pragma omp barrier
        }
        multiply(x, gate, wide, hidden, m, k, inner, low_gate);
        multiply(x, up, wide, other, m, k, inner, low_up);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) gate_with(hidden + row * inner, other + row * inner, inner);
        if (low_down.more) {
            low_down.lower(hidden, inner);
#pragma omp barrier
        }
        multiply(hidden, down, wide, y, m, inner, k, low_down);
    }
};

extern "C" void gated_mlp(
    const float* x, const void* const* weights, float* hidden, float* y, int64_t m, int64_t k, int64_t inner, bool wide,
    const LowRank* const* more, Gate gate, int64_t threads
) {
    GatedMLP mlp(weights, wide, k, inner, more, gate, m);
#pragma omp parallel num_threads(threads) if (threads > 1)
    mlp(x, hidden, y, m);
}

// The second half of a layer: h = x + attended o, y = h + mlp(norm(h)). `attended` is (m, a); `room` is for 2 m (k + inner)
// values.
extern "C" void layer_end(
    const float* attended, const float* x, const void* o, const float* norm, const void* const* weights, float* room,
    float* y, int64_t m, int64_t a, int64_t k, int64_t inner, float epsilon, bool wide, const LowRank* const* more,
    Gate gate, int64_t threads
) {
    Low low(more[0], gate, m);
    GatedMLP mlp(weights, wide, k, inner, more + 1, gate, m);
    float *h = room, *normed = h + m * k, *hidden = normed + m * k;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (low.more) {
            low.lower(attended, a);
#pragma omp barrier
        }
        multiply(attended, o, wide, h, m, a, k, low);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) {
            for (int64_t i = row * k; i < (row + 1) * k; i++) h[i] += x[i];
            norm_row(h + row * k, norm, normed + row * k, k, epsilon);
        }
        mlp(normed, hidden, y, m);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m * k; i++) y[i] += h[i];
    }
}

// Queries, keys and values of m rows, `heads[0]`, `heads[1]` and `heads[2]` heads of width d, one behind the other in y;
// heads of queries and keys normed, then rotated. Each of `biases` and `norms` may be null; cos and sin are (positions, d),
// row r is at position r % positions. With a `norm`, rows are normed first; `normed` is room for them.
extern "C" void attention_inputs(
    const float* x, const float* norm, float* normed, const void* const* weights, const float* const* biases,
    const float* const* norms, const int64_t* heads, const float* cos, const float* sin, float* y, int64_t m, int64_t k,
    int64_t d, int64_t positions, float norm_epsilon, float epsilon, bool wide, const LowRank* const* more, Gate gate,
    int64_t threads
) {
    float* parts[3] = {y, y + m * heads[0] * d, y + m * (heads[0] + heads[1]) * d};
    Low low[3] = {{more[0], gate, m}, {more[1], gate, m}, {more[2], gate, m}};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float* rows = norm ? normed : x;
        if (norm) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) norm_row(x + row * k, norm, normed + row * k, k, norm_epsilon);
        }
        if (low[0].more || low[1].more || low[2].more) {
            for (int part = 0; part < 3; part++) low[part].lower(rows, k);
#pragma omp barrier
        }
        for (int part = 0; part < 3; part++)
            multiply(rows, weights[part], wide, parts[part], m, k, heads[part] * d, low[part]);
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

// One number for every BLOCK words: changing one word changes it, and so does exchanging words, but for one case in 2^32.
constexpr int64_t BLOCK = 1 << 14;
extern "C" int64_t checksum_block() { return BLOCK; }
extern "C" void checksum(const uint32_t* x, uint32_t* sums, int64_t count, int64_t threads) {
    constexpr int WAYS = 4;
    const words factor = words{} + 0x9E3779B1u;  // odd: no multiple of a change vanishes
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        const uint32_t *at = x + block * BLOCK, *end = x + std::min(count, (block + 1) * BLOCK);
        words found[WAYS] = {};
        for (; at + WAYS * LANES <= end; at += WAYS * LANES)
            for (int way = 0; way < WAYS; way++) {
                words read;
                std::memcpy(&read, at + way * LANES, sizeof read);
                found[way] = found[way] * factor + read;
            }
        uint32_t sum = 0;
        for (int way = 0; way < WAYS; way++)
            for (int lane = 0; lane < LANES; lane++) sum = sum * 0x85EBCA77u + found[way][lane];
        for (; at < end; at++) sum = sum * 0x85EBCA77u + *at;
        sums[block] = sum;
    }
}
