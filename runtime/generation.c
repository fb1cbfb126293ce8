// Continues a text: the window of tokens that the model sees, and the text of the new ones, as
// inference/generator.py and stream.py have them.
#include "runtime.h"

int has_ended, is_finite;

static int window[CONTEXT_LENGTH + 1], n_window, n_cached;
static byte undecoded[LONGEST_TOKEN + 3], text[LONGEST_STOP + 3 * sizeof undecoded];
static byte shown[sizeof text];
static long n_undecoded, n_text;
static Text stop;

// Of an empty prompt END is the only token; `ids` has room for one, and five for each byte.
void set_prompt(Text prompt, Text stop_text, int *ids) {
  long n = encode(prompt, ids);
  if (!n) ids[n++] = END;
  n_window = n < CONTEXT_LENGTH ? n : CONTEXT_LENGTH;
  for (int i = 0; i < n_window; i++) window[i] = ids[n - n_window + i];
  n_cached = n_undecoded = n_text = has_ended = 0;
  is_finite = 1;
  stop = stop_text;
}

// Runs the model on n tokens to before `end`; leaves the logits after the one with index `last`.
static void decode_tokens(int n, int end, int last) {
  int *ids = (int *)(memory + (n == 1 ? ID : IDS));
  for (int i = 0; i < n; i++) ids[i] = i <= last ? window[end - n + i] : 0;
  Step step = {.n = n, .end = end, .last = last};
  decode(&step);
}

// Brings the cache up to the window's end; the logits after it.
static const float *logits(void) {
  if (n_window - n_cached == 1) decode_tokens(1, n_window, 0), n_cached++;
  for (; n_cached < n_window; n_cached += CHUNK) {
    int first = n_cached < CONTEXT_LENGTH - CHUNK ? n_cached : CONTEXT_LENGTH - CHUNK;
    int left = n_window - first;
    decode_tokens(CHUNK, first + CHUNK, (left < CHUNK ? left : CHUNK) - 1);
  }
  n_cached = n_window;
  return (const float *)(memory + LOGITS);
}

// What is certain of the text with these bytes more: whole characters, and not the stop text.
static Text add_bytes(Text bytes, int is_last) {
  for (long i = 0; i < bytes.n; i++) undecoded[n_undecoded++] = bytes.text[i];
  long at = 0, end = 0, equal = 0;
  for (int length; at < n_undecoded; at += length) {
    unsigned code_point;
    length = character(undecoded + at, n_undecoded - at, &code_point);
    if (!length && !is_last) break;
    for (int i = 0; i < length; i++) text[n_text++] = undecoded[at + i];
    for (int i = 0; i < 3 && length <= 0; i++) text[n_text++] = "\xEF\xBF\xBD"[i];
    if (length <= 0) length = length ? -length : n_undecoded - at;
  }
  for (long i = at; i < n_undecoded; i++) undecoded[i - at] = undecoded[i];
  n_undecoded -= at;

  for (; stop.n && end < n_text; end++) {
    for (equal = 0; end + equal < n_text && equal < stop.n;) {
      if (text[end + equal] != stop.text[equal]) break;
      equal++;
    }
    if (equal == stop.n) has_ended = is_last = 1;
    if (equal == stop.n || (end + equal == n_text && !is_last)) break;
  }
  if (!stop.n) end = n_text;
  for (long i = 0; i < n_text; i++) i < end ? (shown[i] = text[i]) : (text[i - end] = text[i]);
  n_text -= end;
  return (Text){shown, end};
}

Text last_text(void) { return has_ended ? (Text){} : add_bytes((Text){}, 1); }

// The text that is certain after one more token.
Text next_text(int stride, const Sampling *sampling) {
  if (n_window > CONTEXT_LENGTH) {
    for (int i = stride; i < n_window; i++) window[i - stride] = window[i];
    n_window -= stride;
    n_cached = 0;
  }
  const float *scores = logits();
  for (int i = 0; i < VOCAB_SIZE; i++) is_finite &= scores[i] - scores[i] == 0;
  int id = is_finite ? sample(scores, sampling) : 0;
  if (!is_finite || IS_END(id)) {
    Text last = last_text();
    has_ended = 1;
    return last;
  }
  return add_bytes(token(window[n_window++] = id), 0);
}
