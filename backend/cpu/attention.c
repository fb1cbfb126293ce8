// Causal attention as in FlashAttention (Dao et al., 2022): for each head, BLOCK queries meet BLOCK
// keys at a time, up to the diagonal, with online softmax: no matrix of scores is in memory. In a
// tile of scores (keys, queries) vectors run along the queries. Read this file from the end.

#if __AVX512F__
enum { LANES = 16, N_VECTORS = 2, MR = 12 };
#elif __AVX2__
enum { LANES = 8, N_VECTORS = 2, MR = 6 };
#elif __aarch64__
enum { LANES = 4, N_VECTORS = 4, MR = 6 };
#else
enum { LANES = 4, N_VECTORS = 2, MR = 6 };
#endif
// A register tile has MR rows of N_VECTORS vectors. Python asks for heads of up to MAX_D.
enum { NR = LANES * N_VECTORS, BLOCK = 96, MAX_D = 128 };

#define VECTOR(type) __attribute__((ext_vector_type(LANES), aligned(4), may_alias)) type
typedef VECTOR(float) floats;
typedef VECTOR(int) ints;
typedef VECTOR(unsigned) words;
typedef __attribute__((aligned(64))) float rows[BLOCK * MAX_D], columns[MAX_D * BLOCK];
typedef __attribute__((aligned(64))) float tile[BLOCK * BLOCK], row[BLOCK];
#define CONVERT __builtin_convertvector
#define AT(array, index) (*(floats *)((array) + (index)))
// min_vector_width: clang prefers vectors of 256 bits on Intel's processors.
#define INLINE static inline __attribute__((always_inline, min_vector_width(512)))
#define NOINLINE static __attribute__((noinline, min_vector_width(512)))

INLINE long min(long a, long b) { return a < b ? a : b; }

// 2^x for x <= 0, with an error of 2e-9 before rounding; 0 for x < -126.
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

// Which matrix of a product on the diagonal is triangular: UPPER_C needs the upper triangle alone.
enum { FULL, UPPER_C, UPPER_A, LOWER_A };

// c (m, n) = (+= if `adds`) a (m, k) b (k, n). a_row and a_column are the strides of a, ldb and ldc
// the strides of rows of b and c. Whole register tiles are written, past m and n too.
NOINLINE void gemm(float *c, long ldc, float *a, long a_row, long a_column, float *b, long ldb,
                   long m, long n, long k, int triangle, int adds) {
  for (long j = 0; j < n; j += NR)
    for (long i = 0; i < m && !(triangle == UPPER_C && i >= j + NR); i += MR) {
      floats sums[MR][N_VECTORS] = {};
      long start = triangle == UPPER_A ? i : 0, end = triangle == LOWER_A ? i + MR : k;
      for (long l = start; l < min(end, k); l++)
#pragma unroll
        for (int y = 0; y < MR; y++)
#pragma unroll
          for (int x = 0; x < N_VECTORS; x++)
            sums[y][x] += a[(i + y) * a_row + l * a_column] * AT(b, l * ldb + j + x * LANES);
#pragma unroll
      for (int y = 0; y < MR; y++)
#pragma unroll
        for (int x = 0; x < N_VECTORS; x++) {
          floats *place = &AT(c, (i + y) * ldc + j + x * LANES);
          *place = adds ? *place + sums[y][x] : sums[y][x];
        }
    }
}

// x (n, d) * factor, with rows `stride` apart, to rows of `width`; zeros pad them to whole tiles.
NOINLINE void pack(float *out, long width, float *x, long stride, long n, long d, float factor) {
  for (long i = 0; i < min(n + NR, BLOCK); i++, out += width, x += stride) {
    long end = i < n ? d : 0;
    for (long j = 0; j < end; j++) out[j] = x[j] * factor;
    for (long j = end; j < width; j++) out[j] = 0;
  }
}

// The same, transposed: to (d, BLOCK).
NOINLINE void pack_transposed(float *out, float *x, long stride, long n, long d, float factor) {
  for (long i = 0; i < min(n + NR, BLOCK); i += LANES)
    for (long j = 0; j < d; j++) {
      floats numbers;
      for (int l = 0; l < LANES; l++) numbers[l] = i + l < n ? x[(i + l) * stride + j] : 0;
      AT(out, j * BLOCK + i) = numbers * factor;
    }
}

// Rows are `width` apart in a packed block, `stride` in memory. Dropout keeps weights whose hash is
// threshold or more, with threshold = rate * 2^32, and scales them by kept_factor.
typedef struct {
  long n_heads, time, d, width, stride;
  float scale, kept_factor;
  unsigned key, threshold;
} Settings;

INLINE Settings settings(unsigned *dropout_key, int n_heads, int time, int d, unsigned threshold) {
  float kept_factor = 4294967296.0 / (4294967296.0 - threshold);
  return (Settings){n_heads, time, d, (d + NR - 1) / NR * NR, (long)n_heads * d,
                  1 / __builtin_sqrtf(d), kept_factor, *dropout_key, threshold};
}
#define LOG2_E 1.44269504f

