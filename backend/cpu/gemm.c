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
// A vector is not to be halved, as clang does of its own accord for Intel's processors.
#define INLINE static inline __attribute__((always_inline, min_vector_width(512)))

// An instruction adds to a vector of sums, of ROWS rows of a by COLUMNS columns of b, the products
// of a GROUP of numbers of each. A tile, HEIGHT by WIDTH, has as many sums as there are registers.
#if TILES && (__AMX_BF16__ || EMULATED)  // AMX's registers, where the system lets us use them
enum { GROUP = 2, ROWS = 1, COLUMNS = 16, HEIGHT = 32, WIDTH = 32 };
#elif BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
enum { GROUP = 4, ROWS = 2, COLUMNS = 2, HEIGHT = 8, WIDTH = 12 };
// With AMX go vectors that are slower than for float32: a Sapphire Rapids takes twice as long.
#elif BFLOAT16 && !TILES && (__AVX512BF16__ && !__AMX_BF16__ || EMULATED)  // for tests
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
// An instruction takes a UNIT of numbers along k, and ALONG are packed at once.
#if TILES
enum { DEPTH = 512, MOST_ROWS = 128, MOST_COLUMNS = 768, UNIT = 32, ALONG = 32, IS_TILED = 1 };
#else
enum { DEPTH = 384, MOST_ROWS = 96, MOST_COLUMNS = 384 / WIDTH * WIDTH, IS_TILED = 0 };
enum { UNIT = GROUP, ALONG = 8 * GROUP };
#endif

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

#if TILES
// A register has 16 rows of 64 bytes: 16 sums of c, 32 numbers of a, pairs of 16 columns of b.
#if EMULATED
#define REGISTERS words registers[8][16];
#define ZERO(to) load(registers[to], (char[64]){}, 0)
#define LOAD(to, x, step) load(registers[to], (char *)(x), (step) * sizeof *(x))
#define LOAD_ONCE LOAD
#define STORE(from, x, step) store(registers[from], (char *)(x), (step) * sizeof *(x))
#define MULTIPLY(c, a, b) multiply(registers[c], registers[a], registers[b])
INLINE void load(words *to, char *x, long step) {
  for (int i = 0; i < 16; i++) to[i] = *(words *)(x + i * step);
}
INLINE void store(words *from, char *x, long step) {
  for (int i = 0; i < 16; i++) *(words *)(x + i * step) = from[i];
}
INLINE void multiply(words *c, words *a, words *b) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) c[i] = (words)add_products((floats)c[i], (words)a[i][k], b[k]);
}
INLINE void configure(void) {}
INLINE void release(void) {}
#else
#define REGISTERS
#define ZERO __builtin_ia32_tilezero
#define LOAD(to, x, step) __builtin_ia32_tileloadd64(to, x, (step) * sizeof *(x))
#define LOAD_ONCE(to, x, step) __builtin_ia32_tileloaddt164(to, x, (step) * sizeof *(x))
#define STORE(from, x, step) __builtin_ia32_tilestored64(from, x, (step) * sizeof *(x))
#define MULTIPLY __builtin_ia32_tdpbf16ps
INLINE void configure(void) {
  struct {
    unsigned char palette, zeros[15];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } registers = {1};
  for (int i = 0; i < 8; i++) registers.row_bytes[i] = 64, registers.rows[i] = 16;
  __builtin_ia32_tile_loadconfig(&registers);
}
// While registers are in use the system keeps them whenever it switches threads.
INLINE void release(void) { __builtin_ia32_tilerelease(); }
#endif

// A tile of c, as a whole, from rows of a in place or packed, and packed columns of b.
INLINE void whole_tile(float *c, long ldc, Rows a, number *b, long depth, int is_first) {
  REGISTERS
  float *below = c + 16 * ldc;
  if (is_first)
    ZERO(0), ZERO(1), ZERO(2), ZERO(3);
  else
    LOAD(0, c, ldc), LOAD(1, c + 16, ldc), LOAD(2, below, ldc), LOAD(3, below + 16, ldc);
  for (long k = 0; k < depth; k += UNIT, b += UNIT * WIDTH) {
    LOAD_ONCE(4, at(a, 0, k), a.row), LOAD_ONCE(5, at(a, 16, k), a.row);  // the cache keeps b
    LOAD(6, b, GROUP * WIDTH), LOAD(7, b + GROUP * 16, GROUP * WIDTH);
    MULTIPLY(0, 4, 6), MULTIPLY(1, 4, 7), MULTIPLY(2, 5, 6), MULTIPLY(3, 5, 7);
  }
  STORE(0, c, ldc), STORE(1, c + 16, ldc), STORE(2, below, ldc), STORE(3, below + 16, ldc);
}
#else
INLINE void configure(void) {}
INLINE void release(void) {}

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
#endif

