// A list of kernels, one after the other, each in shares. A core begins with its own part of them,
// which its cache may know, and goes on with what others have not begun: the system may have taken
// a core away. Where one waits long, it sleeps, so that the system can move a thread that has to
// wait for another program to the core that is free now.

typedef unsigned long long word;
typedef ABI void kernel_8(word, word, word, word, word, word, word, word);
typedef ABI void kernel_64(PARAMETERS);
typedef ABI long system_call(long, ...);  // libc's syscall, or something that yields the core
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129, ALL = 1 << 30 };

typedef struct {
  unsigned n_done, rest_of_line[15];  // shares of all kernels so far
  unsigned n_asleep, rest_of_line_2[15];
} State;

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

// A core waits for a time in proportion to what it worked before it sleeps: long while nobody else
// needs the cores, for to be woken takes time, and short for a while after it has slept.
enum { LEAST_PATIENCE = 64, MOST_PATIENCE = 4096 };  // in 1/1024

typedef struct {
  word worked, patience;  // for its last kernel, in ticks
  system_call *call;
  long futex;
} Core;

static void wait(Core *core, State *state, unsigned n_shares) {
  word start = ticks(), has_slept = 0;
  unsigned n_done;
  while ((n_done = __atomic_load_n(&state->n_done, __ATOMIC_ACQUIRE)) < n_shares) {
    if (ticks() - start <= core->worked * core->patience / 1024) continue;
    has_slept = 1;
    __atomic_fetch_add(&state->n_asleep, 1, __ATOMIC_SEQ_CST);
    core->call(core->futex, &state->n_done, FUTEX_WAIT_PRIVATE, n_done, (void *)0);
    __atomic_fetch_sub(&state->n_asleep, 1, __ATOMIC_SEQ_CST);
  }
  if (has_slept)
    core->patience = LEAST_PATIENCE;
  else if (core->patience < MOST_PATIENCE)
    core->patience++;
}

// Every core runs this. Of each kernel, `words` holds its address, in how many shares it comes,
// which of its arguments is the number of the share, how many arguments it has, and these.
// `is_taken` has a byte for each share of all kernels, at first 0, as has the state.
ABI void run_kernels(word *words, word n_kernels, word number, word n_cores, State *state,
                     char *is_taken, system_call *call, long futex) {
  Core core = {1 << 16, MOST_PATIENCE, call, futex};
  word n_before = 0;
  for (word i = 0; i < n_kernels; i++) {
    word kernel = words[0], n_shares = words[1], share_argument = words[2], n = words[3], a[64];
    words += 4;
    wait(&core, state, n_before);
    word start = ticks(), share = number * n_shares / n_cores, has_worked = 0;
    for (word j = 0; j < n_shares; j++, share = share + 1 < n_shares ? share + 1 : 0) {
      char *taken = is_taken + n_before + share;
      if (__atomic_load_n(taken, __ATOMIC_RELAXED)) continue;
      if (__atomic_exchange_n(taken, 1, __ATOMIC_RELAXED)) continue;
      for (word k = 0; k < n; k++) a[k] = words[k];
      if (n_shares > 1) a[share_argument] = share;
      if (n <= 8)
        ((kernel_8 *)kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
      else
        ((kernel_64 *)kernel)(ARGUMENTS);
      word n_done = __atomic_add_fetch(&state->n_done, 1, __ATOMIC_SEQ_CST);
      if (n_done == n_before + n_shares && __atomic_load_n(&state->n_asleep, __ATOMIC_SEQ_CST))
        call(futex, &state->n_done, FUTEX_WAKE_PRIVATE, ALL);
      has_worked = 1;
    }
    if (has_worked) core.worked = ticks() - start;
    words += n;
    n_before += n_shares;
  }
  if (number == 0) wait(&core, state, n_before);
}
