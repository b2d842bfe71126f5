/* copy_kernel.h: the assembler's macros of copy_kernel.S. */

        /* This thread is in a copy: tells a handler what a raise() of another handler is about. */
        .macro  ARM
        mov     kvmmm_copy_armed@gottpoff(%rip), %r11
        movb    $1, %fs:(%r11)
        .endm

        .macro  LEAVE
        movb    $0, %fs:(%r11)
        ret
        .endm

        .macro  LEAVE_AVX2
        vzeroupper
        LEAVE
        .endm

        /* \regs (digits) from, or to, so many vectors side by side. */
        .macro  LOAD mov, v, width, regs, at, where
        .set    place, \at
        .irpc   r, \regs
        \mov    place(\where), %\v\r
        .set    place, place + \width
        .endr
        .endm

        .macro  STORE mov, v, width, regs, at, where
        .set    place, \at
        .irpc   r, \regs
        \mov    %\v\r, place(\where)
        .set    place, place + \width
        .endr
        .endm

        /* After so many bytes, unaligned: go on at the next boundary. */
        .macro  ALIGN width
        mov     %edi, %r9d
        and     $\width - 1, %r9d
        sub     $\width, %r9            /* minus the bytes up to there */
        sub     %r9, %rdi
        add     %r9, %rdx
        .endm

        /* Faults between two labels go to a landing. Exact: rsi and rdi then say which byte. */
        .macro  RANGE first, end, landing, exact
        .pushsection .rodata.kvmmm_copy_ranges, "a", @progbits
        .long   \first - kvmmm_copy_ranges, \end - kvmmm_copy_ranges
        .long   \landing - kvmmm_copy_ranges, \exact
        .popsection
        .endm

        .macro  FUNCTION name
        .globl  \name
        .hidden \name
        .type   \name, @function
        .balign 64
\name:
        .cfi_startproc
        endbr64
        .endm

        .macro  END name
        .cfi_endproc
        .size   \name, . - \name
        .endm
