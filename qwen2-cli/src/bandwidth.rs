//! How fast this machine reads memory: the roof over decoding.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Much larger than any last-level cache that a desktop has.
const BYTES: usize = 512 << 20;
const MIN_PASSES: usize = 5;
const MIN_TIME: Duration = Duration::from_millis(250);

/// Bytes that `threads` threads read in a second from a buffer of 512 MiB, the median of passes.
pub(crate) fn read_bytes_per_s(threads: usize) -> f64 {
    // Not zeros: untouched zero pages are one page of the system, which the cache would hold.
    let buffer = vec![1_u64; BYTES / 8];
    let part = buffer.len().div_ceil(threads.max(1));
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(part) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    pass();
    let start = Instant::now();
    let mut rates = Vec::new();
    while rates.len() < MIN_PASSES || start.elapsed() < MIN_TIME {
        rates.push(pass());
    }
    median(rates)
}

/// Sixteen sums side by side, so that loads wait for nothing but the memory.
fn sum(numbers: &[u64]) -> u64 {
    let (blocks, rest) = numbers.as_chunks::<16>();
    let mut sums = [0_u64; 16];
    for block in blocks {
        for (sum, number) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*number);
        }
    }
    sums.iter()
        .chain(rest)
        .fold(0, |sum, number| sum.wrapping_add(*number))
}

/// The middle of the values, or the mean of the two in the middle; 0 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        _ => f64::midpoint(values[(n - 1) / 2], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read() {
        let numbers: Vec<u64> = (1..=1003).collect();
        assert_eq!(sum(&numbers), 1003 * 1004 / 2);
    }

    #[test]
    fn median_of_even_and_odd_counts() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