// Dropout's factors for the weights with these indices, by gpt_tiny.py's hash.
INLINE floats dropout(Settings *s, words index) {
  words x = index + s->key;
  x = (x ^ (x >> 16)) * 0x21F0AAAD;
  x = (x ^ (x >> 15)) * 0xD35A2D97;
  x = x ^ (x >> 15);
  return x >= s->threshold ? (floats)s->kept_factor : (floats)0;
}

// Online softmax: replaces scores (keys, queries), times log2(e), by weights exp(score - maximum),
// with dropout, and updates each query's maximum and sum of weights. rescale (queries): the factors
// for outputs of the blocks before. The weight of the tile's first query and key has first_index.
NOINLINE void update_softmax(Settings *s, float *scores, float *maximum, float *sums,
                             float *rescale, long n_q, long n_k, unsigned first_index,
                             int is_diagonal) {
  for (long i = 0; i < n_q; i += LANES) {
    long end = is_diagonal ? min(n_k, i + LANES + MR) : n_k;  // that a product reads
    words query, last = BLOCK;  // the last key that each query attends to
    for (int lane = 0; lane < LANES; lane++) query[lane] = i + lane;
    if (is_diagonal) last = query;
    words index = query * (unsigned)s->time + first_index;
    floats greatest = AT(maximum, i), sum = 0;
    for (unsigned k = 0; k < end; k++) {
      floats score = last >= k ? AT(scores, k * BLOCK + i) : AT(maximum, i);
      greatest = score > greatest ? score : greatest;
    }
    for (unsigned k = 0; k < end; k++) {
      floats weight = last >= k ? power_of_2(AT(scores, k * BLOCK + i) - greatest) : (floats)0;
      sum += weight;
      AT(scores, k * BLOCK + i) = s->threshold ? weight * dropout(s, index + k) : weight;
    }
    AT(rescale, i) = power_of_2(AT(maximum, i) - greatest);
    AT(maximum, i) = greatest;
    AT(sums, i) = AT(sums, i) * AT(rescale, i) + sum;
  }
}

// out = dropout(softmax(query key' / sqrt(d))) value, with the keys up to each query; all four are
// (batch, time, n_heads, d). A call computes the heads from `first` to before `last` of the batch *
// n_heads. statistics (batch, n_heads, 2, time): the maximum of each query's scores, times log2(e),
// and one over its sum of exponentials.
ABI void attention(float *out, float *statistics, float *query, float *key, float *value,
                   unsigned *dropout_key, int first, int last, int n_heads, int time, int d,
                   unsigned threshold) {
  columns q;
  rows k, v, o;
  tile scores;
  Settings s = settings(dropout_key, n_heads, time, d, threshold);
  for (long head = first; head < last; head++)
    for (long i = 0; i < time; i += BLOCK) {
      long start = (head / n_heads * time * n_heads + head % n_heads) * d;
      long n_q = min(BLOCK, time - i), offset_q = start + i * s.stride;
      row maximum, sums, rescale;
      for (long x = 0; x < BLOCK; x++) maximum[x] = -__builtin_inff(), sums[x] = 0;
      for (long x = 0; x < BLOCK * s.width; x++) o[x] = 0;
      pack_transposed(q, query + offset_q, s.stride, n_q, d, s.scale * LOG2_E);
      for (long j = 0; j <= i; j += BLOCK) {
        int is_diagonal = j == i;
        long n_k = min(BLOCK, time - j), offset_k = start + j * s.stride;
        pack(k, s.width, key + offset_k, s.stride, n_k, d, 1);
        pack(v, s.width, value + offset_k, s.stride, n_k, d, 1);
        gemm(scores, BLOCK, k, s.width, 1, q, BLOCK, n_k, n_q, d, is_diagonal ? UPPER_C : FULL, 0);
        update_softmax(&s, scores, maximum, sums, rescale, n_q, n_k, (head * time + i) * time + j,
                       is_diagonal);
        for (long x = 0; x < n_q; x++)
          for (long y = 0; y < s.width; y++) o[x * s.width + y] *= rescale[x];
        gemm(o, s.width, scores, 1, BLOCK, v, s.width, n_q, d, n_k, is_diagonal ? LOWER_A : FULL,
             1);
      }
      for (long x = 0; x < n_q; x++) {
        float *pair = statistics + head * 2 * time + i + x;
        pair[0] = maximum[x];
        pair[time] = 1 / sums[x];
        for (long y = 0; y < d; y++)
          out[offset_q + x * s.stride + y] = o[x * s.width + y] / sums[x];
      }
    }
}

