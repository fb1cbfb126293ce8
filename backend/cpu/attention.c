// Causal attention in blocks of rows, whose scores never are in memory (Dao et al., 2022). Of a text
// and a head, BLOCK queries meet BLOCK keys at a time, up to the diagonal. A tile of their scores has
// a row for each key, so that a vector holds those of several queries. Read it from the end.

#if __AVX512F__
enum { LANES = 16, N_VECTORS = 2, HEIGHT = 12 };
#elif __AVX2__
enum { LANES = 8, N_VECTORS = 2, HEIGHT = 6 };
#elif __aarch64__
enum { LANES = 4, N_VECTORS = 4, HEIGHT = 6 };
#else
enum { LANES = 4, N_VECTORS = 2, HEIGHT = 6 };
#endif
// HEIGHT rows of N_VECTORS are as many sums as there are registers; MOST_D is attention.py's, too.
enum { WIDTH = LANES * N_VECTORS, BLOCK = 96, MOST_D = 128 };

#define VECTOR(type) __attribute__((ext_vector_type(LANES), aligned(4), may_alias)) type
typedef VECTOR(float) floats;
typedef VECTOR(int) ints;
typedef VECTOR(unsigned) words;
typedef __attribute__((aligned(64))) float rows[BLOCK * MOST_D], columns[MOST_D * BLOCK];
typedef __attribute__((aligned(64))) float tile[BLOCK * BLOCK], row[BLOCK];
#define CONVERT __builtin_convertvector
#define AT(array, index) (*(floats *)((array) + (index)))
// A vector is not to be halved, as clang does of its own accord for Intel's processors.
#define INLINE static inline __attribute__((always_inline, min_vector_width(512)))
#define SEPARATE static __attribute__((noinline, min_vector_width(512)))  // compiled once

INLINE long least(long a, long b) { return a < b ? a : b; }

// 2^x for x of at most 0, with an error of 2e-9 before it is rounded; 0 where x is below -126.
INLINE floats power_of_2(floats x) {
  ints n = CONVERT(x - 0.5f, ints);  // the nearest integer
  floats r = x - CONVERT(n, floats), y = 1.53375768e-4f;
  y = y * r + 1.33998604e-3f;
  y = y * r + 9.61851953e-3f;
  y = y * r + 5.55032900e-2f;
  y = y * r + 2.40226466e-1f;
  y = y * r + 6.93147206e-1f;
  y = y * r + 1;
  return x < -126 ? 0 : (floats)((ints)y + (n << 23));
}

// Which part of a product's matrices is 0 on the diagonal: in c or a what is below the matrix's own
// diagonal, or in a what is above.
enum { NO_PART, BELOW_IN_C, BELOW_IN_A, ABOVE_IN_A };

// c (m, n) = a (m, k) b (k, n), plus c where it `adds`. The numbers of a are a_row and a_column
// apart. All rows and columns of a tile are written, those past m and n with what is not needed.
SEPARATE void product(float *c, long c_step, float *a, long a_row, long a_column, float *b,
                      long b_step, long m, long n, long k, int zeros, int adds) {
  for (long j = 0; j < n; j += WIDTH)
    for (long i = 0; i < m && !(zeros == BELOW_IN_C && i >= j + WIDTH); i += HEIGHT) {
      floats sums[HEIGHT][N_VECTORS] = {};
      long first = zeros == BELOW_IN_A ? i : 0, end = zeros == ABOVE_IN_A ? i + HEIGHT : k;
      for (long l = first; l < least(end, k); l++)
#pragma unroll
        for (int y = 0; y < HEIGHT; y++)
#pragma unroll
          for (int x = 0; x < N_VECTORS; x++)
            sums[y][x] += a[(i + y) * a_row + l * a_column] * AT(b, l * b_step + j + x * LANES);
#pragma unroll
      for (int y = 0; y < HEIGHT; y++)
#pragma unroll
        for (int x = 0; x < N_VECTORS; x++) {
          floats *place = &AT(c, (i + y) * c_step + j + x * LANES);
          *place = adds ? *place + sums[y][x] : sums[y][x];
        }
    }
}

// Copies n rows of d numbers to rows of `width`. Zeros fill what tiles and vectors reach beyond.
SEPARATE void pack(float *out, long width, float *x, long step, long n, long d, float factor) {
  for (long i = 0; i < least(n + WIDTH, BLOCK); i++, out += width, x += step) {
    long end = i < n ? d : 0;
    for (long j = 0; j < end; j++) out[j] = x[j] * factor;
    for (long j = end; j < width; j++) out[j] = 0;
  }
}

// The same, to a column for each row.
SEPARATE void pack_across(float *out, float *x, long step, long n, long d, float factor) {
  for (long i = 0; i < least(n + WIDTH, BLOCK); i += LANES)
    for (long j = 0; j < d; j++) {
      floats numbers;
      for (int l = 0; l < LANES; l++) numbers[l] = i + l < n ? x[(i + l) * step + j] : 0;
      AT(out, j * BLOCK + i) = numbers * factor;
    }
}

