// Products of a matrix with few vectors, y = x matrix', as fast as the matrix can be read. It holds
// float32, float16 or int8. Several vectors, and all with int8, are int16: products of integers are
// fast on most processors, and exact on all. Read it from the end.

#if __AVX512BW__
enum { LANES = 16, TILE = 4 };
#else
enum { LANES = 8, TILE = 2 };
#endif

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(1))) type
typedef VECTOR(float, LANES) floats;
typedef VECTOR(float, 8) floats_8;
typedef VECTOR(float, 4) floats_4;
typedef VECTOR(_Float16, LANES) halfs;
typedef VECTOR(int, LANES) ints;
typedef VECTOR(short, 2 * LANES) shorts;
typedef VECTOR(signed char, 2 * LANES) bytes;
#define CONVERT __builtin_convertvector
#define INLINE static inline __attribute__((always_inline))

INLINE float sum(floats x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

INLINE floats_8 eight_sums(ints integers) {
  floats x = CONVERT(integers, floats);
#if __AVX512BW__
  return x.lo + x.hi;
#else
  return x;
#endif
}

// The sums of four vectors, whose halves and quarters are added in turn.
INLINE floats_4 four_sums(ints *of) {
#define PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  floats_8 a = eight_sums(of[0]), b = eight_sums(of[1]), c = eight_sums(of[2]);
  floats_8 d = eight_sums(of[3]);
  a = PAIR(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PAIR(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  c = PAIR(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + PAIR(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  a = PAIR(a, c, 0, 1, 4, 5, 8, 9, 12, 13) + PAIR(a, c, 2, 3, 6, 7, 10, 11, 14, 15);
  return a.even + a.odd;
}

// sums[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
INLINE ints multiply_pairs(ints sums, shorts a, shorts b) {
#if __AVX512VNNI__
  return __builtin_ia32_vpdpwssd512(sums, (ints)a, (ints)b);
#elif __AVX512BW__
  return sums + (ints)__builtin_ia32_pmaddwd512(a, b);
#elif __AVX2__
  return sums + (ints)__builtin_ia32_pmaddwd256(a, b);
#else
  return sums + CONVERT(a.even, ints) * CONVERT(b.even, ints) +
         CONVERT(a.odd, ints) * CONVERT(b.odd, ints);
#endif
}

INLINE floats load(void *matrix, long at, int n_bytes) {
  if (n_bytes == 2) return CONVERT(*(halfs *)((_Float16 *)matrix + at), floats);
  return *(floats *)((float *)matrix + at);
}

INLINE float element(void *matrix, long at, int n_bytes) {
  if (n_bytes == 1) return ((signed char *)matrix)[at];
  return n_bytes == 2 ? ((_Float16 *)matrix)[at] : ((float *)matrix)[at];
}

// Into the second cache, as far ahead as memory is slow: by 20 to 40 percent faster.
#define READ_AHEAD(pointer) __builtin_prefetch((char *)(pointer) + 3072, 0, 1)

// One row after the other, with two vectors of sums: more of either read memory no faster.
INLINE void one_vector(float *y, void *matrix, void *x, int first, int last, int k, int n_bytes) {
  float *numbers = x;
  short *integers = x;
  for (long i = first; i < last; i++) {
    float total = 0;
    int j = 0;
    if (n_bytes == 1) {
      ints a = 0, b = 0;
      for (bytes *row = (bytes *)((signed char *)matrix + i * k); j + 4 * LANES <= k; row += 2) {
        READ_AHEAD(row);
        a = multiply_pairs(a, CONVERT(row[0], shorts), *(shorts *)(integers + j));
        b = multiply_pairs(b, CONVERT(row[1], shorts), *(shorts *)(integers + j + 2 * LANES));
        j += 4 * LANES;
      }
      total = sum(CONVERT(a, floats) + CONVERT(b, floats));
      for (; j < k; j++) total += element(matrix, i * k + j, 1) * integers[j];
    } else {
      floats a = 0, b = 0;
      for (; j + 2 * LANES <= k; j += 2 * LANES) {
        READ_AHEAD((char *)matrix + (i * k + j) * n_bytes);
        if (n_bytes == 4) READ_AHEAD((char *)matrix + (i * k + j + LANES) * n_bytes);
        a += load(matrix, i * k + j, n_bytes) * *(floats *)(numbers + j);
        b += load(matrix, i * k + j + LANES, n_bytes) * *(floats *)(numbers + j + LANES);
      }
      total = sum(a + b);
      for (; j < k; j++) total += element(matrix, i * k + j, n_bytes) * numbers[j];
    }
    y[i] = total;
  }
}

// `rows` holds four rows of k numbers; y is (tile, n), of which it fills n_rows columns.
INLINE void one_tile(float *y, short *rows, short *x, int n_rows, int n, int k, int tile) {
  ints sums[TILE][4] = {};
  int j = 0;
  for (; j + 2 * LANES <= k; j += 2 * LANES)
    for (int t = 0; t < tile; t++)
      for (int row = 0; row < 4; row++)
        sums[t][row] = multiply_pairs(sums[t][row], *(shorts *)(rows + row * k + j),
                                      *(shorts *)(x + (long)t * k + j));
  for (int t = 0; t < tile; t++) {
    floats_4 totals = four_sums(sums[t]);
    for (int rest = j; rest < k; rest++)
      for (int row = 0; row < 4; row++) totals[row] += rows[row * k + rest] * x[(long)t * k + rest];
    for (int row = 0; row < n_rows; row++) y[(long)t * n + row] = totals[row];
  }
}

INLINE void round_numbers(short *rounded, void *matrix, long at, int n, int n_bytes) {
  for (int i = 0; i < n; i++) {
    float x = element(matrix, at + i, n_bytes);
    rounded[i] = n_bytes == 1 ? x : x + (x < 0 ? -0.5f : 0.5f);
  }
}

// Four rows, which stay in the core's nearest cache, with all vectors, and so on.
INLINE void several_vectors(float *y, void *matrix, short *x, int n_vectors, int first, int last,
                            int n, int k, int n_bytes) {
  __attribute__((aligned(64))) short rows[4 * k];  // reading across a cache line takes twice as long
  for (int i = first; i < last; i += 4) {
    int n_rows = last - i < 4 ? last - i : 4, t = 0;
    round_numbers(rows, matrix, (long)i * k, n_rows * k, n_bytes);
    for (; t + TILE <= n_vectors; t += TILE)
      one_tile(y + (long)t * n + i, rows, x + (long)t * k, n_rows, n, k, TILE);
    for (; t < n_vectors; t++)
      one_tile(y + (long)t * n + i, rows, x + (long)t * k, n_rows, n, k, 1);
  }
}

// y (n_vectors, n) = x (n_vectors, k) matrix (n, k)', its columns from `first` to before `last`.
// A number of the matrix has n_bytes; those of float16 are rounded where x holds integers.
void multiply(float *y, void *matrix, void *x, int n_vectors, int first, int last, int n, int k,
              int n_bytes, int has_integers) {
  if (n_vectors == 1 && n_bytes == 4) one_vector(y, matrix, x, first, last, k, 4);
  else if (n_vectors == 1 && n_bytes == 2 && !has_integers) one_vector(y, matrix, x, first, last, k, 2);
  else if (n_vectors == 1 && n_bytes == 1) one_vector(y, matrix, x, first, last, k, 1);
  else if (n_bytes == 1) several_vectors(y, matrix, x, n_vectors, first, last, n, k, 1);
  else several_vectors(y, matrix, x, n_vectors, first, last, n, k, 2);
}
