// A model in a page: what worker.js calls.
#include "runtime.h"

#define EXPORT(name) __attribute__((export_name(#name))) name
enum { MOST_INPUT = 1 << 18 };

// The file of the model lies so far behind that its halves, which are of no use here, have room to
// become single in place.
enum { FIRST = 2 * N_HALVES };
static byte input[MOST_INPUT], space[FIRST + MODEL_BYTES] __attribute__((aligned(64)));
byte memory[MEMORY_BYTES] __attribute__((aligned(64)));
const byte *model = space + FIRST;
const void *halves = space;

static int ids[5 * MOST_INPUT];
static Sampling sampling;
static Text added;

void decode(Step *step) {
  extern Kernels kernels_any;
  step->n_cores = 1;
  kernels_any(step, 0);
}

byte *EXPORT(model_place)(void) { return space + FIRST; }
int EXPORT(model_bytes)(void) { return MODEL_BYTES; }
byte *EXPORT(input_place)(void) { return input; }
int EXPORT(most_input)(void) { return MOST_INPUT; }
int EXPORT(has_end)(void) { return END >= 0; }

// To be called when the model is in its place.
void EXPORT(widen_halves)(void) {
  for (long i = 0; i < N_HALVES; i++)
    ((float *)space)[i] = widen(((const unsigned short *)model)[i]);
}

// The seed, in digits, is the input; returns whether it is one.
int EXPORT(set_seed)(int n) { return seed(input, n); }

// The prompt is the input; returns how many percent of its characters are unknown.
double EXPORT(start)(int n, double temperature, int top_k, double top_p) {
  sampling = (Sampling){temperature, top_p, top_k};
  set_prompt((Text){input, n}, (Text){}, ids);
  return unknown.n ? 100.0 * unknown.n / unknown.n_characters : 0;
}

// Three numbers for each of the most frequent: its place, its bytes, and how often it is there.
struct Count *EXPORT(counts_of_unknown)(void) { return unknown.counts; }

// Makes a token; returns how many bytes of text are certain by it.
int EXPORT(next_token)(void) { return (added = next_text(1, &sampling)).n; }
const byte *EXPORT(text_place)(void) { return added.text; }
int EXPORT(is_at_end)(void) { return has_ended; }
int EXPORT(is_broken)(void) { return !is_finite; }
