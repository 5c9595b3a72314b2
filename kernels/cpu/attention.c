/* Causal attention within documents, forward and derivative (Dao et al. 2022, algorithms 1 and 4).
 *
 * A block of queries meets a block of keys at a time; scores never leave the cache. Arrays lie as the model has them,
 * (batch, slots, heads, head dim), so that nothing is transposed on the way in or out.
 */
#include <math.h>

#include "products.h"
#include "threads.h"

/* A block of queries, one of keys, and the stride of a row of scores, so that rows do not share their place. */
enum { QUERIES = 8 * ROWS, KEYS = MAX_K / COLUMNS * COLUMNS, SCORES = KEYS + LANES };

static const float MASKED = -1e30f; /* of a slot that is not seen; finite, so that nothing becomes NaN */

/* N query heads share K key-value heads; H is the dim of keys, W that of values. */
typedef struct {
  int64_t B, T, N, K, H, W, window;
  float scale;
  const float *q, *k, *v;
  const int32_t *q_segments, *k_segments; /* (B, T) */
  float *out, *log_z;                     /* (B, T, N, W), (B, N, T) */
  const float *dout;
  float *dq, *dk, *dv;
  int64_t pieces; /* parts of the queries of a key-value head */
} Attention;

typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

static inline Vector select_vector(Ints where, Vector yes, Vector no) {
  return (Vector)(((Ints)yes & where) | ((Ints)no & ~where));
}

/* e^x by its polynomial on half of ln 2 to either side of 0 (the coefficients are Cephes' expf), to a unit or two;
 * what is not a number stays none. */
static inline Vector exponential(Vector x) {
  const Vector lowest = (Vector){0} - 87.0f, to_int = (Vector){0} + 12582912.0f; /* 1.5 * 2^23 rounds what it meets */
  x = select_vector(x < lowest, lowest, x);
  const Vector n = (x * 1.44269504f + to_int) - to_int, r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);
}

/* Which of the LANES keys from `key` on a query in slot t sees. */
static inline Ints visible(const Attention *a, int64_t b, int64_t t, int64_t key) {
  const int32_t *segments = a->k_segments + b * a->T;
  Ints slots, theirs;
  for (int lane = 0; lane < LANES; lane++) slots[lane] = (int32_t)key + lane;
  if (key + LANES <= a->T)
    theirs = *(const Ints *)(segments + key);
  else
    for (int lane = 0; lane < LANES; lane++) theirs[lane] = key + lane < a->T ? segments[key + lane] : 0;
  const int32_t first = a->window ? (int32_t)MAX(0, t - a->window + 1) : 0;
  return (theirs == a->q_segments[b * a->T + t]) & (slots <= (int32_t)t) & (slots >= first);
}

/* Blocks of keys that some query of a block sees begin here; they end with the block's last query. */
static int64_t first_key(const Attention *a, int64_t query) {
  return a->window ? MAX(0, query - a->window + 1) / COLUMNS * COLUMNS : 0;
}

/* The next piece of a part's memory, which begins a line of the cache. */
enum { LINE = 16 };

static float *take(float **memory, int64_t size) {
  float *taken = *memory;
  *memory += round_up(size, LINE);
  return taken;
}

static float *allocate(int64_t size, int64_t num_pieces) {
  return aligned_alloc(sizeof(float) * LINE, sizeof(float) * round_up(size + num_pieces * LINE, LINE));
}

/* The weights of a row of scores, unnormalised, and their sum; `top` and `total` of the row go on. Returns the factor
 * on what was summed before. */
static float soften(const Attention *a, int64_t b, float *scores, int64_t t, Range keys, float *top, float *total) {
  Vector most = (Vector){0} + *top;
  for (int64_t key = keys.start; key < keys.stop; key += LANES) {
    Vector *s = (Vector *)(scores + key - keys.start);
    *s = select_vector(visible(a, b, t, key), *s * a->scale, (Vector){0} + MASKED);
    most = select_vector(*s > most, *s, most);
  }
  float highest = most[0];
  for (int lane = 1; lane < LANES; lane++) highest = MAX(highest, most[lane]);
  Vector sums = {0};
  for (int64_t key = keys.start; key < keys.stop; key += LANES) {
    Vector *s = (Vector *)(scores + key - keys.start);
    const Ints seen = *s != MASKED; /* which what is not a number is */
    *s = (Vector)((Ints)exponential(*s - highest) & seen);
    sums += *s;
  }
  const float before = *total == 0 ? 0.0f : expf(*top - highest);
  *top = highest, *total *= before;
  for (int lane = 0; lane < LANES; lane++) *total += sums[lane];
  return before;
}

