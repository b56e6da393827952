// What cuda.h declares: fibres, barriers, warps, asynchronous copies, and the launch of a grid.
#include "cuda.h"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <sys/mman.h>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "fibres switch by hand: write emulator_switch for this processor"
#endif
// Saves the registers that a call preserves, changes the stack, restores them from there.
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

namespace emulator
{

constexpr size_t STACK = 256 * 1024;

struct Copy {
    void *to;
    const void *from;
    int bytes;
};

struct Thread : Fibre {
    void *stack_pointer = nullptr;
    char *stack = nullptr;
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    void *tsan = nullptr, *asan = nullptr;
};

struct Barrier {
    int arrived = 0, any = 0, was_any[2] = {0, 0};
    unsigned turn = 0;
    char tag[2] = {0, 0};
};

struct Warp {
    int arrived = 0;
    unsigned turn = 0;
    void *records[32];
    char tag[2] = {0, 0};
};

struct Running : Block {
    std::vector<Thread> fibres;
    std::vector<Warp> warps;
    Barrier barrier;
    int done = 0;
    unsigned long progress = 0;
    void (*body)(const void *) = nullptr;
    const void *params = nullptr;
    void *main_stack_pointer = nullptr, *main_tsan = nullptr, *main_asan = nullptr;
    const void *main_stack = nullptr;
    size_t main_stack_size = 0;
};

thread_local Fibre *fibre = nullptr;
thread_local Block *block = nullptr;

UNSEEN static Thread &self() { return *static_cast<Thread *>(fibre); }
UNSEEN static Running &running() { return *static_cast<Running *>(block); }

static void release(void *tag)
{
#if defined(__SANITIZE_THREAD__)
    __tsan_release(tag);
#endif
    (void)tag;
}

static void acquire(void *tag)
{
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(tag);
#endif
    (void)tag;
}

[[noreturn]] static void fail(const char *what)
{
    const dim3 at = block->index;
    fprintf(stderr, "emulator: %s (block %u, %u, %u)\n", what, at.x, at.y, at.z);
    abort();
}

// Back to the scheduler, for good if the fibre is done.
UNSEEN static void leave(bool for_good)
{
    Thread &f = self();
    Running &b = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan, b.main_stack, b.main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(b.main_tsan, 1);
#endif
    (void)for_good;
    emulator_switch(&f.stack_pointer, b.main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.asan, &b.main_stack, &b.main_stack_size);
#endif
}

extern "C" UNSEEN void emulator_enter()
{
    Running &b = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.main_stack, &b.main_stack_size);
#endif
    acquire(&b);
    b.body(b.params);
    self().done = true;
    b.done++;
    b.progress++;
    release(&b.done);
    leave(true);
}

