// Products of matrices of float32, or with BFLOAT16 of bfloat16, with sums in float32. Instructions
// take groups of numbers that follow each other along k, the summed axis; a group of float32
// is one number. A part of a and of b at a time is packed first, group beside group, unless rows of
// a can be read in place. Read it from the end.

#if BFLOAT16
typedef unsigned short number;  // the upper half of a float32
#define GEMM sbgemm
#else
typedef float number;
#define GEMM sgemm
#endif
// The arguments of BLAS's cblas_sgemm, of which order is 101, alpha 1 and beta 0.
#define ARGUMENTS                                                                             \
  int order, int flag_a, int flag_b, long m, long n, long k, float alpha, number *a, long lda, \
      number *b, long ldb, float beta, float *c, long ldc

#if PLAIN  // the definition, which the tests compare with
static float widened(number x) {
#if BFLOAT16
  union {
    unsigned bits;
    float number;
  } x_32 = {(unsigned)x << 16};
  return x_32.number;
#else
  return x;
#endif
}

static void plain(ARGUMENTS) {
  for (long i = 0; i < m; i++)
    for (long j = 0; j < n; j++) {
      float sum = 0;
      for (long l = 0; l < k; l++)
        sum += widened(flag_a == 112 ? a[l * lda + i] : a[i * lda + l]) *
               widened(flag_b == 112 ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = sum;
    }
}
#endif

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(2), may_alias)) type
#define INLINE static inline __attribute__((always_inline))

// An instruction adds to a vector of sums, of ROWS rows of a by COLUMNS columns of b, the products
// of a GROUP of numbers of each. A tile, HEIGHT by WIDTH, has as many sums as there are registers.
#if BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
enum { GROUP = 4, ROWS = 2, COLUMNS = 2, HEIGHT = 8, WIDTH = 12 };
// With AMX go vectors that are slower than for float32: a Sapphire Rapids takes twice as long.
#elif BFLOAT16 && (__AVX512BF16__ && !__AMX_BF16__ || EMULATED)  // for tests on other processors
enum { GROUP = 2, ROWS = 1, COLUMNS = 16, HEIGHT = 12, WIDTH = 32 };
#elif BFLOAT16
#error no fast products of bfloat16
#elif __AVX512F__
enum { GROUP = 1, ROWS = 1, COLUMNS = 16, HEIGHT = 12, WIDTH = 32 };
#elif __AVX2__
enum { GROUP = 1, ROWS = 1, COLUMNS = 8, HEIGHT = 6, WIDTH = 16 };
#elif __aarch64__
enum { GROUP = 1, ROWS = 1, COLUMNS = 4, HEIGHT = 6, WIDTH = 16 };
#else
enum { GROUP = 1, ROWS = 1, COLUMNS = 4, HEIGHT = 6, WIDTH = 8 };
#endif
// What is packed at once, on the stack: a core's first cache holds a panel of b, its second one a.
enum { DEPTH = 384, MOST_ROWS = 96, MOST_COLUMNS = 384 / WIDTH * WIDTH };
enum { ALONG = 8 * GROUP };  // so many numbers of a row are packed at once

#if BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
typedef unsigned long group;
#else
typedef unsigned group;
#endif
typedef VECTOR(group, 2) two_groups;
typedef VECTOR(group, 8) groups;
typedef VECTOR(float, ROWS *COLUMNS) floats;
typedef VECTOR(unsigned, ROWS *COLUMNS) words;
typedef VECTOR(float, COLUMNS) floats_of_row;

// Rows of a or columns of b: how far apart they are, and the numbers of each.
typedef struct {
  number *start;
  long row, k;
} Rows;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }
INLINE number *at(Rows x, long row, long k) { return x.start + row * x.row + k * x.k; }
INLINE Rows rows_from(Rows x, long row, long k) { return (Rows){at(x, row, k), x.row, x.k}; }

INLINE floats add_products(floats sums, words a, words b) {
#if BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  asm("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sums) : "w"(a), "w"(b));
#elif BFLOAT16 && __AVX512BF16__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#elif BFLOAT16
  sums += (floats)(a << 16) * (floats)(b << 16);
  sums += (floats)(a & 0xffff0000) * (floats)(b & 0xffff0000);
#else
  sums += (floats)a * (floats)b;
#endif
  return sums;
}

// A tile of c, as a whole, from rows of a in place or packed, and packed columns of b.
INLINE void whole_tile(float *c, long ldc, Rows a, number *b, long depth, int is_first) {
  floats sums[HEIGHT / ROWS][WIDTH / COLUMNS] = {};
#pragma unroll
  for (int i = 0; i < HEIGHT; i++) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + WIDTH - 1, 1);
  }
  number *rows[HEIGHT / ROWS];
#pragma unroll
  for (int i = 0; i < HEIGHT / ROWS; i++) {
    rows[i] = at(a, i * ROWS, 0);
    if (a.k == 1) asm("" : "+r"(rows[i]));  // or clang adds up the steps, one after another
  }
#pragma unroll 4
  for (long k = 0; k < depth; k += GROUP, b += GROUP * WIDTH)
#pragma unroll
    for (int i = 0; i < HEIGHT / ROWS; i++) {
      number *x = rows[i] + k * a.k;
      words row = ROWS == 1 ? (words)*(unsigned *)x : *(words *)x;
#pragma unroll
      for (int j = 0; j < WIDTH / COLUMNS; j++)
        sums[i][j] = add_products(sums[i][j], row, ((words *)b)[j]);
    }
