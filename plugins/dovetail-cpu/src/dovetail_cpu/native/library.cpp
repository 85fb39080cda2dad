// What is the same for all instruction sets.

// The best set that was compiled and that this processor has: the suffix of its functions; empty if
// there is none.
extern "C" const char* instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return "avx512_bf16";
    if (wide) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
    return "";
#else
    return "generic";
#endif
}
