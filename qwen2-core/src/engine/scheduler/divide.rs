//! What a step reads of prompts that wait, divided among them.

use super::super::queue::Place;
use super::Share;

/// Divides what a step reads among prompts: the shortest rest first, so that short ones need not wait
/// for long ones; the first in line gets a quarter at least, so that it does not wait for ever. Long ones
/// take no more than that in a step that gives somebody a first token, `begins` or read here to its end.
pub(super) fn divide(
    mut prompts: Vec<Share>,
    chunk: usize,
    mut begins: bool,
    place: impl Fn(&Share) -> Place,
) -> Vec<Share> {
    let first = prompts.iter().map(&place).min();
    let is_first = |share: &Share| Some(place(share)) == first;
    prompts.sort_by_key(|share| (share.n_tokens, place(share)));
    let least = |share: &Share| match is_first(share) {
        true => share.n_tokens.min(chunk.div_ceil(4)),
        false => 0,
    };
    let mut left = chunk - prompts.iter().map(least).sum::<usize>();
    let mut plan = Vec::new();
    for share in prompts {
        let least = least(&share);
        let more = match begins && share.n_tokens > chunk {
            true => 0,
            false => left,
        };
        let n_tokens = share.n_tokens.min(least + more);
        left -= n_tokens - least;
        begins |= n_tokens == share.n_tokens;
        if n_tokens > 0 {
            plan.push(Share { n_tokens, ..share });
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divided(prompts: &[usize], chunk: usize) -> Vec<(usize, usize)> {
        let prompts = prompts.iter().enumerate();
        let shares = prompts.map(|(index, &n_tokens)| Share::new(index, n_tokens));
        let plan = divide(shares.collect(), chunk, false, |share| {
            (0, share.index as u64)
        });
        let mut plan: Vec<_> = plan
            .iter()
            .map(|share| (share.index, share.n_tokens))
            .collect();
        plan.sort_unstable();
        plan
    }

    #[test]
    fn a_short_prompt_goes_before_a_long_one_which_still_goes_on() {
        assert_eq!(divided(&[4000, 20], 64), [(0, 16), (1, 20)]);
        assert_eq!(divided(&[4000, 3000], 64), [(0, 16), (1, 48)]);
        assert_eq!(divided(&[4000, 60], 64), [(0, 16), (1, 48)]);
        assert_eq!(divided(&[4000, 60, 30], 64), [(0, 16), (1, 18), (2, 30)]);
    }

    #[test]
    fn a_step_reads_no_more_than_its_chunk() {
        assert_eq!(divided(&[4000], 64), [(0, 64)]);
        assert_eq!(divided(&[17], 64), [(0, 17)]);
        assert_eq!(divided(&[], 64), []);
    }
}
