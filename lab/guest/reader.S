# A boot sector that reads one page from its disk, and then says for ever whether the page is in its memory.
#
# Prints READING before the read, and DATA OK or DATA LOST again and again after it.

        .code16
        .globl _start
_start:
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        cld
        mov     $reading, %si
        call    print
        mov     $packet, %si
        mov     $0x42, %ah
        int     $0x13
        jc      failed
again:
        mov     $0x1000, %ax            # the page at 0x10000
        mov     %ax, %es
        xor     %di, %di
        mov     $2048, %cx
        mov     $0xa55a, %ax
        repe scasw
        mov     $ok, %si
        je      say
        mov     $lost, %si
say:
        call    print
        mov     $0x4000, %cx
pause:
        in      $0x80, %al
        loop    pause
        jmp     again
failed:
        mov     $no_disk, %si
        call    print
stop:
        hlt
        jmp     stop

print:                                  # DL is the disk's number
        push    %dx
wait:
        mov     $0x3fd, %dx
        in      %dx, %al
        test    $0x20, %al
        jz      wait
        lodsb
        test    %al, %al
        jz      printed
        mov     $0x3f8, %dx
        out     %al, %dx
        jmp     wait
printed:
        pop     %dx
        ret

        .balign 4
packet:
        .byte   16, 0
        .word   8                       # sectors
        .word   0, 0x1000               # to 1000:0000
        .quad   2048                    # from 1 MiB on
reading:
        .asciz  "READING\n"
ok:
        .asciz  "DATA OK\n"
lost:
        .asciz  "DATA LOST\n"
no_disk:
        .asciz  "NO DISK\n"

        .org    510
        .word   0xaa55
