// GEMM in float32 or, with BFLOAT16, of bfloat16 operands with sums in float32, built as in BLIS
// (Van Zee and van de Geijn, 2015): blocks of a and b that the caches hold are packed into panels,
// and a micro-kernel keeps a tile of MR by NR sums in registers. Rows of a are read in place where
// they can be. Read this file from the end.

#if BFLOAT16
typedef unsigned short number;  // the upper half of a float32
#define GEMM sbgemm
#else
typedef float number;
#define GEMM sgemm
#endif
#if PLAIN  // the reference of the tests
static float to_float(number x) {
#if BFLOAT16
  union {
    unsigned bits;
    float value;
  } result = {(unsigned)x << 16};
  return result.value;
#else
  return x;
#endif
}

static void plain(int order, int flag_a, int flag_b, long m, long n, long k, float alpha, number *a,
                  long lda, number *b, long ldb, float beta, float *c, long ldc) {
  for (long i = 0; i < m; i++)
    for (long j = 0; j < n; j++) {
      float sum = 0;
      for (long l = 0; l < k; l++)
        sum += to_float(flag_a == 112 ? a[l * lda + i] : a[i * lda + l]) *
               to_float(flag_b == 112 ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = sum;
    }
}
#endif

#define VECTOR(type, n) __attribute__((ext_vector_type(n), aligned(2), may_alias)) type
// min_vector_width: clang prefers vectors of 256 bits on Intel's processors.
#define INLINE static inline __attribute__((always_inline, min_vector_width(512)))

// An instruction multiplies a GROUP of numbers along k and adds to a vector of VECTOR_ROWS by
// VECTOR_COLUMNS sums. A register tile is MR by NR: as many sums as the registers hold.
#if TILES && (__AMX_BF16__ || EMULATED)  // AMX (Sapphire Rapids), where the system allows its use
enum { GROUP = 2, VECTOR_ROWS = 1, VECTOR_COLUMNS = 16, MR = 32, NR = 32 };
#elif BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC  // Graviton 3, Apple M2
enum { GROUP = 4, VECTOR_ROWS = 2, VECTOR_COLUMNS = 2, MR = 8, NR = 12 };
// Zen 4, Cooper Lake. Sapphire Rapids needs twice float32's time for vdpbf16ps. Tests emulate it.
#elif BFLOAT16 && !TILES && (__AVX512BF16__ && !__AMX_BF16__ || EMULATED)
enum { GROUP = 2, VECTOR_ROWS = 1, VECTOR_COLUMNS = 16, MR = 12, NR = 32 };
#elif BFLOAT16
#error no fast products of bfloat16
#elif __AVX512F__
enum { GROUP = 1, VECTOR_ROWS = 1, VECTOR_COLUMNS = 16, MR = 12, NR = 32 };
#elif __AVX2__
enum { GROUP = 1, VECTOR_ROWS = 1, VECTOR_COLUMNS = 8, MR = 6, NR = 16 };
#elif __aarch64__
enum { GROUP = 1, VECTOR_ROWS = 1, VECTOR_COLUMNS = 4, MR = 6, NR = 16 };
#else  // x86-64 without AVX2: Ivy Bridge, Celeron
enum { GROUP = 1, VECTOR_ROWS = 1, VECTOR_COLUMNS = 4, MR = 6, NR = 8 };
#endif
// Blocks of a, MC by KC, and of b, KC by NC, are packed on the stack: a panel of b stays in the
// first-level cache, a in the second. STEP: the micro-kernel's along k; PACK_STEP: that of packing.
#if TILES
enum { KC = 512, MC = 128, NC = 768, STEP = 32, PACK_STEP = 32, IS_TILED = 1 };
#else
enum { KC = 384, MC = 96, NC = 384 / NR * NR, STEP = GROUP, PACK_STEP = 8 * GROUP, IS_TILED = 0 };
#endif

#if BFLOAT16 && __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
typedef unsigned long group;
#else
typedef unsigned group;
#endif
typedef VECTOR(group, 2) two_groups;
typedef VECTOR(group, 8) groups;
typedef VECTOR(float, VECTOR_ROWS *VECTOR_COLUMNS) floats;
typedef VECTOR(unsigned, VECTOR_ROWS *VECTOR_COLUMNS) words;
typedef VECTOR(float, VECTOR_COLUMNS) row_of_floats;

// Rows of a, or columns of b, with the strides from a row to the next and along k.
typedef struct {
  number *start;
  long row_stride, k_stride;
} Rows;

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }
INLINE number *at(Rows x, long row, long k) {
  return x.start + row * x.row_stride + k * x.k_stride;
}
INLINE Rows rows_from(Rows x, long row, long k) {
  return (Rows){at(x, row, k), x.row_stride, x.k_stride};
}