UNSEEN static void resume(Thread &f)
{
    Running &b = running();
    fibre = &f;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&b.main_asan, f.stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(f.tsan, 1);
#endif
    emulator_switch(&b.main_stack_pointer, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(b.main_asan, nullptr, nullptr);
#endif
}

UNSEEN void barrier(int predicate, int *any)
{
    Barrier &b = running().barrier;
    running().progress++;
    const unsigned turn = b.turn;
    release(&b.tag[turn & 1]);
    b.any |= predicate != 0;
    if (++b.arrived == block->threads) {
        b.arrived = 0;
        b.was_any[turn & 1] = b.any;
        b.any = 0;
        b.turn++;
    } else
        while (b.turn == turn)
            leave(false);
    acquire(&b.tag[turn & 1]);
    *any = b.was_any[turn & 1];
}

UNSEEN void *meet(void *record, void (*operate)(void **))
{
    Warp &w = running().warps[fibre->index >> 5];
    running().progress++;
    const unsigned turn = w.turn;
    w.records[fibre->index & 31] = record;
    if (++w.arrived == 32) {
        operate(w.records);
        w.arrived = 0;
        w.turn++;
    } else
        while (w.turn == turn)
            leave(false);
    return record;
}

UNSEEN void warp_barrier()
{
    Warp &w = running().warps[fibre->index >> 5];
    char *tag = &w.tag[w.turn & 1];
    int nothing = 0;
    release(tag);
    meet(&nothing, [](void **) {});
    acquire(tag);
}

void copy_later(void *to, const void *from, int bytes)
{
    if ((uintptr_t)to % 16 || (bytes > 0 && (uintptr_t)from % 16))
        fail("an asynchronous copy is not aligned");
    memset(to, 0xff, 16); // NaN until it lands
    self().open.push_back({to, from, bytes});
}

void commit()
{
    self().groups.push_back(std::move(self().open));
    self().open.clear();
}

void wait_for_copies(int pending)
{
    auto &groups = self().groups;
    for (; (int)groups.size() > pending; groups.pop_front())
        for (const Copy &copy : groups.front()) {
            memset(copy.to, 0, 16);
            memcpy(copy.to, copy.from, copy.bytes);
        }
}

UNSEEN static bool all_done(Running &b) { return b.done == b.threads; }
UNSEEN static unsigned long progress_of(Running &b) { return b.progress; }

static void prepare(Running &b, Thread &f, int index, char *stack)
{
    f.index = index;
    f.thread = {(unsigned)index, 0, 0};
    f.stack = stack;
    void **top = (void **)(stack + STACK);
    *--top = nullptr;
    *--top = (void *)&emulator_enter;
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
    release(&b);
#endif
    (void)b;
}

static void run_block(Running &b, const std::vector<char *> &stacks, unsigned seed)
{
    b.fibres.clear();
    b.fibres.resize(b.threads);
    b.warps.assign((b.threads + 31) / 32, Warp());
    b.barrier = Barrier();
    b.done = 0;
    std::vector<int> order(b.threads);
    for (int t = 0; t < b.threads; t++) {
        order[t] = t;
        prepare(b, b.fibres[t], t, stacks[t]);
    }
    unsigned random = seed * 2654435761u + b.index.x;
    while (!all_done(b)) {
        const unsigned long before = progress_of(b);
        for (int t = b.threads - 1; seed && t > 0; t--) {
            random = random * 1664525u + 1013904223u;
            std::swap(order[t], order[(random >> 8) % (t + 1)]);
        }
        for (int t : order)
            if (!b.fibres[t].done)
                resume(b.fibres[t]);
        if (progress_of(b) == before)
            fail("deadlock: no thread can go on");
    }
#if defined(__SANITIZE_THREAD__)
    acquire(&b.done);
    for (Thread &f : b.fibres)
        __tsan_destroy_fiber(f.tsan);
#endif
}

} // namespace emulator

using namespace emulator;

// Runs a grid. Each block gets its own shared memory, filled with NaN, at whose end an address sanitizer sees.
extern "C" void emulator_launch(void (*body)(const void *), const void *params, const unsigned *grid, unsigned threads,
                                size_t shared, unsigned seed)
{
    const long blocks = (long)grid[0] * grid[1] * grid[2];
#pragma omp parallel
    {
        Running b;
        block = &b;
        b.grid = {grid[0], grid[1], grid[2]};
        b.size = {threads, 1, 1};
        b.threads = (int)threads;
        b.body = body;
        b.params = params;
        std::vector<char *> stacks(threads);
        for (char *&stack : stacks)
            stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                 -1, 0);
#if defined(__SANITIZE_THREAD__)
        b.main_tsan = __tsan_get_current_fiber();
#endif
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < blocks; i++) {
            b.index = {(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]), (unsigned)(i / grid[0] / grid[1])};
            b.shared = (unsigned char *)aligned_alloc(1024, (shared + 2047) / 1024 * 1024);
            memset(b.shared, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
            __asan_poison_memory_region(b.shared + shared, (shared + 2047) / 1024 * 1024 - shared);
#endif
            run_block(b, stacks, seed);
#if defined(__SANITIZE_ADDRESS__)
            __asan_unpoison_memory_region(b.shared, (shared + 2047) / 1024 * 1024);
#endif
            free(b.shared);
        }
        for (char *stack : stacks)
            munmap(stack, STACK);
        block = nullptr;
    }
}
