// Every kernel that is compiled, for fp16 and for bf16: LEAN_DECODE_KERNEL(head_dim, head_dim_v, tiles of 16
// query rows, bytes of an element of the caches). lean_attention/_build.py reads it too: each is an object of
// its own, so that they compile side by side, and a driver that compiles PTX compiles what is used.
//
// These are all head_dims that models use, exactly; others go through the next larger one. Two row tiles
// where the registers hold them.
LEAN_DECODE_KERNEL(64, 64, 1, 2)
LEAN_DECODE_KERNEL(64, 64, 2, 2)
LEAN_DECODE_KERNEL(80, 80, 1, 2)
LEAN_DECODE_KERNEL(80, 80, 2, 2)
LEAN_DECODE_KERNEL(96, 96, 1, 2)
LEAN_DECODE_KERNEL(96, 96, 2, 2)
LEAN_DECODE_KERNEL(128, 128, 1, 2)
LEAN_DECODE_KERNEL(128, 128, 2, 2)
LEAN_DECODE_KERNEL(192, 128, 1, 2)
LEAN_DECODE_KERNEL(192, 192, 1, 2)
LEAN_DECODE_KERNEL(256, 256, 1, 2)
LEAN_DECODE_KERNEL(512, 512, 1, 2)
LEAN_DECODE_KERNEL(64, 64, 1, 1)
LEAN_DECODE_KERNEL(128, 128, 1, 1)
LEAN_DECODE_KERNEL(256, 256, 1, 1)
LEAN_DECODE_KERNEL(512, 512, 1, 1)