// A tile of c, of which there may be fewer rows or columns.
INLINE void tile(float *c, long ldc, Rows a, number *b, long depth, int is_first,
                 long height, long width) {
  float sums[HEIGHT * WIDTH];
  int is_whole = height >= HEIGHT && width >= WIDTH;
  float *to = is_whole ? c : sums;
  long step = is_whole ? ldc : WIDTH;
  int is_set = is_first || !is_whole;
  if (IS_TILED || a.k == 1)
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

#if TILES
#define FOUR(f, i, n) f(i, n), f(i + 1, n), f(i + 2, n), f(i + 3, n)
#define SIXTEEN(f, n) FOUR(f, 0, n), FOUR(f, 4, n), FOUR(f, 8, n), FOUR(f, 12, n)
#define IN_TURN(i, n) i, n + i

// Swaps, of each square of 2 n by 2 n words, the quarters beside the diagonal.
#define UPPER(i, n) ((i) & n ? 16 + (i) - n : (i))
#define LOWER(i, n) ((i) & n ? 16 + (i) : (i) + n)
#define SWAP_QUARTERS(x, n)                                                        \
  _Pragma("unroll") for (int i = 0; i < 16; i++) if (!(i & n)) {                   \
    words upper = __builtin_shufflevector(x[i], x[i + n], SIXTEEN(UPPER, n));      \
    x[i + n] = __builtin_shufflevector(x[i], x[i + n], SIXTEEN(LOWER, n));         \
    x[i] = upper;                                                                  \
  }

// Packs what a register takes of 16 rows: 32 numbers of each of a's rows; or a pair of each of b's
// columns, which 15 pairs further along k follow. `step` is from one row of it to the next.
INLINE void pack_register(number *out, long step, int is_a, Rows x, long n, long depth) {
  number edge[16 * UNIT];
  if (n < 16 || depth < UNIT) {
    Rows whole = x.k == 1 ? (Rows){edge, UNIT, 1} : (Rows){edge, 1, 16};
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < UNIT; k++)
        *at(whole, i, k) = i < n && k < depth ? *at(x, i, k) : 0;
    x = whole;
  }
  words rows[16];
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (x.k == 1)
      rows[i] = *(words *)at(x, i, 0);
    else {
      typedef VECTOR(number, 16) numbers;
      numbers *first = (numbers *)at(x, 0, 2 * i), *second = (numbers *)at(x, 0, 2 * i + 1);
      rows[i] = (words)__builtin_shufflevector(*first, *second, SIXTEEN(IN_TURN, 16));
    }
  if (is_a != (x.k == 1)) {
    SWAP_QUARTERS(rows, 8)
    SWAP_QUARTERS(rows, 4)
    SWAP_QUARTERS(rows, 2)
    SWAP_QUARTERS(rows, 1)
  }
#pragma unroll
  for (int i = 0; i < 16; i++) *(words *)(out + i * step) = rows[i];
}

INLINE void pack_block(number *out, int width, int is_a, long padded, Rows x, long n, long depth) {
  for (long i = 0; i < width; i += 16)
    pack_register(out + i * (is_a ? padded : GROUP), is_a ? padded : GROUP * width, is_a,
                  rows_from(x, i, 0), n - i, depth);
}
#else
// Packs ALONG numbers of `width` rows to a panel: for each group along k, the groups of all rows.
// x has n more rows, and `depth` more numbers of each; zeros fill the rest.
INLINE void pack_block(number *restrict out, int width, int is_a, long padded, Rows x, long n,
                       long depth) {
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
#endif

// Packs n rows in panels of `width`, in the order of memory. Of a, AMX takes them row after row.
INLINE void pack(number *out, int width, int is_a, Rows x, long n, long depth) {
  long padded = round_up(depth, UNIT);
#define BLOCK(i, k)                                                                        \
  pack_block(out + i * padded + (IS_TILED && is_a ? k : k * width), width, is_a, padded,   \
             rows_from(x, i, k), n - i, depth - k)
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
  configure();
  long n_parts = (k + DEPTH - 1) / DEPTH, part = round_up((k + n_parts - 1) / n_parts, ALONG);
  for (long column = 0; column < n; column += MOST_COLUMNS)
    for (long start = 0; start < k; start += part) {
      long width = least(n - column, MOST_COLUMNS), depth = least(k - start, part);
      long padded = round_up(depth, UNIT);
      pack(of_b, WIDTH, 0, rows_from(all_b, column, start), width, depth);
      for (long row = 0; row < m; row += MOST_ROWS) {
        Rows x = rows_from(all_a, row, start);
        long height = least(m - row, MOST_ROWS);
        int is_in_place = x.k == 1 && (GROUP == 1 || IS_TILED) && depth == padded;
        long n_in_place = is_in_place ? height / HEIGHT * HEIGHT : 0;
        pack(of_a, HEIGHT, 1, rows_from(x, n_in_place, 0), height - n_in_place, depth);
        for (long j = 0; j < width; j += WIDTH)
          for (long i = 0; i < height; i += HEIGHT) {
            number *panel = of_a + (i - n_in_place) * padded;
            Rows packed = IS_TILED ? (Rows){panel, padded, 1} : (Rows){panel, GROUP, HEIGHT};
            Rows rows = i < n_in_place ? rows_from(x, i, 0) : packed;
            tile(c + (row + i) * ldc + column + j, ldc, rows, of_b + j * padded, padded, !start,
                 height - i, width - j);
          }
      }
    }
  release();
}
