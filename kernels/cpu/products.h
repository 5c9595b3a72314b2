/* Products of float32 matrices on one thread.
 *
 * A tile of the result, ROWS by COLUMNS, stays in registers while K passes. The right matrix is packed into panels of
 * COLUMNS that lie in the second level of the cache, the left one into tiles of ROWS that lie in the first (Goto and
 * van de Geijn 2008). Every element is summed in one order, whatever tile, part and thread it falls to.
 */
#ifndef LLMJAX_PRODUCTS_H
#define LLMJAX_PRODUCTS_H

#include <stdint.h>
#include <string.h>

/* As many sums as the registers hold, beside a row of the right matrix and an element of the left one. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 14, VECTORS = 2 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8, ROWS = 6, VECTORS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 8, VECTORS = 3 };
#else
#error "no fused multiply-add: XLA's own products are as good"
#endif
enum { COLUMNS = LANES * VECTORS, MAX_K = 512 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* A part of a dim. */
typedef struct {
  int64_t start, stop;
} Range;

static inline int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

/* c = a b or c += a b of `rows` rows; a has strides, b is (K, COLUMNS). */
static inline __attribute__((always_inline)) void multiply_rows(const int rows, int64_t K, const float *restrict a,
                                                                int64_t a_m, int64_t a_k, const float *restrict b,
                                                                float *restrict c, int64_t stride, int accumulate) {
  Vector sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[r][v] = (Vector){0};
  for (int64_t k = 0; k < K; k++, a += a_k, b += COLUMNS) {
    const Vector *row = (const Vector *)b;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] += a[r * a_m] * row[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      Vector *to = (Vector *)(c + r * stride) + v;
      *to = accumulate ? *to + sums[r][v] : sums[r][v];
    }
}

/* A tile of the left matrix: where it lies, or packed as (K, ROWS) with zeros below its last row. */
typedef struct {
  const float *start;
  int64_t rows, across, along_k;
} Left;

/* A whole tile of c. */
static void multiply_tile(int64_t K, const Left *left, const float *b, float *c, int64_t stride, int accumulate) {
  if (left->across == 1 && left->along_k == ROWS)
    multiply_rows(ROWS, K, left->start, 1, ROWS, b, c, stride, accumulate);
  else if (left->across == 1)
    multiply_rows(ROWS, K, left->start, 1, left->along_k, b, c, stride, accumulate);
  else
    multiply_rows(ROWS, K, left->start, left->across, 1, b, c, stride, accumulate);
}

/* A tile at the edge of c, made beside it; of few rows in a smaller tile. */
static void multiply_edge(int64_t K, const Left *left, const float *b, float *c, int64_t stride, int accumulate,
                          int64_t columns) {
  float whole[ROWS * COLUMNS];
  if (left->rows <= 4)
    multiply_rows(4, K, left->start, 1, ROWS, b, whole, COLUMNS, 0);
  else
    multiply_rows(ROWS, K, left->start, left->across, left->along_k, b, whole, COLUMNS, 0);
  for (int64_t r = 0; r < left->rows; r++)
    for (int64_t n = 0; n < columns; n++) {
      float *to = c + r * stride + n;
      *to = accumulate ? *to + whole[r * COLUMNS + n] : whole[r * COLUMNS + n];
    }
}

typedef float Four __attribute__((vector_size(16), aligned(4)));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Places __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* Four rows of four, transposed. */
static inline void transpose(float *to, int64_t to_stride, const float *from, int64_t from_stride) {
  const Four row0 = *(const Four *)from, row1 = *(const Four *)(from + from_stride),
             row2 = *(const Four *)(from + 2 * from_stride), row3 = *(const Four *)(from + 3 * from_stride);
  const Four low01 = PICK(row0, row1, 0, 4, 1, 5), high01 = PICK(row0, row1, 2, 6, 3, 7),
             low23 = PICK(row2, row3, 0, 4, 1, 5), high23 = PICK(row2, row3, 2, 6, 3, 7);
  *(Four *)to = PICK(low01, low23, 0, 1, 4, 5);
  *(Four *)(to + to_stride) = PICK(low01, low23, 2, 3, 6, 7);
  *(Four *)(to + 2 * to_stride) = PICK(high01, high23, 0, 1, 4, 5);
  *(Four *)(to + 3 * to_stride) = PICK(high01, high23, 2, 3, 6, 7);
}

