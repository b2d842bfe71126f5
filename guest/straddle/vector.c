/* straddle, SSE, x87 and 16-byte atomics: what KVM's emulator mostly does not know. */
#include "straddle.h"

/* rdi = at, rsi = out; xmm0 to xmm2 start from the pattern, rdx:rax are zero. gcc keeps nothing in
 * vector registers (-mgeneral-regs-only), so they need no clobbers, and may not have any.
 */
#define VECTOR(name, instruction)                                                                  \
    static void name(uint8_t *at, uint8_t *out)                                                    \
    {                                                                                              \
        uint64_t a = 0, b = 0x0123456789abcdef, c = 0xfedcba9876543210, d = 0, flags;              \
        asm volatile("movdqu (%6), %%xmm0; movdqu 16(%6), %%xmm1; movdqu 32(%6), %%xmm2\n"         \
                     "test %%eax, %%eax\n"                                                         \
                     instruction "; pushfq; popq %4\n"                                             \
                     "movdqu %%xmm0, (%%rsi); movdqu %%xmm1, 16(%%rsi); movdqu %%xmm2, 32(%%rsi)"  \
                     : "+a"(a), "+b"(b), "+c"(c), "+d"(d), "=&r"(flags)                            \
                     : "D"(at), "r"(pattern), "S"(out)                                             \
                     : "memory", "cc");                                                            \
        OUT(16) = a;                                                                               \
        OUT(17) = b;                                                                               \
        OUT(18) = c;                                                                               \
        OUT(19) = d;                                                                               \
        OUT(20) = flags & 0x45 & flags_mask; /* ZF PF CF */                                        \
    }

VECTOR(movdqu_load, "movdqu (%%rdi), %%xmm0")
VECTOR(movdqu_store, "movdqu %%xmm0, (%%rdi)")
VECTOR(movups_load, "movups (%%rdi), %%xmm0")
VECTOR(movups_store, "movups %%xmm0, (%%rdi)")
VECTOR(movaps_load, "movaps (%%rdi), %%xmm0")
VECTOR(movaps_store, "movaps %%xmm0, (%%rdi)")
VECTOR(movss_load, "movss (%%rdi), %%xmm0")
VECTOR(movss_store, "movss %%xmm0, (%%rdi)")
VECTOR(movsd_load, "movsd (%%rdi), %%xmm0")
VECTOR(movsd_store, "movsd %%xmm0, (%%rdi)")
VECTOR(movhps_load, "movhps (%%rdi), %%xmm0")
VECTOR(movlps_store, "movlps %%xmm0, (%%rdi)")
VECTOR(movntdq_store, "movntdq %%xmm0, (%%rdi); mfence")
VECTOR(maskmovdqu_store, "maskmovdqu %%xmm1, %%xmm0; mfence")
VECTOR(paddd, "paddd (%%rdi), %%xmm0")
VECTOR(pxor, "pxor (%%rdi), %%xmm0")
VECTOR(pshufd, "pshufd $0x1b, (%%rdi), %%xmm0")
VECTOR(pinsrw, "pinsrw $3, (%%rdi), %%xmm0")
VECTOR(paddq_twice, "paddq (%%rdi), %%xmm0; paddq -16(%%rdi), %%xmm0")
VECTOR(convert, "cvtsi2sdq (%%rdi), %%xmm0")
VECTOR(compare, "ucomisd (%%rdi), %%xmm0")
VECTOR(stmxcsr, "stmxcsr (%%rdi)")
VECTOR(ldmxcsr, "ldmxcsr (%%rdi); pushq $0; stmxcsr (%%rsp); popq %%rax\n"
                "pushq $0x1f80; ldmxcsr (%%rsp); popq %%rdx")
