//! Buffers of whole cache lines: a vector or a row of a matrix product that is cut by two lines is read twice.
#![cfg(target_arch = "x86_64")]

/// Numbers of four bytes in a line.
pub(super) const WORDS: usize = 16;

/// A cache line of numbers of four bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Line<T>(pub(super) [T; WORDS]);

/// Numbers of lines, one behind the other.
pub(super) fn flat<T>(lines: &[Line<T>]) -> &[T] {
    const { assert!(size_of::<Line<T>>() == size_of::<[T; WORDS]>()) };
    // SAFETY: a line is its numbers, without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * WORDS) }
}

/// As [`flat`], to be written.
pub(super) fn flat_mut<T>(lines: &mut [Line<T>]) -> &mut [T] {
    const { assert!(size_of::<Line<T>>() == size_of::<[T; WORDS]>()) };
    // SAFETY: a line is its numbers, without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * WORDS) }
}

/// Room for `len` lines, whatever they were before.
pub(super) fn whole<T: Copy + Default>(buffer: &mut Vec<Line<T>>, len: usize) -> &mut [Line<T>] {
    if buffer.len() < len {
        buffer.resize(len, Line::default());
    }
    &mut buffer[..len]
}

/// Room for `len` numbers, whatever they were before.
pub(super) fn room<T: Copy + Default>(buffer: &mut Vec<Line<T>>, len: usize) -> &mut [T] {
    &mut flat_mut(whole(buffer, len.div_ceil(WORDS)))[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_whole_lines_of_the_numbers_that_are_there() {
        let mut buffer = Vec::new();
        room::<u32>(&mut buffer, 33).fill(7);
        assert_eq!((buffer.len(), buffer.as_ptr().addr() % 64), (3, 0));
        assert_eq!(flat(&buffer)[..33], [7; 33]);
        assert_eq!(room(&mut buffer, 5), [7; 5]);
    }
}