/* (K, width) with strides `along_k` and `across`, one of them 1, packed as (K, padded), zeros behind. */
static inline __attribute__((always_inline)) void pack(float *restrict to, const float *restrict from, int64_t K,
                                                       int64_t along_k, int64_t width, int64_t across,
                                                       const int64_t padded) {
  if (width < padded) memset(to, 0, sizeof(float) * K * padded);
  if (across == 1) {
    for (int64_t k = 0; k < K; k++)
      if (width == padded)
        memcpy(to + k * padded, from + k * along_k, sizeof(float) * padded); /* of a size that is known */
      else
        memcpy(to + k * padded, from + k * along_k, sizeof(float) * width);
    return;
  }
  const int64_t whole = width / 4 * 4, whole_k = K / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4)
    for (int64_t k = 0; k < whole_k; k += 4) transpose(to + k * padded + i, padded, from + i * across + k, across);
  for (int64_t i = 0; i < width; i++)
    for (int64_t k = i < whole ? whole_k : 0; k < K; k++) to[k * padded + i] = from[i * across + k];
}

/* Panels (K, COLUMNS) of a matrix, the last one filled up with zeros; along its rows, as memory likes to be read. */
static void pack_panels(float *to, const float *from, int64_t K, int64_t along_k, int64_t width, int64_t across) {
  const int64_t whole = across == 1 ? width / COLUMNS * COLUMNS : 0;
  for (int64_t k = 0; k < K && whole; k++)
    for (int64_t n = 0; n < whole; n += COLUMNS)
      memcpy(to + n * K + k * COLUMNS, from + k * along_k + n, sizeof(float) * COLUMNS);
  for (int64_t n = whole; n < width; n += COLUMNS)
    pack(to + n * K, from + n * across, K, along_k, MIN(COLUMNS, width - n), across, COLUMNS);
}

/* A product (M, K) (K, N) whose right matrix is packed: its panels lie `panel` apart. K is at most MAX_K. */
typedef struct {
  int64_t M, N, K;
  const float *a;
  int64_t a_m, a_k;
  const float *panels;
  int64_t panel;
  float *c;
  int64_t c_m;
  int accumulate;
} Product;

/* Rows that lie a multiple of this apart share their place in the first level of the cache. */
enum { CACHE_PERIOD = 4096 / sizeof(float) };

/* The tile of rows from `a` on; packed into `to` where it is used often, else it is read where it lies. */
static Left left_tile(const Product *p, const float *a, int64_t rows, float *to) {
  const int seldom = p->N <= 2 * COLUMNS;
  if (rows == ROWS && (seldom || (p->a_k == 1 && p->a_m % CACHE_PERIOD))) return (Left){a, rows, p->a_m, p->a_k};
  pack(to, a, p->K, p->a_k, rows, p->a_m, ROWS);
  return (Left){to, rows, 1, ROWS};
}

static void multiply(const Product *p) {
  static _Thread_local _Alignas(64) float tile[MAX_K * ROWS];
  for (int64_t m = 0; m < p->M; m += ROWS) {
    const Left left = left_tile(p, p->a + m * p->a_m, MIN(ROWS, p->M - m), tile);
    for (int64_t n = 0; n < p->N; n += COLUMNS) {
      const float *b = p->panels + n / COLUMNS * p->panel;
      float *c = p->c + m * p->c_m + n;
      if (left.rows == ROWS && n + COLUMNS <= p->N)
        multiply_tile(p->K, &left, b, c, p->c_m, p->accumulate);
      else
        multiply_edge(p->K, &left, b, c, p->c_m, p->accumulate, MIN(COLUMNS, p->N - n));
    }
  }
}

#endif
