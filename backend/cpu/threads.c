// Runs a list of kernels in order, each in chunks, on one thread per core. A thread begins with its
// own chunks, which its cache may hold, and goes on with chunks that no thread has begun: another
// program may occupy a core. A thread that waits long sleeps, so that the system can move a thread
// from a busy core to this one.

typedef unsigned long long word;
typedef ABI void kernel_8(word, word, word, word, word, word, word, word);
typedef ABI void kernel_64(PARAMETERS);
typedef ABI long system_call(long, ...);  // libc's syscall, or a function that yields the core
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129, ALL_THREADS = 1 << 30 };

typedef struct {  // the next kernel follows the last argument
  word address, n_chunks, chunk_argument, n_arguments, arguments[];
} Kernel;

typedef struct {  // each counter in a cache line of its own
  unsigned n_done, padding[15];  // chunks of all kernels so far
  unsigned n_asleep, padding_2[15];
} State;

static inline Kernel *next_kernel(Kernel *kernel) {
  return (Kernel *)(kernel->arguments + kernel->n_arguments);
}

static inline void call_kernel(Kernel *kernel, word chunk) {
  word a[64];
  for (word i = 0; i < kernel->n_arguments; i++) a[i] = kernel->arguments[i];
  if (kernel->n_chunks > 1) a[kernel->chunk_argument] = chunk;
  if (kernel->n_arguments <= 8)
    ((kernel_8 *)kernel->address)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
  else
    ((kernel_64 *)kernel->address)(ARGUMENTS);
}

#if PLAIN  // the reference of the tests: one thread
ABI void run_kernels(Kernel *kernel, word n_kernels, word thread_id) {
  for (word i = 0; i < n_kernels && thread_id == 0; i++, kernel = next_kernel(kernel))
    for (word chunk = 0; chunk < kernel->n_chunks; chunk++) call_kernel(kernel, chunk);
}
#else

static inline word ticks(void) {
#if __aarch64__
  word count;
  __asm__ volatile("yield\n\tmrs %0, cntvct_el0" : "=r"(count));
  return count;
#else
  __builtin_ia32_pause();
  return __builtin_readcyclecounter();
#endif
}

// A thread spins for up to last_kernel * patience / 1024 before it sleeps: long while no other
// program needs the cores, since waking takes time, and short for a while after it has slept.
enum { LEAST_PATIENCE = 64, MOST_PATIENCE = 4096 };

typedef struct {
  word last_kernel, patience;  // last_kernel: ticks that the thread worked on it
  system_call *call;
  long futex;
} Thread;

static void wait(Thread *thread, State *state, unsigned n_chunks) {
  word start = ticks(), has_slept = 0;
  unsigned n_done;
  while ((n_done = __atomic_load_n(&state->n_done, __ATOMIC_ACQUIRE)) < n_chunks) {
    if (ticks() - start <= thread->last_kernel * thread->patience / 1024) continue;
    has_slept = 1;
    __atomic_fetch_add(&state->n_asleep, 1, __ATOMIC_SEQ_CST);
    thread->call(thread->futex, &state->n_done, FUTEX_WAIT_PRIVATE, n_done, (void *)0);
    __atomic_fetch_sub(&state->n_asleep, 1, __ATOMIC_SEQ_CST);
  }
  if (has_slept)
    thread->patience = LEAST_PATIENCE;
  else if (thread->patience < MOST_PATIENCE)
    thread->patience++;
}

// Each thread calls run_kernels with its thread_id. state and is_taken, a byte for each chunk of
// all kernels, are 0 at first. `futex` is the number of the system call.
ABI void run_kernels(Kernel *kernel, word n_kernels, word thread_id, word n_threads, State *state,
                     char *is_taken, system_call *call, long futex) {
  Thread thread = {1 << 16, MOST_PATIENCE, call, futex};
  word n_before = 0;  // chunks of the kernels before
  for (word i = 0; i < n_kernels; i++, kernel = next_kernel(kernel)) {
    word n_chunks = kernel->n_chunks;
    wait(&thread, state, n_before);
    word start = ticks(), chunk = thread_id * n_chunks / n_threads, has_worked = 0;
    for (word j = 0; j < n_chunks; j++, chunk = chunk + 1 < n_chunks ? chunk + 1 : 0) {
      char *taken = is_taken + n_before + chunk;
      if (__atomic_load_n(taken, __ATOMIC_RELAXED)) continue;
      if (__atomic_exchange_n(taken, 1, __ATOMIC_RELAXED)) continue;
      call_kernel(kernel, chunk);
      word n_done = __atomic_add_fetch(&state->n_done, 1, __ATOMIC_SEQ_CST);
      if (n_done == n_before + n_chunks && __atomic_load_n(&state->n_asleep, __ATOMIC_SEQ_CST))
        call(futex, &state->n_done, FUTEX_WAKE_PRIVATE, ALL_THREADS);
      has_worked = 1;
    }
    if (has_worked) thread.last_kernel = ticks() - start;
    n_before += n_chunks;
  }
  if (thread_id == 0) wait(&thread, state, n_before);
}
#endif
