// What the files of an exported model know of each other. model.h, with the sizes, and kernels.c
// are written when a model is exported.
#include "model.h"

typedef unsigned char byte;

typedef struct {
  const byte *text;
  long n;
} Text;

extern const byte *model;   // weights and tokens, at places that model.h has names of
extern const void *halves;  // its weights in half precision, or, where there is only that, in single
extern byte memory[MEMORY_BYTES];  // what the kernels write: caches, logits, and all between

// A step of inference/generator.py, on several cores: each runs all kernels, of those in chunks every
// n_cores-th chunk.
typedef struct {
  int n, end, last;  // as there
  int n_cores;
  long n_done;  // kernels, by all cores together
  int (*yield)(void);  // gives the core to another thread
} Step;
typedef void Kernels(Step *, int core);  // steps.c has one for each kind of processor

// system.c
_Noreturn void fail(int status, const char *format, ...);
void *resized(void *old, long long n_bytes);
void choose_kernels(void);

// system.c, in a page page.c
void decode(Step *);  // on all cores

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
int is_visible(unsigned code_point);
long encode(Text text, int *ids);
Text token(int id);
extern int n_specials;
enum { N_COUNTS = 5 };
extern struct Unknown {  // of the last text
  long n, n_characters;
  struct Count {
    Text token;
    int n;
  } counts[N_COUNTS];  // of the most frequent tokens
} unknown;

// sampling.c
typedef struct {
  double temperature, top_p;
  int top_k;
} Sampling;
int seed(const byte *digits, long n);
int sample(const float *logits, const Sampling *sampling);

// generation.c
enum { LONGEST_STOP = 1000 };  // bytes
void set_prompt(Text prompt, Text stop, int *ids);
Text next_text(int stride, const Sampling *sampling);
Text last_text(void);
extern int has_ended, is_finite;
