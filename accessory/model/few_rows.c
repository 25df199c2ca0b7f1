/* What a decoder does to a few tokens on a CPU, at the speed of reading its weights.
 *
 * A matrix [out, in] lies as oneDNN packs it: panels of 64 outputs, in each of which the 64 weights of an input are
 * neighbours (of bf16 those of two inputs alternate). A row's result never depends on which other rows come with it, nor
 * on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define PANEL 64
#define TOGETHER 6 /* rows that a panel is read once for: their sums stay in registers */

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t bf16;

static inline float wide_f32(float x) { return x; }
static inline float narrow_f32(float x) { return x; }
static inline float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline bf16 narrow_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* e^x to 2 units in the last place, many at a time where a loop has many; libm's takes them one by one */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float whole = rintf(x * 1.44269504f), rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1 / 5040.0f;
    sum = sum * rest + 1 / 720.0f;
    sum = sum * rest + 1 / 120.0f;
    sum = sum * rest + 1 / 24.0f;
    sum = sum * rest + 1 / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1;
    sum = sum * rest + 1;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

/* sums[r][64] of rows r: the panel's weights times x[r] */
static inline __attribute__((always_inline)) void sums_f32(
    const float *panel, const float *x, long in, const int rows, lanes sums[TOGETHER][4]) {
    for (long i = 0; i < in; i++) {
        const lanes *w = (const lanes *)(panel + i * PANEL);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++) sums[r][j] += w[j] * x[r * in + i];
    }
}
static inline __attribute__((always_inline)) void sums_bf16(
    const bf16 *panel, const bf16 *x, long in, const int rows, lanes sums[TOGETHER][4]) {
    for (long i = 0; i < in; i += 2) {
        const words *w = (const words *)(panel + i * PANEL);
        for (int r = 0; r < rows; r++) {
#ifdef __AVX512BF16__ /* multiplies two inputs at once */
            uint32_t both;
            memcpy(&both, x + r * in + i, 4);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            for (int j = 0; j < 4; j++) sums[r][j] = (lanes)_mm512_dpbf16_ps((__m512)sums[r][j], (__m512bh)w[j], pair);
#else
            float even = wide_bf16(x[r * in + i]), odd = wide_bf16(x[r * in + i + 1]);
            for (int j = 0; j < 4; j++) {
                sums[r][j] += (lanes)(w[j] << 16) * even;
                sums[r][j] += (lanes)(w[j] & 0xffff0000u) * odd;
            }
#endif
        }
    }
}

