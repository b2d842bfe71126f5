/* copy_kernel.S: the copies of safecopy.h.
 *
 * What makes a fault recoverable: wherever an instruction may fault, rdi, rsi and rdx (the rest) stand at
 * a place up to which everything is done, and bytes behind it were written in ascending order. The signal
 * handler (safecopy.c) finds rip in a row of `kvmmm_copy_ranges`, and goes on at the row's landing. There
 * `rep movsb` (or stosb) continues from that place; its own fault leaves rcx as the exact rest, and ends
 * the copy.
 *
 * A block is loaded as a whole before any of it is stored, its last part as the last bytes of the rest,
 * so that sizes need few branches. (A CPU could do the half of a store that lies on a good page although
 * the other half faults, SDM 3A "Guaranteed Atomic Operations"; none is known that does.)
 *
 * Vectors: 16 bytes up to 32 bytes, and where there is no AVX2; else 32. What is read is asked for 512
 * bytes before (a prefetch does not fault), and what is written begins at a cache line: together up to a
 * tenth of the time of what the first cache cannot hold. A copy that no cache can hold writes past the
 * caches: it takes two thirds of the time, and less even if all is read afterwards.
 *
 * Registers: rax = n_bytes, r11 = where `kvmmm_copy_armed` lies. The handler writes r9 and r10.
 */
#include "copy_kernel.h"

        .hidden kvmmm_copy_armed, kvmmm_copy_avx2, kvmmm_copy_stream_bytes
        .globl  kvmmm_copy_ranges, kvmmm_copy_ranges_end, kvmmm_copy_text, kvmmm_copy_text_end
        .hidden kvmmm_copy_ranges, kvmmm_copy_ranges_end, kvmmm_copy_text, kvmmm_copy_text_end
        .pushsection .rodata.kvmmm_copy_ranges, "a", @progbits
        .balign 16
kvmmm_copy_ranges:
        .popsection
        .text
kvmmm_copy_text:

/* size_t kvmmm_copy(void *dst rdi, const void *src rsi, size_t n_bytes rdx, struct kvmmm_fault * rcx) */
FUNCTION kvmmm_copy
        ARM
        mov     %rdx, %rax
copy_plain:
        cmp     $16, %rdx
        jb      copy_below_16
        cmp     $32, %rdx
        ja      copy_over_32
        movups  (%rsi), %xmm0
        movups  -16(%rsi,%rdx), %xmm1
        movups  %xmm0, (%rdi)
        movups  %xmm1, -16(%rdi,%rdx)
        LEAVE
copy_over_32:
        cmpb    $0, kvmmm_copy_avx2(%rip)
        je      copy_sse2
copy_avx2:
        cmp     $64, %rdx
        ja      copy_over_64
        vmovdqu (%rsi), %ymm0
        vmovdqu -32(%rsi,%rdx), %ymm1
        vmovdqu %ymm0, (%rdi)
        vmovdqu %ymm1, -32(%rdi,%rdx)
        LEAVE_AVX2
copy_over_64:
        cmp     $128, %rdx
        ja      copy_over_128
        LOAD    vmovdqu, ymm, 32, 01, 0, %rsi
        LOAD    vmovdqu, ymm, 32, 23, -64, "%rsi,%rdx"
        STORE   vmovdqu, ymm, 32, 01, 0, %rdi
        STORE   vmovdqu, ymm, 32, 23, -64, "%rdi,%rdx"
        LEAVE_AVX2
copy_over_128:
        cmp     $256, %rdx
        ja      copy_over_256
        LOAD    vmovdqu, ymm, 32, 0123, 0, %rsi
        LOAD    vmovdqu, ymm, 32, 4567, -128, "%rsi,%rdx"
        STORE   vmovdqu, ymm, 32, 0123, 0, %rdi
        STORE   vmovdqu, ymm, 32, 4567, -128, "%rdi,%rdx"
        LEAVE_AVX2
copy_over_256:
        LOAD    vmovdqu, ymm, 32, 01, 0, %rsi
        STORE   vmovdqu, ymm, 32, 01, 0, %rdi
        ALIGN   64
        sub     %r9, %rsi
        cmp     kvmmm_copy_stream_bytes(%rip), %rax
        jae     copy_stream
        .balign 32
1:      prefetcht0 512(%rsi)
        prefetcht0 576(%rsi)
        LOAD    vmovdqu, ymm, 32, 0123, 0, %rsi
        STORE   vmovdqa, ymm, 32, 0123, 0, %rdi
        add     $128, %rsi
        add     $128, %rdi
        sub     $128, %rdx
        cmp     $128, %rdx
        ja      1b
copy_last_128:                          /* 1 to 128, with more behind us */
        LOAD    vmovdqu, ymm, 32, 0123, -128, "%rsi,%rdx"
        STORE   vmovdqu, ymm, 32, 0123, -128, "%rdi,%rdx"
        LEAVE_AVX2
copy_stream:
        prefetcht0 512(%rsi)
        prefetcht0 576(%rsi)
        LOAD    vmovdqu, ymm, 32, 0123, 0, %rsi
        STORE   vmovntdq, ymm, 32, 0123, 0, %rdi
        add     $128, %rsi
        add     $128, %rdi
        sub     $128, %rdx
        cmp     $128, %rdx
        ja      copy_stream
        sfence
        jmp     copy_last_128
