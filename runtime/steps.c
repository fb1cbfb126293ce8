// A step of the model: the kernels that tinygrad has rendered, and what they call by its address. It
// is compiled once for each kind of processor, as a function named KERNELS.
#if HALVES_ARE_SINGLE  // where each would be converted by a call
#define _Float16 float
#define __fp16 float
#endif
#include "runtime.h"

static void gemv(float *, void *, void *, int, int, int, int, int, int, int);
#include "gemv.c"
#include "sgemm.c"

#define KERNEL static __attribute__((noinline)) void  // many times called, once compiled
#define HALF(number) ((__fp16 *)halves + number)
#define WEIGHT(place) ((void *)(model + place))
#define MEMORY(place) ((void *)(memory + place))
#define FUNCTION(name) (&(unsigned long long){(unsigned long long)(__SIZE_TYPE__)name})
#define CALL(n_chunks, call)                                             \
  for (int core_id = core; core_id < n_chunks; core_id += step->n_cores) \
    call;                                                                \
  meet(step, ++n_called * step->n_cores);

#include "kernels.c"

// Waits until the cores together have run n kernels, those of the others as well.
static void meet(Step *step, long n) {
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
  (void)last;
}
