// Products of a matrix with one vector, as fast as memory delivers the matrix, and with hundreds of
// vectors, without the copies that BLAS makes. Most processors multiply integers faster than
// floats. Read this file from the end.

#if __AVX512BW__
enum { LANES = 16, TILE_VECTORS = 4 };
#else
enum { LANES = 8, TILE_VECTORS = 2 };
#endif
enum { TILE_ROWS = 4, ROW_BYTES = 6144 };  // rows that the first-level cache holds

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(1), may_alias)) type
typedef VECTOR(float, LANES) floats;
typedef VECTOR(float, 8) floats_8;
typedef VECTOR(float, 4) floats_4;
typedef VECTOR(_Float16, LANES) halfs;
typedef VECTOR(int, LANES) ints;
typedef VECTOR(short, 2 * LANES) shorts;
typedef VECTOR(signed char, 2 * LANES) bytes;
#define CONVERT __builtin_convertvector
#define SHUFFLE __builtin_shufflevector
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

// The sum of each of four vectors.
INLINE floats_4 four_sums(floats x[4]) {
  floats_8 a = eight_sums(x[0]), b = eight_sums(x[1]), c = eight_sums(x[2]), d = eight_sums(x[3]);
  a = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  c = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  a = SHUFFLE(a, c, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, c, 2, 3, 6, 7, 10, 11, 14, 15);
  return a.even + a.odd;
}

INLINE floats load(void *matrix, long offset, int n_bytes) {
  if (n_bytes == 2) return CONVERT(*(halfs *)((_Float16 *)matrix + offset), floats);
  return *(floats *)((float *)matrix + offset);
}

