// The memory, the cores and the processor that an exported program runs on. Knows no tokens.
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "runtime.h"

const void *halves;
byte memory[MEMORY_BYTES] __attribute__((aligned(64)));

void fail(int status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("error: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(status);
}

void *resize(void *old, long long n_bytes) {
  void *new = realloc(old, n_bytes + 1);
  if (!new) fail(1, "out of memory");
  return new;
}

#if __x86_64__
#include <cpuid.h>

// The vectors of the processor and the system: 0 for SSE2, 1 for AVX2, 2 for AVX-512 with VNNI.
static int vectors(void) {
  const unsigned avx = 3 << 27 | 1 << 29 | 1 << 12, avx2 = 1 << 3 | 1 << 5 | 1 << 8;
  const unsigned avx512 = 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1u << 31, vnni = 1 << 11;
  unsigned a, b, c, d, more, saved;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & avx) != avx) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &more, &c, &d) || (more & avx2) != avx2) return 0;
  if ((more & avx512) == avx512 && c & vnni && (saved & 0xE6) == 0xE6) return 2;
  return (saved & 6) == 6;
}
#endif

static Kernels *kernels;

// Sets the kernels for this processor's vectors, or for fewer, as VECTORS=0 or 1 asks.
void choose_kernels(void) {
  halves = model;
#if __x86_64__
  extern Kernels kernels_sse2, kernels_avx2, kernels_avx512;
  Kernels *const kinds[] = {kernels_sse2, kernels_avx2, kernels_avx512};
  const char *limit = getenv("VECTORS");
  int best = vectors(), most = limit ? atoi(limit) : best;
  kernels = kinds[best < most ? best : most < 0 ? 0 : most];
  if (kernels != kernels_sse2) return;
  float *single = resize(NULL, 4ll * N_HALVES);
  for (long long i = 0; i < N_HALVES; i++) single[i] = widen(((const unsigned short *)model)[i]);
  halves = single;
#else
  extern Kernels kernels_any;
  kernels = kernels_any;
#endif
}

static int n_cores(void) {
  const char *limit = getenv("NUM_CPU_THREADS");
  double most = limit ? atoi(limit) : N_CHUNKS, period;
  FILE *quota = limit ? NULL : fopen("/sys/fs/cgroup/cpu.max", "r");  // of a container
  if (quota && fscanf(quota, "%lf %lf", &most, &period) == 2) most /= period;
  if (quota) fclose(quota);
#if _WIN32
  int n = pthread_num_processors_np();
#else
  int n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
  if (most < n) n = most;
  return n < 1 || !IS_LARGE ? 1 : n < N_CHUNKS ? n : N_CHUNKS;
}

static Step *current;

static void *run_core(void *core) {
  kernels(current, (intptr_t)core);
  return NULL;
}

void run_step(Step *step) {
  static int n;
  pthread_t threads[N_CHUNKS];
  if (!n) n = n_cores();
  current = step;
  step->n_cores = n;
  step->yield = sched_yield;
  for (intptr_t core = 1; core < n; core++)
    if (pthread_create(threads + core, NULL, run_core, (void *)core))
      fail(1, "the system gives no thread: set NUM_CPU_THREADS=1");
  kernels(step, 0);
  for (int core = 1; core < n; core++) pthread_join(threads[core], NULL);
}