copy_avx2_end:

copy_below_16:
        cmp     $8, %edx
        jae     copy_8_to_15
        cmp     $4, %edx
        jae     copy_4_to_7
        cmp     $1, %edx
        ja      copy_2_to_3
        jb      copy_nothing
        movzbl  (%rsi), %r8d
        mov     %r8b, (%rdi)
copy_nothing:
        LEAVE
copy_2_to_3:
        movzwl  (%rsi), %r8d
        movzwl  -2(%rsi,%rdx), %r9d
        mov     %r8w, (%rdi)
        mov     %r9w, -2(%rdi,%rdx)
        LEAVE
copy_4_to_7:
        mov     (%rsi), %r8d
        mov     -4(%rsi,%rdx), %r9d
        mov     %r8d, (%rdi)
        mov     %r9d, -4(%rdi,%rdx)
        LEAVE
copy_8_to_15:
        mov     (%rsi), %r8
        mov     -8(%rsi,%rdx), %r9
        mov     %r8, (%rdi)
        mov     %r9, -8(%rdi,%rdx)
        LEAVE
copy_sse2:
        cmp     $64, %rdx
        jbe     copy_last_64_sse2
        cmp     $128, %rdx
        jbe     copy_last_128_sse2
        movups  (%rsi), %xmm0
        movups  %xmm0, (%rdi)
        ALIGN   16
        sub     %r9, %rsi
        .balign 32
1:      cmp     $128, %rdx
        jbe     2f
        LOAD    movups, xmm, 16, 0123, 0, %rsi
        STORE   movaps, xmm, 16, 0123, 0, %rdi
        add     $64, %rsi
        add     $64, %rdi
        sub     $64, %rdx
        jmp     1b
2:      cmp     $64, %rdx
        ja      copy_last_128_sse2
        LOAD    movups, xmm, 16, 0123, -64, "%rsi,%rdx" /* more than that is behind us */
        STORE   movups, xmm, 16, 0123, -64, "%rdi,%rdx"
        LEAVE
copy_last_64_sse2:                      /* 33 to 64 */
        LOAD    movups, xmm, 16, 01, 0, %rsi
        LOAD    movups, xmm, 16, 23, -32, "%rsi,%rdx"
        STORE   movups, xmm, 16, 01, 0, %rdi
        STORE   movups, xmm, 16, 23, -32, "%rdi,%rdx"
        LEAVE
copy_last_128_sse2:                     /* 65 to 128 */
        LOAD    movups, xmm, 16, 0123, 0, %rsi
        LOAD    movups, xmm, 16, 4567, -64, "%rsi,%rdx"
        STORE   movups, xmm, 16, 0123, 0, %rdi
        STORE   movups, xmm, 16, 4567, -64, "%rdi,%rdx"
        LEAVE
copy_end:

copy_landing_avx2:
        vzeroupper
        sfence                          /* it may have been a streaming store */
copy_landing:
        mov     %rcx, %r8
        mov     %rdx, %rcx
copy_bytes:
        rep movsb
copy_bytes_end:
        LEAVE                           /* the cause has gone meanwhile */
        RANGE   copy_plain, copy_avx2, copy_landing, 0
        RANGE   copy_avx2, copy_avx2_end, copy_landing_avx2, 0
        RANGE   copy_avx2_end, copy_end, copy_landing, 0
        RANGE   copy_bytes, copy_bytes_end, copy_failed, 1

copy_failed:                            /* rcx = rest, r8 = fault, r10 = address, r9 = signal */
        sub     %rcx, %rax
failed:
        mov     %r10, (%r8)
        mov     %r9d, 8(%r8)
        LEAVE
END kvmmm_copy

/* size_t kvmmm_zero(void *dst rdi, size_t n_bytes rsi, struct kvmmm_fault *fault rdx) */
FUNCTION kvmmm_zero
        ARM
        mov     %rdx, %r8
        mov     %rsi, %rdx
        mov     %rsi, %rax
        pxor    %xmm0, %xmm0
zero_plain:
        cmp     $16, %rdx
        jb      zero_below_16
        cmp     $32, %rdx
        ja      zero_over_32
        movups  %xmm0, (%rdi)
        movups  %xmm0, -16(%rdi,%rdx)
        LEAVE
zero_over_32:
        cmpb    $0, kvmmm_copy_avx2(%rip)
        je      zero_sse2
zero_avx2:
        vpxor   %xmm0, %xmm0, %xmm0
        cmp     $64, %rdx
        ja      zero_over_64
        vmovdqu %ymm0, (%rdi)
        vmovdqu %ymm0, -32(%rdi,%rdx)
        LEAVE_AVX2
zero_over_64:
        cmp     $128, %rdx
        ja      zero_over_128
        STORE   vmovdqu, ymm, 32, 00, 0, %rdi
        STORE   vmovdqu, ymm, 32, 00, -64, "%rdi,%rdx"
        LEAVE_AVX2
