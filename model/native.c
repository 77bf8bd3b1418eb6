/* One forward pass of a few tokens through the KV cache, on the CPU in float32: what model/step.py does, in one call.

   Every thread keeps the residual stream of all tokens for itself and computes norms redundantly; matrices are cut by
   output rows, attention by heads, and the threads meet six times a layer. Weights are read once for up to four tokens.
   A matrix is float32, int8 with a scale per row, or int4 with scales and zeros per group (model/quantize.py). */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Int;

typedef struct {
  const void *codes;       /* NULL: there is no such matrix */
  const uint16_t *scales;  /* bfloat16 */
  const uint16_t *zeros;   /* bfloat16, with 4 bits */
  const float *bias;       /* or NULL */
  Int out, in, bits, group;
} Matrix;

typedef struct {
  const float *weight, *bias; /* [n]; NULL: there is no such norm */
  double eps;
  Int per_head, centred; /* a weight for each head; LayerNorm rather than RMSNorm */
} Norm;

typedef struct {
  Norm attention_norm, q_norm, k_norm, feed_forward_norm;
  Matrix q, k, v, o, gate, up, down;
} Layer;

typedef struct {
  Int width, heads, kv_heads, head_size, inner, layers, post_norm;
  Norm norm;
  Matrix head;
  const Layer *layer;
  const float *embedding;   /* [vocabulary, width], or NULL */
  const float *frequencies; /* [head_size / 2], radians per position */
  double rotary_factor;     /* on cosines and sines */
} Model;

typedef struct {
  Int tokens, threads, chosen;
  const Int *ids;              /* [tokens], if there is an embedding, or else */
  const float *embedded;       /* [tokens, width] */
  const Int *rows, *positions; /* [tokens] */
  const Int *wanted;           /* [chosen], the tokens whose logits are wanted */
  float *keys, *values;        /* [layers, rows, kv_heads, slots, head_size] */
  Int layer_stride, row_stride, slots, window;
  float *work;   /* `plait_work` floats */
  float *out;    /* [chosen, vocabulary], or [chosen, width] after the last norm if there is no head */
} Pass;

static float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

/* Products of n tokens (x and y have these strides) with the rows [from, to) of a matrix. Four rows that lie far apart
   are read at a time: more streams bring more bytes from memory. LANES floats are loaded at a time, what remains one by
   one. Rows of 4 bits are made floats in `unpacked` first. */

