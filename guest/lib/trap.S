/* Exception stubs of a guest that wants its own IDT: 32 of them, 16 bytes apart.
 *
 * Each pushes a zero where the CPU pushes no error code, so that every frame is a
 * struct kvmmm_trap_frame (kvmmm.h), then its vector. They run in ring 0, on the stack that the TSS
 * gives, or on the interrupted one if that was in ring 0 already.
 */
        .text
        .globl kvmmm_trap_stubs
        .balign 16
kvmmm_trap_stubs:
        .set vector, 0
        .rept 32
        .balign 16
        .ifeq (0x60227d00 >> vector) & 1 /* 8, 10 to 14, 17, 21, 29, 30: the CPU pushes one */
        push    $0
        .endif
        push    $vector
        jmp     trap_common
        .set vector, vector + 1
        .endr

        .type trap_common, @function
trap_common:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        push    %rbp
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %cr2, %rax
        push    %rax
        cld
        mov     %rsp, %rdi              /* struct kvmmm_trap_frame * */
        sub     $8, %rsp                /* the call wants rsp aligned to 16 */
        call    *kvmmm_trap_handler(%rip)
        add     $16, %rsp               /* that, and cr2 */
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rbp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        add     $16, %rsp               /* vector and error code */
        iretq
        .size trap_common, . - trap_common
