/* Products of float32 matrices on the CPU, as handlers that XLA calls.
 *
 * A tile of the result, ROWS by COLUMNS, stays in registers while K passes. The right matrix is packed into panels of
 * COLUMNS that lie in the second level of the cache, the left one into tiles of ROWS that lie in the first (Goto and
 * van de Geijn 2008). Every element is summed in one order, whatever tile, part and thread it falls to.
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

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
enum { COLUMNS = LANES * VECTORS, MAX_K = 512, MAX_PANELS = 512 * 512, PARTS_PER_THREAD = 2 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* A batch of products (M, K) (K, N) -> (M, N), row by row, with the strides of what is multiplied. */
typedef struct {
  int64_t batch, M, N, K, a_m, a_k, b_k, b_n;
  const float *a, *b;
  float *c;
} Product;

/* A part of a matrix. */
typedef struct {
  int64_t start, stop;
} Range;

/* What a thread packs the operands into: the left tile, and panels of the right matrix. */
static _Thread_local _Alignas(64) float packed[MAX_K * ROWS + MAX_PANELS];

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
  if (left->across == 1)
    multiply_rows(ROWS, K, left->start, 1, ROWS, b, c, stride, accumulate);
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

/* Panels of COLUMNS, the last one filled up with zeros; along the rows of the matrix, as memory likes to be read. */
static void pack_panels(float *to, const float *from, int64_t K, int64_t along_k, int64_t width, int64_t across) {
  const int64_t whole = across == 1 ? width / COLUMNS * COLUMNS : 0;
  for (int64_t k = 0; k < K && whole; k++)
    for (int64_t n = 0; n < whole; n += COLUMNS)
      memcpy(to + n * K + k * COLUMNS, from + k * along_k + n, sizeof(float) * COLUMNS);
  for (int64_t n = whole; n < width; n += COLUMNS)
    pack(to + n * K, from + n * across, K, along_k, MIN(COLUMNS, width - n), across, COLUMNS);
}

/* Rows that lie a multiple of this apart share their place in the first level of the cache. */
enum { CACHE_PERIOD = 4096 / sizeof(float) };

/* The tile of rows from `a` on, packed into `to` unless it can be read where it lies. */
static Left left_tile(const Product *p, const float *a, int64_t K, int64_t rows, float *to) {
  if (rows == ROWS && p->a_k == 1 && p->a_m > 1 && (p->a_m % CACHE_PERIOD || p->N <= 2 * COLUMNS))
    return (Left){a, rows, p->a_m, 1};
  pack(to, a, K, p->a_k, rows, p->a_m, ROWS);
  return (Left){to, rows, 1, ROWS};
}

/* Rows and columns of one product; a, b and c are its own. */
static void multiply(const Product *p, const float *a, const float *b, float *c, Range rows, Range columns) {
  const int64_t num_blocks = (p->K + MAX_K - 1) / MAX_K, block = (p->K + num_blocks - 1) / num_blocks;
  const int64_t width = MAX_PANELS / block / COLUMNS * COLUMNS;
  float *panels = packed, *tile = packed + MAX_PANELS;
  for (int64_t first = columns.start; first < columns.stop; first += width)
    for (int64_t k = 0; k < p->K; k += block) {
      const int64_t K = MIN(block, p->K - k), last = MIN(first + width, columns.stop);
      pack_panels(panels, b + k * p->b_k + first * p->b_n, K, p->b_k, last - first, p->b_n);
      for (int64_t m = rows.start; m < rows.stop; m += ROWS) {
        const Left left = left_tile(p, a + m * p->a_m + k * p->a_k, K, MIN(ROWS, rows.stop - m), tile);
        for (int64_t n = first; n < last; n += COLUMNS) {
          float *to = c + m * p->N + n;
          if (left.rows == ROWS && n + COLUMNS <= last)
            multiply_tile(K, &left, panels + (n - first) * K, to, p->N, k > 0);
          else
            multiply_edge(K, &left, panels + (n - first) * K, to, p->N, k > 0, MIN(COLUMNS, last - n));
        }
      }
    }
}

/* The parts of a batch of products, taken one after the other by whichever thread is free. */
typedef struct {
  Product product;
  int64_t pieces, num_parts; /* of each product, of all */
  atomic_llong next, done;
  atomic_int holders;
} Job;

