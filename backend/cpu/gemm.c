// Products of matrices of bfloat16, with sums in float32, on processors with instructions for them.
// An instruction takes groups of numbers that follow each other along k, the axis that is summed: a
// part of a and of b at a time is packed first, group beside group. Read it from the end.

typedef unsigned short bfloat16;  // the upper half of a float32

#if PLAIN  // the definition of sbgemm, which the tests compare with
static float widened(bfloat16 x) {
  union {
    unsigned bits;
    float number;
  } x_32 = {(unsigned)x << 16};
  return x_32.number;
}

ABI void sbgemm(int order, int flag_a, int flag_b, long m, long n, long k, float alpha, bfloat16 *a,
                long lda, bfloat16 *b, long ldb, float beta, float *c, long ldc) {
  for (long i = 0; i < m; i++)
    for (long j = 0; j < n; j++) {
      float sum = 0;
      for (long l = 0; l < k; l++)
        sum += widened(flag_a == 112 ? a[l * lda + i] : a[i * lda + l]) *
               widened(flag_b == 112 ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = sum;
    }
}
#else

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(2), may_alias)) type
#define INLINE static inline __attribute__((always_inline))

// An instruction adds to a vector of sums, of ROWS rows of a by COLUMNS columns of b, the products
// of a GROUP of numbers of each. A tile, HEIGHT by WIDTH, has as many sums as there are registers.
#if __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
enum { GROUP = 4, ROWS = 2, COLUMNS = 2, HEIGHT = 8, WIDTH = 12 };
// With AMX go vectors that are slower than for float32: a Sapphire Rapids takes twice as long.
#elif __AVX512BF16__ && !__AMX_BF16__ || EMULATED  // for tests on other processors
enum { GROUP = 2, ROWS = 1, COLUMNS = 16, HEIGHT = 12, WIDTH = 32 };
#else
#error no fast products of bfloat16
#endif
enum { LANES = ROWS * COLUMNS };
// What is packed at once, on the stack: as a core's second cache holds it, and its first a panel.
enum { DEPTH = 256, MOST_ROWS = 96, MOST_COLUMNS = 256 / WIDTH * WIDTH };
enum { ACROSS = 4, ALONG = 8 };  // a block, which vectors pack: so many rows, and numbers of each

typedef VECTOR(float, LANES) floats;
typedef VECTOR(unsigned, LANES) words;  // of two numbers each
typedef VECTOR(float, COLUMNS) floats_of_row;
typedef VECTOR(bfloat16, ACROSS) numbers_across;
typedef VECTOR(bfloat16, ALONG) numbers_along;
typedef VECTOR(bfloat16, ACROSS *GROUP) groups;
typedef VECTOR(bfloat16, ACROSS *ALONG) block;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

INLINE floats add_products(floats sums, words a, words b) {
#if __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  asm("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sums) : "w"(a), "w"(b));
#elif __AVX512BF16__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#else
  sums += (floats)(a << 16) * (floats)(b << 16);
  sums += (floats)(a & 0xffff0000) * (floats)(b & 0xffff0000);
#endif
  return sums;
}

