// Layer norm and its gradients. x, y and their gradients are (n, d); gamma and beta (d). A call
// computes the rows from `first` to before `last`.

// y = (x - mean) / (std + eps_outside) * gamma + beta, with std = sqrt(variance + eps_inside).
// statistics (n, 2): mean and std of each row.
ABI void layer_norm(float *restrict y, float *restrict statistics, float *restrict x,
                    float *restrict gamma, float *restrict beta, int chunk, int first, int last,
                    int d, float eps_inside, float eps_outside) {
  for (long i = first; i < last; i++) {
    float *restrict row = x + i * d, *restrict out = y + i * d, sum = 0, squares = 0;
    for (int j = 0; j < d; j++) sum += row[j];
    float mean = sum / d;
    for (int j = 0; j < d; j++) squares += (row[j] - mean) * (row[j] - mean);
    float std = __builtin_sqrtf(squares / d + eps_inside), inverse = 1 / (std + eps_outside);
    for (int j = 0; j < d; j++) out[j] = (row[j] - mean) * inverse * gamma[j] + beta[j];
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = std;
  }
}

// grad_x from grad_y. partial_sums (chunks, 2, d): the gradients of gamma and beta, summed over the
// rows of each chunk.
ABI void layer_norm_gradients(float *restrict grad_x, float *restrict partial_sums,
                              float *restrict grad_y, float *restrict statistics,
                              float *restrict x, float *restrict gamma, int chunk, int first,
                              int last, int d, float eps_inside, float eps_outside) {
  float *restrict grad_gamma = partial_sums + chunk * 2 * d, *restrict grad_beta = grad_gamma + d;
  for (int j = 0; j < d; j++) grad_gamma[j] = grad_beta[j] = 0;
  for (long i = first; i < last; i++) {
    float *restrict row = x + i * d, *restrict grad = grad_y + i * d;
    float *restrict out = grad_x + i * d;
    float mean = statistics[2 * i], std = statistics[2 * i + 1], inverse = 1 / (std + eps_outside);
    float sum = 0, product = 0;  // of the normalised row's gradient, and of it times the row
    for (int j = 0; j < d; j++) {
      float normalised = (row[j] - mean) * inverse, grad_normalised = grad[j] * gamma[j];
      grad_gamma[j] += grad[j] * normalised;
      grad_beta[j] += grad[j];
      sum += grad_normalised;
      product += grad_normalised * normalised;
    }
    float through_mean = sum / d, through_std = product / d / std;
    for (int j = 0; j < d; j++)
      out[j] = (grad[j] * gamma[j] - through_mean - (row[j] - mean) * through_std) * inverse;
  }
}
