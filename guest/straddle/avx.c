/* straddle, AVX: 32 bytes in one access, none of it known to KVM's emulator. */
#include "straddle.h"

#define AVX(name, instruction)                                                                     \
    static void name(uint8_t *at, uint8_t *out)                                                    \
    {                                                                                              \
        asm volatile("vmovdqu (%1), %%ymm0; vmovdqu 32(%1), %%ymm1; vmovdqu 64(%1), %%ymm2\n"      \
                     instruction "\n"                                                              \
                     "vmovdqu %%ymm0, (%2); vmovdqu %%ymm1, 32(%2); vmovdqu %%ymm2, 64(%2)\n"      \
                     "vzeroupper"                                                                  \
                     :                                                                             \
                     : "D"(at), "r"(pattern), "S"(out)                                             \
                     : "memory");                                                                  \
    }

AVX(load, "vmovdqu (%%rdi), %%ymm0")
AVX(store, "vmovdqu %%ymm0, (%%rdi)")
AVX(load16, "vmovups (%%rdi), %%xmm0")
AVX(store16, "vmovups %%xmm0, (%%rdi)")
AVX(load_aligned, "vmovaps (%%rdi), %%ymm0")
AVX(store_aligned, "vmovaps %%ymm0, (%%rdi)")
AVX(operand, "vxorps (%%rdi), %%ymm1, %%ymm2")
AVX(operand16, "vpaddd (%%rdi), %%xmm1, %%xmm2")
AVX(broadcast, "vbroadcastss (%%rdi), %%ymm0")
AVX(insert, "vinsertf128 $1, (%%rdi), %%ymm0, %%ymm1")
AVX(extract, "vextractf128 $1, %%ymm0, (%%rdi)")

static const struct check checks[] = {
    {"vmovdqu load of 32 bytes", load, -16, EACH},
    {"vmovdqu load of 32 bytes", load, -5, EACH},
    {"vmovdqu load of 32 bytes", load, -31, EACH},
    {"vmovdqu store of 32 bytes", store, -16, EACH},
    {"vmovdqu store of 32 bytes", store, -1, NONE},
    {"vmovdqu store of 32 bytes", store, -27, NONE},
    {"vmovdqu store of 32 bytes", store, 0, NONE},
    {"vmovups load of 16 bytes", load16, -7, EACH},
    {"vmovups store of 16 bytes", store16, -7, EACH},
    {"vmovaps load", load_aligned, -32, NONE},
    {"vmovaps store", store_aligned, -32, NONE},
    {"vmovaps store", store_aligned, 0, NONE},
    {"vxorps from memory", operand, -16, EACH},
    {"vpaddd from memory", operand16, -9, EACH},
    {"vbroadcastss from memory", broadcast, -2, EACH},
    {"vinsertf128 from memory", insert, -8, EACH},
    {"vextractf128 to memory", extract, -8, EACH},
};

void check_avx(void)
{
    if ((kvmmm_boot->cpu_features & KVMMM_CPU_AVX) == 0) {
        kprintf("straddle: no AVX on this CPU\n");
        return;
    }
    run_checks(checks, COUNT(checks));
}
