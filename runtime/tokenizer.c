// Text to tokens, as tokenizers.py has them: characters, pieces of words, or byte pairs.
#include "runtime.h"

// The length of the first character of a text in UTF-8; 0 if the text ends within it, and minus
// the number of bytes that belong together where there is none.
int character(const byte *text, long n, unsigned *code_point) {
  byte first = text[0];
  *code_point = first;
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  int length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  *code_point &= 0x7F >> length;
  for (int i = 1; i < length; i++) {
    byte lowest = 0x80, highest = 0xBF;
    if (i == 1 && first == 0xE0) lowest = 0xA0;
    if (i == 1 && first == 0xED) highest = 0x9F;
    if (i == 1 && first == 0xF0) lowest = 0x90;
    if (i == 1 && first == 0xF4) highest = 0x8F;
    if (i == n) return 0;
    if (text[i] < lowest || text[i] > highest) return -i;
    *code_point = *code_point << 6 | (text[i] & 0x3F);
  }
  return length;
}

static const unsigned *numbers(long long place) { return (const unsigned *)(model + place); }

// The UTF-8 of a token, or a part of a character's.
const byte *token(int id, long *n) {
  const unsigned *starts = numbers(TOKEN_STARTS);
  *n = starts[id + 1] - starts[id];
  return model + TOKEN_BYTES + starts[id];
}

// Whether a token comes before these bytes (-1), is them (0) or comes after them (1).
static int compared(int id, const byte *bytes, long n) {
  long length, i = 0;
  const byte *other = token(id, &length);
  while (i < n && i < length && bytes[i] == other[i]) i++;
  if (i < n && i < length) return other[i] < bytes[i] ? -1 : 1;
  return length < n ? -1 : length > n;
}

// The id of these bytes, or -1: a search among all tokens in the order of their bytes.
static int find(const byte *bytes, long n) {
  for (int low = 0, high = N_SORTED_TOKENS; low < high;) {
    int middle = (low + high) / 2, id = numbers(SORTED_TOKENS)[middle], order = compared(id, bytes, n);
    if (!order) return id;
    order < 0 ? (low = middle + 1) : (high = middle);
  }
  return -1;
}

enum { OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE };

static int kind(unsigned code_point) {
  int low = 0, high = N_KINDS;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    numbers(KIND_STARTS)[middle] <= code_point ? (low = middle) : (high = middle);
  }
  return numbers(KINDS)[low];
}

// The first piece of a word: it ends before and after a separator, and before a vowel that comes
// more than 3 bytes after its start.
static long first_piece(const byte *text, long n) {
  unsigned x;
  for (long at = 0, length;; at += length) {
    if (at == n) return n;
    length = character(text + at, n - at, &x);
    if (kind(x) == SEPARATOR) return at ? at : length;
    if (kind(x) == VOWEL && at > 3) return at;
  }
}

// How many bytes the text begins with characters of a kind.
static long while_of(int wanted, const byte *text, long n) {
  unsigned x;
  for (long at = 0, length;; at += length) {
    if (at == n) return n;
    length = character(text + at, n - at, &x);
    if (kind(x) != wanted) return at;
  }
}

// GPT-2's first contraction, word, number, run of other characters, or of white space.
static long first_word(const byte *text, long n) {
  static const char *const endings[] = {"'s", "'t", "'d", "'m", "'ll", "'ve", "'re"};
  for (int i = 0; i < 7; i++) {
    long length = 0;
    while (endings[i][length] && length < n && text[length] == endings[i][length]) length++;
    if (!endings[i][length]) return length;
  }
  long space = text[0] == ' ', length;
  if ((length = while_of(LETTER, text + space, n - space))) return space + length;
  if ((length = while_of(NUMBER, text + space, n - space))) return space + length;
  if ((length = while_of(OTHER, text + space, n - space))) return space + length;
  length = while_of(SPACE, text, n);
  if (length == n) return n;
  long last = length - 1;  // the last space belongs to what follows, unless it is the only one
  while ((text[last] & 0xC0) == 0x80) last--;
  return last ? last : length;
}

static int rank(const byte *bytes, long n) {
  int id = find(bytes, n);
  return id < 0 ? -1 : (int)numbers(RANKS)[id];
}

// Joins, of all neighbours in a word, those of the lowest rank, again and again. `starts` are the
// parts' places in the word, `ranks` those that they would have if joined with the next.
static long byte_pairs(const byte *word, long n, int *starts, int *ranks) {
  long n_parts = n;
  for (long i = 0; i < n; i++) starts[i] = i;
  if (find(word, n) >= 0) n_parts = 1;  // no other way to join its parts comes into question
  for (long i = 0; i + 1 < n_parts; i++) ranks[i] = rank(word + i, 2);
  for (;;) {
    long best = -1;
    for (long i = 0; i + 1 < n_parts; i++)
      if (ranks[i] >= 0 && (best < 0 || ranks[i] < ranks[best])) best = i;
    if (best < 0) break;
    n_parts--;
    for (long i = best + 1; i < n_parts; i++) starts[i] = starts[i + 1], ranks[i] = ranks[i + 1];
    for (long i = best ? best - 1 : 0; i <= best && i + 1 < n_parts; i++) {
      long end = i + 2 < n_parts ? starts[i + 2] : n;
      ranks[i] = rank(word + starts[i], end - starts[i]);
    }
  }
  for (long i = 0; i < n_parts; i++)
    starts[i] = find(word + starts[i], (i + 1 < n_parts ? starts[i + 1] : n) - starts[i]);
  return n_parts;
}

enum { CHARACTERS, PIECES, BYTE_PAIRS };

// The ids of a text in UTF-8, at most as many as its bytes; `scratch` is as long as these.
long encode(const byte *text, long n, int *ids, int *scratch) {
  long n_ids = 0, length;
  unsigned x;
  for (long at = 0; at < n; at += length) {
    const byte *rest = text + at;
    if (TOKENIZER == BYTE_PAIRS) {
      length = first_word(rest, n - at);
      n_ids += byte_pairs(rest, length, ids + n_ids, scratch);
    } else {
      length = TOKENIZER == CHARACTERS ? character(rest, n - at, &x) : first_piece(rest, n - at);
      int id = find(rest, length);
      ids[n_ids++] = id < 0 ? UNKNOWN : id;
    }
  }
  return n_ids;
}
