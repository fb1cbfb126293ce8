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
    byte lowest = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    byte highest = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (i == n) return 0;
    if (text[i] < lowest || text[i] > highest) return -i;
    *code_point = *code_point << 6 | (text[i] & 0x3F);
  }
  return length;
}

static const unsigned *numbers(long long place) { return (const unsigned *)(model + place); }

// The UTF-8 of a token, or a part of a character's; behind all tokens, the special ones' spelling.
Text token(int id) {
  const unsigned *start = numbers(TOKEN_STARTS) + id;
  return (Text){model + TOKEN_BYTES + start[0], start[1] - start[0]};
}

// Whether a text comes before another one (-1), is it (0) or comes after it (1), byte by byte.
static int compared(Text text, Text other) {
  long i = 0;
  while (i < text.n && i < other.n && text.text[i] == other.text[i]) i++;
  if (i < text.n && i < other.n) return text.text[i] < other.text[i] ? -1 : 1;
  return text.n < other.n ? -1 : text.n > other.n;
}

// The id of these bytes, or -1: a search among all tokens in the order of their bytes.
static int find(const byte *bytes, long n) {
  for (int low = 0, high = N_SORTED_TOKENS; low < high;) {
    int middle = (low + high) / 2, id = numbers(SORTED_TOKENS)[middle];
    int order = compared(token(id), (Text){bytes, n});
    if (!order) return id;
    order < 0 ? (low = middle + 1) : (high = middle);
  }
  return -1;
}

enum { OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE, UNSEEN };

static int kind(unsigned code_point) {
  int low = 0, high = N_KINDS;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    numbers(KIND_STARTS)[middle] <= code_point ? (low = middle) : (high = middle);
  }
  return numbers(KINDS)[low];
}

// Whether one sees it, as Python's str.isprintable has it, and not only room for it.
int is_visible(unsigned x) { return kind(x) != SPACE && kind(x) != UNSEEN; }

// The first piece of a word: it ends before and after a separator, and before a vowel that comes
// more than 3 bytes after its start.
static long first_piece(const byte *text, long n) {
  unsigned x;
  for (long at = 0, length;; at += length) {
    if (at == n) return n;
    length = character(text + at, n - at, &x);
    if (kind(x) == SEPARATOR || kind(x) == SPACE) return at ? at : length;
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

enum { NONE = 0x7FFFFFFF };

// Brings into the tree which rank a part of a word would have if it were joined with the next one.
static void rank(const byte *word, long n, const int *lengths, long at, int *tree, long width) {
  long next = at + lengths[at], node = width + at;
  int id = next < n ? find(word + at, lengths[at] + lengths[next]) : -1;
  for (tree[node] = id < 0 ? NONE : (int)numbers(RANKS)[id]; node /= 2;)
    tree[node] = tree[2 * node] < tree[2 * node + 1] ? tree[2 * node] : tree[2 * node + 1];
}

// Joins, of all neighbours in a word, those of the lowest rank, the first ones, again and again.
// `ids` has the length of a part at its first byte and at its last. The ranks are the leaves of a
// tree, in which every other node has the lower one of its two: a word may be a whole paragraph.
static long byte_pairs(const byte *word, long n, int *ids, int *tree) {
  long n_parts = 0, width = 1;
  if ((*ids = find(word, n)) >= 0) return 1;  // no other way to join its parts comes into question
  while (width < n) width *= 2;
  for (long i = 0; i < 2 * width; i++) tree[i] = NONE;
  for (long i = 0; i < n; i++) ids[i] = 1;
  for (long i = 0; i < n; i++) rank(word, n, ids, i, tree, width);
  while (tree[1] != NONE) {
    long node = 1;
    while (node < width) node = 2 * node + (tree[2 * node] > tree[1]);
    long at = node - width, next = at + ids[at], end = next + ids[next];
    ids[next] = 0;  // no part begins here
    rank(word, n, ids, next, tree, width);
    ids[at] = ids[end - 1] = end - at;
    rank(word, n, ids, at, tree, width);
    if (at) rank(word, n, ids, at - ids[at - 1], tree, width);
  }
  for (long at = 0, length; at < n; at += length)
    length = ids[at], ids[n_parts++] = find(word + at, length);
  return n_parts;
}

enum { CHARACTERS, PIECES, BYTE_PAIRS };

// The first character or piece of a text.
static Text first_token(const byte *text, long n) {
  unsigned x;
  return (Text){text, TOKENIZER == CHARACTERS ? character(text, n, &x) : first_piece(text, n)};
}

struct Unknown unknown;

// Counts a token that is unknown, in a table of how often there is each and where it is first;
// keeps the most frequent, of those equally frequent the first by their bytes.
static void count(Text text, Text token, int *table, long width) {
  unsigned slot = 0;
  for (long i = 0; i < token.n; i++) slot = (slot ^ token.text[i]) * 0x01000193;  // FNV-1a
  for (;; slot++) {
    int *entry = table + 2 * (slot & (width - 1));
    if (!entry[0]) entry[1] = token.text - text.text;
    struct Count new = {first_token(text.text + entry[1], text.n - entry[1]), entry[0] + 1}, old;
    if (compared(new.token, token)) continue;
    entry[0]++, token = new.token;
    for (int i = 0; i < N_COUNTS; i++) {
      old = unknown.counts[i];
      if (old.n < new.n || (old.n == new.n && compared(new.token, old.token) < 0))
        unknown.counts[i] = new, new = old;
      if (old.token.text == token.text) break;  // where it was before
    }
    return;
  }
}

// The length of the special token that the text begins with, the longest one, and its id; or 0.
static long first_special(const byte *text, long n, int *id) {
  for (int i = 0; i < n_specials; i++) {
    Text spelling = token(N_TOKENS + i);
    *id = numbers(SPECIALS)[i];
    if (spelling.n <= n && !compared(spelling, (Text){text, spelling.n})) return spelling.n;
  }
  return 0;
}

int n_specials = N_SPECIALS;

// The ids of a text in UTF-8, at most as many as its bytes. Behind as much room for these, `ids`
// has four times as much, for a tree or a table.
long encode(Text text, int *ids) {
  long n_ids = 0, length, width = 1, next = 0;  // the place of the next special token
  int *scratch = ids + text.n, special;
  while (width < text.n) width *= 2;
  for (long i = 0; i < 4 * text.n; i++) scratch[i] = 0;
  unknown = (struct Unknown){};
  for (long at = 0; at < text.n; at += length) {
    const byte *rest = text.text + at;
    if (at >= next)
      for (next = at; next < text.n; next++)
        if ((length = first_special(text.text + next, text.n - next, &special))) break;
    if (at == next) {
      ids[n_ids++] = special;
    } else if (TOKENIZER == BYTE_PAIRS) {
      length = first_word(rest, next - at);
      n_ids += byte_pairs(rest, length, ids + n_ids, scratch);
    } else {
      Text token = first_token(rest, text.n - at);
      int id = find(rest, length = token.n), is_known = id >= 0;
      ids[n_ids++] = is_known ? id : UNKNOWN;
      if (TOKENIZER == CHARACTERS && !is_known && *rest == '\r') continue;  // as if there were none
      for (long i = 0; i < length; i++) {
        unknown.n_characters += (rest[i] & 0xC0) != 0x80;
        unknown.n += !is_known && (rest[i] & 0xC0) != 0x80;
      }
      if (!is_known) count(text, token, scratch, width);
    }
  }
  return n_ids;
}
