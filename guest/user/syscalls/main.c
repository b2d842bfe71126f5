/* user_syscalls: system calls fail as Linux says, and leave registers alone. Expected: status 0. */
#include "user.h"

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, ANON = MAP_PRIVATE | MAP_ANONYMOUS };

static void check(long answer, long wanted, const char *what)
{
    report(answer == wanted, "%s: %ld", what, answer);
}

static void check_unknown(void)
{
    check(user_call(-1, 0, 0, 0, 0, 0, 0), -ENOSYS, "call -1");
    check(user_call(5000, 0, 0, 0, 0, 0, 0), -ENOSYS, "call 5000");
    report(user_getpid() > 0, "there is a pid");
    check(user_getpid(), user_getpid(), "and it stays");
}

static void check_write(uint64_t hole)
{
    check(user_write(1, (void *)hole, 10), -EFAULT, "write from a hole");
    check(user_write(1, NULL, 1), -EFAULT, "write from NULL");
    check(user_write(1, (void *)0xffffff8000000000, 1), -EFAULT, "write from the kernel's half");
    check(user_write(1, (void *)-8UL, 16), -EFAULT, "write from a range that wraps");
    check(user_write(1, "", 0), 0, "write of nothing");
    check(user_write(77, "x", 1), -EBADF, "write to nobody");
    char *end = (char *)hole - 8;
    memcpy(end, "partly.\n", 8);
    long n = user_write(1, end, 100);
    report(n == 8 || n == -EFAULT, "write up to a hole: %ld", n);
}

static void check_mmap(uint64_t page)
{
    check(user_mmap(0, 0, RW, ANON, -1, 0), -EINVAL, "mmap of nothing");
    check(user_mmap(0, PAGE, RW, MAP_ANONYMOUS, -1, 0), -EINVAL, "mmap neither shared nor private");
    check(user_mmap(page + 1, PAGE, RW, ANON | MAP_FIXED, -1, 0), -EINVAL, "mmap unaligned");
    check(user_mmap(0, PAGE, RW, MAP_PRIVATE, 77, 0), -EBADF, "mmap of no file");
    check(user_mmap(0, PAGE, RW, ANON, -1, 1), -EINVAL, "mmap at an odd offset");
    check(user_mmap(0, 1UL << 47, RW, ANON, -1, 0), -ENOMEM, "mmap of everything");
    check(user_mmap(0, -1UL, RW, ANON, -1, 0), -ENOMEM, "mmap of more than that");
    check(user_mmap(page, PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0), -EEXIST, "mmap over one");
    long at = user_mmap(page, PAGE, RW, ANON, -1, 0);
    report(!user_failed(at) && at != (long)page, "a hint that is taken is passed by");
    user_munmap((uint64_t)at, PAGE);
}

static void check_others(uint64_t page, uint64_t hole)
{
    check(user_munmap(page + 1, PAGE), -EINVAL, "munmap unaligned");
    check(user_munmap(page, 0), -EINVAL, "munmap of nothing");
    check(user_munmap(hole, PAGE), 0, "munmap of a hole");
    check(user_munmap(0xffffff8000000000, PAGE), -EINVAL, "munmap of the kernel's half");
    check(user_mprotect(page + 1, PAGE, RW), -EINVAL, "mprotect unaligned");
    check(user_mprotect(page, PAGE, 0x40), -EINVAL, "mprotect to what does not exist");
    check(user_mprotect(page, 0, PROT_READ), 0, "mprotect of nothing");
    check(user_mprotect(hole, PAGE, PROT_READ), -ENOMEM, "mprotect of a hole");
    check(user_mremap(page + 1, PAGE, PAGE, 0, 0), -EINVAL, "mremap unaligned");
    check(user_mremap(page, PAGE, 0, 0, 0), -EINVAL, "mremap to nothing");
    check(user_mremap(page, PAGE, PAGE, 64, 0), -EINVAL, "mremap with an unknown flag");
    check(user_mremap(page, PAGE, PAGE, MREMAP_FIXED, page), -EINVAL, "mremap fixed, not movable");
    check(user_mremap(hole, PAGE, 2 * PAGE, MREMAP_MAYMOVE, 0), -EFAULT, "mremap of a hole");
    check(user_madvise(page, PAGE, 12345), -EINVAL, "madvise with unknown advice");
    check(user_madvise(page + 1, PAGE, MADV_DONTNEED), -EINVAL, "madvise unaligned");
    check(user_madvise(hole, PAGE, MADV_DONTNEED), -ENOMEM, "madvise of a hole");
    report(user_brk(0) == user_brk(1), "brk below the heap changes nothing");
}

