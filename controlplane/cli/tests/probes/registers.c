/* Registers through the real libibverbs a known number of times, and fails a known number of times. Waits for a line
 * before it begins. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <infiniband/verbs.h>

#define WRITABLE (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)

static const size_t sizes[] = { 4096, 65536, 1 << 20 };

static void require(int holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static void *memory(size_t bytes)
{
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    require(start != MAP_FAILED, "mmap");
    return start;
}

static struct ibv_pd *open_domain(const char *name)
{
    struct ibv_device **devices = ibv_get_device_list(NULL);
    struct ibv_context *context = NULL;

    require(devices != NULL, "ibv_get_device_list");
    for (int i = 0; devices[i]; i++)
        if (!strcmp(ibv_get_device_name(devices[i]), name))
            context = ibv_open_device(devices[i]);
    require(context != NULL, name);
    return ibv_alloc_pd(context);
}

int main(void)
{
    struct ibv_pd *domain = open_domain("rxe0");
    char line[16];

    require(domain != NULL, "ibv_alloc_pd");
    require(fgets(line, sizeof(line), stdin) != NULL, "a line");
    for (unsigned size = 0; size < sizeof(sizes) / sizeof(*sizes); size++) {
        for (int turn = 0; turn < 20; turn++) {
            void *start = memory(sizes[size]);
            struct ibv_mr *region = turn % 2 ? ibv_reg_mr(domain, start, sizes[size], WRITABLE)
                                             : ibv_reg_mr_iova(domain, start, sizes[size], 0, WRITABLE);

            require(region != NULL, "ibv_reg_mr");
            require(!ibv_dereg_mr(region), "ibv_dereg_mr");
            munmap(start, sizes[size]);
        }
    }
    void *gone = memory(8192);
    munmap(gone, 8192);
    for (int turn = 0; turn < 5; turn++)
        require(!ibv_reg_mr(domain, gone, 8192, WRITABLE) && errno == EFAULT, "EFAULT");
    /* Who may write from afar must be able to write here. */
    void *start = memory(8192);
    for (int turn = 0; turn < 3; turn++)
        require(!ibv_reg_mr(domain, start, 8192, IBV_ACCESS_REMOTE_WRITE) && errno == EINVAL, "EINVAL");
    return 0;
}
