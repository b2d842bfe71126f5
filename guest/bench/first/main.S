/* bench_first: the shortest guest; its second instruction is an exit. Expected: status 0.
 *
 * `bench startup` times from MicroVM() to this `out`. One segment, no library, no stack.
 */
#include "kvmmm_abi.h"

        .section .text.start, "ax"
        .globl _start
_start:
        mov     $0, %eax
        out     %eax, $KVMMM_PORT_EXIT
        jmp     _start