static void check_thread_pointer(uint64_t page)
{
    uint64_t fs = 0, word = 0;

    *(uint64_t *)page = 0x1122334455667788;
    check(user_call(__NR_arch_prctl, ARCH_SET_FS, page, 0, 0, 0, 0), 0, "ARCH_SET_FS");
    asm volatile("mov %%fs:0, %0" : "=r"(word));
    report(word == 0x1122334455667788, "fs:0 is where it was set: 0x%lx", word);
    check(user_call(__NR_arch_prctl, ARCH_GET_FS, (uint64_t)&fs, 0, 0, 0, 0), 0, "ARCH_GET_FS");
    report(fs == page, "and it can be read back");
    check(user_call(__NR_arch_prctl, ARCH_SET_FS, 1UL << 63, 0, 0, 0, 0), -EPERM,
          "ARCH_SET_FS to the kernel's half");
    check(user_call(__NR_arch_prctl, 0x9999, 0, 0, 0, 0, 0), -EINVAL, "an unknown arch_prctl");
}

/* What the ABI lets a program keep over a system call: all but rax, rcx and r11, and its red zone. */
static void check_registers(void)
{
    uint64_t in[8] = {1, 2, 3, 4, 5, 6, 7, 8}, out[8] = {0}, vector[2] = {0}, red = 0, rcx_is_rip = 0;

    asm volatile("movq 0(%[in]), %%rbx\n\t"
                 "movq 8(%[in]), %%r12\n\t"
                 "movq 16(%[in]), %%r13\n\t"
                 "movq 24(%[in]), %%r14\n\t"
                 "movq 32(%[in]), %%r15\n\t"
                 "movq 40(%[in]), %%r8\n\t"
                 "movq 48(%[in]), %%r9\n\t"
                 "movq 56(%[in]), %%r10\n\t"
                 "movdqu (%[in]), %%xmm7\n\t"
                 "movq %%r12, -120(%%rsp)\n\t"
                 "mov %[number], %%eax\n\t"
                 "syscall\n\t"
                 "1: movq -120(%%rsp), %%rax\n\t"
                 "movq %%rax, %[red]\n\t"
                 "lea 1b(%%rip), %%rax\n\t"
                 "sub %%rcx, %%rax\n\t"
                 "movq %%rax, %[rip]\n\t"
                 "movq %%rbx, 0(%[out])\n\t"
                 "movq %%r12, 8(%[out])\n\t"
                 "movq %%r13, 16(%[out])\n\t"
                 "movq %%r14, 24(%[out])\n\t"
                 "movq %%r15, 32(%[out])\n\t"
                 "movq %%r8, 40(%[out])\n\t"
                 "movq %%r9, 48(%[out])\n\t"
                 "movq %%r10, 56(%[out])\n\t"
                 "movdqu %%xmm7, %[vector]"
                 : [red] "=m"(red), [rip] "=m"(rcx_is_rip), [vector] "=m"(vector)
                 : [in] "D"(in), [out] "S"(out), [number] "i"(__NR_getpid)
                 : "rax", "rcx", "rdx", "r11", "rbx", "r8", "r9", "r10", "r12", "r13", "r14", "r15",
                   "xmm7", "memory");
    report(memcmp(in, out, sizeof in) == 0, "general registers survive a system call");
    report(vector[0] == 1 && vector[1] == 2, "vector registers as well");
    report(red == 2, "and the red zone below rsp");
    report(rcx_is_rip == 0, "rcx is where it went on");
}

int main(void)
{
    long pages = user_mmap(0, 3 * PAGE, RW, ANON, -1, 0);
    uint64_t page = (uint64_t)pages, hole = page + PAGE;

    report(!user_failed(pages) && user_munmap(hole, PAGE) == 0, "a page, a hole, a page");
    check_unknown();
    check_write(hole);
    check_mmap(page);
    check_others(page, hole);
    check_thread_pointer(page);
    check_registers();
    return report_summary();
}