#define DEFINE_PRODUCTS(NAME, TARGET, V, LANES, MOST, ZERO, FLOATS, INT8S, INT4S, FMA, SPLAT, SUM, STORE)              \
  TARGET static inline __attribute__((always_inline)) void NAME##_tile(                                                \
      const void *const *rows, const int many, const int is_int8, const float *scales, Int in, const float *x, Int xs, \
      const int n, float *y, Int ys, Int apart) {                                                                      \
    V a[4][4];                                                                                                         \
    for (int r = 0; r < many; r++)                                                                                     \
      for (int t = 0; t < n; t++) a[r][t] = ZERO;                                                                      \
    Int i = 0;                                                                                                         \
    for (; i + LANES <= in; i += LANES)                                                                                \
      for (int r = 0; r < many; r++) {                                                                                 \
        V w = is_int8 ? INT8S((const int8_t *)rows[r] + i) : FLOATS((const float *)rows[r] + i);                       \
        for (int t = 0; t < n; t++) a[r][t] = FMA(w, FLOATS(x + t * xs + i), a[r][t]);                                 \
      }                                                                                                                \
    for (int r = 0; r < many; r++)                                                                                     \
      for (int t = 0; t < n; t++) {                                                                                    \
        float total = SUM(a[r][t]);                                                                                    \
        for (Int j = i; j < in; j++)                                                                                   \
          total += (is_int8 ? ((const int8_t *)rows[r])[j] : ((const float *)rows[r])[j]) * x[t * xs + j];             \
        y[t * ys + r * apart] = total * scales[r];                                                                     \
      }                                                                                                                \
  }                                                                                                                    \
  TARGET static void NAME##_unpack(const Matrix *m, Int o, float *row) {                                               \
    Int groups = (m->in + m->group - 1) / m->group;                                                                    \
    const uint8_t *codes = (const uint8_t *)m->codes + o * ((m->in + 1) / 2);                                          \
    for (Int first = 0; first < groups; first += 64) {                                                                 \
      float scales[64], zeros[64];                                                                                     \
      Int count = groups - first < 64 ? groups - first : 64;                                                           \
      for (Int g = 0; g < count; g++) {                                                                                \
        scales[g] = from_bfloat16(m->scales[o * groups + first + g]);                                                  \
        zeros[g] = from_bfloat16(m->zeros[o * groups + first + g]) - 8 * scales[g];                                    \
      }                                                                                                                \
      for (Int g = 0; g < count; g++) {                                                                                \
        Int i = (first + g) * m->group, end = i + m->group < m->in ? i + m->group : m->in;                             \
        V scale = SPLAT(scales[g]), zero = SPLAT(zeros[g]);                                                            \
        __builtin_prefetch(codes + i / 2 + 512);                                                                       \
        for (; i + 2 * LANES <= end; i += 2 * LANES) {                                                                 \
          V w, u;                                                                                                      \
          INT4S(codes + i / 2, &w, &u);                                                                                \
          STORE(row + i, FMA(w, scale, zero));                                                                         \
          STORE(row + i + LANES, FMA(u, scale, zero));                                                                 \
        }                                                                                                              \
        for (; i < end; i++) row[i] = (codes[i / 2] >> (i % 2 * 4) & 15) * scales[g] + zeros[g];                       \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  TARGET static void NAME(const Matrix *m, Int from, Int to, const float *x, Int xs, float *y, Int ys, Int n,          \
                          float *unpacked) {                                                                           \
    Int apart = (to - from) / 4;                                                                                       \
    for (Int o = from; o < to; o++) {                                                                                  \
      int many = o < from + apart ? 4 : 1;                                                                             \
      if (o == from + apart) o += 3 * apart;                                                                           \
      if (o == to) return;                                                                                             \
      const void *rows[4];                                                                                             \
      float scales[4] = {1, 1, 1, 1};                                                                                  \
      for (int r = 0; r < many; r++) {                                                                                 \
        Int row = o + r * apart;                                                                                       \
        rows[r] = (const char *)m->codes + row * m->in * (m->bits / 8);                                                \
        if (m->bits == 8) scales[r] = from_bfloat16(m->scales[row]);                                                   \
        if (m->bits == 4) NAME##_unpack(m, row, unpacked + r * m->in), rows[r] = unpacked + r * m->in;                 \
      }                                                                                                                \
      for (Int t = 0; t < n; t += MOST) {                                                                              \
        const float *in = x + t * xs;                                                                                  \
        float *out = y + t * ys + o;                                                                                   \
        EACH_COUNT(MOST, n - t, NAME)                                                                                  \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  TARGET static void NAME##_mix(const float *weights, const float *values, Int count, Int size, float *out) {          \
    Int j = 0;                                                                                                         \
    for (; j + 4 * LANES <= size; j += 4 * LANES) {                                                                    \
      V a[4];                                                                                                          \
      for (int l = 0; l < 4; l++) a[l] = FLOATS(out + j + l * LANES);                                                  \
      for (Int i = 0; i < count; i++)                                                                                  \
        for (int l = 0; l < 4; l++) a[l] = FMA(SPLAT(weights[i]), FLOATS(values + i * size + j + l * LANES), a[l]);    \
      for (int l = 0; l < 4; l++) STORE(out + j + l * LANES, a[l]);                                                    \
    }                                                                                                                  \
    for (; j < size; j++)                                                                                              \
      for (Int i = 0; i < count; i++) out[j] += weights[i] * values[i * size + j];                                     \
  }                                                                                                                    \
  TARGET static float NAME##_dot(const float *x, const float *y, Int n) {                                              \
    V a = ZERO;                                                                                                        \
    Int i = 0;                                                                                                         \
    for (; i + LANES <= n; i += LANES) a = FMA(FLOATS(x + i), FLOATS(y + i), a);                                       \
    float total = SUM(a);                                                                                              \
    for (; i < n; i++) total += x[i] * y[i];                                                                           \
    return total;                                                                                                      \
  }

/* The tile with numbers of rows and tokens that are constants. */
#define TILE(NAME, ROWS, COUNT)                                                                      \
  m->bits == 8 ? NAME##_tile(rows, ROWS, 1, scales, m->in, in, xs, COUNT, out, ys, apart)            \
               : NAME##_tile(rows, ROWS, 0, scales, m->in, in, xs, COUNT, out, ys, apart)
#define EACH_COUNT(MOST, left, NAME)                                                                 \
  if (left == 1) { if (many == 4) TILE(NAME, 4, 1); else TILE(NAME, 1, 1); }                         \
  else if (left == 2 || MOST == 2) { if (many == 4) TILE(NAME, 4, 2); else TILE(NAME, 1, 2); }       \
  else if (left == 3) { if (many == 4) TILE(NAME, 4, 3); else TILE(NAME, 1, 3); }                    \
  else { if (many == 4) TILE(NAME, 4, 4); else TILE(NAME, 1, 4); }

/* Any processor: a vector of two, as codes of 4 bits come two a byte. */
typedef struct { float low, high; } Pair;
static inline Pair pair_load(const float *p) { return (Pair){p[0], p[1]}; }
static inline Pair pair_int8(const int8_t *p) { return (Pair){p[0], p[1]}; }
static inline void pair_int4(const uint8_t *p, Pair *first, Pair *second) {
  *first = (Pair){p[0] & 15, p[0] >> 4}, *second = (Pair){p[1] & 15, p[1] >> 4};
}
static inline Pair pair_fma(Pair a, Pair b, Pair c) { return (Pair){a.low * b.low + c.low, a.high * b.high + c.high}; }
static inline Pair pair_splat(float x) { return (Pair){x, x}; }
static inline float pair_sum(Pair a) { return a.low + a.high; }
static inline void pair_store(float *p, Pair a) { p[0] = a.low, p[1] = a.high; }
#define PAIR_ZERO ((Pair){0, 0})
DEFINE_PRODUCTS(plain, , Pair, 2, 2, PAIR_ZERO, pair_load, pair_int8, pair_int4, pair_fma, pair_splat, pair_sum, pair_store)

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define INLINE static inline __attribute__((always_inline))

AVX512 INLINE __m512 wide_int8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
AVX512 INLINE void wide_int4(const uint8_t *p, __m512 *first, __m512 *second) {
  __m128i bytes = _mm_loadu_si128((const __m128i *)p), mask = _mm_set1_epi8(15);
  __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  *first = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
  *second = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high)));
}
DEFINE_PRODUCTS(avx512, AVX512, __m512, 16, 4, _mm512_setzero_ps(), _mm512_loadu_ps, wide_int8, wide_int4, _mm512_fmadd_ps,
                _mm512_set1_ps, _mm512_reduce_add_ps, _mm512_storeu_ps)

