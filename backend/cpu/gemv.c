// Products of a matrix with few vectors, as generation needs them: one vector as fast as the matrix
// is read, hundreds without the copies that BLAS makes. Most processors multiply integers faster
// than floats. Read it from the end.

#if __AVX512BW__
enum { LANES = 16, TILE = 4 };
#else
enum { LANES = 8, TILE = 2 };
#endif
enum { N_ROWS = 4, ROW_BYTES = 6144 };  // what the nearest cache holds of the matrix

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(1), may_alias)) type
typedef VECTOR(float, LANES) floats;
typedef VECTOR(float, 8) floats_8;
typedef VECTOR(float, 4) floats_4;
typedef VECTOR(_Float16, LANES) halfs;
typedef VECTOR(int, LANES) ints;
typedef VECTOR(short, 2 * LANES) shorts;
typedef VECTOR(signed char, 2 * LANES) bytes;
#define CONVERT __builtin_convertvector
#define PICK __builtin_shufflevector
#define INLINE static inline __attribute__((always_inline))

INLINE float sum(floats x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

INLINE floats_8 eight_sums(floats x) {
#if __AVX512BW__
  return x.lo + x.hi;
#else
  return x;
#endif
}

INLINE floats_4 four_sums(floats x[4]) {
  floats_8 a = eight_sums(x[0]), b = eight_sums(x[1]), c = eight_sums(x[2]), d = eight_sums(x[3]);
  a = PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  c = PICK(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  a = PICK(a, c, 0, 1, 4, 5, 8, 9, 12, 13) + PICK(a, c, 2, 3, 6, 7, 10, 11, 14, 15);
  return a.even + a.odd;
}

INLINE floats load(void *matrix, long at, int n_bytes) {
  if (n_bytes == 2) return CONVERT(*(halfs *)((_Float16 *)matrix + at), floats);
  return *(floats *)((float *)matrix + at);
}

INLINE float element(void *matrix, long at, int n_bytes) {
  if (n_bytes == 1) return ((signed char *)matrix)[at];
  return n_bytes == 2 ? ((_Float16 *)matrix)[at] : ((float *)matrix)[at];
}

INLINE short nearest(float x) { return x + (x < 0 ? -0.5f : 0.5f); }

// sums[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
INLINE ints add_pairs(ints sums, shorts a, shorts b) {
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

// Into the second cache, as far ahead as memory is slow: faster by 20 to 40 percent.
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
        a = add_pairs(a, CONVERT(row[0], shorts), *(shorts *)(integers + j));
        b = add_pairs(b, CONVERT(row[1], shorts), *(shorts *)(integers + j + 2 * LANES));
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

INLINE void unpack(char *row, void *matrix, long at, int n, int n_bytes, int is_integer) {
  for (int i = 0; i < n; i++) {
    float x = element(matrix, at + i, n_bytes);
    if (is_integer)
      ((short *)row)[i] = n_bytes == 1 ? x : nearest(x);
    else
      ((float *)row)[i] = x;
  }
}

// y[t][i] += the product of n elements of row i and of vector t, for `tile` vectors.
INLINE void one_tile(float *y, char *rows, char *x, int n_rows, long ldy, long ldx, int n,
                     int tile, int is_integer, int is_first) {
  floats sums[TILE][N_ROWS] = {};
  ints integer_sums[TILE][N_ROWS] = {};
  int size = is_integer ? 2 : 4, at = 0, end = n * size;
  for (; at + (int)sizeof(floats) <= end; at += sizeof(floats))
    for (int t = 0; t < tile; t++)
      for (int i = 0; i < N_ROWS; i++) {
        char *a = rows + i * ROW_BYTES + at, *b = x + t * ldx + at;
        if (is_integer)
          integer_sums[t][i] = add_pairs(integer_sums[t][i], *(shorts *)a, *(shorts *)b);
        else
          sums[t][i] += *(floats *)a * *(floats *)b;
      }
  for (int t = 0; t < tile; t++) {
    for (int i = 0; i < N_ROWS; i++)
      if (is_integer) sums[t][i] = CONVERT(integer_sums[t][i], floats);
    floats_4 totals = four_sums(sums[t]);
    for (int rest = at; rest < end; rest += size)
      for (int i = 0; i < N_ROWS; i++) {
        char *a = rows + i * ROW_BYTES + rest, *b = x + t * ldx + rest;
        totals[i] += is_integer ? *(short *)a * *(short *)b : *(float *)a * *(float *)b;
      }
    for (int i = 0; i < n_rows; i++)
      y[t * ldy + i] = is_first ? totals[i] : y[t * ldy + i] + totals[i];
  }
}

// A few rows, which stay in the core's nearest cache, with all vectors, and so on.
INLINE void several_vectors(float *y, void *matrix, char *x, int n_vectors, int first, int last,
                            long n, int k, int n_bytes, int is_integer) {
  __attribute__((aligned(64))) char rows[N_ROWS * ROW_BYTES];  // a load across lines takes two
  int size = is_integer ? 2 : 4, most = ROW_BYTES / size;
  long ldx = (long)k * size;
  for (int start = 0; start < k; start += most)
    for (int row = first; row < last; row += N_ROWS) {
      int n_rows = last - row < N_ROWS ? last - row : N_ROWS, t = 0;
      int n_now = k - start < most ? k - start : most;
      for (int i = 0; i < n_rows; i++) {
        long at = (row + i) * (long)k + start, next = at + N_ROWS * (long)k;
        unpack(rows + i * ROW_BYTES, matrix, at, n_now, n_bytes, is_integer);
        for (int byte = 0; byte < n_now * n_bytes; byte += 64)
          __builtin_prefetch((char *)matrix + next * n_bytes + byte, 0, 1);
      }
      for (; t + TILE <= n_vectors; t += TILE)
        one_tile(y + t * n + row, rows, x + t * ldx + start * size, n_rows, n, ldx, n_now, TILE,
                 is_integer, !start);
      for (; t < n_vectors; t++)
        one_tile(y + t * n + row, rows, x + t * ldx + start * size, n_rows, n, ldx, n_now, 1,
                 is_integer, !start);
    }
}

// y (n_vectors, n) = x (n_vectors, k) matrix (n, k)', of its columns those from `first` to before
// `last`. An element of the matrix has n_bytes: float32, float16 or int8. x is float32 or, if
// is_integer, int16, for which elements of the matrix are rounded to integers.
#if PLAIN  // the definition, which the tests compare with
ABI void gemv(float *y, void *matrix, void *x, int n_vectors, int first, int last, int n, int k,
              int n_bytes, int is_integer) {
  for (long t = 0; t < n_vectors; t++)
    for (long i = first; i < last; i++) {
      double sum = 0;
      for (long j = 0; j < k; j++) {
        float a = element(matrix, i * k + j, n_bytes);
        sum += is_integer ? nearest(a) * ((short *)x)[t * k + j] : a * ((float *)x)[t * k + j];
      }
      y[t * n + i] = sum;
    }
}
#else
ABI void gemv(float *y, void *matrix, void *x, int n_vectors, int first, int last, int n, int k,
              int n_bytes, int is_integer) {
#define ONE(n_bytes) one_vector(y, matrix, x, first, last, k, n_bytes)
#define SEVERAL(...) several_vectors(y, matrix, x, n_vectors, first, last, n, k, __VA_ARGS__)
  if (n_bytes == 1)
    n_vectors == 1 ? ONE(1) : SEVERAL(1, 1);
  else if (is_integer)
    SEVERAL(2, 1);
  else if (n_bytes == 2)
    n_vectors == 1 ? ONE(2) : SEVERAL(2, 0);
  else
    n_vectors == 1 ? ONE(4) : SEVERAL(4, 0);
}
#endif
