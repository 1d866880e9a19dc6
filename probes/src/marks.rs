//! Marks (USDT) in our own binary, for bpftrace, perf, gdb and whoever reads `.note.stapsdt`.
//!
//! Provider `ramferry`. A mark that nobody listens to is the reading of one word that stays zero; its arguments are
//! not even computed.
