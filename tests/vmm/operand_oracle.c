/* operand_oracle.c: asks the CPU which pages an instruction touches.
 *
 * Each request on stdin is a `struct state`: registers and one instruction. It runs over pages that
 * start as PROT_NONE; each fault grants what it asked for, and the instruction runs again. The
 * answer is a line: the trap that ended it (-1: none), then per page 1 for a read, 2 for a write.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define REGION 0x20000000UL
#define PAGES 16
#define CODE ((uint8_t *)0x30000000UL)
struct state { uint64_t gpr[16]; uint8_t ymm[4][32], code[16]; uint64_t code_bytes; } state;
uint64_t host_rsp, code_entry = (uint64_t)CODE, way_back;
uint32_t mxcsr = 0x1f80;
static uint8_t granted[PAGES];
static int trap;
void run(void), back(void);
asm("run: push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; mov %rsp, host_rsp\n"
    "lea state, %r15; vmovdqu 128(%r15), %ymm0; vmovdqu 160(%r15), %ymm1\n"
    "vmovdqu 192(%r15), %ymm2; vmovdqu 224(%r15), %ymm3; mov (%r15), %rax; mov 8(%r15), %rbx\n"
    "mov 16(%r15), %rcx; mov 24(%r15), %rdx; mov 32(%r15), %rsi; mov 40(%r15), %rdi\n"
    "mov 48(%r15), %rbp; mov 56(%r15), %rsp; mov 64(%r15), %r8; mov 72(%r15), %r9\n"
    "mov 80(%r15), %r10; mov 88(%r15), %r11; mov 96(%r15), %r12; mov 104(%r15), %r13\n"
    "mov 112(%r15), %r14; mov 120(%r15), %r15; jmp *code_entry\n"
    "back: mov host_rsp, %rsp; cld; fninit; ldmxcsr mxcsr; vzeroupper\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");
static void on_fault(int sig, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t addr = (uint64_t)info->si_addr, page = (addr - REGION) / 4096, err = regs[REG_ERR];
    trap = regs[REG_TRAPNO];
    if (sig == SIGSEGV && trap == 14 && !(err & 16) && addr >= REGION && page < PAGES) {
        int wanted = err & 2 ? 2 : 1;
        if (!(granted[page] & wanted)) {
            granted[page] |= wanted;
            mprotect((void *)(REGION + page * 4096), 4096, granted[page] & 2 ? 3 : PROT_READ);
            trap = -1;
            return;
        }
    }
    if (trap == 14 && err & 16) trap = -1; /* it jumped to what it loaded, and is done */
    regs[REG_RIP] = (uint64_t)back;
}
int main(void) {
    static uint8_t stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, signals[] = {4, 5, 7, 8, 11};
    sigaltstack(&alternate, 0);
    for (int i = 0; i < 5; i++) sigaction(signals[i], &action, 0);
    mmap(CODE, 4096, 7, flags, -1, 0);
    way_back = (uint64_t)back;
    uint32_t target = (uint32_t)(uintptr_t)&way_back;
    while (fread(&state, sizeof state, 1, stdin) == 1) {
        mmap((void *)REGION, PAGES * 4096, PROT_NONE, flags, -1, 0);
        memset(granted, 0, sizeof granted);
        trap = -1;
        memcpy(CODE, state.code, state.code_bytes);
        memcpy(CODE + state.code_bytes, "\xff\x24\x25", 3); /* jmp *way_back */
        memcpy(CODE + state.code_bytes + 3, &target, 4);
        run();
        printf("%d", trap);
        for (int i = 0; i < PAGES; i++) printf(" %d", granted[i]);
        puts("");
    }
    return 0;
}
