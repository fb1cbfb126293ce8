// Draws a token from logits as inference/generator.py does, the same sums in the same order, by
// numpy's default generator, PCG64 (O'Neill, 2014). Knows no text.
#include "runtime.h"

double exp(double);

typedef unsigned __int128 wide;
static wide state, increment;
enum { N_SEED_WORDS = 64 };

static void advance(void) {
  state = state * (((wide)0x2360ED051FC65DA4 << 64) + 0x4385DF649FCCF645) + increment;
}

static double uniform(void) {
  advance();
  unsigned long long folded = (unsigned long long)(state >> 64) ^ (unsigned long long)state;
  int turn = state >> 122;
  return ((folded >> turn | folded << (-turn & 63)) >> 11) * 0x1p-53;
}

static unsigned hash(unsigned x, unsigned *factor, unsigned next) {
  x ^= *factor;
  *factor *= next;
  x *= *factor;
  return x ^ x >> 16;
}

static unsigned mix(unsigned x, unsigned y) {
  x = 0xCA01F9DD * x - 0x4973F715 * y;
  return x ^ x >> 16;
}

// numpy's SeedSequence of a decimal number. Returns 0 for a text that is no number, or too long.
int seed(const byte *digits, long n_digits) {
  unsigned words[N_SEED_WORDS] = {};  // the number, its lowest 32 bits first
  int n = 1;
  for (long i = 0; i < n_digits || i == 0; i++) {
    unsigned long long carry = digits[i] - '0';
    if (carry > 9 || n == N_SEED_WORDS) return 0;
    for (int j = 0; j < n; j++, carry >>= 32) words[j] = carry += words[j] * 10ull;
    if (carry) words[n++] = carry;
  }

  unsigned pool[4], factor = 0x43B0D7E5;
  for (int i = 0; i < 4; i++) pool[i] = hash(words[i], &factor, 0x931E8875);
  for (int i = 0; i < 16; i++)
    if (i / 4 != i % 4) pool[i % 4] = mix(pool[i % 4], hash(pool[i / 4], &factor, 0x931E8875));
  for (int i = 16; i < 4 * n; i++)
    pool[i % 4] = mix(pool[i % 4], hash(words[i / 4], &factor, 0x931E8875));

  wide numbers[4] = {};  // 64 bits each
  factor = 0x8B51F9DD;
  for (int i = 0; i < 8; i++)
    numbers[i / 2] |= (wide)hash(pool[i % 4], &factor, 0x58F38DED) << 32 * (i % 2);
  increment = (numbers[2] << 64 | numbers[3]) << 1 | 1;
  state = 0;
  advance();
  state += numbers[0] << 64 | numbers[1];
  advance();
  return 1;
}

static struct {
  union {
    double value;
    unsigned long long bits;  // in the order of the values, which are not negative
  };
  int id;
} weights[VOCAB_SIZE], sorted[VOCAB_SIZE];

// A stable radix sort, by one byte of the values after the other, in descending order.
static void sort(void) {
  for (int shift = 0; shift < 64; shift += 8) {
    int counts[256] = {}, starts[256] = {};
    for (int i = 0; i < VOCAB_SIZE; i++) counts[weights[i].bits >> shift & 255]++;
    for (int digit = 255; digit > 0; digit--) starts[digit - 1] = starts[digit] + counts[digit];
    for (int i = 0; i < VOCAB_SIZE; i++)
      sorted[starts[weights[i].bits >> shift & 255]++] = weights[i];
    for (int i = 0; i < VOCAB_SIZE; i++) weights[i] = sorted[i];
  }
}

static double sum(int n) {
  double total = 0;
  for (int i = 0; i < n; i++) total += weights[i].value;
  return total;
}

int sample(const float *logits, const Sampling *sampling) {
  int likeliest = 0;
  while (IS_EXCLUDED(likeliest)) likeliest++;
  for (int i = likeliest; i < VOCAB_SIZE; i++)
    if (!IS_EXCLUDED(i) && logits[i] > logits[likeliest]) likeliest = i;
  if (sampling->temperature == 0) return likeliest;

  for (int i = 0; i < VOCAB_SIZE; i++) {
    float below = logits[i] - logits[likeliest];
    weights[i].value = IS_EXCLUDED(i) ? 0 : exp(below / sampling->temperature);
    weights[i].id = i;
  }
  sort();
  int n = sampling->top_k && sampling->top_k < VOCAB_SIZE ? sampling->top_k : VOCAB_SIZE;
  double total = sum(n), cumulative = 0;
  for (int i = 0; i < n; i++) {
    cumulative += weights[i].value;
    if (i && cumulative - weights[i].value >= sampling->top_p * total) n = i;
  }
  double point = uniform() * sum(n);
  int i = 0;
  for (cumulative = weights[0].value; cumulative <= point && i < n - 1;)
    cumulative += weights[++i].value;
  return weights[i].id;
}
