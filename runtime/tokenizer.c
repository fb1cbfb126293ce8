// Text to ids and back, as in tokenizers.py: characters, pieces of words, or byte pairs. Knows no
// logits and no window.
#include "runtime.h"

// The number of bytes of a text's first character in UTF-8; 0 if the text ends within it, and minus
// the number of invalid bytes if it is none.
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

static const unsigned *table(long long offset) { return (const unsigned *)(model + offset); }

// The bytes of a token, which may be a part of a character; from N_TOKENS on, a special's spelling.
Text token(int id) {
  const unsigned *start = table(TOKEN_STARTS) + id;
  return (Text){model + TOKEN_BYTES + start[0], start[1] - start[0]};
}

// The order of two texts by their bytes: -1 if `text` is the first, 0 if they are equal, or else 1.
int compare(Text text, Text other) {
  long i = 0;
  while (i < text.n && i < other.n && text.bytes[i] == other.bytes[i]) i++;
  if (i < text.n && i < other.n) return text.bytes[i] < other.bytes[i] ? -1 : 1;
  return text.n < other.n ? -1 : text.n > other.n;
}

// The id of a token, or -1: a binary search.
static int find(const byte *bytes, long n) {
  for (int low = 0, high = N_SORTED_TOKENS; low < high;) {
    int middle = (low + high) / 2, id = table(SORTED_TOKENS)[middle];
    int order = compare(token(id), (Text){bytes, n});
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
    table(KIND_STARTS)[middle] <= code_point ? (low = middle) : (high = middle);
  }
  return table(KINDS)[low];
}

// Printable, as Python's str.isprintable has it, and not white space.
int is_visible(unsigned x) { return kind(x) != SPACE && kind(x) != UNSEEN; }

// The length of the first piece of a word, which ends before and after a separator, and before a
// vowel more than 3 bytes after its start.
static long first_piece(const byte *text, long n) {
  unsigned x;
  for (long at = 0, length;; at += length) {
    if (at == n) return n;
    length = character(text + at, n - at, &x);
    if (kind(x) == SEPARATOR || kind(x) == SPACE) return at ? at : length;
    if (kind(x) == VOWEL && at > 3) return at;
  }
}

// The number of bytes of the characters of one kind that a text begins with.
static long run_length(int wanted, const byte *text, long n) {
  unsigned x;
  for (long at = 0, length;; at += length) {
    if (at == n) return n;
    length = character(text + at, n - at, &x);
    if (kind(x) != wanted) return at;
  }
}

// The length of the first match of GPT-2's pattern: a contraction, a word, a number, a run of other
// characters, or of white space.
static long first_word(const byte *text, long n) {
  static const char *const endings[] = {"'s", "'t", "'d", "'m", "'ll", "'ve", "'re"};
  for (int i = 0; i < 7; i++) {
    long length = 0;
    while (endings[i][length] && length < n && text[length] == endings[i][length]) length++;
    if (!endings[i][length]) return length;
  }
  long space = text[0] == ' ', length;
  if ((length = run_length(LETTER, text + space, n - space))) return space + length;
  if ((length = run_length(NUMBER, text + space, n - space))) return space + length;
  if ((length = run_length(OTHER, text + space, n - space))) return space + length;
  length = run_length(SPACE, text, n);
  if (length == n) return n;
  long last = length - 1;  // the last space belongs to the next word, unless it is the only one
  while ((text[last] & 0xC0) == 0x80) last--;
  return last ? last : length;
}

enum { NONE = 0x7FFFFFFF };

// Updates the tree with the rank of the pair of the part at `start` and the next part.
static void rank(const byte *word, long n, const int *lengths, long start, int *tree, long width) {
  long next = start + lengths[start], node = width + start;
  int id = next < n ? find(word + start, lengths[start] + lengths[next]) : -1;
  for (tree[node] = id < 0 ? NONE : (int)table(RANKS)[id]; node /= 2;)
    tree[node] = tree[2 * node] < tree[2 * node + 1] ? tree[2 * node] : tree[2 * node + 1];
}