zero_over_128:
        cmp     $256, %rdx
        ja      zero_over_256
        STORE   vmovdqu, ymm, 32, 0000, 0, %rdi
        STORE   vmovdqu, ymm, 32, 0000, -128, "%rdi,%rdx"
        LEAVE_AVX2
zero_over_256:
        vmovdqu %ymm0, (%rdi)
        ALIGN   32
        cmp     kvmmm_copy_stream_bytes(%rip), %rax
        jae     zero_stream
        .balign 32
1:      STORE   vmovdqa, ymm, 32, 0000, 0, %rdi
        add     $128, %rdi
        sub     $128, %rdx
        cmp     $128, %rdx
        ja      1b
zero_last_128:
        STORE   vmovdqu, ymm, 32, 0000, -128, "%rdi,%rdx"
        LEAVE_AVX2
zero_stream:
        STORE   vmovntdq, ymm, 32, 0000, 0, %rdi
        add     $128, %rdi
        sub     $128, %rdx
        cmp     $128, %rdx
        ja      zero_stream
        sfence
        jmp     zero_last_128
zero_avx2_end:

zero_below_16:
        xor     %ecx, %ecx
        cmp     $8, %edx
        jae     zero_8_to_15
        cmp     $4, %edx
        jae     zero_4_to_7
        cmp     $1, %edx
        ja      zero_2_to_3
        jb      zero_nothing
        mov     %cl, (%rdi)
zero_nothing:
        LEAVE
zero_2_to_3:
        mov     %cx, (%rdi)
        mov     %cx, -2(%rdi,%rdx)
        LEAVE
zero_4_to_7:
        mov     %ecx, (%rdi)
        mov     %ecx, -4(%rdi,%rdx)
        LEAVE
zero_8_to_15:
        mov     %rcx, (%rdi)
        mov     %rcx, -8(%rdi,%rdx)
        LEAVE
zero_sse2:
        cmp     $64, %rdx
        ja      zero_over_64_sse2
        STORE   movups, xmm, 16, 00, 0, %rdi
        STORE   movups, xmm, 16, 00, -32, "%rdi,%rdx"
        LEAVE
zero_over_64_sse2:
        movups  %xmm0, (%rdi)
        ALIGN   16
        .balign 32
1:      cmp     $64, %rdx
        jbe     2f
        STORE   movaps, xmm, 16, 0000, 0, %rdi
        add     $64, %rdi
        sub     $64, %rdx
        jmp     1b
2:      STORE   movups, xmm, 16, 0000, -64, "%rdi,%rdx"
        LEAVE
zero_end:

zero_landing_avx2:
        vzeroupper
        sfence
zero_landing:
        mov     %rdx, %rcx
        xor     %eax, %eax
zero_bytes:
        rep stosb
zero_bytes_end:
        mov     %rsi, %rax
        LEAVE
zero_failed:
        mov     %rsi, %rax
        jmp     copy_failed
        RANGE   zero_plain, zero_avx2, zero_landing, 0
        RANGE   zero_avx2, zero_avx2_end, zero_landing_avx2, 0
        RANGE   zero_avx2_end, zero_end, zero_landing, 0
        RANGE   zero_bytes, zero_bytes_end, zero_failed, 1
END kvmmm_zero

/* The words: an access that either happens or does not. */
word_failed:
        xor     %eax, %eax
        jmp     failed

/* bool kvmmm_swap_u32(uint32_t *word rdi, uint32_t new esi, uint32_t *old_ret rdx, struct kvmmm_fault * rcx) */
FUNCTION kvmmm_swap_u32
        ARM
        mov     %rcx, %r8
swap_word:
        xchg    %esi, (%rdi)
swap_word_end:
        mov     %esi, (%rdx)
        mov     $1, %eax
        LEAVE
        RANGE   swap_word, swap_word_end, word_failed, 0
END kvmmm_swap_u32

/* bool kvmmm_cas_u32(uint32_t *word rdi, uint32_t old esi, uint32_t new edx, uint32_t *old_ret rcx,
 *                    struct kvmmm_fault *fault r8) */
FUNCTION kvmmm_cas_u32
        ARM
        mov     %esi, %eax
cas_word:
        lock cmpxchg %edx, (%rdi)
cas_word_end:
        mov     %eax, (%rcx)
        mov     $1, %eax
        LEAVE
        RANGE   cas_word, cas_word_end, word_failed, 0
END kvmmm_cas_u32

/* bool kvmmm_load_u32(const uint32_t *word rdi, uint32_t *ret rsi, struct kvmmm_fault *fault rdx) */
FUNCTION kvmmm_load_u32
        ARM
        mov     %rdx, %r8
load_word:
        mov     (%rdi), %ecx
load_word_end:
        mov     %ecx, (%rsi)
        mov     $1, %eax
        LEAVE
        RANGE   load_word, load_word_end, word_failed, 0
END kvmmm_load_u32

kvmmm_copy_text_end:
        .pushsection .rodata.kvmmm_copy_ranges, "a", @progbits
kvmmm_copy_ranges_end:
        .popsection
        .section .note.GNU-stack, "", @progbits
