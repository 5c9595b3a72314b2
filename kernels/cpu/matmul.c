/* Batches of products of matrices. */
#include "products.h"
#include "threads.h"

enum { MAX_PANELS = 512 * 512, PARTS_PER_THREAD = 2 };

/* (M, K) (K, N) -> (M, N), row by row, `batch` times, with the strides of what is multiplied. */
typedef struct {
  int64_t batch, M, N, K, a_m, a_k, b_k, b_n;
  const float *a, *b;
  float *c;
  int64_t pieces; /* parts of each product */
} Batch;

/* Rows and columns of one product; a, b and c are its own. */
static void multiply_range(const Batch *w, const float *a, const float *b, float *c, Range rows, Range columns) {
  static _Thread_local _Alignas(64) float panels[MAX_PANELS];
  const int64_t num_blocks = (w->K + MAX_K - 1) / MAX_K, block = (w->K + num_blocks - 1) / num_blocks;
  const int64_t width = MAX_PANELS / block / COLUMNS * COLUMNS;
  for (int64_t n = columns.start; n < columns.stop; n += width)
    for (int64_t k = 0; k < w->K; k += block) {
      const int64_t K = MIN(block, w->K - k), N = MIN(width, columns.stop - n);
      pack_panels(panels, b + k * w->b_k + n * w->b_n, K, w->b_k, N, w->b_n);
      multiply(&(Product){.M = rows.stop - rows.start, .N = N, .K = K, .a = a + rows.start * w->a_m + k * w->a_k,
                          .a_m = w->a_m, .a_k = w->a_k, .panels = panels, .panel = K * COLUMNS,
                          .c = c + rows.start * w->N + n, .c_m = w->N, .accumulate = k > 0});
    }
}

/* Piece `index` of `count` of a dim, in multiples of `unit`. */
static Range piece_of(int64_t size, int64_t index, int64_t count, int64_t unit) {
  const int64_t units = (size + unit - 1) / unit;
  return (Range){units * index / count * unit, MIN(size, units * (index + 1) / count * unit)};
}

static int multiply_part(const void *work, int64_t part) {
  const Batch *w = work;
  const int64_t product = part / w->pieces, piece = part % w->pieces;
  Range rows = {0, w->M}, columns = {0, w->N};
  if (w->N > w->M)
    columns = piece_of(w->N, piece, w->pieces, COLUMNS);
  else
    rows = piece_of(w->M, piece, w->pieces, ROWS);
  multiply_range(w, w->a + product * w->M * w->K, w->b + product * w->K * w->N, w->c + product * w->M * w->N, rows,
                 columns);
  return 0;
}

/* Arguments (..., M, K) or (..., K, M) and (..., K, N) or (..., N, K), result (..., M, N). */
static XLA_FFI_Error *handle(XLA_FFI_CallFrame *call, int left_transposed, int right_transposed) {
  if (answered(call)) return NULL;
  const XLA_FFI_Buffer *a = argument(call, 0), *b = argument(call, 1), *c = result(call, 0);
  const int64_t rank = c->rank, M = c->dims[rank - 2], N = c->dims[rank - 1];
  const int64_t K = a->dims[left_transposed ? rank - 2 : rank - 1];
  Batch work = {.batch = 1, .M = M, .N = N, .K = K, .a = a->data, .b = b->data, .c = c->data,
                .a_m = left_transposed ? 1 : K, .a_k = left_transposed ? M : 1,
                .b_k = right_transposed ? 1 : N, .b_n = right_transposed ? K : 1};
  for (int64_t dim = 0; dim < rank - 2; dim++) work.batch *= c->dims[dim];
  const int64_t products = MAX(1, work.batch), wanted = (PARTS_PER_THREAD * num_threads(call) + products - 1) / products;
  work.pieces = MIN(wanted, N > M ? (N + COLUMNS - 1) / COLUMNS : (M + ROWS - 1) / ROWS);
  return run_parts(call, multiply_part, &work, work.batch * work.pieces);
}

XLA_FFI_Error *llmjax_multiply_nn(XLA_FFI_CallFrame *call) { return handle(call, 0, 0); }
XLA_FFI_Error *llmjax_multiply_nt(XLA_FFI_CallFrame *call) { return handle(call, 0, 1); }
XLA_FFI_Error *llmjax_multiply_tn(XLA_FFI_CallFrame *call) { return handle(call, 1, 0); }