// sums + a b, of GROUP products for each sum.
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
// A tile register has 16 rows of 64 bytes: 16 sums of c, 32 numbers along k of a, or one pair along
// k of each of 16 columns of b.
#if EMULATED
#define REGISTERS words registers[8][16];
#define ZERO(to) load(registers[to], (char[64]){}, 0)
#define LOAD(to, x, stride) load(registers[to], (char *)(x), (stride) * sizeof *(x))
#define LOAD_ONCE LOAD
#define STORE(from, x, stride) store(registers[from], (char *)(x), (stride) * sizeof *(x))
#define MULTIPLY(c, a, b) multiply(registers[c], registers[a], registers[b])
INLINE void load(words *to, char *x, long stride) {
  for (int i = 0; i < 16; i++) to[i] = *(words *)(x + i * stride);
}
INLINE void store(words *from, char *x, long stride) {
  for (int i = 0; i < 16; i++) *(words *)(x + i * stride) = from[i];
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
#define LOAD(to, x, stride) __builtin_ia32_tileloadd64(to, x, (stride) * sizeof *(x))
#define LOAD_ONCE(to, x, stride) __builtin_ia32_tileloaddt164(to, x, (stride) * sizeof *(x))
#define STORE(from, x, stride) __builtin_ia32_tilestored64(from, x, (stride) * sizeof *(x))
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
// Until then the system saves 8 kB of registers at every switch of threads.
INLINE void release(void) { __builtin_ia32_tilerelease(); }
#endif

// Micro-kernel: c (MR, NR) = (+= unless is_first) rows of a times a packed panel of b, over `depth`
// numbers along k. Registers 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b.
INLINE void micro_kernel(float *c, long ldc, Rows a, number *b, long depth, int is_first) {
  REGISTERS
  float *below = c + 16 * ldc;
  if (is_first)
    ZERO(0), ZERO(1), ZERO(2), ZERO(3);
  else
    LOAD(0, c, ldc), LOAD(1, c + 16, ldc), LOAD(2, below, ldc), LOAD(3, below + 16, ldc);
  for (long k = 0; k < depth; k += STEP, b += STEP * NR) {
    LOAD_ONCE(4, at(a, 0, k), a.row_stride);  // streamed: the cache is for b
    LOAD_ONCE(5, at(a, 16, k), a.row_stride);
    LOAD(6, b, GROUP * NR), LOAD(7, b + GROUP * 16, GROUP * NR);
    MULTIPLY(0, 4, 6), MULTIPLY(1, 4, 7), MULTIPLY(2, 5, 6), MULTIPLY(3, 5, 7);
  }
  STORE(0, c, ldc), STORE(1, c + 16, ldc), STORE(2, below, ldc), STORE(3, below + 16, ldc);
}
#else
INLINE void configure(void) {}
INLINE void release(void) {}

// Micro-kernel: c (MR, NR) = (+= unless is_first) rows of a times a packed panel of b, over `depth`
// numbers along k.
INLINE void micro_kernel(float *c, long ldc, Rows a, number *b, long depth, int is_first) {
  floats sums[MR / VECTOR_ROWS][NR / VECTOR_COLUMNS] = {};
#pragma unroll
  for (int i = 0; i < MR; i++) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + NR - 1, 1);
  }
  number *rows[MR / VECTOR_ROWS];
#pragma unroll
  for (int i = 0; i < MR / VECTOR_ROWS; i++) {
    rows[i] = at(a, i * VECTOR_ROWS, 0);
    if (a.k_stride == 1) asm("" : "+r"(rows[i]));  // or clang adds strides up in a chain
  }
#pragma unroll 4
  for (long k = 0; k < depth; k += GROUP, b += GROUP * NR)
#pragma unroll
    for (int i = 0; i < MR / VECTOR_ROWS; i++) {
      number *x = rows[i] + k * a.k_stride;
      words row = VECTOR_ROWS == 1 ? (words)*(unsigned *)x : *(words *)x;
#pragma unroll
      for (int j = 0; j < NR / VECTOR_COLUMNS; j++)
        sums[i][j] = add_products(sums[i][j], row, ((words *)b)[j]);
    }
#pragma unroll
  for (int i = 0; i < MR; i++)
