/* Work in parts on XLA's own threads, from within a handler that XLA calls. */
#ifndef LLMJAX_THREADS_H
#define LLMJAX_THREADS_H

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

enum { PATIENCE = 1000 /* rounds of waiting, some 30 us */ };

/* One part of what `work` describes; 0, or 1 where memory is lacking. */
typedef int Part(const void *work, int64_t part);

/* Parts are taken one after the other by whichever thread is free. */
typedef struct {
  Part *part;
  const void *work;
  int64_t num_parts;
  atomic_llong next, done;
  atomic_int failed, holders;
} Job;

static void let_go(Job *job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void take_parts(Job *job) {
  for (int64_t part; (part = atomic_fetch_add(&job->next, 1)) < job->num_parts;) {
    if (job->part(job->work, part)) atomic_store(&job->failed, 1);
    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
  }
}

/* What another thread does; it may come when nothing is left, and the work is gone. */
static void help(void *job) {
  take_parts(job);
  let_go(job);
}

static void discard(const XLA_FFI_CallFrame *call, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
  call->api->XLA_FFI_Error_Destroy(&args);
}

static int64_t num_threads(const XLA_FFI_CallFrame *call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, .ctx = call->ctx, .num_threads = &threads};
  XLA_FFI_Error *error = call->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (!error) return threads;
  discard(call, error);
  return 1;
}

static void ask_for_help(const XLA_FFI_CallFrame *call, Job *job) {
  atomic_fetch_add(&job->holders, 1);
  XLA_FFI_ThreadPool_Schedule_Args args = {
      .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, .ctx = call->ctx, .task = help, .data = job};
  XLA_FFI_Error *error = call->api->XLA_FFI_ThreadPool_Schedule(&args);
  if (!error) return;
  discard(call, error);
  let_go(job);
}

static XLA_FFI_Error *no_memory(const XLA_FFI_CallFrame *call) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = "no memory for a kernel of llmjax on the CPU",
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return call->api->XLA_FFI_Error_Create(&args);
}

/* Until all parts are done: at first on the spot, for the wait is short; then giving way, for what is waited for may be
 * waiting for this very core. */
static void wait_for(Job *job) {
  for (int spins = 0; atomic_load_explicit(&job->done, memory_order_acquire) < job->num_parts; spins++)
    if (spins < PATIENCE) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
}

/* All parts; this thread takes them alone where the others are busy, so nothing waits for a thread to come free. */
static XLA_FFI_Error *run_parts(const XLA_FFI_CallFrame *call, Part *part, const void *work, int64_t num_parts) {
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(call);
  job->part = part, job->work = work, job->num_parts = num_parts;
  atomic_store(&job->holders, 1);
  for (int64_t helper = 1; helper < num_threads(call) && helper < num_parts; helper++) ask_for_help(call, job);
  take_parts(job);
  wait_for(job);
  const int failed = atomic_load(&job->failed);
  let_go(job);
  return failed ? no_memory(call) : NULL;
}

/* XLA asks each handler once which version of its interface it is written for. */
static int answered(const XLA_FFI_CallFrame *call) {
  const XLA_FFI_Extension_Base *extension = call->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((const XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *call, int index) { return call->args.args[index]; }
static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *call, int index) { return call->rets.rets[index]; }

/* The bytes of a scalar attribute. */
static const void *attribute(const XLA_FFI_CallFrame *call, const char *name) {
  for (int64_t i = 0; i < call->attrs.size; i++)
    if (call->attrs.names[i]->len == strlen(name) && !memcmp(call->attrs.names[i]->ptr, name, strlen(name)))
      return ((const XLA_FFI_Scalar *)call->attrs.attrs[i])->value;
  abort(); /* the caller is ours and names them all */
}

#endif