// What is the same of all texts and heads: `width` and `step` are from a row to the next in a block
// and in memory; dropout keeps a weight whose hash is `least_kept` or more.
typedef struct {
  long n_heads, time, d, width, step;
  float scale, kept_factor;
  unsigned key, least_kept;
} Sizes;

INLINE Sizes sizes(unsigned *key, int n_heads, int time, int d, unsigned least_kept) {
  float kept_factor = 4294967296.0 / (4294967296.0 - least_kept);
  return (Sizes){n_heads, time, d, (d + WIDTH - 1) / WIDTH * WIDTH, (long)n_heads * d,
                 1 / __builtin_sqrtf(d), kept_factor, *key, least_kept};
}
#define LOG2_E 1.44269504f

// What dropout multiplies weights by, of consecutive queries and one key; gpt_tiny.py has the hash.
INLINE floats dropout(Sizes *s, words index) {
  words x = index + s->key;
  x = (x ^ (x >> 16)) * 0x21F0AAAD;
  x = (x ^ (x >> 15)) * 0xD35A2D97;
  x = x ^ (x >> 15);
  return x >= s->least_kept ? (floats)s->kept_factor : (floats)0;
}

// Of LANES queries from number i of a tile on: how many keys the products read, up to which key each
// may look, and the indices of their weights for the first key; `place` is that of the tile.
#define QUERIES                                                                   \
  long end = is_diagonal ? least(n_k, i + LANES + HEIGHT) : n_k;                  \
  words query, last = BLOCK;                                                      \
  for (int lane = 0; lane < LANES; lane++) query[lane] = i + lane;                \
  if (is_diagonal) last = query;                                                  \
  words index = query * (unsigned)s->time + place;

// Scores become weights, not divided by their sums yet. The statistics of each query so far are its
// highest score and the sum; sums from before become less by `shrunk`.
SEPARATE void weigh(Sizes *s, float *scores, float *highest, float *sums, float *shrunk, long n_q,
                    long n_k, unsigned place, int is_diagonal) {
  for (long i = 0; i < n_q; i += LANES) {
    QUERIES
    floats most = AT(highest, i), sum = 0;
    for (unsigned k = 0; k < end; k++) {
      floats score = last >= k ? AT(scores, k * BLOCK + i) : AT(highest, i);
      most = score > most ? score : most;
    }
    for (unsigned k = 0; k < end; k++) {
      floats weight = last >= k ? power_of_2(AT(scores, k * BLOCK + i) - most) : (floats)0;
      sum += weight;
      AT(scores, k * BLOCK + i) = s->least_kept ? weight * dropout(s, index + k) : weight;
    }
    AT(shrunk, i) = power_of_2(AT(highest, i) - most);
    AT(highest, i) = most;
    AT(sums, i) = AT(sums, i) * AT(shrunk, i) + sum;
  }
}

// mixed (b, t, h, d) = dropout(softmax(query key' / sqrt(d))) value of the keys up to each query,
// for the heads from `first` to before `last` of all texts' heads. `statistics` (b, h, 2, t) gets
// the highest score of each row, times log2(e), and one over the sum of what it is divided by.
ABI void attention(float *mixed, float *statistics, float *query, float *key, float *value,
                   unsigned *dropout_key, int first, int last, int n_heads, int time, int d,
                   unsigned least_kept) {
  columns q;
  rows k, v, out;
  tile scores;
  Sizes s = sizes(dropout_key, n_heads, time, d, least_kept);
  for (long head = first; head < last; head++)
    for (long i = 0; i < time; i += BLOCK) {
      long start = (head / n_heads * time * n_heads + head % n_heads) * d;
      long n_q = least(BLOCK, time - i), at = start + i * s.step;
      row highest, sums, shrunk;
      for (long x = 0; x < BLOCK; x++) highest[x] = -__builtin_inff(), sums[x] = 0;
      for (long x = 0; x < BLOCK * s.width; x++) out[x] = 0;
      pack_across(q, query + at, s.step, n_q, d, s.scale * LOG2_E);
      for (long j = 0; j <= i; j += BLOCK) {
        int is_diagonal = j == i;
        long n_k = least(BLOCK, time - j), of_keys = start + j * s.step;
        pack(k, s.width, key + of_keys, s.step, n_k, d, 1);
        pack(v, s.width, value + of_keys, s.step, n_k, d, 1);
        product(scores, BLOCK, k, s.width, 1, q, BLOCK, n_k, n_q, d,
                is_diagonal ? BELOW_IN_C : NO_PART, 0);
        weigh(&s, scores, highest, sums, shrunk, n_q, n_k, (head * time + i) * time + j,
              is_diagonal);
        for (long x = 0; x < n_q; x++)
          for (long y = 0; y < s.width; y++) out[x * s.width + y] *= shrunk[x];
        product(out, s.width, scores, 1, BLOCK, v, s.width, n_q, d, n_k,
                is_diagonal ? ABOVE_IN_A : NO_PART, 1);
      }
      for (long x = 0; x < n_q; x++) {
        float *of_row = statistics + head * 2 * time + i + x;
        of_row[0] = highest[x];
        of_row[time] = 1 / sums[x];
        for (long y = 0; y < d; y++) mixed[at + x * s.step + y] = out[x * s.width + y] / sums[x];
      }
    }
}