#pragma unroll
    for (int j = 0; j < NR / VECTOR_COLUMNS; j++) {
      row_of_floats sum = ((row_of_floats *)&sums[i / VECTOR_ROWS][j])[i % VECTOR_ROWS];
      row_of_floats *place = (row_of_floats *)(c + i * ldc + j * VECTOR_COLUMNS);
      *place = is_first ? sum : *place + sum;
    }
}
#endif

// Micro-kernel for a tile of height by width at most: at the edge of c it goes through a buffer.
INLINE void update_tile(float *c, long ldc, Rows a, number *b, long depth, int is_first,
                        long height, long width) {
  float buffer[MR * NR];
  int is_whole = height >= MR && width >= NR;
  float *out = is_whole ? c : buffer;
  long stride = is_whole ? ldc : NR;
  int is_set = is_first || !is_whole;
  if (IS_TILED || a.k_stride == 1)  // strides are constants for clang where they can be
    micro_kernel(out, stride, (Rows){a.start, a.row_stride, 1}, b, depth, is_set);
  else
    micro_kernel(out, stride, (Rows){a.start, GROUP, MR}, b, depth, is_set);
  if (is_whole) return;
  for (int i = 0; i < min(height, MR); i++)
    for (int j = 0; j < min(width, NR); j++) {
      float *place = c + i * ldc + j;
      *place = buffer[i * NR + j] + (is_first ? 0 : *place);
    }
}

#if TILES
#define FOUR(f, i, n) f(i, n), f(i + 1, n), f(i + 2, n), f(i + 3, n)
#define SIXTEEN(f, n) FOUR(f, 0, n), FOUR(f, 4, n), FOUR(f, 8, n), FOUR(f, 12, n)
#define INTERLEAVE(i, n) i, n + i

// A step of a transposition: swaps the quarters off the diagonal of each square of 2 n by 2 n.
#define UPPER(i, n) ((i) & n ? 16 + (i) - n : (i))
#define LOWER(i, n) ((i) & n ? 16 + (i) : (i) + n)
#define SWAP_QUARTERS(x, n)                                                        \
  _Pragma("unroll") for (int i = 0; i < 16; i++) if (!(i & n)) {                   \
    words upper = __builtin_shufflevector(x[i], x[i + n], SIXTEEN(UPPER, n));      \
    x[i + n] = __builtin_shufflevector(x[i], x[i + n], SIXTEEN(LOWER, n));         \
    x[i] = upper;                                                                  \
  }

// Packs 16 rows of x, 32 numbers of each, for a tile register of rows `stride` apart: a row by row,
// b transposed, as pairs along k. x has n rows and `depth` numbers from here on; zeros pad them.
INLINE void pack_register(number *out, long stride, int is_a, Rows x, long n, long depth) {
  number edge[16 * STEP];
  if (n < 16 || depth < STEP) {
    Rows padded = x.k_stride == 1 ? (Rows){edge, STEP, 1} : (Rows){edge, 1, 16};
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < STEP; k++)
        *at(padded, i, k) = i < n && k < depth ? *at(x, i, k) : 0;
    x = padded;
  }
  words rows[16];
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (x.k_stride == 1)
      rows[i] = *(words *)at(x, i, 0);
    else {
      typedef VECTOR(number, 16) numbers;
      numbers *first = (numbers *)at(x, 0, 2 * i), *second = (numbers *)at(x, 0, 2 * i + 1);
      rows[i] = (words)__builtin_shufflevector(*first, *second, SIXTEEN(INTERLEAVE, 16));
    }
  if (is_a != (x.k_stride == 1)) {
    SWAP_QUARTERS(rows, 8)
    SWAP_QUARTERS(rows, 4)
    SWAP_QUARTERS(rows, 2)
    SWAP_QUARTERS(rows, 1)
  }
#pragma unroll
  for (int i = 0; i < 16; i++) *(words *)(out + i * stride) = rows[i];
}

