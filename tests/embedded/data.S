/* SPDX-License-Identifier: MIT */
/* The model file and the prompts, as they are, in flash. MODEL and PROMPTS are given by the build. */
    .section .rodata.model, "a"
    .global model_bytes, model_end, prompts, prompts_end
    .balign 64
model_bytes:
    .incbin MODEL
model_end:
    .balign 4
prompts:
    .incbin PROMPTS
prompts_end:
    .byte 0
