// Continues a text: the window of tokens that the model sees, as in inference/generator.py, and the
// text of the new tokens, as in stream.py. Knows no command line, no page and no system.
#include "runtime.h"

int has_ended, is_finite;

static int window[CONTEXT_LENGTH + 1], n_window, n_cached;
static byte undecoded[LONGEST_TOKEN + 3], text[MAX_STOP + 3 * sizeof undecoded];
static long n_undecoded, n_text, n_certain;
static Text stop;

// An empty prompt is the token END. `ids` has room for one id, and five for each byte.
void set_prompt(Text prompt, Text stop_text, int *ids) {
  long n = encode(prompt, ids);
  if (!n) ids[n++] = END;
  n_window = n < CONTEXT_LENGTH ? n : CONTEXT_LENGTH;
  for (int i = 0; i < n_window; i++) window[i] = ids[n - n_window + i];
  n_cached = n_undecoded = n_text = n_certain = has_ended = 0;
  is_finite = 1;
  stop = stop_text;
}

// Runs the model on the n tokens before `end`; leaves the logits after the token with index `last`.
static void read_tokens(int n, int end, int last) {
  int *ids = (int *)(memory + (n == 1 ? ID : IDS));
  for (int i = 0; i < n; i++) ids[i] = i <= last ? window[end - n + i] : 0;
  Step step = {.n = n, .end = end, .last = last};
  run_step(&step);
}

// Brings the caches up to the window's end; returns the logits after it.
static const float *read_window(void) {
  if (n_window - n_cached == 1) read_tokens(1, n_window, 0), n_cached++;
  for (; n_cached < n_window; n_cached += N_PREFILL) {
    int start = n_cached < CONTEXT_LENGTH - N_PREFILL ? n_cached : CONTEXT_LENGTH - N_PREFILL;
    int n = n_window - start < N_PREFILL ? n_window - start : N_PREFILL;
    read_tokens(N_PREFILL, start + N_PREFILL, n - 1);
  }
  n_cached = n_window;
  return (const float *)(memory + LOGITS);
}

// Adds a token; returns the text that is certain then: whole characters, and no part of `stop`.
static Text add(Text token, int is_last) {
  for (long i = n_certain; i < n_text; i++) text[i - n_certain] = text[i];
  n_text -= n_certain;
  for (long i = 0; i < token.n; i++) undecoded[n_undecoded++] = token.bytes[i];
  long start = 0, end = 0;
  for (int length; start < n_undecoded; start += length) {
    unsigned code_point;
    length = character(undecoded + start, n_undecoded - start, &code_point);
    if (!length && !is_last) break;
    for (int i = 0; i < length; i++) text[n_text++] = undecoded[start + i];
    for (int i = 0; i < 3 && length <= 0; i++) text[n_text++] = "\xEF\xBF\xBD"[i];
    if (length <= 0) length = length ? -length : n_undecoded - start;
  }
  for (long i = start; i < n_undecoded; i++) undecoded[i - start] = undecoded[i];
  n_undecoded -= start;

  for (; stop.n && end < n_text; end++) {
    long n = n_text - end < stop.n ? n_text - end : stop.n;
    if (compare((Text){text + end, n}, (Text){stop.bytes, n})) continue;
    if (n == stop.n) has_ended = 1;
    if (n == stop.n || !is_last) break;
  }
  n_certain = stop.n ? end : n_text;
  return (Text){text, n_certain};
}

Text last_text(void) { return has_ended ? (Text){} : add((Text){}, 1); }

// Draws a token; returns the text that is certain then.
Text next_text(int stride, const Sampling *sampling) {
  if (n_window > CONTEXT_LENGTH) {
    for (int i = stride; i < n_window; i++) window[i - stride] = window[i];
    n_window -= stride;
    n_cached = 0;
  }
  const float *logits = read_window();
  for (int i = 0; i < VOCAB_SIZE; i++) is_finite &= logits[i] - logits[i] == 0;
  int id = is_finite ? sample(logits, sampling) : 0;
  if (!is_finite || IS_END(id)) {
    Text last = last_text();
    has_ended = 1;
    return last;
  }
  return add(token(window[n_window++] = id), 0);
}
