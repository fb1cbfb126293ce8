// Runs the kernels of a step, which tinygrad has rendered, with the functions that they call. It is
// compiled for each kind of processor, as a function KERNELS. Knows no tokens and no text.
#if HALVES_ARE_SINGLE  // no instruction converts halves
#define _Float16 float
#define __fp16 float
#endif
#include "runtime.h"

#include "gemv.c"
#include "sgemm.c"

#define KERNEL static __attribute__((noinline)) void  // not inlined at each of its calls
#define HALF(index) ((__fp16 *)halves + index)
#define WEIGHT(offset) ((void *)(model + offset))
#define MEMORY(offset) ((void *)(memory + offset))
#define FUNCTION(name) (&(unsigned long long){(unsigned long long)(__SIZE_TYPE__)name})
#define CALL(n_chunks, call)                                             \
  for (int core_id = core; core_id < n_chunks; core_id += step->n_cores) \
    call;                                                                \
  barrier(step, ++n_called * step->n_cores);

#include "kernels.c"

// Waits until all cores together have run n kernels.
static void barrier(Step *step, long n) {
  if (step->n_cores == 1) return;
  __atomic_fetch_add(&step->n_done, 1, __ATOMIC_ACQ_REL);
  for (long turns = 0; __atomic_load_n(&step->n_done, __ATOMIC_ACQUIRE) < n; turns++)
    if (turns > 10000) step->yield();
}

void KERNELS(Step *step, int core) {
  int end = step->end, last = step->last;
  long n_called = 0;
  if (step->n == 1) {
#include "one.c"
  } else {
#include "many.c"
  }
}