// Scores become weights again, and the gradients of weights those of scores.
SEPARATE void weigh_again(Sizes *s, float *scores, float *gradients, float *highest,
                          float *inverse_sums, float *means, long n_q, long n_k, unsigned place,
                          int is_diagonal) {
  for (long i = 0; i < n_q; i += LANES) {
    QUERIES
    for (unsigned k = 0; k < end; k++) {
      floats *score = &AT(scores, k * BLOCK + i), *gradient = &AT(gradients, k * BLOCK + i);
      floats weight = power_of_2(*score - AT(highest, i)) * AT(inverse_sums, i);
      floats factor = s->least_kept ? dropout(s, index + k) : 1;
      floats of_score = weight * (*gradient * factor - AT(means, i));
      *score = last >= k ? weight * factor : (floats)0;
      *gradient = last >= k ? of_score : (floats)0;
    }
  }
}

SEPARATE void add_rows(float *to, long step, float *x, long width, long n, long d, int is_first) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < d; j++)
      to[i * step + j] = x[i * width + j] + (is_first ? 0 : to[i * step + j]);
}

// The gradients of query, key and value from that of `mixed`, and from what `attention` has left.
ABI void attention_gradients(float *of_query, float *of_key, float *of_value, float *of_mixed,
                             float *mixed, float *statistics, float *query, float *key,
                             float *value, unsigned *dropout_key, int first, int last, int n_heads,
                             int time, int d, unsigned least_kept) {
  columns q_across, g_across;
  rows q, g, k, v, sums, of_q;
  tile scores, gradients;
  Sizes s = sizes(dropout_key, n_heads, time, d, least_kept);
  for (long head = first; head < last; head++)
    for (long i = 0; i < time; i += BLOCK) {
      long start = (head / n_heads * time * n_heads + head % n_heads) * d;
      long n_q = least(BLOCK, time - i), at = start + i * s.step;
      pack(q, s.width, query + at, s.step, n_q, d, s.scale);
      pack(g, s.width, of_mixed + at, s.step, n_q, d, 1);
      pack_across(q_across, query + at, s.step, n_q, d, s.scale * LOG2_E);
      pack_across(g_across, of_mixed + at, s.step, n_q, d, 1);
      row highest = {}, inverse_sums = {}, means = {};  // of the weights' gradients, by the weights
      for (long x = 0; x < n_q; x++) {
        highest[x] = statistics[head * 2 * time + i + x];
        inverse_sums[x] = statistics[(head * 2 + 1) * time + i + x];
        for (long y = 0; y < d; y++) means[x] += g[x * s.width + y] * mixed[at + x * s.step + y];
      }
      for (long x = 0; x < BLOCK * s.width; x++) of_q[x] = 0;
      for (long j = 0; j <= i; j += BLOCK) {
        int is_diagonal = j == i, below_in_c = is_diagonal ? BELOW_IN_C : NO_PART;
        int below_in_a = is_diagonal ? BELOW_IN_A : NO_PART;
        long n_k = least(BLOCK, time - j), of_keys = start + j * s.step;
        pack(k, s.width, key + of_keys, s.step, n_k, d, 1);
        pack(v, s.width, value + of_keys, s.step, n_k, d, 1);
        product(scores, BLOCK, k, s.width, 1, q_across, BLOCK, n_k, n_q, d, below_in_c, 0);
        product(gradients, BLOCK, v, s.width, 1, g_across, BLOCK, n_k, n_q, d, below_in_c, 0);
        weigh_again(&s, scores, gradients, highest, inverse_sums, means, n_q, n_k,
                    (head * time + i) * time + j, is_diagonal);
        // the diagonal is the first block that adds to its keys' gradients
        product(sums, s.width, scores, BLOCK, 1, g, s.width, n_k, d, n_q, below_in_a, 0);
        add_rows(of_value + of_keys, s.step, sums, s.width, n_k, d, is_diagonal);
        product(sums, s.width, gradients, BLOCK, 1, q, s.width, n_k, d, n_q, below_in_a, 0);
        add_rows(of_key + of_keys, s.step, sums, s.width, n_k, d, is_diagonal);
        product(of_q, s.width, gradients, 1, BLOCK, k, s.width, n_q, d, n_k,
                is_diagonal ? ABOVE_IN_A : NO_PART, 1);
      }
      for (long x = 0; x < n_q; x++)
        for (long y = 0; y < d; y++)
          of_query[at + x * s.step + y] = of_q[x * s.width + y] * s.scale;
    }
}