AVX2 INLINE __m256 half_int8(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
AVX2 INLINE void half_int4(const uint8_t *p, __m256 *first, __m256 *second) {
  __m128i bytes = _mm_loadl_epi64((const __m128i *)p), mask = _mm_set1_epi8(15);
  __m128i both = _mm_unpacklo_epi8(_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  *first = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both));
  *second = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)));
}
AVX2 INLINE float half_sum(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
DEFINE_PRODUCTS(avx2, AVX2, __m256, 8, 2, _mm256_setzero_ps(), _mm256_loadu_ps, half_int8, half_int4, _mm256_fmadd_ps,
                _mm256_set1_ps, half_sum, _mm256_storeu_ps)
#endif

typedef void Products(const Matrix *, Int, Int, const float *, Int, float *, Int, Int, float *);
typedef void Mix(const float *, const float *, Int, Int, float *);
typedef float Dot(const float *, const float *, Int);

static Products *products = plain;
static Mix *mix = plain_mix;
static Dot *dot = plain_dot;

/* Choose the instructions; 0: any processor's, 1: AVX2, 2: AVX-512. Returns what was chosen, at most what there is. */
Int plait_instructions(Int most) {
  products = plain, mix = plain_mix, dot = plain_dot;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  int has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (most >= 2 && has_512) return products = avx512, mix = avx512_mix, dot = avx512_dot, 2;
  if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return products = avx2, mix = avx2_mix, dot = avx2_dot, 1;
#endif
  return 0;
}

/* A thread's share [from, to) of n things, in whole blocks. */
static void share(Int n, Int block, Int thread, Int threads, Int *from, Int *to) {
  Int blocks = (n + block - 1) / block;
  *from = blocks * thread / threads * block;
  *to = blocks * (thread + 1) / threads * block;
  if (*to > n) *to = n;
  if (*from > n) *from = n;
}

/* y [n, out] = x [n, in] times the matrix, the thread's rows of it. */
static void multiply(const Matrix *m, const float *x, float *y, Int n, float *row, Int thread, Int threads) {
  Int from, to;
  share(m->out, 16, thread, threads, &from, &to);
  products(m, from, to, x, m->in, y, m->out, n, row);
  if (m->bias)
    for (Int t = 0; t < n; t++)
      for (Int o = from; o < to; o++) y[t * m->out + o] += m->bias[o];
}

static void normalize(const Norm *norm, const float *x, float *y, Int n, Int head) {
  float mean = 0, square = 0;
  if (norm->centred) {
#pragma omp simd reduction(+ : mean)
    for (Int i = 0; i < n; i++) mean += x[i];
    mean /= n;
#pragma omp simd reduction(+ : square)
    for (Int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  } else {
    square = dot(x, x, n);
  }
  float factor = 1 / sqrtf(square / n + (float)norm->eps);
  const float *weight = norm->weight + (norm->per_head ? head * n : 0);
  for (Int i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * weight[i];
  if (norm->bias)
    for (Int i = 0; i < n; i++) y[i] += norm->bias[(norm->per_head ? head * n : 0) + i];
}

/* Norm and rotation of a head, in place. */
static void turn(const Norm *norm, float *x, const float *cosines, const float *sines, Int size, Int head) {
  if (norm->weight) normalize(norm, x, x, size, head);
  for (Int i = 0, j = size / 2; j < size; i++, j++) {
    float a = x[i], b = x[j];
    x[i] = a * cosines[i] - b * sines[i];
    x[j] = b * cosines[i] + a * sines[i];
  }
}

/* e^x for x <= 0, within 2e-7 of it; a loop over it becomes vectors. (Cephes' expf.) */
static inline float exponential(float x) {
  x = x < -87 ? -87 : x;
  float n = (float)(int)(x * 1.44269504f - 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return (p * r * r + r + 1) * power;
}

/* Attention of one head of one token over the slots of its row. */
static void attend(const float *q, const float *keys, const float *values, Int position, const Pass *pass, Int size,
                   float *scores, float *out) {
  Int first = pass->window && position >= pass->window ? position - pass->window + 1 : 0;
  Int count = position - first + 1, start = first % pass->slots;
  Int before = count < pass->slots - start ? count : pass->slots - start; /* then a ring begins again */
  float top = -INFINITY, total = 0, scale = 1 / sqrtf((float)size);
  for (Int i = 0; i < count; i++) {
    scores[i] = dot(q, keys + (i < before ? start + i : i - before) * size, size) * scale;
    if (scores[i] > top) top = scores[i];
  }
  for (Int i = 0; i < count; i++) scores[i] = exponential(scores[i] - top);
#pragma omp simd reduction(+ : total)
  for (Int i = 0; i < count; i++) total += scores[i];
  memset(out, 0, size * sizeof(float));
  mix(scores, values + start * size, before, size, out);
  mix(scores + before, values, count - before, size, out);
  for (Int j = 0; j < size; j++) out[j] /= total;
}

/* Floats of a thread's own, and of all threads together. */
static Int own_floats(const Model *m, const Pass *p) {
  Int widest = m->width > m->inner ? m->width : m->inner;
  widest = widest > m->heads * m->head_size ? widest : m->heads * m->head_size;
  return (2 * p->tokens * m->width + p->slots + 4 * widest + 15) / 16 * 16;
}

static Int shared_floats(const Model *m, const Pass *p) {
  return p->tokens * ((m->heads * 2 + m->kv_heads * 2 + 1) * m->head_size + m->width + 2 * m->inner);
}

Int plait_work(const Model *m, const Pass *p) { return shared_floats(m, p) + p->threads * own_floats(m, p); }

static void run(const Model *m, const Pass *p, Int thread, Int threads) {
  Int n = p->tokens, width = m->width, size = m->head_size, queries = m->heads * size, kv = m->kv_heads * size;
  float *q = p->work, *k = q + n * queries, *v = k + n * kv, *mixed = v + n * kv, *y = mixed + n * queries;
  float *gate = y + n * width, *up = gate + n * m->inner, *cosines = up + n * m->inner, *sines = cosines + n * size / 2;
  float *x = p->work + shared_floats(m, p) + thread * own_floats(m, p), *h = x + n * width, *scores = h + n * width;
  float *row = scores + p->slots;
#define MULTIPLY(matrix, from, to) \
  multiply(&matrix, from, to, n, row, thread, threads)
#define MEET _Pragma("omp barrier")
  for (Int t = 0; t < n; t++) {
    const float *from = m->embedding ? m->embedding + p->ids[t] * width : p->embedded + t * width;
    memcpy(x + t * width, from, width * sizeof(float));
  }
  for (Int t = thread; t < n; t += threads)
    for (Int i = 0; i < size / 2; i++) {
      float angle = (float)p->positions[t] * m->frequencies[i];
      cosines[t * size / 2 + i] = cosf(angle) * (float)m->rotary_factor;
      sines[t * size / 2 + i] = sinf(angle) * (float)m->rotary_factor;
    }
  for (Int index = 0; index < m->layers; index++) {
    const Layer *layer = m->layer + index;
    float *keys = p->keys + index * p->layer_stride, *values = p->values + index * p->layer_stride;
    for (Int t = 0; t < n; t++)
      if (!m->post_norm) normalize(&layer->attention_norm, x + t * width, h + t * width, width, 0);
    float *in = m->post_norm ? x : h;
    MULTIPLY(layer->q, in, q);
    MULTIPLY(layer->k, in, k);
    MULTIPLY(layer->v, in, v);
    MEET
    for (Int unit = thread; unit < n * (m->heads + m->kv_heads); unit += threads) {
      Int t = unit / (m->heads + m->kv_heads), head = unit % (m->heads + m->kv_heads);
      const float *cosine = cosines + t * size / 2, *sine = sines + t * size / 2;
      if (head < m->heads) {
        turn(&layer->q_norm, q + t * queries + head * size, cosine, sine, size, head);
        continue;
      }
      head -= m->heads;
      Int at = p->rows[t] * p->row_stride + (head * p->slots + p->positions[t] % p->slots) * size;
      turn(&layer->k_norm, k + t * kv + head * size, cosine, sine, size, head);
      memcpy(keys + at, k + t * kv + head * size, size * sizeof(float));
      memcpy(values + at, v + t * kv + head * size, size * sizeof(float));
    }
    MEET
    for (Int unit = thread; unit < n * m->heads; unit += threads) {
      Int t = unit / m->heads, head = unit % m->heads;
      Int at = p->rows[t] * p->row_stride + head / (m->heads / m->kv_heads) * p->slots * size;
      attend(q + t * queries + head * size, keys + at, values + at, p->positions[t], p, size, scores,
             mixed + t * queries + head * size);
    }
    MEET
    MULTIPLY(layer->o, mixed, y);
    MEET
    for (Int t = 0; t < n; t++) {
      if (m->post_norm) normalize(&layer->attention_norm, y + t * width, h + t * width, width, 0);
      for (Int i = 0; i < width; i++) x[t * width + i] += (m->post_norm ? h : y)[t * width + i];
      if (!m->post_norm) normalize(&layer->feed_forward_norm, x + t * width, h + t * width, width, 0);
    }
    MULTIPLY(layer->gate, in, gate);
    MULTIPLY(layer->up, in, up);
    Int from, to;
    share(m->inner, 16, thread, threads, &from, &to);
    for (Int t = 0; t < n; t++)
      for (Int i = from; i < to; i++) {
        float z = gate[t * m->inner + i], e = exponential(z < 0 ? z : -z);
        gate[t * m->inner + i] = z * (z < 0 ? e : 1) / (1 + e) * up[t * m->inner + i];
      }
    MEET
    MULTIPLY(layer->down, gate, y);
    MEET
    for (Int t = 0; t < n; t++) {
      if (m->post_norm) normalize(&layer->feed_forward_norm, y + t * width, h + t * width, width, 0);
      for (Int i = 0; i < width; i++) x[t * width + i] += (m->post_norm ? h : y)[t * width + i];
    }
  }
  for (Int t = 0; t < p->chosen; t++) normalize(&m->norm, x + p->wanted[t] * width, h + t * width, width, 0);
  if (m->head.codes) multiply(&m->head, h, p->out, p->chosen, row, thread, threads);
  else if (!thread) memcpy(p->out, h, p->chosen * width * sizeof(float));
}

/* Raised with every change of the structs above or of what they mean; model/native.py has the same. */
Int plait_version(void) { return 1; }

int omp_get_thread_num(void);
int omp_get_num_threads(void); /* may be fewer than asked for */

void plait_step(const Model *model, const Pass *pass) {
#pragma omp parallel num_threads(pass->threads)
  run(model, pass, omp_get_thread_num(), omp_get_num_threads());
}
