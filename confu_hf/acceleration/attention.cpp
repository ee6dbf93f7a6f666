// Attention of a few rows over a long text, grouped queries, float32: out = softmax(scale q k + mask) v.
//
// Query rows that read one key head, those of its group of heads, lie side by side in vectors: a key is read once for all
// of them, and maxima and sums of the softmax need nothing across lanes. Threads share the keys, not the heads: each has
// its own maxima, sums and outputs of all rows, which are put together at the end.

#include <cfloat>

#include "vectors.h"

constexpr int TILE = 64;  // keys at once: they and their values stay in the second cache
constexpr int KEYS = REGISTERS / 4, GROUP = REGISTERS / 8, WIDE = 4;  // sums: keys by vectors of rows; rows by WIDE vectors

struct Attention {
    const float *query, *key, *value, *mask;  // query (batch, rows, heads, d); mask may be null
    float* out;                               // (batch, rows, heads, d)
    int64_t batch, rows, heads, key_heads, d, keys;
    int64_t key_batch, key_head, mask_batch, mask_row;  // strides; a key's and a value's are alike
    float scale;

    int64_t group() const { return heads / key_heads; }
    int64_t lanes() const { return group() * rows; }  // that read one key head: row `lane % rows` of head `lane / rows`
};

// Up to V vectors of lanes of one key head: their queries, scores, and what a thread knows of their softmax so far.
template <int V>
struct Lanes {
    static constexpr int COUNT = V * LANES;
    const Attention& a;
    int64_t b, head, first, count;
    std::vector<float> query, out;  // (d, COUNT), (count, d)
    alignas(64) float scores[TILE * COUNT];
    alignas(64) float most[COUNT], sum[COUNT];

    Lanes(const Attention& a, int64_t b, int64_t head, int64_t first)
        : a(a), b(b), head(head), first(first), count(std::min<int64_t>(COUNT, a.lanes() - first)),
          query(a.d * COUNT), out(count * a.d) {
        std::fill(most, most + COUNT, -FLT_MAX);  // what masks hide with: rows that see nothing see all alike
        std::fill(sum, sum + COUNT, 0.f);
        for (int64_t lane = 0; lane < count; lane++) {
            const float* from = a.query + at(lane);
            for (int64_t i = 0; i < a.d; i++) query[i * COUNT + lane] = a.scale * from[i];
        }
    }

    int64_t at(int64_t lane) const {  // of its head and row, in query and out
        const int64_t row = (first + lane) % a.rows, group = (first + lane) / a.rows;
        return ((b * a.rows + row) * a.heads + head * a.group() + group) * a.d;
    }

    template <int K>
    void score(const float* key, float* to) {
        vector sums[K][V] = {};
        for (int64_t i = 0; i < a.d; i++) {
            const float* q = &query[i * COUNT];
#pragma GCC unroll 8
            for (int k = 0; k < K; k++)
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) sums[k][v] += key[k * a.d + i] * *(const vector*)(q + v * LANES);
        }
        std::memcpy(to, sums, sizeof sums);
    }

    // Of `mask`: lanes by lanes, as `scores` are; null if it hides nothing here.
    void tile(int64_t start, int64_t keys, const float* mask) {
        const float *key = a.key + b * a.key_batch + head * a.key_head + start * a.d, *value = key - a.key + a.value;
        int64_t j = 0;
        for (; j + KEYS <= keys; j += KEYS) {
            fetch(value + j * a.d, KEYS * a.d);
            score<KEYS>(key + j * a.d, scores + j * COUNT);
        }
        for (; j < keys; j++) score<1>(key + j * a.d, scores + j * COUNT);
        for (int v = 0; v < V; v++) {
            vector &m = *(vector*)(most + v * LANES), &s = *(vector*)(sum + v * LANES), old = m;
            for (j = 0; j < keys; j++) {
                vector& score = *(vector*)(scores + j * COUNT + v * LANES);
                if (mask) score += *(const vector*)(mask + j * COUNT + v * LANES);
                m = m < score ? score : m;
            }
            const vector fade = exponential(old - m);
            s *= fade;
            for (j = 0; j < keys; j++) {
                vector& score = *(vector*)(scores + j * COUNT + v * LANES);
                score = exponential(score - m);
                s += score;
            }
            for (int64_t lane = v * LANES; lane < std::min<int64_t>(count, (v + 1) * LANES); lane++)
                for (int64_t i = 0; i < a.d; i++) out[lane * a.d + i] *= fade[lane % LANES];
        }
        fetch(head + 1 < a.key_heads ? key + a.key_head : key + TILE * a.d - head * a.key_head, keys * a.d);  // the next ones
        int64_t lane = 0;
        for (; lane + GROUP <= count; lane += GROUP) weigh<GROUP>(lane, keys, value);
        for (; lane < count; lane++) weigh<1>(lane, keys, value);
    }

    template <int R>
    void weigh(int64_t lane, int64_t keys, const float* value) {
        for (int64_t i = 0; i < a.d; i += WIDE * LANES) {
            const int wide = std::min<int64_t>(WIDE, (a.d - i) / LANES);
            wide == WIDE ? weigh<R, WIDE>(lane, keys, value + i, i) : weigh_rest<R>(lane, keys, value + i, i, wide);
        }
    }

    template <int R>
    void weigh_rest(int64_t lane, int64_t keys, const float* value, int64_t i, int wide) {
        for (int w = 0; w < wide; w++) weigh<R, 1>(lane, keys, value + w * LANES, i + w * LANES);
    }

    template <int R, int W>
    void weigh(int64_t lane, int64_t keys, const float* value, int64_t i) {
        vector sums[R][W];
        for (int r = 0; r < R; r++) std::memcpy(sums[r], &out[(lane + r) * a.d + i], sizeof sums[r]);
        for (int64_t j = 0; j < keys; j++) {
            const float* weight = scores + j * COUNT + lane;
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) sums[r][w] += weight[r] * *(const vector*)(value + j * a.d + w * LANES);
        }
        for (int r = 0; r < R; r++) std::memcpy(&out[(lane + r) * a.d + i], sums[r], sizeof sums[r]);
    }
};

