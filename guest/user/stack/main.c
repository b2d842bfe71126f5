/* user_stack: a program finds its stack as the System V ABI says. Expected: status 0.
 *
 * Linked as a static-pie: it is loaded where nobody linked it, and relocates itself.
 */
#include <linux/elf.h>

#include "user.h"

enum { DEEP_BYTES = 4 << 20 };

static const struct {
    uint64_t type;
    const char *name;
} known[] = {
    {AT_PHDR, "AT_PHDR"},     {AT_PHENT, "AT_PHENT"},   {AT_PHNUM, "AT_PHNUM"},
    {AT_PAGESZ, "AT_PAGESZ"}, {AT_BASE, "AT_BASE"},     {AT_FLAGS, "AT_FLAGS"},
    {AT_ENTRY, "AT_ENTRY"},   {AT_UID, "AT_UID"},       {AT_EUID, "AT_EUID"},
    {AT_GID, "AT_GID"},       {AT_EGID, "AT_EGID"},     {AT_SECURE, "AT_SECURE"},
    {AT_CLKTCK, "AT_CLKTCK"}, {AT_RANDOM, "AT_RANDOM"}, {AT_EXECFN, "AT_EXECFN"},
};

static uint64_t value_of(uint64_t type)
{
    uint64_t value = UINT64_MAX;

    user_auxv(type, &value);
    return value;
}

static void print_and_check_all(void)
{
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint64_t value;
        bool found = user_auxv(known[i].type, &value);

        report(found, "%s is there", known[i].name);
        if (found)
            kprintf("  %-10s 0x%lx\n", known[i].name, value);
    }
}

static void check_program(void)
{
    const Elf64_Phdr *header = (const Elf64_Phdr *)value_of(AT_PHDR);
    uint64_t n = value_of(AT_PHNUM);
    unsigned n_loads = 0;

    report(value_of(AT_PAGESZ) == 4096, "pages have 4096 bytes");
    report(value_of(AT_PHENT) == sizeof *header, "a program header has %lu bytes", sizeof *header);
    report(value_of(AT_ENTRY) == (uint64_t)_start, "AT_ENTRY is _start");
    for (uint64_t i = 0; i < n; i++)
        n_loads += header[i].p_type == PT_LOAD;
    report(n_loads > 1, "AT_PHDR points to program headers, %u of them to load", n_loads);
}

static void check_words(int argc, char **argv, char **envp)
{
    const uint64_t *random = (const uint64_t *)value_of(AT_RANDOM);

    report((uint64_t)user_stack % 16 == 0, "rsp is a multiple of 16: 0x%lx", (uint64_t)user_stack);
    report(user_rdx == 0, "rdx is 0: there is nobody to call at exit");
    report((uint64_t)argc == user_stack[0] && argc > 0, "argc is %d", argc);
    report(argv[argc] == NULL, "argv ends with NULL");
    report((uint64_t)envp == (uint64_t)(argv + argc + 1), "envp follows it");
    report(*(const char *)value_of(AT_EXECFN) != '\0', "AT_EXECFN is text: %s",
           (const char *)value_of(AT_EXECFN));
    report(random[0] != random[1], "AT_RANDOM points to 16 bytes");
    report(value_of(AT_UID) == value_of(AT_EUID) && value_of(AT_SECURE) == 0, "no privileges");
}

/* Every page of a deep frame is touched, from the top down. */
static uint64_t __attribute__((noinline)) deep(void)
{
    volatile char frame[DEEP_BYTES];
    uint64_t sum = 0;

    for (size_t i = sizeof frame; i > 0; i -= 4096)
        frame[i - 1] = (char)(i / 4096);
    for (size_t i = sizeof frame; i > 0; i -= 4096)
        sum += (unsigned char)frame[i - 1];
    return sum;
}

int main(int argc, char **argv, char **envp)
{
    print_and_check_all();
    check_program();
    check_words(argc, argv, envp);
    report(deep() == DEEP_BYTES / 4096 / 256 * (255 * 256 / 2), "4 MiB of stack hold every byte");
    return report_summary();
}
