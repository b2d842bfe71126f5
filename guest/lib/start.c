/* The first C of a guest: checks that host and guest speak the same ABI, then calls main. */
#include "kvmmm.h"

const struct kvmmm_boot_info *kvmmm_boot;

/* A guest that misreads its boot information cannot find the console ring: say it byte by byte. */
static void __attribute__((noreturn, cold)) refuse(const char *why)
{
    for (; *why != '\0'; why++)
        kvmmm_out8(KVMMM_PORT_DEBUGCON, (uint8_t)*why);
    kvmmm_exit(KVMMM_STATUS_WRONG_ABI);
}

int kvmmm_start(const struct kvmmm_boot_info *boot)
{
    if (boot->magic != KVMMM_ABI_MAGIC)
        refuse("this guest was not started by kvmmm: rdi points to no kvmmm_boot_info\n");
    if (boot->version != KVMMM_ABI_VERSION)
        refuse("this guest was built for another version of kvmmm: build it anew\n");
    kvmmm_boot = boot;
    return main(boot);
}

void kvmmm_exit(int status)
{
    /* A byte: a wider `out` asks the I/O bitmap for the ports after this one, too. */
    for (;;)
        kvmmm_out8(KVMMM_PORT_EXIT, (uint8_t)status);
}