INLINE float element(void *matrix, long offset, int n_bytes) {
  if (n_bytes == 1) return ((signed char *)matrix)[offset];
  return n_bytes == 2 ? ((_Float16 *)matrix)[offset] : ((float *)matrix)[offset];
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

// Into the second-level cache, as far ahead as memory is slow: faster by 20 to 40 percent.
INLINE void prefetch_ahead(void *pointer) { __builtin_prefetch((char *)pointer + 3072, 0, 1); }

// y[i] = row i of the matrix times x, row by row, with two vectors of sums: more rows or more sums
// at once read memory no faster.
INLINE void one_vector(float *y, void *matrix, void *x, int first, int last, int k, int n_bytes) {
  float *numbers = x;
  short *integers = x;
  for (long i = first; i < last; i++) {
    float total = 0;
    int j = 0;
    if (n_bytes == 1) {
      ints a = 0, b = 0;
      for (bytes *row = (bytes *)((signed char *)matrix + i * k); j + 4 * LANES <= k; row += 2) {
        prefetch_ahead(row);
        a = add_pairs(a, CONVERT(row[0], shorts), *(shorts *)(integers + j));
        b = add_pairs(b, CONVERT(row[1], shorts), *(shorts *)(integers + j + 2 * LANES));
        j += 4 * LANES;
      }
      total = sum(CONVERT(a, floats) + CONVERT(b, floats));
      for (; j < k; j++) total += element(matrix, i * k + j, 1) * integers[j];
    } else {
      floats a = 0, b = 0;
      for (; j + 2 * LANES <= k; j += 2 * LANES) {
        prefetch_ahead((char *)matrix + (i * k + j) * n_bytes);
        if (n_bytes == 4) prefetch_ahead((char *)matrix + (i * k + j + LANES) * n_bytes);
        a += load(matrix, i * k + j, n_bytes) * *(floats *)(numbers + j);
        b += load(matrix, i * k + j + LANES, n_bytes) * *(floats *)(numbers + j + LANES);
      }
      total = sum(a + b);
      for (; j < k; j++) total += element(matrix, i * k + j, n_bytes) * numbers[j];
    }
    y[i] = total;
  }
}

// Converts n elements of the matrix to int16 or float32.
INLINE void pack(char *out, void *matrix, long offset, int n, int n_bytes, int is_integer) {
  for (int i = 0; i < n; i++) {
    float x = element(matrix, offset + i, n_bytes);
    if (is_integer)
      ((short *)out)[i] = n_bytes == 1 ? x : nearest(x);
    else
      ((float *)out)[i] = x;
  }
}

// Micro-kernel: y (n_vectors, n_rows) += x (n_vectors, k) rows (n_rows, k)', all of them with
// strides; sums stay in registers. The packed rows are ROW_BYTES apart; ldx counts bytes.
INLINE void micro_kernel(float *y, char *rows, char *x, int n_rows, long ldy, long ldx, int k,
                         int n_vectors, int is_integer, int is_first) {
  floats sums[TILE_VECTORS][TILE_ROWS] = {};
  ints integer_sums[TILE_VECTORS][TILE_ROWS] = {};
  int size = is_integer ? 2 : 4, offset = 0, end = k * size;
  for (; offset + (int)sizeof(floats) <= end; offset += sizeof(floats))
    for (int t = 0; t < n_vectors; t++)
      for (int i = 0; i < TILE_ROWS; i++) {
        char *a = rows + i * ROW_BYTES + offset, *b = x + t * ldx + offset;
        if (is_integer)
          integer_sums[t][i] = add_pairs(integer_sums[t][i], *(shorts *)a, *(shorts *)b);
        else
          sums[t][i] += *(floats *)a * *(floats *)b;
      }
  for (int t = 0; t < n_vectors; t++) {
    for (int i = 0; i < TILE_ROWS; i++)
      if (is_integer) sums[t][i] = CONVERT(integer_sums[t][i], floats);
    floats_4 totals = four_sums(sums[t]);
    for (int tail = offset; tail < end; tail += size)
      for (int i = 0; i < TILE_ROWS; i++) {
        char *a = rows + i * ROW_BYTES + tail, *b = x + t * ldx + tail;
        totals[i] += is_integer ? *(short *)a * *(short *)b : *(float *)a * *(float *)b;
      }
    for (int i = 0; i < n_rows; i++)
      y[t * ldy + i] = is_first ? totals[i] : y[t * ldy + i] + totals[i];
  }
}

// Packs TILE_ROWS rows of the matrix, up to ROW_BYTES of each, and multiplies all vectors by them.
INLINE void several_vectors(float *y, void *matrix, char *x, int n_vectors, int first, int last,
                            long n, int k, int n_bytes, int is_integer) {
  __attribute__((aligned(64))) char rows[TILE_ROWS * ROW_BYTES];  // no load across cache lines
  int size = is_integer ? 2 : 4, max_depth = ROW_BYTES / size;
  long ldx = (long)k * size;
  for (int start = 0; start < k; start += max_depth)
    for (int row = first; row < last; row += TILE_ROWS) {
      int n_rows = last - row < TILE_ROWS ? last - row : TILE_ROWS, t = 0;
      int depth = k - start < max_depth ? k - start : max_depth;
      for (int i = 0; i < n_rows; i++) {
        long offset = (row + i) * (long)k + start, next = offset + TILE_ROWS * (long)k;
        pack(rows + i * ROW_BYTES, matrix, offset, depth, n_bytes, is_integer);
        for (int byte = 0; byte < depth * n_bytes; byte += 64)
          __builtin_prefetch((char *)matrix + next * n_bytes + byte, 0, 1);
      }
      for (; t + TILE_VECTORS <= n_vectors; t += TILE_VECTORS)
        micro_kernel(y + t * n + row, rows, x + t * ldx + start * size, n_rows, n, ldx, depth,
                     TILE_VECTORS, is_integer, !start);
      for (; t < n_vectors; t++)
        micro_kernel(y + t * n + row, rows, x + t * ldx + start * size, n_rows, n, ldx, depth, 1,
                     is_integer, !start);
    }
}

// y (n_vectors, n) = x (n_vectors, k) matrix (n, k)': the columns of y from `first` to before
// `last`. An element of the matrix has n_bytes: float32, float16 or int8. x is float32 or, if
// is_integer, int16, for which elements of the matrix are rounded to integers.
ABI void gemv(float *y, void *matrix, void *x, int n_vectors, int first, int last, int n, int k,
              int n_bytes, int is_integer) {
#if PLAIN  // the reference of the tests
  for (long t = 0; t < n_vectors; t++)
    for (long i = first; i < last; i++) {
      double sum = 0;
      for (long j = 0; j < k; j++) {
        float a = element(matrix, i * k + j, n_bytes);
        sum += is_integer ? nearest(a) * ((short *)x)[t * k + j] : a * ((float *)x)[t * k + j];
      }
      y[t * n + i] = sum;
    }
#else  // constants, so that clang makes loops for each type
  if (n_bytes == 1)
    n_vectors == 1 ? one_vector(y, matrix, x, first, last, k, 1)
                   : several_vectors(y, matrix, x, n_vectors, first, last, n, k, 1, 1);
  else if (is_integer)
    several_vectors(y, matrix, x, n_vectors, first, last, n, k, 2, 1);
  else if (n_bytes == 2)
    n_vectors == 1 ? one_vector(y, matrix, x, first, last, k, 2)
                   : several_vectors(y, matrix, x, n_vectors, first, last, n, k, 2, 0);
  else
    n_vectors == 1 ? one_vector(y, matrix, x, first, last, k, 4)
                   : several_vectors(y, matrix, x, n_vectors, first, last, n, k, 4, 0);
#endif
}
