// Declarations shared by the C of an exported model. The export writes model.h, sizes and offsets,
// and kernels.c.
#include "model.h"

typedef unsigned char byte;

typedef struct {
  const byte *bytes;  // in UTF-8
  long n;
} Text;

extern const byte *model;   // weights and tokens, at offsets of model.h
extern const void *halves;  // weights in half precision, or the same numbers in single
extern byte memory[MEMORY_BYTES];  // buffers that kernels write: caches, logits, and all between

// A step of inference/generator.py on several cores: each core runs all kernels and, of a kernel in
// chunks, every n_cores-th chunk.
typedef struct {
  int n, end, last;  // the number of tokens; the position after them; the index of the last one
  int n_cores;
  long n_done;  // kernels, by all cores together
  int (*yield)(void);  // gives the core to another thread
} Step;
typedef void Kernels(Step *, int core);  // steps.c, compiled for each kind of processor

// system.c
_Noreturn void fail(int status, const char *format, ...);
void *resize(void *old, long long n_bytes);
void choose_kernels(void);

// system.c, in a page page.c
void run_step(Step *);  // on all cores

// A finite number in half precision (IEEE 754), given its bits.
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
int compare(Text text, Text other);
long encode(Text text, int *ids);
Text token(int id);
extern int n_specials;  // 0 takes special tokens for ordinary text
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
enum { MAX_STOP = 1000 };  // bytes
void set_prompt(Text prompt, Text stop, int *ids);
Text next_text(int stride, const Sampling *sampling);
Text last_text(void);
extern int has_ended, is_finite;
