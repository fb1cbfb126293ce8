// cblas_sgemm as kernels call it, row by row: c (m, n) = a (m, k) b, where b is (k, n) or, with
// `flag_b` 112, an (n, k) transposed. Included after gemv.c, for its vectors. Knows no threads.
#if __AVX2__ || __ARM_NEON
enum { N_VECTORS = 2 };
#else
enum { N_VECTORS = 1 };
#endif
enum { HEIGHT = 4, WIDTH = N_VECTORS * LANES, DEPTH = 256 };

// `height` rows of c, WIDTH wide, from `depth` rows of a panel of b.
INLINE void tile(float *c, long ldc, float *a, long lda, float *panel, int depth, int width,
                 int height, int is_first) {
  floats sums[HEIGHT][N_VECTORS] = {};
  for (int l = 0; l < depth; l++)
    for (int i = 0; i < height; i++)
      for (int j = 0; j < N_VECTORS; j++)
        sums[i][j] += a[i * lda + l] * *(floats *)(panel + l * WIDTH + j * LANES);
  for (int i = 0; i < height; i++)
    for (int j = 0; j < width; j++) {
      float sum = sums[i][j / LANES][j % LANES];
      c[i * ldc + j] = is_first ? sum : c[i * ldc + j] + sum;
    }
}

static void sgemm(int order, int flag_a, int flag_b, BLAS_INTEGER m, BLAS_INTEGER n,
                  BLAS_INTEGER k, float alpha, float *a, BLAS_INTEGER lda, float *b,
                  BLAS_INTEGER ldb, float beta, float *c, BLAS_INTEGER ldc) {
  __attribute__((aligned(64))) float panel[DEPTH * WIDTH];
  long row_stride = flag_b == 112 ? 1 : ldb, column_stride = flag_b == 112 ? ldb : 1;
  for (long column = 0; column < n; column += WIDTH)
    for (long start = 0; start < k; start += DEPTH) {
      int width = n - column < WIDTH ? n - column : WIDTH;
      int depth = k - start < DEPTH ? k - start : DEPTH;
      for (int l = 0; l < depth; l++)
        for (int j = 0; j < WIDTH; j++)
          panel[l * WIDTH + j] =
              j < width ? b[(start + l) * row_stride + (column + j) * column_stride] : 0;
      float *c_at = c + column, *a_at = a + start;
      long n_rows = m;
      for (; n_rows >= HEIGHT; n_rows -= HEIGHT, a_at += HEIGHT * lda, c_at += HEIGHT * ldc)
        tile(c_at, ldc, a_at, lda, panel, depth, width, HEIGHT, !start);
      for (; n_rows; n_rows--, a_at += lda, c_at += ldc)
        tile(c_at, ldc, a_at, lda, panel, depth, width, 1, !start);
    }
}
