/* int kvmmm_enter_ring3(int (*fn)(void *), void *arg): run fn(arg) in ring 3, and stay there.
 *
 * The iretq frame points at fn with the caller's stack as it is, so that fn's `ret` goes straight
 * back to the caller: with fn's result, and in ring 3. There is no way back to ring 0. All of guest
 * memory is user-accessible, and the TSS bitmap lets ring 3 reach kvmmm's ports. Called in ring 3
 * it is a plain call.
 */
#include "kvmmm_abi.h"

        .text
        .globl kvmmm_enter_ring3
        .type kvmmm_enter_ring3, @function
kvmmm_enter_ring3:
        mov     %rdi, %rax
        mov     %rsi, %rdi
        mov     %cs, %ecx
        test    $3, %cl
        jnz     1f
        mov     %rsp, %rcx
        push    $KVMMM_USER_DS
        push    %rcx
        push    $2                      /* rflags: the bit that is always one; IF, DF, IOPL clear */
        push    $KVMMM_USER_CS
        push    %rax
        iretq
1:      jmp     *%rax
        .size kvmmm_enter_ring3, . - kvmmm_enter_ring3
