/* user_hello: a Linux program starts in ring 3 and sees its words. Expected: status 0. */
#include "user.h"

int main(int argc, char **argv, char **envp)
{
    kprintf("hello from ring %u, with Linux's system calls; my pid is %ld\n", kvmmm_cpl(),
            user_getpid());
    for (int i = 0; i < argc; i++)
        kprintf("  argv[%d] %s\n", i, argv[i]);
    for (; *envp != NULL; envp++)
        kprintf("  environment %s\n", *envp);
    return KVMMM_STATUS_OK;
}
