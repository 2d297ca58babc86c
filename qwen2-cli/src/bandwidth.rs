//! How fast this machine reads memory: the roof over decoding.

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

/// Much larger than any last-level cache that a desktop has.
const BYTES: usize = 512 << 20;
const MIN_PASSES: usize = 5;
const MIN_TIME: Duration = Duration::from_millis(250);

/// Bytes that `threads` threads read in a second from 512 MiB, the median of passes; in huge pages
/// where the system has them, as weights are.
///
/// # Errors
/// What the system says where it has no such memory.
pub(crate) fn read_bytes_per_s(threads: usize) -> io::Result<f64> {
    let mut buffer = MmapMut::map_anon(BYTES)?;
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage); // only advice
    // Not zeros: untouched zero pages are one page of the system, which the cache would hold.
    buffer.fill(1);
    let numbers = buffer.as_chunks().0;
    let part = numbers.len().div_ceil(threads.max(1));
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in numbers.chunks(part) {
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
    Ok(median(rates))
}

/// Places that a thread reads from in turn: one place alone ends with a page for what the processor fetches
/// ahead, and the memory waits meanwhile.
const STREAMS: usize = 8;

/// Numbers of a cache line, or of a half of one.
const LINE: usize = 8;

/// A number of each line, two lines at a place: what counts is the memory, and a processor without wide loads is
/// busy with reading whole lines before the memory is.
fn sum(numbers: &[[u8; 8]]) -> u64 {
    let (blocks, rest) = numbers.as_chunks::<{ 2 * LINE }>();
    let each = blocks.len() / STREAMS;
    let (streams, more) = blocks.split_at(each * STREAMS);
    let streams: [_; STREAMS] = std::array::from_fn(|i| &streams[i * each..(i + 1) * each]);
    let mut sums = [0_u64; STREAMS];
    let add = |sum: &mut u64, block: &[[u8; 8]]| {
        for line in block.chunks(LINE) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(line[0]));
        }
    };
    for i in 0..each {
        for (sum, stream) in sums.iter_mut().zip(streams) {
            add(sum, &stream[i]);
        }
    }
    for block in more {
        add(&mut sums[0], block);
    }
    add(&mut sums[0], rest);
    sums.into_iter().fold(0, u64::wrapping_add)
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
    fn every_line_is_read_once() {
        let numbers: Vec<_> = (0..1003_u64).map(u64::to_ne_bytes).collect();
        let lines = 1003_u64.div_ceil(LINE as u64);
        assert_eq!(sum(&numbers), LINE as u64 * lines * (lines - 1) / 2);
    }

    #[test]
    fn median_of_even_and_odd_counts() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
