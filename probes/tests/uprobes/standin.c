/* Stands in for libibverbs where there is no RDMA device: its versioned names, its nesting, its way to tell errors. What
 * it pins it really pins (mlock). The inner time of each registration goes to whoever asks for it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

struct ibv_mr {
    void *context, *pd, *addr;
    size_t length;
    uint32_t handle, lkey, rkey;
};

static __thread uint64_t last_inner_ns;

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

uint64_t standin_last_inner_ns(void)
{
    return last_inner_ns;
}

/* access is the errno to fail with; 0: none. */
int ibv_cmd_reg_mr(void *addr, size_t length, int access)
{
    uint64_t start_ns = now_ns();
    int result = access ? access : mlock(addr, length) ? errno : 0;

    last_inner_ns = now_ns() - start_ns;
    return result;
}

struct ibv_mr *ibv_reg_mr_iova2(void *pd, void *addr, size_t length, uint64_t iova, unsigned access)
{
    struct ibv_mr *mr;
    int result = ibv_cmd_reg_mr(addr, length, access);

    (void)iova;
    if (result) {
        errno = result;
        return NULL;
    }
    mr = calloc(1, sizeof(*mr));
    mr->pd = pd;
    mr->addr = addr;
    mr->length = length;
    return mr;
}

struct ibv_mr *ibv_reg_mr_iova(void *pd, void *addr, size_t length, uint64_t iova, int access)
{
    return ibv_reg_mr_iova2(pd, addr, length, iova, access);
}

struct ibv_mr *reg_mr_now(void *pd, void *addr, size_t length, int access)
{
    return ibv_reg_mr_iova2(pd, addr, length, (uintptr_t)addr, access);
}

/* Of the interface of 2005. It is first in the table of symbols. */
struct ibv_mr *reg_mr_of_old(void *pd, void *addr, size_t length, int access)
{
    (void)pd, (void)addr, (void)length, (void)access;
    abort();
}

int dereg_mr_now(struct ibv_mr *mr)
{
    if (mr->handle)
        return mr->handle;
    munlock(mr->addr, mr->length);
    free(mr);
    return 0;
}

int dereg_mr_of_old(struct ibv_mr *mr)
{
    (void)mr;
    abort();
}

__asm__(".symver reg_mr_of_old, ibv_reg_mr@IBVERBS_1.0");
__asm__(".symver reg_mr_now, ibv_reg_mr@@IBVERBS_1.1");
__asm__(".symver dereg_mr_of_old, ibv_dereg_mr@IBVERBS_1.0");
__asm__(".symver dereg_mr_now, ibv_dereg_mr@@IBVERBS_1.1");
