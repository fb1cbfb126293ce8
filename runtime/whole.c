// Finds the model at the end of a program's file, before all else, and refuses a file that is not
// whole, by the checksum that `seal` in build.py has written. Knows nothing of the model.
#include <stdint.h>

#include "runtime.h"

const byte *model;

#if __linux__
// In a truncated file other code and data may be missing. So the program starts here, without the C
// library, and program.ld puts the code and constants of whole.c first.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define fail(status, reason)                                                            \
  system_call(SYS_write, 2, (long)"error: " reason "\n", sizeof "error: " reason, 0, 0), \
      system_call(SYS_exit_group, status, 0, 0, 0, 0)

#if __x86_64__
__attribute__((naked)) void start(void) { __asm__("call find_model\njmp _start"); }

static long system_call(long number, long a, long b, long c, long d, long e) {
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
  __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return number;
}
#else
__attribute__((naked)) void start(void) { __asm__("bl find_model\nb _start"); }

static long system_call(long number, long a, long b, long c, long d, long e) {
  register long x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = 0;
  register long x8 __asm__("x8") = number;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5), "r"(x8)
                   : "memory");
  return x0;
}
#endif

static const byte *map_file(long long *size) {
  long file = system_call(SYS_openat, AT_FDCWD, (long)"/proc/self/exe", O_RDONLY, 0, 0);
  *size = system_call(SYS_lseek, file, 0, SEEK_END, 0, 0);
  long mapped = system_call(SYS_mmap, 0, *size, PROT_READ, MAP_PRIVATE, file);
  return mapped < 0 ? NULL : (const byte *)mapped;
}
#elif _WIN32
#include <windows.h>

static const byte *map_file(long long *size) {
  static wchar_t path[32768];
  GetModuleFileNameW(NULL, path, 32768);
  HANDLE file = CreateFileW(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
  LARGE_INTEGER length;
  if (file == INVALID_HANDLE_VALUE || !GetFileSizeEx(file, &length)) return NULL;
  *size = length.QuadPart;
  HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
  return mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0) : NULL;
}
#else
extern const byte linked[MODEL_BYTES + 24];

static const byte *map_file(long long *size) { return *size = sizeof linked, linked; }
#endif

#if !__linux__
__attribute__((constructor))
#endif
void find_model(void) {
  long long size;
  const byte *file = map_file(&size);
  if (!file) fail(1, "this program can't read its own file");
  const uint64_t *words = (const uint64_t *)file, mark = 0x796e69742d747067;  // "gpt-tiny"
  uint64_t sum = 0, n = size / 8;
  int is_sealed = size % 8 == 0 && n > 3 && words[n - 2] == mark;
  for (uint64_t i = 0; is_sealed && i < n - 1; i++) sum += words[i] * (2 * i + 1);
  if (!is_sealed || sum != words[n - 1]) fail(1, "this program is truncated or altered");
  model = file + words[n - 3];
}