/* Attention of a block of queries of one head; panels of the transposed keys and of the values are its head's. */
static void attend(const Attention *a, int64_t b, int64_t n, Range queries, const float *keys_t, const float *values,
                   float *scores) {
  const int64_t rows = queries.stop - queries.start, start = first_key(a, queries.start);
  float top[QUERIES], total[QUERIES];
  for (int64_t i = 0; i < rows; i++) top[i] = MASKED, total[i] = 0;
  float *out = a->out + ((b * a->T + queries.start) * a->N + n) * a->W;
  for (int64_t key = start; key < queries.stop; key += KEYS) {
    const Range keys = {key, MIN(key + KEYS, round_up(queries.stop, COLUMNS))};
    const int64_t width = keys.stop - keys.start;
    multiply(&(Product){.M = rows, .N = width, .K = a->H, .a = a->q + ((b * a->T + queries.start) * a->N + n) * a->H,
                        .a_m = a->N * a->H, .a_k = 1, .panels = keys_t + key * a->H, .panel = a->H * COLUMNS,
                        .c = scores, .c_m = SCORES});
    for (int64_t i = 0; i < rows; i++) {
      const float before = soften(a, b, scores + i * SCORES, queries.start + i, keys, top + i, total + i);
      for (int64_t w = 0; w < a->W && key > start; w++) out[i * a->N * a->W + w] *= before;
    }
    multiply(&(Product){.M = rows, .N = a->W, .K = width, .a = scores, .a_m = SCORES, .a_k = 1,
                        .panels = values + key * COLUMNS, .panel = round_up(a->T, COLUMNS) * COLUMNS, .c = out,
                        .c_m = a->N * a->W, .accumulate = key > start});
  }
  for (int64_t i = 0; i < rows; i++) {
    const float factor = total[i] == 0 ? 0 : 1 / total[i];
    for (int64_t w = 0; w < a->W; w++) out[i * a->N * a->W + w] *= factor;
    a->log_z[(b * a->N + n) * a->T + queries.start + i] = top[i] + (total[i] == 0 ? 0 : logf(total[i]));
  }
}

/* Rows of T slots, as panels over their dims; zeros up to whole blocks of COLUMNS slots. */
static void pack_rows(float *to, const float *from, int64_t T, int64_t stride, int64_t width) {
  const int64_t slots = round_up(T, COLUMNS);
  for (int64_t d = 0; d < width; d += COLUMNS, to += slots * COLUMNS) {
    pack(to, from + d, T, stride, MIN(COLUMNS, width - d), 1, COLUMNS);
    memset(to + T * COLUMNS, 0, sizeof(float) * (slots - T) * COLUMNS);
  }
}

static int forward_part(const void *work, int64_t part) {
  const Attention *a = work;
  const int64_t head = part / a->pieces, piece = part % a->pieces, b = head / a->K, k = head % a->K;
  const int64_t slots = round_up(a->T, COLUMNS), blocks = (a->T + QUERIES - 1) / QUERIES;
  float *memory = allocate(slots * (a->H + round_up(a->W, COLUMNS)) + QUERIES * SCORES, 3), *rest = memory;
  if (!memory) return 1;
  float *keys_t = take(&rest, slots * a->H), *values = take(&rest, slots * round_up(a->W, COLUMNS));
  float *scores = take(&rest, QUERIES * SCORES);
  pack_panels(keys_t, a->k + (b * a->T * a->K + k) * a->H, a->H, 1, a->T, a->K * a->H);
  pack_rows(values, a->v + (b * a->T * a->K + k) * a->W, a->T, a->K * a->W, a->W);
  /* Later blocks see more: each piece takes every so-manyth. */
  for (int64_t block = piece; block < blocks; block += a->pieces)
    for (int64_t n = k * (a->N / a->K); n < (k + 1) * (a->N / a->K); n++)
      attend(a, b, n, (Range){block * QUERIES, MIN(a->T, (block + 1) * QUERIES)}, keys_t, values, scores);
  free(memory);
  return 0;
}