VECTOR(cmpxchg16b, "lock cmpxchg16b (%%rdi)")
VECTOR(fld80, "fninit; fldt (%%rdi); fstpt 64(%%rsi)")
VECTOR(fstp80, "fninit; fldpi; fstpt (%%rdi)")
VECTOR(fld64, "fninit; fldl (%%rdi); fstpl 64(%%rsi)")
VECTOR(fstp64, "fninit; fldpi; fstpl (%%rdi)")
VECTOR(fild64, "fninit; fildll (%%rdi); fstpt 64(%%rsi)")
VECTOR(fistp64, "fninit; fldpi; fistpll (%%rdi)")
VECTOR(fadd32, "fninit; fldpi; fadds (%%rdi); fstpt 64(%%rsi)")
VECTOR(fnstcw, "fninit; fnstcw (%%rdi)")
VECTOR(clflush, "clflush (%%rdi)")
VECTOR(prefetch, "prefetcht0 (%%rdi)")

static const struct check checks[] = {
    {"movdqu load", movdqu_load, -8, EACH},
    {"movdqu load", movdqu_load, -3, EACH},
    {"movdqu store", movdqu_store, -8, EACH},
    {"movdqu store", movdqu_store, -13, NONE},
    {"movups load", movups_load, -5, EACH},
    {"movups store", movups_store, -5, EACH},
    {"movaps load", movaps_load, 0, NONE},
    {"movaps load", movaps_load, -16, NONE},
    {"movaps store", movaps_store, 0, NONE},
    {"movaps store", movaps_store, -16, NONE},
    {"movss load", movss_load, -2, EACH},
    {"movss store", movss_store, -2, EACH},
    {"movsd load", movsd_load, -4, EACH},
    {"movsd store", movsd_store, -4, EACH},
    {"movhps load", movhps_load, -4, EACH},
    {"movlps store", movlps_store, -4, EACH},
    {"movntdq store", movntdq_store, -16, NONE},
    {"paddd from memory", paddd, 0, NONE},
    {"paddd from memory", paddd, -16, NONE},
    {"pxor from memory", pxor, 0, EACH},
    {"pshufd from memory", pshufd, -16, EACH},
    {"paddq from both sides", paddq_twice, 0, EACH},
    {"pinsrw from memory", pinsrw, -1, EACH},
    {"cvtsi2sd from memory", convert, -4, EACH},
    {"ucomisd with memory", compare, -4, EACH},
    {"stmxcsr", stmxcsr, -2, EACH},
    {"ldmxcsr", ldmxcsr, -2, NONE},
    {"lock cmpxchg16b", cmpxchg16b, 0, EACH},
    {"lock cmpxchg16b", cmpxchg16b, -16, EACH},
    {"x87 load of 10 bytes", fld80, -5, EACH},
    {"x87 store of 10 bytes", fstp80, -5, EACH},
    {"x87 load of 8 bytes", fld64, -3, EACH},
    {"x87 store of 8 bytes", fstp64, -3, EACH},
    {"x87 load of an integer", fild64, -4, EACH},
    {"x87 store of an integer", fistp64, -4, EACH},
    {"x87 addition from memory", fadd32, -2, EACH},
    {"fnstcw", fnstcw, -1, EACH},
    {"clflush", clflush, 0, NONE},
    {"prefetch", prefetch, 0, NONE},
    {"maskmovdqu store", maskmovdqu_store, -8, EACH},
};

enum { FXSAVE_BYTES = 512, FXSAVE_WRITTEN = 416 };

/* 512 bytes in one instruction: more than the frame of run_checks holds. */
static void check_fxsave(void)
{
    static uint8_t here[FXSAVE_BYTES] __attribute__((aligned(16)));
    uint8_t *there = fresh_window_edge(NONE) - FXSAVE_BYTES / 2;
    uint64_t back;

    asm volatile("fninit; fldpi; movdqu (%0), %%xmm5; fxsave (%1); fxsave (%2)"
                 :
                 : "r"(pattern), "r"(here), "r"(there)
                 : "memory");
    report(memcmp(here, there, FXSAVE_WRITTEN) == 0, "fxsave over an edge");
    asm volatile("pxor %%xmm5, %%xmm5; fxrstor (%1); movq %%xmm5, %0"
                 : "=r"(back)
                 : "r"(there)
                 : "memory");
    report(back == *(uint64_t *)pattern, "fxrstor over an edge");
}

void check_vectors(void)
{
    run_checks(checks, COUNT(checks));
    check_fxsave();
}
