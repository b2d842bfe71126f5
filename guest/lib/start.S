/* Entry. kvmmm gives rdi = struct kvmmm_boot_info *, rsp = an untouched stack, interrupts off.
 *
 * The stack is used as it comes: its first push is the guest's first demand-paged access. Nothing
 * but integer instructions, and few of them: some KVMs interpret ring 0 one instruction at a time.
 */
        .section .text.start, "ax"
        .globl _start
        .type _start, @function
_start:
        cld
        xor     %ebp, %ebp              /* a debugger's backtrace ends here */
        call    kvmmm_start             /* saves and checks rdi, then calls main */
        mov     %eax, %edi
        call    kvmmm_exit              /* does not come back */
        ud2
        .size _start, . - _start
