// What is the same for all instruction sets.

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether the processor has AMX for bf16 and for bytes, and the system lets this process use it: it
// has to be asked, since the tiles are 8 KiB more to be kept of each thread.
static bool may_use_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & (BF16 | TILE | INT8)) != (BF16 | TILE | INT8)) return false;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#else
static bool may_use_tiles() { return false; }
#endif

// The best set that was compiled and that this processor has: the suffix of its functions; empty if
// there is none.
extern "C" const char* instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return may_use_tiles() ? "amx" : "avx512_bf16";
    if (wide) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
    return "";
#else
    return "generic";
#endif
}