/* The panels of a key-value head, and of a block of queries of one head, with room for two blocks of scores. */
typedef struct {
  float *keys, *keys_t, *values_t, *queries, *douts, *weights, *dscores;
} Panels;

/* From scores and the derivatives of the weights: the weights, and the derivatives of the scores. */
static void derive(const Attention *a, int64_t b, float *weights, float *dscores, int64_t t, Range keys, float log_z,
                   float delta) {
  for (int64_t key = keys.start; key < keys.stop; key += LANES) {
    Vector *w = (Vector *)(weights + key - keys.start), *d = (Vector *)(dscores + key - keys.start);
    *w = (Vector)((Ints)exponential(*w * a->scale - log_z) & visible(a, b, t, key));
    *d = *w * (*d - delta) * a->scale;
  }
}

/* What a block of queries of one head adds to the derivatives. */
static void differentiate(const Attention *a, int64_t b, int64_t k, int64_t n, Range queries, const Panels *p) {
  const int64_t rows = queries.stop - queries.start, start = first_key(a, queries.start);
  const int64_t slots = round_up(a->T, COLUMNS);
  const int64_t first = (b * a->T + queries.start) * a->N + n;
  const float *q = a->q + first * a->H, *dout = a->dout + first * a->W, *out = a->out + first * a->W;
  const float *log_z = a->log_z + (b * a->N + n) * a->T + queries.start;
  float delta[QUERIES] = {0};
  for (int64_t i = 0; i < rows; i++)
    for (int64_t w = 0; w < a->W; w++) delta[i] += dout[i * a->N * a->W + w] * out[i * a->N * a->W + w];
  pack_panels(p->queries, q, rows, a->N * a->H, a->H, 1);
  pack_panels(p->douts, dout, rows, a->N * a->W, a->W, 1);
  for (int64_t key = start; key < queries.stop; key += KEYS) {
    const Range keys = {key, MIN(key + KEYS, round_up(queries.stop, COLUMNS))};
    const int64_t width = keys.stop - keys.start, seen = MIN(keys.stop, a->T) - keys.start;
    multiply(&(Product){.M = rows, .N = width, .K = a->H, .a = q, .a_m = a->N * a->H, .a_k = 1,
                        .panels = p->keys_t + key * a->H, .panel = a->H * COLUMNS, .c = p->weights, .c_m = SCORES});
    multiply(&(Product){.M = rows, .N = width, .K = a->W, .a = dout, .a_m = a->N * a->W, .a_k = 1,
                        .panels = p->values_t + key * a->W, .panel = a->W * COLUMNS, .c = p->dscores, .c_m = SCORES});
    for (int64_t i = 0; i < rows; i++)
      derive(a, b, p->weights + i * SCORES, p->dscores + i * SCORES, queries.start + i, keys, log_z[i], delta[i]);
    multiply(&(Product){.M = rows, .N = a->H, .K = width, .a = p->dscores, .a_m = SCORES, .a_k = 1,
                        .panels = p->keys + key * COLUMNS, .panel = slots * COLUMNS, .c = a->dq + first * a->H,
                        .c_m = a->N * a->H, .accumulate = key > start});
    multiply(&(Product){.M = seen, .N = a->H, .K = rows, .a = p->dscores, .a_m = 1, .a_k = SCORES,
                        .panels = p->queries, .panel = rows * COLUMNS,
                        .c = a->dk + ((b * a->T + key) * a->K + k) * a->H, .c_m = a->K * a->H, .accumulate = 1});
    multiply(&(Product){.M = seen, .N = a->W, .K = rows, .a = p->weights, .a_m = 1, .a_k = SCORES,
                        .panels = p->douts, .panel = rows * COLUMNS,
                        .c = a->dv + ((b * a->T + key) * a->K + k) * a->W, .c_m = a->K * a->W, .accumulate = 1});
  }
}

