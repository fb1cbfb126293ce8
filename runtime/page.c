// The functions that worker.js calls: a model in a page, on one core. Knows no document.
#include "runtime.h"

#define EXPORT(name) __attribute__((export_name(#name))) name
enum { MAX_INPUT = 1 << 18 };

// WebAssembly has no halves: they become single in place, from the front, in this much more room.
enum { MODEL_OFFSET = 2 * N_HALVES };
static byte input[MAX_INPUT], space[MODEL_OFFSET + MODEL_BYTES] __attribute__((aligned(64)));
byte memory[MEMORY_BYTES] __attribute__((aligned(64)));
const byte *model = space + MODEL_OFFSET;
const void *halves = space;

static int ids[5 * MAX_INPUT];
static Sampling sampling;
static Text new_text;

void run_step(Step *step) {
  extern Kernels kernels_any;
  step->n_cores = 1;
  kernels_any(step, 0);
}

byte *EXPORT(model_address)(void) { return space + MODEL_OFFSET; }
int EXPORT(model_bytes)(void) { return MODEL_BYTES; }
byte *EXPORT(input_address)(void) { return input; }
int EXPORT(max_input)(void) { return MAX_INPUT; }
int EXPORT(has_end)(void) { return END >= 0; }

// Called when the model is at its address.
void EXPORT(widen_halves)(void) {
  for (long i = 0; i < N_HALVES; i++)
    ((float *)space)[i] = widen(((const unsigned short *)model)[i]);
}

// Takes the seed, in digits, from the input; returns 0 if it is none.
int EXPORT(set_seed)(int n) { return seed(input, n); }

// Takes the prompt, n bytes, from the input; returns the percentage of unknown characters.
double EXPORT(start)(int n, double temperature, int top_k, double top_p, int takes_specials) {
  sampling = (Sampling){temperature, top_p, top_k};
  n_specials = takes_specials ? N_SPECIALS : 0;
  set_prompt((Text){input, n}, (Text){}, ids);
  return unknown.n ? 100.0 * unknown.n / unknown.n_characters : 0;
}

// Of each unknown token three integers: the address, the number of bytes, and the count.
struct Count *EXPORT(counts_of_unknown)(void) { return unknown.counts; }

// Draws a token; returns the number of bytes of text that are certain then.
int EXPORT(next_token)(void) { return (new_text = next_text(1, &sampling)).n; }
const byte *EXPORT(text_address)(void) { return new_text.bytes; }
int EXPORT(is_at_end)(void) { return has_ended; }
int EXPORT(is_broken)(void) { return !is_finite; }