// Replaces scores by weights, computed anew, and gradients of weights by gradients of scores:
// weight * (gradient - delta), delta (queries) being sum(gradient * weight) = grad_out . out.
NOINLINE void softmax_gradients(Settings *s, float *scores, float *grads, float *maximum,
                                float *inverse_sums, float *delta, long n_q, long n_k,
                                unsigned first_index, int is_diagonal) {
  for (long i = 0; i < n_q; i += LANES) {
    long end = is_diagonal ? min(n_k, i + LANES + MR) : n_k;
    words query, last = BLOCK;
    for (int lane = 0; lane < LANES; lane++) query[lane] = i + lane;
    if (is_diagonal) last = query;
    words index = query * (unsigned)s->time + first_index;
    for (unsigned k = 0; k < end; k++) {
      floats *score = &AT(scores, k * BLOCK + i), *grad = &AT(grads, k * BLOCK + i);
      floats weight = power_of_2(*score - AT(maximum, i)) * AT(inverse_sums, i);
      floats factor = s->threshold ? dropout(s, index + k) : 1;
      floats grad_score = weight * (*grad * factor - AT(delta, i));
      *score = last >= k ? weight * factor : (floats)0;
      *grad = last >= k ? grad_score : (floats)0;
    }
  }
}

// x (n, d) in rows of `width`, added to rows `stride` apart, or copied there if is_first.
NOINLINE void add_rows(float *out, long stride, float *x, long width, long n, long d,
                       int is_first) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < d; j++)
      out[i * stride + j] = x[i * width + j] + (is_first ? 0 : out[i * stride + j]);
}

// The gradients of query, key and value, from grad_out and the results of `attention`. All but the
// statistics are (batch, time, n_heads, d).
ABI void attention_gradients(float *grad_query, float *grad_key, float *grad_value,
                             float *grad_out, float *out, float *statistics, float *query,
                             float *key, float *value, unsigned *dropout_key, int first, int last,
                             int n_heads, int time, int d, unsigned threshold) {
  columns q_transposed, g_transposed;
  rows q, g, k, v, sums, grad_q;
  tile scores, grads;
  Settings s = settings(dropout_key, n_heads, time, d, threshold);
  for (long head = first; head < last; head++)
    for (long i = 0; i < time; i += BLOCK) {
      long start = (head / n_heads * time * n_heads + head % n_heads) * d;
      long n_q = min(BLOCK, time - i), offset_q = start + i * s.stride;
      pack(q, s.width, query + offset_q, s.stride, n_q, d, s.scale);
      pack(g, s.width, grad_out + offset_q, s.stride, n_q, d, 1);
      pack_transposed(q_transposed, query + offset_q, s.stride, n_q, d, s.scale * LOG2_E);
      pack_transposed(g_transposed, grad_out + offset_q, s.stride, n_q, d, 1);
      row maximum = {}, inverse_sums = {}, delta = {};
      for (long x = 0; x < n_q; x++) {
        maximum[x] = statistics[head * 2 * time + i + x];
        inverse_sums[x] = statistics[(head * 2 + 1) * time + i + x];
        for (long y = 0; y < d; y++)
          delta[x] += g[x * s.width + y] * out[offset_q + x * s.stride + y];
      }
      for (long x = 0; x < BLOCK * s.width; x++) grad_q[x] = 0;
      for (long j = 0; j <= i; j += BLOCK) {
        int is_diagonal = j == i, upper_c = is_diagonal ? UPPER_C : FULL;
        int upper_a = is_diagonal ? UPPER_A : FULL;
        long n_k = min(BLOCK, time - j), offset_k = start + j * s.stride;
        pack(k, s.width, key + offset_k, s.stride, n_k, d, 1);
        pack(v, s.width, value + offset_k, s.stride, n_k, d, 1);
        gemm(scores, BLOCK, k, s.width, 1, q_transposed, BLOCK, n_k, n_q, d, upper_c, 0);
        gemm(grads, BLOCK, v, s.width, 1, g_transposed, BLOCK, n_k, n_q, d, upper_c, 0);
        softmax_gradients(&s, scores, grads, maximum, inverse_sums, delta, n_q, n_k,
                          (head * time + i) * time + j, is_diagonal);
        // the block on the diagonal is the first that adds to the gradients of its keys
        gemm(sums, s.width, scores, BLOCK, 1, g, s.width, n_k, d, n_q, upper_a, 0);
        add_rows(grad_value + offset_k, s.stride, sums, s.width, n_k, d, is_diagonal);
        gemm(sums, s.width, grads, BLOCK, 1, q, s.width, n_k, d, n_q, upper_a, 0);
        add_rows(grad_key + offset_k, s.stride, sums, s.width, n_k, d, is_diagonal);
        gemm(grad_q, s.width, grads, 1, BLOCK, k, s.width, n_q, d, n_k,
             is_diagonal ? LOWER_A : FULL, 1);
      }
      for (long x = 0; x < n_q; x++)
        for (long y = 0; y < d; y++)
          grad_query[offset_q + x * s.stride + y] = grad_q[x * s.width + y] * s.scale;
    }
}
