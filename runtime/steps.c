// The model's steps: the kernels that tinygrad has rendered, and what they call by its address. It
// is compiled once for each kind of processor, as a function named STEP.
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
#define RUN(n_chunks, call)                                             \
  for (int core_id = core; core_id < n_chunks; core_id += team->n_cores) \
    call;                                                               \
  meet(team, ++n_run * team->n_cores);

#include "kernels.c"

// Waits until the cores together have run n kernels, those of the others as well.
static void meet(Team *team, long n) {
  if (team->n_cores == 1) return;
  __atomic_fetch_add(&team->n_run, 1, __ATOMIC_ACQ_REL);
  for (long turns = 0; __atomic_load_n(&team->n_run, __ATOMIC_ACQUIRE) < n; turns++)
    if (turns > 10000) give_way();
}

void STEP(Team *team, int core) {
  int end = team->end, last = team->last;
  long n_run = 0;
  if (team->n == 1) {
#include "one.c"
  } else {
#include "many.c"
  }
  (void)last;
}