/* Piece `index` of `count` of a dim, in multiples of `unit`. */
static Range piece_of(int64_t size, int64_t index, int64_t count, int64_t unit) {
  const int64_t units = (size + unit - 1) / unit;
  return (Range){units * index / count * unit, MIN(size, units * (index + 1) / count * unit)};
}

static void multiply_part(const Job *job, int64_t part) {
  const Product *p = &job->product;
  const int64_t product = part / job->pieces, piece = part % job->pieces;
  Range rows = {0, p->M}, columns = {0, p->N};
  if (p->N > p->M)
    columns = piece_of(p->N, piece, job->pieces, COLUMNS);
  else
    rows = piece_of(p->M, piece, job->pieces, ROWS);
  multiply(p, p->a + product * p->M * p->K, p->b + product * p->K * p->N, p->c + product * p->M * p->N, rows, columns);
}

static void let_go(Job *job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void take_parts(Job *job) {
  for (int64_t part; (part = atomic_fetch_add(&job->next, 1)) < job->num_parts;) {
    multiply_part(job, part);
    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
  }
}

/* What another thread of XLA's does; it may come when nothing is left. */
static void help(void *job) {
  take_parts(job);
  let_go(job);
}

static void pause_thread(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static int64_t num_threads(const XLA_FFI_CallFrame *call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, .ctx = call->ctx, .num_threads = &threads};
  XLA_FFI_Error *error = call->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    call->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return threads;
}

static void ask_for_help(const XLA_FFI_CallFrame *call, Job *job) {
  atomic_fetch_add(&job->holders, 1);
  XLA_FFI_ThreadPool_Schedule_Args args = {
      .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, .ctx = call->ctx, .task = help, .data = job};
  XLA_FFI_Error *error = call->api->XLA_FFI_ThreadPool_Schedule(&args);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    call->api->XLA_FFI_Error_Destroy(&destroy);
    let_go(job);
  }
}

static XLA_FFI_Error *run(const XLA_FFI_CallFrame *call, const Product *product) {
  Job *job = calloc(1, sizeof(Job));
  if (!job) {
    XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                      .message = "no memory for a product of matrices",
                                      .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return call->api->XLA_FFI_Error_Create(&args);
  }
  const int64_t threads = num_threads(call);
  const int64_t pieces = (PARTS_PER_THREAD * threads + product->batch - 1) / product->batch;
  job->product = *product;
  job->pieces = MIN(pieces, product->N > product->M ? (product->N + COLUMNS - 1) / COLUMNS
                                                    : (product->M + ROWS - 1) / ROWS);
  job->num_parts = job->pieces * product->batch;
  atomic_store(&job->holders, 1);
  for (int64_t helper = 1; helper < MIN(threads, job->num_parts); helper++) ask_for_help(call, job);
  take_parts(job);
  while (atomic_load_explicit(&job->done, memory_order_acquire) < job->num_parts) pause_thread();
  let_go(job);
  return NULL;
}

/* XLA asks once which version of its interface this is written for. */
static int is_question(XLA_FFI_CallFrame *call) {
  XLA_FFI_Extension_Base *extension = call->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

/* Arguments (..., M, K) or (..., K, M) and (..., K, N) or (..., N, K), result (..., M, N). */
static XLA_FFI_Error *handle(XLA_FFI_CallFrame *call, int left_transposed, int right_transposed) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer *a = call->args.args[0], *b = call->args.args[1], *c = call->rets.rets[0];
  const int64_t rank = c->rank, M = c->dims[rank - 2], N = c->dims[rank - 1];
  const int64_t K = a->dims[left_transposed ? rank - 2 : rank - 1];
  Product product = {1, M, N, K, left_transposed ? 1 : K, left_transposed ? M : 1, right_transposed ? 1 : N,
                     right_transposed ? K : 1, a->data, b->data, c->data};
  for (int64_t dim = 0; dim < rank - 2; dim++) product.batch *= c->dims[dim];
  return run(call, &product);
}

XLA_FFI_Error *multiply_nn(XLA_FFI_CallFrame *call) { return handle(call, 0, 0); }
XLA_FFI_Error *multiply_nt(XLA_FFI_CallFrame *call) { return handle(call, 0, 1); }
XLA_FFI_Error *multiply_tn(XLA_FFI_CallFrame *call) { return handle(call, 1, 0); }
