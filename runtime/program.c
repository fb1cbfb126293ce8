// The command line of an exported program, with the flags and errors of run.py. Knows no kernels.
#include <getopt.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime.h"

#if _WIN32
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <shellapi.h>
#endif

static const struct option options[] = {
    {"prompt", 1, 0, 'p'},      {"n-new-tokens", 1, 0, 'n'}, {"stop", 1, 0, 'S'},
    {"interactive", 0, 0, 'i'}, {"seed", 1, 0, 's'},         {"temperature", 1, 0, 't'},
    {"top-k", 1, 0, 'K'},       {"top-p", 1, 0, 'P'},        {"stride", 1, 0, 'r'},
    {"no-special", 0, 0, 'N'},  {"help", 0, 0, 'h'},         {0}};

static const char *name, *prompt = "\n", *stop = "";
static int n_new_tokens = 1000, stride = 1, is_interactive;
static Sampling sampling = {.temperature = 1, .top_p = INFINITY};

static double parse_number(const char *option, int is_count) {
  char *end;
  double number = strtod(optarg, &end);
  int is_number = *optarg && !*end && number >= is_count && number < INFINITY;
  if (!is_number || (is_count && (number > INT32_MAX || number != (int)number)))
    fail(2, "argument --%s: '%s' is not a %snumber of at least %d; see %s --help", option, optarg,
         is_count ? "whole " : "", is_count, name);
  return number;
}

static void check_utf8(const char *what, Text text) {
  unsigned code_point;
  for (long at = 0, length; at < text.n; at += length)
    if ((length = character(text.bytes + at, text.n - at, &code_point)) <= 0)
      fail(1, "%s is not UTF-8: invalid byte 0x%02x at offset %ld; convert it to UTF-8", what,
           text.bytes[at], at);
}

static void parse_options(int argc, char **argv) {
  name = argv[0];
  seed((byte *)"0", 1);
  opterr = 0;
  for (int at = 1, letter, i;
       (letter = getopt_long(argc, argv, "+:p:n:s:ih", options, NULL)) != -1; at = optind) {
    for (i = 0; options[i].val && options[i].val != letter;) i++;
    const char *option = options[i].name;
    if (letter == 'h') exit(printf("usage: %s [OPTION]...\n\n%s", name, HELP) < 0);
    if (letter == 'p') prompt = optarg;
    if (letter == 'n') n_new_tokens = parse_number(option, 1);
    if (letter == 'S') stop = optarg;
    if (letter == 'i') is_interactive = 1;
    if (letter == 'N') n_specials = 0;
    if (letter == 's' && !seed((byte *)optarg, strlen(optarg)))
      fail(2, "argument --seed: '%s' is not a whole number of at least 0", optarg);
    if (letter == 't') sampling.temperature = parse_number(option, 0);
    if (letter == 'K') sampling.top_k = parse_number(option, 1);
    if (letter == 'P') sampling.top_p = parse_number(option, 0);
    if (letter == 'r') stride = parse_number(option, 1);
    if (letter == 'S' && (!*stop || strlen(stop) > MAX_STOP))
      fail(2, "--stop is empty or too long: give 1 to %d bytes", MAX_STOP);
    if (letter == 'S') check_utf8("--stop", (Text){(byte *)stop, strlen(stop)});
    if (letter == ':') fail(2, "argument %s: expected one argument", argv[at]);
    if (letter == '?') fail(2, "unrecognized arguments: %s; see %s --help", argv[at], name);
  }
  if (optind < argc) fail(2, "unrecognized arguments: %s; see %s --help", argv[optind], name);
  if (stride > CONTEXT_LENGTH)
    fail(1, "a stride of %d is beyond the context of %d", stride, CONTEXT_LENGTH);
}

// Standard input up to the end of a line or, with `is_line` 0, of the input, without the line's end
// and a byte order mark; NULL at the end of the input.
static Text read_input(int is_line) {
  static byte *text;
  static long size;
  static int letter, has_begun;
  long n = 0, n_mark = 0;
  for (int previous = letter; (letter = getchar()) != EOF; previous = letter) {
    if (letter == '\n' && previous == '\r') continue;  // Windows' line break
    if (is_line && (letter == '\n' || letter == '\r')) break;
    if (n == size) text = resize(text, size = 2 * n + 1000);
    text[n++] = letter == '\r' ? '\n' : letter;
  }
  if (!has_begun++ && n >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) n_mark = 3;
  n -= n_mark;
  return (Text){letter == EOF && !n ? NULL : n ? text + n_mark : (byte *)"", n};
}

static void print(Text text) {
  fwrite(text.bytes, 1, text.n, stdout);
  if (fflush(stdout)) exit(1);
}

static void warn_of_unknown(void) {
  if (!unknown.n) return;
  double percent = 100.0 * unknown.n / unknown.n_characters;
  fprintf(stderr, percent < 0.05 ? "warning: less than 0.1 %%" : "warning: %.1f %%", percent);
  fputs(" of the prompt is not in the vocabulary:", stderr);
  for (int i = 0; i < N_COUNTS && unknown.counts[i].n; i++) {
    Text token = unknown.counts[i].token;
    unsigned code_point;
    fputc(' ', stderr);
    for (long at = 0, length; at < token.n; at += length) {
      length = character(token.bytes + at, token.n - at, &code_point);
      if (is_visible(code_point)) fwrite(token.bytes + at, 1, length, stderr);
      else fprintf(stderr, "U+%04X", code_point);
    }
  }
  fputc('\n', stderr);
}

static void continue_text(Text prompt) {
  static int *ids;
  if (!prompt.n && END < 0) fail(1, "the prompt is empty: give at least one character");
  check_utf8("the prompt", prompt);
  ids = resize(ids, (5ll * prompt.n + 1) * sizeof(int));
  set_prompt(prompt, (Text){(byte *)stop, strlen(stop)}, ids);
  warn_of_unknown();
  const char *terminal = getenv("TERM"), *no_color = getenv("NO_COLOR");
  int is_plain = (terminal && !strcmp(terminal, "dumb")) || (no_color && *no_color);
  int is_bold = isatty(1) && !is_interactive && !is_plain;
  if (is_bold) fputs("\033[1m", stdout);
  if (!is_interactive) print(prompt);
  if (is_bold) fputs("\033[0m", stdout);
  for (int i = 0; i < n_new_tokens && !has_ended; i++) print(next_text(stride, &sampling));
  print(last_text());
  if (!is_finite) fail(1, "the model's logits are not finite: its weights are far too large");
  print((Text){(byte *)"\n", 1});
}

int main(int argc, char **argv) {
#if _WIN32
  wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &argc);
  for (int i = 0; i < argc; i++) {
    int n = WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, NULL, 0, NULL, NULL);
    argv[i] = resize(NULL, n);
    WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, argv[i], n, NULL, NULL);
  }
  _setmode(0, _O_BINARY);
  _setmode(1, _O_BINARY);
  SetConsoleOutputCP(CP_UTF8);
#endif
  parse_options(argc, argv);
  choose_kernels();
  if (!is_interactive) {
    int is_given = strcmp(prompt, "-");
    continue_text(is_given ? (Text){(byte *)prompt, strlen(prompt)} : read_input(0));
  }
  while (is_interactive) {
    if (isatty(0)) fputs("> ", stderr);
    Text line = read_input(1);
    if (line.n) continue_text(line);
    if (!line.bytes) break;
  }
  return 0;
}
