/* floor_machine.c: the same ioctls as MicroVM, load and run make, with nothing in between. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "floor.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

enum { HUGE_PAGE_BYTES = 2 << 20, IMAGE_BYTES_MAX = 16384 };

/* Where VMX keeps three pages of its own (Linux api.rst, KVM_SET_TSS_ADDR). */
static const unsigned long TSS_ADDR = 0xfffbd000;

static int make_arena(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    static unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL;
    m->memory_fd = memfd_create("kvmmm-floor", flags);
    if (m->memory_fd < 0 && errno == EINVAL) { /* before Linux 6.3 */
        flags &= ~MFD_NOEXEC_SEAL;
        m->memory_fd = memfd_create("kvmmm-floor", flags);
    }
    if (m->memory_fd < 0 || ftruncate(m->memory_fd, (off_t)r->arena_bytes) ||
        fcntl(m->memory_fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL))
        return -errno;
    int rc = kvmmm_map_shared_aligned(m->memory_fd, r->arena_bytes, HUGE_PAGE_BYTES, &m->hva);
    m->arena_bytes = rc ? 0 : r->arena_bytes;
    return rc;
}

static int make_vm(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    m->vm_fd = ioctl(r->kvm_fd, KVM_CREATE_VM, 0);
    if (m->vm_fd < 0)
        return -errno;
    ioctl(m->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDR);
    struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
    if (r->exits_on_emulation_failure && ioctl(m->vm_fd, KVM_ENABLE_CAP, &cap))
        return -errno;
    return 0;
}

/* Into a hole, pwrite is the fastest copy: no fault, and no page is zeroed first. */
static int put(const struct kvmmm_floor_machine *m, const void *src, size_t n_bytes, uint64_t offset)
{
    if (offset > m->arena_bytes || n_bytes > m->arena_bytes - offset)
        return -EFAULT;
    ssize_t done = pwrite(m->memory_fd, src, n_bytes, (off_t)offset);
    return done == (ssize_t)n_bytes ? 0 : done < 0 ? -errno : -EIO;
}

static int put_segments(const struct kvmmm_floor_recipe *r, const struct kvmmm_floor_machine *m,
                        const uint8_t *file, size_t n_bytes)
{
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)file;
    if (n_bytes < sizeof *header || memcmp(file, ELFMAG, SELFMAG) ||
        header->e_phoff > n_bytes || header->e_phnum > (n_bytes - header->e_phoff) / sizeof(Elf64_Phdr))
        return -ENOEXEC;
    const Elf64_Phdr *segment = (const Elf64_Phdr *)(file + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++, segment++) {
        if (segment->p_type != PT_LOAD)
            continue;
        if (segment->p_offset > n_bytes || segment->p_filesz > n_bytes - segment->p_offset)
            return -ENOEXEC;
        int rc = put(m, file + segment->p_offset, segment->p_filesz, r->image_offset + segment->p_paddr);
        if (rc)
            return rc;
    }
    return 0;
}