// The mask of one tile as the lanes of any head have it; false if it hides nothing.
template <int V>
static bool mask_of(const Attention& a, const Lanes<V>& some, int64_t start, int64_t keys, float* to) {
    if (!a.mask) return false;
    bool hides = false;
    const float* mask = a.mask + some.b * a.mask_batch + start;
    for (int64_t row = 0; row < a.rows; row++)
        for (int64_t j = 0; j < keys; j++) hides |= mask[row * a.mask_row + j] != 0;
    for (int64_t lane = 0; hides && lane < some.count; lane++) {
        const float* from = mask + (some.first + lane) % a.rows * a.mask_row;
        for (int64_t j = 0; j < keys; j++) to[j * Lanes<V>::COUNT + lane] = from[j];
    }
    return hides;
}

template <int V>
static void attend(const Attention& a, int64_t threads) {
    constexpr int COUNT = V * LANES;
    const int64_t tiles = (a.keys + TILE - 1) / TILE, wanted = std::max<int64_t>(1, std::min(threads, tiles));
    const int64_t blocks = (a.lanes() + COUNT - 1) / COUNT, units = a.batch * blocks * a.key_heads;
    std::vector<std::vector<Lanes<V>>> known(wanted);
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();  // perhaps fewer than wanted
        std::vector<Lanes<V>>& mine = known[part];
        mine.reserve(units);
        std::vector<float> mask(TILE * COUNT);
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t from = mine.size();
                for (int64_t head = 0; head < a.key_heads; head++) mine.emplace_back(a, b, head, block * COUNT);
                for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; tile++) {
                    const int64_t start = tile * TILE, keys = std::min<int64_t>(TILE, a.keys - start);
                    const bool hides = mask_of(a, mine[from], start, keys, mask.data());
                    for (int64_t head = 0; head < a.key_heads; head++)
                        mine[from + head].tile(start, keys, hides ? mask.data() : nullptr);
                }
            }
#pragma omp barrier
        for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
            const Lanes<V>& one = known[0][unit];
            for (int64_t lane = 0; lane < one.count; lane++) {
                float most = one.most[lane], sum = 0, *to = a.out + one.at(lane);
                for (int64_t p = 0; p < parts; p++) most = std::max(most, known[p][unit].most[lane]);
                std::fill(to, to + a.d, 0.f);
                for (int64_t p = 0; p < parts; p++) {
                    const Lanes<V>& other = known[p][unit];
                    const float weight = std::exp(other.most[lane] - most);
                    sum += weight * other.sum[lane];
                    for (int64_t i = 0; i < a.d; i++) to[i] += weight * other.out[lane * a.d + i];
                }
                for (int64_t i = 0; i < a.d; i++) to[i] /= sum;
            }
        }
    }
}

extern "C" int64_t lanes() { return LANES; }

extern "C" void attention(const Attention* a, int64_t threads) {
    a->lanes() <= LANES ? attend<1>(*a, threads) : attend<2>(*a, threads);
}