#pragma unroll
  for (int i = 0; i < HEIGHT; i++)
#pragma unroll
    for (int j = 0; j < WIDTH / COLUMNS; j++) {
      floats_of_row sum = ((floats_of_row *)&sums[i / ROWS][j])[i % ROWS];
      floats_of_row *place = (floats_of_row *)(c + i * ldc + j * COLUMNS);
      *place = is_first ? sum : *place + sum;
    }
}

// A tile of c, of which there may be fewer rows or columns.
INLINE void tile(float *c, long ldc, Rows a, number *b, long depth, int is_first,
                 long height, long width) {
  float sums[HEIGHT * WIDTH];
  int is_whole = height >= HEIGHT && width >= WIDTH;
  float *to = is_whole ? c : sums;
  long step = is_whole ? ldc : WIDTH;
  int is_set = is_first || !is_whole;
  if (a.k == 1)
    whole_tile(to, step, (Rows){a.start, a.row, 1}, b, depth, is_set);
  else
    whole_tile(to, step, (Rows){a.start, GROUP, HEIGHT}, b, depth, is_set);
  if (is_whole) return;
  for (int i = 0; i < least(height, HEIGHT); i++)
    for (int j = 0; j < least(width, WIDTH); j++) {
      float *place = c + i * ldc + j;
      *place = sums[i * WIDTH + j] + (is_first ? 0 : *place);
    }
}

// Packs ALONG numbers of `width` rows to a panel: for each group along k, the groups of all rows.
// x has n more rows, and `depth` more numbers of each; zeros fill the rest.
INLINE void pack_block(number *restrict out, int width, Rows x, long n, long depth) {
#define PLACE(row, k) (out + (k) / GROUP * GROUP * width + (row) * GROUP + (k) % GROUP)
  if (n < width || depth < ALONG) {
    for (int k = 0; k < least(round_up(depth, GROUP), ALONG); k++)
      for (int i = 0; i < width; i++) *PLACE(i, k) = i < n && k < depth ? *at(x, i, k) : 0;
  } else if (x.k == 1) {
    for (int i = 0; i < width; i += 2) {
      number *one = at(x, i, 0), *other = at(x, i + 1, 0);
      __builtin_prefetch(one + width * x.row);  // of the next panel
      __builtin_prefetch(other + width * x.row);
      VECTOR(group, 16)
      both = __builtin_shufflevector(*(groups *)one, *(groups *)other, 0, 8, 1, 9, 2, 10, 3, 11, 4,
                                     12, 5, 13, 6, 14, 7, 15);
#pragma unroll
      for (int k = 0; k < 8; k++) *(two_groups *)PLACE(i, k * GROUP) = ((two_groups *)&both)[k];
    }
  } else
    for (int k = 0; k < ALONG; k += GROUP) {
      for (int l = k; l < k + GROUP; l++) __builtin_prefetch(at(x, 0, l + ALONG));
      for (int i = 0; i < width; i++)
        for (int l = k; l < k + GROUP; l++) *PLACE(i, l) = x.start[i + l * x.k];
    }
}

// Packs n rows in panels of `width`, in the order of memory.
INLINE void pack(number *out, int width, Rows x, long n, long depth) {
  long padded = round_up(depth, GROUP);
#define BLOCK(i, k) \
  pack_block(out + i * padded + k * width, width, rows_from(x, i, k), n - i, depth - k)
  if (x.k == 1)
    for (long i = 0; i < n; i += width)
      for (long k = 0; k < depth; k += ALONG) BLOCK(i, k);
  else
    for (long k = 0; k < depth; k += ALONG)
      for (long i = 0; i < n; i += width) BLOCK(i, k);
}

// c (m, n) = a (m, k) b (k, n), a and b row by row or, where a flag is 112, column by column.
// Threads may call it at once.
ABI void GEMM(ARGUMENTS) {
  __attribute__((aligned(64))) number of_a[MOST_ROWS * DEPTH], of_b[MOST_COLUMNS * DEPTH];
  Rows all_a = flag_a == 112 ? (Rows){a, 1, lda} : (Rows){a, lda, 1};
  Rows all_b = flag_b == 112 ? (Rows){b, ldb, 1} : (Rows){b, 1, ldb};
  long n_parts = (k + DEPTH - 1) / DEPTH, part = round_up((k + n_parts - 1) / n_parts, ALONG);
  for (long column = 0; column < n; column += MOST_COLUMNS)
    for (long start = 0; start < k; start += part) {
      long width = least(n - column, MOST_COLUMNS), depth = least(k - start, part);
      long padded = round_up(depth, GROUP);
      pack(of_b, WIDTH, rows_from(all_b, column, start), width, depth);
      for (long row = 0; row < m; row += MOST_ROWS) {
        Rows x = rows_from(all_a, row, start);
        long height = least(m - row, MOST_ROWS);
        long n_in_place = x.k == 1 && GROUP == 1 ? height / HEIGHT * HEIGHT : 0;
        pack(of_a, HEIGHT, rows_from(x, n_in_place, 0), height - n_in_place, depth);
        for (long j = 0; j < width; j += WIDTH)
          for (long i = 0; i < height; i += HEIGHT) {
            Rows packed = {of_a + (i - n_in_place) * padded, GROUP, HEIGHT};
            Rows rows = i < n_in_place ? rows_from(x, i, 0) : packed;
            tile(c + (row + i) * ldc + column + j, ldc, rows, of_b + j * padded, padded, !start,
                 height - i, width - j);
          }
      }
    }
}
