/* The first C of a program in ring 3: relocates itself if need be, finds its arguments, calls main. */
#include <linux/elf.h>

#include "user.h"

enum { R_X86_64_RELATIVE = 8, COMMAND_LINE_BYTES = 2048 };

const uint64_t *user_stack;
uint64_t user_rdx;

/* What args.c and report.c know of a guest: its command line, and where verdicts are counted. */
static struct kvmmm_report verdicts;
static struct kvmmm_boot_info boot;
const struct kvmmm_boot_info *kvmmm_boot;

/* The program's own; it may take fewer. Its result is the exit status. */
int main(int argc, char **argv, char **envp);

extern const Elf64_Ehdr __ehdr_start __attribute__((visibility("hidden")));

/* A static-pie is linked at 0 and loaded anywhere: add the difference to every pointer in its data.
 * Nothing before this may use one.
 */
static void relocate(void)
{
    const Elf64_Ehdr *header = &__ehdr_start;
    const uint64_t base = (uint64_t)header;
    const Elf64_Phdr *segment = (const Elf64_Phdr *)(base + header->e_phoff);
    const Elf64_Dyn *dynamic = NULL;
    uint64_t table = 0, n_bytes = 0;

    if (header->e_type != ET_DYN)
        return;
    for (unsigned i = 0; i < header->e_phnum; i++)
        if (segment[i].p_type == PT_DYNAMIC)
            dynamic = (const Elf64_Dyn *)(base + segment[i].p_vaddr);
    for (; dynamic != NULL && dynamic->d_tag != DT_NULL; dynamic++) {
        if (dynamic->d_tag == DT_RELA)
            table = base + dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_RELASZ)
            n_bytes = dynamic->d_un.d_val;
    }
    for (const Elf64_Rela *r = (const Elf64_Rela *)table; (uint64_t)r < table + n_bytes; r++)
        if (ELF64_R_TYPE(r->r_info) == R_X86_64_RELATIVE)
            *(uint64_t *)(base + r->r_offset) = base + (uint64_t)r->r_addend;
}

/* Options are words of the command line in kvmmm.h: argv[1] and what follows, joined by blanks. */
static void join(char **argv)
{
    static char line[COMMAND_LINE_BYTES];
    size_t n = 0;

    for (; *argv != NULL; argv++)
        for (const char *p = *argv;; p++) {
            if (n + 1 < sizeof line)
                line[n++] = *p != '\0' ? *p : ' ';
            if (*p == '\0')
                break;
        }
    boot.cmdline = (uint64_t)line;
    boot.cmdline_bytes = (uint32_t)n;
}

bool user_auxv(uint64_t type, uint64_t *value)
{
    const uint64_t *entry = user_stack + 1 + user_stack[0] + 1; /* argc, argv[], NULL */

    while (*entry++ != 0) /* envp[], NULL */
        ;
    for (; entry[0] != AT_NULL; entry += 2)
        if (entry[0] == type) {
            *value = entry[1];
            return true;
        }
    return false;
}

void __attribute__((noreturn)) user_start(const uint64_t *stack, uint64_t rdx)
{
    relocate();
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);

    user_stack = stack;
    user_rdx = rdx;
    boot.report = (uint64_t)&verdicts;
    join(argv + (argc > 0));
    kvmmm_boot = &boot;
    user_exit_group(main(argc, argv, argv + argc + 1));
}

/* ---- What kvmmm.h's text and options stand on ------------------------------------------------- */

void console_write(const void *bytes, size_t n)
{
    while (n > 0) {
        long written = user_write(1, bytes, n);
        if (written <= 0)
            return;
        bytes = (const char *)bytes + written;
        n -= (size_t)written;
    }
}

void kvmmm_exit(int status)
{
    user_exit_group(status);
}

unsigned kvmmm_cpl(void)
{
    uint32_t cs;

    asm("mov %%cs, %0" : "=r"(cs));
    return cs & 3;
}