/* The derivatives of one key-value head, to which all of its query heads and their blocks add. */
static int backward_part(const void *work, int64_t head) {
  const Attention *a = work;
  const int64_t b = head / a->K, k = head % a->K, slots = round_up(a->T, COLUMNS);
  const int64_t wide_H = round_up(a->H, COLUMNS), wide_W = round_up(a->W, COLUMNS);
  const int64_t of_keys = slots * (wide_H + a->H + a->W), of_queries = QUERIES * (wide_H + wide_W + 2 * SCORES);
  float *memory = allocate(of_keys + of_queries, 7), *rest = memory;
  if (!memory) return 1;
  const Panels p = {.keys = take(&rest, slots * wide_H), .keys_t = take(&rest, slots * a->H),
                    .values_t = take(&rest, slots * a->W), .queries = take(&rest, QUERIES * wide_H),
                    .douts = take(&rest, QUERIES * wide_W), .weights = take(&rest, QUERIES * SCORES),
                    .dscores = take(&rest, QUERIES * SCORES)};
  const int64_t first = b * a->T * a->K + k;
  pack_rows(p.keys, a->k + first * a->H, a->T, a->K * a->H, a->H);
  pack_panels(p.keys_t, a->k + first * a->H, a->H, 1, a->T, a->K * a->H);
  pack_panels(p.values_t, a->v + first * a->W, a->W, 1, a->T, a->K * a->W);
  for (int64_t t = 0; t < a->T; t++) {
    memset(a->dk + (first + t * a->K) * a->H, 0, sizeof(float) * a->H);
    memset(a->dv + (first + t * a->K) * a->W, 0, sizeof(float) * a->W);
  }
  for (int64_t n = k * (a->N / a->K); n < (k + 1) * (a->N / a->K); n++)
    for (int64_t t = 0; t < a->T; t += QUERIES)
      differentiate(a, b, k, n, (Range){t, MIN(a->T, t + QUERIES)}, &p);
  free(memory);
  return 0;
}

/* Of the arguments q (B, T, N, H), k (B, T, K, H), v (B, T, K, W), segments of queries and of keys (B, T). */
static Attention described(const XLA_FFI_CallFrame *call) {
  const XLA_FFI_Buffer *q = argument(call, 0), *k = argument(call, 1), *v = argument(call, 2);
  return (Attention){.B = q->dims[0], .T = q->dims[1], .N = q->dims[2], .H = q->dims[3], .K = k->dims[2],
                     .W = v->dims[3], .q = q->data, .k = k->data, .v = v->data, .q_segments = argument(call, 3)->data,
                     .k_segments = argument(call, 4)->data,
                     .scale = *(const float *)attribute(call, "scale"),
                     .window = *(const int64_t *)attribute(call, "window"), .pieces = 1};
}

/* Results: out (B, T, N, W) and log_z (B, N, T). */
XLA_FFI_Error *llmjax_attention_forward(XLA_FFI_CallFrame *call) {
  if (answered(call)) return NULL;
  Attention a = described(call);
  a.out = result(call, 0)->data, a.log_z = result(call, 1)->data;
  const int64_t heads = MAX(1, a.B * a.K), wanted = (4 * num_threads(call) + heads - 1) / heads;
  a.pieces = MIN(wanted, (a.T + QUERIES - 1) / QUERIES);
  return run_parts(call, forward_part, &a, a.B * a.K * a.pieces);
}

/* Further arguments: out, log_z and the derivative of out; results: those of q, k and v. */
XLA_FFI_Error *llmjax_attention_backward(XLA_FFI_CallFrame *call) {
  if (answered(call)) return NULL;
  Attention a = described(call);
  a.out = argument(call, 5)->data, a.log_z = argument(call, 6)->data, a.dout = argument(call, 7)->data;
  a.dq = result(call, 0)->data, a.dk = result(call, 1)->data, a.dv = result(call, 2)->data;
  return run_parts(call, backward_part, &a, a.B * a.K);
}