INLINE void pack_block(number *out, int width, int is_a, long padded, Rows x, long n, long depth) {
  for (long i = 0; i < width; i += 16)
    pack_register(out + i * (is_a ? padded : GROUP), is_a ? padded : GROUP * width, is_a,
                  rows_from(x, i, 0), n - i, depth);
}
#else
// Packs PACK_STEP numbers of `width` rows as (PACK_STEP / GROUP, width, GROUP). x has n rows and
// `depth` numbers from here on; zeros pad them.
INLINE void pack_block(number *restrict out, int width, int is_a, long padded, Rows x, long n,
                       long depth) {
#define PACKED(row, k) (out + (k) / GROUP * GROUP * width + (row) * GROUP + (k) % GROUP)
  if (n < width || depth < PACK_STEP) {
    for (int k = 0; k < min(round_up(depth, GROUP), PACK_STEP); k++)
      for (int i = 0; i < width; i++) *PACKED(i, k) = i < n && k < depth ? *at(x, i, k) : 0;
  } else if (x.k_stride == 1) {
    for (int i = 0; i < width; i += 2) {
      number *row_1 = at(x, i, 0), *row_2 = at(x, i + 1, 0);
      __builtin_prefetch(row_1 + width * x.row_stride);  // of the next panel
      __builtin_prefetch(row_2 + width * x.row_stride);
      VECTOR(group, 16)
      pairs = __builtin_shufflevector(*(groups *)row_1, *(groups *)row_2, 0, 8, 1, 9, 2, 10, 3, 11,
                                      4, 12, 5, 13, 6, 14, 7, 15);
#pragma unroll
      for (int k = 0; k < 8; k++) *(two_groups *)PACKED(i, k * GROUP) = ((two_groups *)&pairs)[k];
    }
  } else
    for (int k = 0; k < PACK_STEP; k += GROUP) {
      for (int l = k; l < k + GROUP; l++) __builtin_prefetch(at(x, 0, l + PACK_STEP));
      for (int i = 0; i < width; i++)
        for (int l = k; l < k + GROUP; l++) *PACKED(i, l) = x.start[i + l * x.k_stride];
    }
}
#endif

// Packs n rows of x into panels of `width` rows, in the order of memory. AMX takes a's row by row.
INLINE void pack(number *out, int width, int is_a, Rows x, long n, long depth) {
  long padded = round_up(depth, STEP), k_stride = IS_TILED && is_a ? 1 : width;
  if (x.k_stride == 1)
    for (long i = 0; i < n; i += width)
      for (long k = 0; k < depth; k += PACK_STEP)
        pack_block(out + i * padded + k * k_stride, width, is_a, padded, rows_from(x, i, k), n - i,
                   depth - k);
  else
    for (long k = 0; k < depth; k += PACK_STEP)
      for (long i = 0; i < n; i += width)
        pack_block(out + i * padded + k * k_stride, width, is_a, padded, rows_from(x, i, k), n - i,
                   depth - k);
}

// c (m, n) = a (m, k) b (k, n), with the arguments of cblas_sgemm: order is 101 (row-major), alpha
// 1, beta 0; flag_a and flag_b are 111, or 112 for a matrix in column-major order; lda, ldb and ldc
// are the strides of rows, or of columns. Threads may call it at once.
ABI void GEMM(int order, int flag_a, int flag_b, long m, long n, long k, float alpha, number *a,
              long lda, number *b, long ldb, float beta, float *c, long ldc) {
  __attribute__((aligned(64))) number packed_a[MC * KC], packed_b[NC * KC];
  Rows rows_a = flag_a == 112 ? (Rows){a, 1, lda} : (Rows){a, lda, 1};
  Rows columns_b = flag_b == 112 ? (Rows){b, ldb, 1} : (Rows){b, 1, ldb};
  configure();
  long n_blocks = (k + KC - 1) / KC, block = round_up((k + n_blocks - 1) / n_blocks, PACK_STEP);
  for (long column = 0; column < n; column += NC)
    for (long start = 0; start < k; start += block) {
      long width = min(n - column, NC), depth = min(k - start, block);
      long padded = round_up(depth, STEP);
      pack(packed_b, NR, 0, rows_from(columns_b, column, start), width, depth);
      for (long row = 0; row < m; row += MC) {
        Rows x = rows_from(rows_a, row, start);
        long height = min(m - row, MC);
        int is_in_place = x.k_stride == 1 && (GROUP == 1 || IS_TILED) && depth == padded;
        long n_in_place = is_in_place ? height / MR * MR : 0;
        pack(packed_a, MR, 1, rows_from(x, n_in_place, 0), height - n_in_place, depth);
        for (long j = 0; j < width; j += NR)
          for (long i = 0; i < height; i += MR) {
            number *panel = packed_a + (i - n_in_place) * padded;
            Rows packed = IS_TILED ? (Rows){panel, padded, 1} : (Rows){panel, GROUP, MR};
            Rows tile_rows = i < n_in_place ? rows_from(x, i, 0) : packed;
            update_tile(c + (row + i) * ldc + column + j, ldc, tile_rows, packed_b + j * padded,
                        padded, !start, height - i, width - j);
          }
      }
    }
  release();
}
