/* Entry of a program in ring 3: rsp points to argc. The stack is used as it comes: its first push is
 * the first access to untouched memory.
 *
 * Source: System V ABI, AMD64 supplement, 3.4.1.
 */
        .section .text.start, "ax"
        .globl _start
        .type _start, @function
_start:
        xor     %ebp, %ebp              /* a debugger's backtrace ends here */
        mov     %rsp, %rdi
        mov     %rdx, %rsi
        and     $-16, %rsp
        call    user_start              /* does not come back */
        ud2
        .size _start, . - _start

/* "A program for Linux", by which kvmmm tells it from a guest kernel (LSB core, 10.2.1, as glibc). */
        .section .note.ABI-tag, "a", @note
        .balign 4
        .long   2f - 1f                 /* namesz */
        .long   4f - 3f                 /* descsz */
        .long   1                       /* NT_GNU_ABI_TAG */
1:      .asciz  "GNU"
2:      .balign 4
3:      .long   0, 3, 2, 0              /* Linux, 3.2.0 or later */
4:      .balign 4

        .section .note.GNU-stack, "", @progbits
