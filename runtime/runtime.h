// What the files of an exported model know of each other. model.h, with the sizes, and kernels.c
// are written when a model is exported.
#include "model.h"

typedef unsigned char byte;

extern const byte *model;   // weights and tokens, at places that model.h has names of
extern const void *halves;  // its weights in half precision, or, where there is only that, in single
extern byte memory[MEMORY_BYTES];  // what the kernels write: caches, logits, and all between

// The cores that run a step: each runs all kernels, of those in chunks every n_cores-th chunk.
typedef struct {
  int n, end, last;  // as in inference/decoder.py
  int n_cores;
  long n_run;  // kernels, by all cores together
} Team;
typedef void Step(Team *, int core);

// system.c, in a page page.c
void run(Team *);     // the step on all cores
void give_way(void);  // to another thread
void choose_step(void);

// A number in half precision (IEEE 754, finite), whose bits these are.
static inline float widen(unsigned short bits) {
  union {
    unsigned bits;
    float number;
  } scaled = {(bits & 0x7FFFu) << 13}, sign = {(bits & 0x8000u) << 16 | 0x3F800000};
  return scaled.number * 0x1p112f * sign.number;
}

// tokenizer.c
int character(const byte *text, long n, unsigned *code_point);
long encode(const byte *text, long n, int *ids, int *scratch);
const byte *token(int id, long *n);

// sampling.c
typedef struct {
  double temperature, top_p;
  int top_k;
} Sampling;
int seed(const byte *digits, long n);
int sample(const float *logits, const Sampling *sampling);

// generation.c
typedef struct {
  const byte *text;
  long n;
} Text;
enum { LONGEST_STOP = 1000 };  // bytes
long begin(Text prompt, Text stop, int *ids);
Text next(int stride, const Sampling *sampling);
Text rest(void);
extern int has_ended, is_finite;

// program.c
_Noreturn void fail(int status, const char *format, ...);