#define FOR_DTYPE(T, D)                                                                                                  \
    static void panel_times_##D(const T *panel, const T *x, long in, long rows, float sums[TOGETHER][PANEL]) {           \
        lanes s[TOGETHER][4] = {0};                                                                                      \
        switch (rows) {                                                                                                  \
            case 1: sums_##D(panel, x, in, 1, s); break;                                                                 \
            case 2: sums_##D(panel, x, in, 2, s); break;                                                                 \
            case 3: sums_##D(panel, x, in, 3, s); break;                                                                 \
            case 4: sums_##D(panel, x, in, 4, s); break;                                                                 \
            case 5: sums_##D(panel, x, in, 5, s); break;                                                                 \
            default: sums_##D(panel, x, in, 6, s);                                                                       \
        }                                                                                                                \
        memcpy(sums, s, sizeof s);                                                                                       \
    }                                                                                                                    \
                                                                                                                         \
    /* y [rows, out] = x [rows, in] times the transposed matrix */                                                       \
    void product_##D(const T *matrix, const T *x, T *y, long rows, long out, long in, int threads) {                     \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                \
        for (long begin = 0; begin < out; begin += PANEL) {                                                              \
            float sums[TOGETHER][PANEL];                                                                                 \
            long width = out - begin < PANEL ? out - begin : PANEL;                                                      \
            for (long r = 0; r < rows; r += TOGETHER) {                                                                  \
                long some = rows - r < TOGETHER ? rows - r : TOGETHER;                                                   \
                panel_times_##D(matrix + begin * in, x + r * in, in, some, sums);                                        \
                for (long n = 0; n < some; n++)                                                                          \
                    for (long j = 0; j < width; j++) y[(r + n) * out + begin + j] = narrow_##D(sums[n][j]);              \
            }                                                                                                            \
        }                                                                                                                \
    }                                                                                                                    \
                                                                                                                         \
    /* y [n, dim] = the sum over each row's choices of weight * w2(silu(w1 x) * (w3 x)), the experts from `first` on alone. \
     * chosen, weight [n, top]: experts and what they count; w1, w2, w3 [experts]: where theirs lie;                     \
     * scratch: rows, ends [n * top + experts], xs [n * top, dim], hs [n * top, hidden], sums [n, dim] */                \
    void experts_##D(const T *const *w1, const T *const *w2, const T *const *w3, const T *x, const int64_t *chosen,      \
                     const float *weight, int *rows, T *xs, T *hs, float *sums, T *y, long n, long top, long first,      \
                     long experts, long dim, long hidden, int threads) {                                                 \
        const long inner = (hidden + PANEL - 1) / PANEL, outer = (dim + PANEL - 1) / PANEL;                              \
        int *ends = rows + n * top, count = 0;                                                                           \
        for (long e = 0; e < experts; e++) {                                                                             \
            for (long c = 0; c < n * top; c++)                                                                           \
                if (chosen[c] == first + e) {                                                                            \
                    memcpy(xs + count * dim, x + c / top * dim, dim * sizeof(T));                                        \
                    rows[count++] = c;                                                                                   \
                }                                                                                                        \
            ends[e] = count;                                                                                             \
        }                                                                                                                \
        memset(sums, 0, n * dim * sizeof(float));                                                                        \
        _Pragma("omp parallel num_threads(threads)") {                                                                   \
            float gate[TOGETHER][PANEL], up[TOGETHER][PANEL];                                                            \
            _Pragma("omp for schedule(static)")                                                                          \
            for (long place = 0; place < experts * inner; place++) {                                                     \
                const long e = place % experts, begin = place / experts * PANEL, stop = ends[e];                         \
                const long width = hidden - begin < PANEL ? hidden - begin : PANEL;                                      \
                for (long r = e ? ends[e - 1] : 0; r < stop; r += TOGETHER) {                                            \
                    const long some = stop - r < TOGETHER ? stop - r : TOGETHER;                                         \
                    panel_times_##D(w1[e] + begin * dim, xs + r * dim, dim, some, gate);                                 \
                    panel_times_##D(w3[e] + begin * dim, xs + r * dim, dim, some, up);                                   \
                    for (long m = 0; m < some; m++)                                                                      \
                        for (long j = 0; j < width; j++)                                                                 \
                            hs[(r + m) * hidden + begin + j] =                                                           \
                                narrow_##D(gate[m][j] / (1.0f + exponential(-gate[m][j])) * up[m][j]);                   \
                }                                                                                                        \
            }                                                                                                            \
            _Pragma("omp for schedule(static)")                                                                          \
            for (long part = 0; part < outer; part++) {                                                                  \
                const long begin = part * PANEL, width = dim - begin < PANEL ? dim - begin : PANEL;                      \
                for (long e = 0; e < experts; e++)                                                                       \
                    for (long r = e ? ends[e - 1] : 0, stop = ends[e]; r < stop; r += TOGETHER) {                        \
                        const long some = stop - r < TOGETHER ? stop - r : TOGETHER;                                     \
                        panel_times_##D(w2[e] + begin * hidden, hs + r * hidden, hidden, some, gate);                    \
                        for (long m = 0; m < some; m++)                                                                  \
                            for (long j = 0; j < width; j++)                                                             \
                                sums[rows[r + m] / top * dim + begin + j] += gate[m][j] * weight[rows[r + m]];           \
                    }                                                                                                    \
                for (long r = 0; r < n; r++)                                                                             \
                    for (long j = begin; j < begin + width; j++) y[r * dim + j] = narrow_##D(sums[r * dim + j]);         \
            }                                                                                                            \
        }                                                                                                                \
    }

/* h rotated by the complex numbers of its place, rounded as it is kept */
#define ROTATED(h, turn, i, D) \
    const float a = wide_##D((h)[2 * (i)]), b = wide_##D((h)[2 * (i) + 1]), c = (turn)[2 * (i)], d = (turn)[2 * (i) + 1];

static inline float total_of(lanes x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return x[0] + x[1];
}

#define AHEAD 12 /* keys: those of one document come from afar, and the processor does not guess which are next */
#define PLACE(at) (table[n * most + (at) / page] * page + (at) % page)
#define FETCH(from, size)                                                                                                \
    for (long i = 0; i < (size); i += 64 / sizeof *(from)) __builtin_prefetch((from) + i);