static int load_image(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    uint8_t file[IMAGE_BYTES_MAX] __attribute__((aligned(8)));
    int fd = open(r->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n_bytes = read(fd, file, sizeof file);
    int rc = n_bytes < 0 ? -errno : n_bytes == sizeof file ? -EFBIG : 0;
    close(fd);
    return rc ? rc : put_segments(r, m, file, (size_t)n_bytes);
}

static int fill(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    int rc = 0;
    for (uint32_t i = 0; i < r->n_pieces && !rc; i++)
        rc = put(m, (const void *)r->pieces[i].hva, r->pieces[i].n_bytes, r->pieces[i].offset);
    return rc;
}

static int add_slots(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    for (uint32_t i = 0; i < r->n_slots; i++) {
        const struct kvmmm_floor_slot *slot = &r->slots[i];
        struct kvm_userspace_memory_region region = {
            .slot = i,
            .flags = slot->flags,
            .guest_phys_addr = slot->gpa,
            .memory_size = slot->n_bytes,
            .userspace_addr = m->hva + slot->offset,
        };
        if (ioctl(m->vm_fd, KVM_SET_USER_MEMORY_REGION, &region))
            return -errno;
    }
    return 0;
}

static int make_vcpu(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    m->vcpu_fd = ioctl(m->vm_fd, KVM_CREATE_VCPU, 0);
    if (m->vcpu_fd < 0)
        return -errno;
    void *run = mmap(NULL, r->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu_fd, 0);
    if (run == MAP_FAILED)
        return -errno;
    m->run = run;
    m->run_bytes = r->run_bytes;
    return 0;
}

static int set_cpuid(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m)
{
    if (ioctl(m->vcpu_fd, KVM_SET_CPUID2, r->cpuid))
        return -errno;
    return r->xcrs && ioctl(m->vcpu_fd, KVM_SET_XCRS, r->xcrs) ? -errno : 0;
}

static int run_first(const struct kvmmm_floor_recipe *r, struct kvmmm_floor_machine *m,
                     struct kvmmm_watchdog *dog)
{
    struct kvm_run *run = m->run;
    memcpy(&run->s.regs.sregs, (const void *)r->sregs, sizeof run->s.regs.sregs);
    memcpy(&run->s.regs.regs, (const void *)r->regs, sizeof run->s.regs.regs);
    run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    int rc = kvmmm_floor_enter(dog, m->vcpu_fd, run);
    if (rc)
        return rc;
    return run->exit_reason == KVM_EXIT_IO && run->io.port == r->last_port ? 0 : -EPROTO;
}

int64_t kvmmm_floor_start(const struct kvmmm_floor_recipe *recipe, struct kvmmm_floor_machine *m,
                          int64_t timeout_ns)
{
    static int (*const steps[])(const struct kvmmm_floor_recipe *, struct kvmmm_floor_machine *) = {
        [KVMMM_FLOOR_ARENA] = make_arena,  [KVMMM_FLOOR_VM] = make_vm,
        [KVMMM_FLOOR_IMAGE] = load_image,  [KVMMM_FLOOR_FILL] = fill,
        [KVMMM_FLOOR_MEMSLOT] = add_slots, [KVMMM_FLOOR_VCPU] = make_vcpu,
        [KVMMM_FLOOR_CPUID] = set_cpuid,
    };
    struct kvmmm_watchdog dog;
    *m = (struct kvmmm_floor_machine){.vm_fd = -1, .vcpu_fd = -1, .memory_fd = -1};
    int rc = kvmmm_watchdog_arm(&dog, timeout_ns);
    if (rc)
        return rc;
    int64_t start_ns = kvmmm_now_ns(), then_ns = start_ns;
    for (int step = 0; step < KVMMM_FLOOR_STEPS && !rc; step++) {
        rc = step == KVMMM_FLOOR_RUN ? run_first(recipe, m, &dog) : steps[step](recipe, m);
        int64_t now_ns = kvmmm_now_ns();
        m->step_ns[step] = now_ns - then_ns;
        then_ns = now_ns;
    }
    kvmmm_watchdog_disarm(&dog);
    return rc ? rc : then_ns - start_ns;
}

int64_t kvmmm_floor_close(struct kvmmm_floor_machine *m)
{
    int64_t start_ns = kvmmm_now_ns();
    if (m->run)
        munmap(m->run, m->run_bytes);
    if (m->vcpu_fd >= 0)
        close(m->vcpu_fd);
    if (m->vm_fd >= 0)
        close(m->vm_fd);
    if (m->arena_bytes)
        munmap((void *)m->hva, m->arena_bytes);
    if (m->memory_fd >= 0)
        close(m->memory_fd);
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    *m = (struct kvmmm_floor_machine){.vm_fd = -1, .vcpu_fd = -1, .memory_fd = -1};
    return taken_ns;
}