// Merges the pair of the lowest rank, of equal ones the first, until no pair is a token. `ids` has
// the length of each part at its first and its last byte, at the end the ids. The ranks are the
// leaves of a tree of minima, for a word may be a whole paragraph.
static long byte_pairs(const byte *word, long n, int *ids, int *tree) {
  long n_parts = 0, width = 1;
  if ((*ids = find(word, n)) >= 0) return 1;  // all merges would end there
  while (width < n) width *= 2;
  for (long i = 0; i < 2 * width; i++) tree[i] = NONE;
  for (long i = 0; i < n; i++) ids[i] = 1;
  for (long i = 0; i < n; i++) rank(word, n, ids, i, tree, width);
  while (tree[1] != NONE) {
    long node = 1;
    while (node < width) node = 2 * node + (tree[2 * node] > tree[1]);
    long start = node - width, next = start + ids[start], end = next + ids[next];
    ids[next] = 0;  // no part begins here
    rank(word, n, ids, next, tree, width);
    ids[start] = ids[end - 1] = end - start;
    rank(word, n, ids, start, tree, width);
    if (start) rank(word, n, ids, start - ids[start - 1], tree, width);
  }
  for (long start = 0, length; start < n; start += length)
    length = ids[start], ids[n_parts++] = find(word + start, length);
  return n_parts;
}

enum { CHARACTERS, PIECES, BYTE_PAIRS };

// The first character or piece of a text.
static Text first_token(const byte *text, long n) {
  unsigned x;
  return (Text){text, TOKENIZER == CHARACTERS ? character(text, n, &x) : first_piece(text, n)};
}

struct Unknown unknown;

// Counts an unknown token in a hash table of counts and offsets, and keeps the most frequent ones,
// of equal counts the first by their bytes.
static void count(Text text, Text token, int *counts, long width) {
  unsigned slot = 0;
  for (long i = 0; i < token.n; i++) slot = (slot ^ token.bytes[i]) * 0x01000193;  // FNV-1a
  for (;; slot++) {
    int *entry = counts + 2 * (slot & (width - 1));
    if (!entry[0]) entry[1] = token.bytes - text.bytes;
    struct Count new = {first_token(text.bytes + entry[1], text.n - entry[1]), entry[0] + 1}, old;
    if (compare(new.token, token)) continue;
    entry[0]++, token = new.token;
    for (int i = 0; i < N_COUNTS; i++) {
      old = unknown.counts[i];
      if (old.n < new.n || (old.n == new.n && compare(new.token, old.token) < 0))
        unknown.counts[i] = new, new = old;
      if (old.token.bytes == token.bytes) break;  // its previous entry
    }
    return;
  }
}

// The length and the id of the longest special token that the text begins with; or 0.
static long first_special(const byte *text, long n, int *id) {
  for (int i = 0; i < n_specials; i++) {
    Text spelling = token(N_TOKENS + i);
    *id = table(SPECIALS)[i];
    if (spelling.n <= n && !compare(spelling, (Text){text, spelling.n})) return spelling.n;
  }
  return 0;
}

int n_specials = N_SPECIALS;

// Writes the ids of a text in UTF-8, at most one a byte; returns their number. `ids` has room for
// five a byte: four are for a tree or a hash table.
long encode(Text text, int *ids) {
  long n_ids = 0, length, width = 1, next = 0;  // the offset of the next special token
  int *scratch = ids + text.n, special;
  while (width < text.n) width *= 2;
  for (long i = 0; i < 4 * text.n; i++) scratch[i] = 0;
  unknown = (struct Unknown){};
  for (long at = 0; at < text.n; at += length) {
    const byte *rest = text.bytes + at;
    if (at >= next)
      for (next = at; next < text.n; next++)
        if ((length = first_special(text.bytes + next, text.n - next, &special))) break;
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
      long n_characters = 0;
      for (long i = 0; i < length; i++) n_characters += (rest[i] & 0xC0) != 0x80;
      unknown.n_characters += n_characters;
      if (!is_known) unknown.n += n_characters, count(text, token, scratch, width);
    }
  }
  return n_ids;
}