// A tile of c, as a whole.
INLINE void whole_tile(float *c, long ldc, bfloat16 *a, bfloat16 *b, long depth, int is_first) {
  floats sums[HEIGHT / ROWS][WIDTH / COLUMNS] = {};
  for (long k = 0; k < depth; k += GROUP, a += GROUP * HEIGHT, b += GROUP * WIDTH)
#pragma unroll
    for (int i = 0; i < HEIGHT / ROWS; i++) {
      words row = ROWS == 1 ? (words)((unsigned *)a)[i] : ((words *)a)[i];
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
INLINE void tile(float *c, long ldc, bfloat16 *a, bfloat16 *b, long depth, int is_first,
                 long height, long width) {
  float sums[HEIGHT * WIDTH];
  int is_whole = height >= HEIGHT && width >= WIDTH;
  whole_tile(is_whole ? c : sums, is_whole ? ldc : WIDTH, a, b, depth, is_first || !is_whole);
  if (is_whole) return;
  for (int i = 0; i < least(height, HEIGHT); i++)
    for (int j = 0; j < least(width, WIDTH); j++)
      c[i * ldc + j] = sums[i * WIDTH + j] + (is_first ? 0 : c[i * ldc + j]);
}

// The index in a block as it is read, by that in a packed one: in turn a group of each row.
#define ROW(place) ((place) / GROUP % ACROSS)
#define K(place) ((place) / (ACROSS * GROUP) * GROUP + (place) % GROUP)
#define READ_ALONG(place) (ROW(place) * ALONG + K(place))
#define READ_ACROSS(place) (K(place) * ACROSS + ROW(place))
#define FOUR(f, i) f(i), f(i + 1), f(i + 2), f(i + 3)
#define SIXTEEN(f, i) FOUR(f, i), FOUR(f, i + 4), FOUR(f, i + 8), FOUR(f, i + 12)
#define ALL(f) SIXTEEN(f, 0), SIXTEEN(f, 16)

// Packs a block of a panel, for which x has n more rows, and `depth` more numbers of each.
INLINE void pack_block(bfloat16 *out, int width, bfloat16 *x, long ldx, int is_along, long n,
                       long depth) {
  block read = {};
  if (n < ACROSS || depth < ALONG) {
    for (int i = 0; i < least(n, ACROSS); i++)
      for (int k = 0; k < least(depth, ALONG); k++)
        if (is_along)
          read[i * ALONG + k] = x[i * ldx + k];
        else
          read[k * ACROSS + i] = x[k * ldx + i];
  } else if (is_along)
    for (int i = 0; i < ACROSS; i++) ((numbers_along *)&read)[i] = *(numbers_along *)(x + i * ldx);
  else
    for (int k = 0; k < ALONG; k++)
      ((numbers_across *)&read)[k] = *(numbers_across *)(x + k * ldx);
  read = is_along ? __builtin_shufflevector(read, read, ALL(READ_ALONG))
                  : __builtin_shufflevector(read, read, ALL(READ_ACROSS));
  for (int k = 0; k < ALONG / GROUP; k++)
    *(groups *)(out + k * GROUP * width) = ((groups *)&read)[k];
}

// Packs n rows of a, or columns of b, in panels of `width` of them: for each group along k, the
// group of one row after that of another. x has them along k or across. A last panel ends in zeros.
INLINE void pack(bfloat16 *out, int width, bfloat16 *x, long ldx, int is_along, long n,
                 long depth) {
#define BLOCK(i, k)                                                                            \
  pack_block(out + i / width * width * round_up(depth, ALONG) + k * width + i % width * GROUP, \
             width, x + (is_along ? i * ldx + k : k * ldx + i), ldx, is_along, n - i, depth - k)
  if (is_along)  // in the order of memory
    for (long i = 0; i < round_up(n, width); i += ACROSS)
      for (long k = 0; k < depth; k += ALONG) BLOCK(i, k);
  else
    for (long k = 0; k < depth; k += ALONG)
      for (long i = 0; i < round_up(n, width); i += ACROSS) BLOCK(i, k);
}

// c (m, n) = a (m, k) b (k, n), a and b row by row or, where a flag is 112, column by column: BLAS's
// cblas_sgemm for bfloat16, where order is 101, alpha 1 and beta 0. Threads may call it at once.
ABI void sbgemm(int order, int flag_a, int flag_b, long m, long n, long k, float alpha, bfloat16 *a,
                long lda, bfloat16 *b, long ldb, float beta, float *c, long ldc) {
  __attribute__((aligned(64))) bfloat16 of_a[MOST_ROWS * DEPTH], of_b[MOST_COLUMNS * DEPTH];
  int is_a_along = flag_a != 112, is_b_along = flag_b == 112;
  for (long column = 0; column < n; column += MOST_COLUMNS)
    for (long start = 0; start < k; start += DEPTH) {
      long width = least(n - column, MOST_COLUMNS), depth = least(k - start, DEPTH);
      long padded = round_up(depth, ALONG);
      bfloat16 *x = b + (is_b_along ? column * ldb + start : start * ldb + column);
      pack(of_b, WIDTH, x, ldb, is_b_along, width, depth);
      for (long row = 0; row < m; row += MOST_ROWS) {
        long height = least(m - row, MOST_ROWS);
        x = a + (is_a_along ? row * lda + start : start * lda + row);
        pack(of_a, HEIGHT, x, lda, is_a_along, height, depth);
        for (long j = 0; j < width; j += WIDTH)
          for (long i = 0; i < height; i += HEIGHT)
            tile(c + (row + i) * ldc + column + j, ldc, of_a + i * padded, of_b + j * padded,
                 padded, !start, height - i, width - j);
      }
    }
}
#endif
