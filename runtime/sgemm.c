// BLAS's product of matrices as the kernels call it: c (m, n) = a (m, k) b, all row by row, where b
// is (k, n) or, if `flag_b` says 112, (n, k) transposed. It follows gemv.c, whose vectors it uses.
#if __AVX2__ || __ARM_NEON
enum { N_VECTORS = 2 };
#else
enum { N_VECTORS = 1 };
#endif
enum { HEIGHT = 4, WIDTH = N_VECTORS * LANES, DEPTH = 256 };

// `height` rows of c, WIDTH wide, from `depth` rows of a panel of b.
INLINE void tile(float *c, long c_step, float *a, long a_step, float *panel, int depth, int width,
                 int height, int is_first) {
  floats sums[HEIGHT][N_VECTORS] = {};
  for (int l = 0; l < depth; l++)
    for (int i = 0; i < height; i++)
      for (int j = 0; j < N_VECTORS; j++)
        sums[i][j] += a[i * a_step + l] * *(floats *)(panel + l * WIDTH + j * LANES);
  for (int i = 0; i < height; i++)
    for (int j = 0; j < width; j++) {
      float sum = sums[i][j / LANES][j % LANES];
      c[i * c_step + j] = is_first ? sum : c[i * c_step + j] + sum;
    }
}

static void sgemm(int order, int flag_a, int flag_b, BLAS_INTEGER m, BLAS_INTEGER n,
                  BLAS_INTEGER k, float alpha, float *a, BLAS_INTEGER a_step, float *b,
                  BLAS_INTEGER b_step, float beta, float *c, BLAS_INTEGER c_step) {
  __attribute__((aligned(64))) float panel[DEPTH * WIDTH];
  long row_step = flag_b == 112 ? 1 : b_step, column_step = flag_b == 112 ? b_step : 1;
  for (long column = 0; column < n; column += WIDTH)
    for (long start = 0; start < k; start += DEPTH) {
      int width = n - column < WIDTH ? n - column : WIDTH;
      int depth = k - start < DEPTH ? k - start : DEPTH;
      for (int l = 0; l < depth; l++)
        for (int j = 0; j < WIDTH; j++)
          panel[l * WIDTH + j] =
              j < width ? b[(start + l) * row_step + (column + j) * column_step] : 0;
      long row = 0;
      for (; row + HEIGHT <= m; row += HEIGHT)
        tile(c + row * c_step + column, c_step, a + row * a_step + start, a_step, panel, depth,
             width, HEIGHT, !start);
      for (; row < m; row++)
        tile(c + row * c_step + column, c_step, a + row * a_step + start, a_step, panel, depth,
             width, 1, !start);
    }
}
