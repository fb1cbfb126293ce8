// Layer norm of rows of d numbers, and its gradients: of the rows from `first` to before `last`.

// y = (x - mean) / (root + eps_outside) * gamma + beta, where root = sqrt(variance + eps_inside).
// `statistics` (n, 2) gets the mean and the root of each row.
ABI void layer_norm(float *restrict y, float *restrict statistics, float *restrict x,
                    float *restrict gamma, float *restrict beta, int chunk, int first, int last,
                    int d, float eps_inside, float eps_outside) {
  for (long i = first; i < last; i++) {
    float *restrict row = x + i * d, *restrict out = y + i * d, sum = 0, squares = 0;
    for (int j = 0; j < d; j++) sum += row[j];
    float mean = sum / d;
    for (int j = 0; j < d; j++) squares += (row[j] - mean) * (row[j] - mean);
    float root = __builtin_sqrtf(squares / d + eps_inside), factor = 1 / (root + eps_outside);
    for (int j = 0; j < d; j++) out[j] = (row[j] - mean) * factor * gamma[j] + beta[j];
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = root;
  }
}

// The gradient of x from that of y. `sums` (chunks, 2, d) gets those of gamma and beta, for each
// chunk of the rows by itself.
ABI void layer_norm_gradients(float *restrict of_x, float *restrict sums, float *restrict of_y,
                              float *restrict statistics, float *restrict x, float *restrict gamma,
                              int chunk, int first, int last, int d, float eps_inside,
                              float eps_outside) {
  float *restrict of_gamma = sums + chunk * 2 * d, *restrict of_beta = of_gamma + d;
  for (int j = 0; j < d; j++) of_gamma[j] = of_beta[j] = 0;
  for (long i = first; i < last; i++) {
    float *restrict row = x + i * d, *restrict of_out = of_y + i * d, *restrict out = of_x + i * d;
    float mean = statistics[2 * i], root = statistics[2 * i + 1], factor = 1 / (root + eps_outside);
    float sum = 0, product = 0;  // of the normalised row's gradient: alone, and times the row
    for (int j = 0; j < d; j++) {
      float normalised = (row[j] - mean) * factor, gradient = of_out[j] * gamma[j];
      of_gamma[j] += of_out[j] * normalised;
      of_beta[j] += of_out[j];
      sum += gradient;
      product += gradient * normalised;
    }
    float share = sum / d, along = product / d / root;
    for (int j = 0; j < d; j++)
      out[j] = (of_out[j] * gamma[j] - share - (row[j] - mean) * along) * factor;
  }
}
