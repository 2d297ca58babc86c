//! Runs `qwen2_fuzz::targets::checkpoint` on whatever libFuzzer makes up.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qwen2_fuzz::targets::checkpoint(input));