#define STEPS_FOR_DTYPE(T, D)                                                                                            \
    /* y [rows, dim] = x / rms(x) * weight */                                                                            \
    void norm_##D(const T *x, const T *weight, T *y, double eps, long rows, long dim, int threads) {                     \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (rows > 8)")                                  \
        for (long r = 0; r < rows; r++) {                                                                                \
            float square = 0;                                                                                            \
            _Pragma("omp simd reduction(+ : square)")                                                                    \
            for (long i = 0; i < dim; i++) {                                                                             \
                float value = wide_##D(x[r * dim + i]);                                                                  \
                square += value * value;                                                                                 \
            }                                                                                                            \
            const float scale = 1.0f / sqrtf(square / dim + (float)eps);                                                 \
            _Pragma("omp simd")                                                                                          \
            for (long i = 0; i < dim; i++)                                                                               \
                y[r * dim + i] =                                                                                         \
                    narrow_##D(wide_##D(narrow_##D(wide_##D(x[r * dim + i]) * scale)) * wide_##D(weight[i]));            \
        }                                                                                                                \
    }                                                                                                                    \
                                                                                                                         \
    /* y [n, heads, size]: each row's queries over the `used` keys of its pages, among which its own is put first.       \
     * q [n, heads, size], k, v [n, shared, size]; turn [n, size / 2] complex; keys, values [pages, page, shared, size]; \
     * places [n], table [n, most], used [n]: see CacheView; window 0: all; scores [n, heads, most * page]: scratch */   \
    void attend_##D(const T *q, const T *k, const T *v, const float *turns, T *keys, T *values, const int64_t *places,   \
                    const int *table, const int *used, float *scores, T *y, long rows, long heads, long shared,          \
                    long size, long page, long most, long window, int threads) {                                         \
        const long group = heads / shared, blocks = (size + 15) / 16;                                                    \
        const float scaling = 1.0f / sqrtf(size);                                                                        \
        _Pragma("omp parallel for collapse(2) schedule(static) num_threads(threads)")                                    \
        for (long n = 0; n < rows; n++)                                                                                  \
            for (long s = 0; s < shared; s++) {                                                                          \
                const float *turn = turns + n * size;                                                                    \
                const long own = (places[n] * shared + s) * size, new = (n * shared + s) * size;                         \
                for (long i = 0; i < size / 2; i++) {                                                                    \
                    ROTATED(k + new, turn, i, D)                                                                         \
                    keys[own + 2 * i] = narrow_##D(a * c - b * d);                                                       \
                    keys[own + 2 * i + 1] = narrow_##D(a * d + b * c);                                                   \
                }                                                                                                        \
                memcpy(values + own, v + new, size * sizeof(T));                                                         \
                const long first = window && used[n] > window ? used[n] - window : 0;                                    \
                lanes query[group][blocks], sum[group][blocks], shown[blocks];                                           \
                float *score = scores + (n * heads + s * group) * most * page, total[group];                             \
                memset(query, 0, sizeof query), memset(sum, 0, sizeof sum), memset(shown, 0, sizeof shown);              \
                for (long h = 0; h < group; h++) {                                                                       \
                    const T *head = q + (n * heads + s * group + h) * size;                                              \
                    float *turned = (float *)query[h];                                                                   \
                    for (long i = 0; i < size / 2; i++) {                                                                \
                        ROTATED(head, turn, i, D)                                                                        \
                        turned[2 * i] = wide_##D(narrow_##D(a * c - b * d)) * scaling;                                   \
                        turned[2 * i + 1] = wide_##D(narrow_##D(a * d + b * c)) * scaling;                               \
                    }                                                                                                    \
                }                                                                                                        \
                for (long at = first; at < used[n]; at++) {                                                              \
                    const T *key = keys + (PLACE(at) * shared + s) * size;                                               \
                    FETCH(keys + (PLACE(at + AHEAD < used[n] ? at + AHEAD : at) * shared + s) * size, size)              \
                    for (long i = 0; i < size; i++) ((float *)shown)[i] = wide_##D(key[i]);                              \
                    for (long h = 0; h < group; h++) {                                                                   \
                        lanes product = {0};                                                                             \
                        for (long b = 0; b < blocks; b++) product += query[h][b] * shown[b];                             \
                        score[h * most * page + at] = total_of(product);                                                 \
                    }                                                                                                    \
                }                                                                                                        \
                for (long h = 0; h < group; h++) {                                                                       \
                    float *row = score + h * most * page, top = -INFINITY, all = 0;                                      \
                    _Pragma("omp simd reduction(max : top)")                                                             \
                    for (long at = first; at < used[n]; at++) top = row[at] > top ? row[at] : top;                       \
                    _Pragma("omp simd reduction(+ : all)")                                                               \
                    for (long at = first; at < used[n]; at++) all += row[at] = exponential(row[at] - top);               \
                    total[h] = all;                                                                                      \
                }                                                                                                        \
                for (long at = first; at < used[n]; at++) {                                                              \
                    const T *value = values + (PLACE(at) * shared + s) * size;                                           \
                    FETCH(values + (PLACE(at + AHEAD < used[n] ? at + AHEAD : at) * shared + s) * size, size)            \
                    for (long i = 0; i < size; i++) ((float *)shown)[i] = wide_##D(value[i]);                            \
                    for (long h = 0; h < group; h++)                                                                     \
                        for (long b = 0; b < blocks; b++) sum[h][b] += shown[b] * score[h * most * page + at];           \
                }                                                                                                        \
                for (long h = 0; h < group; h++)                                                                         \
                    for (long i = 0; i < size; i++)                                                                      \
                        y[(n * heads + s * group + h) * size + i] = narrow_##D(((float *)sum[h])[i] / total[h]);         \
            }                                                                                                            \
    }

FOR_DTYPE(float, f32)
FOR_DTYPE(bf16, bf16)
STEPS_FOR_DTYPE(float, f32)
STEPS_FOR_DTYPE(bf16, bf16)
