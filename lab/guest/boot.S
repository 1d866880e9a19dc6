# Multiboot entry: 32-bit protected mode to 64-bit long mode, with the first
# GiB mapped one to one; then the way into ring 3 and back.

        .set    MULTIBOOT_MAGIC, 0x1badb002
        .set    MULTIBOOT_FLAGS, 0x00000003     # page-aligned, with a memory map

        .section .multiboot, "a"
        .balign 4
        .long   MULTIBOOT_MAGIC
        .long   MULTIBOOT_FLAGS
        .long   -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .section .bss
        .balign 4096
        .globl  boot_pml4, boot_pdpt
boot_pml4:
        .skip   4096
boot_pdpt:
        .skip   4096
boot_pd:
        .skip   4096
        .skip   16384
kernel_stack_top:
        .skip   32768
program_stack_top:

        .section .data
        .balign 16
tss:
        .long   0
        .quad   kernel_stack_top                # the stack of ring 0
        .skip   90
        .word   tss_end - tss                   # no I/O from ring 3
tss_end:
        .balign 8
gdt:
        .quad   0
        .quad   0x00af9a000000ffff              # 0x08: 64-bit code, ring 0
        .quad   0x00cf92000000ffff              # 0x10: data, ring 0
        .quad   0x00cff2000000ffff              # 0x18: data, ring 3
        .quad   0x00affa000000ffff              # 0x20: 64-bit code, ring 3
gdt_tss:                                        # 0x28
        .word   tss_end - tss - 1
        .word   0                               # base, filled in by enter_program
        .byte   0
        .byte   0x89
        .byte   0
        .byte   0
        .quad   0
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt

        .section .text
        .code32
        .globl  _start
_start:
        cli
        cld
        mov     $kernel_stack_top, %esp
        mov     %ebx, %esi                      # multiboot information

        # The loader may or may not have cleared .bss: do it.
        mov     $bss_start, %edi
        mov     $bss_end, %ecx
        sub     %edi, %ecx
        shr     $2, %ecx
        xor     %eax, %eax
        rep stosl

        movl    $boot_pdpt + 7, boot_pml4
        movl    $boot_pd + 7, boot_pdpt
        mov     $boot_pd, %edi
        mov     $0x87, %eax                     # present, writable, ring 3, 2 MiB
        mov     $512, %ecx
1:      mov     %eax, (%edi)
        add     $0x200000, %eax
        add     $8, %edi
        dec     %ecx
        jnz     1b

        mov     %cr4, %eax
        or      $0x20, %eax                     # PAE
        mov     %eax, %cr4
        mov     $boot_pml4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx               # EFER
        rdmsr
        or      $0x100, %eax                    # LME
        wrmsr
        mov     %cr0, %eax
        or      $0x80000001, %eax               # PG, PE
        and     $0x9fffffff, %eax               # caches on
        mov     %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $long_mode

        .code64
long_mode:
        mov     $0x10, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        xor     %ax, %ax
        mov     %ax, %fs
        mov     %ax, %gs
        mov     $kernel_stack_top, %rsp
        mov     %esi, %edi
        xor     %ebp, %ebp
        call    machine_main
2:      cli
        hlt
        jmp     2b

        .globl  enter_program
enter_program:                                  # rdi: entry, rsi: its argument
        mov     $tss, %eax
        mov     %ax, gdt_tss + 2
        shr     $16, %eax
        mov     %al, gdt_tss + 4
        mov     %ah, gdt_tss + 7
        mov     $0x28, %ax
        ltr     %ax
        mov     %rdi, %rax
        mov     %rsi, %rdi
        push    $0x1b                           # ss
        push    $program_stack_top - 8          # as after a call
        push    $0x202                          # rflags: interrupts on
        push    $0x23                           # cs
        push    %rax
        iretq

        # The invalid-opcode exception: `ud2` in ring 3 is a call.
        .globl  on_call
on_call:
        push    %rcx
        push    %rdx
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        sub     $8, %rsp
        cld
        mov     72(%rsp), %rdx                  # where the ud2 is
        cmpw    $0x0b0f, (%rdx)
        jne     not_a_call
        mov     56(%rsp), %rdx
        call    machine_call
        add     $8, %rsp
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rdx
        pop     %rcx
        addq    $2, (%rsp)                      # past the ud2
        iretq
not_a_call:
        mov     $6, %edi
        lea     72(%rsp), %rsi
        call    machine_fault

        .section .note.GNU-stack, "", @progbits
